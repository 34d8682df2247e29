import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddim_cli import __version__

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ["schedule"],
    ["inspect"],
    ["convert"],
    ["sample"],
    ["config"],
    ["config", "show"],
    ["config", "check"],
    ["config", "init"],
    ["config", "schema"],
    ["replay"],
    ["sweep"],
    ["trajectory"],
    ["interpolate"],
    ["invert"],
    ["report"],
    ["evaluate"],
    ["verify"],
    ["compare"],
    ["bench"],
    ["env"],
)


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_describes_the_command_and_then_gives_examples(ddim, command):
    result = ddim(*command, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0].startswith("Usage:")
    examples = [line.removesuffix(":") for line in lines].index("Examples")
    assert examples > 1
    assert lines[examples + 1].startswith(" ".join(["ddim", *command]))


def every_command(name: str, command):
    yield name, command
    for child, found in getattr(command, "commands", {}).items():
        yield from every_command(f"{name} {child}", found)


def test_no_help_is_lost_to_markup():
    """What stands in brackets is taken for markup, and left out, unless it is escaped."""
    import typer
    from rich.text import Text

    from ddim_cli.cli.app import app

    for name, command in every_command("ddim", typer.main.get_command(app)):
        texts = [command.help, command.short_help, *(getattr(p, "help", None) for p in command.params)]
        for text in filter(None, texts):
            text = text.replace("[bold]", "").replace("[/bold]", "").replace("\b", "")
            assert Text.from_markup(text).plain == text.replace("\\[", "["), name


def test_version(ddim):
    assert ddim("--version").stdout.strip() == f"ddim {__version__}"


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["sample", "--help"],
        ["bench", "--help"],
        ["trajectory", "--help"],
        ["sweep", "--help"],
        ["evaluate", "--help"],
        ["config", "check", "configs/sweep.toml"],
        ["config", "show"],
        ["config", "check", "configs/default.toml"],
    ],
    ids=" ".join,
)
def test_no_torch_where_none_is_needed(args):
    """In a process of its own: what these import, the others of this session must not have imported before."""
    code = (
        "import sys\nfrom ddim_cli.cli.app import app\n"
        f"try: app({args!r})\nexcept SystemExit as e: assert not e.code, e.code\n"
        "heavy = {'torch', 'diffusers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_verify_compare_and_report_need_no_torch(tiny_model, ddim, tmp_path):
    assert ddim("sample", "-m", tiny_model, "--steps", 2, "-n", 1, "-o", "out").exit_code == 0
    code = (
        "import sys\nfrom ddim_cli.cli.app import app\n"
        "for args in (['verify', 'out'], ['compare', 'out', 'out'], ['report', 'out']):\n"
        "    try: app(args)\n    except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m(tmp_path):
    command = [sys.executable, "-m", "ddim_cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.startswith("ddim ")


def test_env(ddim):
    found = json.loads(ddim("env", "--json").stdout)
    assert found["ddim"] == __version__
    assert found["torch"]
    assert "mnist" in found["bundled models"]


def test_unknown_things_are_usage_errors(ddim):
    assert ddim("nonsense").exit_code == 2
    assert ddim("sample", "--nonsense").exit_code == 2
    assert ddim("sample", "--steps", "many").exit_code == 2


def test_a_default_that_is_0_or_1_is_shown_as_the_number_it_is(ddim):
    shown = " ".join(ddim("sample", "--help").stdout.split())
    for text in (
        "1 for DDPM's [0].",
        "has the next seed [0].",
        "and 1 turns it off [1].",
        "of the first images [yes].",
    ):
        assert text in shown, text
