"""Pictures made again, against their originals: equal hashes where they are promised, else within a tolerance."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ddim_cli.evaluation.pixels import largest_difference, psnr_db, size_text
from ddim_cli.outputs.folder import OutputFolder, read_json
from ddim_cli.outputs.picture import read_pixels
from ddim_cli.sampling.replay import Group, Original

# Where hashes need not be equal: in float32 each value within this of 0..255, below it a median PSNR of so many dB.
MAX_DIFF = 1
MEDIAN_PSNR = 40.0
# What must be the same for equal hashes; of the device, its kind and name, not its number.
_CONDITIONS = ("device_name", "dtype", "tf32", "compile", "batch_size", "threads")
_VERSIONS = ("torch", "diffusers", "python", "ddim_cli")


class Agreement(NamedTuple):
    """How one original compares. ``equal`` of hashes; ``max_diff`` and ``psnr`` None where its PNG is not there.

    ``other`` names what differs in how the two were made, None where equal hashes are promised; ``problem`` says why
    it fails.
    """

    original: Original
    equal: bool
    max_diff: int | None
    psnr: float | None
    other: str | None
    problem: str | None


def other_condition(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first of the conditions for equal hashes in which two sections ``runtime`` differ, in words."""
    pairs = [("device", *(str(r.get("device")).partition(":")[0] for r in (before, now)))]
    pairs += [(key, before.get(key), now.get(key)) for key in _CONDITIONS]
    versions = [r.get("versions") if isinstance(r.get("versions"), dict) else {} for r in (before, now)]
    pairs += [(name, *(v.get(name) for v in versions)) for name in _VERSIONS]
    return next((f"{key} {old} then, {new} now" for key, old, new in pairs if old != new), None)


def check_group(group: Group, folder: OutputFolder) -> list[Agreement]:
    """Compare the originals of a group with the pictures of their seeds in ``folder``."""
    # Each by its own sidecar: where memory did not suffice, later pictures are of smaller batches.
    runtimes = [read_json(folder.sidecar(o.seed))["runtime"] for o in group.originals]
    exact = _is_exact(group.first.runtime) and _is_exact(runtimes[0])
    found = [
        _check(o, read_pixels(folder.picture(o.seed)), runtime, exact)
        for o, runtime in zip(group.originals, runtimes, strict=True)
    ]
    return found if exact else _with_median(found)


def _is_exact(runtime: Mapping[str, Any]) -> bool:
    return runtime["dtype"] == "float32" and not runtime.get("tf32")


def _check(original: Original, pixels: np.ndarray, runtime: Mapping[str, Any], exact: bool) -> Agreement:
    equal = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == original.pixels_sha256
    other = other_condition(original.runtime, runtime)
    largest = psnr = problem = None
    try:
        before = None if original.picture is None else read_pixels(original.picture)
    except Exception:
        # Pillow meets damage with errors of many kinds.
        return Agreement(original, equal, None, None, other, f"{original.picture} cannot be read as a picture")
    if before is not None and before.shape != pixels.shape:
        problem = f"is {size_text(before.shape)}, made again it is {size_text(pixels.shape)}"
    elif before is not None:
        largest, psnr = largest_difference(before, pixels), psnr_db(before, pixels)
    if problem is None and equal and largest:
        problem = "its pixels are not those that its sidecar says"
    elif problem is None and not equal:
        problem = _why_not(other, largest, exact)
    return Agreement(original, equal, largest, psnr, other, problem)


def _why_not(other: str | None, largest: int | None, exact: bool) -> str | None:
    """Why a picture with another hash fails; None if it is within the tolerance, or the median of all decides."""
    if other is None:
        return "has another hash, though all that bears on it is the same" + (
            f" (differs by {largest})" if largest is not None else ""
        )
    if largest is None:
        return f"has another hash ({other}), and its PNG is not there to tell by how much"
    if exact and largest > MAX_DIFF:
        return f"differs by {largest}, more than {MAX_DIFF} ({other})"
    return None


def _with_median(found: list[Agreement]) -> list[Agreement]:
    """In a lower precision than float32 single pictures vary: the median of them all is what is held to a limit."""
    judged = [a.psnr for a in found if a.psnr is not None]
    if not judged or statistics.median(judged) >= MEDIAN_PSNR:
        return found
    text = f"the median PSNR is {statistics.median(judged):.1f} dB, below {MEDIAN_PSNR:g}"
    low = [a.psnr is not None and a.psnr < MEDIAN_PSNR and a.problem is None for a in found]
    return [a._replace(problem=text) if is_low else a for a, is_low in zip(found, low, strict=True)]


def worst(found: Iterable[Agreement]) -> Agreement | None:
    """The one with the lowest PSNR."""
    return min((a for a in found if a.psnr is not None), key=lambda a: a.psnr, default=None)
