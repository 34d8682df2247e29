"""``ddim sample --items - --jsonl`` from outside: a program that drives it, kills it, or goes away."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [{"name": f"n{i}", "seed": 100 + i} for i in range(12)]


def text(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def answers(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def hashes(folder):
    found = (json.loads(p.read_text()) for p in folder.glob("*.json") if not p.name.startswith((".", "run")))
    return {sidecar["image"]["file"]: sidecar["image"]["pixels_sha256"] for sidecar in found}


@pytest.fixture
def command(tiny_model):
    return ("sample", "--items", "-", "--jsonl", "-m", tiny_model, "--steps", 4, "-b", 3, "--no-compile", "-o", "out")


@pytest.fixture
def serve(start, command):
    """Start it with pipes; the process, and our ends of them."""

    def begin(*more, **options):
        process = start(*command, *more, piped=True, **options)
        return process, *process.pipes()

    return begin


@pytest.fixture
def feed(ddim, command):
    """Give it rows, and wait for its end; the result as `ddim` has it."""
    return lambda rows, *more: ddim(*command, *more, stdin=text(rows))


def check(ddim, images):
    found = ddim("verify", "out")
    assert found.stdout == f"{images} image{'s' if images != 1 else ''}: all is well\n"


@pytest.mark.slow
def test_a_driver_in_lock_step(serve, ddim):
    """Each answer comes while the input is open, though the batch is not full and the driver says no more."""
    process, to, answered = serve()
    for number, row in enumerate([*ROWS[:5], {"colour": 1, "id": "x"}, *ROWS[5:7]]):
        to.write(text([row]))
        to.flush()
        answer = json.loads(answered.readline())
        assert answer["row"] == number
        if "error" in answer:
            assert (answer["id"], answer["error"]) == ("x", 'unknown key "colour"')
        else:
            assert (answer["name"], answer["present"]) == (row["name"], False)
    to.close()
    assert (answered.read(), process.wait()) == (b"", 1)
    assert "tiny: ready for the rows of stdin, in batches of 3, 4 steps each, on cpu" in process.stderr
    assert "8 rows: 7 images made in " in process.stderr
    assert process.stderr.endswith("error: 1 row was answered with an error\n")
    check(ddim, 7)


def test_twenty_rows_with_a_bad_one(feed, ddim, tmp_path):
    rows = [{"name": f"n{i}"} for i in range(20)]
    rows[11]["seed"] = -1
    result = feed(rows)
    assert (result.exit_code, len(answers(result.stdout))) == (1, 20)
    bad = [answer for answer in answers(result.stdout) if "error" in answer]
    assert bad == [{"row": 11, "name": "n11", "error": f"seed = -1 is not from 0 to {2**63 - 1}"}]
    assert all(Path(answer["file"]).exists() for answer in answers(result.stdout) if "file" in answer)
    check(ddim, 19)
    rows[11]["seed"] = 1
    again = feed(rows)
    assert (again.exit_code, sum(answer["present"] for answer in answers(again.stdout))) == (0, 19)
    assert "20 rows: 1 image made in" in again.stderr
    assert "19 there already; out/grid.png" in again.stderr
    check(ddim, 20)


# Where it kills itself: as a batch has been planned and no picture is there, between a picture and its sidecar, in the
# middle of a line of items.jsonl, and between run.json and items.jsonl.
KILLS = {
    "before a picture": "store.encoded = lambda *args, **more: kill()",
    "before a sidecar": "store.complete = lambda *args: kill()",
    "in a line": "open_plan.append = lambda path, data, fsync: append(path, data[:-9], fsync) or kill()",
    "before the lines": "open_plan.append = lambda path, data, fsync: kill()",
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_and_fed_again(start, serve, feed, ddim, tmp_path, moment):
    """In the second batch: the folder is sound, and the same rows make what is missing."""
    process, to, answered = serve(
        before="import os, signal\nfrom ddim_cli.outputs import atomic, open_plan, store\n"
        "append, count, add = atomic.append, [], open_plan.OpenPlan.add\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "def second(self, lines):\n"
        "    count.append(1)\n"
        "    if len(count) == 2:\n"
        f"        {KILLS[moment]}\n"
        "    add(self, lines)\n"
        "open_plan.OpenPlan.add = second\n"
    )
    to.write(text(ROWS[:3]))
    to.flush()
    told = [json.loads(answered.readline()) for _ in range(3)]
    to.write(text(ROWS[3:]))
    to.close()
    told += answers(answered.read())
    assert process.wait() == -signal.SIGKILL
    assert len(told) == 3
    check(ddim, 3)
    result = feed(ROWS)
    assert (result.exit_code, sum(answer["present"] for answer in answers(result.stdout))) == (0, 3)
    check(ddim, len(ROWS))
    assert len((tmp_path / "out" / "items.jsonl").read_bytes().splitlines()) == len(ROWS)
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []
    assert "open" not in json.loads((tmp_path / "out" / "run.json").read_text())
    # None is another than it would have been.
    assert feed(ROWS, "-o", "whole").exit_code == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_moments(serve, feed, ddim, tmp_path):
    moments, rows = random.Random(0), [{"name": f"n{i}"} for i in range(60)]
    for _ in range(12):
        process, to, answered = serve("--steps", 10)
        to.write(text(rows))
        to.flush()
        answered.readline()
        time.sleep(moments.uniform(0, 0.4))
        process.kill(signal.SIGKILL)
        process.wait()
        to.close()
        answered.close()
        found = ddim("verify", "out")
        assert found.stdout.endswith(": all is well\n"), found.stdout
    assert feed(rows, "--steps", 10).exit_code == 0
    check(ddim, 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [True, False])
def test_a_signal_ends_it_in_good_order(serve, ddim, number, busy):
    """While it samples, and while it waits for a driver that says nothing."""
    process, to, answered = serve(*(("--steps", 100) if busy else ()))
    to.write(text(ROWS))
    to.flush()
    told = [json.loads(answered.readline()) for _ in range(4 if busy else len(ROWS))]
    process.kill(number)
    told += answers(answered.read())
    assert process.wait() == 130
    to.close()
    assert f"interrupted: {len(told)} images were made and are in out" in process.stderr
    assert "Traceback" not in process.stderr
    check(ddim, len(told))


@pytest.mark.parametrize("still_writes", [True, False])
def test_a_reader_that_goes_away_ends_it(serve, ddim, still_writes):
    """Quietly, and what was finished is on disk."""
    process, to, answered = serve()
    to.write(text(ROWS[:3]))
    to.flush()
    answered.readline()
    answered.close()
    if still_writes:
        to.write(text(ROWS[3:9]))
        to.flush()
        assert process.wait() == 1
        to.close()
    else:
        to.close()
        process.wait()
    lines = process.stderr.splitlines()
    assert [line for line in lines if "error" in line.lower() or "Traceback" in line] == []
    found = ddim("verify", "out")
    assert found.stdout.endswith(": all is well\n"), found.stdout


def test_rows_of_a_file(ddim, command, tmp_path, monkeypatch):
    """Its paths lead from where it lies, and the folder is named after it; a row that is wrong ends nothing."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "jobs").mkdir()
    save_file({"latent": torch.zeros(3, 8, 8)}, tmp_path / "jobs" / "l.safetensors")
    (tmp_path / "jobs" / "mine.jsonl").write_bytes(text([{"latent": "l.safetensors", "id": 1}, {"x": 1}]))
    words = [word if word != "-" else "jobs/mine.jsonl" for word in command[:-2]]
    result = ddim(*words)
    assert result.exit_code == 1
    [bad, made] = sorted(answers(result.stdout), key=lambda answer: "file" in answer)
    assert (bad["row"], made["id"]) == (1, 1)
    assert Path(made["file"]).parent.name.endswith("-mine")
    (tmp_path / "jobs" / "mine.csv").write_text("name\na\n")
    for name, told in (("mine.csv", "takes rows as JSONL"), ("none.jsonl", "cannot be read: No such file")):
        refused = ddim(*[word if word != "-" else f"jobs/{name}" for word in command])
        assert (refused.exit_code, told in refused.stderr) == (2, True)


def test_a_named_pipe(start, command, tmp_path):
    os.mkfifo(tmp_path / "rows")
    process = start(*[word if word != "-" else "rows" for word in command])
    with (tmp_path / "rows").open("wb") as to:
        to.write(text(ROWS[:2]))
    assert process.wait() == 0
    assert sorted(answer["name"] for answer in answers(process.stdout)) == ["n0", "n1"]


REFUSED = {
    "without rows": (("sample", "--jsonl"), "--jsonl answers rows; say with --items where they come from"),
    "two on stdout": (("--json",), "--json and --jsonl both want stdout; give one"),
    "pictures on stdout": (("--show",), "--show has no place beside --jsonl: it wants stdout"),
    "an array": (("--npz", "a.npz"), "--npz has no place beside --jsonl: it collects a plan"),
    "a part": (("--shard", "0/2"), "--shard has no place beside --jsonl: it is a part of a plan"),
    "a plan": (("--dry-run",), "--dry-run has no place beside --jsonl: it shows a plan"),
    "latents": (("--latents", "a.safetensors"), "--items says which images there are, and so does --latents"),
    "seeds": (("--seeds", "1-3"), "--seeds says which images there are, and so does --items"),
    "a negative time": (("--max-wait", "-1"), "--max-wait -1: is not from 0 to 3600 seconds"),
    "no time": (("--max-wait", "nan"), "--max-wait nan: is not from 0 to 3600 seconds"),
    "a time without rows that come": (("sample", "--max-wait", "1"), "--max-wait is for --jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(ddim, command, tmp_path, case):
    words, told = REFUSED[case]
    result = ddim(*(words if words[0] == "sample" else (*command, *words)))
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr
    assert result.stdout == "" or "--json" in words
    assert not (tmp_path / "out").exists()


def test_under_torchrun_it_is_refused(ddim, command, monkeypatch):
    for variable, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    result = ddim(*command)
    assert (result.exit_code, "the ranks of torchrun would each read a part" in result.stderr) == (2, True)


def test_a_folder_of_other_settings_is_refused_before_a_row_is_read(feed):
    assert feed(ROWS[:1]).exit_code == 0
    result = feed([{"nonsense": 1}], "--eta", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "run.json was made with sampling.eta = 0.0, this run has 1.0" in result.stderr


@pytest.mark.parametrize("wait", [0, 3600])
def test_how_long_rows_wait(feed, ddim, wait):
    """No longer than the input lasts."""
    result = feed(ROWS, "--max-wait", wait, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert {answer["name"] for answer in answers(result.stdout)} == {row["name"] for row in ROWS}
    check(ddim, len(ROWS))


@pytest.mark.slow
def test_from_a_shell(tmp_path):
    """A process of its own, whose input stays open while it is ended, and while its reader goes."""
    ddim = [sys.executable, "-m", "ddim_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = (
        """printf '%s\\n' '{"name": "first", "seed": 7}' '{"seed": 8, "id": 1}' """
        f"| {' '.join(ddim)} sample --items - --jsonl --steps 2 -o piped"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, sorted(answer["file"] for answer in answers(done.stdout))) == (
        0,
        ["piped/000001.png", "piped/first.png"],
    )
    for number in (signal.SIGTERM, None):
        process = subprocess.Popen(
            [*ddim, "sample", "--items", "-", "--jsonl", "--steps", "2", "-o", "piped", "--max-wait", "0"],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdin.write(b'{"name": "first", "seed": 7}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["present"] is True
        if number is not None:
            process.send_signal(number)
        else:
            process.stdout.close()
            process.stdin.write(b'{"seed": 1}\n{"seed": 2}\n')
            process.stdin.flush()
        assert process.wait(60) == (130 if number else 1)
        said = process.stderr.read().decode()
        assert ("Traceback" in said, "Error" in said, "error" in said) == (False, False, False), said
        process.stdin.close()
