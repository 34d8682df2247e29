"""What a check of an output folder finds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ddim_cli.evaluation.pairs import decoded
from ddim_cli.outputs.folder import OutputFolder


class Problem(NamedTuple):
    """What is wrong with a file, named as it lies in the folder; ``seed`` is None for files of the whole run."""

    file: str
    seed: int | None
    text: str


class Verified(NamedTuple):
    """How many ``images`` were checked, those of run.json, those of no seed and strips; and what is wrong.

    ``lossy`` of them are JPEGs, whose pixels cannot be held against the hash of those that were made: of these, the
    file is as it was written.
    """

    images: int
    problems: tuple[Problem, ...]
    lossy: int = 0


def check_grid(folder: OutputFolder) -> Iterator[Problem]:
    """What is wrong with the contact sheet, if there is one."""
    if folder.grid.exists() and decoded(folder.grid.read_bytes(), ".png") is None:
        yield Problem(folder.grid.name, None, "does not decode")
