"""Options that commands share: every flag that stands for a TOML key, -c, --set, and the console's own."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer


@dataclass(frozen=True)
class Flag:
    """A flag and the TOML key it sets."""

    key: str
    type: Any
    names: tuple[str, ...]
    help: str
    panel: str
    metavar: str | None = None

    def annotation(self) -> Any:
        # Defaults are written [so], which rich would take for markup.
        text = self.help.replace("[", "\\[")
        option = typer.Option(
            *self.names, help=text, rich_help_panel=self.panel, metavar=self.metavar, show_default=False
        )
        return Annotated[self.type | None, option]


_MODEL, _SAMPLING, _SCHEDULER, _RUNTIME, _OUTPUT = "Model", "Sampling", "Scheduler", "Runtime", "Output"

FLAGS: dict[str, Flag] = {
    "model": Flag(
        "model.source",
        str,
        ("--model", "-m"),
        "A bundled name, a directory, a checkpoint, a Hub id [mnist].",
        _MODEL,
        "SOURCE",
    ),
    "num_images": Flag("sampling.num_images", int, ("--num-images", "-n"), "Number of images [16].", _SAMPLING, "N"),
    "seed": Flag(
        "sampling.seed", int, ("--seed",), "Seed of the first image; the next has the next seed [0].", _SAMPLING, "S"
    ),
    "seeds": Flag(
        "sampling.seeds", str, ("--seeds",), "Seeds one by one, in place of --seed and -n: 0-63,100.", _SAMPLING, "LIST"
    ),
    "batch_size": Flag(
        "sampling.batch_size",
        str,
        ("--batch-size", "-b"),
        "Images a batch, or auto: what memory allows [auto].",
        _SAMPLING,
        "N",
    ),
    "steps": Flag("sampling.steps", int, ("--steps",), "Number of denoising steps [50].", _SAMPLING, "N"),
    "eta": Flag(
        "sampling.eta", float, ("--eta",), "0: DDIM, deterministic. 1: the noise of DDPM [0.0].", _SAMPLING, "X"
    ),
    "beta_schedule": Flag(
        "scheduler.beta_schedule",
        str,
        ("--beta-schedule",),
        "linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace or exp [the model's].",
        _SCHEDULER,
        "NAME",
    ),
    "spacing": Flag(
        "scheduler.timestep_spacing",
        str,
        ("--spacing",),
        "leading, trailing, linspace, quadratic or uniform [the model's].",
        _SCHEDULER,
        "NAME",
    ),
    "prediction_type": Flag(
        "scheduler.prediction_type",
        str,
        ("--prediction-type",),
        "epsilon, sample or v_prediction [the model's].",
        _SCHEDULER,
        "NAME",
    ),
    "thresholding": Flag(
        "scheduler.thresholding",
        bool,
        ("--thresholding/--no-thresholding",),
        "Dynamic thresholding of the predicted x0 [the model's].",
        _SCHEDULER,
    ),
    "clip_sample": Flag(
        "scheduler.clip_sample",
        bool,
        ("--clip-sample/--no-clip-sample",),
        "Clip the predicted x0 in every step [the model's].",
        _SCHEDULER,
    ),
    "image_size": Flag(
        "model.image_size",
        str,
        ("--image-size",),
        "Size of an image, or its height and width, 32x48 [the model's].",
        _MODEL,
        "N|HxW",
    ),
    "classes": Flag(
        "sampling.classes", str, ("--classes",), "Classes, of a class-conditional model: 3 or 0-9.", _SAMPLING, "LIST"
    ),
    "guidance_scale": Flag(
        "sampling.guidance_scale",
        float,
        ("--guidance-scale",),
        "Classifier-free guidance; 1 is off [1.0].",
        _SAMPLING,
        "W",
    ),
    "guidance_rescale": Flag(
        "sampling.guidance_rescale", float, ("--guidance-rescale",), "Rescale guided predictions [0.0].", _SAMPLING, "R"
    ),
    "device": Flag("runtime.device", str, ("--device",), "auto, cpu, cuda, cuda:N or mps [auto].", _RUNTIME, "NAME"),
    "dtype": Flag(
        "runtime.dtype",
        str,
        ("--dtype",),
        "Of the network: auto, float32, bfloat16 or float16 [auto].",
        _RUNTIME,
        "NAME",
    ),
    "compile": Flag(
        "runtime.compile",
        bool,
        ("--compile/--no-compile",),
        "Run the network as compiled code that is kept [where it is kept, or pays].",
        _RUNTIME,
    ),
    "out": Flag("output.dir", str, ("--out", "-o"), "Output folder [outputs/MODEL-Nsteps-HASH].", _OUTPUT, "DIR"),
    "grid": Flag("output.grid", bool, ("--grid/--no-grid",), "Write a contact sheet, grid.png [yes].", _OUTPUT),
    "subdirs": Flag(
        "output.subdirs", bool, ("--subdirs/--no-subdirs",), "A folder for every 1,000 seeds [no].", _OUTPUT
    ),
    "fsync": Flag(
        "output.fsync", bool, ("--fsync/--no-fsync",), "Have every file survive a power cut; slower [no].", _OUTPUT
    ),
}

# Of FLAGS: which pictures; and how a picture comes about and into which folder. The rest is
# for folders of one picture a seed.
SEEDS = ("num_images", "seed", "seeds")
PICTURE = (
    "model",
    "batch_size",
    "steps",
    "eta",
    "beta_schedule",
    "spacing",
    "prediction_type",
    "thresholding",
    "clip_sample",
    "image_size",
    "classes",
    "guidance_scale",
    "guidance_rescale",
    "device",
    "dtype",
    "compile",
    "out",
    "fsync",
)

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        "-c",
        help="TOML file; may be given again, a later one wins.",
        metavar="FILE",
        show_default=False,
        rich_help_panel="Settings",
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any TOML key, for example sampling.eta=0.5; may be given again.",
        metavar="KEY=VALUE",
        show_default=False,
        rich_help_panel="Settings",
    ),
]
Part = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help="Make only part I of N of the plan, for job arrays: 0/8.",
        metavar="I/N",
        show_default=False,
        rich_help_panel="Output",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is in the output folder.", rich_help_panel="Output")
]
OverwriteFile = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file even where it is none that ddim has made.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.", rich_help_panel="Output")]
Gif = Annotated[bool, typer.Option("--gif", help="Write an animation too.", rich_help_panel="Output")]
ExtractorInput = Annotated[
    Literal["unit", "signed", "bytes"] | None,
    typer.Option(
        help="How that network takes pictures: float32 from 0 to 1, float32 from -1 to 1, or uint8 \\[unit].",
        show_default=False,
        rich_help_panel="Features",
    ),
]
Inception = Annotated[
    Path | None,
    typer.Option(
        help="Inception's weights, where they cannot be fetched: torch-fidelity's file.",
        metavar="FILE",
        show_default=False,
        rich_help_panel="Features",
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        help="Size of an image, or its height and width, 32x48, where the model does not tell.",
        metavar="N|HxW",
        show_default=False,
    ),
]
# What `with_settings` hands to a command: settings, lowest first.
Layers = list["Layer"]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.", rich_help_panel="Console")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Say more, and show tracebacks.", rich_help_panel="Console")
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        help="Append a plain copy of what is said on stderr.",
        metavar="FILE",
        show_default=False,
        rich_help_panel="Console",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object on stdout, everything else on stderr.", rich_help_panel="Console"),
]


def named_path(text: str) -> Path:
    """A path as it was typed. Refuses an empty one, of which `Path` makes the current folder."""
    if not text:
        raise typer.BadParameter("the name is empty; name a file or a folder")
    return Path(text)


def with_named_paths(command: Callable) -> None:
    """Have every option and argument of a command that is a path go through `named_path`."""
    signature = inspect.signature(command, eval_str=True)
    for parameter in signature.parameters.values():
        # Annotated[list[Path] | None, typer.Option(...)]
        kind, *infos = get_args(parameter.annotation) or (parameter.annotation,)
        if Path in _types_in(kind):
            for info in infos:
                info.parser = named_path
    # Typer reads both, and would find the annotations as they were written.
    command.__signature__ = signature
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types_in(inner)


def _image_size(text: str) -> int | list[int]:
    """``"32"``, or ``"32x48"``: height and width. Raises UsageError."""
    from ddim_cli.errors import UsageError

    match = re.fullmatch(r"([0-9]{1,9})(?:[xX]([0-9]{1,9}))?", text.strip())
    if match is None:
        raise UsageError(f"--image-size {text}: write a number of pixels, or height and width, for example 32x48")
    height, width = match.groups()
    return int(height) if width is None else [int(height), int(width)]


def _flags_layer(given: dict[str, Any]) -> Layer:
    from ddim_cli.config.layers import flags_layer

    values: dict[str, tuple[str, Any]] = {}
    for name, value in given.items():
        if value is None:
            continue
        flag = FLAGS[name]
        if name == "batch_size" and value.isdecimal():
            value = int(value)
        elif name == "image_size":
            value = _image_size(value)
        on, _, off = flag.names[0].partition("/")
        values[flag.key] = (off if value is False and off else on, value)
    return flags_layer(values)


def build_layers(config: list[Path] | None, assignments: list[str] | None, flags: dict[str, Any]) -> list[Layer]:
    """Files, --set and flags as layers, lowest first. Raises ConfigError."""
    from ddim_cli.config.layers import parse_set, read_file

    return [*map(read_file, config or []), parse_set(assignments or []), _flags_layer(flags)]


def plan_layer(count: int, origin: str) -> Layer:
    """A plan of as many images as there are pictures of no seed; the batch size, where it is auto, comes from it."""
    from ddim_cli.config.layers import Layer

    values = {"sampling.seed": 0, "sampling.num_images": count}
    return Layer(values, dict.fromkeys(values, origin))


def build_schedules(
    config: list[Path] | None, assignments: list[str] | None, flags: dict[str, Any]
) -> dict[str, list[Layer]]:
    """As `build_layers`, but each file by itself: name -> layers. Raises ConfigError."""
    files = {str(path): [path] for path in config or []} or {"defaults": []}
    return {name: build_layers(paths, assignments, flags) for name, paths in files.items()}


def _with_shared(build: Callable, names: tuple[str, ...]) -> Callable[[Callable], Callable]:
    """Give a command -c, --set and the flags of ``names``; what ``build`` makes of them is its first argument."""

    def decorate(command: Callable) -> Callable:
        keyword = inspect.Parameter.KEYWORD_ONLY
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [
            inspect.Parameter("config", keyword, default=None, annotation=ConfigFiles),
            *(inspect.Parameter(n, keyword, default=None, annotation=FLAGS[n].annotation()) for n in names),
            inspect.Parameter("assignments", keyword, default=None, annotation=Assignments),
            *(p.replace(kind=keyword) for p in own),
        ]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            flags = {name: given.pop(name) for name in names}
            return command(build(given.pop("config"), given.pop("assignments"), flags), **given)

        # Typer reads the options off the signature.
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return decorate


def with_settings(*names: str) -> Callable[[Callable], Callable]:
    """Give a command -c, --set and the flags of ``names`` (all, if none is named).

    The command's first parameter takes them as a list of `Layer`; its own options follow.
    """
    return _with_shared(build_layers, tuple(name for name in FLAGS if name in names or not names))


def with_schedules(*names: str) -> Callable[[Callable], Callable]:
    """As `with_settings`, but every -c file stands by itself: the first parameter is name -> list of `Layer`."""
    return _with_shared(build_schedules, names)
