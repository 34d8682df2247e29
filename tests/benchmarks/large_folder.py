"""What a folder of 50,000 finished 32x32 pairs costs: deciding what is left, verifying, comparing, one .npz.

    python tests/benchmarks/large_folder.py [IMAGES] [FOLDER]

Makes the pairs in FOLDER (a temporary one, unless it is named; then they stay for the next time). Their sidecars are
those of a run of 50 steps with the bundled model.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ddim_cli.config.layers import Layer
from ddim_cli.evaluation.compare import Limits, compare
from ddim_cli.evaluation.verify import verify
from ddim_cli.outputs.writer import BackgroundWriter
from ddim_cli.sampling.executor import execute, pending
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.loop import Picture
from ddim_cli.sampling.product import SeedPictures, collect_npz, name_npz
from ddim_cli.sampling.resolve import resolve


def job_of(images: int, folder: Path) -> Job:
    """The job whose pictures the folder is to hold."""
    values = {
        "sampling.num_images": images,
        "output.dir": str(folder),
        "output.subdirs": True,
        "runtime.device": "cpu",
    }
    return make_job(resolve([Layer(values, dict.fromkeys(values, "here"))]))


def fill(job: Job) -> None:
    """Random pictures in place of sampled ones."""
    job.folder.create()
    job.folder.start(job.run.config.seeds(), job.record, complete=False)
    draw = np.random.default_rng(0)
    with BackgroundWriter(job.folder.path) as writer:
        for item in job.items:
            pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            writer.submit(SeedPictures().save, job, Picture(item, pixels, None, None, 0.01, job.batch_size))


def timed(what: str, act, *args):
    """Call ``act``, and print how long it took and on how much CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    found = act(*args)
    print(f"{what:<32} {time.perf_counter() - start:6.2f} s  ({time.process_time() - cpu:.2f} s of CPU)", flush=True)
    return found


def measure(images: int, path: Path) -> None:
    job = job_of(images, path)
    if not job.folder.manifest.exists():
        timed(f"write {images:,} pairs", fill, job)
    assert not timed("decide what is left", pending, job, SeedPictures())
    timed("sample again: nothing to do", execute, job, SeedPictures())
    assert timed("verify", verify, path).problems == ()
    assert timed("compare with itself", compare, path, path, Limits(0, 40.0)).ok
    timed("write one .npz", collect_npz, job, job.items, name_npz(path / "all.npz", overwrite=True))
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    if len(sys.argv) > 2:
        measure(images, Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(images, Path(folder) / "out")


if __name__ == "__main__":
    main()
