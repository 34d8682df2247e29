"""Host memory over a long run: how far the process grows after its first batch.

    python tests/benchmarks/host_memory.py --images 50000 --steps 1
    python tests/benchmarks/host_memory.py --images 5000 --device cuda

A run of the bundled model into a temporary folder, through the same calls as ``ddim sample``, with all
its files. The resident memory is read after every batch.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from ddim_cli.config.layers import table_layer
from ddim_cli.sampling.executor import execute
from ddim_cli.sampling.job import make_job
from ddim_cli.sampling.product import SeedPictures
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import resolve


def resident() -> int:
    """Bytes of this process that are in memory now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


class Watch(Reporter):
    """Reads the memory after each batch, and says so ten times a run."""

    def __init__(self, images: int):
        self.images, self.made = images, 0
        self.readings: list[int] = []

    def batch(self, images: int) -> None:
        before, self.made = self.made, self.made + images
        self.readings.append(resident())
        tenth = max(1, self.images // 10)
        if before // tenth != self.made // tenth or len(self.readings) == 1:
            print(f"{self.made:>8,} images: {self.readings[-1] / 1e6:,.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=100, help="MB of growth that are still flat")
    args = parser.parse_args()
    watch = Watch(args.images)
    with tempfile.TemporaryDirectory() as folder:
        table = {
            "model": {"source": args.model},
            "sampling": {"num_images": args.images, "steps": args.steps, "batch_size": args.batch_size, "eta": 1.0},
            # One step from the grid's far end, with noise of its own, does what many do.
            "scheduler": {"timestep_spacing": "trailing"},
            "runtime": {"device": args.device},
            "output": {"dir": str(Path(folder) / "out"), "subdirs": True},
        }
        job = make_job(resolve([table_layer(table, "host_memory")]))
        print(f"before loading: {resident() / 1e6:,.0f} MB")
        started = time.perf_counter()
        execute(job, SeedPictures(), watch)
        seconds = time.perf_counter() - started
    first, most, last = watch.readings[0] / 1e6, max(watch.readings) / 1e6, watch.readings[-1] / 1e6
    growth = most - first
    print(
        f"{args.images:,} images in {seconds:.0f} s; after the first batch grown by {growth:.1f} MB at most, "
        f"{last - first:.1f} MB at the end"
    )
    if growth > args.limit:
        sys.exit(f"more than {args.limit:g} MB")


if __name__ == "__main__":
    main()
