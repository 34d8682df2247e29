"""A sweep: axes of settings, whose product is a table of cells, and overrides that change single cells of it."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddim_cli.config.labels import label_of
from ddim_cli.config.layers import Layer, list_values, nearest, replaced_by, validate_layer
from ddim_cli.config.schema import KEYS
from ddim_cli.config.write import toml_value
from ddim_cli.errors import ConfigError

# Keys of [sweep] that are no axes.
SCORING = ("reference", "extractor", "extractor_input", "inception")
# For editors: [sweep] in JSON Schema.
JSON_SCHEMA = {
    "description": "Axes of ddim sweep: any key, with a list of values, or a name with a list of tables of keys.",
    "type": "object",
    "properties": {
        "reference": {"type": "string", "description": "score every cell against this, as ddim evaluate does"},
        "extractor": {"type": "string", "description": "the network whose features are compared"},
        "extractor_input": {"enum": ["unit", "signed", "bytes"], "description": "how it takes pictures"},
        "inception": {"type": "string", "description": "the file of Inception's weights"},
        "override": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"when": {"type": "object"}, "set": {"type": "object"}},
                "required": ["when", "set"],
                "additionalProperties": False,
            },
        },
    },
    "additionalProperties": {"type": ["array", "object"]},
}
# Axes beside those of [sweep]: the texts of --axis, or key -> values.
Axes = Sequence[str] | Mapping[str, Sequence[Any]]
# Of a value that is a list, in a label; longer ones are shortened.
LONGEST_LABEL = 24
# Keys whose values are sentences.
TEXTS = ("sampling.prompt", "sampling.negative_prompt")


@dataclass(frozen=True)
class AxisValue:
    """One position of an axis: its label, unique within the axis, and the settings it stands for."""

    label: str
    layer: Layer


@dataclass(frozen=True)
class Axis:
    """``plain`` where all values are of the one key ``name`` stands for, so that a label alone says too little."""

    name: str
    values: tuple[AxisValue, ...]
    plain: bool = True

    def title(self, value: AxisValue) -> str:
        """``"steps=10"``; of an axis of several keys the label alone."""
        return f"{self.name}={value.label}" if self.plain else value.label


@dataclass(frozen=True)
class Override:
    """``layer`` holds in the cells in which every key of ``when`` has one of the values given."""

    when: Mapping[str, tuple[Any, ...]]
    layer: Layer

    def holds(self, settings: Mapping[str, Any]) -> bool:
        return all(key in settings and settings[key] in wanted for key, wanted in self.when.items())


@dataclass(frozen=True)
class CellSettings:
    """One cell: its place on each axis, in words, and what axes and overrides set there, lowest first."""

    at: tuple[int, ...]
    titles: tuple[str, ...]
    axis_layers: tuple[Layer, ...]
    override_layers: tuple[Layer, ...] = ()

    @property
    def title(self) -> str:
        return ", ".join(self.titles)

    @property
    def values(self) -> dict[str, Any]:
        """Dotted key -> value of all that the cell sets."""
        layers = (*self.axis_layers, *self.override_layers)
        return {key: value for layer in layers for key, value in layer.values.items()}


@dataclass(frozen=True)
class SweepSettings:
    """``scoring`` has what was said of reference, extractor and the like, which are as in ``ddim evaluate``."""

    axes: tuple[Axis, ...]
    overrides: tuple[Override, ...] = ()
    scoring: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> list[CellSettings]:
        """All cells; the last axis varies fastest."""
        found = []
        for at in itertools.product(*(range(len(axis.values)) for axis in self.axes)):
            values = [axis.values[i] for axis, i in zip(self.axes, at, strict=True)]
            titles = tuple(axis.title(value) for axis, value in zip(self.axes, values, strict=True))
            cell = CellSettings(at, titles, tuple(value.layer for value in values))
            held = tuple(override.layer for override in self.overrides if override.holds(cell.values))
            found.append(replace(cell, override_layers=held))
        return found


def full_key(name: str, origin: str) -> str:
    """The dotted key that ``name`` stands for: itself, or of [sampling] a bare one. Raises ConfigError."""
    key = name if "." in name else f"sampling.{name}"
    if key in KEYS:
        return key
    known = [*KEYS, *(k.partition(".")[2] for k in KEYS if k.startswith("sampling."))]
    raise ConfigError(f"{origin}: unknown key {name} in a sweep{nearest(name, known)}")


def short_name(key: str) -> str:
    return key.rpartition(".")[2]


def _label(value: Any, key: str = "") -> str:
    if key in TEXTS:
        return _text_label(value)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return toml_value(value)
    text = "-".join(map(_label, value))
    return text if len(text) <= LONGEST_LABEL else f"{_label(value[0])}-...-{_label(value[-1])}"


def _text_label(value: Any) -> str:
    """A prompt, or several, on one line of a length that a table and a folder's name have room for."""
    return label_of(value if isinstance(value, str) else " | ".join(value)) or '""'


def _layer(table: Mapping[str, Any], origin: str) -> Layer:
    values = {full_key(name, origin): value for name, value in _dotted(table)}
    if len(values) < len(list(_dotted(table))):
        raise ConfigError(f"{origin}: a key is set twice in {json.dumps(table)}")
    for key in values:
        if key.startswith("output."):
            raise ConfigError(f"{origin}: {key} is the same for the whole sweep; set it in [output]")
        if key == "sampling.refine":
            raise ConfigError(f"{origin}: {key} is for ddim invert, and changes no picture of a sweep")
    layer = Layer(values, dict.fromkeys(values, origin))
    validate_layer(layer)
    return layer


def _dotted(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values; what TOML reads ``a.b = 1`` as, a table a with a key b, is the key "a.b" again."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", v) for inner, v in value.items())
        else:
            yield name, value


def _make_axis(name: str, values: Any, origin: str) -> Axis:
    """An axis of one key, or of several: a list of tables. Raises ConfigError."""
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{origin}: {name} in a sweep takes a list of values, one a cell")
    if all(isinstance(value, Mapping) for value in values):
        found = [_bundle(name, dict(value), origin) for value in values]
        return Axis(name, tuple(_unique(found, name, origin)), plain=False)
    if any(isinstance(value, Mapping) for value in values):
        raise ConfigError(f"{origin}: {name} mixes tables and single values; use tables for all")
    key = full_key(name, origin)
    layers = [_layer({key: value}, origin) for value in values]
    found = [AxisValue(_label(value, key), layer) for value, layer in zip(values, layers, strict=True)]
    return Axis(short_name(key), tuple(_unique(found, name, origin)))


def _bundle(name: str, table: dict[str, Any], origin: str) -> AxisValue:
    """``{ eta = 0.5, steps = 20 }``, with a ``label`` if it is to have a name."""
    label = table.pop("label", None)
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise ConfigError(f"{origin}: {name} has a label {json.dumps(label)}; it takes a text")
    if not table:
        raise ConfigError(f"{origin}: {name} has a table that sets nothing; write for example {{ eta = 0.5 }}")
    layer = _layer(table, origin)
    return AxisValue(label or ", ".join(f"{short_name(k)}={_label(v, k)}" for k, v in layer.values.items()), layer)


def _unique(values: Sequence[AxisValue], name: str, origin: str) -> Iterator[AxisValue]:
    """The values with labels of their own. Raises ConfigError for a value given twice."""
    for i, value in enumerate(values):
        if any(value.layer.values == other.layer.values for other in values[:i]):
            raise ConfigError(f"{origin}: {name} has {value.label} twice")
    count = Counter(value.label for value in values)
    for i, value in enumerate(values):
        yield replace(value, label=f"{value.label} #{i + 1}") if count[value.label] > 1 else value


def _make_override(table: Any, swept: Mapping[str, Sequence[Any]], origin: str) -> Override:
    """``swept`` is every key on an axis with its values. Raises ConfigError for one that no cell could be meant by."""
    if not isinstance(table, Mapping) or set(table) != {"when", "set"}:
        raise ConfigError(f"{origin}: [[sweep.override]] takes when and set, for example when = {{ steps = 1000 }}")
    for part in ("when", "set"):
        if not isinstance(table[part], Mapping) or not table[part]:
            raise ConfigError(f"{origin}: {part} of [[sweep.override]] is a table of keys and values")
    when: dict[str, tuple[Any, ...]] = {}
    for name, wanted in _dotted(table["when"]):
        key = full_key(name, origin)
        if key not in swept:
            raise ConfigError(f"{origin}: when names {name}, which is on no axis")
        choices = tuple(wanted) if isinstance(wanted, list) and wanted not in swept[key] else (wanted,)
        for value in choices:
            if value not in swept[key]:
                raise ConfigError(f"{origin}: when asks for {name} = {json.dumps(value)}, which no cell has")
        when[key] = choices
    layer = _layer(table["set"], origin)
    for key in layer.values:
        if key in swept:
            raise ConfigError(f"{origin}: set names {key}, which is on an axis")
        # A number of images is the first so many of the seeds, whichever way these are said.
        other = replaced_by(key, swept) if key != "sampling.num_images" else None
        if other is not None:
            raise ConfigError(f"{origin}: set names {key}, which says what {other} does, and that is on an axis")
    return Override(when, layer)


def swept_keys(axes: Iterable[Axis]) -> dict[str, list[Any]]:
    """Every key on an axis, with its values."""
    found: dict[str, list[Any]] = {}
    for axis in axes:
        for value in axis.values:
            for key, v in value.layer.values.items():
                found.setdefault(key, []).append(v)
    return found


def _check_axes(axes: Sequence[Axis], origin: str) -> None:
    """Raise ConfigError for a key on two axes, or on one beside a key of another that replaces it."""
    owner: dict[str, str] = {}
    for axis in axes:
        for key in swept_keys([axis]):
            if owner.setdefault(key, axis.name) != axis.name:
                raise ConfigError(f"{origin}: {key} is on two axes, {owner[key]} and {axis.name}")
            other = replaced_by(key, [known for known, name in owner.items() if name != axis.name])
            if other is not None:
                raise ConfigError(
                    f"{origin}: {key} and {other} say the same thing in two ways, and are on two axes, {axis.name} and "
                    f"{owner[other]}; keep one, or set them in turn on one axis of tables"
                )


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """``"steps=10,20"`` of --axis: the name and its values. Raises ConfigError."""
    name, equals, values = text.partition("=")
    if not equals or not name.strip() or not values.strip():
        raise ConfigError(f"--axis {text}: write KEY=V1,V2, for example steps=10,20,50")
    try:
        return name.strip(), list_values(values, f"--axis {text}")
    except ConfigError as error:
        if full_key(name.strip(), f"--axis {text}") not in TEXTS:
            raise
        # A shell takes the quotes that are not inside others; where the commas belong cannot be told without.
        example = f"""--axis '{name.strip()}="a seven","a two, bold"'"""
        raise ConfigError(f"{error}; a shell leaves quotes inside of others alone: {example}") from None


def _read_axes(axes: Axes) -> Iterator[Axis]:
    if isinstance(axes, Mapping):
        for name, values in axes.items():
            yield _make_axis(name, list(values) if isinstance(values, (tuple, range)) else values, f"axis {name}")
    else:
        for text in axes:
            yield _make_axis(*parse_axis(text), f"--axis {text}")


def parse_sweep(layers: Sequence[Layer], axes: Axes = ()) -> SweepSettings:
    """The sweep that the [sweep] tables of ``layers`` and ``axes`` describe; a later axis wins, by name.

    Raises:
        ConfigError: for anything in it that is wrong, and where there is no axis.
    """
    found: dict[str, Axis] = {}
    overrides: list[tuple[Any, str]] = []
    scoring: dict[str, str] = {}
    for layer in layers:
        if layer.sweep is None:
            continue
        table, own = layer.sweep
        origin = own("sweep")
        if not isinstance(table, Mapping):
            raise ConfigError(f"{origin}: sweep is a table; write [sweep] with axes below it")
        for name, value in table.items():
            if name in SCORING:
                if not isinstance(value, str) or not value:
                    raise ConfigError(f"{own('sweep', name)}: {name} in [sweep] takes a text")
                scoring[name] = value
            elif name == "override":
                overrides += [(each, origin) for each in (value if isinstance(value, list) else [value])]
            else:
                # Unquoted, a.b = [...] is a table a with a key b.
                for dotted, values in _dotted({name: value}):
                    axis = _make_axis(dotted, values, own("sweep", name))
                    found[axis.name] = axis
    # An override may speak of a value that --axis has replaced: it holds nowhere then.
    known = swept_keys(found.values())
    found |= {axis.name: axis for axis in _read_axes(axes)}
    for key, values in swept_keys(found.values()).items():
        known.setdefault(key, []).extend(values)
    if not found:
        raise ConfigError("a sweep needs an axis: --axis steps=10,20,50, or a [sweep] table in a config")
    _check_axes(tuple(found.values()), "the sweep")
    made = tuple(_make_override(table, known, origin) for table, origin in overrides)
    return SweepSettings(tuple(found.values()), made, scoring)


def without_sweep(layers: Iterable[Layer]) -> list[Layer]:
    """The layers, with what is the same for every cell alone."""
    return [replace(layer, sweep=None) for layer in layers]
