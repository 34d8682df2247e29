"""What a folder may lose, and what it must keep."""

import json

import numpy as np
import pytest
from PIL import Image
from records import OTHER, RECORD

from ddim_cli.errors import RunError, UsageError
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.sidecar import describe_picture, identity


def fill(path, seeds, record=RECORD, subdirs=False):
    folder = OutputFolder(path, subdirs)
    folder.start(seeds, record, complete=False)
    for seed in seeds:
        pixels = np.full((4, 4, 3), seed % 256, np.uint8)
        folder.write(seed, describe_picture(record, seed, pixels), pixels, 0.1, identity(record))
    return folder


def test_a_process_that_made_nothing_has_no_speed(tmp_path):
    folder = fill(tmp_path, [1, 2])
    folder.finish(0, 0.5, grid=False)
    assert folder.read_manifest()["totals"]["images_per_second"] is None


def test_overwrite_spares_what_is_not_ours(tmp_path):
    folder = fill(tmp_path, [1, 2])
    (tmp_path / "2024").mkdir()
    foreign = {
        "123456.json": "{}",
        "123456.png": "a photo",
        "2024/20240101.json": '{"a": 1}',
        "2024/20240101.png": "a photo",
        "notes.txt": "mine",
    }
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    folder.clear([1], identity(OTHER))
    for name, text in foreign.items():
        assert (tmp_path / name).read_text() == text
    # Of ours, those with other settings are gone, whether in the plan or not.
    assert not list(tmp_path.glob("00000*"))
    assert not folder.manifest.exists()


def test_settings_are_compared_with_a_sidecar_where_the_manifest_is_lost(tmp_path):
    folder = fill(tmp_path, [3, 4])
    folder.manifest.unlink()
    folder.check_settings(identity(RECORD))
    with pytest.raises(UsageError, match=r"000003.json was made with sampling.eta = 0.0, this run has 1.0"):
        folder.check_settings(identity(OTHER))
    folder.manifest.write_text("{")
    assert folder.planned() == (3, 4)
    folder.start([9], RECORD, complete=False)
    assert json.loads(folder.manifest.read_text())["seeds"] == "3-4,9"


def test_a_manifest_without_pictures_binds_nobody(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.start([1], RECORD, complete=False)
    folder.check_settings(identity(OTHER))


def test_totals_stand_only_where_all_is_there(tmp_path):
    folder = fill(tmp_path, [1, 2])
    folder.finish(2, 1.0, grid=True)
    assert json.loads(folder.manifest.read_text())["totals"]["images"] == 2
    folder.start([1, 2], RECORD, complete=True)
    assert "totals" in json.loads(folder.manifest.read_text())
    folder.start([1, 2], RECORD, complete=False)
    assert "totals" not in json.loads(folder.manifest.read_text())


def test_a_damaged_picture_is_named_with_its_remedy(tmp_path):
    folder = fill(tmp_path, [1, 2])
    size = folder.picture(2).stat().st_size
    folder.picture(2).write_bytes(b"x" * size)
    with pytest.raises(RunError, match=r"000002.png: cannot be read as a picture; delete it"):
        folder.finish(2, 1.0, grid=True)


@pytest.mark.parametrize("subdirs", [True, False])
def test_either_layout_is_found(tmp_path, subdirs):
    fill(tmp_path, [5, 1500], subdirs=subdirs)
    other = OutputFolder(tmp_path, subdirs=not subdirs)
    assert other.missing([5, 1500, 6], identity(RECORD)) == [6]
    other.finish(2, 1.0, grid=True)
    with Image.open(other.grid) as grid:
        assert grid.getpixel((10, 10)) == (5, 5, 5)


def test_another_stride_is_another_picture():
    """With diffusers' previous timestep, steps that were asked for decide too, whatever grid ran."""
    record = {**RECORD, "scheduler": {"previous_timestep": "diffusers"}}
    more = {**record, "sampling": {**record["sampling"], "steps": 3}}
    assert identity(record) != identity(more)
    assert identity(RECORD) == identity({**RECORD, "sampling": {**RECORD["sampling"], "steps": 3}})


def test_folders_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="null"):
        OutputFolder(tmp_path / "a\0b").check_usable()
    monkeypatch.setattr("os.access", lambda *args: False)
    with pytest.raises(UsageError, match="cannot be written to"):
        OutputFolder(tmp_path / "new").check_usable()
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_binds_while_a_process_is_at_work(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.start([8, 9], OTHER, complete=False)
    with folder.claimed([1], RECORD, complete=False):
        # What the run before it wanted, without a picture of it, is of no account.
        assert folder.planned() == (1,)
        for act in (lambda: folder.check_settings(identity(OTHER)), lambda: folder.start([2], OTHER, complete=False)):
            with pytest.raises(UsageError, match=r"run.json was made with sampling.eta = 0.0, this run has 1.0"):
                act()
        with pytest.raises(UsageError, match="a process is making pictures of other settings here"):
            folder.clear([1], identity(OTHER))
        folder.start([2], RECORD, complete=False)
        assert folder.planned() == (1, 2)
    folder.check_settings(identity(OTHER))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
