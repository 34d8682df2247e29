"""``ddim compile``: build and keep the compiled network that ``sample`` will use."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import SEEDS, Json, Layers, Quiet, Verbose, option, with_settings
from ddim_cli.cli.panels import counted, show_table
from ddim_cli.cli.progress import RunProgress, showing_progress


@console.handles_errors
# What the code is for: the model, and how many rows of it are computed at a time, on what.
@with_settings(
    only=("model", "image_size", *SEEDS, "batch_size", "classes", "guidance_scale", "device", "dtype"),
)
def compile_network(
    layers: Layers,
    rebuild: Annotated[bool, option("Build it even if there is one.", None, "--rebuild")] = False,
    list_kept: Annotated[bool, option("List what is kept, and build nothing.", None, "--list")] = False,
    clear: Annotated[bool, option("Remove all that is kept, and build nothing.", None, "--clear")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Build the network as machine code and keep it, for ddim sample to find.

    It is for one model, batch size, dtype, device and version; ddim sample uses what is kept unless it is told
    --no-compile. Of the options that you will give to ddim sample, give those that are listed here.

    [bold]Examples[/bold]

    \b
    ddim compile                         the bundled model, for batches as ddim sample makes them
    ddim compile -c run.toml             what ddim sample -c run.toml will use
    ddim compile -m path/to/model -n 64 -b 32
    ddim compile --list
    """
    from ddim_cli.errors import UsageError
    from ddim_cli.sampling.resolve import resolve

    if list_kept and clear:
        raise UsageError("--list and --clear exclude each other")
    if list_kept or clear:
        (_clear if clear else _show_kept)(json)
        return
    # No prompt or class bears on the code.
    run = resolve(layers, conditions_follow=True, reads_init=False)
    with showing_progress(quiet, RunProgress(verbose)) as progress:
        from ddim_cli.sampling import compiled
        from ddim_cli.sampling.job import make_job

        job = make_job(run)
        kept = not rebuild and compiled.find(job.target) is not None
        if not kept:
            if progress is not None:
                progress.compiling(run.model.name, job.target.rows)
            compiled.build(job.target)
    facts = {"model": job.run.model.source, "built": not kept, **compiled.describe(job.target.folder)}
    if json:
        console.print_json(facts)
    elif not quiet:
        show_table(_rows(facts), "there already" if kept else "built")


def _purpose(facts: dict[str, Any]) -> str:
    """Say what a compiled network is for, unless it is damaged."""
    if "shape" not in facts:
        return "damaged or unfinished"
    batch, *shape = facts["shape"]
    size = "x".join(map(str, shape))
    return f"{counted(facts['texts'] or batch, 'row')} of {size} in {facts['dtype']} on {facts['device']}"


def _size(facts: dict[str, Any]) -> str:
    return f"{facts['bytes'] / 1e6:.1f} MB"


def _rows(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": facts["model"],
        "for": _purpose(facts),
        "size": _size(facts),
        "build time": f"{facts['seconds']:.0f} s",
        "folder": facts["folder"],
    }


def _show_kept(as_json: bool) -> None:
    from ddim_cli.sampling import compiled

    kept = [compiled.describe(path) for path in compiled.kept_folders()]
    if as_json:
        console.print_json({"kept": kept, "removed": []})
    elif not kept:
        show_table({"kept": "nothing", "folder": compiled.folder()}, "compiled networks")
    else:
        for facts in kept:
            show_table(_rows(facts), "kept")


def _clear(as_json: bool) -> None:
    from ddim_cli.sampling import compiled

    removed = compiled.clear()
    if as_json:
        console.print_json({"kept": [], "removed": removed})
        return
    for facts in removed:
        typer.echo(f"removed {facts['folder']}: {facts.get('model', 'a network')}, {_purpose(facts)}, {_size(facts)}")
    if not removed:
        typer.echo(f"nothing to remove: no compiled network is kept in {compiled.folder()}")
