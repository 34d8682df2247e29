"""The host's own settings, for a process that does nothing but sample."""

from __future__ import annotations

import contextlib
import ctypes
import os

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
