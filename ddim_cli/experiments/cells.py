"""The cells of a sweep as runs that are known to work. Reads JSON and TOML only; torch and the weights come later."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ddim_cli.config.layers import Layer, merge, replaced_by
from ddim_cli.config.sweep import Cell, Sweep, swept_keys, without_sweep
from ddim_cli.errors import ConfigError
from ddim_cli.models.describe import describe_model
from ddim_cli.sampling.resolve import Run, resolve

# Of a folder's name in bytes, with room for what other programs add.
LONGEST_NAME = 120


@dataclass(frozen=True)
class CellRun:
    """A cell, the run it stands for, and the name of its folder."""

    cell: Cell
    run: Run
    name: str

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.run.config.seeds()


def _names(cells: Sequence[Cell]) -> Iterator[str]:
    """A folder name a cell, of its titles: ``steps=10,eta=0.5``; no two are equal, also where case does not count.

    One that would be too long, or another's, ends in a hash of the cell's settings.
    """
    taken = {"sweep.json", "sweep.png", "run.json", "report.html"}
    for cell in cells:
        text = ",".join(re.sub(r"[^\w.=+#-]+", "-", title).strip("-.") or "cell" for title in cell.titles)
        name = text
        if len(text.encode()) > LONGEST_NAME or name.casefold() in taken:
            digest = hashlib.sha256(json.dumps([cell.titles, cell.settings], sort_keys=True).encode()).hexdigest()[:8]
            name = f"{text.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"
        taken.add(name.casefold())
        yield name


def _check_flags(layers: Sequence[Layer], sweep: Sweep) -> None:
    """Raise ConfigError for a key that an option sets, and an axis too or replaces: it would have no say."""
    swept = swept_keys(sweep.axes)
    for layer in layers:
        for key in _typed(layer):
            if key in swept:
                raise ConfigError(f"{layer.origins[key]}: {key} is on an axis of the sweep; leave it out")
            other = replaced_by(key, swept)
            if other is not None:
                raise ConfigError(
                    f"{layer.origins[key]}: {key} says what {other} does, which is on an axis; leave it out"
                )


def _typed(layer: Layer) -> dict[str, Any]:
    """Of a layer, what was typed on the command line."""
    return {key: value for key, value in layer.values.items() if layer.origins[key].startswith("--")}


def _cell_layers(layers: Sequence[Layer], cell: Cell) -> list[Layer]:
    """The layers of a cell, lowest first: a flag wins over an override, which is of a file.

    An override's ``num_images`` is the first so many of the seeds there are, and no more than a flag asks for.
    """
    flags = {key: value for layer in layers for key, value in _typed(layer).items()}
    below = [*layers, *cell.axis_layers]
    for override in cell.override_layers:
        values = {key: value for key, value in override.values.items() if key not in flags}
        count = override.values.get("sampling.num_images")
        if count is not None and not {"sampling.seed", "sampling.seeds"} & override.values.keys():
            plan = merge(below).config
            if plan.sampling.seeds is not None:
                values.pop("sampling.num_images", None)
                values["sampling.seeds"] = list(plan.seeds()[:count])
            else:
                values["sampling.num_images"] = min(count, flags.get("sampling.num_images", count))
        below.append(Layer(values, dict.fromkeys(values, next(iter(override.origins.values())))))
    return below


def _check_prefixes(cells: Sequence[CellRun]) -> None:
    """Raise ConfigError unless the seeds of every cell are the first of the longest one's."""
    longest = max(cells, key=lambda own: len(own.seeds))
    for own in cells:
        if own.seeds != longest.seeds[: len(own.seeds)]:
            raise ConfigError(
                f"cell {own.cell.title}: its seeds are not the first of the others' ({longest.cell.title}); all cells "
                "of a sweep have the same seeds, or fewer of them"
            )


def resolve_cells(
    layers: Sequence[Layer], sweep: Sweep, resolve: Callable[..., Run] = resolve
) -> tuple[list[CellRun], list[str]]:
    """The cells of a sweep, and the warnings about them, each once.

    Raises:
        ConfigError: for settings that cannot work, naming the cell.
        ModelError: for a model that is not there or cannot be sampled from.
    """
    layers = without_sweep(layers)
    _check_flags(layers, sweep)
    # The same answer for every cell of a model, and the Hub is asked once.
    describe = lru_cache(describe_model)
    cells, found = sweep.cells(), []
    for cell, name in zip(cells, _names(cells), strict=True):
        try:
            found.append(CellRun(cell, resolve(_cell_layers(layers, cell), describe=describe), name))
        except ConfigError as error:
            raise ConfigError(*(f"cell {cell.title}: {problem}" for problem in error.problems)) from None
    _check_prefixes(found)
    return found, _warnings(found)


def _warnings(cells: Sequence[CellRun]) -> list[str]:
    """Each warning once, with the cells it is about where it is not about all."""
    about: dict[str, list[str]] = {}
    for own in cells:
        for warning in own.run.warnings:
            about.setdefault(warning, []).append(own.cell.title)
    shown = []
    for warning, titles in about.items():
        several = f"cell {titles[0]}" if len(titles) == 1 else f"{len(titles)} cells, {titles[0]} the first"
        shown.append(warning if len(titles) == len(cells) else f"{several}: {warning}")
    return shown
