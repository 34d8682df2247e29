"""verify, replay --check, compare and evaluate of folders of WebP and JPEG."""

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ddim_cli.evaluation.pictures import open_pictures
from ddim_cli.evaluation.verify import verify
from ddim_cli.outputs.picture import Encoding, read_pixels, text_inside

FORMATS = ("png", "webp", "jpg")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """Folders of the same three pictures, in every format."""
    from typer.testing import CliRunner

    from ddim_cli.cli.app import app

    root = tmp_path_factory.mktemp("formats")
    for name in FORMATS:
        command = (
            "sample",
            "-m",
            tiny_model,
            "--steps",
            3,
            "-n",
            3,
            "-b",
            3,
            "--image-format",
            name,
            "-o",
            root / name,
        )
        result = CliRunner().invoke(app, [*map(str, command), "-q"])
        assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def folders(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def edit(path, section, **changes):
    record = json.loads(path.read_text())
    record[section] |= changes
    path.write_text(json.dumps(record))


def repaint(folder, change, seed=1, **more):
    """Give a picture other pixels in its own format, with the text that it has, and what the sidecar says of it."""
    [path] = [p for p in folder.glob(f"{seed:06d}.*") if p.suffix != ".json"]
    with Image.open(path) as image:
        text, pixels = text_inside(image), np.asarray(image)
    data = Encoding(path.suffix[1:]).encode(Image.fromarray(change(pixels)), text)
    path.write_bytes(data)
    facts = {"bytes": len(data), **more}
    if path.suffix == ".jpg":
        facts["file_sha256"] = hashlib.sha256(data).hexdigest()
    edit(path.with_suffix(".json"), "image", **facts)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_as_it_was_written_is_well(ddim, made, name):
    result = ddim("verify", made / name)
    assert (result.exit_code, result.stdout.splitlines()[0]) == (0, "3 images: all is well")
    assert ("3 JPEGs: the files were checked, and not their pixels" in result.stdout) == (name == "jpg")
    told = json.loads(ddim("verify", made / name, "--json").stdout)
    assert (told["ok"], told["images"], told["pixels_not_checked"]) == (True, 3, 3 if name == "jpg" else 0)


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_a_changed_byte_is_found(folders, name):
    """Each byte of the file, some of them at a time."""
    path = folders / name / f"000001.{name}"
    data = path.read_bytes()
    for place in range(0, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        found = verify(folders / name).problems
        if name == "jpg":
            assert found, place
        elif not found:
            # Bytes that decide nothing, as a PNG has some: what it shows and says is checked.
            with Image.open(io.BytesIO(data)) as before, Image.open(path) as now:
                assert (before.tobytes(), text_inside(before)) == (now.tobytes(), text_inside(now)), place
        assert all(problem.file == f"000001.{name}" for problem in found)
    path.write_bytes(data)
    assert not verify(folders / name).problems


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_what_can_be_wrong_with_a_pair(folders, name):
    folder = folders / name

    def text():
        [problem] = verify(folder).problems
        return problem.text

    picture, sidecar = folder / f"000001.{name}", folder / "000001.json"
    data, said = picture.read_bytes(), sidecar.read_bytes()

    repaint(folder, lambda p: 255 - p)
    if name == "webp":
        assert text() == "has other pixels than its sidecar says"
    else:
        # Nobody can tell: the sidecar was written for this file.
        assert not verify(folder).problems
        edit(sidecar, "image", file_sha256="0" * 64)
        assert text() == "is not the file that its sidecar says"
    repaint(folder, lambda p: p[:4])
    assert text() == "is 8 x 4 RGB, its sidecar says 8 x 8 RGB"
    picture.write_bytes(data)
    sidecar.write_bytes(said)
    edit(sidecar, "sampling", eta=0.5)
    assert "was made with sampling.eta = 0.5, the run with 0.0" in text()
    sidecar.write_bytes(said)
    edit(sidecar, "runtime", threads=99)
    assert text() == "says something else inside than its sidecar"
    sidecar.write_bytes(said)
    edit(sidecar, "image", bytes=7)
    assert text() == f"has {len(data):,} bytes, its sidecar says 7"
    sidecar.write_bytes(said)
    picture.write_bytes(Encoding("png").encode(Image.new("RGB", (8, 8))))
    assert text() == "does not decode"
    picture.unlink()
    assert text() == "is missing, its sidecar is there"
    sidecar.unlink()
    assert text() == "is missing"
    picture.write_bytes(data)
    assert text() == "has no sidecar"
    sidecar.write_bytes(said)
    (folder / f"000009.{name}").write_bytes(data)
    assert text() == "is extra: run.json does not name its seed"
    (folder / f"000009.{name}").unlink()
    # A picture of another format is nobody's business, as any other file.
    (folder / "000001.png").write_text("x")
    assert not verify(folder).problems


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_are_made_again(ddim, made, tmp_path, name):
    """From sidecars and from the text inside alone; the hash is that of the pixels before they were encoded."""
    shutil.copy(made / name / f"000002.{name}", tmp_path / f"lone.{name}")
    files = [*made.glob(f"{name}/0*"), tmp_path / f"lone.{name}"]
    result = ddim("replay", *files, "--check", "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["ok"], told["images"]) == (0, True, 7)
    assert all(picture["equal_hash"] for picture in told["pictures"])
    assert all(("beyond_jpeg" in picture) == (name == "jpg") for picture in told["pictures"])
    # What is made is a PNG, whatever they were.
    assert ddim("replay", made / name / f"000002.{name}", "-o", "again").exit_code == 0
    assert np.array_equal(read_pixels(tmp_path / "again" / "000002.png"), read_pixels(made / "png" / "000002.png"))
    warned = ddim("replay", made / name / "000002.json", "-o", "more", "--set", "output.image_format=webp").stderr
    assert "output.image_format has no effect on replay" in warned
    assert (tmp_path / "more" / "000002.png").exists()


NEAR, FAR = (lambda p: np.where(p < 128, p + 1, p - 1).astype(np.uint8)), (lambda p: 255 - p)


@pytest.mark.parametrize(
    ("change", "runtime", "code", "says"),
    [
        # The same machine promises equal hashes, whatever the file shows.
        (NEAR, {}, 3, "has another hash, though all that bears on it is the same"),
        (NEAR, {"threads": 99}, 0, "1 not told from their JPEGs, which hide small differences (threads 99 then"),
        (FAR, {"threads": 99}, 3, "beyond what JPEG loses, more than 1 (threads 99 then"),
    ],
)
def test_a_jpeg_of_another_hash_is_judged_by_what_jpeg_cannot_lose(ddim, folders, change, runtime, code, says):
    repaint(folders / "jpg", change, pixels_sha256="0" * 64)
    edit(folders / "jpg" / "000001.json", "runtime", **runtime)
    result = ddim("replay", folders / "jpg" / "000001.json", "--check")
    assert (result.exit_code, says in result.stdout) == (code, True), result.stdout


def test_a_jpeg_of_this_hash_that_shows_something_else(ddim, folders):
    repaint(folders / "jpg", FAR)
    result = ddim("replay", folders / "jpg" / "000001.json", "--check")
    assert (result.exit_code, "its pixels are not those that its sidecar says" in result.stdout) == (3, True)
    (folders / "jpg" / "000001.jpg").unlink()
    assert ddim("replay", folders / "jpg" / "000001.json", "--check").exit_code == 0


def test_jpegs_have_a_median_only_of_what_jpeg_cannot_lose(ddim, folders):
    files = sorted(folders.glob("jpg/0*.json"))
    # By the pixels in the files alone, none would reach 40 dB.
    with Image.open(folders / "jpg" / "000001.jpg") as lossy, Image.open(folders / "png" / "000001.png") as exact:
        assert np.abs(np.asarray(lossy).astype(int) - np.asarray(exact)).max() > 2
    result = ddim("replay", *files, "--check", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stdout
    for seed in (0, 1):
        repaint(folders / "jpg", FAR, seed)
    result = ddim("replay", *files, "--check", "--dtype", "bfloat16")
    assert (result.exit_code, "the median PSNR is" in result.stdout) == (3, True), result.stdout


@pytest.mark.parametrize("name", ["webp", "jpg"])
def test_compare_takes_folders_of_any_format(ddim, made, name):
    result = ddim("compare", made / "png", made / name, "--json")
    told = json.loads(result.stdout)
    assert told["other_setting"] == f"output.image_format is {name!r}, in the golden pictures 'png'"
    largest = [picture["max_diff"] for picture in told["images"]]
    assert (result.exit_code, largest == [0, 0, 0]) == ((0, True) if name == "webp" else (3, False))
    assert ddim("compare", made / name, made / "png", "--max-diff", 255, "--min-psnr", 10).exit_code == 0


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_are_read_in_the_order_of_the_plan(made, name):
    [batch] = list(open_pictures(made / name).batches(8))
    [expected] = list(open_pictures(made / "png").batches(8))
    assert batch.shape == (3, 8, 8, 3)
    assert np.abs(batch.astype(int) - expected).max() <= (0 if name != "jpg" else 60)


def test_grey_pictures_stay_grey(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7), dtype=np.uint8)
    data = Encoding("webp").encode(Image.fromarray(pixels), json.dumps({"image": {"mode": "L"}}))
    (tmp_path / "a.webp").write_bytes(data)
    [batch] = list(open_pictures(tmp_path).batches(1))
    assert np.array_equal(batch[0, :, :, 0], pixels)
    assert batch.shape == (1, 6, 7, 1)
