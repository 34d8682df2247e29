"""Our conditional UNet against diffusers' UNet2DConditionModel, in every form in which it is run."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from ddim_cli.models.blocks import PackedLinear
from ddim_cli.models.conditional_unet import ConditionalUNet, supports
from ddim_cli.models.unet import PackedConv2d, is_of_embedding, pack_convolutions

# The shape of Stable Diffusion 1 with two levels.
FIRST = {
    "sample_size": 32,
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
# And of Stable Diffusion 2.
SECOND = {
    **FIRST,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 32,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
}
THREE_LEVELS = {
    "block_out_channels": (4, 8, 12),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
}
# Name -> config, and height and width of the input.
SUPPORTED = {
    "first": (FIRST, (16, 16)),
    "second": (SECOND, (8, 8)),
    "second-upcast": ({**SECOND, "upcast_attention": True}, (8, 8)),
    "three-levels": ({**FIRST, **THREE_LEVELS, "attention_head_dim": [2, 3, 4]}, (8, 8)),
    "depths": ({**FIRST, **THREE_LEVELS, "transformer_layers_per_block": (1, 2, 3)}, (8, 8)),
    "layers": ({**FIRST, **THREE_LEVELS, "layers_per_block": (2, 1, 3)}, (8, 8)),
    "two-blocks": ({**FIRST, "transformer_layers_per_block": (1, 2)}, (8, 8)),
    "texts": ({**FIRST, "cross_attention_dim": (8, 8)}, (8, 8)),
    "odd": ({**FIRST, **THREE_LEVELS}, (17, 9)),
    "odd-high": ({**FIRST, **THREE_LEVELS}, (6, 8)),
    "odd-padded-below": ({**FIRST, **THREE_LEVELS, "downsample_padding": 0}, (13, 10)),
    "scale-shift": ({**FIRST, "resnet_time_scale_shift": "scale_shift"}, (8, 8)),
    "no-mid-block": ({**FIRST, "mid_block_type": None}, (8, 8)),
    "mid-scale": ({**FIRST, "mid_block_scale_factor": 1.4}, (8, 8)),
    "inpainting": ({**FIRST, "in_channels": 9}, (8, 8)),
    "learned-variance": ({**FIRST, "in_channels": 3, "out_channels": 6}, (8, 8)),
    "centered": ({**FIRST, "center_input_sample": True}, (8, 8)),
    "sine-first": ({**FIRST, "flip_sin_to_cos": False, "freq_shift": 1}, (8, 8)),
    "wide-time": ({**FIRST, "time_embedding_dim": 24}, (8, 8)),
    "epsilon": ({**FIRST, "norm_eps": 1e-2}, (8, 8)),
    "mish": ({**FIRST, "act_fn": "mish"}, (8, 8)),
    "relu": ({**FIRST, "act_fn": "relu"}, (8, 8)),
}
UNSUPPORTED = {
    "time-condition": {"time_cond_proj_dim": 8},
    "added-embedding": {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
    "class-type": {"class_embed_type": "timestep"},
    "classes": {"num_class_embeds": 10},
    "text-projection": {"encoder_hid_dim": 8},
    "text-projection-type": {"encoder_hid_dim_type": "text_proj"},
    "dual": {"dual_cross_attention": True},
    "kernel-in": {"conv_in_kernel": 1},
    "kernel-out": {"conv_out_kernel": 1},
    "gated": {"attention_type": "gated"},
    "cross-alone": {"only_cross_attention": True},
    "cross-alone-some": {"only_cross_attention": [True, False]},
    "cross-alone-mid": {"mid_block_only_cross_attention": True},
    "cross-norm": {"cross_attention_norm": "layer_norm"},
    "reversed-depths": {"reverse_transformer_layers_per_block": [[1, 1], [1, 1]]},
    "nested-depths": {"transformer_layers_per_block": [[1, 1], [1, 1]]},
    "out-scale": {"resnet_out_scale_factor": 2.0},
    "fourier": {"time_embedding_type": "fourier"},
    "time-activation": {"time_embedding_act_fn": "silu"},
    "time-activation-behind": {"timestep_post_act": "silu"},
    "gelu": {"act_fn": "gelu"},
    "block": {"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D")},
    "mid-block": {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    "lengths": {"up_block_types": ("UpBlock2D",)},
    "levels": {"attention_head_dim": (2, 2, 2)},
    "heads": {"attention_head_dim": 3},
    "no-heads": {"attention_head_dim": None},
    "texts": {"cross_attention_dim": (4, 8), "down_block_types": ("CrossAttnDownBlock2D",) * 2},
    "no-text": {"cross_attention_dim": None},
    "groups": {"norm_num_groups": None},
    "not-a-list": {"block_out_channels": 8},
    "unknown-key": {"something_new": 1},
    "unknown-word": {"something_new": "on"},
}


def pair(config, dtype=torch.float64):
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        # Norms start as the identity, and some biases at 0: neither would show that it is left out.
        parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.to(dtype)
    assert supports(theirs.config)
    ours = ConditionalUNet(theirs.config)
    names = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == names
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval().requires_grad_(False)


def inputs(config, size, dtype=torch.float64, rows=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, config.get("in_channels", 4), *size, generator=generator, dtype=dtype)
    text = torch.randn(rows, 5, 32 if config["block_out_channels"][0] == 32 else 8, generator=generator, dtype=dtype)
    return x, torch.tensor([999, 501, 0])[:rows], text


@pytest.mark.parametrize("name", SUPPORTED)
@torch.inference_mode()
def test_it_computes_what_diffusers_does(name):
    config, size = SUPPORTED[name]
    theirs, ours = pair(config)
    x, timesteps, text = inputs(config, size)
    expected = theirs(x, timesteps, text).sample
    # Some 10^6 units roundoff of float64: more than any order of summation of these few layers can make.
    close = {"rtol": 0, "atol": 1e-10 * expected.abs().max().item()}
    before = x.clone(), text.clone()
    torch.testing.assert_close(ours(x, timesteps, text), expected, **close)
    ours.fuse()
    torch.testing.assert_close(ours(x, timesteps, text), expected, **close)
    keys_values = ours.attend(text)
    assert keys_values.shape[:2] == text.shape[:2]
    for rows in ([0], [2, 1]):
        some = ours.body(x[rows], ours.project(timesteps)[rows], keys_values[rows])
        torch.testing.assert_close(some, expected[rows], **close)
    assert torch.equal(x, before[0])
    assert torch.equal(text, before[1])
    assert torch.equal(keys_values, ours.attend(text)), "the body leaves keys and values as they are"


@pytest.mark.parametrize("name", ["first", "three-levels", "no-mid-block", "odd"])
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_several_texts_need_no_copies_of_the_image(name, packed):
    config, size = SUPPORTED[name]
    dtype = torch.float32 if packed else torch.float64
    theirs, ours = pair(config, dtype)
    x, _, _ = inputs(config, size, dtype, rows=2)
    text = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)
    timesteps = torch.tensor([800, 30])
    expected = theirs(x.repeat(3, 1, 1, 1), timesteps.repeat(3), text).sample
    close = {"rtol": 0, "atol": (1e-5 if packed else 1e-10) * expected.abs().max().item()}
    ours.fuse()
    if packed:
        pack_convolutions(ours)
    keys_values, before = ours.attend(text), x.clone()
    torch.testing.assert_close(ours.body(x, ours.project(timesteps), keys_values), expected, **close)
    shared = theirs(x.repeat(3, 1, 1, 1), 30, text).sample
    torch.testing.assert_close(ours.body(x, ours.project(timesteps)[1:], keys_values), shared, **close)
    assert torch.equal(x, before)


@torch.inference_mode()
def test_one_row_of_projections_holds_for_all():
    theirs, ours = pair(FIRST)
    x, _, text = inputs(FIRST, (8, 8))
    expected = theirs(x, 20, text).sample
    rows = ours.fuse().project(torch.tensor([700, 20]))
    torch.testing.assert_close(ours.body(x, rows[1:], ours.attend(text)), expected, rtol=0, atol=1e-10)
    assert not torch.allclose(ours.body(x, rows[:1], ours.attend(text)), expected, atol=1e-3)


def test_every_text_counts_for_its_own_row():
    _, ours = pair(FIRST)
    x, timesteps, text = inputs(FIRST, (8, 8))
    found = ours(x, timesteps, text)
    other = ours(x, timesteps, torch.cat([text[:1], text[2:], text[1:2]]))
    assert torch.equal(found[0], other[0])
    assert (found[1:] - other[1:]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("name", ["first", "second", "depths", "odd"])
@torch.inference_mode()
def test_packed_it_computes_the_same(name):
    config, size = SUPPORTED[name]
    theirs, ours = pair(config, torch.float32)
    x, timesteps, text = inputs(config, size, torch.float32)
    expected = theirs(x, timesteps, text).sample
    pack_convolutions(ours.fuse())
    for packed in (PackedConv2d, PackedLinear):
        assert any(isinstance(m, packed) for m in ours.modules()) == torch.backends.mkldnn.is_available()
    # 170 units roundoff of the largest, as in test_unet.
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    for rows in (3, 1, 3):
        found = ours(x[:rows], timesteps[:rows], text[:rows])
        torch.testing.assert_close(found, expected[:rows], **close)


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_in_bfloat16_the_time_embedding_stays_exact(packed):
    theirs, ours = pair(SECOND, torch.float32)
    x, timesteps, text = inputs(SECOND, (8, 8), torch.float32)
    narrow = copy.deepcopy(ours)
    for name, parameter in narrow.named_parameters():
        if not is_of_embedding(name):
            parameter.data = parameter.data.bfloat16()
    assert torch.equal(narrow.project(timesteps), ours.project(timesteps))
    narrow.fuse()
    assert narrow.project(timesteps).dtype == torch.float32
    if packed:
        pack_convolutions(narrow)
    output = narrow(x.bfloat16(), timesteps, text.bfloat16())
    assert output.dtype == torch.bfloat16
    expected = theirs(x, timesteps, text).sample
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_ours_is_left_to_diffusers(name):
    assert not supports({**FIRST, **UNSUPPORTED[name]})


def test_what_a_config_may_say_without_effect():
    neutral = {
        **{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "_name_or_path": "here"},
        **{"dropout": 0.1, "only_cross_attention": False, "class_embed_type": None, "upcast_attention": None},
        **{"resnet_out_scale_factor": 1.0, "conv_in_kernel": 3, "attention_type": "default", "something_new": None},
        **{"addition_embed_type_num_heads": 64, "time_embedding_type": "positional"},
    }
    assert supports({**FIRST, **neutral})
    plain, told = ConditionalUNet(FIRST), ConditionalUNet({**FIRST, **neutral})
    assert plain.state_dict().keys() == told.state_dict().keys()
    assert supports({}), "diffusers' defaults"


@torch.inference_mode()
def test_the_number_of_heads_has_two_names():
    _, ours = pair({**FIRST, "attention_head_dim": 4})
    config = {**FIRST, "attention_head_dim": 2, "num_attention_heads": 4}
    assert supports(config)
    other = ConditionalUNet(config)
    other.load_state_dict(ours.state_dict(), assign=True)
    x, timesteps, text = inputs(FIRST, (8, 8))
    assert torch.equal(other(x, timesteps, text), ours(x, timesteps, text))


@pytest.mark.parametrize(
    "config",
    [
        {"cross_attention_dim": 768, "sample_size": 64},
        {
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
    ],
    ids=["1.5", "2.1"],
)
def test_the_names_are_those_of_stable_diffusion(config):
    with torch.device("meta"):
        theirs, ours = UNet2DConditionModel(**config), ConditionalUNet(config)
    shapes = [{k: tuple(v.shape) for k, v in network.state_dict().items()} for network in (theirs, ours)]
    assert shapes[0] == shapes[1]


def test_it_can_be_exported():
    _, ours = pair({**FIRST, **THREE_LEVELS})
    x, timesteps, text = inputs(FIRST, (10, 8))
    ours.fuse()
    given = (x, ours.project(timesteps), ours.attend(text))

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = ours

        def forward(self, *given):
            return self.network.body(*given)

    exported = torch.export.export(Body(), given).module()
    torch.testing.assert_close(exported(*given), ours.body(*given), rtol=0, atol=1e-10)
