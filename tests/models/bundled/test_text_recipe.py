"""The recipe of the text model, on a handful of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from ddim_cli.models.bundled import text_recipe, training

TINY = {"autoencoder_images": 32, "images": 32, "autoencoder_batch_size": 8, "batch_size": 8, "save_every": 8}
PARTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Strokes of many widths, five of each class to train on and one to test on."""
    rng = np.random.default_rng(0)

    def pictures(count: int) -> np.ndarray:
        x = np.zeros((count, 28, 28), np.uint8)
        for each in x:
            left = rng.integers(5, 15)
            each[4:24, left : left + rng.integers(1, 8)] = 255
        return x

    path = tmp_path_factory.mktemp("data") / "strokes.npz"
    labels = np.arange(50) % 10
    np.savez(path, x_train=pictures(50), y_train=labels, x_test=pictures(10), y_test=labels[:10])
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A folder with work/ and exported/ of a run in one go."""
    folder = tmp_path_factory.mktemp("trained")
    text_recipe.train(data, folder / "work", folder / "exported", **TINY)
    return folder


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {f"{part}.{k}": t for part, file in PARTS.items() for k, t in load_file(directory / part / file).items()}


@pytest.mark.slow
def test_logs_say_how_it_goes(trained):
    for name in ("autoencoder", "denoiser"):
        lines = [json.loads(line) for line in (trained / "work" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["images"] for line in lines] == [8, 16, 24, 32]
        assert all(np.isfinite(line["test_loss"]) for line in lines)


@pytest.mark.slow
def test_diffusers_samples_from_what_it_exports(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "exported")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a bold seven", ""], num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert images.shape == (2, 32, 32, 1)
    assert np.isfinite(images).all()


@pytest.mark.slow
def test_weights_are_half_precision_and_computed_with_in_single(trained):
    assert {t.dtype for t in weights(trained / "exported").values()} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "exported")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}


@pytest.mark.slow
def test_text_encoder_has_the_names_of_every_transformers(trained):
    """Up to 5.5 they begin with text_model; later ones read such files too, and all of them."""
    stored = load_file(trained / "exported" / "text_encoder" / PARTS["text_encoder"])
    assert all(name.startswith("text_model.") for name in stored)
    encoder = StableDiffusionPipeline.from_pretrained(trained / "exported").text_encoder
    for name, tensor in encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        assert torch.equal(stored[name].float(), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("autoencoder", marks=pytest.mark.slow), "denoiser"])
def test_a_run_that_was_killed_goes_on(data, trained, tmp_path, monkeypatch, stage):
    """It ends where the run in one go ended."""
    saved = training.save_atomically

    def killed(state, path):
        saved(state, path)
        if path.stem == stage and state["seen"] == 16:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        text_recipe.train(data, tmp_path / "work", tmp_path / "exported", **TINY)
    monkeypatch.undo()
    text_recipe.train(data, tmp_path / "work", tmp_path / "exported", **TINY)
    whole, resumed = weights(trained / "exported"), weights(tmp_path / "exported")
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_evening_out_changes_latents_and_no_picture(x):
    torch.manual_seed(0)
    vae = text_recipe.build_autoencoder().eval()
    with torch.no_grad():
        # Spreads, centres and noise that are nothing like each other.
        vae.quant_conv.weight[:4] *= torch.tensor([0.5, 1, 2, 20]).view(-1, 1, 1, 1)
        vae.quant_conv.bias[:] = torch.tensor([3.0, -1, 0, 5, -6, -5, -4, -3])
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean + 0.1 * before.std).sample
        said = text_recipe.even_out(vae, before.parameters)
        after = vae.encode(x).latent_dist
        again = vae.decode(after.mean + 0.1 * after.std).sample
    torch.testing.assert_close(said, after.parameters, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, picture, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    spreads = (after.mean.square() + after.var).mean((0, 2, 3)).sqrt() * vae.config.scaling_factor
    torch.testing.assert_close(spreads, torch.ones(4), rtol=1e-3, atol=0)


def test_velocity_loss_is_nought_for_the_true_velocity(x):
    """Where the prediction leads back to the picture: x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    alpha_bar = text_recipe.build_scheduler().alphas_cumprod
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 10, 500, 900, 998, 999])

    def network(x_t, timesteps, tokens):
        a = alpha_bar[timesteps].view(-1, 1, 1, 1)
        # From x_t = sqrt(a) x_0 + sqrt(1 - a) epsilon and x_0 alone, except where x_t says nothing else.
        epsilon = (x_t - a.sqrt() * x) / (1 - a).sqrt()
        return a.sqrt() * epsilon - (1 - a).sqrt() * x

    assert text_recipe.velocity_loss(network, x, noise, timesteps, torch.zeros(0), alpha_bar).item() < 1e-8


def test_the_last_timestep_has_no_signal():
    alpha_bar = text_recipe.build_scheduler().alphas_cumprod
    assert alpha_bar[-1] == 0
    assert (alpha_bar[:-1] > alpha_bar[1:]).all()


@pytest.mark.slow
def test_two_processes_train_as_one_does(data, trained, tmp_path):
    """But for the order of sums: torchrun's processes halve each batch."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command = [*launcher, text_recipe.__name__, str(data), f"--work-dir={tmp_path}", *options]
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[3])
    for name in ("autoencoder", "denoiser"):
        alone, shared = ((folder / f"{name}.jsonl").read_text() for folder in (trained / "work", tmp_path))
        losses = [[json.loads(line)["test_loss"] for line in text.splitlines()] for text in (alone, shared)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-3)
