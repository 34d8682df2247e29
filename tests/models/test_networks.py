"""UNet2DModel in the configurations its class allows: saved by diffusers, loaded here, the same outputs."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddim_cli import load_model, sample
from ddim_cli.errors import ConfigError, ModelError

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
WIDE = {**SMALL, "block_out_channels": (32, 64), "norm_num_groups": 32}
DOWN = {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}
CONFIGURATIONS = {
    "plain": {},
    "resnet-down": {**DOWN, "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")},
    "skip": {
        **WIDE,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    },
    "k-blocks": {**WIDE, "down_block_types": ("KDownBlock2D", "KDownBlock2D"), "up_block_types": ("KUpBlock2D",) * 2},
    "classes": {"num_class_embeds": 10},
    "centered": {"center_input_sample": True},
    "fourier": {"time_embedding_type": "fourier"},
    "learned-time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "non-square": {"sample_size": (8, 16)},
    "no-attention": {"add_attention": False},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "no-mid-block": {"mid_block_type": None},
    "resnet-sampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "original-padding": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "rgba": {"in_channels": 4, "out_channels": 4},
}


def save(path, **changes):
    torch.manual_seed(0)
    network = UNet2DModel(**{**SMALL, **changes})
    network.save_pretrained(path)
    return network.eval()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_outputs_equal_diffusers_own(name, tmp_path):
    try:
        save(tmp_path, **CONFIGURATIONS[name])
        theirs = UNet2DModel.from_pretrained(tmp_path)
    except (ValueError, TypeError, RuntimeError) as error:
        pytest.skip(f"this version of diffusers does not build it: {error}")
    ours = load_model(tmp_path)
    x = torch.randn(2, ours.description.channels, *ours.description.size, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([3, 700]), torch.tensor([1, 9]) if name == "classes" else None
    with torch.inference_mode():
        expected = theirs(x, t, class_labels=labels).sample
        found = ours(x, t, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_attention_under_its_old_names(tmp_path):
    network = save(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, before in old.items():
            if "attentions" in name:
                name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert any(".query." in name for name in renamed)
    save_file(renamed, path)
    found = load_model(tmp_path).network.state_dict()
    assert all(torch.equal(found[k], v) for k, v in network.state_dict().items())


def test_one_safetensors_file(tmp_path):
    save(tmp_path / "a")
    path = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    config = (tmp_path / "a" / "config.json").read_text()
    expected = load_model(tmp_path / "a").network.state_dict()
    found = load_model(path)
    assert found.description.kind == "file"
    assert all(torch.equal(found.network.state_dict()[k], v) for k, v in expected.items())
    scheduler = json.dumps({"timestep_spacing": "trailing"})
    save_file(load_file(path), tmp_path / "alone.safetensors", {"config": config, "scheduler_config": scheduler})
    alone = load_model(tmp_path / "alone.safetensors")
    assert alone.description.scheduler == {"timestep_spacing": "trailing"}
    assert all(torch.equal(alone.network.state_dict()[k], v) for k, v in expected.items())
    save_file(load_file(path), tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match=r"neither a config\.json beside it nor a config in its metadata"):
        load_model(tmp_path / "none.safetensors")


def test_a_learned_variance_is_left_out_with_a_note(ddim, tmp_path):
    save(tmp_path / "model", out_channels=6)
    both = UNet2DModel.from_pretrained(tmp_path / "model")
    ours = load_model(tmp_path / "model")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10])
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, t), both(x, t).sample[:, :3])
    result = ddim("sample", "-m", "model", "-n", 1, "--steps", 4, "-o", "out")
    assert result.exit_code == 0
    assert "learned variance" in result.stderr


def test_fourier_time_refuses_a_grid_with_zero(tmp_path):
    save(tmp_path, time_embedding_type="fourier")
    with pytest.raises(ConfigError, match=r"steps_offset = 1"):
        sample({"sampling": {"steps": 4}}, model=tmp_path)
    config = {"sampling": {"steps": 4, "num_images": 1}, "scheduler": {"steps_offset": 1}}
    assert len(list(sample(config, model=tmp_path))) == 1


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_classes_that_are_no_numbers_load_but_are_not_sampled(tmp_path, kind):
    save(tmp_path, class_embed_type=kind)
    assert load_model(tmp_path).parameters > 0
    with pytest.raises(ConfigError, match=f"class_embed_type '{kind}'"):
        sample({}, model=tmp_path)


def test_the_file_on_disk_is_never_changed(tmp_path):
    save(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    network = load_model(tmp_path).network
    with torch.no_grad():
        network.conv_in.weight.zero_()
    assert path.read_bytes() == before
    with safe_open(path, framework="pt") as stream:
        assert stream.get_tensor("conv_in.weight").abs().sum() > 0
