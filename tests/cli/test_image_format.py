"""``--image-format``: sample and sweep write WebP and JPEG; nothing else does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_cli.outputs.picture import read_pixels

PLAIN = ("--steps", 2, "--no-compile", "--spacing", "trailing")


@pytest.fixture
def sample(ddim, tiny_model):
    return lambda *args: ddim("sample", "-m", tiny_model, *PLAIN, *args)


@pytest.fixture(scope="module")
def clear_model(tmp_path_factory):
    """A random 8x8 RGBA network."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "clear"
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(path)
    return path


@pytest.mark.parametrize(("name", "ending"), [("webp", "-webp"), ("jpg", "-jpg95"), ("png", "")])
def test_a_folder_of_its_own_is_found_again(sample, tmp_path, name, ending):
    assert sample("-n", 2, "-q").exit_code == 0
    [plain] = (tmp_path / "outputs").iterdir()
    command = ("-n", 3, "--image-format", name, "--json")
    told = json.loads(sample(*command).stdout)
    assert told["folder"] == f"outputs/{plain.name}{ending}"
    assert (told["made"], told["present"]) == ((1, 2) if name == "png" else (3, 0))
    folder = tmp_path / told["folder"]
    assert sorted(p.name for p in folder.glob("0*")) == [
        f"{n:06d}.{e}" for n in range(3) for e in sorted(("json", name))
    ]
    again = json.loads(sample(*command).stdout)
    assert (again["made"], again["present"]) == (0, 3)


def test_what_was_lost_is_made_again_as_it_was(sample, tmp_path):
    command = ("-n", 3, "-b", 3, "--image-format", "webp", "-o", "out", "--subdirs")
    assert sample(*command).exit_code == 0
    lost = [tmp_path / "out" / "000000" / name for name in ("000000.webp", "000001.json", "000002.webp")]
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "000000").glob("*.webp")}
    lost[0].unlink()
    lost[1].unlink()
    lost[2].write_bytes(lost[2].read_bytes()[:-1])
    told = json.loads(sample(*command, "--json").stdout)
    assert (told["made"], told["present"]) == (3, 0)
    assert {path: path.read_bytes() for path in before} == before


def test_other_formats_are_refused_unless_overwritten(sample, ddim, tmp_path):
    assert sample("-n", 2, "--image-format", "jpg", "--quality", 90, "-o", "out").exit_code == 0
    for args, says in (
        (("--image-format", "webp"), 'output.image_format = "jpg", this run has "webp"'),
        ((), 'output.image_format = "jpg", this run has "png"'),
        (("--image-format", "jpg"), "output.quality = 90, this run has 95"),
    ):
        result = sample("-n", 2, "-o", "out", *args)
        assert (result.exit_code, says in result.stderr, "--overwrite" in result.stderr) == (2, True, True), (
            result.stderr
        )
        assert sample("-n", 2, "-o", "out", *args, "--dry-run").exit_code == 2
    assert sample("-n", 1, "-o", "out", "--image-format", "webp", "--overwrite").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "000000.json",
        "000000.webp",
        "grid.png",
        "run.json",
    ]
    assert ddim("verify", "out").exit_code == 0


def test_every_format_shows_the_same_pictures(sample, tmp_path):
    for name in ("png", "webp", "jpg"):
        assert sample("-n", 2, "-b", 2, "--image-format", name, "-o", name).exit_code == 0
    png, webp, jpg = (read_pixels(tmp_path / name / f"000001.{name}") for name in ("png", "webp", "jpg"))
    assert np.array_equal(png, webp)
    assert np.abs(png.astype(int) - jpg).max() > 0
    hashes = {json.loads((tmp_path / n / "000001.json").read_text())["image"]["pixels_sha256"] for n in ("webp", "jpg")}
    assert hashes == {json.loads((tmp_path / "png" / "000001.json").read_text())["image"]["pixels_sha256"]}


def test_grey_pictures(ddim, tmp_path):
    for name in ("png", "webp", "jpg"):
        assert ddim("sample", *PLAIN, "-n", 1, "--image-format", name, "-o", name).exit_code == 0
        assert json.loads((tmp_path / name / "000000.json").read_text())["image"]["mode"] == "L"
        assert ddim("verify", name).exit_code == 0
    assert np.array_equal(read_pixels(Path("webp/000000.webp")), read_pixels(Path("png/000000.png")))
    assert read_pixels(Path("jpg/000000.jpg")).shape == (32, 32, 1)


def test_pictures_with_transparency(ddim, clear_model, tmp_path):
    command = ("sample", "-m", clear_model, *PLAIN, "-n", 2)
    for name in ("png", "webp"):
        assert ddim(*command, "--image-format", name, "-o", name).exit_code == 0
        assert ddim("verify", name).exit_code == 0
    assert np.array_equal(read_pixels(Path("webp/000001.webp")), read_pixels(Path("png/000001.png")))
    # Said before a picture is made.
    for more in ((), ("--dry-run",)):
        result = ddim(*command, "--image-format", "jpg", "-o", "jpg", *more)
        assert (result.exit_code, "JPEG has no transparency" in result.stderr) == (2, True)
    assert not (tmp_path / "jpg").exists()


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_rows_of_a_job_file(sample, ddim, tmp_path, name):
    (tmp_path / "jobs.jsonl").write_text('{"name": "a b", "seed": 5}\n{"seed": 7}\n{"name": "x.y", "seed": 9}\n')
    command = ("--items", "jobs.jsonl", "--image-format", name, "-o", "out")
    assert sample(*command).exit_code == 0
    there = sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == f".{name}")
    assert there == sorted(f"{n}.{name}" for n in ("000001", "a b", "x.y"))
    (tmp_path / "out" / f"a b.{name}").unlink()
    told = json.loads(sample(*command, "--json").stdout)
    assert (told["made"], told["present"]) == (1, 2)
    assert ddim("verify", "out").exit_code == 0
    assert ddim("replay", f"out/a b.{name}", "out/x.y.json", "--check").exit_code == 0
    result = sample("--items", "jobs.jsonl", "-o", "out")
    assert (result.exit_code, f'"{name}", this run has "png"' in result.stderr) == (2, True)
    assert sample("--items", "jobs.jsonl", "-o", "out", "--overwrite").exit_code == 0
    assert not list((tmp_path / "out").glob(f"*.{name}"))
    assert ddim("verify", "out").exit_code == 0


def test_latents(ddim, tiny_model, tmp_path):
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    assert ddim("invert", "photo.png", "-m", tiny_model, *PLAIN, "-o", "up").exit_code == 0
    command = ("sample", "-m", tiny_model, *PLAIN, "--latents", "up", "--image-format", "webp", "-o", "out")
    assert ddim(*command).exit_code == 0
    assert (tmp_path / "out" / "photo.latent.webp").exists()
    assert "all is well" in ddim("verify", "out").stdout
    assert "1 image" in ddim("report", "out").stdout
    assert ddim("replay", "out/photo.latent.webp", "--latents", "up", "--check").exit_code == 0
    (tmp_path / "out" / "photo.latent.webp").unlink()
    assert "photo.latent.webp: is missing" in ddim("verify", "out").stdout


@pytest.mark.slow
def test_pictures_begin_from_a_webp_as_from_a_png(ddim, tmp_path):
    """A grey one too, which WebP has no mode for."""
    for name in ("png", "webp"):
        assert ddim("sample", *PLAIN, "-n", 1, "--image-format", name, "-o", name).exit_code == 0
        begun = ("--init", f"{name}/000000.{name}", "--strength", 0.5, "-o", f"from-{name}")
        result = ddim("sample", *PLAIN, "-n", 1, *begun)
        assert result.exit_code == 0
        assert "RGB to grey" not in result.stderr
    one, other = (json.loads((tmp_path / f"from-{n}" / "000000.json").read_text()) for n in ("png", "webp"))
    assert one["image"]["pixels_sha256"] == other["image"]["pixels_sha256"]
    assert one["sampling"]["init"]["pixels_sha256"] == other["sampling"]["init"]["pixels_sha256"]


def test_a_sweep_of_webp(ddim, tiny_model, tmp_path):
    command = ("sweep", "-m", tiny_model, "--no-compile", "--axis", "steps=1,2", "-n", 2, "--image-format", "webp")
    told = json.loads(ddim(*command, "--json").stdout)
    assert told["folder"].endswith("-webp")
    folder = tmp_path / told["folder"]
    assert len(list(folder.rglob("0*.webp"))) == 4
    assert not list(folder.rglob("0*.png"))
    assert (folder / "sweep.png").exists()
    assert json.loads(ddim(*command, "--json").stdout)["made"] == 0
    assert ddim("verify", folder / "steps=1").exit_code == 0
    assert ddim("report", folder).exit_code == 0
    page = (folder / "report.html").read_text()
    assert "steps%3D1/000000.webp" in page
    axis = ddim("sweep", "-m", tiny_model, "--axis", "output.image_format=png,webp")
    assert (axis.exit_code, "is the same for the whole sweep" in axis.stderr) == (2, True)


def test_an_array_is_of_the_pixels_that_were_made(sample, tmp_path):
    for name in ("png", "webp"):
        assert sample("-n", 2, "-b", 2, "--image-format", name, "--npz", f"{name}.npz", "-o", name).exit_code == 0
    assert (tmp_path / "png.npz").read_bytes() == (tmp_path / "webp.npz").read_bytes()
    (tmp_path / "jobs.jsonl").write_text('{"seed": 1}\n')
    for which in (("-n", 2), ("--items", "jobs.jsonl")):
        result = sample(*which, "--image-format", "jpg", "--npz", "jpg.npz", "-o", "jpg")
        assert (result.exit_code, "take --image-format png or webp" in result.stderr) == (2, True)
    assert not (tmp_path / "jpg").exists()


def test_what_quality_bears_on(sample, tmp_path):
    for quality in (40, 90):
        assert sample("-n", 1, "--image-format", "jpg", "--quality", quality, "-o", f"q{quality}").exit_code == 0
    small, large = ((tmp_path / folder / "000000.jpg").stat().st_size for folder in ("q40", "q90"))
    assert small < large
    warned = "output.quality is of JPEG, and has no effect on webp"
    assert warned in sample("-n", 1, "--image-format", "webp", "--quality", 40, "-o", "w").stderr
    assert warned not in sample("-n", 1, "--image-format", "webp", "-o", "w").stderr
    # Whatever it is, it does not tell folders apart.
    assert (
        json.loads(sample("-n", 1, "--image-format", "webp", "--quality", 50, "-o", "w", "--json").stdout)["made"] == 0
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--image-format", "gif"), 'it takes one of "png", "webp", "jpg"'),
        (("--image-format", "webpp"), "did you mean webp?"),
        (("--quality", 0), "it takes an integer from 1 to 100"),
        (("--quality", 101), "it takes an integer from 1 to 100"),
    ],
)
def test_what_there_is_not(sample, args, says):
    result = sample(*args)
    assert (result.exit_code, says in result.stderr) == (2, True), result.stderr


def test_a_webp_has_room_for_so_many_pixels(ddim, tiny_latent_model):
    command = ("sample", "-m", tiny_latent_model, "--image-size", "32x20000", "--dry-run", "-n", 1)
    assert ddim(*command).exit_code == 0
    result = ddim(*command, "--image-format", "webp")
    assert (result.exit_code, "has room for 16,383 pixels a side" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "command", ["interpolate --between 1,2 --frames 2", "trajectory --seeds 1", "invert photo.png"]
)
def test_other_commands_write_pngs_and_say_so(ddim, tiny_model, tmp_path, command):
    (tmp_path / "run.toml").write_text('[output]\nimage_format = "webp"\ndir = "out"\n')
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    result = ddim(*command.split(), "-m", tiny_model, *PLAIN, "-c", "run.toml")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count('output.image_format = "webp" has no effect here') == 1
    assert "run.toml:2" in result.stderr
    assert list((tmp_path / "out").glob("*.png"))
    assert not list((tmp_path / "out").glob("*.webp"))
    assert ddim(*command.split(), "-m", tiny_model, "--image-format", "webp").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_other_tools_find_the_prompt(ddim, tiny_text_model, tmp_path, name):
    command = ("sample", "-m", tiny_text_model, *PLAIN, "-n", 1, "--image-format", name, "--prompt", "семь")
    for more, there in (((), True), (("--no-parameters",), False)):
        assert ddim(*command, "-o", "out", "--overwrite", *more).exit_code == 0
        with Image.open(tmp_path / "out" / f"000000.{name}") as image:
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
        assert comment.startswith(b"UNICODE\0") == there
        assert comment[8:].decode("utf-16-be").startswith("семь\n") == there
        assert ddim("verify", "out").exit_code == 0


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_a_picture_says_how_it_was_made(sample, ddim, tmp_path, name):
    assert sample("-n", 1, "--image-format", name, "-o", "out").exit_code == 0
    picture, lone = tmp_path / "out" / f"000000.{name}", tmp_path / f"lone.{name}"
    shutil.copy(picture, lone)
    as_made = {"webp": "as they were made", "jpg": "as JPEG left them, in the file as it was written"}[name]
    for path in (picture, picture.with_suffix(".json")):
        shown = ddim("inspect", path).stdout
        assert as_made in shown
        assert ("sha256 before JPEG" in shown) == (name == "jpg")
    told = json.loads(ddim("inspect", lone, "--json").stdout)
    assert (told["told_by"], told["seed"]) == (str(lone), 0)
    assert told["pixels_unchanged"] is (None if name == "jpg" else True)
    # Saved anew: the text is lost, and the sidecar beside it says what it was.
    with Image.open(picture) as image:
        Image.eval(image, lambda v: 255 - v).save(picture, lossless=True)
    told = ddim("inspect", picture, "--json")
    assert (json.loads(told.stdout)["pixels_unchanged"], json.loads(told.stdout)["seed"]) == (False, 0)
    assert "it was changed since" in ddim("inspect", picture).stderr
    lone.write_text("no picture")
    assert "cannot be read as a PNG, WebP or JPEG" in ddim("inspect", lone).stderr


@pytest.mark.parametrize(("name", "kind", "words"), [("webp", "webp", "WebP"), ("jpg", "jpeg", "JPEG, quality 95")])
def test_a_report_shows_them(sample, ddim, tmp_path, name, kind, words):
    assert sample("-n", 2, "--image-format", name, "-o", "out").exit_code == 0
    assert ddim("report", "out").exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"000001.{name}" in page
    assert words in page
    assert ddim("report", "out", "--embed", "-o", "page.html").exit_code == 0
    assert f"data:image/{kind};base64," in (tmp_path / "page.html").read_text()
    # One that has lost its sidecar says the same itself.
    (tmp_path / "out" / "000001.json").unlink()
    result = ddim("report", "out")
    assert f"000001.{name} has no sidecar; the text inside it is shown" in result.stdout + result.stderr
