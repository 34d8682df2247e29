"""The cells of a sweep, each scored by its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddim_cli.config.seeds import parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.evaluation.pictures import files_of
from ddim_cli.evaluation.score import Judge, OnImage, Score
from ddim_cli.outputs.files import File
from ddim_cli.outputs.sweep_manifest import MANIFEST, read_sweep
from ddim_cli.outputs.tar_folder import open_folder


@dataclass(frozen=True)
class CellPictures:
    """A cell as sweep.json describes it, and its pictures; none of one that is not finished."""

    facts: Mapping[str, Any]
    files: tuple[File, ...]

    @property
    def at(self) -> tuple[int, ...]:
        return tuple(self.facts["at"])

    @property
    def name(self) -> str:
        return self.facts["folder"]


@dataclass(frozen=True)
class SweepPictures:
    """The cells of a sweep; ``axes`` are names with the labels of their values."""

    axes: tuple[tuple[str, tuple[str, ...]], ...]
    cells: tuple[CellPictures, ...]

    def place(self, cell: CellPictures) -> dict[str, str]:
        """Where a cell is on each axis: name -> label."""
        return {name: labels[i] for (name, labels), i in zip(self.axes, cell.at, strict=True)}


def read_cells(folder: Path, count: int | None = None) -> SweepPictures:
    """The cells of a sweep's folder, each with the pictures of its seeds; of the first ``count`` seeds.

    Raises:
        UsageError: for a sweep.json that cannot be used, for a picture that is missing, and where no cell is finished.
    """
    manifest = read_sweep(folder)
    axes = tuple((axis["name"], tuple(value["label"] for value in axis["values"])) for axis in manifest["axes"])
    try:
        cells = SweepPictures(axes, tuple(_cell(folder, facts, count) for facts in manifest["cells"]))
    except (KeyError, AttributeError, ValueError):
        raise UsageError(f"{folder / MANIFEST}: names no seeds of a cell; run the sweep again") from None
    if not any(cell.files for cell in cells.cells):
        raise UsageError(f"{folder}: none of the sweep's cells is finished")
    return cells


def _cell(folder: Path, facts: Mapping[str, Any], count: int | None) -> CellPictures:
    files: list[File] = []
    if facts["finished"]:
        files = files_of(open_folder(folder / facts["folder"]), parse_seeds(facts["seeds"]), count)
    return CellPictures(facts, tuple(files))


def open_judge(scoring: Mapping[str, str], device: torch.device | str) -> Judge | None:
    """The judge that the keys of [sweep] ask for, `config.sweep.SCORING`; None without a reference.

    Raises:
        UsageError: for another of them without a reference; else as `Judge.open`.
        RunError: as `Judge.open`.
    """
    if "reference" not in scoring:
        if scoring:
            raise UsageError(f"{min(scoring)} without a reference scores nothing; name one with --reference")
        return None
    return Judge.open(
        scoring["reference"],
        scoring.get("extractor"),
        device,
        inception=Path(scoring["inception"]) if "inception" in scoring else None,
        values=scoring.get("extractor_input", "unit"),
    )


def score_cells(
    judge: Judge, cells: SweepPictures, looking_at: Callable[[str], OnImage]
) -> Iterator[tuple[CellPictures, Score | None]]:
    """Yield each cell with its score, None for one that is not finished; ``looking_at`` is called with its name."""
    for cell in cells.cells:
        yield cell, judge.score(cell.files, looking_at(cell.name)) if cell.files else None
