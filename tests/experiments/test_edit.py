"""``ddim edit``: up the grid as one thing, down it as another; what stays, what is refused, what it tells."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim_cli import edit
from ddim_cli.config.layers import table_layer
from ddim_cli.errors import UsageError
from ddim_cli.experiments.edits import Edit, resolve_edits
from ddim_cli.models.bundled.captions import DIGITS as NAMES
from ddim_cli.models.conditions import Conditioning
from ddim_cli.outputs.provenance import strip_inside
from ddim_cli.sampling.loop import Stepper

DIGITS = Path(__file__).parents[1] / "data" / "digits"
STEPS = ("--steps", 6, "--no-compile")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def told(path):
    return json.loads(Path(path).with_suffix(".json").read_text())


@pytest.fixture
def of_text(ddim, tiny_text_model):
    """Run ``ddim edit`` of one digit with a random text-to-image model; what it prints as JSON."""

    def run(*more, out="out", picture=DIGITS / "3.png", source="a"):
        result = ddim("edit", "-m", tiny_text_model, picture, "--from", source, *STEPS, "-o", out, "--json", *more)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.mark.parametrize(
    "more", [(), *(pytest.param(more, marks=pytest.mark.slow) for more in (("--refine", 2), ("--order", 2)))], ids=str
)
def test_an_edit_is_an_inversion_sampled_with_other_words(more, of_text, ddim, tiny_text_model):
    """As by ``ddim invert`` without guidance, and by ``ddim sample`` of its latent, guided to the other prompt."""
    found = of_text("--to", "b c", "--guidance-scale", 3, *more)
    up = ("invert", "-m", tiny_text_model, DIGITS / "3.png", "--prompt", "a", *STEPS, *more, "-o", "up")
    assert ddim(*up).exit_code == 0
    order = more if "--order" in more else ()
    down = ("--prompt", "b c", "--guidance-scale", 3, *STEPS, *order, "-o", "down")
    assert ddim("sample", "-m", tiny_text_model, "--latents", "up/3.latent.safetensors", *down).exit_code == 0
    [picture] = found["pictures"]
    assert abs(pixels(picture["reconstruction"]) - pixels("up/3.recon.png")).max() <= 1
    assert abs(pixels(picture["edits"][0]) - pixels("down/3.latent.png")).max() <= 1
    assert abs(pixels(picture["edits"][0]) - pixels(picture["reconstruction"])).max() > 8
    assert picture["error"] == pytest.approx(told("up/3.recon.png")["inversion"]["error"], rel=1e-3)


def test_strength_inverts_part_of_the_way(tmp_path):
    original, distances = pixels(DIGITS / "3.png"), []
    for strength in (0.2, 0.5, 1.0):
        settings = {"sampling": {"steps": 10, "strength": strength, "guidance_scale": 2.0}}
        found = edit(
            [DIGITS / "3.png"], "a thin three", "a bold zero", settings, "mnist-text", tmp_path / f"{strength}"
        )
        [made] = found.pictures[0].edits
        facts = told(made)["sampling"]
        assert facts["edit"]["start_timestep"] == facts["timesteps"][10 - int(10 * strength)]
        assert facts["strength"] == strength
        distances.append(abs(pixels(made) - original).mean())
    assert distances[0] * 1.5 < distances[1] < distances[2] / 1.5


@pytest.mark.parametrize("option", ["--mask", "--keep-mask"])
def test_what_a_mask_keeps_is_the_inputs_to_the_bit(option, of_text, tmp_path):
    picture = Image.open(DIGITS / "3.png").convert("RGB").resize((64, 64))
    picture.save(tmp_path / "p.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = of_text("--to", "b c d", option, "mask.png", picture="p.png")
    for path in (found["pictures"][0]["reconstruction"], *found["pictures"][0]["edits"]):
        changed = abs(pixels(path) - np.asarray(picture).astype(int)).max(2)
        left, right = changed[:, :32].max(), changed[:, 32:].max()
        assert (left == 0, right > 0) == ((True, True) if option == "--mask" else (False, right > 0)), path
        assert right == 0 or option == "--mask"
    facts = told(found["pictures"][0]["edits"][0])["sampling"]["edit"]
    assert facts[option.removeprefix("--").replace("-", "_")]["file"] == "mask.png"


def test_each_edit_at_each_scale_and_the_sheet(of_text, tmp_path, ddim):
    found = of_text("--to", "b", "--to", "C, d", "--guidance-scale", 1, "--guidance-scale", 2.5)
    [picture] = found["pictures"]
    names = [Path(path).name for path in picture["edits"]]
    assert names[:2] == ["3.b-1.edit.png", "3.b-2.5.edit.png"]
    assert [name.startswith("3.c-d-") for name in names[2:]] == [True, True]
    facts = [told(path)["sampling"] for path in picture["edits"]]
    assert [(each["prompt"], each["guidance_scale"]) for each in facts] == [
        ("b", 1.0), ("b", 2.5), ("C, d", 1.0), ("C, d", 2.5)
    ]  # fmt: skip
    sheet = strip_inside(tmp_path / "out" / "edited.png")["strip"]
    assert (sheet["from"], len(sheet["to"])) == ("a", 4)
    # Original, reconstruction and four edits of 64 pixels, enlarged to at least 96, and gaps.
    assert Image.open(tmp_path / "out" / "edited.png").width >= 6 * 96
    # What is made is not made again, and one more edit is one more picture.
    assert of_text("--to", "b", "--guidance-scale", 2.5)["made"] == 0
    assert of_text("--to", "e", "--guidance-scale", 2.5)["made"] == 1
    assert ddim("verify", "out").exit_code == 0
    assert ddim("report", "out").exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3.b-2.5.edit" in page


def test_a_picture_is_inverted_once_for_all_its_edits(of_text, monkeypatch):
    steps, whole = [], Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, noise: steps.append(self) or whole(self, noise))
    of_text("--to", "b", "--to", "c", "--guidance-scale", 2, "-b", 1)
    # Up once; down for the reconstruction and two edits.
    assert len(steps) == 6 + 3 * 6


def test_other_pictures_settings_and_masks_are_other_edits(of_text, ddim, tiny_text_model, tmp_path):
    of_text("--to", "b")
    (tmp_path / "other").mkdir()
    Image.open(DIGITS / "4.png").save(tmp_path / "other" / "3.png")
    refused = [
        ("other/3.png", "a"),
        (DIGITS / "3.png", "c"),
    ]
    for picture, source in refused:
        result = ddim("edit", "-m", tiny_text_model, picture, "--from", source, "--to", "b", *STEPS, "-o", "out")
        assert result.exit_code == 2
        assert "--overwrite" in result.stderr
    # The same picture from elsewhere is the same.
    Image.open(DIGITS / "3.png").save(tmp_path / "other" / "3.png")
    assert of_text("--to", "b", picture="other/3.png")["made"] == 0


def test_a_picture_that_was_moved_is_found_for_replay(of_text, ddim, tmp_path):
    Image.open(DIGITS / "3.png").save(tmp_path / "here.png")
    of_text("--to", "b", picture="here.png")
    (tmp_path / "there").mkdir()
    (tmp_path / "here.png").rename(tmp_path / "there" / "here.png")
    gone = ddim("replay", "out/here.b-7.5.edit.png", "--check")
    assert gone.exit_code == 2
    assert "say where it is with --init" in gone.stderr
    assert ddim("replay", "out/here.b-7.5.edit.png", "--check", "--init", "there").exit_code == 0
    Image.open(DIGITS / "4.png").save(tmp_path / "there" / "here.png")
    changed = ddim("replay", "out/here.b-7.5.edit.png", "--check", "--init", "there")
    assert changed.exit_code == 2
    assert "has changed since" in changed.stderr


REFUSED = {
    "no --to": ((), "say what the picture is to show"),
    "twice": (("--to", "b", "--to", "b"), "is given twice"),
    "eta": (("--to", "b", "--eta", 1), "an edit needs eta 0"),
    "both masks": (("--to", "b", "--mask", DIGITS / "4.png", "--keep-mask", DIGITS / "4.png"), "give one of them"),
    "strength 0": (("--to", "b", "--strength", 0), "takes a number above 0"),
    "strength 1.5": (("--to", "b", "--strength", 1.5), "of at most 1"),
    "little strength": (("--to", "b", "--strength", 0.05), "leaves none of the 6 steps"),
    "guidance": (("--to", "b", "--guidance-scale", -1), "guidance_scale"),
    "no text": (("--to", "a\udcff"), "--to: is no UTF-8 text"),
    "compiled": (("--to", "b", "--compile"), "a guided edit has two"),
    "init": (("--to", "b", "--set", "sampling.init=x.png"), "x.png"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, ddim, tiny_text_model):
    more, sentence = REFUSED[name]
    result = ddim("edit", "-m", tiny_text_model, DIGITS / "3.png", "--from", "a", "--steps", 6, *more)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_mask_that_keeps_all_is_refused(ddim, tiny_text_model, tmp_path):
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    result = ddim(
        "edit", "-m", tiny_text_model, DIGITS / "3.png", "--from", "a", "--to", "b", "--keep-mask", "white.png"
    )
    assert result.exit_code == 2
    assert "white everywhere, so all would be kept" in result.stderr


def test_a_model_that_nothing_can_be_said_to_is_refused(ddim):
    result = ddim("edit", DIGITS / "3.png", "--from", "a", "--to", "b")
    assert result.exit_code == 2
    assert "mnist takes neither text nor classes" in result.stderr


def test_classes_take_the_place_of_prompts(tmp_path):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4, num_class_embeds=10,
    )  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    settings = {"sampling": {"steps": 5}}
    found = edit([DIGITS / "3.png"], "3", ["8", "5"], settings, tmp_path / "model", out=tmp_path / "out")
    [picture] = found.pictures
    facts = [told(path)["sampling"] for path in picture.edits]
    assert [(each["class"], each["edit"]["from"]) for each in facts] == [(8, {"class": 3}), (5, {"class": 3})]
    assert abs(pixels(picture.edits[0]) - pixels(picture.edits[1])).max() > 0
    for text, sentence in (("x", "takes a class, a number from 0 to 9"), ("10", "has the classes 0-9")):
        with pytest.raises(UsageError, match=sentence):
            edit([DIGITS / "3.png"], "3", text, settings, tmp_path / "model", out=tmp_path / "out")


def test_scales_beside_each_other_in_one_folder(of_text):
    """The reconstruction and what is made already are the same, whatever scale or negative prompt comes beside."""
    assert of_text("--to", "b", "--guidance-scale", 1)["made"] == 2
    assert of_text("--to", "b", "--guidance-scale", 1, "--guidance-scale", 3)["made"] == 1
    found = of_text("--to", "b", "--guidance-scale", 0, "--negative-prompt", "c")
    assert (found["made"], Path(found["pictures"][0]["edits"][0]).name) == (1, "3.b-0.edit.png")


def test_a_folder_of_pictures_is_edited_in_place_and_goes_on(ddim, tiny_text_model, tmp_path):
    (tmp_path / "own").mkdir()
    for name in ("3", "4"):
        Image.open(DIGITS / f"{name}.png").save(tmp_path / "own" / f"{name}.png")
    command = ("edit", "-m", tiny_text_model, "own", "--from", "a", "--to", "b", *STEPS, "-o", "own", "--json")
    assert [json.loads(ddim(*command).stdout)["made"] for _ in range(2)] == [4, 0]


def test_leftovers_of_a_killed_run_go(of_text, tmp_path):
    of_text("--to", "b")
    left = [tmp_path / "out" / f".{name}.0123456789ab.tmp" for name in ("edited.png", "3.b-7.5.edit.png")]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    of_text("--to", "c")
    assert [path.exists() for path in left] == [False, False]


def test_names_of_edits_are_files_and_tell_edits_apart():
    def slug(text, scale=7.5):
        return Edit(text, Conditioning(None, text, None, scale)).slug

    assert slug("a bold seven") == "a-bold-seven-7.5"
    texts = ["a cat", "a-cat", "a, cat", "A cat", "a cat!", "../../etc/passwd", "x" * 500, "", "猫", "a/b", "a b\nc"]
    slugs = [slug(text) for text in texts]
    assert len(set(slugs)) == len(texts)
    assert all("/" not in each and not each.startswith(".") and len(each.encode()) < 120 for each in slugs)


def test_the_prompt_of_the_settings_is_what_the_picture_shows(tiny_text_model):
    layers = [table_layer({"model": {"source": str(tiny_text_model)}, "sampling": {"prompt": "a"}}, "test")]
    _, edits, _ = resolve_edits(layers, [DIGITS / "3.png"], None, ["b"])
    assert edits.source.conditioning == Conditioning(None, "a", None, 1.0)
    with pytest.raises(UsageError, match="say what the picture shows"):
        resolve_edits(layers[:0] or [table_layer({"model": {"source": str(tiny_text_model)}}, "test")],
                      [DIGITS / "3.png"], None, ["b"])  # fmt: skip


@pytest.mark.slow
def test_bold_edits_of_digits_have_more_ink(tmp_path):
    """On the eight digits and the bundled model; tests/benchmarks/edits.py measures it on two hundred."""
    more = []
    for digit, name in zip(range(8), NAMES, strict=False):
        settings = {"sampling": {"steps": 25}}
        result = edit([DIGITS / f"{digit}.png"], f"a {name}", f"a bold {name}", settings, "mnist-text", tmp_path)
        more.append(pixels(result.pictures[0].edits[0]).sum() > pixels(DIGITS / f"{digit}.png").sum())
    assert sum(more) >= 7
