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
from ddim_cli.config.seeds import Seeds
from ddim_cli.config.sweep import Axes, CellSettings, SweepSettings, parse_sweep, swept_keys, without_sweep
from ddim_cli.errors import ConfigError, UsageError
from ddim_cli.models.describe import describe_model
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.resolve import Run, resolve
from ddim_cli.sampling.torchrun import Ranks, choose_shard

# Of a folder's name in bytes, with room for what other programs add.
LONGEST_NAME = 120


@dataclass(frozen=True)
class CellRun:
    """A cell, the run it stands for, and the name of its folder."""

    settings: CellSettings
    run: Run
    name: str

    @property
    def seeds(self) -> Seeds:
        return self.run.config.seeds()


@dataclass(frozen=True)
class SweepRun:
    """A sweep whose cells are known to work."""

    settings: SweepSettings
    cells: tuple[CellRun, ...]

    @property
    def warnings(self) -> list[str]:
        """Each warning once, with the cells it is about where it is not about all."""
        about: dict[str, list[str]] = {}
        for own in self.cells:
            for warning in own.run.warnings:
                about.setdefault(warning, []).append(own.settings.title)
        shown = []
        for warning, titles in about.items():
            several = f"cell {titles[0]}" if len(titles) == 1 else f"{len(titles)} cells, {titles[0]} the first"
            shown.append(warning if len(titles) == len(self.cells) else f"{several}: {warning}")
        return shown


def _names(cells: Sequence[CellSettings]) -> Iterator[str]:
    """A folder name a cell, of its titles: ``steps=10,eta=0.5``; no two are equal, also where case does not count.

    One that would be too long, or another's, ends in a hash of the cell's settings.
    """
    taken = {"sweep.json", "sweep.png", "run.json", "report.html"}
    for cell in cells:
        text = ",".join(re.sub(r"[^\w.=+#-]+", "-", title).strip("-.") or "cell" for title in cell.titles)
        name = text
        if len(text.encode()) > LONGEST_NAME or name.casefold() in taken:
            digest = hashlib.sha256(json.dumps([cell.titles, cell.values], sort_keys=True).encode()).hexdigest()[:8]
            name = f"{text.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"
        taken.add(name.casefold())
        yield name


def _check_flags(layers: Sequence[Layer], sweep: SweepSettings) -> None:
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


def _cell_layers(layers: Sequence[Layer], cell: CellSettings) -> list[Layer]:
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
                f"cell {own.settings.title}: its seeds are not the first of the others' ({longest.settings.title}); "
                "all cells of a sweep have the same seeds, or fewer of them"
            )


def resolve_sweep(layers: Sequence[Layer], axes: Axes = (), resolve: Callable[..., Run] = resolve) -> SweepRun:
    """The sweep that the [sweep] tables of ``layers`` and ``axes`` describe; see `config.sweep.parse_sweep`.

    Raises:
        ConfigError: for settings that cannot work, naming the cell.
        ModelError: for a model that is not there or cannot be sampled from.
    """
    settings = parse_sweep(layers, axes)
    layers = without_sweep(layers)
    _check_flags(layers, settings)
    # The same answer for every cell of a model, and the Hub is asked once.
    describe = lru_cache(describe_model)
    cells, found = settings.cells(), []
    for cell, name in zip(cells, _names(cells), strict=True):
        try:
            found.append(CellRun(cell, resolve(_cell_layers(layers, cell), describe=describe), name))
        except ConfigError as error:
            raise ConfigError(*(f"cell {cell.title}: {problem}" for problem in error.problems)) from None
    _check_prefixes(found)
    return SweepRun(settings, tuple(found))


def choose_part(shard: str | None) -> Shard:
    """The part of every cell that this process makes, "0/8"; None: all. Raises UsageError, and so under torchrun."""
    if Ranks.of() is not None:
        raise UsageError("sweep runs in one process; without torchrun, --shard I/N makes a part of every cell")
    return choose_shard(shard, None)
