"""``ddim env``: print what a bug report needs."""

from __future__ import annotations

import os
import platform

from ddim_cli import __version__
from ddim_cli.cli import console, panels
from ddim_cli.cli.options import Json, Verbose

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "pydantic",
    "typer",
    "rich",
    "pillow",
    "tomli",
    "numpy",
)
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_COLOR", "PYTORCH_ALLOC_CONF")


@console.handles_errors
def env(verbose: Verbose = False, json: Json = False) -> None:
    """
    Print versions, devices, and what a bug report needs.

    [bold]Examples[/bold]

    \b
    ddim env
    ddim env --json
    """
    from importlib import metadata

    import torch

    from ddim_cli.models.describe import bundled_names
    from ddim_cli.models.device import choose_device, choose_dtype
    from ddim_cli.sampling.precision import device_name, total_memory

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    auto = choose_device("auto")
    rows = {
        "ddim": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in PACKAGES},
        **{d: f"{device_name(torch.device(d))}, {total_memory(torch.device(d)) / 2**30:.1f} GiB" for d in devices},
        "cuda of torch": torch.version.cuda or "none",
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "auto": f"{auto} in {str(choose_dtype('auto', auto)).removeprefix('torch.')}",
        "bundled models": ", ".join(bundled_names()),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if json:
        console.print_json(rows)
    else:
        panels.show_table(rows, "ddim env", "cyan")
