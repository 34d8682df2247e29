"""Processes that write tar shards are killed at random moments, again and again."""

import random
import signal
import time

import pytest

from ddim_cli.outputs.open_shard import spool_path

PLAN = ("--steps", 2, "--eta", 0.5, "--device", "cpu", "--no-compile", "--no-grid", "--format", "tar")


def tars(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "run.json"}


@pytest.mark.slow
def test_twenty_kills_of_three_processes_leave_the_bytes_of_a_run_without(start, tiny_model, tmp_path):
    """5,000 pictures in shards of 250."""
    draw = random.Random(17)

    def command(part, to):
        shards = ("--set", "output.shard_size=250", "-b", 25, "-n", 5000)
        return ("sample", "-m", tiny_model, *PLAN, *shards, "--shard", f"{part}/3", "-o", to)

    for part in range(3):
        assert start(*command(part, "whole")).wait() == 0
    killed, process = 0, {part: start(*command(part, "killed")) for part in range(3)}
    while killed < 20:
        time.sleep(draw.uniform(0.05, 0.6))
        part = draw.randrange(3)
        process[part].kill(signal.SIGKILL)
        killed += process[part].wait() == -signal.SIGKILL
        process[part] = start(*command(part, "killed"))
    assert [process[part].wait() for part in range(3)] == [0, 0, 0]
    whole = tars(tmp_path / "whole")
    assert len(whole) == 40
    assert tars(tmp_path / "killed") == whole


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_it_had_written(start, tiny_model, tmp_path):
    """And one that is interrupted neither."""
    command = ("sample", "-m", tiny_model, *PLAN, "-b", 5, "-n", 400, "--set", "output.shard_size=400", "-o", "out")
    spool = spool_path(tmp_path / "out", 0)
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start(*command)
        before = spool.stat().st_size if spool.exists() else 0
        deadline = time.monotonic() + 60
        while not (spool.exists() and spool.stat().st_size > before + 30_000) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill(number)
        assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130), process.stderr
        assert not (tmp_path / "out" / "000000.tar").exists()
    process = start(*command)
    assert process.wait() == 0
    made, there = (int(word) for word in process.stdout.split() if word.isdecimal())
    assert made + there == 400
    assert there > 10
