import json
from pathlib import Path

import pytest

DATA = Path(__file__).parents[1] / "data" / "ddim-original-tiny"


def test_list(ddim):
    assert ddim("inspect", "--list").stdout.split() == ["mnist"]


def test_a_checkpoint(ddim):
    found = json.loads(ddim("inspect", DATA / "model-1000.ckpt", "--json").stdout)
    assert (found["kind"], found["channels"], found["height"], found["width"]) == ("checkpoint", 3, 8, 8)
    assert found["parameters"] == 285667
    assert found["weights"]["dtypes"] == {"float32": 285667}
    assert found["scheduler"]["beta_schedule"] == "linear"
    assert found["blocks"][1].startswith("AttnDownBlock2D: 1 layers, 32 channels, 4x4")


def test_flops_are_those_of_the_convolutions(ddim, tiny_model):
    """Two a multiplication and addition: at least those of the first and last convolution, counted by hand."""
    found = json.loads(ddim("inspect", tiny_model, "--json").stdout)
    by_hand = 2 * 64 * 9 * (3 * 8 + 8 * 3)
    assert by_hand < found["flops_per_image_and_step"] < 1000 * by_hand


def test_what_a_person_sees(ddim):
    shown = ddim("inspect", "mnist").stdout
    for text in ("2,222,833 parameters", "1 x 32 x 32", "AttnDownBlock2D", "float16", "sha256: ", "GFLOP", "MiB"):
        assert text in shown


@pytest.mark.parametrize("args", [[], ["nonesuch"], ["mnist", "--set", "model.revision=x"]])
def test_mistakes(ddim, args):
    result = ddim("inspect", *args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
