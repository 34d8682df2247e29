"""The host's own settings, for a process that does nothing but sample."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# mallopt's names for its parameters, and what they are set to: a step's tensors come from the heap, and stay there.
_MALLOC = {-3: 1 << 30, -1: (1 << 31) - 1, -2: 64 << 20}


def keep_memory() -> None:
    """Let the C allocator keep what a step frees for the next one, which needs as much again.

    By default glibc gives large blocks back to the system, and every step waits while they are cleared anew: up to
    a fifth of its time. Other allocators stay as they are, and so does one that the environment has set up.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in _MALLOC.items():
        mallopt(parameter, value)


def return_memory() -> None:
    """Give what the C allocator keeps unused back to the system, for a measurement to start anew; glibc alone."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def reclaim_memory(device: torch.device) -> None:
    """Give the system back what is kept unused: of a GPU what torch caches, else what the C allocator does."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    else:
        return_memory()


def free_memory() -> int | None:
    """Bytes of the host's memory that are to be had now, within the limits of a container or a batch job; None where
    the system does not tell."""
    found = list(_free_in_groups())
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min(found)) if found else None


def _free_in_groups() -> Iterator[int]:
    """What each control group of this process, and those around it, leave of their limits."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if not controllers:
            root, names, cache = "/sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            names, cache = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
            root = "/sys/fs/cgroup/memory"
        else:
            continue
        place = Path(root + own)
        for folder in (place, *place.parents):
            # Where there is no limit, the file says "max", or is not there.
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((folder / name).read_text()) for name in names)
                facts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(facts.get(cache, 0))
