"""docs/clusters.md says what is in docs/clusters, and that runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "clusters"
PAGE = (ROOT / "docs" / "clusters.md").read_text()
SLURM = (FOLDER / "slurm.sh").read_text()
RAY = (FOLDER / "ray_data.py").read_text()
SMALL = ("--steps", "2")


@pytest.fixture
def shell(tmp_path):
    """Run a script of bash in ``tmp_path``, in which ``ddim`` is this one, and one thread runs."""
    ours = tmp_path / "bin" / "ddim"
    ours.parent.mkdir()
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddim_cli "$@"\n')
    ours.chmod(0o755)

    def run(*command, **environment):
        environment |= {
            "PATH": f"{ours.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", *map(str, command)],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_shows_every_file_as_it_is():
    shown = [block for language in ("bash", "yaml", "dockerfile", "python") for block in blocks(language)]
    for path in FOLDER.iterdir():
        assert path.read_text() in shown, path.name
        assert f"(clusters/{path.name})" in PAGE


def test_every_option_and_link_is_there():
    from typer.main import get_command

    from ddim_cli.cli.app import app

    sample = get_command(app).get_command(None, "sample")
    options = {name for parameter in sample.params for name in parameter.opts}
    others = {"--array", "--nproc-per-node", "--max-restarts", "--no-cache-dir"}
    of_slurm = set(re.findall(r"#SBATCH (--[\w-]+)", SLURM))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) <= options | others | of_slurm
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.*)", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors
    assert "## Job files" in (ROOT / "README.md").read_text()


def test_the_slurm_array_and_its_parts_agree():
    first, last = map(int, re.search(r"^#SBATCH --array=(\d+)-(\d+)$", SLURM, re.M).groups())
    assert re.search(r"--shard env/(\d+)", SLURM)[1] == str(last - first + 1)
    # Slurm reads its options up to the first command.
    assert SLURM.rindex("#SBATCH") < SLURM.index("set -euo")


@pytest.mark.slow
def test_the_slurm_script_makes_the_part_of_its_task(shell, tiny_model, tmp_path):
    """What is added to it wins over what it says. Here a shard has two pictures, not a thousand."""
    (tmp_path / "slurm.sh").write_text(small(SLURM))
    more = ("--seeds", "0-39", "-m", tiny_model, *SMALL, "-o", "mine")
    shell("slurm.sh", *more, SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="1", SLURM_CPUS_PER_TASK="1")
    assert sorted(path.name for path in (tmp_path / "mine").glob("*.tar")) == ["000003.tar", "000011.tar", "000019.tar"]


def small(text):
    """With two pictures a shard."""
    return text.replace("output.shard_size=1000", "output.shard_size=2")


def the_job():
    return next(each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if each["kind"] == "Job")


def test_the_manifest_is_an_indexed_job():
    claim, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], spec["completionMode"]) == ("batch/v1", "Indexed")
    assert spec["parallelism"] <= spec["completions"] == 8
    # A limit for each index needs pods that are not restarted, and a number of indexes that may fail is at most all.
    assert pod["restartPolicy"] == "Never"
    assert spec["backoffLimitPerIndex"] > 0
    assert 0 < spec["maxFailedIndexes"] <= spec["completions"]
    [container] = pod["containers"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("Ignore", "FailIndex")
        assert rule.get("onExitCodes", {}).get("containerName", container["name"]) == container["name"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    [volume], [mount] = pod["volumes"], container["volumeMounts"]
    assert volume["name"] == mount["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    out = next(each for each in container["command"] if each.startswith("--out="))
    assert out.startswith(f"--out={mount['mountPath']}/")
    assert f"--shard=env/{spec['completions']}" in container["command"]
    assert all(isinstance(each, str) for each in container["command"])


def test_two_pods_of_the_job_make_one_folder(start, ddim, tiny_model, tmp_path):
    program, *command = the_job()["spec"]["template"]["spec"]["containers"][0]["command"]
    assert program == "ddim"
    command = [small(each).replace("/data", str(tmp_path)).replace("env/8", "env/2") for each in command]
    pods = [
        start(*command, "--seeds=0-8", f"--model={tiny_model}", *SMALL, JOB_COMPLETION_INDEX=str(index))
        for index in (0, 1)
    ]
    assert [pod.wait() for pod in pods] == [0, 0], [pod.stderr for pod in pods]
    assert (tmp_path / "pictures" / "grid.png").exists()
    assert len(list((tmp_path / "pictures").glob("*.tar"))) == 5
    assert ddim("verify", tmp_path / "pictures").stdout == "9 images: all is well\n"
    late = start(*command, JOB_COMPLETION_INDEX="2")
    assert (late.wait(), "the numbers of 2 parts" in late.stderr) == (2, True)


def test_the_example_without_an_engine_runs():
    names = {}
    [example] = [block for block in blocks("python") if block != RAY]
    exec(example, names)
    assert names["made"]["image"].shape == (3, 32, 32, 1)


@pytest.mark.slow
def test_the_first_example_runs(shell, tmp_path):
    assert shell("-ec", blocks("sh")[0]).endswith("16 images: all is well\n")
    assert (tmp_path / "parts" / "grid.png").exists()


@pytest.mark.slow
def test_the_ray_script_makes_what_the_command_makes(ddim, shell, tmp_path):
    pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"name": f"row {n}", **({"seed": n} if n % 2 else {})} for n in range(5)]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The script as it stands, in fewer steps.
    small = RAY.replace('"steps": 50, "batch_size": 64', '"steps": 5, "batch_size": 4')
    assert small != RAY
    (tmp_path / "small.py").write_text(small)
    shell("-c", f'"{sys.executable}" small.py jobs.jsonl pictures')
    made = {row["name"]: row for row in parquet.read_table(tmp_path / "pictures").to_pylist()}
    assert ddim("sample", "--items", "jobs.jsonl", "--steps", 5, "-b", 4, "-o", "out").exit_code == 0
    from PIL import Image

    for row in rows:
        pixels = np.asarray(Image.open(tmp_path / "out" / f"{row['name']}.png")).astype(int)
        assert np.abs(np.array(made[row["name"]]["image"]).reshape(pixels.shape) - pixels).max() <= 1
        assert json.loads(made[row["name"]]["record"])["image"]["pixels_sha256"] == made[row["name"]]["pixels_sha256"]
