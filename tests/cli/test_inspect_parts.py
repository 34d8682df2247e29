"""``ddim inspect`` of latent and text-to-image models."""

import hashlib
import json
import shutil

import pytest
import torch

from ddim_cli.config.schema import ModelSettings
from ddim_cli.models import inspect as inspect_module
from ddim_cli.models.describe import describe_model


@pytest.fixture
def copy(tiny_text_model, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(tiny_text_model, directory)
    return directory


def inspected(ddim, source, *args):
    result = ddim("inspect", source, *args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_parts_of_a_text_model(ddim, tiny_text_model):
    found = inspected(ddim, tiny_text_model)
    assert (found["class"], found["channels"], found["height"], found["width"]) == ("UNet2DConditionModel", 3, 64, 64)
    assert (found["state"], found["latent_scale"], found["prompt_tokens"]) == ([4, 32, 32], 0.18215, 77)
    assert found["guidance_scale"] == 7.5
    assert found["scheduler"]["beta_schedule"] == "scaled_linear"
    parts = {part["name"]: part for part in found["parts"]}
    assert {name: part["class"] for name, part in parts.items()} == {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    for name, file in (
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
    ):
        data = (tiny_text_model / file).read_bytes()
        assert parts[name]["sha256"] == hashlib.sha256(data).hexdigest()
        assert parts[name]["bytes"] == len(data)
        assert parts[name]["dtypes"] == {"float32": parts[name]["parameters"]}
    assert found["parameters"] == sum(part["parameters"] for part in parts.values())
    assert found["weights"]["sha256"] == describe_model(ModelSettings(source=str(tiny_text_model))).sha256


def test_the_hash_of_the_whole_is_of_every_part(ddim, copy):
    before = inspected(ddim, copy)
    for name in ("unet", "vae", "text_encoder", "tokenizer"):
        file = next(path for path in (copy / name).iterdir() if path.suffix == ".safetensors" or name == "tokenizer")
        kept = file.read_bytes()
        # The last byte of weights is a value's; a blank at the end of JSON says nothing.
        file.write_bytes(kept + b" " if name == "tokenizer" else kept[:-1] + bytes([kept[-1] ^ 1]))
        after = inspected(ddim, copy)
        changed = {
            a["name"] for a, b in zip(before["parts"], after["parts"], strict=True) if a["sha256"] != b["sha256"]
        }
        assert changed == {name}
        assert after["weights"]["sha256"] != before["weights"]["sha256"]
        file.write_bytes(kept)


def test_the_parts_of_a_latent_model(ddim, tiny_latent_model):
    found = inspected(ddim, tiny_latent_model, "--set", "model.latent_scale=0.5", "--image-size", "64x128")
    assert (found["height"], found["width"], found["state"]) == (64, 128, [3, 32, 64])
    assert (found["latent_scale"], found["prompt_tokens"], found["guidance_scale"]) == (0.5, None, 1.0)
    assert [part["name"] for part in found["parts"]] == ["unet", "vqvae"]
    assert found["blocks"][1] == "AttnDownBlock2D: 2 layers, 64 channels, 16x32"


def test_what_a_person_sees(ddim, tiny_text_model):
    shown = ddim("inspect", tiny_text_model).stdout
    for text in (
        "state: 4 x 32 x 32, latents times 0.18215",
        "prompt: at most 75 tokens; guided by 7.5",
        "CrossAttnDownBlock2D: 1 layers, 8 channels, 8 heads, 16x16",
        "text_encoder: CLIPTextModel, ",
        "tokenizer: CLIPTokenizer, ",
        ", of all parts",
        "GFLOP an image and step, twice that with guidance",
    ):
        assert text in shown, text
    assert "parts" not in ddim("inspect", "mnist").stdout


def test_levels_of_different_depth(ddim, copy):
    edit(copy / "unet" / "config.json", layers_per_block=[1, 3], attention_head_dim=[2, 4])
    found = inspected(ddim, copy)
    assert found["blocks"][:2] == [
        "DownBlock2D: 1 layers, 4 channels, 32x32",
        "CrossAttnDownBlock2D: 3 layers, 8 channels, 4 heads, 16x16",
    ]
    assert found["blocks"][3:] == [
        "CrossAttnUpBlock2D: 4 layers, 8 channels, 4 heads, 16x16",
        "UpBlock2D: 2 layers, 4 channels, 32x32",
    ]


@pytest.mark.parametrize("size", [None, (48, 80)])
@pytest.mark.parametrize("fixture", ["tiny_text_model", "tiny_latent_model"])
def test_flops_are_those_that_torch_counts(fixture, size, request):
    """Ours are added up from the layers; torch watches diffusers' network run."""
    model = describe_model(ModelSettings(source=str(request.getfixturevalue(fixture)), image_size=size))
    assert inspect_module.flops(model) == inspect_module._watched(model)


def test_memory_has_all_parts_in_it(tiny_text_model):
    model = describe_model(ModelSettings(source=str(tiny_text_model)))
    activations = max(16 * inspect_module.activation_bytes(model, 2), inspect_module.decoding_bytes(model))
    others = model.latents.autoencoder.parameters + model.latents.text.encoder.parameters
    assert inspect_module.memory(model, 8, 2) == 2 * model.parameters + 4 * others + activations
    assert inspect_module.decoding_bytes(model) > 64 * 64 * 8 * 4


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("vae", "a part of the pipeline is missing: there is no vae"),
        ("text_encoder", "a part of the pipeline is missing: there is no text_encoder/config.json"),
        ("text_encoder/model.safetensors", "there are no weights in text_encoder"),
        ("tokenizer", "the tokenizer is missing"),
        ("scheduler", "there is no scheduler/scheduler_config.json"),
    ],
)
def test_a_part_that_is_missing(ddim, copy, lost, says):
    shutil.rmtree(copy / lost) if (copy / lost).is_dir() else (copy / lost).unlink()
    result = ddim("inspect", copy)
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_damaged_weights(ddim, copy, part):
    path = copy / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    result = ddim("inspect", copy)
    assert result.exit_code == 2
    assert f"{path}: not a whole safetensors file" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_text_encoder_that_does_not_fit(ddim, copy):
    edit(copy / "text_encoder" / "config.json", hidden_size=16)
    result = ddim("inspect", copy)
    assert result.exit_code == 2
    assert "takes texts of 8 channels (cross_attention_dim), and the text encoder gives 16" in result.stderr


@pytest.mark.parametrize(("said", "limit"), [(20, 20), (1e30, 77), (None, 77), ("x", 77)])
def test_how_many_tokens_a_prompt_may_have(copy, said, limit):
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=said)
    text = describe_model(ModelSettings(source=str(copy))).latents.text
    assert text.limit == limit
    if isinstance(said, int):
        from ddim_cli.models.text import TextEncoder, load_tokenizer

        assert load_tokenizer(text.tokenizer).model_max_length == limit
        assert TextEncoder(text).encode("a")[0].shape == (1, limit, 8)


def test_a_foreign_network_costs_what_torch_counts(copy):
    """One that diffusers runs has no sum of ours."""
    edit(copy / "unet" / "config.json", key_of_the_future=True)
    model = describe_model(ModelSettings(source=str(copy)))
    assert inspect_module.flops(model) > 2 * 32 * 32 * 9 * (4 * 4 + 4 * 4)
    assert torch.get_default_device() == torch.device("cpu")
