"""Latent and text-to-image models against diffusers' own pipelines, in the same process and on the same weights."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines import make_latent_pipeline, make_text_pipeline

from ddim_cli.config.layers import layers_of, table_layer
from ddim_cli.models.decoders import Decoder
from ddim_cli.models.load import load_sampling_network
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.loop import Denoiser
from ddim_cli.sampling.resolve import resolve
from ddim_cli.sampling.sampler import make_sampler

CPU = torch.device("cpu")
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {"epsilon": {}, "v": ZERO_SNR}
SHAPES = [("sd1", "epsilon"), ("sd1", "v"), ("sd2", "epsilon"), ("sd2", "v")]


@pytest.fixture(
    scope="module",
    params=[
        ("sd1", "epsilon"),
        pytest.param(("sd1", "v"), marks=pytest.mark.slow),
        pytest.param(("sd2", "epsilon"), marks=pytest.mark.slow),
        ("sd2", "v"),
    ],
    ids="-".join,
)
def text_pipeline(request, tmp_path_factory):
    shape, kind = request.param
    folder = tmp_path_factory.mktemp("pipelines") / f"{shape}-{kind}"
    return folder, make_text_pipeline(folder, shape, **SCHEDULERS[kind])


class Recording(Decoder):
    """Remembers what it decoded."""

    def __init__(self, decoder):
        self._decoder = decoder

    def decode(self, x):
        self.decoded = x.clone()
        return self._decoder.decode(x)


def ours(folder, seed, **sections):
    """(final state, picture in 0..255) of one seed."""
    run = resolve(layers_of({**sections, "sampling": {**sections.get("sampling", {}), "seeds": str(seed)}}, folder))
    network = load_sampling_network(run.model)
    sampler = make_sampler(run, network, CPU, torch.float32)
    decoder = Recording(sampler.decoder)
    [picture] = Denoiser(replace(sampler, decoder=decoder)).launch(SeedItems.of(run.config), 1).collect()
    return decoder.decoded[0], picture.pixels


def check(folder, pipeline, seed, settings, model=None, scheduler=None, **call):
    generator = torch.Generator("cpu").manual_seed(seed)
    found = pipeline(**call, generator=generator, output_type="latent").images
    # What the pipeline does with it for any other output.
    with torch.no_grad():
        decoded = pipeline.vae.decode(found / pipeline.vae.config.scaling_factor).sample
    [picture] = pipeline.image_processor.postprocess(decoded, output_type="np")
    latent, pixels = ours(folder, seed, sampling=settings, model=model or {}, scheduler=scheduler or {})
    assert (latent - found[0]).abs().max() <= 1e-4 * found.abs().max()
    assert np.abs(pixels - np.round(picture * 255)).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    ("guidance", "rescale", "negative", "size", "seed"),
    [
        (1.0, 0.0, None, (64, 64), 0),
        (6.0, 0.0, "thin", (64, 64), 1),
        (6.0, 0.7, None, (32, 64), 2),
        (7.5, 0.7, "thin", (64, 32), 3),
        (7.5, 0.0, None, (64, 64), 0),
    ],
)
def test_as_stable_diffusion_pipeline(text_pipeline, eta, guidance, rescale, negative, size, seed):
    folder, pipeline = text_pipeline
    settings = {"prompt": "a bold seven", "steps": 5, "eta": eta, "guidance_scale": guidance}
    settings |= {"guidance_rescale": rescale} | ({"negative_prompt": negative} if negative else {})
    call = {"prompt": "a bold seven", "negative_prompt": negative, "num_inference_steps": 5, "eta": eta}
    call |= {"guidance_scale": guidance, "guidance_rescale": rescale, "height": size[0], "width": size[1]}
    check(folder, pipeline, seed, settings, {"image_size": list(size)}, **call)


def test_as_stable_diffusion_pipeline_where_its_stride_is_off_its_grid(text_pipeline):
    folder, pipeline = text_pipeline
    settings = {"prompt": "zero", "steps": 7}
    call = {"prompt": "zero", "num_inference_steps": 7}
    check(folder, pipeline, 3, settings, scheduler={"previous_timestep": "diffusers"}, **call)


def test_guidance_is_that_of_the_kind_of_model(text_pipeline):
    folder, pipeline = text_pipeline
    check(folder, pipeline, 2, {"prompt": "one", "steps": 4}, prompt="one", num_inference_steps=4)


def test_a_prompt_that_is_too_long_is_cut_as_theirs(tmp_path):
    pipeline = make_text_pipeline(tmp_path, limit=8)
    prompt = "a bold seven the thin one zero zero seven a"
    check(tmp_path, pipeline, 0, {"prompt": prompt, "steps": 3}, prompt=prompt, num_inference_steps=3)


@pytest.mark.parametrize("steps", [25, 50])
def test_eta_1_on_a_trailing_grid_to_zero_snr_is_finite(tmp_path, steps):
    """Diffusers' DDIMScheduler takes the root of a tiny negative number here."""
    make_text_pipeline(tmp_path, **ZERO_SNR)
    latent, _ = ours(tmp_path, 0, sampling={"prompt": "one", "steps": steps, "eta": 1.0})
    assert latent.isfinite().all()


@pytest.mark.parametrize("scale", [0.18215, 1.0])
def test_as_latent_diffusion_pipeline(tmp_path, scale):
    pipeline = make_latent_pipeline(tmp_path, scale)
    generator = torch.Generator("cpu").manual_seed(3)
    expected = pipeline(batch_size=1, generator=generator, num_inference_steps=5, output_type="np").images[0]
    _, pixels = ours(tmp_path, 3, sampling={"steps": 5})
    assert np.abs(pixels - np.round(expected * 255)).max() <= 1
    # The other scale makes another picture: the codebook tells them apart.
    _, other = ours(tmp_path, 3, sampling={"steps": 5}, model={"latent_scale": 1.0 if scale < 1 else 0.18215})
    assert np.abs(other.astype(int) - pixels).max() > 20


@pytest.mark.slow
def test_stable_diffusion_in_its_full_shape(tmp_path):
    """The shape of Stable Diffusion 1.5 with random weights, 256x256, two steps: in float32 and in bfloat16."""
    from ddim_cli.evaluation.architectures import describe_architecture
    from ddim_cli.evaluation.baselines import diffusers_pipeline
    from ddim_cli.sampling.host import free_memory

    if (free_memory() or 0) < 14 << 30:
        pytest.skip("takes 14 GiB of memory")
    settings = {"prompt": "a horse", "steps": 2, "seeds": "3"}
    run = resolve(
        [table_layer({"sampling": settings, "model": {"image_size": [256, 256]}}, "test")],
        describe=lambda model, _: describe_architecture("sd15", tmp_path, model),
    )
    items = SeedItems.of(run.config)

    def ours(dtype):
        sampler = make_sampler(run, load_sampling_network(run.model, CPU, dtype), CPU, dtype)
        [picture] = Denoiser(sampler).launch(items, 1).collect()
        return picture.pixels.astype(int)

    whole = ours(torch.float32)
    pipeline = diffusers_pipeline(run, CPU, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    call = {"num_inference_steps": 2, "height": 256, "width": 256, "generator": generator, "output_type": "np"}
    expected = pipeline("a horse", **call).images[0]
    del pipeline
    assert np.abs(whole - np.round(expected * 255)).max() <= 1
    error = np.square((ours(torch.bfloat16) - whole) / 255).mean()
    assert -10 * np.log10(error) > 30
