"""Layers of settings: where each value comes from, and which one wins.

Lowest first: the defaults, the model's own scheduler_config.json, each ``-c`` file in the order
given, ``--set``, flags. Every layer is validated by itself, so that a wrong value is reported where
it stands even if a higher layer replaces it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from ddim_cli.config.lines import KeyLines, key_lines
from ddim_cli.config.schema import KEYS, SECTIONS, Config
from ddim_cli.errors import ConfigError, UsageError

# Two ways to say one thing: a layer may use only one of them, and it replaces the other of lower layers.
EXCLUSIVE: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (frozenset({"sampling.seed", "sampling.num_images"}), frozenset({"sampling.seeds"})),
    (frozenset({"sampling.steps"}), frozenset({"sampling.timesteps"})),
)

_BOTH_WAYS = (*EXCLUSIVE, *((b, a) for a, b in EXCLUSIVE))


def replaced_by(key: str, chosen: Collection[str]) -> str | None:
    """The one of the ``chosen`` keys that says what ``key`` would, so that ``key`` has no effect."""
    others = next((others for mine, others in _BOTH_WAYS if key in mine), frozenset[str]())
    return next((other for other in sorted(others) if other in chosen), None)


# --set takes these for strings without quotes: names and paths.
_BARE_WORD = re.compile(r"[A-Za-z_./~][\w./~-]*")
_BARE_KEY = re.compile(r"[\w-]+")


@dataclass(frozen=True)
class Layer:
    """Settings from one place: dotted key -> value, and dotted key -> where exactly ("run.toml:3", "--steps").

    ``sweep`` is the file's table of that name as it stands, and a function path -> where exactly; see `config.sweep`.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, str]
    sweep: tuple[Any, Callable[..., str]] | None = None


@dataclass(frozen=True)
class Resolved:
    """The settings that hold, and where each came from."""

    config: Config
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        return self.origins.get(key, "default")


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for the nearest of ``known``, or nothing if none is near."""
    known = list(known)
    # By the last part: what a key of the right table shares with all others of it says nothing.
    last = {k.rpartition(".")[2]: k for k in reversed(known)}
    last |= {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == name.rpartition(".")[0]}
    matches = [last[m] for m in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return f"; did you mean {matches[0]}?" if matches else ""


def describe_allowed(schema: Mapping[str, Any]) -> str:
    """What a JSON schema of one value allows, in words."""
    if "anyOf" in schema:
        return " or ".join(describe_allowed(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return ("one of " if len(options) > 1 else "") + ", ".join(json.dumps(o) for o in options)
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} values, each {describe_allowed(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list of {describe_allowed(schema['items']).removeprefix('an ').removeprefix('a ')}s"
    words = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}
    text = words.get(schema.get("type", ""), "a table")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{text} from {low:g} to {high:g}" if isinstance(low, float) else f"{text} from {low} to {high}"
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (
            ("exclusiveMinimum", "above"),
            ("minimum", "of at least"),
            ("maximum", "of at most"),
            ("exclusiveMaximum", "below"),
        )
        if key in schema
    ]
    return " ".join([text, " and ".join(bounds)]).strip()


def key_schema(key: str) -> dict[str, Any]:
    """The JSON schema of one dotted key."""
    section, name = key.split(".")
    return SECTIONS[section].model_json_schema()["properties"][name]


def _problem(origin: str, key: str, value: Any, error: Mapping[str, Any]) -> str:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if error["type"] == "value_error":
        return f"{origin}: {key} = {shown}: {error['ctx']['error']}"
    schema = key_schema(key)
    if "pattern" in schema:
        return f"{origin}: {key} = {shown} is not allowed; it takes {schema['description'].partition(': ')[2]}"
    hint = nearest(value, schema["enum"]) if isinstance(value, str) and "enum" in schema else ""
    return f"{origin}: {key} = {shown} is not allowed; it takes {describe_allowed(schema)}{hint}"


def validate_layer(layer: Layer) -> None:
    """Raise ConfigError for unknown keys, wrong types, values out of bounds and exclusive pairs within ``layer``."""
    problems: list[str] = []
    sections: dict[str, dict[str, Any]] = {}
    for key, value in layer.values.items():
        section, _, name = key.partition(".")
        if key in KEYS:
            sections.setdefault(section, {})[name] = value
        elif key in SECTIONS:
            problems.append(f"{layer.origins[key]}: {key} is a table; write [{key}] with keys below it")
        elif key.startswith("["):
            problems.append(f"{layer.origins[key]}: unknown table {key}{nearest(key, [f'[{s}]' for s in SECTIONS])}")
        else:
            problems.append(f"{layer.origins[key]}: unknown key {key}{nearest(key, KEYS)}")
    for section, values in sections.items():
        try:
            SECTIONS[section].model_validate(values)
        except ValidationError as error:
            told: set[str] = set()
            for e in error.errors():
                name = str(e["loc"][0])
                key = f"{section}.{name}"
                if name not in told:
                    problems.append(_problem(layer.origins[key], key, values[name], e))
                told.add(name)
    for one, other in EXCLUSIVE:
        first, second = sorted(one & layer.values.keys()), sorted(other & layer.values.keys())
        if first and second:
            a, b = first[0], second[0]
            problems.append(
                f"{layer.origins[b]}: {b} and {a} ({layer.origins[a]}) say the same thing in two ways; keep one"
            )
    if problems:
        raise ConfigError(*problems)


def _flatten(table: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], str, Any]]:
    """(path, key, value) of every setting; a table that is no section is one entry, its key in brackets."""
    for section, values in table.items():
        if not isinstance(values, Mapping):
            yield (section,), _shown(section), values
        elif section not in SECTIONS:
            yield (section,), f"[{_shown(section)}]", values
        else:
            yield from (((section, name), f"{section}.{_shown(name)}", value) for name, value in values.items())


def _shown(name: Any) -> str:
    """A key as it is written: quoted where it is not a bare word, so that "a.b" is no key b of a table a."""
    return name if isinstance(name, str) and _BARE_KEY.fullmatch(name) else json.dumps(name, default=str)


def read_file(path: Path) -> Layer:
    """Read a TOML file into a layer, validated. Raises ConfigError with file, line and, for syntax, column."""
    try:
        # Some editors put a byte-order mark first.
        text = path.read_bytes().decode("utf-8-sig")
        table = tomli.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        # Of ValueErrors, tomli's own for a syntax error, and Python's for a number of thousands of digits.
        reason = str(error).partition(";")[0] or "nested too deeply"
        raise ConfigError(f"{path}: not valid TOML: {reason}") from None
    return table_layer(table, str(path), key_lines(text))


def table_layer(table: Mapping[str, Any], origin: str, lines: KeyLines | None = None) -> Layer:
    """A nested table -> a layer, validated. ``lines`` (see `lines.key_lines`) refines ``origin``."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def where(*path: str) -> str:
        line = lines.line_of(path) if lines is not None else None
        return f"{origin}:{line}" if line is not None else origin

    for path, key, value in _flatten({k: v for k, v in table.items() if k != "sweep"}):
        values[key] = value
        origins[key] = where(*path)
    layer = Layer(values, origins, (table["sweep"], where) if "sweep" in table else None)
    validate_layer(layer)
    return layer


def _toml_value(text: str, where: str) -> Any:
    """What ``text`` is in TOML; a bare word is taken as a string. Raises ConfigError."""
    try:
        table = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        table = {"value": text.strip()} if _BARE_WORD.fullmatch(text.strip()) else {}
    if table.keys() != {"value"}:
        raise ConfigError(f"{where}: {text.strip()!r} is not a TOML value (a string needs quotes)")
    return table["value"]


def list_values(text: str, where: str) -> list[Any]:
    """``"10,20"`` or ``"leading,quadratic"``: TOML values, or bare words, between commas. Raises ConfigError."""
    try:
        table = tomli.loads(f"values = [{text}]")
    except (ValueError, RecursionError):
        table = {}
    if table.keys() == {"values"}:
        return table["values"]
    return [_toml_value(part, where) for part in text.split(",")]


def parse_set(assignments: Iterable[str]) -> Layer:
    """``["sampling.steps=20", ...]`` -> a layer, validated. A value is TOML; a bare word is taken as a string."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, for example sampling.steps=20")
        values[key] = _toml_value(text, f"--set {assignment}")
    layer = Layer(values, dict.fromkeys(values, "--set"))
    validate_layer(layer)
    return layer


def flags_layer(flags: Mapping[str, tuple[str, Any]]) -> Layer:
    """``{"sampling.steps": ("--steps", 20)}`` -> a layer, validated."""
    layer = Layer({k: v for k, (_, v) in flags.items()}, {k: flag for k, (flag, _) in flags.items()})
    validate_layer(layer)
    return layer


# Settings as Python programs give them: see `layers_of`.
Settings = Config | Mapping[str, Any] | str | Path | None


def layers_of(config: Settings, model: str | Path | None = None, out: str | Path | None = None) -> list[Layer]:
    """The layers of settings that a Python program gives.

    Args:
        config: a `Config`, a nested mapping such as ``{"sampling": {"steps": 20}}``, a TOML file, or None.
        model: a source, as ``--model`` takes it, above the config's.
        out: an output folder, above the config's.

    Raises:
        UsageError: for a config of another type.
        ConfigError: for settings that are unknown or wrong.
    """
    layers = []
    if isinstance(config, (str, Path)):
        layers.append(read_file(Path(config)))
    elif isinstance(config, Config):
        # Unset keys stay unset, so that the model's own scheduler config still fills them.
        layers.append(table_layer(config.model_dump(exclude_unset=True, exclude_none=True), "config"))
    elif isinstance(config, Mapping):
        layers.append(table_layer(config, "config"))
    elif config is not None:
        raise UsageError(f"config is a {type(config).__name__}; it must be a mapping, a path or a Config")
    if model is not None:
        layers.append(table_layer({"model": {"source": str(model)}}, "model"))
    if out is not None:
        layers.append(table_layer({"output": {"dir": str(out)}}, "out"))
    return layers


def merge(layers: Iterable[Layer]) -> Resolved:
    """The settings that hold when later layers win over earlier ones."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        for mine, others in _BOTH_WAYS:
            if mine & layer.values.keys():
                for key in others:
                    values.pop(key, None)
                    origins.pop(key, None)
        values.update(layer.values)
        origins.update(layer.origins)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return Resolved(Config.model_validate(sections), origins)
