import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from ddim_cli import load_model
from ddim_cli.config.schema import ModelSettings
from ddim_cli.errors import ModelError
from ddim_cli.models.describe import bundled_names, describe_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_model, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(tiny_model, directory)
    return directory


def outputs(network, shape, **kwargs):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return network(x, torch.tensor([10, 900]), **kwargs)


def test_equals_diffusers_own_loading(tiny_model):
    theirs = UNet2DModel.from_pretrained(tiny_model / "unet")
    expected = outputs(theirs, (3, 8, 8)).sample
    for source in (tiny_model, tiny_model / "unet"):
        torch.testing.assert_close(outputs(load_model(source), (3, 8, 8)), expected, rtol=1e-6, atol=1e-6)


def test_a_flat_directory(tiny_model, tmp_path):
    for file in (*(tiny_model / "unet").iterdir(), *(tiny_model / "scheduler").iterdir()):
        shutil.copy(file, tmp_path)
    description = describe_model(ModelSettings(source=str(tmp_path)))
    assert description.scheduler["num_train_timesteps"] == 1000
    expected = outputs(load_model(tiny_model), (3, 8, 8))
    assert torch.equal(outputs(load_model(tmp_path), (3, 8, 8)), expected)


def test_variant_and_subfolder(copy):
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / WEIGHTS.replace(".safe", ".ema.safe"))
    (copy / "unet").rename(copy / "network")
    with pytest.raises(ModelError, match="unet"):
        load_model(copy)
    with pytest.raises(ModelError, match=r"no .*model.safetensors; there is .*ema"):
        load_model(copy, subfolder="network")
    assert load_model(copy, subfolder="network", variant="ema").parameters > 0


def test_the_bundled_model(bundled):
    assert "mnist" in bundled_names()
    model = load_model("mnist")
    assert (
        model.parameters
        == model.description.parameters
        == sum(t.numel() for t in load_file(bundled / "unet" / WEIGHTS).values())
    )
    assert model.description.channels == 1
    assert model.description.size == (32, 32)
    assert not model.network.training
    assert next(model.network.parameters()).dtype == torch.float32


def test_the_bundled_model_is_small_and_has_a_card(bundled):
    assert (bundled / "unet" / WEIGHTS).stat().st_size <= 6_000_000
    assert {t.dtype for t in load_file(bundled / "unet" / WEIGHTS).values()} == {torch.float16}
    card = (bundled / "README.md").read_text()
    for word in ("CC BY-SA 3.0", "MNIST", "recipe"):
        assert word in card


def test_dtype(tiny_model):
    assert next(load_model(tiny_model, dtype=torch.bfloat16).network.parameters()).dtype == torch.bfloat16


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "there is no vae"),
        ({"sample_size": None}, "sample_size"),
        ({"out_channels": 5}, "takes 3 channels and gives 5"),
        ({"num_class_embeds": -1}, "num_class_embeds"),
        ({"down_block_types": ["Nonsense", "DownBlock2D"]}, "builds no UNet2DModel"),
        ({"block_out_channels": [8, 32]}, r"has shapes .*in all"),
        ({"layers_per_block": 2}, r"lacks .*in all"),
    ],
)
def test_configs_that_do_not_fit(copy, changes, says):
    edit(copy / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        load_model(copy)


@pytest.mark.parametrize("command", ["sample", "inspect"])
def test_a_variance_that_the_weights_do_not_have(copy, ddim, command):
    edit(copy / "unet" / "config.json", out_channels=6)
    result = ddim(command, *(["-m"] if command == "sample" else []), copy)
    assert result.exit_code == 2
    assert "the config says out_channels = 6, a learned variance, but conv_out of the weights has 3" in result.stderr


def test_keys_that_do_not_fit(copy):
    path = copy / "unet" / WEIGHTS
    weights = load_file(path)
    save_file({**weights, "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match=r"has unknown extra \(1 in all\)"):
        load_model(copy)
    bad = dict(weights)
    bad["conv_in.bias"] = torch.full_like(bad["conv_in.bias"], torch.nan)
    save_file(bad, path)
    with pytest.raises(ModelError, match=r"has NaN in conv_in.bias"):
        load_model(copy)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(copy, ddim, keep):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    result = ddim("sample", "-m", copy, "-o", "out")
    assert result.exit_code == 2
    assert "safetensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_that_is_no_json(copy, ddim):
    (copy / "unet" / "config.json").write_text("{")
    result = ddim("sample", "-m", copy)
    assert result.exit_code == 2
    assert "not JSON" in result.stderr
