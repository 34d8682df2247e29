import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATA = Path(__file__).parents[1] / "data" / "ddim-original-tiny"


def test_the_size_of_an_image_as_a_number_or_as_height_and_width(ddim, tiny_model):
    def size(*args):
        result = ddim("inspect", tiny_model, *args, "--json")
        assert result.exit_code == 0, result.stderr
        return tuple(json.loads(result.stdout)[side] for side in ("height", "width"))

    assert size("--image-size", 16) == size("--image-size", "16x16") == (16, 16)
    assert size("--image-size", "16x24") == size("--set", "model.image_size=[16, 24]") == (16, 24)
    for wrong in ("16x", "x", "16x24x3", "-4", "0", "16x0"):
        result = ddim("inspect", tiny_model, f"--image-size={wrong}")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: --image-size")


def test_list(ddim):
    assert ddim("inspect", "--list").stdout.split() == ["mnist", "mnist-text"]


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


@pytest.fixture
def network(tmp_path):
    """Save a small network of diffusers with these arguments; its directory."""
    from diffusers import UNet2DModel

    plain = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }

    def save(**changes):
        UNet2DModel(**{**plain, **changes}).save_pretrained(tmp_path / "network")
        return tmp_path / "network"

    return save


@pytest.mark.parametrize(
    "changes",
    [
        {"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2},
        {"class_embed_type": "identity"},
        {"class_embed_type": "timestep"},
        {"num_class_embeds": 4},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_networks_that_are_diffusers_own(ddim, network, changes):
    result = ddim("inspect", network(**changes), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["flops_per_image_and_step"] > 2 * 64 * 9 * (3 * 32 + 32 * 3)


def test_a_network_that_cannot_be_run_says_so(ddim, network):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    result = ddim("inspect", network(**blocks))
    assert result.exit_code == 2
    assert "network that cannot be run" in result.stderr


def test_what_a_person_sees(ddim):
    shown = ddim("inspect", "mnist").stdout
    for text in ("2,222,833 parameters", "1 x 32 x 32", "AttnDownBlock2D", "float16", "sha256: ", "GFLOP", "MiB"):
        assert text in shown


@pytest.mark.parametrize("args", [[], ["nonesuch"], ["mnist", "--set", "model.revision=x"]])
def test_mistakes(ddim, args):
    result = ddim("inspect", *args)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


@pytest.fixture
def made(ddim, tiny_model, tmp_path):
    """Two pictures of the tiny model."""
    assert ddim("sample", "-m", tiny_model, "-n", 2, "--steps", 20, "--eta", 0.5, "-o", "out").exit_code == 0
    return tmp_path / "out"


def test_a_picture_from_its_png_and_from_its_sidecar(ddim, made):
    sidecar = json.loads((made / "000001.json").read_text())
    for name in ("000001.png", "000001.json"):
        found = json.loads(ddim("inspect", made / name, "--json").stdout)
        assert found["told_by"] == str(made / name)
        assert found["picture"] == str(made / "000001.png")
        assert found["pixels_unchanged"] is True
        assert {k: found[k] for k in sidecar} == sidecar
    shown = ddim("inspect", made / "000001.png").stdout
    lines = ("seed: 1", "eta: 0.5", "steps: 20: 950 900 850 800 750 700 ... 200 150 100 50 0", "image: 8 x 8 RGB")
    for line in (*lines, "pixels: as they were made", "again: ddim replay", "beta_schedule = linear", "made at: 2"):
        assert line in shown, line


def test_a_picture_that_lost_its_sidecar_or_its_text(ddim, made):
    sidecar = json.loads((made / "000000.json").read_text())
    (made / "000000.json").rename(made / "kept.json")
    found = json.loads(ddim("inspect", made / "000000.png", "--json").stdout)
    assert found["seed"] == 0
    assert "created" not in found
    assert found["sampling"] == sidecar["sampling"]
    # An editor drops the text; the sidecar beside it still tells.
    (made / "kept.json").rename(made / "000000.json")
    with Image.open(made / "000000.png") as image:
        Image.fromarray(np.asarray(image)).save(made / "000000.png")
    found = json.loads(ddim("inspect", made / "000000.png", "--json").stdout)
    assert (found["told_by"], found["pixels_unchanged"]) == (str(made / "000000.json"), True)


def test_another_pictures_sidecar_is_not_believed(ddim, made):
    (made / "000001.json").write_text((made / "000000.json").read_text().replace("000000.png", "000001.png"))
    found = json.loads(ddim("inspect", made / "000001.png", "--json").stdout)
    assert (found["seed"], "created" in found) == (1, False)


def test_a_picture_that_was_changed_says_so(ddim, made):
    with Image.open(made / "000000.png") as image:
        pixels = np.asarray(image).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(made / "000000.png")
    result = ddim("inspect", made / "000000.png")
    assert result.exit_code == 0
    assert "pixels: changed since" in result.stdout
    assert "it was changed since" in result.stderr
    (made / "000000.png").unlink()
    assert "the picture is not there" in ddim("inspect", made / "000000.json").stdout


def test_files_that_say_nothing_of_a_picture(ddim, made, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "noise.png").write_bytes(b"no PNG")
    (tmp_path / "other.json").write_text("{}")
    expected = {
        made / "grid.png": "is a contact sheet",
        made / "run.json": "is of a whole run",
        "plain.png": "has no text 'ddim' inside",
        "noise.png": "cannot be read as a PNG",
        "other.json": "does not say how a picture of ddim was made",
        "absent.png": "no such file",
        "absent.json": "no such file",
    }
    for name, text in expected.items():
        result = ddim("inspect", name)
        assert result.exit_code == 2
        assert text in result.stderr
    assert ddim("inspect", made / "000000.png", "--image-size", 8).exit_code == 2


@pytest.mark.parametrize("nonsense", [None, 3, "x", [1], {"a": 1}])
def test_a_sidecar_of_nonsense_is_shown_or_refused(ddim, made, nonsense):
    whole = json.loads((made / "000000.json").read_text())
    for section in ("image", "sampling", "model", "runtime"):
        for key in [*whole[section], "between"]:
            record = {**whole, section: {**whole[section], key: nonsense}}
            (made / "000000.json").write_text(json.dumps(record))
            result = ddim("inspect", made / "000000.json")
            assert result.exit_code == 0, (section, key, result.stderr)
    for key in ("seed", "timing", "created", "strip", "config"):
        (made / "000000.json").write_text(json.dumps({**whole, key: nonsense}))
        result = ddim("inspect", made / "000000.json")
        assert result.exit_code in (0, 2), (key, result.stderr)
        assert "unexpected" not in result.stderr


def test_a_picture_is_inspected_without_torch(made, tmp_path):
    code = (
        "import sys\nfrom ddim_cli.cli.app import app\n"
        "for name in ('png', 'json'):\n"
        "    try: app(['inspect', f'out/000000.{name}'])\n    except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_picture_of_a_prompt(ddim, tiny_text_model):
    plain = ("-m", tiny_text_model, "--prompt", "a seven", "--negative-prompt", "thin", "--steps", 2, "--no-compile")
    assert ddim("sample", *plain, "-n", 1, "-o", "out").exit_code == 0
    shown = ddim("inspect", "out/000000.png").stdout
    # Each letter is a token.
    for row in ("prompt: a seven", "negative prompt: thin", "tokens: 6 of the prompt", "guidance: 7.5"):
        assert row in shown
    assert ddim("interpolate", *plain, "--to-prompt", "a two", "--frames", 3, "-o", "frames").exit_code == 0
    assert 'prompt: between "a seven" and "a two", at 0.5' in ddim("inspect", "frames/frame_001.json").stdout
    strip = ddim("inspect", "frames/strip.png").stdout
    assert 'strip: 3 frames between the prompts "a seven", "a two", of seed 0' in strip


def test_a_picture_without_a_prompt_says_nothing_of_one(ddim, tiny_model):
    assert ddim("sample", "-m", tiny_model, "-n", 1, "--steps", 2, "--no-compile", "-o", "out").exit_code == 0
    assert "prompt" not in ddim("inspect", "out/000000.png").stdout
