"""sweep.json: the axes of a sweep and its cells, each a normal output folder beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ddim_cli.errors import UsageError
from ddim_cli.outputs.folder import read_json
from ddim_cli.outputs.jsontext import dump_json

SWEEP_SCHEMA = "ddim-cli/sweep/1"
MANIFEST, SHEET = "sweep.json", "sweep.png"


def is_sweep(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def read_sweep(folder: Path) -> dict[str, Any]:
    """sweep.json of a folder, its axes and cells fitting together.

    Raises:
        UsageError: where there is none, it is none of ours, or it names folders outside its own.
    """
    path = folder / MANIFEST
    found = read_json(path)
    if found is None or found.get("schema") != SWEEP_SCHEMA:
        raise UsageError(f"{path}: is not a {MANIFEST} of ddim ({SWEEP_SCHEMA})")
    try:
        _check(found)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"{path}: names no axes and cells that fit together; run the sweep again") from None
    return found


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


def encode_sweep(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of sweep.json."""
    return (dump_json(manifest) + "\n").encode()
