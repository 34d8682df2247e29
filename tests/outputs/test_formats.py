"""Folders of WebP and of JPEG: what lies there, what may join it, and what goes with --overwrite."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from records import OTHER, RECORD

from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import remove_leftovers
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import Encoding
from ddim_cli.outputs.row_plan import RowPlan
from ddim_cli.outputs.sidecar import describe_picture, identity, of_the_picture
from ddim_cli.outputs.store import picture_of

PNG, WEBP, JPG = Encoding(), Encoding("webp"), Encoding("jpg", 90)


def opened(path, encoding, subdirs=False):
    return OutputFolder(path, subdirs, encoding=encoding)


def write(folder, name, record=RECORD, channels=3):
    folder.create()
    seed = name if isinstance(name, int) else None
    pixels = np.random.default_rng(len(str(name))).integers(0, 256, (4, 6, channels), dtype=np.uint8)
    folder.write(name, describe_picture(record, seed, pixels), pixels, 0.1, identity(record))
    return pixels


def fill(path, encoding, seeds=(1, 2), record=RECORD, subdirs=False):
    folder = opened(path, encoding, subdirs)
    folder.create()
    folder.start(seeds, record, complete=False)
    for seed in seeds:
        write(folder, seed, record)
    folder.finish(len(seeds), 1.0, grid=True)
    return folder


def names(path):
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("subdirs", [False, True])
@pytest.mark.parametrize("encoding", [WEBP, JPG])
def test_a_pair_is_a_picture_and_its_sidecar(tmp_path, encoding, subdirs):
    folder = fill(tmp_path, encoding, (1, 1500), subdirs=subdirs)
    places = ("000000/000001", "001000/001500") if subdirs else ("000001", "001500")
    pairs = [f"{place}{ending}" for place in places for ending in (encoding.ending, ".json")]
    assert names(tmp_path) == sorted([*pairs, "grid.png", "run.json"])
    picture, sidecar = folder.picture(1), json.loads(folder.sidecar(1).read_text())
    data, facts = picture.read_bytes(), sidecar["image"]
    assert (facts["file"], facts["bytes"], facts["mode"]) == (picture.name, len(data), "RGB")
    assert picture_of(folder.sidecar(1)) == picture
    # Whoever makes it again has the hash of what was made, whatever became of it in the file.
    assert facts["pixels_sha256"] == hashlib.sha256(write(opened(tmp_path / "other", PNG), 1).tobytes()).hexdigest()
    of_jpeg = {"encoding": "jpg", "quality": 90, "file_sha256": hashlib.sha256(data).hexdigest()}
    assert {key: facts.get(key) for key in of_jpeg} == (of_jpeg if encoding == JPG else dict.fromkeys(of_jpeg))
    inside = of_the_picture(sidecar)["image"]
    assert ("quality" in inside, "file_sha256" in inside) == (encoding == JPG, False)
    # Done, in either layout, and by either name.
    for other in (opened(tmp_path, encoding), opened(tmp_path, encoding, True)):
        assert other.missing([1, 1500, 3], identity(RECORD)) == [3]


def test_run_json_names_what_is_no_png(tmp_path):
    told = {}
    for encoding in (PNG, WEBP, JPG):
        told[encoding] = json.loads(fill(tmp_path / encoding.format, encoding).manifest.read_text())
    assert "output" not in told[PNG]
    assert told[WEBP]["output"] == {"image_format": "webp"}
    assert told[JPG]["output"] == {"image_format": "jpg", "quality": 90}
    assert list(told[PNG]) == [key for key in told[WEBP] if key != "output"]


def test_rows_are_named_likewise(tmp_path):
    folder, lines = opened(tmp_path, WEBP), [{"name": "a b", "seed": 3}]
    record, row = ({**RECORD, "sampling": {**RECORD["sampling"], "row": own}} for own in ({}, {"seed": 3}))
    folder.create()
    with RowPlan(folder).claimed(lines, {"a b"}.__contains__, record, complete=False):
        write(folder, "a b", row)
    assert json.loads(folder.manifest.read_text())["output"] == {"image_format": "webp"}
    assert names(tmp_path) == ["a b.json", "a b.webp", "items.jsonl", "run.json"]
    other = RowPlan(opened(tmp_path, PNG))
    with (
        pytest.raises(UsageError, match=r'output.image_format = "webp", this run has "png"'),
        other.claimed(lines, {"a b"}.__contains__, record, complete=False),
    ):
        pass


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        (PNG, WEBP, 'output.image_format = "png", this run has "webp"'),
        (WEBP, PNG, 'output.image_format = "webp", this run has "png"'),
        (JPG, WEBP, 'output.image_format = "jpg", this run has "webp"'),
        (JPG, Encoding("jpg", 80), "output.quality = 90, this run has 80"),
    ],
)
@pytest.mark.parametrize("manifest", [True, False])
def test_a_folder_has_one_encoding(tmp_path, before, now, text, manifest):
    folder = fill(tmp_path, before)
    where = "run.json"
    if not manifest:
        folder.manifest.unlink()
        where = "000001.json"
    other, there = opened(tmp_path, now), names(tmp_path)
    for act in (
        lambda: other.check_settings(identity(RECORD)),
        lambda: other.start([3], RECORD, complete=False),
        lambda: other.missing([1], identity(RECORD)),
    ):
        with pytest.raises(
            UsageError, match=f"{where if act.__code__.co_names[0] != 'missing' else ''}.* {text}; choose"
        ):
            act()
    assert names(tmp_path) == there
    # Of a plan that nothing came of, nobody is bound.
    for file in [*tmp_path.glob("0*")]:
        file.unlink()
    other.start([3], RECORD, complete=False)
    assert json.loads(other.manifest.read_text()).get("output", {}) == now.settings
    assert other.planned() == (3,)


@pytest.mark.parametrize("encoding", [PNG, WEBP, JPG])
def test_a_folder_that_nobody_tells_about_is_read(tmp_path, encoding):
    fill(tmp_path, encoding, (1, 1500))
    for lost in ("run.json", "000001.json", "001500.json"):
        # By run.json, else by the sidecars, else by the pictures themselves.
        folder = OutputFolder(tmp_path)
        assert folder.coding.format == encoding.format
        assert folder.pictures() == {n: [tmp_path / f"{n:06d}{encoding.ending}"] for n in (1, 1500)}
        assert folder.picture(1500).exists()
        if lost != "001500.json":
            assert folder.coding == encoding
        (tmp_path / lost).unlink()
    assert OutputFolder(tmp_path).coding.format == encoding.format
    assert OutputFolder(tmp_path / "new").coding == PNG


def test_pictures_of_names_are_read_too(tmp_path):
    folder = opened(tmp_path, WEBP)
    write(folder, "x.latent")
    assert OutputFolder(tmp_path).named_pictures() == {"x.latent": [tmp_path / "x.latent.webp"]}


@pytest.mark.parametrize("before", [PNG, WEBP, JPG])
def test_overwrite_replaces_pictures_of_another_encoding(tmp_path, before):
    fill(tmp_path, before, (1, 2, 1500))
    # One of this plan without a sidecar: its process was killed between the two.
    (tmp_path / "000002.json").unlink()
    mine = {f"000001{e}": "a photo" for e in (".png", ".webp", ".jpg") if e != before.ending}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    now = next(encoding for encoding in (WEBP, JPG) if encoding != before)
    mine.pop(f"000001{now.ending}")
    opened(tmp_path, now).clear([1, 2], identity(RECORD))
    # What is not ours, and not where ours will be, stays.
    assert names(tmp_path) == sorted(mine)


def test_overwrite_spares_pictures_beside_a_name(tmp_path):
    """The folder may hold what the pictures begin from."""
    folder = opened(tmp_path, WEBP)
    write(folder, "cat")
    (tmp_path / "cat.png").write_text("a photo")
    folder.remove("cat")
    folder.remove("cat")
    assert names(tmp_path) == ["cat.png"]


def test_a_process_at_work_on_another_encoding_binds(tmp_path):
    webp, png = opened(tmp_path, WEBP), opened(tmp_path, PNG)
    with webp.claimed([1], RECORD, complete=False):
        for act in (lambda: png.check_settings(identity(RECORD)), lambda: png.clear([1], identity(RECORD))):
            with pytest.raises(UsageError, match=r"image_format|a process is making pictures of other settings here"):
                act()


def test_the_sheet_is_a_png_of_what_lies_there(tmp_path):
    folder = opened(tmp_path, WEBP)
    folder.start([1], RECORD, complete=False)
    pixels = write(folder, 1, channels=1)
    folder.finish(1, 1.0, grid=True)
    with Image.open(folder.grid) as grid:
        assert (grid.format, grid.getpixel((8, 8))) == ("PNG", (int(pixels[0, 0, 0]),) * 3)


def test_what_was_left_half_written_goes(tmp_path):
    ours = [
        ".000001.webp.0123456789ab.tmp",
        ".000001.jpg.lock",
        ".x.latent.webp.0123456789ab.tmp",
        ".a b.jpg.0123456789ab.tmp",
    ]
    others = [".photo.jpg.0123456789ab.tmp", ".000001.gif.lock", ".1.webp.lock"]
    for name in (*ours, *others):
        (tmp_path / name).write_text("x")
    assert remove_leftovers(tmp_path, {"a b"}.__contains__) == len(ours)
    assert names(tmp_path) == sorted(others)


def test_what_differs_in_both_is_named_by_its_settings(tmp_path):
    fill(tmp_path, WEBP)
    with pytest.raises(UsageError, match=r"sampling.eta = 0.0, this run has 1.0"):
        opened(tmp_path, PNG).check_settings(identity(OTHER))
