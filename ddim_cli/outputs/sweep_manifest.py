"""sweep.json: the axes of a sweep and its cells, each a normal output folder beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import locked, write_atomically
from ddim_cli.outputs.files import Place
from ddim_cli.outputs.jsontext import dump_json
from ddim_cli.outputs.store import read_json

SWEEP_SCHEMA = "ddim-cli/sweep/1"
MANIFEST, SHEET = "sweep.json", "sweep.png"


def is_sweep(folder: Place) -> bool:
    return (folder / MANIFEST).exists()


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a folder, its axes and cells fitting together.

    Raises:
        UsageError: where there is none, it is none of ours, or it names folders outside its own.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest is None or manifest.get("schema") != SWEEP_SCHEMA:
        raise UsageError(f"{path}: is not a {MANIFEST} of ddim ({SWEEP_SCHEMA})")
    try:
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path}: names no axes and cells that fit together; run the sweep again") from None
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    sizes = []
    for axis in manifest["axes"]:
        if not isinstance(axis["name"], str) or not axis["values"]:
            raise ValueError
        if not all(isinstance(value["label"], str) for value in axis["values"]):
            raise ValueError
        sizes.append(len(axis["values"]))
    seen: set[tuple[int, ...]] = set()
    for cell in manifest["cells"]:
        folder = PurePosixPath(cell["folder"])
        place = tuple(cell["at"])
        on_axes = [type(i) is int and 0 <= i < size for i, size in zip(place, sizes, strict=True)]
        # A manifest from elsewhere names nothing outside its own folder.
        if folder.is_absolute() or ".." in folder.parts or not all(on_axes) or place in seen:
            raise ValueError
        seen.add(place)


def holds_more(folder: Path, there: Mapping[str, Any], cells: Collection[str]) -> bool:
    """Whether ``there``, the sweep.json of a folder, has all of these cells, by their folders, and others beside.

    Raises:
        UsageError: where each has cells that the other has not: those would be lost.
    """
    theirs = {cell["folder"]: cell for cell in there.get("cells", ())}
    other = next((cell for name, cell in theirs.items() if name not in cells), None)
    if other is not None and not set(cells) < set(theirs):
        raise UsageError(
            f"{folder / MANIFEST} is of another sweep, with a cell {other.get('title', other['folder'])} that this one "
            "lacks; choose another folder with --out, give one sweep the values of both, or replace it with --overwrite"
        )
    return other is not None


def update_sweep(folder: Path, ours: Mapping[str, Any], anew: bool = False, fsync: bool = False) -> bool:
    """Write sweep.json, and what another sweep with more cells has written there too, unless ``anew``.

    Returns whether it is now that of this sweep alone.

    Raises:
        UsageError: as `holds_more` and `read_sweep`. What is there is read while no other process may write it.
        OSError: where it cannot be written.
    """
    path = folder / MANIFEST
    with locked(path):
        there = read_sweep(folder) if path.exists() and not anew else {}
        mine = {cell["folder"]: cell for cell in ours["cells"]}
        joins = holds_more(folder, there, mine)
        if joins:
            cells = [{**cell, **mine.get(cell["folder"], {}), "at": cell["at"]} for cell in there["cells"]]
            longest = ours if ours["images"] > there.get("images", 0) else there
            seeds = {key: longest[key] for key in ("seeds", "images") if key in longest}
            ours = {**there, **seeds, "cells": cells}
        write_changed(path, (dump_json(ours) + "\n").encode(), fsync)
    return not joins


def write_changed(path: Path, content: bytes, fsync: bool = False) -> None:
    """Write a file, unless it is there with this content: a sweep that does nothing touches nothing. Raises OSError."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content, fsync)
