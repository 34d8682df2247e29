"""What processes that share a folder may do to each other's files."""

import contextlib
import json
import os
import threading
import time

import pytest

from ddim_cli.outputs import atomic
from ddim_cli.outputs.atomic import atomic_file, locked, remove_leftovers, write_atomically
from ddim_cli.outputs.folder import OutputFolder

TEMPORARY = ".000012.png.0123456789ab.tmp"
RECORD = {"sampling": {"timesteps": [0]}, "scheduler": {}, "model": {}, "runtime": {}, "config": {}}


def test_leftovers_go_and_nothing_else(tmp_path):
    ours = [TEMPORARY, ".000012.json.ba9876543210.tmp", ".run.json.0123456789ab.tmp", ".000012.png.lock"]
    ours += [f".{name}.0123456789ab.tmp" for name in ("frame_007.png", "000012.x0.gif", "000012.xt.png", "strip.png")]
    ours += [".frame_007.json.lock"]
    foreign = [".notes.tmp", ".000012.png.tmp", ".gitignore", "000012.png", ".x.png.0123456789ab.tmp", ".yarn.lock"]
    for name in [*ours, *foreign]:
        (tmp_path / name).write_bytes(b"x")
    assert remove_leftovers(tmp_path) == len(ours)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(foreign)
    assert remove_leftovers(tmp_path / "none") == 0


def test_what_is_being_written_is_no_leftover(tmp_path):
    with atomic_file(tmp_path / "000001.png") as stream, locked(tmp_path / "000002.png"):
        stream.write(b"half")
        assert remove_leftovers(tmp_path) == 0
        assert len(list(tmp_path.iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["000001.png"]


@pytest.mark.parametrize(("age", "removed"), [(0, 0), (7200, 1)])
def test_without_locks_age_decides(tmp_path, monkeypatch, age, removed):
    monkeypatch.setattr(atomic, "fcntl", None)
    (tmp_path / TEMPORARY).write_bytes(b"x")
    os.utime(tmp_path / TEMPORARY, (time.time() - age,) * 2)
    assert remove_leftovers(tmp_path) == removed
    with locked(tmp_path / "000001.png"):
        write_atomically(tmp_path / "000001.png", b"x")
    assert (tmp_path / "000001.png").read_bytes() == b"x"


def test_a_file_taken_for_a_leftover_by_another_machine_is_written_again(tmp_path, monkeypatch):
    replace, taken = os.replace, []

    def take(source, target):
        if not taken:
            taken.append(source)
            os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", take)
    write_atomically(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert taken


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    path, inside, most = tmp_path / "run.json", [], []

    def work():
        for _ in range(30):
            with locked(path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_locked_file_becomes_what_it_guards(tmp_path, monkeypatch):
    path, hidden = tmp_path / "000001.json", tmp_path / ".000001.json.lock"
    # Left over from a process that was killed while it wrote.
    hidden.write_bytes(b"a long text, half written")
    with locked(path) as held:
        held.write(b"short", fsync=True)
        assert not hidden.exists()
        # Whoever comes now holds another file.
        hidden.write_bytes(b"another's")
    assert path.read_bytes() == b"short"
    assert hidden.read_bytes() == b"another's"
    hidden.unlink()
    monkeypatch.setattr(atomic.fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(95, "not supported")))
    with locked(path) as held:
        held.write(b"without locks")
    assert path.read_bytes() == b"without locks"
    assert [p.name for p in tmp_path.iterdir()] == ["000001.json"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), atomic_file(tmp_path / "a") as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_file_that_was_meant(tmp_path):
    for act in (lambda p: write_atomically(p, b""), lambda p: locked(p).__enter__()):
        with pytest.raises(FileNotFoundError) as found:
            act(tmp_path / "none" / "000001.png")
        assert found.value.filename == str(tmp_path / "none" / "000001.png")


def test_fsync_reaches_file_and_folder(tmp_path, monkeypatch):
    import stat

    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    write_atomically(tmp_path / "a", b"x")
    assert synced == []
    write_atomically(tmp_path / "a", b"x", fsync=True)
    assert synced == [False, True]


def test_two_who_extend_a_plan_at_once_lose_no_seed(tmp_path, monkeypatch):
    """The second reads run.json while the first has read it and not yet written."""
    folder, read = OutputFolder(tmp_path), OutputFolder.read_manifest

    def slow(self):
        found = read(self)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(OutputFolder, "read_manifest", slow)
    threads = [threading.Thread(target=folder.start, args=([10 * i, 10 * i + 1], RECORD, False)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(folder.manifest.read_text())["seeds"] == "0-1,10-11,20-21,30-31,40-41"


def test_a_plan_that_grew_meanwhile_is_not_finished(tmp_path):
    folder = OutputFolder(tmp_path)
    folder.start([1, 2], RECORD, complete=False)
    folder.start([3], RECORD, complete=False)
    folder.finish(2, 1.0, grid=False, seeds=[1, 2])
    assert "totals" not in json.loads(folder.manifest.read_text())
    folder.finish(2, 1.0, grid=False, seeds=[1, 2, 3])
    assert json.loads(folder.manifest.read_text())["totals"]["images"] == 3


def test_a_pair_is_of_one_process(tmp_path, monkeypatch):
    """Two processes make the same seeds in batches of other sizes, and pause between a PNG and its sidecar."""
    import numpy as np

    from ddim_cli.evaluation.verify import verify
    from ddim_cli.outputs import store
    from ddim_cli.outputs.sidecar import describe_picture, identity
    from ddim_cli.outputs.writer import BackgroundWriter

    def slow(path, data, fsync=False):
        write_atomically(path, data, fsync)
        time.sleep(0.005)

    monkeypatch.setattr(store, "write_atomically", slow)
    records = [{**RECORD, "runtime": {"batch_size": size}} for size in (1, 7)]
    folder = OutputFolder(tmp_path)
    folder.start(range(20), RECORD, complete=False)
    with BackgroundWriter(tmp_path) as writer:
        for seed in range(20):
            for i, record in enumerate(records):
                pixels = np.full((2, 2, 3), seed + i, np.uint8)
                described = describe_picture(record, seed, pixels)
                writer.submit(folder.write, seed, described, pixels, 0.1, identity(RECORD))
    assert verify(tmp_path)[:2] == (20, ())
