import hashlib
import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from ddim_cli.outputs.picture import encode_png


@pytest.fixture
def made(ddim, tiny_model, tmp_path):
    """A folder of five pictures in batches of three, by a model that a relative path names."""
    shutil.copytree(tiny_model, tmp_path / "model")
    command = ("sample", "-m", "model", "--steps", 5, "-n", 5, "-b", 3, "--eta", 0.5, "-o", "out")
    assert ddim(*command).exit_code == 0
    return tmp_path / "out"


def edit(path, section, **changes):
    record = json.loads(path.read_text())
    record[section] |= changes
    path.write_text(json.dumps(record))


def test_hashes_are_equal_from_sidecars_and_from_pngs(ddim, made):
    result = ddim("replay", *sorted(made.iterdir()), "--check")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "10 pictures made again: 10 with equal hashes" in result.stdout
    # Rows beside those that are made again are padding, in batches of the sidecar's size.
    assert "5 images in 2 batches of 3" in result.stderr
    one = json.loads(ddim("replay", made / "000003.json", "--check", "--json").stdout)
    [picture] = one["pictures"]
    assert (picture["equal_hash"], picture["equal_hash_promised"], picture["max_diff"]) == (True, True, 0)


def test_quietly_a_check_says_what_differs_and_nothing_else(ddim, made, tmp_path):
    result = ddim("replay", made / "000001.json", "--check", "-q", "-o", "again")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    edit(made / "000002.json", "image", pixels_sha256="0" * 64)
    (made / "000002.png").unlink()
    result = ddim("replay", made / "000001.json", made / "000002.json", "--check", "-q")
    assert result.exit_code == 3
    [line] = result.stdout.splitlines()
    assert line.startswith(f"{made / '000002.json'}: ")


def test_a_check_makes_the_pictures_anew(ddim, tiny_model, made, tmp_path):
    """Also into a folder of an earlier one: what was made then says nothing of what would be made now."""
    command = ("replay", "out/000001.json", "out/000004.json", "-o", "again")
    assert ddim(*command).exit_code == 0
    there = [tmp_path / "again" / f"00000{seed}.png" for seed in (1, 4)]
    before = [(p.stat().st_mtime_ns, p.read_bytes()) for p in there]
    assert "2 images in 1 batch" not in ddim(*command).stderr
    result = ddim(*command, "--check")
    assert (result.exit_code, "2 with equal hashes" in result.stdout) == (0, True)
    assert "2 images in 1 batch of 3" in result.stderr
    after = [(p.stat().st_mtime_ns, p.read_bytes()) for p in there]
    assert all(old[0] != new[0] and old[1] == new[1] for old, new in zip(before, after, strict=True))
    # What the folder has of other settings stays, and is refused as ever.
    assert ddim("sample", "-m", tiny_model, "--steps", 2, "-n", 5, "-o", "other").exit_code == 0
    assert ddim(*command[:-1], "other", "--check").exit_code == 2
    assert len(list((tmp_path / "other").glob("0*.png"))) == 5


def test_as_many_rows_as_then(ddim, made, tmp_path):
    """Also more of them than there were images, as runs before had where -b was above the plan."""
    for path in (tmp_path / "out").glob("0*.json"):
        edit(path, "runtime", batch_size=9)
    assert ddim("replay", "out/000001.json", "-o", "again").exit_code == 0
    assert json.loads((tmp_path / "again" / "000001.json").read_text())["runtime"]["batch_size"] == 9


def test_as_many_threads_as_then(ddim, made, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1] if asked else 64)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    edit(made / "000002.json", "runtime", threads=1)
    result = json.loads(ddim("replay", made / "000002.json", "--check", "--json").stdout)
    assert result["pictures"][0]["equal_hash_promised"]
    # And back again.
    assert asked == [1, 64]


def test_from_a_png_alone_and_from_another_folder(ddim, made, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(made / "000004.png", tmp_path / "elsewhere" / "mine.png")
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = ddim("replay", "mine.png", "-o", "again", "--check")
    assert result.exit_code == 0, result.stderr
    again = tmp_path / "elsewhere" / "again"
    pixels = [np.asarray(Image.open(folder / "000004.png")) for folder in (again, made)]
    assert np.array_equal(*pixels)
    assert ddim("verify", "again").exit_code == 0
    assert sorted(p.name for p in again.iterdir()) == ["000004.json", "000004.png", "grid.png", "run.json"]


def test_the_command_that_inspect_names_can_be_pasted(ddim, made, tmp_path):
    (tmp_path / "it's odd; $here").mkdir()
    path = shutil.copy(made / "000001.png", tmp_path / "it's odd; $here")
    [line] = [line for line in ddim("inspect", path).stdout.splitlines() if line.startswith("again: ")]
    program, *command = shlex.split(line.removeprefix("again: "))
    assert program == "ddim"
    assert ddim(*command).exit_code == 0
    assert (tmp_path / "again" / "000001.png").exists()


def test_a_png_without_text_is_told_of_by_the_sidecar_beside_it(ddim, made):
    """As after an editor that keeps the pixels alone."""
    for seed in (1, 2):
        path = made / f"00000{seed}.png"
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(pixels).save(path)
    result = ddim("replay", made / "000001.png", made / "000002.png", "--check")
    assert (result.exit_code, "2 with equal hashes" in result.stdout) == (0, True), result.stderr
    # A sidecar of another picture says nothing.
    (made / "000001.json").write_text((made / "000003.json").read_text())
    result = ddim("replay", made / "000001.png", "--check")
    assert (result.exit_code, "has no text 'ddim' inside" in result.stderr) == (2, True)


def test_a_model_that_has_moved(ddim, made, tmp_path):
    sidecar = made / "000001.json"
    (tmp_path / "model").rename(tmp_path / "moved")
    result = ddim("replay", sidecar, "--check")
    assert result.exit_code == 2
    assert f"its model is no longer at {tmp_path / 'model'}; point to it with -m" in result.stderr
    assert ddim("replay", sidecar, "--check", "-m", "moved").exit_code == 0
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "moved" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "conv_out.bias": tensors["conv_out.bias"] + 1}, weights)
    result = ddim("replay", sidecar, "--check", "-m", "moved")
    assert result.exit_code == 2
    assert "was made with other weights: their sha256 is" in result.stderr
    assert "other weights" in ddim("replay", sidecar, "--check", "-m", "mnist").stderr


def test_timesteps_classes_and_the_large_variance_come_back(ddim, tiny_model, made):
    for settings in (["--set", "sampling.timesteps=[900, 500, 100]"], ["--set", 'sampling.variance="large"']):
        assert ddim("sample", "-m", tiny_model, "-n", 2, "-o", "b", "--overwrite", *settings).exit_code == 0
        result = ddim("replay", "b/000001.json", "--check")
        assert result.exit_code == 0, result.stdout + result.stderr


def repaint(made, change, hash_too):
    """Change a picture's pixels; with ``hash_too`` the sidecar says that it was made so."""
    path = made / "000002.png"
    with Image.open(path) as image:
        image.load()
        pixels, text = change(np.asarray(image).astype(int)).clip(0, 255).astype(np.uint8), image.text["ddim"]
    path.write_bytes(encode_png(Image.fromarray(pixels), text))
    if hash_too:
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        edit(made / "000002.json", "image", pixels_sha256=sha256)


@pytest.mark.parametrize(
    ("by", "runtime", "code", "says"),
    [
        (1, {}, 3, "has another hash, though all that bears on it is the same (differs by 1)"),
        (1, {"device_name": "another"}, 0, "1 within the tolerance (device_name another then"),
        (1, {"versions": {"torch": "1.0"}}, 0, "within the tolerance (torch 1.0 then"),
        (2, {"threads": 99}, 3, "differs by 2, more than 1 (threads 99 then"),
    ],
)
def test_what_a_difference_means(ddim, made, by, runtime, code, says):
    repaint(made, lambda p: np.where(p < 128, p + by, p - by), hash_too=True)
    edit(made / "000002.json", "runtime", **runtime)
    result = ddim("replay", made / "000002.json", "--check")
    assert result.exit_code == code
    assert says in result.stdout


def test_a_picture_that_was_changed_after_it_was_made(ddim, made):
    repaint(made, lambda p: 255 - p, hash_too=False)
    result = ddim("replay", made / "000002.json", "--check", "--json")
    assert result.exit_code == 3
    assert "not those that its sidecar says" in json.loads(result.stdout)["pictures"][0]["problem"]


def test_without_its_png_a_hash_decides_or_nobody_can_tell(ddim, made):
    (made / "000002.png").unlink()
    assert ddim("replay", made / "000002.json", "--check").exit_code == 0
    edit(made / "000002.json", "image", pixels_sha256="0" * 64)
    edit(made / "000002.json", "runtime", device_name="another")
    result = ddim("replay", made / "000002.json", "--check")
    assert (result.exit_code, "its picture is not there" in result.stdout) == (3, True)


def test_a_lower_precision_is_held_to_the_median(ddim, made, monkeypatch):
    # A network of random weights is no measure of how far bfloat16 is off.
    monkeypatch.setattr("ddim_cli.evaluation.replayed.MEDIAN_PSNR", 30.0)
    files = sorted(made.glob("0*.json"))
    result = ddim("replay", *files, "--check", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "dtype float32 then, bfloat16 now; the worst" in result.stdout
    # One bad picture is no bad median, three of five are.
    for path, code in zip(sorted(made.glob("0*.png"))[:3], (0, 0, 3), strict=True):
        with Image.open(path) as image:
            image.load()
            path.write_bytes(encode_png(Image.eval(image, lambda v: 255 - v), image.text["ddim"]))
        result = ddim("replay", *files, "--check", "--dtype", "bfloat16")
        assert result.exit_code == code, result.stdout
    assert "the median PSNR is" in result.stdout


def test_settings_of_several_kinds(ddim, tiny_model, made):
    assert ddim("sample", "-m", tiny_model, "--steps", 3, "-n", 1, "-o", "b").exit_code == 0
    both = (made / "000001.json", "b/000000.json")
    assert ddim("replay", *both, "--check").exit_code == 0
    result = ddim("replay", *both, "-o", "again")
    assert result.exit_code == 2
    assert "a folder holds pictures of one kind" in result.stderr


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("000001.json", lambda r: r.pop("config"), "its config is missing"),
        ("000001.json", lambda r: r.update(seed=-1), "its seed is missing"),
        ("000001.json", lambda r: r.update(seed=True), "its seed is missing"),
        ("000001.json", lambda r: r.update(model=3), "its model is missing"),
        ("000001.json", lambda r: r["runtime"].update(batch_size="x"), "its runtime.batch_size"),
        ("000001.json", lambda r: r["config"].update(future={"a": 1}), "unknown table [future]"),
        ("000001.json", lambda r: r["config"]["sampling"].update(eta="x"), "sampling.eta"),
        ("000001.json", lambda r: r["model"].update(kind="callable"), "a network of its own"),
        ("000001.json", lambda r: r["sampling"].update(eta=0.25), "was made with sampling.eta = 0.25"),
        ("000001.json", lambda r: r.update(schema="x"), "is no sidecar"),
    ],
)
def test_sidecars_that_cannot_be_replayed(ddim, made, name, change, says):
    record = json.loads((made / name).read_text())
    change(record)
    (made / name).write_text(json.dumps(record))
    result = ddim("replay", made / name, "--check", "--json")
    assert (result.exit_code, json.loads(result.stdout)["exit_code"]) == (2, 2), result.stderr
    assert says in result.stderr
    assert "unexpected" not in result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["out/000001.json"], "say where to keep"),
        (["out", "--check"], "name its sidecars"),
        (["none.json", "--check"], "no such file"),
        (["none.png", "--check"], "no such file"),
        (["out/run.json", "out/grid.png", "--check"], "none of these files"),
        (["photo.png", "--check"], "has no text 'ddim'"),
        (["text.png", "--check"], "cannot be read as a PNG"),
        (["out/000001.json", "-o", "out"], "is in there"),
        (["out/000001.json", "-o", "."], "is in there"),
    ],
)
def test_bad_input(ddim, made, tmp_path, args, says):
    Image.new("L", (4, 4)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("x")
    result = ddim("replay", *args)
    assert result.exit_code == 2
    assert says in result.stderr
