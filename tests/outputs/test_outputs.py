import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddim_cli.errors import RunError
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.contact_sheet import GAP, contact_sheet
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.jsontext import dump_json
from ddim_cli.outputs.picture import encode_png, to_image
from ddim_cli.outputs.sidecar import describe_picture, identity, identity_hash, to_text
from ddim_cli.outputs.writer import BackgroundWriter

RECORD = {
    "sampling": {"steps": 2, "eta": 0.0, "timesteps": [500, 0]},
    "scheduler": {"beta_end": 0.02},
    "model": {"sha256": "ab"},
    "runtime": {"dtype": "float32", "tf32": False, "batch_size": 3},
    "config": {},
}


def pixels(channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (5, 7, channels), dtype=np.uint8)


def write(folder, seed, made):
    folder.write(seed, describe_picture(RECORD, seed, made), made, 0.5, identity(RECORD))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_pair_says_what_it_is(tmp_path, channels, mode):
    folder = OutputFolder(tmp_path)
    made = pixels(channels)
    write(folder, 12, made)
    sidecar = json.loads((tmp_path / "000012.json").read_text())
    with Image.open(tmp_path / "000012.png") as image:
        image.load()
        assert image.mode == mode
        assert hashlib.sha256(image.tobytes()).hexdigest() == sidecar["image"]["pixels_sha256"]
        inside = json.loads(image.text["ddim"])
    assert list(sidecar) == [
        "schema", "image", "seed", "sampling", "scheduler", "model", "runtime", "timing", "created", "config",
    ]  # fmt: skip
    assert sidecar["image"]["bytes"] == (tmp_path / "000012.png").stat().st_size
    assert sidecar["image"]["file"] == "000012.png"
    assert (sidecar["image"]["width"], sidecar["image"]["height"]) == (7, 5)
    assert "timing" not in inside
    assert "created" not in inside
    assert "file" not in inside["image"]
    assert inside["sampling"] == sidecar["sampling"]


def test_the_same_picture_gives_the_same_bytes():
    text = to_text(describe_picture(RECORD, 1, pixels()))
    assert encode_png(to_image(pixels()), text) == encode_png(to_image(pixels()), text)


def test_done_means_whole(tmp_path):
    folder = OutputFolder(tmp_path)
    settings = identity(RECORD)
    for seed in range(4):
        write(folder, seed, pixels(seed=seed))
    (tmp_path / "000001.png").unlink()
    (tmp_path / "000002.png").write_bytes(b"short")
    (tmp_path / "000003.json").write_text("{")
    assert folder.missing(range(6), settings) == [1, 2, 3, 4, 5]


def test_subdirs():
    folder = OutputFolder(Path("x"), subdirs=True)
    assert str(folder.picture(1500)) == "x/001000/001500.png"
    assert str(folder.picture(12345678)) == "x/12345000/12345678.png"
    assert str(OutputFolder(folder.path).picture(1234567)) == "x/1234567.png"


def test_the_hash_is_of_what_changes_pictures():
    changed = {**RECORD, "sampling": {**RECORD["sampling"], "eta": 0.5}}
    same = {**RECORD, "runtime": {**RECORD["runtime"], "batch_size": 9}, "sampling": {**RECORD["sampling"], "steps": 3}}
    assert identity_hash(same) == identity_hash(RECORD) != identity_hash(changed)
    assert len(identity_hash(RECORD)) == 8


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    import os

    def fail(*args):
        raise OSError(28, "No space left on device", str(args[1]))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []
    failed = pytest.raises(RunError, match=r"000000.png: cannot be written: No space left on device")
    with failed, BackgroundWriter(tmp_path) as writer:
        writer.submit(write, OutputFolder(tmp_path), 0, pixels())


def test_json_text_reads_back():
    value = {"a": [1, 2.5, None], "b": {"c": "é\n", "d": {}}, "e": True}
    assert json.loads(dump_json(value)) == value
    assert '"a": [1, 2.5, null]' in dump_json(value)
    with pytest.raises(ValueError):
        dump_json({"a": float("nan")})


@pytest.mark.parametrize(("count", "tiles"), [(1, (1, 1)), (4, (2, 2)), (5, (3, 2)), (100, (8, 8))])
def test_contact_sheet(count, tiles):
    images = [Image.new("L", (32, 32), 255) for _ in range(count)]
    sheet = contact_sheet(images)
    assert sheet.size == tuple(n * (96 + GAP) + GAP for n in tiles)
    assert sheet.getpixel((GAP, GAP)) == (255, 255, 255)
    assert sheet.getpixel((0, 0)) != (255, 255, 255)
    assert contact_sheet([Image.new("RGB", (256, 128))]).size == (256 + 2 * GAP, 128 + 2 * GAP)


@pytest.mark.parametrize(
    ("side", "count", "tile"), [(28, 64, 112), (256, 64, 256), (512, 4, 512), (512, 64, 256), (1024, 64, 256)]
)
def test_a_sheet_of_large_pictures_is_reduced_by_a_whole_number(side, count, tile):
    columns = round(count**0.5)
    sheet = contact_sheet([Image.new("RGB", (side, side), (9, 9, 9))] * count)
    assert sheet.size == (columns * (tile + GAP) + GAP,) * 2
    assert contact_sheet([Image.new("L", (side, side))] * 3, columns=3, widest=None).width >= 3 * side
