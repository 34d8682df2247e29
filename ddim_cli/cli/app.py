"""The application: its commands, its help, its version."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ddim_cli import __version__
from ddim_cli.cli.bench import bench
from ddim_cli.cli.compare import compare
from ddim_cli.cli.compile import compile_network
from ddim_cli.cli.config import app as config_app
from ddim_cli.cli.console import end_at_once, log_refusal, print_json, report, speaks
from ddim_cli.cli.convert import convert
from ddim_cli.cli.env import env
from ddim_cli.cli.evaluate import evaluate
from ddim_cli.cli.inspect import inspect
from ddim_cli.cli.interpolate import interpolate
from ddim_cli.cli.invert import invert
from ddim_cli.cli.replay import replay
from ddim_cli.cli.report import report_page
from ddim_cli.cli.sample import sample
from ddim_cli.cli.schedule import schedule
from ddim_cli.cli.signals import asks_for_json, interruptible, options_of
from ddim_cli.cli.streams import never_fail_to_encode
from ddim_cli.cli.sweep import sweep
from ddim_cli.cli.trajectory import trajectory
from ddim_cli.cli.verify import verify

HELP = """\
Examples

\b
ddim sample --steps 50 --eta 0.0               16 digits
ddim sample -m path/to/model -n 64 -o out      64 images from your own model
ddim sample -c run.toml --set sampling.eta=1   a config, one key changed
ddim config init run.toml                      a config to start from
ddim bench --against diffusers                 how fast it is here

Sample images from diffusion models with DDIM (Song, Meng, Ermon, arXiv:2010.02502).
"""


# The exception of arguments that are refused, whether typer has click beside it or inside.
_Refused = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class _Root(TyperGroup):
    """The first help a person asks for, in plain text: rich would double the time it takes to appear.

    Where ``--json`` was typed, what is wrong with the arguments themselves is said in JSON too; where a log file was
    named, it is in there.
    """

    _arguments: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rich_markup_mode = None

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
    found, options = None, options_of(arguments)
    for option, following in zip(options, [*options[1:], None], strict=True):
        if option == "--log-file":
            found = following
        elif option.startswith("--log-file="):
            found = option.partition("=")[2]
    return found


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


app.command(short_help="Sample images: PNGs, sidecars, a contact sheet.")(sample)
app.command(short_help="Make pictures again from what they say of themselves.")(replay)
app.command(short_help="Check an output folder: nothing missing, nothing changed.")(verify)
app.command(short_help="Compare a folder with golden pictures, for CI.")(compare)
app.command(short_help="The same seeds under many settings, as a table of folders and one sheet.")(sweep)
app.command(short_help="Pictures between the pictures of two seeds, or of four, or along a path.")(interpolate)
app.command(short_help="The latents of pictures, and what sampling makes of them.")(invert)
app.command(short_help="How pictures come about: a strip of frames along the steps of a seed.")(trajectory)
app.command(short_help="Score pictures against a reference: FID, KID and their like.")(evaluate)
app.command("report", short_help="A page to look at: the pictures of a folder or a sweep.")(report_page)
app.command(short_help="The timestep grid and its coefficients, as a table or a plot.")(schedule)
app.command(short_help="What a model is: shape, weights, cost; or how a PNG was made.")(inspect)
app.command(short_help="A checkpoint of the original code as a diffusers directory.")(convert)
app.command(short_help="Images a second, beside diffusers on the same model.")(bench)
app.command("compile", short_help="Build and keep the compiled network that sample will use.")(compile_network)
app.add_typer(config_app, name="config")
app.command(short_help="Versions, devices, and what a bug report needs.")(env)


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
