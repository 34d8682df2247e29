"""The cells of a sweep, each scored by its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim_cli.config.seeds import parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.evaluation.pictures import files_of
from ddim_cli.evaluation.score import Judge, OnImage, Score
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.sweep_manifest import MANIFEST, read_sweep


@dataclass(frozen=True)
class Cell:
    """A cell as sweep.json describes it, and its pictures; none of one that is not finished."""

    facts: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def at(self) -> tuple[int, ...]:
        return tuple(self.facts["at"])

    @property
    def name(self) -> str:
        return self.facts["folder"]


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep; ``axes`` are names with the labels of their values."""

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    cells: tuple[Cell, ...]

    def place(self, cell: Cell) -> dict[str, str]:
        """Where a cell is on each axis: name -> label."""
        return {name: labels[i] for (name, labels), i in zip(self.axes, cell.at, strict=True)}


def read_cells(folder: Path, count: int | None = None) -> Cells:
    """The cells of a sweep's folder, each with the pictures of its seeds; of the first ``count`` seeds.

    Raises:
        UsageError: for a sweep.json that cannot be used, for a picture that is missing, and where no cell is finished.
    """
    manifest = read_sweep(folder)
    axes = tuple((axis["name"], tuple(value["label"] for value in axis["values"])) for axis in manifest["axes"])
    try:
        found = Cells(axes, tuple(_cell(folder, facts, count) for facts in manifest["cells"]))
    except (KeyError, AttributeError, ValueError):
        raise UsageError(f"{folder / MANIFEST}: names no seeds of a cell; run the sweep again") from None
    if not any(cell.files for cell in found.cells):
        raise UsageError(f"{folder}: none of the sweep's cells is finished")
    return found


def _cell(folder: Path, facts: Mapping[str, Any], count: int | None) -> Cell:
    files: list[Path] = []
    if facts["finished"]:
        files = files_of(OutputFolder(folder / facts["folder"]), parse_seeds(facts["seeds"]), count)
    return Cell(facts, tuple(files))


def score_cells(
    judge: Judge, cells: Cells, looking_at: Callable[[str], OnImage]
) -> Iterator[tuple[Cell, Score | None]]:
    """Yield each cell with its score, None for one that is not finished; ``looking_at`` is called with its name."""
    for cell in cells.cells:
        yield cell, judge.score(cell.files, looking_at(cell.name)) if cell.files else None
