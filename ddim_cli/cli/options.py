"""Options that commands share: every flag that stands for a TOML key, -c, --set, and the console's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from ddim_cli.cli.signatures import named_place, with_signature
from ddim_cli.config.schema import FLAGS, SECTIONS

if TYPE_CHECKING:
    from ddim_cli.config.layers import Layer
    from ddim_cli.models.describe import ModelDescription


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def option(text: str, panel: str | None = None, *names: str, **more: Any) -> Any:
    """An option for typer; ``text`` ends with its default in brackets, which rich would take for markup."""
    return typer.Option(*names, help=text.replace("[", "\\["), rich_help_panel=panel, show_default=False, **more)


def argument(text: str, metavar: str, **more: Any) -> Any:
    return typer.Argument(help=text, metavar=metavar, show_default=False, **more)


def place_argument(text: str, metavar: str) -> Any:
    """An argument that names a file or a folder, of this machine or in an object store: see `files.place_of`."""
    return argument(text, metavar, parser=named_place)


def _help(key: str) -> str:
    """A key's meaning, the words it takes, and in brackets its default."""
    section, name = key.split(".")
    field = SECTIONS[section].model_fields[name]
    text, words = field.description or "", get_args(field.annotation)
    if words and all(isinstance(word, str) for word in words):
        about, semicolon, more = text.partition(";")
        text = f"{about}: {', '.join(words)}{semicolon}{more}"
    if section == "scheduler":
        # What the model's own files say is no default of ours.
        text += " [the model's]"
    elif isinstance(field.default, bool):
        text += f" [{'yes' if field.default else 'no'}]"
    elif field.default is not None:
        text += f" [{field.default:g}]" if isinstance(field.default, float) else f" [{field.default}]"
    return f"{text}."


def setting(parameter: str, text: str | None = None) -> Any:
    """The option that sets a key, for typer. ``text`` replaces the key's own help."""
    key, flag = _FLAGS[parameter]
    return option(text or _help(key), key.partition(".")[0].capitalize(), *flag.names, metavar=flag.metavar)


def _annotation(parameter: str) -> Any:
    """What typer reads an option as; what is more than a number or a switch is read by the settings themselves."""
    key, flag = _FLAGS[parameter]
    section, name = key.split(".")
    if flag.repeated:
        return Annotated[list[str] | None, setting(parameter)]
    kind: Any = SECTIONS[section].model_fields[name].annotation
    # A number or nothing is a number; nothing is what is not given.
    kind = next((one for one in (int, float) if kind == one | None), kind)
    kind = bool if bool in (kind, *get_args(kind)) else kind if kind in (int, float) else str
    return Annotated[kind | None, setting(parameter)]


# The options that set a key, by the name that Python has for them; which pictures of seeds; what a folder of one
# picture a seed has besides; what single pictures have; and all that say where files go.
_FLAGS = {flag.parameter: (key, flag) for key, flag in FLAGS.items()}
SETTINGS = tuple(_FLAGS)
SEEDS = ("num_images", "seed", "seeds")
OF_A_FOLDER = ("grid", "subdirs", "format", "image_format", "quality")
OF_A_PICTURE = ("parameters",)
OF_INVERSION = ("refine",)
OF_BEGINNING = ("init", "strength", "mask", "resample", "variation_seed", "variation_strength")
OUTPUT = tuple(parameter for parameter, (key, _) in _FLAGS.items() if key.startswith("output."))

ConfigFiles = Annotated[
    list[Path] | None,
    option(
        "Take settings from a TOML file; of several, a later one wins.", "Settings", "--config", "-c", metavar="FILE"
    ),
]
Assignments = Annotated[
    list[str] | None,
    option("Set any TOML key, for example sampling.eta=0.5.", "Settings", "--set", metavar="KEY=VALUE"),
]
Part = Annotated[
    str | None,
    option(
        "Make only part I of N of the plan: 0/8. env/8: of 8 the one of this task of a Slurm array or a Kubernetes "
        "Indexed Job.",
        "Output",
        "--shard",
        metavar="I/N",
    ),
]
Overwrite = Annotated[bool, option("Replace what is in the output folder.", "Output", "--overwrite")]
OverwriteFile = Annotated[bool, option("Replace the file even if ddim did not write it.", None, "--overwrite")]
DryRun = Annotated[bool, option("Print the plan without writing anything.", "Output", "--dry-run")]
Gif = Annotated[bool, option("Write an animation too.", "Output", "--gif")]
Extractor = Annotated[
    str | None,
    option(
        "Network whose features are compared: a file of TorchScript or torch.export, or mnist, the bundled digit "
        "classifier [Inception; for --reference mnist the digit classifier].",
        "Features",
        metavar="FILE|mnist",
    ),
]
ExtractorInput = Annotated[
    Literal["unit", "signed", "bytes"] | None,
    option(
        "How that network takes pictures: float32 from 0 to 1, float32 from -1 to 1, or uint8 [unit].",
        "Features",
    ),
]
Inception = Annotated[
    Path | None,
    option("File of Inception's weights (torch-fidelity's), if they cannot be downloaded.", "Features", metavar="FILE"),
]
ImageSize = Annotated[
    str | None,
    option("Size of an image in pixels, or height and width as 32x48, if the model does not say.", metavar="N|HxW"),
]
Quiet = Annotated[bool, option("Run without progress and summary.", "Console", "--quiet", "-q")]
OnlyNumbers = Annotated[bool, option("Run without progress; print only the numbers.", "Console", "--quiet", "-q")]
Verbose = Annotated[bool, option("Print more, with tracebacks of errors.", "Console", "--verbose", "-v")]
LogFile = Annotated[Path | None, option("Append a copy of all messages to this file.", "Console", metavar="FILE")]
Json = Annotated[bool, option("Print one JSON object to stdout, everything else to stderr.", "Console", "--json")]
# What `with_settings` hands to a command: settings, lowest first.
Layers = list["Layer"]


@dataclass(frozen=True)
class RunOptions:
    """The options of every command that makes pictures."""

    shard: Part = None
    overwrite: Overwrite = False
    dry_run: DryRun = False
    quiet: Quiet = False
    verbose: Verbose = False
    log_file: LogFile = None
    json: Json = False


def build_layers(config: list[Path] | None, assignments: list[str] | None, flags: dict[str, Any]) -> list[Layer]:
    """Files, --set and flags as layers, lowest first. Raises ConfigError."""
    from ddim_cli.config.layers import flags_layer, parse_set, read_file

    values: dict[str, tuple[str, Any]] = {}
    for parameter, value in flags.items():
        if value is not None:
            key, flag = _FLAGS[parameter]
            on, _, off = flag.names[0].partition("/")
            if flag.repeated:
                value = list(value)
            values[key] = (off if value is False and off else on, value if flag.read is None else flag.read(value))
    return [*map(read_file, config or []), parse_set(assignments or []), flags_layer(values)]


def describe(source: str, image_size: str | None, assignments: list[str] | None) -> ModelDescription:
    """Describe the model of a command without settings of a run. Raises ConfigError and ModelError."""
    from ddim_cli.config.layers import merge
    from ddim_cli.models.describe import describe_model

    layers = build_layers([], assignments, {"model": source, "image_size": image_size})
    return describe_model(merge(layers).config.model)


def with_settings(
    only: tuple[str, ...] = SETTINGS, without: tuple[str, ...] = (), each_file: bool = False, runs: bool = False
) -> Callable[[Callable], Callable]:
    """Give a command -c, --set and the options of the settings named ``only``, less those of ``without``.

    The command's first parameter takes them as a list of `Layer`; its own options follow. With ``each_file`` every -c
    file stands by itself, and the first parameter is name -> list of `Layer`. A command that ``runs`` a job gets the
    options of `RunOptions` as its second parameter.
    """
    names = tuple(name for name in SETTINGS if name in only and name not in without)

    def decorate(command: Callable) -> Callable:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[2 if runs else 1 :]
        run_options = list(inspect.signature(RunOptions, eval_str=True).parameters.values()) if runs else []
        settings = {"config": ConfigFiles, **{name: _annotation(name) for name in names}, "assignments": Assignments}
        parameters = [
            *(inspect.Parameter(n, _KEYWORD, default=None, annotation=kind) for n, kind in settings.items()),
            *(p.replace(kind=_KEYWORD) for p in (*own, *run_options)),
        ]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            flags = {name: given.pop(name) for name in names}
            files, assignments = given.pop("config"), given.pop("assignments")
            options = [RunOptions(**{p.name: given.pop(p.name, p.default) for p in run_options})] if runs else []
            if not each_file:
                return command(build_layers(files, assignments, flags), *options, **given)
            each = {str(path): [path] for path in files or []} or {"defaults": []}
            layers = {name: build_layers(own, assignments, flags) for name, own in each.items()}
            return command(layers, *options, **given)

        del run.__wrapped__
        with_signature(run, parameters)
        return run

    return decorate
