"""Whole commands in cold processes: ``ddim sample`` in turns with a script that does the same with diffusers.

    python tests/benchmarks/cold_start.py --repeats 5
    python tests/benchmarks/cold_start.py --dtype bfloat16 -- --no-compile

From the start of the process to its end, files included; diffusers in float32 always, as a user would
have it. What follows ``--`` is handed to ``ddim sample``. Before anything is timed each command runs
once: files come from the disk's cache, and an artefact that ddim keeps has been made. In float32 the
pictures are compared.
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
    ours, theirs = folder / "ours", folder / "theirs"
    sample = [*DDIM, "sample", "-n", images, "--steps", steps, "-o", ours, "--overwrite", "--dtype", args.dtype]
    sample = [*map(str, sample), "--device", args.device, "-q", *args.extra]
    script = [sys.executable, SCRIPT, MODEL, theirs, "--images", images, "--steps", steps, "--device", args.device]
    script = list(map(str, script))
    first = seconds_of(sample), seconds_of(script)
    difference = largest_difference(ours, theirs, images)
    rounds = []
    for _ in range(args.repeats):
        rounds.append((seconds_of(sample), seconds_of(script)))
    ratios = [mine / others for mine, others in rounds]
    print(
        f"{images} x {steps} steps, {args.dtype}: ddim {median(r[0] for r in rounds):.2f} s (first {first[0]:.2f}), "
        f"diffusers {median(r[1] for r in rounds):.2f} s; {median(ratios):.3f} x diffusers "
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
