"""The README says what is there."""

import re
from pathlib import Path

import pytest

from ddim_cli.cli.options import FLAGS
from ddim_cli.config.schema import SECTIONS

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


def test_every_file_and_flag_that_is_named_exists():
    for path in re.findall(r"\]\(([^)h#][^)]*)\)|`(configs/[\w.]+)`", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
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
        "--against",
        "--architecture",
        "--batch-sizes",
        "--repeats",
        "--no-files",
        "--psnr-images",
    }
    for name in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - {"--array", "--gpus"}:
        assert name in options, name


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found = {}
    exec(code, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    assert len(found["pictures"]) == 4
    assert found["pictures"][0].image.size == (16, 16)
