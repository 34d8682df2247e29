"""``--shard env/N``: the part that a job array's task is told to make."""

import json

import pytest

from ddim_cli.errors import UsageError
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.torchrun import Ranks, choose_shard

SLURM, KUBERNETES = "SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({SLURM: "0"}, (0, 4)),
        ({SLURM: "3"}, (3, 4)),
        # --array=1-4
        ({SLURM: "4"}, (4, 4)),
        # Submitted again with --array=2: what Slurm counts is not what the plan was cut into.
        ({SLURM: "2", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MAX": "2"}, (2, 4)),
        ({KUBERNETES: "3"}, (3, 4)),
        ({SLURM: "1", KUBERNETES: "1"}, (1, 4)),
        ({SLURM: "", KUBERNETES: "1"}, (1, 4)),
    ],
)
def test_the_part_is_the_number_of_the_task(environment, part):
    assert choose_shard("env/4", None, environment) == Shard(*part)


@pytest.mark.parametrize("first", [0, 1])
def test_tasks_cover_everything_once_from_0_and_from_1(first):
    parts = [choose_shard("env/4", None, {SLURM: str(first + i)}).of(range(10)) for i in range(4)]
    assert sorted(position for part in parts for position in part) == list(range(10))


@pytest.mark.parametrize(
    ("shard", "environment", "says"),
    [
        ("env", {SLURM: "1", "SLURM_ARRAY_TASK_COUNT": "4"}, "write env/N, for example env/8"),
        ("env/0", {SLURM: "0"}, "write env/N"),
        ("env/x", {SLURM: "0"}, "write env/N"),
        ("env8", {SLURM: "0"}, "write env/N"),
        ("env/4", {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ("env/4", {SLURM: "1", KUBERNETES: "2"}, "SLURM_ARRAY_TASK_ID 1 and JOB_COMPLETION_INDEX 2 are both set"),
        ("env/4", {SLURM: "one"}, "SLURM_ARRAY_TASK_ID is 'one', which is no number"),
        ("env/4", {KUBERNETES: "-1"}, "JOB_COMPLETION_INDEX is '-1', which is no number"),
        ("env/4", {SLURM: "9" * 5000}, "which is no number"),
        ("env/4", {SLURM: "5"}, "SLURM_ARRAY_TASK_ID is 5, and the numbers of 4 parts go from 0 to N-1 or from 1 to N"),
        # Kubernetes counts from 0: with five completions, part 0 would be made twice.
        ("env/4", {KUBERNETES: "4"}, "JOB_COMPLETION_INDEX is 4, and the numbers of 4 parts go from 0 to N-1"),
    ],
)
def test_what_is_refused(shard, environment, says):
    with pytest.raises(UsageError, match=says) as caught:
        choose_shard(shard, None, environment)
    assert len(str(caught.value)) < 400


def test_under_torchrun_env_is_the_rank():
    ranks = Ranks(3, 8, 1)
    assert choose_shard("env", ranks, {SLURM: "5"}) == choose_shard(None, ranks, {}) == Shard(3, 8)
    with pytest.raises(UsageError, match="each rank is a shard already"):
        choose_shard("env/8", ranks, {SLURM: "5"})


def test_the_command_reads_its_environment(ddim, tiny_model, tmp_path, monkeypatch):
    command = ("sample", "-m", tiny_model, "--steps", 2, "-n", 5, "-o", "out", "--shard", "env/2", "--json")
    monkeypatch.delenv(SLURM, raising=False)
    monkeypatch.delenv(KUBERNETES, raising=False)
    refused = ddim(*command)
    assert (refused.exit_code, "no task of a job array" in refused.stderr) == (2, True)
    monkeypatch.setenv(KUBERNETES, "1")
    assert json.loads(ddim(*command).stdout)["left"] == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["000001.png", "000003.png"]
    monkeypatch.setenv(KUBERNETES, "0")
    assert json.loads(ddim(*command).stdout)["left"] == 0
    assert ddim("verify", "out").exit_code == 0


def test_sweep_takes_it_too(ddim, tiny_model, monkeypatch):
    monkeypatch.setenv(SLURM, "2")
    told = ddim("sweep", "-m", tiny_model, "--axis", "steps=2", "-n", 5, "-o", "out", "--shard", "env/2", "--json")
    assert json.loads(told.stdout)["left"] == 2, told.stderr
