"""Numbered frames in an output folder, ``frame_000.png`` and its sidecar; pairs of seeds may lie beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ddim_cli.errors import UsageError
from ddim_cli.outputs.folder import OutputFolder, read_json
from ddim_cli.outputs.picture import read_own
from ddim_cli.outputs.sidecar import SCHEMA

_FRAME = re.compile(r"frame_(\d{3,})\.json", re.ASCII)


def frame_path(folder: OutputFolder, number: int) -> Path:
    """Where the PNG of a frame, counted from 0, belongs."""
    return folder.path / f"frame_{number:03d}.png"


def kept_frames(folder: OutputFolder) -> dict[int, Path]:
    """The sidecars of frames that are there, by number."""
    try:
        found = {int(m[1]): path for path in folder.path.iterdir() if (m := _FRAME.fullmatch(path.name))}
    except OSError:
        return {}
    return {n: found[n] for n in sorted(found) if (read_json(found[n]) or {}).get("schema") == SCHEMA}


def missing_frames(folder: OutputFolder, settings: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of frames that are not done; ``settings`` has the identity of each.

    Raises:
        UsageError: for a frame that was made with another identity, or beyond the last of these.
    """
    paths = (str(frame_path(folder, n).with_suffix(".json")) for n in range(len(settings)))
    missing = [n for n, (path, own) in enumerate(zip(paths, settings, strict=True)) if not folder.is_pair(path, own)]
    beyond = next((path for n, path in kept_frames(folder).items() if n >= len(settings)), None)
    if beyond is not None:
        raise UsageError(
            f"{beyond} is of a longer interpolation than these {len(settings)} frames; choose another folder with "
            "--out, or replace what is there with --overwrite"
        )
    return missing


def clear_frames(folder: OutputFolder) -> None:
    """Remove the frames that are there, sidecars first; files of others stay."""
    for path in kept_frames(folder).values():
        path.unlink(missing_ok=True)
        path.with_suffix(".png").unlink(missing_ok=True)


def read_frames(folder: OutputFolder, count: int) -> list[Image.Image]:
    """The first ``count`` frames. Raises RunError for one that cannot be read."""
    return [read_own(frame_path(folder, number)) for number in range(count)]
