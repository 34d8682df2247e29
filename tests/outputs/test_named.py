"""The one rule for files that a user names."""

import errno
import os
import threading
from pathlib import Path

import pytest

from ddim_cli.errors import RunError, UsageError
from ddim_cli.outputs.named import Kind, name_file

KIND = Kind.of_text("page", b"<made by us>")
OURS, THEIRS = b"<made by us> 1", b"notes of mine"


def test_a_new_file_and_one_of_ours(tmp_path):
    path = tmp_path / "a"
    name_file(path, KIND).write(OURS)
    name_file(path, KIND).write(OURS + b"2")
    assert path.read_bytes() == OURS + b"2"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_of_another_is_kept(tmp_path):
    path = tmp_path / "notes.txt"
    for content in (THEIRS, b""):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"--plot .*notes.txt: is there, and is no page; name another file, or re"):
            name_file(path, KIND, "--plot")
        assert path.read_bytes() == content
    name_file(path, KIND, overwrite=True).write(OURS)
    assert path.read_bytes() == OURS


def test_what_comes_while_the_work_is_done_is_kept_too(tmp_path):
    named = name_file(tmp_path / "a", KIND)
    (tmp_path / "a").write_bytes(THEIRS)
    with pytest.raises(UsageError, match="is there"):
        named.write(OURS)
    assert (tmp_path / "a").read_bytes() == THEIRS


def test_a_kind_that_cannot_be_told_is_never_ours(tmp_path):
    name_file(tmp_path / "run.toml", None).write(b"x")
    with pytest.raises(UsageError, match=r"run.toml: is there already"):
        name_file(tmp_path / "run.toml", None)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there" / "a", tmp_path / "link", tmp_path / "dangling"
    target.write_bytes(OURS)
    link.symlink_to("there/a")
    dangling.symlink_to("there/b")
    for name in (link, dangling):
        name_file(name, KIND).write(OURS + b"2")
        assert name.is_symlink()
        assert name.resolve().parent == (tmp_path / "there").resolve()
        assert name.read_bytes() == OURS + b"2"
    assert sorted(os.listdir(tmp_path / "there")) == ["a", "b"]
    target.write_bytes(THEIRS)
    with pytest.raises(UsageError, match="link: is there, and is no page"):
        name_file(link, KIND)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UsageError, match="loop: cannot be written"):
        name_file(loop, KIND)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs there")
def test_a_fifo_is_written_to(tmp_path):
    path, read = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    name_file(path, KIND).write(OURS)
    reader.join(10)
    assert read == [OURS]
    assert path.is_fifo()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device there")
def test_a_device_stays_one(tmp_path):
    with pytest.raises(RunError, match=r"^--plot /dev/full: cannot be written: No space left on device$"):
        name_file(Path("/dev/full"), KIND, "--plot").write(OURS)
    name_file(Path("/dev/null"), KIND).write(OURS)
    for device in ("/dev/full", "/dev/null"):
        assert Path(device).is_char_device()


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no such folder there")
def test_an_open_file_goes_on_where_it_is(tmp_path):
    """As /dev/stdout that was sent to a file, with something in it already."""
    with (tmp_path / "out").open("wb", buffering=0) as stream:
        stream.write(b"before ")
        name_file(Path(f"/dev/fd/{stream.fileno()}"), KIND).write(OURS)
        stream.write(b" after")
    assert (tmp_path / "out").read_bytes() == b"before " + OURS + b" after"
    with pytest.raises(UsageError, match="Bad file descriptor"):
        name_file(Path("/dev/fd/987"), KIND)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_can_be_no_file(tmp_path, overwrite):
    (tmp_path / "notes.txt").write_bytes(THEIRS)
    for path, says in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "none" / "a", "there is no folder .*none$"),
        (tmp_path / "notes.txt" / "a", "there is no folder .*notes.txt$"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(UsageError, match=says):
            name_file(path, KIND, overwrite=overwrite)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_bytes(OURS)
    monkeypatch.setattr(os, "fsync", full)
    for name in "ab":
        with pytest.raises(RunError, match=f"{name}: cannot be written: No space left on device"):
            name_file(tmp_path / name, KIND).write(OURS + b"2", fsync=True)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == OURS
