"""Our UNet against diffusers' own, in every form in which it is run: as loaded, fused, packed, in bfloat16."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel

from ddim_cli.models.unet import PackedConv2d, UNet, is_of_embedding, pack_convolutions, supports

SMALL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
}
SUPPORTED = {
    "plain": {},
    "resnet-blocks": RESNET_BLOCKS,
    "one-layer": {"layers_per_block": 1},
    "two-levels": {
        "block_out_channels": (8, 16),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    },
    "old-names": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D", "DownBlock2D"),
    },
    "classes": {"num_class_embeds": 10},
    "centered": {"center_input_sample": True},
    "learned-time": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "wide-time": {"time_embedding_dim": 24},
    "odd-time": {"block_out_channels": (9, 18, 18), "norm_num_groups": 3, "attention_head_dim": 6},
    "non-square": {"sample_size": (8, 16)},
    "no-attention": {"add_attention": False},
    "one-head": {"attention_head_dim": None},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift-norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "no-mid-block": {"mid_block_type": None},
    "mid-scale": {"mid_block_scale_factor": 1.4},
    "resnet-sampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "original": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "rgba": {"in_channels": 4, "out_channels": 4},
    "mish": {"act_fn": "mish"},
    "relu": {"act_fn": "relu"},
}
UNSUPPORTED = {
    "skip": {"down_block_types": ("SkipDownBlock2D",) * 3, "up_block_types": ("SkipUpBlock2D",) * 3},
    "fourier": {"time_embedding_type": "fourier"},
    "class-timestep": {"class_embed_type": "timestep"},
    "gelu": {"act_fn": "gelu"},
    "head": {"attention_head_dim": 5},
    "groups": {"norm_num_groups": None},
    "unknown": {"down_block_types": ("DownBlock2D", "Wrong", "DownBlock2D")},
    "lengths": {"up_block_types": ("UpBlock2D",)},
    "not-a-list": {"block_out_channels": 8},
}


def pair(name):
    torch.manual_seed(0)
    theirs = UNet2DModel(**{**SMALL, **SUPPORTED[name]}).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        # Norms start as the identity, and some biases at 0: neither would show that it is left out.
        parameter.add_(torch.randn_like(parameter) * 0.05)
    assert supports(theirs.config)
    ours = UNet(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval().requires_grad_(False)


def inputs(network, rows=3):
    generator = torch.Generator().manual_seed(1)
    size = network.config.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    x = torch.randn(rows, network.config.in_channels, height, width, generator=generator)
    timesteps = torch.tensor([999, 501, 0])[:rows]
    classes = torch.tensor([3, 0, 9])[:rows] if network.config.num_class_embeds else None
    return x, timesteps, classes


@pytest.mark.parametrize("name", SUPPORTED)
@torch.inference_mode()
def test_every_form_computes_what_diffusers_does(name):
    theirs, ours = pair(name)
    x, timesteps, classes = inputs(theirs)
    expected = theirs(x, timesteps, class_labels=classes).sample
    # 170 units roundoff of the largest: two dozen layers in a row, each of sums of at most 300 that round a few units.
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    before = x.clone()
    torch.testing.assert_close(ours(x, timesteps, classes), expected, **close)
    ours.fuse()
    torch.testing.assert_close(ours(x, timesteps, classes), expected, **close)
    pack_convolutions(ours)
    assert any(isinstance(m, PackedConv2d) for m in ours.modules()) == torch.backends.mkldnn.is_available()
    for rows in (3, 1, 3):
        # Another shape arranges the weights anew.
        part = None if classes is None else classes[:rows]
        torch.testing.assert_close(ours(x[:rows], timesteps[:rows], part), expected[:rows], **close)
    assert torch.equal(x, before), "the input is left as it was"


@torch.inference_mode()
def test_projections_of_one_row_hold_for_all():
    theirs, ours = pair("plain")
    ours.fuse()
    x, _, _ = inputs(theirs)
    rows = ours.project(torch.tensor([700, 20]))
    assert rows.dtype == torch.float32
    expected = theirs(x, torch.tensor([20, 20, 20])).sample
    torch.testing.assert_close(ours.body(x, rows[1:]), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.body(x, rows[:1]), expected, atol=1e-3)


@torch.inference_mode()
def test_in_bfloat16_the_time_embedding_stays_exact():
    theirs, ours = pair("plain")
    x, timesteps, _ = inputs(theirs)
    narrow = copy.deepcopy(ours)
    for name, parameter in narrow.named_parameters():
        if not is_of_embedding(name):
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(narrow.project(timesteps), ours.project(timesteps))
    output = narrow.fuse()(x.bfloat16(), timesteps)
    assert output.dtype == torch.bfloat16
    expected = theirs(x, timesteps).sample
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_ours_is_left_to_diffusers(name):
    assert not supports({**SMALL, **UNSUPPORTED[name]})


def test_the_names_are_those_of_diffusers():
    from ddim_cli.evaluation.architectures import SHAPES, architecture_config

    for name in (*SHAPES, "mnist"):
        config = architecture_config(name)
        with torch.device("meta"):
            theirs, ours = UNet2DModel.from_config(config), UNet(config)
        shapes = [{k: tuple(v.shape) for k, v in network.state_dict().items()} for network in (theirs, ours)]
        assert shapes[0] == shapes[1]


def test_sampling_imports_neither_diffusers_nor_a_compiler(tmp_path):
    """Either takes longer to import than a small model to sample."""
    code = (
        "import sys; from ddim_cli.cli.app import app\n"
        f"app(['sample', '-n', '1', '--steps', '2', '-q', '-o', {str(tmp_path / 'out')!r}], standalone_mode=False)\n"
        "found = {'diffusers', 'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert (tmp_path / "out" / "000000.png").exists()


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_cost_is_what_torch_counts(name, tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    from ddim_cli.config.schema import ModelSettings
    from ddim_cli.models.describe import describe_model
    from ddim_cli.models.inspect import flops

    theirs = UNet2DModel(**{**SMALL, **SUPPORTED[name]}).eval()
    theirs.save_pretrained(tmp_path)
    # On a CPU the counter does not see attention.
    x, timesteps, classes = (t if t is None else t.to("meta") for t in inputs(theirs, rows=1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs.to("meta")(x, timesteps, classes)
    assert flops(describe_model(ModelSettings(source=str(tmp_path)))) == counter.get_total_flops()


def test_a_model_is_inspected_without_diffusers_or_torchs_compiler():
    """Each takes longer to import than all of the rest."""
    code = (
        "import sys\nfrom ddim_cli.cli.app import app\n"
        "try: app(['inspect', 'mnist'])\nexcept SystemExit as e: assert not e.code, e.code\n"
        "assert not {'diffusers', 'torch._dynamo'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
