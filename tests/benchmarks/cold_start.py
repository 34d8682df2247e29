"""Whole commands in cold processes: ``ddim sample`` in turns with a script that does the same with diffusers.

    python tests/benchmarks/cold_start.py --repeats 5
    python tests/benchmarks/cold_start.py --dtype bfloat16 -- --set sampling.batch_size=16

From the start of the process to its end, files included; diffusers in float32 always, as a user would
have it. What follows ``--`` is handed to ``ddim sample``. Before anything is timed the compiled network
is built and kept, and each command runs once, so that files come from the disk's cache. In float32
the pictures are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "ddim_cli" / "models" / "bundled" / "mnist"
SCRIPT = Path(__file__).with_name("diffusers_script.py")
DDIM = [sys.executable, "-m", "ddim_cli"]
JOBS = ((64, 50), (1, 10))


def seconds_of(command: list[str]) -> float:
    """Wall time of a process. Ends the benchmark with its messages if it fails."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stderr}")
    return seconds


def largest_difference(ours: Path, theirs: Path, images: int) -> int:
    """Of any two pixels of the same seed, in 1/255."""
    found = 0
    for seed in range(images):
        a, b = (np.asarray(Image.open(folder / f"{seed:06d}.png"), dtype=int) for folder in (ours, theirs))
        found = max(found, int(abs(a - b).max()))
    return found


def compare(images: int, steps: int, args: argparse.Namespace, folder: Path) -> None:
    plan = ["-n", images, "--dtype", args.dtype, "--device", args.device]
    sample = [*DDIM, "sample", *plan, "--steps", steps, "--overwrite", "-q", *args.extra]
    script = [sys.executable, SCRIPT, MODEL, folder / "theirs", "--images", images, "--steps", steps]
    commands = {
        "kept code": [*sample, "-o", folder / "kept"],
        "--no-compile": [*sample, "--no-compile", "-o", folder / "plain"],
        "diffusers": [*script, "--device", args.device],
    }
    commands = {name: list(map(str, command)) for name, command in commands.items()}
    seconds_of([*DDIM, "compile", *map(str, plan)])
    for command in commands.values():
        seconds_of(command)
    rounds = [{name: seconds_of(command) for name, command in commands.items()} for _ in range(args.repeats)]
    print(f"{images} x {steps} steps, {args.dtype}: diffusers {median(r['diffusers'] for r in rounds):.2f} s")
    for name, out in (("kept code", "kept"), ("--no-compile", "plain")):
        ratios = [r[name] / r["diffusers"] for r in rounds]
        difference = largest_difference(folder / out, folder / "theirs", images)
        print(
            f"  ddim, {name}: {median(r[name] for r in rounds):.2f} s, {median(ratios):.3f} x diffusers "
            f"({min(ratios):.3f}-{max(ratios):.3f}); pictures differ by {difference}/255 at most",
            flush=True,
        )
        if args.dtype == "float32" and difference > 1:
            sys.exit("these are not the same pictures")


def time_small(args: list[str], repeats: int) -> None:
    seconds_of([*DDIM, *args])
    values = [seconds_of([*DDIM, *args]) for _ in range(repeats)]
    print(f"ddim {' '.join(args)}: {median(values):.3f} s ({min(values):.3f}-{max(values):.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("extra", nargs="*", help="options of ddim sample, after --")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    time_small(["--help"], args.repeats)
    time_small(["config", "check", "configs/default.toml"], args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        for images, steps in JOBS:
            compare(images, steps, args, Path(folder) / f"{images}-{steps}")


if __name__ == "__main__":
    main()
