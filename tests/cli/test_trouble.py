"""When things go wrong: full disks, signals, wrong options. What is finished stays whole, and JSON stays JSON."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ddim_cli.outputs import store

ROOT = Path(__file__).parents[2]


def whole(folder: Path) -> int:
    """How many pairs there are; every file of them is whole."""
    for path in folder.glob("[0-9]*.png"):
        with Image.open(path) as image:
            image.load()
    for path in folder.glob("[0-9]*.json"):
        assert json.loads(path.read_text())["image"]["bytes"] == path.with_suffix(".png").stat().st_size
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    return len(list(folder.glob("[0-9]*.json")))


@pytest.fixture
def command(tiny_model):
    return ("sample", "-m", tiny_model, "--steps", 4, "-n", 60, "-b", 2, "-o", "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_write_error_ends_the_run_at_once(ddim, command, tmp_path, monkeypatch, code):
    """From the fifth picture on, the disk takes nothing; the run stops far before its last batch."""
    from ddim_cli.cli.progress import RunProgress

    write, steps = store.write_atomically, []

    def fail(path, data, fsync=False):
        if path.suffix == ".png" and int(path.stem) >= 5:
            raise OSError(code, os.strerror(code), str(path))
        write(path, data, fsync)

    with monkeypatch.context() as broken:
        broken.setattr(store, "write_atomically", fail)
        broken.setattr(RunProgress, "step", lambda self, done: steps.append(done))
        result = ddim(*command, "--json")
    assert result.exit_code == 1
    assert f"cannot be written: {os.strerror(code)}" in result.stderr
    assert "error: out/0000" in result.stderr
    assert result.stderr.count("error: ") == 1
    assert json.loads(result.stdout)["exit_code"] == 1
    # Of thirty batches of four steps.
    assert len(steps) <= 6 * 4
    assert 4 <= whole(tmp_path / "out") <= 6
    assert ddim(*command).exit_code == 0
    assert whole(tmp_path / "out") == 60


def test_a_long_batch_does_not_delay_the_error(ddim, tiny_model, monkeypatch):
    """The first batch cannot be written; the second, of 400 steps, is left after a few."""
    from ddim_cli.cli.progress import RunProgress

    def fail(path, data, fsync=False):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    steps = []
    monkeypatch.setattr(store, "write_atomically", fail)
    monkeypatch.setattr(RunProgress, "step", lambda self, done: steps.append(done))
    assert ddim("sample", "-m", tiny_model, "--steps", 400, "-n", 2, "-b", 1, "-o", "out").exit_code == 1
    assert 400 <= len(steps) < 700


def test_a_limit_that_the_system_sets(start, tiny_model, tmp_path):
    """RLIMIT_FSIZE: the kernel itself refuses to let a file grow, as a full disk or a quota does."""
    process = start(
        *("sample", "-m", tiny_model, "--image-size", 128, "--steps", 2, "-n", 2, "-b", 1, "-o", "out"),
        before="import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))",
    )
    assert process.wait() == 1
    assert ".png: cannot be written: File too large" in process.stderr
    assert whole(tmp_path / "out") == 0


def test_a_full_tmpfs(start, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", out], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        process = start(*command, "--json")
        assert process.wait() == 1
        assert "No space left on device" in process.stderr
        assert "out/0000" in process.stderr
        assert json.loads(process.stdout)["exit_code"] == 1
        before = {p.name: p.read_bytes() for p in out.glob("[0-9]*.png")}
        assert 5 < whole(out) < 60
        subprocess.run(["mount", "-o", "remount,size=2m", out], check=True)
        assert start(*command).wait() == 0
        assert whole(out) == 60
        assert all((out / name).read_bytes() == content for name, content in before.items())
        # And one that turns read-only while it is written to.
        subprocess.run(["mount", "-o", "remount,size=40m", out], check=True)
        process = start(*command, "-n", 3000)
        until(out / "000070.json", process)
        # Refused for as long as a file is open.
        while subprocess.run(["mount", "-o", "remount,ro", out], capture_output=True, check=False).returncode:
            time.sleep(0.01)
        assert process.wait() == 1
        assert "Read-only file system" in process.stderr
    finally:
        subprocess.run(["umount", "-l", out], check=True)


def until(there: Path, process, kind="json") -> None:
    deadline = time.monotonic() + 60
    while not there.exists():
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_finishes_what_is_being_written(start, command, tmp_path, number):
    process = start(*command, "-n", 2000, "--json")
    until(tmp_path / "out" / "000003.json", process)
    process.kill(number)
    assert process.wait() == 130
    made = whole(tmp_path / "out")
    assert 4 <= made < 2000
    found = json.loads(process.stdout)
    assert found["exit_code"] == 130
    assert f"interrupted: {made} of 2000 images were made" in found["error"]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["typer", "ddim_cli.cli.sample", "ddim_cli.config.layers", "torch"])
def test_a_signal_while_all_is_loaded_is_answered_too(module, number, tmp_path):
    """As from a scheduler that ends a job in its first moments."""
    code = f"""
import os, runpy, signal, sys

class Sender:
    def find_spec(self, name, *others):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Sender())
sys.argv = ["ddim", "sample", "--json", "-n", "1", "-o", "out"]
runpy.run_module("ddim_cli", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 130, done.stderr
    assert json.loads(done.stdout) == {"error": "interrupted", "exit_code": 130}
    assert done.stderr == "interrupted\n"
    assert not (tmp_path / "out").exists()


def test_a_second_ctrl_c_ends_it_at_once(start, tiny_model, tmp_path):
    """The writers hang, as on a disk that is gone: the first Ctrl-C waits for them, the second does not."""
    process = start(
        *("sample", "-m", tiny_model, "--steps", 2, "-n", 500, "-b", 2, "-o", "out", "--json"),
        before="import time, ddim_cli.outputs.store as s\n"
        "s.write_atomically = lambda *a: (open('hangs', 'w').close(), time.sleep(600))",
    )
    until(tmp_path / "hangs", process)
    process.kill(signal.SIGINT)
    deadline = time.monotonic() + 60
    while "writing what is finished" not in process.stderr:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A SIGTERM on top changes nothing: schedulers send several signals.
    process.kill(signal.SIGTERM)
    time.sleep(0.5)
    assert process.stdout == ""
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert json.loads(process.stdout)["exit_code"] == 130


@pytest.mark.parametrize(
    "args",
    [
        ["sample", "--steps", "x"],
        ["sample", "--no-such-option"],
        ["sample", "--steps"],
        ["sampel"],
        ["config", "check"],
        ["config", "shwo"],
        ["verify"],
        ["compare", "a"],
        ["replay"],
        ["sample", "-c", "none.toml"],
        ["sample", "--npz", "none/all.npz"],
        ["sample", "--npz", "."],
        ["sample", "--log-file", "."],
        ["sample", "--shard", "x"],
        ["verify", "none"],
    ],
    ids=" ".join,
)
def test_whatever_is_refused_is_refused_in_json(ddim, args):
    result = ddim(*args, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["exit_code"] == 2
    assert found["error"]
    assert result.stderr
    assert ddim(*args).stdout == ""


def test_a_name_that_is_no_text_is_valid_json(start):
    process = start("verify", os.fsdecode(b"caf\xe9"), "--json")
    assert process.wait() == 2
    assert json.loads(process.stdout)["error"].startswith(os.fsdecode(b"caf\xe9"))


def test_the_log_file_is_a_plain_copy(ddim, tiny_model, tmp_path):
    command = ("sample", "-m", tiny_model, "--steps", 3, "-n", 2, "-o", "out", "--log-file", "run.log")
    result = ddim(*command)
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line for line in result.stderr.splitlines() if line not in lines] == []
    assert "images: 2 images" in lines
    assert lines[0].startswith("warning: the grid starts at")
    # A second run appends, and an error is in it too.
    assert ddim(*command, "--eta", 0.5).exit_code == 2
    later = (tmp_path / "run.log").read_text().splitlines()
    assert later[: len(lines)] == lines
    assert "error: " in later[-1]
    assert "\x1b" not in "".join(later)


def test_the_log_file_has_what_is_refused(ddim, tmp_path):
    """The arguments themselves, the settings, and a model: each is in the log, one after the other."""
    wrong = (["--steps", "x"], ["--no-such"], ["--steps", 0], ["-m", "nothing/of/this"])
    for number, args in enumerate(wrong, start=1):
        result = ddim("sample", *args, "--log-file=run.log" if number % 2 else "--log-file", *["run.log"][number % 2 :])
        assert result.exit_code == 2
        lines = (tmp_path / "run.log").read_text().splitlines()
        assert len(lines) == number
        assert lines[-1].startswith("error: ")
        assert lines[-1].removeprefix("error: ") in result.stderr
    # No file where the option is none of the command's, or no name follows.
    for args in (["env", "--log-file", "other.log"], ["sample", "--log-file"], ["sample", "--", "--log-file", "o.log"]):
        assert ddim(*args).exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.log"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device there")
def test_a_log_file_on_a_full_disk_is_told_once(ddim, tiny_model, tmp_path):
    result = ddim("sample", "-m", tiny_model, "--steps", 1, "-n", 2, "-o", "out", "--log-file", "/dev/full")
    assert result.exit_code == 0
    assert result.stderr.count("warning: --log-file /dev/full: cannot be written: No space left on device; ") == 1
    assert whole(tmp_path / "out") == 2


def test_an_array_of_a_finished_folder_and_of_shards(ddim, tiny_model, tmp_path):
    import numpy as np

    command = ("sample", "-m", tiny_model, "--steps", 3, "--seeds", "9,2,5", "-o", "out", "--npz", "all.npz", "--json")
    first = json.loads(ddim(*command, "--shard", "0/2").stdout)
    assert first["npz"] is None
    assert not (tmp_path / "all.npz").exists()
    assert json.loads(ddim(*command, "--shard", "1/2").stdout)["npz"] == "all.npz"
    found = np.load(tmp_path / "all.npz")["arr_0"]
    expected = [np.asarray(Image.open(tmp_path / "out" / f"{s:06d}.png")) for s in (2, 5, 9)]
    assert np.array_equal(found, np.stack(expected))
    (tmp_path / "all.npz").unlink()
    # The folder has more by now; the array is of the seeds asked for.
    assert ddim("sample", "-m", tiny_model, "--steps", 3, "-n", 12, "-o", "out").exit_code == 0
    assert json.loads(ddim(*command).stdout)["npz"] == "all.npz"
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], found)
