"""``ddim bench``: how fast sampling is here, beside diffusers on the same model."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ddim_cli.cli import console
from ddim_cli.cli.options import (
    OF_BEGINNING,
    OF_INVERSION,
    OUTPUT,
    Json,
    Layers,
    OnlyNumbers,
    OverwriteFile,
    Verbose,
    option,
    with_settings,
)
from ddim_cli.cli.panels import counted, steps_text
from ddim_cli.cli.progress import RunProgress, showing_progress, stages

if TYPE_CHECKING:
    from ddim_cli.outputs.named import NamedFile
    from ddim_cli.sampling.resolve import Run

PANEL = "Measuring"
MOST_BATCH = 65536


@console.handles_errors
@with_settings(without=("num_images", "seeds", "batch_size", *OF_INVERSION, *OF_BEGINNING, *OUTPUT))
def bench(
    layers: Layers,
    architecture: Annotated[
        str | None,
        option(
            "Use random weights of a published shape: cifar10, celeba64, lsun256, mnist, or with text sd15 or sd21.",
            "Model",
            metavar="NAME",
        ),
    ] = None,
    batch_sizes: Annotated[str, option("Batch sizes to measure [1,8,64].", PANEL, metavar="LIST")] = "1,8,64",
    against: Annotated[
        list[str] | None,
        option(
            "Take turns with diffusers (its pipeline as documented) or diffusers+ (compiled, with all its speed guide "
            "says).",
            PANEL,
            metavar="NAME",
        ),
    ] = None,
    repeats: Annotated[int, option("Timed rounds, after a warm-up [5].", PANEL, min=1, max=1000, metavar="N")] = 5,
    batches: Annotated[
        int | None, option("Batches a round [4 on a GPU, else 1].", PANEL, min=1, max=1000, metavar="N")
    ] = None,
    files: Annotated[
        bool,
        option(
            "Time the writing of PNGs and sidecars too, into a temporary folder [yes].", PANEL, "--files/--no-files"
        ),
    ] = True,
    psnr_images: Annotated[
        int | None,
        option(
            "Images to compare with float32, for another dtype; 0: none [16; of a latent model 1].",
            PANEL,
            min=0,
            max=100_000,
            metavar="N",
        ),
    ] = None,
    plot: Annotated[
        Path | None, option("Plot images/s over the batch size to this file.", "Console", metavar="FILE.png")
    ] = None,
    overwrite: OverwriteFile = False,
    quiet: OnlyNumbers = False,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """
    Measure images per second, a batch size at a time, and what the time is spent on.

    With --against, diffusers makes the same pictures in the same process, in turns; the ratio of speeds is printed.

    A text-to-image model is given a prompt of the tool's own, unless there is one.

    Of a config, num_images, seeds beyond the first, batch_size and \\[output] are not used.

    [bold]Examples[/bold]

    \b
    ddim bench --batch-sizes 1,8
    ddim bench --architecture cifar10 --batch-sizes 8 --against diffusers
    ddim bench -m path/to/model --dtype bfloat16 --against diffusers,diffusers+ --plot speed.png
    ddim bench --architecture sd15 --batch-sizes 1 --steps 2 --against diffusers
    ddim bench --steps 10 --repeats 3 --json
    """
    sizes, rivals = parse_batch_sizes(batch_sizes), parse_against(against or [])
    to = name_plot(plot, overwrite) if plot is not None else None
    with (
        tempfile.TemporaryDirectory(prefix="ddim-bench-") as folder,
        showing_progress(quiet, RunProgress()) as progress,
    ):
        from ddim_cli.evaluation.bench import Bench, Benchmark

        run = _resolve(layers, architecture, Path(folder))
        for warning in run.warnings:
            console.warn(warning)
        benchmark = Benchmark(run, sizes, Path(folder), repeats, batches, rivals, files, psnr_images)
        measured = Bench(benchmark, stages(progress), console.warn).measure()
    # What took minutes to measure first: the plot may fail.
    if json:
        console.print_json(measured)
    else:
        show(measured, quiet)
    if to is not None:
        draw(to, measured)


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
    """Name the plot. Raises UsageError for one that could not be drawn: better now than after minutes."""
    from importlib.util import find_spec

    from ddim_cli.errors import missing_extra
    from ddim_cli.outputs.bench_plot import PLOT
    from ddim_cli.outputs.named import name_file

    if find_spec("matplotlib") is None:
        raise missing_extra("--plot", "matplotlib", "plot")
    return name_file(path, PLOT, "--plot", overwrite)


def _resolve(layers: Layers, architecture: str | None, folder: Path) -> Run:
    """Resolve the run of a named model or of a published shape. Raises UsageError."""
    from ddim_cli.config.layers import Layer, merge
    from ddim_cli.errors import UsageError
    from ddim_cli.evaluation.text_architectures import DEFAULT_PROMPT
    from ddim_cli.sampling.resolve import refuse_init, resolve, settle

    prompt = Layer({"sampling.prompt": DEFAULT_PROMPT}, {"sampling.prompt": "default of ddim bench"})
    if architecture is None:
        run = resolve(layers, conditions_follow=True, reads_init=False)
        refuse_init(run, "bench measures sampling from noise; leave it out")
        if run.model.inpaints:
            raise UsageError(f"bench: {run.model.name} fills in masks of pictures, which bench does not measure")
        prompts = [prompt] if run.model.takes_text else []
        return resolve([*prompts, *layers], describe=lambda settings, cached_only: run.model)
    from ddim_cli.evaluation.architectures import describe_architecture

    if "model.source" in layers[-1].values:
        raise UsageError("--model and --architecture are two ways to say which network; give one")
    model = describe_architecture(architecture, folder, merge(layers).config.model)
    prompts = [prompt] if model.takes_text else []
    return settle(merge([model.settings_layer(), *prompts, *layers]), model)


def _digits(value: float) -> str:
    """Write three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _median(spread: Mapping[str, Any]) -> str:
    return _digits(spread["median"])


def _with_spread(spread: Mapping[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{_median(spread)} ({_digits(low)}-{_digits(high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


# Name with its unit -> what of one batch size's result it shows.
Rows = dict[str, Callable[[Mapping[str, Any]], str]]

ROWS: Rows = {
    "images/s": lambda r: _with_spread(r["images_per_second"]),
    "ms an image and step": lambda r: _with_spread(r["ms_per_image_and_step"]),
    "of the UNet, ms": lambda r: _with_spread(r["network_ms_per_image_and_step"]),
    "time to first image, s": lambda r: _median(r["time_to_first_image_seconds"]),
    "loading, s": lambda r: _digits(r["load_seconds"]),
    "warm-up batch, s": lambda r: _digits(r["first_batch_seconds"]),
    "peak memory, MiB": lambda r: f"{r['peak_memory']['bytes'] / 2**20:,.0f}",
    "outside the UNet, %": lambda r: _percent(r["share_outside_network"]["median"]),
    "UNet, TFLOP/s": lambda r: _digits(r["flops_per_second"] / 1e12),
    "of the matrix peak, %": lambda r: _percent(r["share_of_matrix_peak"]),
}


def _rows(measured: Mapping[str, Any]) -> Rows:
    """Return the table's rows, those of each rival last."""
    rows = dict(ROWS)
    for name in measured["against"]:
        keys = [(f"{name}, images/s", "images_per_second"), (f"x {name}", "ratio")]
        if all(result["against"][name]["network_ratio"] for result in measured["results"]):
            keys.append((f"x {name}, the UNet alone", "network_ratio"))
        for label, key in keys:
            rows[label] = functools.partial(_of_rival, name, key)
        rows[f"{name}, peak memory, MiB"] = functools.partial(_memory_of_rival, name)
    return rows


def _memory_of_rival(name: str, result: Mapping[str, Any]) -> str:
    return f"{result['against'][name]['peak_memory']['bytes'] / 2**20:,.0f}"


def _of_rival(name: str, key: str, result: Mapping[str, Any]) -> str:
    return _with_spread(result["against"][name][key])


def notes(measured: Mapping[str, Any]) -> list[str]:
    """Say what the numbers are of, a line each."""
    machine, model, first = measured["machine"], measured["model"], measured["results"][0]
    in_float32 = f" in float32 ({machine['dtype']} is emulated)" if machine["emulated"] else ""
    lines = [
        f"{model['source']} ({model['parameters']:,} parameters, {model['channels']} x {model['height']} x "
        f"{model['width']}), {_steps(measured)}, {machine['dtype']}" + (", compiled" if first["compiled"] else ""),
        f"{machine['device_name']} ({machine['device']}, {counted(machine['threads'], 'thread')}), torch "
        f"{machine['versions']['torch']}, diffusers {machine['versions']['diffusers']}",
        f"timed: {measured['timed']}; {counted(measured['repeats'], 'round')} of "
        f"{counted(measured['batches'], 'batch')} after a warm-up, medians and quartiles",
        f"the UNet's time is {measured['network_time']}; the matrix peak is "
        f"{_digits(machine['matrix_peak_flops_per_second'] / 1e12)} TFLOP/s{in_float32}; "
        f"memory is {first['peak_memory']['of']}",
        *(f"{name}: {text}" for name, text in measured["against"].items()),
    ]
    return [*lines, measured["stride"]] if measured["stride"] else lines


def _steps(measured: Mapping[str, Any]) -> str:
    sampling = measured["sampling"]
    return steps_text(len(sampling["timesteps"]), sampling.get("order", 1))


def pictures(measured: Mapping[str, Any]) -> list[str]:
    """Say how near the pictures are to diffusers' and to those of float32, a line each."""
    lines = []
    if measured["against"] and measured["machine"]["dtype"] == "float32":
        worst = max(a["largest_difference"] for r in measured["results"] for a in r["against"].values())
        lines.append(f"the pictures differ from diffusers' by {worst}/255 at most")
    if measured["psnr"] is not None:
        psnr, drawn = measured["psnr"], measured["model"]["kind"] == "architecture"
        lines.append(
            f"PSNR against float32 over {counted(psnr['images'], 'image')}: median {psnr['median_db']:.1f} dB, "
            f"worst {psnr['worst_db']:.1f} dB" + (" (random weights)" if drawn else "")
        )
    return lines


def show(measured: Mapping[str, Any], quiet: bool = False) -> None:
    """Print a table with a column a batch size on a terminal, else a line a batch size; unless ``quiet``, notes too."""
    screen = console.stdout()
    if screen.is_terminal:
        screen.print(_table(measured))
    else:
        for result in measured["results"]:
            values = "; ".join(f"{name}: {value(result)}" for name, value in _rows(measured).items())
            screen.print(f"batch {result['batch_size']}: {values}", markup=False, soft_wrap=True)
    for line in [*([] if quiet else notes(measured)), *pictures(measured)]:
        screen.print(line, style="dim" if screen.is_terminal else "", markup=False, soft_wrap=True)


def _table(measured: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"ddim bench: {measured['model']['source']}", title_justify="left", title_style="bold")
    table.add_column("batch size", no_wrap=True)
    for result in measured["results"]:
        table.add_column(f"{result['batch_size']:,}", justify="right", overflow="fold")
    for name, value in _rows(measured).items():
        style = "bold green" if name.startswith("x ") else "bold" if name == "images/s" else ""
        # A spread goes below its median, so that four batch sizes fit 80 columns.
        cells = [value(result).replace(" (", "\n").rstrip(")") for result in measured["results"]]
        table.add_row(name, *cells, style=style)
    return table


def draw(to: NamedFile, measured: Mapping[str, Any]) -> None:
    """Draw ``--plot``. Raises UsageError where matplotlib is missing, and RunError where the file cannot be written."""
    from ddim_cli.outputs.bench_plot import SpeedCurve, draw_speeds

    machine, sizes = measured["machine"], [result["batch_size"] for result in measured["results"]]
    contestants = {"ddim": measured["results"]}
    contestants |= {name: [result["against"][name] for result in measured["results"]] for name in measured["against"]}
    curves = []
    for name, results in contestants.items():
        rates = [result["images_per_second"] for result in results]
        curves.append(SpeedCurve(name, sizes, *([rate[key] for rate in rates] for key in ("median", "min", "max"))))
    title = f"{measured['model']['source']}: {_steps(measured)}, {machine['dtype']}"
    to.write(draw_speeds(curves, title, f"{machine['device_name']}; {measured['timed']}"))
    console.say(f"wrote {to}")
