"""Text-to-image and latent models on our own networks, beside diffusers' pipelines on the same weights."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from ddim_cli import load_model, sample
from ddim_cli.config.schema import ModelSettings
from ddim_cli.models.conditional_unet import ConditionalUNet
from ddim_cli.models.describe import describe_model
from ddim_cli.models.load import (
    TextNetwork,
    WholeTextNetwork,
    as_sampling_network,
    load_projection,
    load_sampling_network,
)

PROMPT = "a bold seven"


def of(path, **settings):
    return describe_model(ModelSettings(source=str(path), **settings))


@pytest.fixture
def foreign(tiny_text_model, tmp_path):
    """The text model, with a setting that our own network does not know, and that changes nothing here."""
    path = tmp_path / "foreign"
    shutil.copytree(tiny_text_model, path)
    config = path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "key_of_the_future": True}))
    return path


def test_our_own_network_runs_what_it_knows(tiny_text_model, foreign):
    network = load_sampling_network(of(tiny_text_model))
    assert isinstance(network, ConditionalUNet)
    assert isinstance(network, TextNetwork)
    whole = load_sampling_network(of(foreign))
    assert isinstance(whole, WholeTextNetwork)
    x, text = torch.randn(2, 4, 32, 32), torch.randn(2, 77, 8)
    found = [
        each.body(x, each.project(torch.tensor([7])), each.attend(text)) for each in (network, whole) for _ in range(2)
    ]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_apart_needs_no_other_weights(dtype, tiny_text_model):
    """What compiled code is given: the same projections, keys and values as the whole network's, in its dtype."""
    whole, apart = (
        load_sampling_network(of(tiny_text_model), dtype=dtype),
        load_projection(of(tiny_text_model), dtype=dtype),
    )
    steps, text = torch.tensor([3, 900]), torch.randn(2, 77, 8, dtype=dtype)
    assert torch.equal(whole.project(steps), apart.project(steps))
    assert torch.equal(whole.attend(text), apart.attend(text))
    assert apart.attend(text).dtype == dtype
    held = [p for p in apart.parameters() if p.device.type != "meta"]
    assert sum(p.numel() for p in held) < sum(p.numel() for p in whole.parameters()) / 2


def test_a_loaded_model_shares_its_weights(tiny_text_model):
    loaded = load_model(tiny_text_model)
    network = as_sampling_network(loaded)
    assert isinstance(network, ConditionalUNet)
    assert network.conv_out.bias.data_ptr() == loaded.network.conv_out.bias.data_ptr()


@pytest.mark.parametrize(
    ("guidance", "rescale", "negative", "size"),
    [(7.5, 0.0, None, (64, 64)), (6.0, 0.7, "thin", (32, 64)), (1.0, 0.0, None, (64, 64))],
)
def test_pictures_are_those_of_diffusers(guidance, rescale, negative, size, tiny_text_model):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_text_model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=4,
        eta=0.5,
        guidance_scale=guidance,
        guidance_rescale=rescale,
        height=size[0],
        width=size[1],
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    sampling = {"steps": 4, "eta": 0.5, "prompt": PROMPT, "guidance_scale": guidance, "guidance_rescale": rescale}
    config = {
        "sampling": {**sampling, "seeds": "3", **({"negative_prompt": negative} if negative else {})},
        "model": {"image_size": list(size)},
        "scheduler": {"previous_timestep": "diffusers"},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [made] = sample(config, model=tiny_text_model)
    assert np.abs(np.asarray(made.image).astype(int) - np.round(expected * 255)).max() <= 1
    assert np.asarray(made.image).std() > 5, "a picture, not a flat one"
