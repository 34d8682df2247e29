"""``ddim convert`` of models of several parts: what diffusers' pipelines load is the same model."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim_cli import sample
from ddim_cli.config.schema import ModelSettings
from ddim_cli.models.describe import describe_model

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "vqvae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture
def copy(tiny_text_model, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(tiny_text_model, directory)
    return directory


def pixels(pipeline, *args, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    found = pipeline(*args, num_inference_steps=3, generator=generator, output_type="np", **options).images[0]
    return np.round(found * 255).astype(int)


def test_a_text_model(ddim, tiny_text_model, tmp_path):
    from diffusers import StableDiffusionPipeline

    result = ddim("convert", tiny_text_model, "out", "--json")
    assert result.exit_code == 0, result.stderr
    model = describe_model(ModelSettings(source=str(tiny_text_model)))
    assert json.loads(result.stdout) == {"directory": "out", "parameters": model.all_parameters, "dtype": "float32"}
    for part in ("unet", "vae", "text_encoder"):
        before, after = (load_file(folder / part / WEIGHTS[part]) for folder in (tiny_text_model, tmp_path / "out"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for file in (tiny_text_model / "tokenizer").iterdir():
        assert (tmp_path / "out" / "tokenizer" / file.name).read_bytes() == file.read_bytes()
    theirs, ours = (StableDiffusionPipeline.from_pretrained(path) for path in (tiny_text_model, tmp_path / "out"))
    assert np.array_equal(pixels(theirs, "a seven"), pixels(ours, "a seven"))


def test_an_unconditional_latent_model(ddim, tiny_latent_model, tmp_path):
    from diffusers import LDMPipeline

    assert ddim("convert", tiny_latent_model, "out", "--set", "model.latent_scale=0.4").exit_code == 0
    pipeline = LDMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.vqvae.config.scaling_factor == 0.4
    config = {"sampling": {"steps": 3, "seeds": "5"}, "scheduler": {"previous_timestep": "diffusers"}}
    [made] = sample(config, model=tmp_path / "out")
    assert np.abs(np.asarray(made.image).astype(int) - pixels(pipeline)).max() <= 1
    [other] = sample(config, model=tiny_latent_model)
    assert np.abs(np.asarray(other.image).astype(int) - np.asarray(made.image)).max() > 10, "the scale is of effect"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(ddim, copy, tmp_path, dtype):
    # Files of before have the positions among the weights: no floats.
    path = copy / "text_encoder" / WEIGHTS["text_encoder"]
    save_file({**load_file(path), "text_model.embeddings.position_ids": torch.arange(77)[None]}, path, {"format": "pt"})
    result = ddim("convert", copy, "out", "--dtype", dtype)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith(f"parameters in {dtype}\n")
    for part in ("unet", "vae", "text_encoder"):
        stored = load_file(tmp_path / "out" / part / WEIGHTS[part])
        assert {str(t.dtype) for t in stored.values() if t.is_floating_point()} == {f"torch.{dtype}"}
    found = json.loads(ddim("inspect", "out", "--json").stdout)
    assert [set(part["dtypes"]) - {"int64"} for part in found["parts"]] == [{dtype}] * 3 + [set()]
    args = ("-n", 1, "--steps", 3, "--prompt", "a")
    assert ddim("sample", "-m", "out", *args, "-o", "pictures", "--no-compile").exit_code == 0


def test_a_pixel_model_in_half(ddim, tiny_model, tmp_path):
    from diffusers import DDIMPipeline

    assert ddim("convert", tiny_model, "out", "--dtype", "float16").exit_code == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "unet" / WEIGHTS["unet"]).values()} == {torch.float16}
    assert np.ptp(pixels(DDIMPipeline.from_pretrained(tmp_path / "out"))) > 10


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_nothing_is_left_of_a_conversion_that_fails(ddim, copy, tmp_path, part):
    path = copy / part / WEIGHTS[part]
    path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("kept")
    result = ddim("convert", copy, "out", "--overwrite")
    assert result.exit_code == 2
    assert "not a whole safetensors file" in result.stderr
    assert (tmp_path / "out" / "kept").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "out"}


def test_a_model_over_itself(ddim, copy):
    """All of it is read before the directory goes."""
    assert ddim("convert", copy, copy).exit_code == 2
    assert ddim("convert", copy, copy, "--overwrite", "--dtype", "bfloat16").exit_code == 0
    assert json.loads(ddim("inspect", copy, "--json").stdout)["prompt_tokens"] == 77


def test_a_dtype_that_is_none(ddim, copy):
    result = ddim("convert", copy, "out", "--dtype", "float15")
    assert result.exit_code == 2
    assert "--dtype float15: it takes float32, float16, bfloat16; did you mean float16" in result.stderr
