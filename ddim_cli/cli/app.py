"""The application: its commands, its help, its version."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ddim_cli import __version__
from ddim_cli.cli.console import end_at_once, log_refusal, print_json, report, speaks
from ddim_cli.cli.signals import asks_for_json, interruptible, options_of
from ddim_cli.cli.streams import never_fail_to_encode

HELP = """\
Sample images from diffusion models with DDIM (Song, Meng, Ermon, arXiv:2010.02502).

Examples:

\b
ddim sample --steps 50 --eta 0.0               sample 16 digits
ddim sample -m path/to/model -n 64 -o out      sample 64 images from your own model
ddim sample -c run.toml --set sampling.eta=1   take a config and change one key
ddim config init run.toml                      write a config to start from
ddim bench --against diffusers                 measure how fast it is here
"""


@dataclass(frozen=True)
class CommandEntry:
    """A command: its module in this package, what it is called there, and its line in ``ddim --help``."""

    module: str
    function: str
    about: str

    def load(self, name: str) -> Any:
        """Import it, as click has it."""
        command = getattr(importlib.import_module(f"ddim_cli.cli.{self.module}"), self.function)
        if isinstance(command, typer.Typer):
            return typer.main.get_group(command)
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        alone.command(name, short_help=self.about)(command)
        return typer.main.get_command(alone)


# In the order in which --help lists them. Only the one that runs is imported.
COMMANDS = {
    "sample": CommandEntry("sample", "sample", "Sample images: pictures, sidecars, a contact sheet."),
    "replay": CommandEntry("replay", "replay", "Make pictures again from what they say of themselves."),
    "verify": CommandEntry("verify", "verify", "Check an output folder: nothing missing, nothing changed."),
    "compare": CommandEntry("compare", "compare", "Compare a folder with golden pictures, for CI."),
    "sweep": CommandEntry("sweep", "sweep", "Sample the same seeds under many settings."),
    "interpolate": CommandEntry("interpolate", "interpolate", "Make pictures between the pictures of seeds."),
    "invert": CommandEntry("invert", "invert", "Find the latents of pictures, and sample from them."),
    "edit": CommandEntry("edit", "edit", "Edit pictures by inversion, from one prompt to another."),
    "trajectory": CommandEntry("trajectory", "trajectory", "Show how pictures come about, step by step."),
    "evaluate": CommandEntry("evaluate", "evaluate", "Score pictures against a reference: FID, KID and their like."),
    "report": CommandEntry("report", "report_page", "Show the pictures of a folder or a sweep as a page."),
    "schedule": CommandEntry("schedule", "schedule", "Print or plot the timestep grid and its coefficients."),
    "inspect": CommandEntry("inspect", "inspect", "Say what a model is, or how a picture was made."),
    "convert": CommandEntry("convert", "convert", "Write any model as a diffusers directory."),
    "bench": CommandEntry("bench", "bench", "Measure images per second, beside diffusers on the same model."),
    "compile": CommandEntry("compile", "compile_network", "Build and keep the compiled network that sample will use."),
    "config": CommandEntry("config", "app", "Show, check and start configs."),
    "env": CommandEntry("env", "env", "Print versions, devices, and what a bug report needs."),
}


class _Loading(dict[str, Any]):
    """Commands by name, each imported when it is looked up."""

    def get(self, name: str, default: Any = None) -> Any:
        if name in COMMANDS and name not in self:
            self[name] = COMMANDS[name].load(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return COMMANDS.keys()


# The exception of arguments that are refused, whether typer has click beside it or inside.
_Refused: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _Root(TyperGroup):
    """The first help a person asks for, in plain text: rich would double the time it takes to appear.

    Where ``--json`` was typed, what is wrong with the arguments themselves is said in JSON too; where a log file was
    named, it is in there.
    """

    _arguments: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rich_markup_mode = None
        self.commands = _Loading()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.about) for name, command in COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> Any:
        self._arguments = list(sys.argv[1:] if args is None else args)
        return super().main(args, *others, **extra)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with self._refusing():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with self._refusing():
            return super().invoke(ctx)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except _Refused as error:
            log_file = named_log_file(self._arguments)
            if log_file and _takes_log_file(error):
                log_refusal(Path(log_file), error.format_message())
            if asks_for_json(self._arguments) and speaks():
                print_json({"error": error.format_message(), "exit_code": error.exit_code})
            raise
        except KeyboardInterrupt as error:
            # Before the command itself has begun, or after its end.
            raise typer.Exit(report(error, asks_for_json(self._arguments) and speaks())) from None


def named_log_file(arguments: Sequence[str]) -> str | None:
    """The value of the last ``--log-file``, of arguments that could not be read as a whole."""
    value, options = None, options_of(arguments)
    for option, following in zip(options, [*options[1:], None], strict=True):
        if option == "--log-file":
            value = following
        elif option.startswith("--log-file="):
            value = option.partition("=")[2]
    return value


def _takes_log_file(error: Any) -> bool:
    """Whether the command whose arguments are refused has this option at all."""
    context = getattr(error, "ctx", None)
    return context is not None and any(parameter.name == "log_file" for parameter in context.command.params)


app = typer.Typer(
    cls=_Root,
    name="ddim",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ddim {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _wait_patiently() -> None:
    """Let OpenMP's threads sleep while they wait, unless the environment says how; it is read when torch is loaded.

    Waiting busily is 3 % faster where nothing else runs, and several times slower where something does.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def main() -> None:
    """Run the command line; see ``ddim_cli.__main__`` for what goes before."""
    _wait_patiently()
    never_fail_to_encode()
    # Looking for plugins of pydantic, which would have no say here, takes a fifth of the time of a small command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "true")
    as_json = asks_for_json(sys.argv[1:])
    try:
        with interruptible(lambda: end_at_once(as_json and speaks())):
            app()
    except (KeyboardInterrupt, BrokenPipeError) as error:
        sys.exit(report(error, as_json and speaks()))
