"""What a million pictures in tar shards cost: planning, finding what is left, writing, and memory.

    python tests/benchmarks/million.py [--images 1000000] [--made 20000] [--folder DIR] [--whole]

The pictures are 8x8, made in one step by a stub of a few operations in place of a network: what is measured is all that
is around one. First so many pictures (``--made``) are written for the rate; with ``--whole`` all of them. Otherwise
the shards but the last are copies of the first under their own names, so that 999 of 1,000 are there. Then a fresh
process looks for what is left, and makes it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ddim_cli.config.layers import layers_of
from ddim_cli.outputs.shards import Index, index_name, read_index, shard_name
from ddim_cli.sampling.executor import execute, pending
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.network import Networks, Use
from ddim_cli.sampling.product import SeedPictures
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import resolve

SHARD = 1000


class Stub(Networks):
    """In place of a network: one multiplication."""

    def load(self, use: Use, reporter: Reporter):
        return (lambda x, t: 0.1 * x), False


def make_model(folder: Path) -> Path:
    """A model of 8x8 pictures in three colours, of which only the description is read."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return folder


def job_of(images: int, model: Path, out: Path) -> Job:
    config = {
        "model": {"source": str(model)},
        "sampling": {"num_images": images, "steps": 1, "batch_size": 512},
        "runtime": {"device": "cpu", "compile": False},
        "output": {"dir": str(out), "format": "tar", "shard_size": SHARD, "grid": False},
    }
    return make_job(resolve(layers_of(config)))


def copy_shards(out: Path, images: int) -> None:
    """Stand-ins for all shards but the last: the members of the first, indexed under the names of their own."""
    first, whole = read_index(out, 0), (out / shard_name(0)).read_bytes()
    for number in range(1, images // SHARD - 1):
        entries = [entry._replace(key=f"{seed:06d}") for seed, entry in enumerate(first.entries, start=number * SHARD)]
        (out / index_name(number)).write_bytes(Index(number, len(whole), first.ending, entries).encoded())
        with (out / shard_name(number)).open("wb") as tar:
            tar.truncate(len(whole))


def peak() -> str:
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB"


def write(images: int, model: Path, out: Path, profile: bool) -> None:
    job, profiler = job_of(images, model, out), cProfile.Profile()
    if profile:
        profiler.enable()
    summary = execute(job, SeedPictures(), networks=Stub())
    if profile:
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    print(f"wrote {summary.made:,} pictures: {summary.images_per_second:,.0f} a second, {peak()}", flush=True)


def resume(images: int, model: Path, out: Path) -> None:
    started = time.perf_counter()
    job = job_of(images, model, out)
    planned = time.perf_counter()
    left = pending(job, SeedPictures())
    found = time.perf_counter()
    print(f"planned {images:,} in {planned - started:.2f} s; found the {len(left):,} left in {found - planned:.2f} s")
    summary = execute(job, SeedPictures(), networks=Stub())
    print(f"made {summary.made:,} and looked again in {time.perf_counter() - found:.2f} s, {peak()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--made", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--stage", choices=("write", "resume"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage is not None:
        folder = options.folder
        if options.stage == "write":
            write(options.made, folder / "model", folder / "out", options.profile)
        else:
            resume(options.images, folder / "model", folder / "out")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "model").exists():
            make_model(folder / "model")
        out = folder / "out"

        def stage(name: str, *more: str) -> None:
            sizes = ["--images", str(options.images), "--made", str(made)]
            command = [sys.executable, __file__, "--folder", str(folder), "--stage", name, *sizes, *more]
            subprocess.run(command, check=True)

        made = options.images - SHARD if options.whole else options.made
        stage("write", *(["--profile"] if options.profile else []))
        if not options.whole:
            for number in range(1, -(-options.made // SHARD)):
                (out / index_name(number)).unlink()
                (out / shard_name(number)).unlink()
            copy_shards(out, options.images)
        stage("resume")
        if options.folder is not None:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
