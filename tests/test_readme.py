"""The README says what is there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddim_cli.config.schema import FLAGS, SECTIONS
from ddim_cli.diffusion.schedules import SCHEDULES
from ddim_cli.diffusion.spacings import SPACINGS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_come_first():
    assert README.startswith("# ddim\n\n```sh\nmake sample\nmake test\n```\n")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_in_the_reference_with_its_default(section):
    block = README.split(f"| **[{section}]**")[1].split("| **[")[0]
    for name, field in SECTIONS[section].model_fields.items():
        rows = [line for line in block.splitlines() if line.startswith("| `")]
        [row] = [line for line in rows if f"`{name}`" in line.split("|")[1]]
        if field.default is not None:
            position = [n.strip().strip("`") for n in row.split("|")[1].split(",")].index(name)
            shown = row.split("|")[2].split(",")[position].strip().strip("`")
            default = field.default
            expected = f'"{default}"' if isinstance(default, str) else str(default)
            assert shown == (expected.lower() if isinstance(default, bool) else expected), name


def test_every_schedule_and_spacing_is_in_the_reference():
    for key, names in (("beta_schedule", SCHEDULES), ("timestep_spacing", SPACINGS)):
        [row] = [line for line in README.splitlines() if line.startswith(f"| `{key}` |")]
        assert re.findall(r"`(\w+)`", row.split("|")[3])[: len(names)] == list(names)


def test_every_command_is_named():
    from typer.main import get_command

    from ddim_cli.cli.app import app

    names = get_command(app).list_commands(None)
    assert "sample" in names
    assert [name for name in names if f"ddim {name}" not in README] == []


def test_every_config_and_flag_that_is_named_exists():
    for path in re.findall(r"`(configs/[\w.]+)`", README):
        assert (ROOT / path).exists(), path
    options = {name for flag in FLAGS.values() for part in flag.names for name in part.split("/")}
    options |= {
        "--set",
        "--config",
        "--shard",
        "--overwrite",
        "--dry-run",
        "--json",
        "--quiet",
        "--help",
        "--from",
        "--list",
        "--plot",
        "--npz",
        "--log-file",
        "--check",
        "--max-diff",
        "--min-psnr",
        "--diff-dir",
        "--against",
        "--to-prompt",
        "--clear",
        "--architecture",
        "--batch-sizes",
        "--repeats",
        "--no-files",
        "--psnr-images",
        "--show",
        "--every",
        "--gif",
        "--between",
        "--frames",
        "--square",
        "--axis",
        "--reference",
        "--extractor",
        "--extractor-input",
        "--inception",
        "--keep-reference",
        "--latents",
        "--items",
        "--jsonl",
        "--max-wait",
        "--embed",
        "--to",
        "--keep-mask",
    }
    for name in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - {
        "--array",
        "--gpus",
        "--nproc-per-node",
        "--max-restarts",
    }:
        assert name in options, name


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    drawing, experiments = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(drawing, names)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["0.png", "1.png", "2.png", "3.png"]
    assert len(names["pictures"]) == 4
    assert names["pictures"][0].image.size == (16, 16)
    assert [each.seed for each in names["listed"]] == [7, 3000]
    exec(experiments.replace('"steps": 50', '"steps": 5'), names)
    assert len(names["frames"].frames) == 5
    assert len(names["found"].reconstructions) == 8
    assert [path.exists() for path in names["edited"].pictures[0].edits] == [True, True]
    assert (names["swept"].made, names["swept"].left) == (16, 0)


# What makes an example small, or gives it what it names; the first that fits is taken.
SMALLER = {
    "ddim bench --batch-sizes 1,64": "ddim bench --batch-sizes 1 --steps 2 --repeats 1",
    "ddim bench --architecture cifar10 --batch-sizes 8": "ddim bench --architecture cifar10 --batch-sizes 1 --steps 1 "
    "--repeats 1 --no-compile",
    "ddim bench -m": "ddim bench --batch-sizes 1 --steps 2 --repeats 1 --psnr-images 1 -m",
    "ddim sweep -c configs/table1.toml -o table1": "ddim sweep -c configs/table1.toml -o plan --dry-run",
    "ddim sweep -c configs/table_text.toml -o table_text": "ddim sweep -c configs/table_text.toml -o plan --dry-run",
    "ddim sweep -c configs/orders.toml -o orders": "ddim sweep -c configs/orders.toml -o plan --dry-run",
    "ddim sweep -c configs/table_text.toml -c configs/orders.toml -m mnist-text --axis eta=0.0 -o orders-text": (
        "ddim sweep -c configs/table_text.toml -c configs/orders.toml -m mnist-text --axis eta=0.0 -o plan --dry-run"
    ),
    "ddim sample -m path/to/model -c run.toml": "ddim sample -m path/to/model -c run.toml --steps 4",
    "ddim compile -c run.toml": "ddim compile -m path/to/model -c run.toml",
    "ddim sample -n 5000": "ddim sample --steps 1 -n 50",
    "ddim sample --init": "ddim sample --steps 4 --init",
    "ddim sample -m mnist-text": "ddim sample --steps 4 -m mnist-text",
    "ddim edit": "ddim edit --steps 4",
    "ddim compile --list": "ddim compile --list",
    "ddim compile": "ddim compile -m path/to/model",
    "ddim invert tests/data/digits --steps $steps --json | python": "ddim invert tests/data/digits --steps 10 --json",
}
# Inception's weights cannot be fetched everywhere; test_evaluate.py has its wiring.
NOT_HERE = ("ddim evaluate samples.npz --reference pictures",)


def shell_commands() -> list[str]:
    """Every command of the README's shell examples that runs ddim, without its comment."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.strip().partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    # What runs under a batch system has tests of its own below.
    return [line for line in lines if line.startswith("ddim ") and "--jsonl" not in line and line not in NOT_HERE]


def make_ready(folder: Path, tiny_model: Path) -> None:
    """What the examples name."""
    import torch
    from safetensors.torch import save_file

    for name in ("configs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(tiny_model, folder / "path" / "to" / "model")
    original = ROOT / "tests" / "data" / "ddim-original-tiny"
    shutil.copy(original / "model-1000.ckpt", folder / "ckpt.pth")
    shutil.copy(original / "config.yml", folder)
    shutil.copy(original.parent / "digits" / "3.png", folder / "photo.png")
    shutil.copy(original.parent / "digits" / "4.png", folder / "mask.png")
    save_file({"latent": torch.randn(1, 32, 32)}, folder / "mine.safetensors")
    for kind in ("jsonl", "csv"):
        [rows] = re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)
        (folder / f"jobs.{kind}").write_text(rows)
    for name, schedule in (("a", "linear"), ("b", "scaled_linear"), ("run", "linear")):
        (folder / f"{name}.toml").write_text(f'[scheduler]\nbeta_schedule = "{schedule}"\n')
    for name in ("photos", "more"):
        (folder / name).mkdir()
        kind = "png" if name == "photos" else "jpg"
        from PIL import Image

        Image.open(original.parent / "digits" / "3.png").save(folder / name / f"{name}.{kind}")

    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    torch.jit.save(torch.jit.trace(Mean(), torch.zeros(1, 1, 32, 32)), folder / "network.pt")


BEFORE = (
    "sample -c configs/smoke.toml -o outputs/smoke",
    "sample --seeds 0-5 --steps 2 --subdirs -o fid",
    "sample --steps 2 -n 12 -o outputs/mnist-50steps-1a2b3c4d",
    "sample --steps 2 -n 6 -o samples",
    "sample --steps 3 -n 6 -o pictures",
    "sweep --axis steps=2,3 -n 6 -o table1",
    "sweep --axis steps=2,3 -n 6 -o outputs/mnist-sweep-1a2b3c4d",
)


@pytest.mark.slow
@pytest.mark.first
def test_every_shell_example_runs(ddim, tiny_model, tmp_path):
    """In the README's order, in one folder; the long ones smaller."""
    make_ready(tmp_path, tiny_model)
    for command in BEFORE:
        assert ddim(*command.split()).exit_code == 0, command
    shutil.copytree(tmp_path / "outputs" / "smoke", tmp_path / "golden")
    shutil.copy(tmp_path / "golden" / "000000.png", tmp_path / "picture.png")
    commands = shell_commands()
    assert len(commands) > 35
    for command in commands:
        if command.startswith("ddim config init"):
            (tmp_path / "run.toml").unlink()
        smaller = next((new + command[len(old) :] for old, new in SMALLER.items() if command.startswith(old)), command)
        if "invert tests/data/digits" in command:
            smaller = SMALLER["ddim invert tests/data/digits --steps $steps --json | python"]
        words = [
            str(path.relative_to(tmp_path)) if "*" in word else word
            for word in shlex.split(smaller)[1:]
            for path in (sorted(tmp_path.glob(word)) if "*" in word else [tmp_path])
        ]
        result = ddim(*words)
        assert result.exit_code == 0, f"{smaller}: {result.stderr}"


def example(first_line: str) -> str:
    """The shell example that begins with this line, with two parts in place of eight, and six images."""
    text = README + (ROOT / "docs" / "clusters.md").read_text()
    code = next(c for c in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if c.startswith(first_line))
    smaller = {"0-49999": "0-5", "::: 0 1 2 3 4 5 6 7": "::: 0 1", "/8": "/2", "-j 8": "-j 2", "node=8": "node=2"}
    for old, new in smaller.items():
        code = code.replace(old, new)
    return code.replace("-o pictures", "-o fid").replace("OMP_NUM_THREADS=4", "OMP_NUM_THREADS=1")


# GNU parallel's `-j N COMMAND ::: VALUES`, for where it is not installed: xargs runs the same command lines.
PARALLEL = """#!/bin/bash
jobs=$2; shift 2; command=()
while [ "$1" != ::: ]; do command+=("$1"); shift; done; shift
printf '%s\\n' "$@" | xargs -P "$jobs" -I{} "${command[@]}"
"""


@pytest.fixture
def shell(tmp_path, tiny_model):
    """Run a script of bash in a folder where run.toml is."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "ddim": f'#!/bin/bash\nexec "{sys.executable}" -m ddim_cli "$@"\n',
        "torchrun": f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    }
    if shutil.which("parallel") is None:
        scripts["parallel"] = PARALLEL
    for name, text in scripts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "run.toml").write_text(f'[model]\nsource = "{tiny_model}"\n[sampling]\nsteps = 4\nbatch_size = 2\n')
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(code: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-euc", code],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", **variables},
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def check_fid(folder: Path) -> None:
    from ddim_cli.evaluation.verified import Verified
    from ddim_cli.evaluation.verify import verify

    assert verify(folder) == Verified(images=6, problems=())
    assert sorted(p.name for p in folder.iterdir()) == ["000000", "grid.png", "run.json"]


@pytest.mark.slow
@pytest.mark.parametrize("first_line", ["export OMP_NUM_THREADS", "torchrun"])
def test_the_other_ways_to_spread_a_job_run(shell, tmp_path, first_line):
    task = shell(example(first_line))
    _, stderr = task.communicate(timeout=120)
    assert task.returncode == 0, stderr
    check_fid(tmp_path / "fid")
    assert (tmp_path / "fid.npz").exists() == (first_line == "torchrun")


def test_the_ci_job_compares_with_golden_pictures(ddim, tmp_path, monkeypatch):
    """Its own commands, on the bundled model."""
    steps = re.findall(r"- run: (ddim .*)", README.split("## In CI")[1])
    monkeypatch.chdir(ROOT)
    replaced = {"configs/*.toml": "configs/smoke.toml", "-o smoke": f"-o {tmp_path}/smoke"}
    for old, new in {**replaced, "verify smoke": f"verify {tmp_path}/smoke"}.items():
        steps = [step.replace(old, new) for step in steps]
    steps = [
        re.sub(
            r"compare tests/golden smoke --diff-dir differences", f"compare {tmp_path}/golden {tmp_path}/smoke", step
        )
        for step in steps
    ]
    assert [step.split()[1] for step in steps] == ["config", "sample", "verify", "compare"]
    for step in steps[:3]:
        assert ddim(*step.split()[1:]).exit_code == 0, step
    shutil.copytree(tmp_path / "smoke", tmp_path / "golden")
    assert ddim(*steps[3].split()[1:]).exit_code == 0
    (tmp_path / "smoke" / "000003.png").unlink()
    assert ddim(*steps[3].split()[1:]).exit_code == 3
