"""The pages of docs/ say what is there: their examples run, their options and links exist."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORAGE, PIPE = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("storage", "pipe"))


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page):
    """Every command of the shell examples that runs ddim."""
    lines = [line.strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("ddim ")]


def anchors(text):
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["docs/storage.md", "docs/pipe.md", "docs/clusters.md", "README.md"])
def test_every_link_leads_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)]*)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@pytest.mark.parametrize("page", [STORAGE, PIPE])
def test_every_option_exists(page):
    from typer.main import get_command

    from ddim_cli.cli.app import app

    command = get_command(app)
    options = {
        name
        for sub in command.list_commands(None)
        for parameter in command.get_command(None, sub).params
        for name in parameter.opts
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page)) <= options


def test_the_index_has_the_keys_that_the_page_names():
    from ddim_cli.outputs.shards import Entry

    assert all(f"`{key}`" in STORAGE for key in Entry._fields)


@pytest.mark.slow
def test_the_examples_of_storage_run(ddim, s3, tiny_model, tmp_path):
    """All of them, in the page's order; of one step in place of fifty."""
    shutil.copytree(tiny_model, s3.bucket() / "models" / "mine")
    run = commands(STORAGE)
    assert len(run) > 18
    for words in run:
        steps = ["--steps", "1", "--no-compile"] if words[0] == "sample" else []
        result = ddim(*words, *steps)
        assert result.exit_code == 0, f"{words}: {result.stderr}"
    for folder in (tmp_path / "shards", s3.bucket() / "run"):
        assert len(list(folder.glob("*.tar"))) == 5
    for name in ("000000.tar", "000004.tar"):
        assert (tmp_path / "shards" / name).read_bytes() == (s3.bucket() / "run" / name).read_bytes()
    pytest.importorskip("webdataset")
    [code] = blocks(STORAGE, "python")
    script = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    lines = script.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"{seed:06d}" for seed in range(5000)], script.stderr


@pytest.fixture
def path(tmp_path):
    """An environment in which ``ddim`` is this one."""
    ours = tmp_path / "bin" / "ddim"
    ours.parent.mkdir()
    ours.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddim_cli "$@"\n')
    ours.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{ours.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
def test_the_examples_of_pipe_run(path, tmp_path):
    [shell], [python] = blocks(PIPE, "sh"), blocks(PIPE, "python")
    done = subprocess.run(["bash", "-euc", shell], cwd=tmp_path, env=path, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((each["row"], each["name"], each.get("id")) for each in answers) == [
        (0, "first", "a1"),
        (1, "000001", None),
    ]
    assert (tmp_path / "piped" / "first.png").exists()
    done = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, env=path, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["7 piped/digit 7.png", "8 piped/digit 8.png"], done.stderr
