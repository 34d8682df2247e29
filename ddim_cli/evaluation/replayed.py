"""Compare pictures made again with their originals: equal hashes where they are promised, else within a tolerance.

Of a JPEG the hash is of the pixels before it was encoded. Where another one comes out, the pixels are compared with
those in the file, and what JPEG can have lost is no difference: what is hidden by that cannot be told.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ddim_cli.evaluation.jpeg import least_difference
from ddim_cli.evaluation.pixels import largest_difference, psnr_db, size_text
from ddim_cli.outputs.files import File
from ddim_cli.outputs.picture import read_pixels
from ddim_cli.outputs.provenance import text_inside
from ddim_cli.sampling.replay import Original

# Where hashes may differ: in float32 no value, 0..255, by more than this; in a lower precision a median PSNR in dB.
MAX_DIFF = 1
MEDIAN_PSNR = 40.0
# Equal hashes are promised where these are the same; of the device its kind and name count, not its number.
_CONDITIONS = ("device_name", "dtype", "tf32", "compile", "batch_size", "threads")
_VERSIONS = ("torch", "diffusers", "python", "ddim_cli")


class Agreement(NamedTuple):
    """How one original compares. ``equal`` of hashes; ``max_diff`` and ``psnr`` None where its picture is not there.

    ``other`` names what differs in how the two were made, None where equal hashes are promised; ``problem`` says why
    it fails. Of a JPEG, ``lossy`` is the least root mean square by which the two differ, whatever JPEG lost.
    """

    original: Original
    equal: bool
    max_diff: int | None
    psnr: float | None
    other: str | None
    problem: str | None
    lossy: float | None = None

    @property
    def highest_psnr(self) -> float | None:
        """The PSNR in dB; of a JPEG, the highest that the pixels before it was encoded can have."""
        if self.lossy is None:
            return self.psnr
        return 20 * math.log10(255 / self.lossy) if self.lossy else math.inf


def other_condition(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first of the conditions for equal hashes in which two sections ``runtime`` differ, in words."""

    def told(runtime: Mapping[str, Any]) -> dict[str, Any]:
        versions = runtime.get("versions")
        return {
            "device": str(runtime.get("device")).partition(":")[0],
            **{key: runtime.get(key) for key in _CONDITIONS},
            **{name: versions.get(name) if isinstance(versions, dict) else None for name in _VERSIONS},
        }

    old, new = told(before), told(now)
    return next((f"{key} {old[key]} then, {new[key]} now" for key in old if old[key] != new[key]), None)


def check_group(pairs: Sequence[tuple[Original, File]]) -> list[Agreement]:
    """Compare originals of equal settings with the files in which they were made again."""
    # Each by its own text: where memory did not suffice, later pictures are of smaller batches.
    runtimes = [text_inside(again)["runtime"] for _, again in pairs]
    exact = all(_is_exact(runtime) for runtime in (pairs[0][0].runtime, runtimes[0]))
    agreements = [
        _check(original, read_pixels(again), runtime, exact)
        for (original, again), runtime in zip(pairs, runtimes, strict=True)
    ]
    return agreements if exact else _with_median(agreements)


def _is_exact(runtime: Mapping[str, Any]) -> bool:
    return runtime["dtype"] == "float32" and not runtime.get("tf32")


def _check(original: Original, pixels: np.ndarray, runtime: Mapping[str, Any], exact: bool) -> Agreement:
    equal = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == original.pixels_sha256
    other = other_condition(original.runtime, runtime)
    largest = psnr = problem = lossy = None
    try:
        before = None if original.picture is None else read_pixels(original.picture)
    except Exception:
        # Pillow meets damage with errors of many kinds.
        return Agreement(original, equal, None, None, other, f"{original.picture} cannot be read as a picture")
    if before is not None and before.shape != pixels.shape:
        problem = f"is {size_text(before.shape)}, made again it is {size_text(pixels.shape)}"
    elif before is not None:
        largest, psnr = largest_difference(before, pixels), psnr_db(before, pixels)
        if original.is_lossy and original.picture is not None:
            lossy = least_difference(original.picture, pixels)
    if problem is None and equal and (largest if lossy is None else lossy):
        problem = "its pixels are not those that its sidecar says"
    elif problem is None and not equal and lossy is not None:
        problem = _why_not_jpeg(other, lossy, exact)
    elif problem is None and not equal:
        problem = _why_not(other, largest, exact)
    return Agreement(original, equal, largest, psnr, other, problem, lossy)


def _why_not(other: str | None, largest: int | None, exact: bool) -> str | None:
    """Why a picture with another hash fails; None if it is within the tolerance, or the median of all decides."""
    if other is None:
        return "has another hash, though all that bears on it is the same" + (
            f" (differs by {largest})" if largest is not None else ""
        )
    if largest is None:
        return f"has another hash ({other}), and its picture is not there to tell by how much"
    if exact and largest > MAX_DIFF:
        return f"differs by {largest}, more than {MAX_DIFF} ({other})"
    return None


def _why_not_jpeg(other: str | None, least: float, exact: bool) -> str | None:
    """As `_why_not`, of a JPEG, which differs from what was made again by ``least`` beyond what it can have lost."""
    if other is None:
        return "has another hash, though all that bears on it is the same"
    if exact and least > MAX_DIFF:
        return f"differs by {least:.1f} beyond what JPEG loses, more than {MAX_DIFF} ({other})"
    return None


def _with_median(agreements: list[Agreement]) -> list[Agreement]:
    """In a lower precision than float32 single pictures vary: the median of them all is what is held to a limit."""
    values = [value for a in agreements if (value := a.highest_psnr) is not None]
    if not values or statistics.median(values) >= MEDIAN_PSNR:
        return agreements
    text = f"the median PSNR is {statistics.median(values):.1f} dB, below {MEDIAN_PSNR:g}"
    highest = [math.inf if a.highest_psnr is None else a.highest_psnr for a in agreements]
    low = [value < MEDIAN_PSNR and a.problem is None for a, value in zip(agreements, highest, strict=True)]
    return [a._replace(problem=text) if is_low else a for a, is_low in zip(agreements, low, strict=True)]


def worst(agreements: Iterable[Agreement]) -> Agreement | None:
    """The one with the lowest PSNR."""
    return min((a for a in agreements if a.psnr is not None), key=lambda a: a.psnr or 0.0, default=None)
