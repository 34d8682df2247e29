"""Every config of configs/ is right, and says in its first line whether it runs as it stands."""

from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_there_are_configs():
    names = {path.stem for path in CONFIGS}
    assert {
        "default",
        "smoke",
        "ddpm",
        "few_steps",
        "cifar10",
        "zero_snr",
        "paper_cifar10",
        "sweep",
        "table1",
        "table_text",
    } <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_check_passes(ddim, path):
    result = ddim("config", "check", path)
    assert result.exit_code == 0, result.stderr
    assert "ok" in result.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_first_line_says_whether_it_runs(ddim, path):
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# Runs as it stands", "# Needs a model of yours"))
    if "Hub" in first:
        return
    dry_run = ddim("sample", "--dry-run", "-c", path)
    assert dry_run.exit_code == (0 if first.startswith("# Runs") else 2), dry_run.stderr
