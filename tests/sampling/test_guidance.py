"""Classes and classifier-free guidance, against formulas and a hand-written loop with diffusers' scheduler."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from ddim_cli import sample
from ddim_cli.errors import ConfigError
from ddim_cli.sampling.guidance import rescale, with_guidance

sys.path.insert(0, str(Path(__file__).parents[1]))
from rounding import exact, float32_leeway


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("models") / "conditional"
    UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=11,
    ).save_pretrained(path)
    return path


def test_both_halves_in_one_batch():
    seen = []

    def network(x, t, classes):
        seen.append((len(x), classes.tolist()))
        return classes.view(-1, 1).float() * x

    x, t, classes = torch.ones(2, 3), torch.tensor([5, 5]), torch.tensor([1, 2])
    found = with_guidance(network, null_class=10, scale=3.0)(x, t, classes)
    assert seen == [(4, [10, 10, 1, 2])]
    torch.testing.assert_close(found, torch.tensor([[10 + 3 * (1 - 10.0)], [10 + 3 * (2 - 10.0)]]).expand(2, 3))


def test_rescale_gives_the_conditional_deviation():
    guided, conditional = torch.randn(2, 3, 8, 8) * 4, torch.randn(2, 3, 8, 8)
    whole = rescale(guided, conditional, 1.0)
    torch.testing.assert_close(whole.flatten(1).std(1), conditional.flatten(1).std(1))
    torch.testing.assert_close(rescale(guided, conditional, 0.25), 0.25 * whole + 0.75 * guided)
    assert torch.equal(rescale(guided, conditional, 0.0), guided)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.0), (2.5, 0.0), (2.5, 0.7)])
def test_against_a_loop_of_diffusers(conditional, scale, share):
    config = {
        "model": {"source": str(conditional), "null_class": 10},
        "sampling": {
            "steps": 5,
            "num_images": 3,
            "seed": 8,
            "classes": "3-5",
            "guidance_scale": scale,
            "guidance_rescale": share,
        },
    }
    network, scheduler = UNet2DModel.from_pretrained(conditional).double(), exact(DDIMScheduler())
    scheduler.set_timesteps(5)

    @torch.inference_mode()
    def by_hand(seed, label):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
        for t in scheduler.timesteps:
            null, cond = (network(x, t, class_labels=torch.tensor([c])).sample for c in (10, label))
            guided = null + scale * (cond - null)
            rescaled = guided * cond.std() / guided.std()
            x = scheduler.step(share * rescaled + (1 - share) * guided, t, x).prev_sample
        return x[0]

    for picture in sample(config):
        label = [3, 4, 5][picture.seed % 3]
        assert picture.metadata["sampling"]["class"] == label
        expected, leeway = float32_leeway(lambda p=picture, c=label: by_hand(p.seed, c), network)
        assert (picture.tensor - expected).abs().max() <= leeway < 1e-2


def test_a_class_depends_on_the_seed_alone(conditional):
    def run(**sampling):
        found = sample({"model": {"source": str(conditional)}, "sampling": {"steps": 2, "classes": "0-9", **sampling}})
        return {p.seed: p.metadata["sampling"]["class"] for p in found}

    assert run(seeds="17,4") == {17: 7, 4: 4}
    assert run(seeds="4-5", batch_size=1) == {4: 4, 5: 5}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "say which of the classes 0-10 with --classes"),
        ({"classes": "9-11"}, "no class 11; it has 0-10"),
        ({"classes": "3", "guidance_scale": 2.0}, "model.null_class"),
    ],
)
def test_mistakes(conditional, settings, says):
    with pytest.raises(ConfigError, match=says):
        sample({"model": {"source": str(conditional)}, "sampling": settings})


def test_mistakes_with_an_unconditional_network(tiny_model):
    for settings in ({"classes": "3"}, {"guidance_scale": 2.0}):
        with pytest.raises(ConfigError, match="class-conditional"):
            sample({"sampling": settings}, model=tiny_model)


def test_the_command_records_class_and_guidance(ddim, conditional, tmp_path):
    args = ("-m", conditional, "-n", 2, "--steps", 4, "--classes", 3, "-o", "out")
    guidance = ("--guidance-scale", 2, "--set", "model.null_class=10")
    assert ddim("sample", *args, *guidance).exit_code == 0
    found = json.loads((tmp_path / "out" / "000001.json").read_text())["sampling"]
    assert (found["class"], found["guidance_scale"], found["null_class"]) == (3, 2.0, 10)
    # Another class in the same folder is another picture.
    result = ddim("sample", *args, *guidance, "--classes", 4)
    assert result.exit_code == 2
    assert "sampling.classes" in result.stderr
