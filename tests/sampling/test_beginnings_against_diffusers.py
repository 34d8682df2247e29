"""Pictures to begin from against diffusers' own pipelines, in the same process and on the same weights."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from pipelines import make_text_pipeline

from ddim_cli import sample
from ddim_cli.config.layers import layers_of
from ddim_cli.errors import ConfigError
from ddim_cli.models.load import load_sampling_network
from ddim_cli.sampling.items import SeedItems
from ddim_cli.sampling.loop import Denoiser, Observer
from ddim_cli.sampling.resolve import resolve
from ddim_cli.sampling.sampler import make_sampler

CPU = torch.device("cpu")
PROMPT = "a bold seven"
# Of seven steps on the trailing grid the stride of diffusers misses the next timestep.
STEPS = 7
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SCHEDULERS = {"epsilon": {}, "v": ZERO_SNR}


def cases(*strengths):
    """Both schedulers with these strengths, with and without noise in the steps; most of the second are slow ones."""
    found = []
    for kind, strength, eta in itertools.product(SCHEDULERS, strengths, (0.0, 0.7)):
        fast = kind == "epsilon" or (strength, eta) == (strengths[-2], 0.7)
        found.append(pytest.param(kind, strength, eta, marks=[] if fast else pytest.mark.slow))
    return pytest.mark.parametrize(("kind", "strength", "eta"), found)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with picture.png, and two masks of it: of black and white alone, and with greys."""
    folder = tmp_path_factory.mktemp("inputs")
    y, x = np.mgrid[:64, :64]
    Image.fromarray(np.stack([4 * x, 4 * y, 255 * ((x // 8 + y // 8) % 2)], 2).astype(np.uint8)).save(
        folder / "picture.png"
    )
    mask = np.zeros((64, 64), np.uint8)
    # Odd edges: a latent is of 2 x 2 pixels.
    mask[17:49, 9:40] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    # Either side of the half at which diffusers tells black from white, and further from it.
    for left, grey in ((41, 127), (45, 128), (49, 60), (53, 200)):
        mask[5:45, left : left + 4] = grey
    Image.fromarray(mask).save(folder / "grey.png")
    return folder


class Pipelines:
    """Pipelines by the channels of their network and their scheduler, made when they are first asked for."""

    def __init__(self, folder):
        self._folder, self._made = folder, {}

    def of(self, kind, channels=4):
        """(its folder, the pipeline)."""
        if (kind, channels) not in self._made:
            folder = self._folder / f"{kind}-{channels}"
            self._made[kind, channels] = folder, make_text_pipeline(folder, channels=channels, **SCHEDULERS[kind])
        return self._made[kind, channels]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return Pipelines(tmp_path_factory.mktemp("pipelines"))


def theirs(name, pipeline, seed, **call):
    """(latent, its picture in about [-1, 1]) that diffusers' pipeline of this name makes of the same parts."""
    import diffusers

    pipeline = getattr(diffusers, name)(**pipeline.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    call |= {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent"}
    latent = pipeline(PROMPT, **call, generator=torch.Generator("cpu").manual_seed(seed)).images
    # What the pipeline does with it for any other output.
    return latent[0], decoded(pipeline, latent)


@torch.no_grad()
def decoded(pipeline, latents):
    return pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]


def in_bytes(picture):
    """[C, H, W] in about [-1, 1] -> [H, W, C] in 0..255, as integers that do not wrap around."""
    return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().int().permute(1, 2, 0).numpy()


def settings(seeds, **sampling):
    sampling = {key: str(value) if isinstance(value, Path) else value for key, value in sampling.items()}
    sampling |= {"prompt": PROMPT, "seeds": seeds, "steps": STEPS}
    return {"sampling": sampling, "scheduler": {"previous_timestep": "diffusers"}}


@cases(0.3, 0.8, 1.0)
def test_a_whole_picture_as_img2img_pipeline(pipelines, inputs, kind, strength, eta):
    folder, pipeline = pipelines.of(kind)
    picture = inputs / "picture.png"
    found = list(sample(settings("3,5", init=picture, strength=strength, eta=eta), folder))
    assert [each.seed for each in found] == [3, 5]
    for each in found:
        call = {"image": Image.open(picture), "strength": strength, "eta": eta}
        _, expected = theirs("StableDiffusionImg2ImgPipeline", pipeline, each.seed, **call)
        assert (each.tensor - expected).abs().max() <= 1e-4
        assert np.abs(np.asarray(each.image) - in_bytes(expected)).max() <= 1


class Last(Observer):
    """Keeps the final states."""

    def step(self, i, x, x0):
        self.x = x.clone()

    def seen(self, row):
        return self.x[row]


def ours(folder, seed, **sampling):
    """(final latent, what our decoder makes of it, the picture's bytes) of one seed."""
    run = resolve(layers_of(settings(str(seed), **sampling), folder))
    sampler = make_sampler(run, load_sampling_network(run.model), CPU, torch.float32)
    launched = Denoiser(sampler, lambda items, decoder: Last()).launch(SeedItems.of(run.config, run.begins), 1)
    [picture] = launched.collect()
    return picture.seen, sampler.decoder.decode(picture.seen[None])[0], picture.pixels.astype(int)


def check_frame(pixels, made, inputs, mask):
    """``pixels`` are ``made`` where the mask is white, the picture to the bit where it is black, and between both in
    between."""
    picture = np.asarray(Image.open(inputs / "picture.png")).astype(int)
    mask = np.asarray(Image.open(inputs / mask))
    assert np.array_equal(pixels[mask == 0], picture[mask == 0])
    assert np.array_equal(pixels[mask == 255], in_bytes(made)[mask == 255])
    # Neither is what it is by chance.
    assert np.abs(in_bytes(made) - picture)[mask == 0].max() > 100
    assert np.abs(in_bytes(made) - picture)[mask == 255].max() > 100
    grey = (mask > 0) & (mask < 255)
    share = mask[..., None] / 255
    blend = share * (made.permute(1, 2, 0).numpy() / 2 + 0.5) * 255 + (1 - share) * picture
    assert np.abs(pixels - blend.clip(0, 255))[grey].max(initial=0) <= 0.5 + 1e-3


@cases(0.6, 1.0)
# Diffusers has no greys: a mask for channels is ours likewise, one for latents is not.
@pytest.mark.parametrize(("channels", "mask"), [(4, "mask.png"), (9, "grey.png")])
def test_a_part_of_a_picture_as_inpaint_pipeline(pipelines, inputs, channels, mask, kind, strength, eta):
    folder, pipeline = pipelines.of(kind, channels)
    call = {"image": Image.open(inputs / "picture.png"), "mask_image": Image.open(inputs / mask)}
    expected, picture = theirs("StableDiffusionInpaintPipeline", pipeline, 3, **call, strength=strength, eta=eta)
    paths = {"init": inputs / "picture.png", "mask": inputs / mask}
    latent, made, pixels = ours(folder, 3, **paths, strength=strength, eta=eta)
    assert (latent - expected).abs().max() <= 1e-4 * expected.abs().max()
    # Everywhere: diffusers leaves what the autoencoder makes of the known part.
    assert np.abs(in_bytes(decoded(pipeline, latent[None])) - in_bytes(picture)).max() <= 1
    check_frame(pixels, made, inputs, mask)


def test_grey_blends_latents_and_pixels(pipelines, inputs):
    folder, _ = pipelines.of("epsilon")
    picture = inputs / "picture.png"
    latent, made, pixels = ours(folder, 3, init=picture, mask=inputs / "grey.png")
    check_frame(pixels, made, inputs, "grey.png")
    [same] = sample(settings("3", init=picture, mask=inputs / "grey.png"), folder)
    assert np.array_equal(np.asarray(same.image), pixels)
    # Also the latents change, in part.
    other, _, _ = ours(folder, 3, init=picture, mask=inputs / "mask.png")
    assert (latent - other).abs().max() > 0.1


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({}, "is for ddim sample: name the picture with --init, and what to make anew with --mask"),
        ({"init": "picture.png"}, "name the picture with --init, and what to make anew with --mask"),
        ({"mask": "mask.png"}, "name the picture with sampling.init"),
        ({"init": "picture.png", "mask": "mask.png", "resample": 2}, "is for networks that know of no mask"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_network_for_inpainting_asks_for(pipelines, inputs, named, says):
    folder, _ = pipelines.of("epsilon", 9)
    named = {key: inputs / value if isinstance(value, str) else value for key, value in named.items()}
    with pytest.raises(ConfigError, match=says):
        sample(settings("3", **named), folder)


def test_a_network_for_inpainting_is_inspected(ddim, pipelines):
    whole, plain = (
        json.loads(ddim("inspect", pipelines.of("epsilon", channels)[0], "--json").stdout) for channels in (9, 4)
    )
    assert (whole["channels"], whole["height"], whole["width"]) == (3, 64, 64)
    assert whole["state"] == plain["state"] == [4, 32, 32]
    # The first convolution has five channels more: 3 x 3 weights for each of 4 channels, at 32 x 32 places.
    assert whole["parameters"] - plain["parameters"] == 5 * 9 * 4
    assert whole["flops_per_image_and_step"] - plain["flops_per_image_and_step"] == 2 * 5 * 9 * 4 * 32 * 32
    shown = ddim("inspect", pipelines.of("epsilon", 9)[0])
    assert (shown.exit_code, "state: 4 x 32 x 32" in shown.stdout) == (0, True)
    assert "fills in parts of pictures" in shown.stdout


def test_a_network_for_inpainting_is_converted(ddim, pipelines, tmp_path):
    from diffusers import DiffusionPipeline

    folder, pipeline = pipelines.of("epsilon", 9)
    assert ddim("convert", folder, tmp_path / "converted").exit_code == 0
    again = DiffusionPipeline.from_pretrained(tmp_path / "converted")
    assert type(again) is type(pipeline)
    assert all(map(torch.equal, again.unet.state_dict().values(), pipeline.unet.state_dict().values()))
