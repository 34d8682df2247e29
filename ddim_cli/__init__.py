"""DDIM sampling (Song, Meng, Ermon, arXiv:2010.02502) as a command-line tool and a small library.

The names of ``__all__`` are imported on first use, so that ``import ddim_cli`` and ``ddim --help`` do not pay for
torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "DDIMScheduler": "ddim_cli.schedulers.ddim",
    "Sampler": "ddim_cli.sampling.engine",
    "edit": "ddim_cli.experiments.edit",
    "interpolate": "ddim_cli.experiments.interpolate",
    "invert": "ddim_cli.experiments.invert",
    "load_model": "ddim_cli.models.load",
    "sample": "ddim_cli.sampling.api",
    "sweep": "ddim_cli.experiments.sweep",
}

__all__ = ["DDIMScheduler", "Sampler", "__version__", "edit", "interpolate", "invert", "load_model", "sample", "sweep"]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
