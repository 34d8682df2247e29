"""``ddim config``: show the settings in effect, check files, write one to start from."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, Layers, Verbose, argument, option, with_settings

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer
    from ddim_cli.sampling.resolve import Run

HELP = """\
Show, check and start configs.

[bold]Examples[/bold]

\b
ddim config show -c run.toml --eta 0.5
ddim config check configs/*.toml
ddim config init run.toml
"""

app = typer.Typer(
    help=HELP,
    short_help="Show, check and start configs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.command(short_help="Print every setting in effect, and where it came from.")
@console.handles_errors
@with_settings()
def show(layers: Layers, verbose: Verbose = False, json: Json = False) -> None:
    """
    Print every setting in effect as TOML, each with where it came from.

    [bold]Examples[/bold]

    \b
    ddim config show -c configs/few_steps.toml --eta 0.5
    ddim config show -m path/to/model > run.toml
    """
    from ddim_cli.config.write import render_resolved
    from ddim_cli.sampling.resolve import resolve

    run = resolve(layers, conditions_follow=True, reads_init=False)
    for warning in run.warnings:
        console.warn(warning)
    if json:
        origins = {key: run.resolved.origin(key) for key in run.resolved.origins}
        console.print_json({"config": run.config.model_dump(mode="json"), "origins": origins})
    else:
        typer.echo(render_resolved(run.resolved), nl=False)


@app.command(short_help="Check configs.")
@console.handles_errors
def check(
    files: Annotated[list[Path], argument("TOML files to check, each on its own.", "FILE...")],
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Check configs. Print every problem with its file and line, and exit 2 if there is one.

    [bold]Examples[/bold]

    \b
    ddim config check configs/*.toml
    """
    from ddim_cli.config.layers import read_file
    from ddim_cli.errors import ConfigError

    problems: list[str] = []
    results = []
    for file in files:
        try:
            layer = read_file(file)
            runs, warnings = _runs(layer)
            for run in runs:
                _check_coefficients(run)
        except ConfigError as error:
            # Problems of single keys name their file already; contradictions between keys do not.
            of_file = [p if p.startswith(f"{file}:") else f"{file}: {p}" for p in error.problems]
            problems += of_file
            results.append({"file": str(file), "ok": False, "problems": of_file})
        else:
            for warning in warnings:
                console.warn(f"{file}: {warning}")
            cells = {} if layer.sweep is None else {"cells": len(runs)}
            results.append({"file": str(file), "ok": True, **cells, "warnings": warnings})
            if not json:
                typer.echo(f"{file}: ok" + (f", a sweep of {panels.counted(len(runs), 'cell')}" if cells else ""))
    if json:
        console.print_json({"files": results})
    for problem in problems:
        console.show_error(problem)
    if problems:
        raise typer.Exit(ConfigError.exit_code)


def _runs(layer: Layer) -> tuple[list[Run], list[str]]:
    """The run of a file, or the cells of its sweep, and the warnings. Raises ConfigError."""
    from ddim_cli.sampling.resolve import resolve_loosely

    if layer.sweep is None:
        run = resolve_loosely([layer])
        return [run], list(run.warnings)
    from ddim_cli.experiments.cells import resolve_sweep

    sweep = resolve_sweep([layer], resolve=resolve_loosely)
    return [cell.run for cell in sweep.cells], sweep.warnings


def _check_coefficients(run: Run) -> None:
    """Raise ConfigError where coefficients cannot be computed; torch is imported only for settings that risk it."""
    scheduler, sampling = run.config.scheduler, run.config.sampling
    if sampling.eta > 1 or scheduler.rescale_betas_zero_snr or scheduler.trained_betas is not None:
        from ddim_cli.diffusion.solvers import solver_of

        solver_of(sampling).table(scheduler, sampling, run.timesteps)


@app.command(short_help="Write a commented config to start from.")
@console.handles_errors
def init(
    file: Annotated[Path, argument("File to write, or - for stdout.", "FILE")],
    source: Annotated[
        Path | None, option("Take the keys of a model's scheduler_config.json.", None, "--from", metavar="JSON")
    ] = None,
    overwrite: Annotated[bool, option("Replace an existing file.", None, "--overwrite")] = False,
    verbose: Verbose = False,
) -> None:
    """
    Write a commented config to start from.

    [bold]Examples[/bold]

    \b
    ddim config init run.toml
    ddim config init run.toml --from path/to/model/scheduler/scheduler_config.json
    ddim config init - | less
    """
    from ddim_cli.config.layers import table_layer
    from ddim_cli.config.write import render_starter
    from ddim_cli.errors import UsageError
    from ddim_cli.models.describe import read_scheduler_config
    from ddim_cli.outputs.named import name_file

    to = name_file(file, None, overwrite=overwrite) if str(file) != "-" else None
    keys, unused = read_scheduler_config(source) if source is not None else ({}, ())
    if source is not None and not keys:
        raise UsageError(f"{source}: it has no key of a scheduler that DDIM knows")
    layer = table_layer({"scheduler": keys}, str(source))
    text = render_starter(layer.values)
    if to is None:
        typer.echo(text, nl=False)
    else:
        to.write(text.encode())
        console.say(f"wrote {to}")
    if unused:
        console.say(f"DDIM has no use for {', '.join(unused)}")


@app.command(short_help="Print the JSON Schema of a config.")
@console.handles_errors
def schema(verbose: Verbose = False) -> None:
    """
    Print the JSON Schema of a config, for editors that complete TOML keys.

    [bold]Examples[/bold]

    \b
    ddim config schema > ddim.schema.json
    """
    from ddim_cli.config.schema import Config
    from ddim_cli.config.sweep import JSON_SCHEMA

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    document["properties"]["sweep"] = JSON_SCHEMA
    typer.echo(json_module.dumps(document, indent=2))
