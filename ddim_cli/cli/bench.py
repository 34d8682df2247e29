"""``ddim bench``: how fast sampling is here, beside diffusers on the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim_cli.cli import console
from ddim_cli.cli.options import Json, Layers, OverwriteFile, Verbose, with_settings

if TYPE_CHECKING:
    from ddim_cli.outputs.named import NamedFile
    from ddim_cli.sampling.resolve import Run

PANEL = "Measuring"
MOST_BATCH = 65536


@console.handles_errors
@with_settings(
    "model",
    "image_size",
    "seed",
    "steps",
    "eta",
    "classes",
    "guidance_scale",
    "guidance_rescale",
    "beta_schedule",
    "spacing",
    "prediction_type",
    "thresholding",
    "clip_sample",
    "device",
    "dtype",
    "compile",
)
def bench(
    layers: Layers,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published shape, in place of a model: cifar10, celeba64, lsun256 or mnist.",
            metavar="NAME",
            show_default=False,
            rich_help_panel="Model",
        ),
    ] = None,
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes to measure.", metavar="LIST", rich_help_panel=PANEL)
    ] = "1,8,64",
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Take turns with diffusers: its pipeline as documented; diffusers+: compiled, with all its speed "
            "guide says. May be given again.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Timed rounds, after a warm-up.", min=1, max=1000, metavar="N", rich_help_panel=PANEL)
    ] = 5,
    batches: Annotated[
        int | None,
        typer.Option(
            help="Batches a round \\[4 on a GPU, else 1].",
            min=1,
            max=1000,
            metavar="N",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None,
    files: Annotated[
        bool,
        typer.Option(
            "--files/--no-files",
            help="Write PNGs and sidecars, into a temporary folder, within the time.",
            rich_help_panel=PANEL,
        ),
    ] = True,
    psnr_images: Annotated[
        int,
        typer.Option(
            help="Images to compare with float32, where the dtype is another; 0: none.",
            min=0,
            max=100_000,
            metavar="N",
            rich_help_panel=PANEL,
        ),
    ] = 16,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw images a second over the batch size here.",
            metavar="FILE.png",
            show_default=False,
            rich_help_panel="Console",
        ),
    ] = None,
    overwrite: OverwriteFile = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Print only the numbers.", rich_help_panel="Console"),
    ] = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    [bold]Examples[/bold]

    \b
    ddim bench --batch-sizes 1,8
    ddim bench --architecture cifar10 --batch-sizes 8 --against diffusers
    ddim bench -m path/to/model --dtype bfloat16 --against diffusers,diffusers+ --plot speed.png
    ddim bench --steps 10 --repeats 3 --json

    Measure images a second, a batch size at a time, and what they are spent on.

    Of the settings, num_images, seeds beyond the first, batch_size and \\[output] mean nothing here.

    With --against, diffusers makes the same pictures in the same process, in turns, and the ratio of speeds is told.
    """
    sizes, rivals = parse_batch_sizes(batch_sizes), parse_against(against or [])
    to = name_plot(plot, overwrite) if plot is not None else None
    with tempfile.TemporaryDirectory(prefix="ddim-bench-") as folder, console.progress(quiet) as progress:
        from ddim_cli.evaluation.bench import Bench, Plan

        run = _resolve(layers, architecture, Path(folder))
        for warning in run.warnings:
            console.warn(warning)
        plan = Plan(run, sizes, Path(folder), repeats, batches, rivals, files, psnr_images)
        found = Bench(plan, console.stages(progress), console.warn).measure()
    # What took minutes to measure first: the plot may fail.
    if json:
        console.print_json(found)
    else:
        show(found, quiet)
    if to is not None:
        draw(to, found)


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """``"1,8,64"``, each once, ascending. Raises UsageError."""
    from ddim_cli.errors import UsageError

    sizes = []
    for word in text.split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= MOST_BATCH:
            raise UsageError(
                f"--batch-sizes {text}: {word.strip()!r} is no batch size; write numbers from 1 to {MOST_BATCH:,} "
                "with commas, for example 1,8,64"
            )
        sizes.append(int(word))
    return tuple(sorted(set(sizes)))


def parse_against(given: Sequence[str]) -> tuple[str, ...]:
    """``["diffusers,diffusers+"]``, each once. Raises UsageError."""
    from ddim_cli.config.layers import nearest
    from ddim_cli.errors import UsageError

    known = ("diffusers", "diffusers+")
    names = [word.strip() for text in given for word in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--against {name}: it takes {' and '.join(known)}{nearest(name, known)}")
    return tuple(dict.fromkeys(names))


def name_plot(path: Path, overwrite: bool) -> NamedFile:
    """Where to draw. UsageError for a plot that could not be drawn in the end: better now than after minutes."""
    from importlib.util import find_spec

    from ddim_cli.errors import missing_extra
    from ddim_cli.outputs.bench_plot import PLOT
    from ddim_cli.outputs.named import name_file

    if find_spec("matplotlib") is None:
        raise missing_extra("--plot", "matplotlib", "plot")
    return name_file(path, PLOT, "--plot", overwrite)


def _resolve(layers: Layers, architecture: str | None, folder: Path) -> Run:
    """The run of the settings, of a model that was named or of a published shape. Raises UsageError."""
    from ddim_cli.sampling.resolve import judge, resolve

    if architecture is None:
        return resolve(layers)
    from ddim_cli.config.layers import merge
    from ddim_cli.errors import UsageError
    from ddim_cli.evaluation.architectures import describe_architecture

    if "model.source" in layers[-1].values:
        raise UsageError("--model and --architecture are two ways to say which network; give one")
    model = describe_architecture(architecture, folder, merge(layers).config.model)
    return judge(merge([model.scheduler_layer(), *layers]), model)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _median(found: Mapping[str, Any], scale: float = 1.0) -> str:
    return _digits(found["median"] * scale)


def _with_spread(found: Mapping[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{_median(found)} ({_digits(low)}-{_digits(high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


# Name with its unit -> what of one batch size's result it shows.
Rows = dict[str, Callable[[Mapping[str, Any]], str]]

ROWS: Rows = {
    "images/s": lambda r: _with_spread(r["images_per_second"]),
    "ms an image and step": lambda r: _with_spread(r["ms_per_image_and_step"]),
    "time to first image, s": lambda r: _median(r["time_to_first_image_seconds"]),
    "loading, s": lambda r: _digits(r["load_seconds"]),
    "warm-up batch, s": lambda r: _digits(r["first_batch_seconds"]),
    "peak memory, MiB": lambda r: f"{r['peak_memory']['bytes'] / 2**20:,.0f}",
    "outside the UNet, %": lambda r: _percent(r["share_outside_network"]["median"]),
    "UNet, TFLOP/s": lambda r: _digits(r["flops_per_second"] / 1e12),
    "of the matrix peak, %": lambda r: _percent(r["share_of_matrix_peak"]),
}


def _rows(found: Mapping[str, Any]) -> Rows:
    """The table's rows; those of a contestant end with the ratio."""
    rows = dict(ROWS)
    for name in found["against"]:
        rows[f"{name}, images/s"] = lambda r, name=name: _with_spread(r["against"][name]["images_per_second"])
        rows[f"x {name}"] = lambda r, name=name: _with_spread(r["against"][name]["ratio"])
    return rows


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the numbers are of, a line each."""
    machine, model, first = found["machine"], found["model"], found["results"][0]
    in_float32 = f" in float32 ({machine['dtype']} is emulated)" if machine["emulated"] else ""
    lines = [
        f"{model['source']} ({model['parameters']:,} parameters, {model['channels']} x {model['height']} x "
        f"{model['width']}), {console.counted(len(found['sampling']['timesteps']), 'step')}, {machine['dtype']}"
        + (", compiled" if first["compiled"] else ""),
        f"{machine['device_name']} ({machine['device']}, {console.counted(machine['threads'], 'thread')}), torch "
        f"{machine['versions']['torch']}, diffusers {machine['versions']['diffusers']}",
        f"timed: {found['timed']}; {console.counted(found['repeats'], 'round')} of "
        f"{console.counted(found['batches'], 'batch')} after a warm-up, medians and quartiles",
        f"the UNet's time is {found['network_time']}; the matrix peak is "
        f"{_digits(machine['matrix_peak_flops_per_second'] / 1e12)} TFLOP/s{in_float32}; "
        f"memory is {first['peak_memory']['of']}",
        *(f"{name}: {text}" for name, text in found["against"].items()),
    ]
    return [*lines, found["stride"]] if found["stride"] else lines


def pictures(found: Mapping[str, Any]) -> list[str]:
    """How near the pictures are to diffusers' and to those of float32, a line each."""
    lines = []
    if found["against"] and found["machine"]["dtype"] == "float32":
        worst = max(a["largest_difference"] for r in found["results"] for a in r["against"].values())
        lines.append(f"the pictures differ from diffusers' by {worst}/255 at most")
    if found["psnr"] is not None:
        psnr, drawn = found["psnr"], found["model"]["kind"] == "architecture"
        lines.append(
            f"PSNR against float32 over {console.counted(psnr['images'], 'image')}: median {psnr['median_db']:.1f} dB, "
            f"worst {psnr['worst_db']:.1f} dB" + (" (random weights)" if drawn else "")
        )
    return lines


def show(found: Mapping[str, Any], quiet: bool = False) -> None:
    """A table with a column a batch size on a terminal, else a line a batch size; unless ``quiet``, what it is of."""
    screen = console.stdout()
    if screen.is_terminal:
        screen.print(_table(found))
    else:
        for result in found["results"]:
            values = "; ".join(f"{name}: {value(result)}" for name, value in _rows(found).items())
            screen.print(f"batch {result['batch_size']}: {values}", markup=False, soft_wrap=True)
    for line in [*([] if quiet else notes(found)), *pictures(found)]:
        screen.print(line, style="dim" if screen.is_terminal else "", markup=False, soft_wrap=True)


def _table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"ddim bench: {found['model']['source']}", title_justify="left", title_style="bold")
    table.add_column("batch size", no_wrap=True)
    for result in found["results"]:
        table.add_column(f"{result['batch_size']:,}", justify="right", overflow="fold")
    for name, value in _rows(found).items():
        style = "bold green" if name.startswith("x ") else "bold" if name == "images/s" else ""
        # A spread goes below its median, so that four batch sizes fit 80 columns.
        cells = [value(result).replace(" (", "\n").rstrip(")") for result in found["results"]]
        table.add_row(name, *cells, style=style)
    return table


def draw(to: NamedFile, found: Mapping[str, Any]) -> None:
    """``--plot``. Raises UsageError where matplotlib is missing, and RunError where the file cannot be written."""
    from ddim_cli.outputs.bench_plot import SpeedCurve, draw_speeds

    results, machine = found["results"], found["machine"]

    def curve(name: str, of: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> SpeedCurve:
        rates = [of(result)["images_per_second"] for result in results]
        sizes = [result["batch_size"] for result in results]
        return SpeedCurve(name, sizes, *([rate[key] for rate in rates] for key in ("median", "min", "max")))

    curves = [curve("ddim", lambda r: r)]
    curves += [curve(name, lambda r, name=name: r["against"][name]) for name in found["against"]]
    steps = console.counted(len(found["sampling"]["timesteps"]), "step")
    title = f"{found['model']['source']}: {steps}, {machine['dtype']}"
    to.write(draw_speeds(curves, title, f"{machine['device_name']}; {found['timed']}"))
    console.say(f"wrote {to}")
