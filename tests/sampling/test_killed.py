"""A job can be killed at any moment, spread in any way, and resumed: not one image is lost, doubled or different."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SEEDS = 96
STEPS = 4


def hashes(folder: Path) -> dict[int, str]:
    return {
        s["seed"]: s["image"]["pixels_sha256"] for s in (json.loads(p.read_text()) for p in folder.glob("[0-9]*.json"))
    }


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("[0-9]*.png")}


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed(start, ddim, tiny_model, tmp_path, kills):
    """SIGKILL leaves no chance to tidy up."""
    command = ("sample", "-m", tiny_model, "--steps", 20, "-n", 60, "-b", 6)
    began = time.monotonic()
    assert start(*command, "-o", "whole").wait() == 0
    seconds = time.monotonic() - began
    whole = hashes(tmp_path / "whole")
    assert len(whole) == 60
    moments, killed = random.Random(0), 0
    out = tmp_path / "out"
    for _ in range(200):
        process = start(*command, "-o", "out")
        # Early and late, and more often while files are being written than before the first.
        time.sleep(moments.uniform(0, seconds / 4))
        process.kill(signal.SIGKILL)
        code = process.wait()
        killed += code == -signal.SIGKILL
        if killed >= kills and len(hashes(out)) > 15:
            break
        if len(hashes(out)) == 60:
            for path in out.glob("0*.json"):
                path.unlink()
    assert killed >= kills
    # What a kill within a write leaves, so that there is some for certain.
    (out / ".000003.png.0123456789ab.tmp").write_bytes(b"half")
    (out / ".000003.png.lock").write_bytes(b"")
    assert start(*command, "-o", "out").wait() == 0
    assert hashes(out) == whole
    assert hidden(out) == []
    result = ddim("verify", "out", "--json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["images"] == 60
    assert json.loads((out / "run.json").read_text())["totals"]["images"] == 60


def test_a_resume_may_have_another_batch_size_and_device_name(ddim, tiny_model, tmp_path):
    command = ("sample", "-m", tiny_model, "--steps", STEPS, "-o", "out")
    assert ddim(*command, "-n", 5, "-b", 2).exit_code == 0
    for path in [tmp_path / "out" / "run.json", *(tmp_path / "out").glob("0*.json")]:
        record = json.loads(path.read_text())
        record["runtime"] |= {"device": "cuda:3", "device_name": "another", "threads": 77, "versions": {}}
        path.write_text(json.dumps(record))
    summary = json.loads(ddim(*command, "-n", 7, "-b", 3, "--json").stdout)
    assert (summary["made"], summary["present"]) == (2, 5)
    # What would change the pictures may not.
    assert ddim(*command, "-n", 7, "--dtype", "bfloat16").exit_code == 2
    assert ddim(*command, "-n", 7, "--spacing", "trailing").exit_code == 2


@pytest.fixture(scope="module")
def reference(fork_server, tiny_model, tmp_path_factory) -> Path:
    """The 96 seeds as one process, in batches of 32."""
    folder = tmp_path_factory.mktemp("reference")
    assert fork_server.start(*common(tiny_model), "-b", 32, "-o", "out", cwd=folder).wait() == 0
    return folder / "out"


def common(tiny_model) -> tuple:
    return ("sample", "-m", tiny_model, "--steps", STEPS, "-n", SEEDS, "--eta", 0.5)


def same(reference: Path, out: Path, equal_hashes: bool) -> None:
    one, other = pictures(reference), pictures(out)
    assert one.keys() == other.keys()
    assert len(one) == SEEDS
    assert max(abs(one[name] - other[name]).max() for name in one) <= 1
    assert {p.name for p in reference.iterdir()} == {p.name for p in out.iterdir()}
    assert json.loads((out / "run.json").read_text())["totals"]["images"] == SEEDS
    if equal_hashes:
        assert hashes(reference) == hashes(out)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_of_another_size(start, reference, tiny_model, tmp_path, batch_size):
    assert start(*common(tiny_model), "-b", batch_size, "-o", "out").wait() == 0
    same(reference, tmp_path / "out", equal_hashes=False)


def test_as_three_shards_at_once(start, reference, tiny_model, tmp_path):
    shards = [start(*common(tiny_model), "-b", 32, "-o", "out", "--shard", f"{i}/3") for i in range(3)]
    assert [shard.wait() for shard in shards] == [0, 0, 0]
    same(reference, tmp_path / "out", equal_hashes=True)


def test_after_a_resume_with_another_batch_size(start, reference, tiny_model, tmp_path):
    process = start(*common(tiny_model), "-b", 32, "-o", "out", "--shard", "0/2")
    assert process.wait() == 0
    assert start(*common(tiny_model), "-b", 7, "-o", "out").wait() == 0
    same(reference, tmp_path / "out", equal_hashes=False)


@pytest.mark.slow
def test_under_torchrun(reference, tiny_model, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "ddim_cli"]
    command += map(str, (*common(tiny_model), "-b", 32, "-o", "out", "--json", "--npz", "all.npz"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    same(reference, tmp_path / "out", equal_hashes=True)
    # One rank speaks, of its own share, and of what is left of all.
    summary = json.loads(done.stdout)
    assert (summary["made"], summary["left"]) == (SEEDS // 2, 0)
    assert f"all ranks: {SEEDS} of {SEEDS} images are there" in done.stderr
    assert done.stderr.count("tiny: ") == 1
    found = np.load(tmp_path / "all.npz")["arr_0"]
    expected = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "out").glob("0*.png"))]
    assert np.array_equal(found, np.stack(expected))


def ranks(start, *args, size=2):
    """The ranks of a job as torchrun starts them."""
    return [
        start(*args, TORCHELASTIC_RUN_ID="x", RANK=str(i), WORLD_SIZE=str(size), LOCAL_RANK=str(i)) for i in range(size)
    ]


def test_ranks_share_the_plan_and_one_speaks(start, tiny_model, tmp_path):
    found = ranks(start, "sample", "-m", tiny_model, "--steps", STEPS, "-n", 7, "-b", 2, "-o", "out")
    assert [rank.wait() for rank in found] == [0, 0]
    assert len(hashes(tmp_path / "out")) == 7
    assert "7 images on 2 ranks" in found[0].stderr
    assert "images: 4 images" in found[0].stdout
    assert (found[1].stdout, found[1].stderr) == ("", "")
    # A stray RANK is nobody's.
    alone = start("sample", "-m", tiny_model, "--steps", STEPS, "-n", 7, "-o", "alone", RANK="1", WORLD_SIZE="2")
    assert alone.wait() == 0
    assert len(hashes(tmp_path / "alone")) == 7


def test_a_rank_that_fails_fails_the_job_and_a_restart_resumes(start, tiny_model, tmp_path):
    command = ("sample", "-m", tiny_model, "--steps", STEPS, "-n", 8, "-b", 2, "-o", "out")
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    first = start(*command, RANK="0", **variables)
    # Its part is there, and it waits for the other, which never comes; torchrun ends it then.
    while len(hashes(tmp_path / "out") if (tmp_path / "out").exists() else ()) < 4:
        time.sleep(0.01)
    time.sleep(0.2)
    first.kill(signal.SIGTERM)
    assert first.wait() == 130
    assert len(hashes(tmp_path / "out")) == 4
    assert [rank.wait() for rank in ranks(start, *command)] == [0, 0]
    assert len(hashes(tmp_path / "out")) == 8


def test_unrelated_processes_on_one_folder(start, ddim, tiny_model, tmp_path):
    """The same seeds in batches of other sizes, and other seeds: pairs stay whole, and run.json has them all."""
    command = ("sample", "-m", tiny_model, "--steps", STEPS, "-o", "out")
    processes = [
        start(*command, "--seeds", seeds, "-b", b)
        for seeds, b in (("0-59", 1), ("0-59", 7), ("30-89", 32), ("200-210", 4))
    ]
    assert [p.wait() for p in processes] == [0, 0, 0, 0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seeds"] == "0-89,200-210"
    result = ddim("verify", "out")
    assert result.exit_code == 0, result.stdout
    assert hidden(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_of_two_settings_one_has_the_folder_to_itself(start, ddim, tmp_path, delay):
    """Both begin where nothing is yet; the one that comes second says so, and leaves nothing of its own."""
    commands = [("sample", "-n", 6, "-b", 2, "--steps", steps, "-o", "out") for steps in (40, 41)]
    processes = []
    for command in commands:
        processes.append(start(*command))
        time.sleep(delay)
    codes = [p.wait() for p in processes]
    assert sorted(codes) == [0, 2], [p.stderr for p in processes]
    winner, loser = (commands[codes.index(code)] for code in (0, 2))
    assert "run.json was made with sampling.timesteps" in processes[codes.index(2)].stderr
    assert ddim("verify", "out").exit_code == 0
    assert hidden(tmp_path / "out") == []
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "nothing to do" in ddim(*winner).stdout
    refused = ddim(*loser)
    assert refused.exit_code == 2
    assert "--out" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
