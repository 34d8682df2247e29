"""How fast sampling is, a batch size at a time, beside diffusers on the same model where that is asked for.

What is timed is the whole way from seeds to pictures: noise, network, scheduler, the copy to the host, and
PNGs and sidecars in a temporary folder, as ``ddim sample`` makes them. Every contestant is warmed up by one
batch; then they take turns, so that whatever else the machine does falls on all of them, and a ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ddim_cli.errors import RunError
from ddim_cli.evaluation import pixels
from ddim_cli.evaluation.baselines import (
    Baseline,
    Contestant,
    check_comparable,
    describe_baseline,
    make_baseline,
    pipeline_name,
    step_note,
)
from ddim_cli.evaluation.gauges import (
    NetworkClock,
    PeakMemory,
    is_emulated,
    matrix_peak,
    network_alone,
    spread,
    synchronize,
)
from ddim_cli.models.device import choose_device, choose_dtype
from ddim_cli.models.inspect import flops
from ddim_cli.outputs.writer import BackgroundWriter
from ddim_cli.sampling.host import keep_memory
from ddim_cli.sampling.items import Choices, SeedItems
from ddim_cli.sampling.job import Job, make_job, rows_an_image
from ddim_cli.sampling.loop import Denoiser, OnSlower, Picture, is_out_of_memory, run_batches
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.precision import tf32
from ddim_cli.sampling.product import Product
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run, settle
from ddim_cli.sampling.sampler import make_sampler

SCHEMA = "ddim-cli/bench/1"
# A GPU's batches overlap with the writing of the one before, which a single one would not show.
BATCHES_ON_GPU, BATCHES_ON_CPU = 4, 1
TIMED = {
    True: "from seeds to PNGs on disk (ours with their sidecars)",
    False: "from seeds to pictures in memory",
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure.

    ``repeats`` timed rounds after the warm-up, each of ``batches`` batches (None: by the device);
    ``against`` names of `BASELINES`; ``psnr_images`` how many to compare with float32, where the
    dtype is another (None: 16, of a latent model 1); ``scratch`` an empty folder.
    """

    run: Run
    batch_sizes: tuple[int, ...]
    scratch: Path
    repeats: int = 5
    batches: int | None = None
    against: tuple[str, ...] = ()
    files: bool = True
    psnr_images: int | None = None


class Lap(NamedTuple):
    """One timed round of one contestant; ``first`` is when its first batch's pictures were there. Seconds."""

    seconds: float
    first: float
    pictures: list[np.ndarray]


class Ours(Contestant):
    """``ddim sample``, without the parts that happen once a run."""

    def __init__(self, job: Job, on_slower: OnSlower = lambda what, why: None):
        network, self.compiled = Networks().load(job.use(len(job.items)), Reporter())
        # As ddim sample does, for the process: diffusers beside it has the same of it.
        keep_memory()
        self._job = job.with_compiled(self.compiled)
        sampler = make_sampler(job.run, network, job.device, job.dtype)
        # A GPU's calls return before they are done: there, a clock around them would measure something else.
        self._clock = NetworkClock(sampler.down.network) if job.device.type == "cpu" else None
        if self._clock is not None:
            sampler = replace(sampler, down=replace(sampler.down, network=self._clock))
        # One for all laps: a graph is captured once a run, as a network is loaded once.
        self.denoiser = Denoiser(sampler, on_slower=on_slower)

    def _items(self, seeds: Sequence[int]) -> SeedItems:
        return SeedItems(seeds, Choices.of(self._job.run.config))

    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        def out_of_memory(halved: int) -> None:
            # A run would go on with the half; that is not what is to be measured.
            raise RunError(_no_memory_for(self._job.device, batch_size))

        if self._clock is not None:
            self._clock.seconds = 0.0
        product, job = Product(), self._job
        writing: AbstractContextManager[BackgroundWriter | None] = contextlib.nullcontext()
        if folder is not None:
            job, writing = replace(job, folder=replace(job.folder, path=folder)), BackgroundWriter(folder)
        with writing as writer:
            for pictures in run_batches(self.denoiser, self._items(seeds), batch_size, on_halved=out_of_memory):
                if writer is not None:
                    for picture in pictures:
                        writer.submit(product.save, job, picture)
                yield [picture.pixels for picture in pictures]

    def network_seconds(self, seeds: Sequence[int], batch_size: int) -> float:
        """Of the last lap: what its network calls took; on a GPU, what they take alone, measured now."""
        if self._clock is not None:
            return self._clock.seconds
        alone = network_alone(self.denoiser.sampler, self._items(seeds[:batch_size]), batch_size)
        return alone * (len(seeds) / batch_size)


class Bench:
    """Runs a benchmark; ``tell`` is called with what is being done, for a person who waits, ``warn`` with trouble.

    Of what is told, the second argument says whether it is one of many of its kind, such as a round.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        tell: Callable[[str, bool], None] = lambda text, one_of_many: None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self._benchmark, self._tell, self._warn, self._told_slower = benchmark, tell, warn, False
        self._device = choose_device(benchmark.run.config.runtime.device)
        on_gpu = self._device.type == "cuda"
        self._batches = benchmark.batches or (BATCHES_ON_GPU if on_gpu else BATCHES_ON_CPU)
        if benchmark.against:
            dtype = choose_dtype(benchmark.run.config.runtime.dtype, self._device)
            check_comparable(benchmark.run, benchmark.against, dtype)
        self._runs = {size: self._run_of(size, size * self._batches) for size in benchmark.batch_sizes}

    def measure(self) -> dict[str, Any]:
        """The whole of it, as JSON has it.

        Raises:
            RunError: where memory does not suffice for a batch size.
            DdimError: as `make_job` and `Networks.load` do.
        """
        with tf32(self._benchmark.run.config.runtime.tf32):
            return self._measure()

    def _measure(self) -> dict[str, Any]:
        benchmark, [first, *_] = self._benchmark, self._benchmark.batch_sizes
        job = make_job(self._runs[first])
        if is_emulated(job.device, job.dtype):
            self._warn(_emulated(job))
        self._tell("measuring the device's matrix peak", False)
        peak = matrix_peak(job.device, job.dtype)
        cost = flops(benchmark.run.model)
        results = [self._at(size, cost, peak) for size in benchmark.batch_sizes]
        return {
            "schema": SCHEMA,
            "model": _model(job),
            "sampling": job.record["sampling"],
            "timed": TIMED[benchmark.files],
            "repeats": benchmark.repeats,
            "batches": self._batches,
            "machine": _machine(job, peak),
            "network_time": "summed over its calls" if job.device.type == "cpu" else "measured alone",
            "flops_per_image_and_step": cost,
            "against": {
                name: describe_baseline(name, job.dtype, pipeline_name(job.run.model), job.run.config.sampling.order)
                for name in benchmark.against
            },
            "stride": step_note(job.run) if benchmark.against else None,
            "results": results,
            "psnr": [result.pop("psnr") for result in results][-1],
        }

    def _run_of(self, batch_size: int, images: int, **runtime: Any) -> Run:
        """The run with another batch size, number of images, and runtime. Raises ConfigError."""
        run, config = self._benchmark.run, self._benchmark.run.config
        sampling = {"batch_size": batch_size, "num_images": images, "seed": config.seeds()[0], "seeds": None}
        # PNGs, as the others write.
        files = {"subdirs": False, "grid": False, "image_format": "png"}
        output = {"dir": str(self._benchmark.scratch / "ours"), **files}
        changed = config.model_copy(
            update={
                "sampling": config.sampling.model_copy(update=sampling),
                "runtime": config.runtime.model_copy(update=runtime),
                "output": config.output.model_copy(update=output),
            }
        )
        return settle(replace(run.resolved, config=changed), run.model)

    def _at(self, batch_size: int, cost: int, peak: float) -> dict[str, Any]:
        try:
            return self._measure_size(batch_size, cost, peak)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(_no_memory_for(self._device, batch_size)) from None
        finally:
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure_size(self, batch_size: int, cost: int, peak: float) -> dict[str, Any]:
        """One batch size: load, warm up, then ``repeats`` rounds in which all contestants take turns."""
        if "diffusers+" in self._benchmark.against:
            # What was compiled for another batch size is out of use, and counts towards dynamo's limit.
            torch.compiler.reset()
        job = make_job(self._runs[batch_size])
        memory = PeakMemory(job.device)
        before = memory.now()
        self._tell(f"batch {batch_size}: loading, and the first batch", False)
        started = time.perf_counter()
        ours = Ours(job, self._slower)
        synchronize(job.device)
        loaded = time.perf_counter()
        seeds = job.run.config.seeds()
        warm = self._lap(ours, seeds[:batch_size], batch_size)
        used = memory.read()
        others: dict[str, Baseline] = {}
        others_warm, others_used = dict[str, Lap](), dict[str, int]()
        for name in self._benchmark.against:
            self._tell(f"batch {batch_size}: the first batch of {name}", False)
            gauge = PeakMemory(job.device)
            held = gauge.now()
            others[name] = make_baseline(name, job.run, job.device, job.dtype)
            others_warm[name] = self._lap(others[name], seeds[:batch_size], batch_size)
            # As if it were alone: what those before it hold is no memory of its own.
            others_used[name] = gauge.read() - held + before

        laps: dict[str, list[Lap]] = {name: [] for name in ("ours", *others)}
        network: list[float] = []
        others_network: dict[str, list[float]] = {name: [] for name in others}
        for i in range(self._benchmark.repeats):
            self._tell(f"batch {batch_size}: round {i + 1} of {self._benchmark.repeats}", True)
            laps["ours"].append(self._lap(ours, seeds, batch_size))
            network.append(ours.network_seconds(seeds, batch_size))
            for name, other in others.items():
                laps[name].append(self._lap(other, seeds, batch_size))
                if other.clock is not None:
                    others_network[name].append(other.clock.seconds)
        for contestant in (ours, *others.values()):
            contestant.close()
        del contestant
        others.clear()
        # Of the last batch size alone: it does not bear on the arithmetic, and what is compiled is used again.
        compared = self._psnr(ours, job) if batch_size == self._benchmark.batch_sizes[-1] else None

        rows = len(seeds) * len(job.run.timesteps) * rows_an_image(job.run)
        seconds = [lap.seconds for lap in laps["ours"]]
        speed = cost * rows / statistics.median(network)
        return {
            "batch_size": batch_size,
            "compiled": ours.compiled,
            "images": len(seeds),
            **speeds(seconds, len(seeds), len(job.run.timesteps)),
            "load_seconds": loaded - started,
            "first_batch_seconds": warm.seconds,
            "time_to_first_image_seconds": spread([lap.first for lap in laps["ours"]]),
            "peak_memory": {"bytes": used, "of": memory.meaning},
            "network_seconds": spread(network),
            "network_ms_per_image_and_step": spread(
                [1000 * s / (len(seeds) * len(job.run.timesteps)) for s in network]
            ),
            "share_outside_network": spread([1 - n / s for n, s in zip(network, seconds, strict=True)]),
            "flops_per_second": speed,
            "share_of_matrix_peak": speed / peak,
            "against": {
                name: {
                    **speeds([lap.seconds for lap in laps[name]], len(seeds), len(job.run.timesteps)),
                    "first_batch_seconds": others_warm[name].seconds,
                    "peak_memory": {"bytes": others_used[name], "of": memory.meaning},
                    "network_seconds": spread(others_network[name]) if others_network[name] else None,
                    "network_ratio": ratio(network, others_network[name]) if others_network[name] else None,
                    "ratio": ratio(seconds, [lap.seconds for lap in laps[name]]),
                    "largest_difference": largest_difference(warm.pictures, others_warm[name].pictures),
                }
                for name in self._benchmark.against
            },
            "psnr": compared,
        }

    def _lap(self, contestant: Contestant, seeds: Sequence[int], batch_size: int) -> Lap:
        """Time one go, into a folder that is fresh and is deleted outside of the time."""
        folder = self._benchmark.scratch / "lap" if self._benchmark.files else None
        if folder is not None:
            folder.mkdir()
        first, pictures = math.nan, list[np.ndarray]()
        # Whatever the others left behind is not cleared up in this one's time.
        gc.collect()
        synchronize(self._device)
        started = time.perf_counter()
        for batch in contestant.batches(seeds, batch_size, folder):
            if not pictures:
                first = time.perf_counter() - started
            pictures += batch
        synchronize(self._device)
        seconds = time.perf_counter() - started
        if folder is not None:
            shutil.rmtree(folder)
        return Lap(seconds, first, pictures)

    def _psnr(self, ours: Ours, job: Job) -> dict[str, Any] | None:
        """PSNR against float32, of the same seeds, in dB; None where the dtype is float32, or nobody asks."""
        images = self._benchmark.psnr_images
        if images is None:
            images = 16 if job.run.model.latents is None else 1
        if job.dtype == torch.float32 or images == 0:
            return None
        self._tell(f"{images} images in {str(job.dtype).removeprefix('torch.')} and in float32", False)
        exact = make_job(self._run_of(min(job.batch_size, images), images, dtype="float32", compile=False))

        def sample(contestant: Ours, batch_size: int) -> list[Picture]:
            return [p for batch in run_batches(contestant.denoiser, exact.items, batch_size) for p in batch]

        values = psnr(sample(ours, job.batch_size), sample(Ours(exact), exact.batch_size))
        return {"images": images, "median_db": statistics.median(values), "worst_db": min(values)}

    def _slower(self, what: str, why: str) -> None:
        """Of every batch size it would be the same."""
        if not self._told_slower:
            self._told_slower = True
            self._warn(f"{what}: {why}")


def _emulated(job: Job) -> str:
    dtype = str(job.dtype).removeprefix("torch.")
    return f"this CPU has no instructions for {dtype}, and emulates it, far slower than float32"


def _no_memory_for(device: torch.device, batch_size: int) -> str:
    return f"out of memory on {device} with a batch of {batch_size}"


def speeds(seconds: Sequence[float], images: int, steps: int) -> dict[str, Any]:
    """Seconds of the rounds, images a second and milliseconds an image and step, each with its spread."""
    return {
        "seconds": spread(seconds),
        "images_per_second": spread([images / s for s in seconds]),
        "ms_per_image_and_step": spread([1000 * s / (images * steps) for s in seconds]),
    }


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times as fast ours is: their seconds over ours, a round at a time."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def largest_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> int:
    """Of any two pixels, in 1/255; uint8 [H, W, C] each."""
    return max(pixels.largest_difference(p, q) for p, q in zip(a, b, strict=True))


def psnr(pictures: Sequence[Picture], exact: Sequence[Picture]) -> list[float]:
    """Peak signal-to-noise ratio of each pair of `Picture` in dB, of x0 clipped to [-1, 1]; 200 where equal."""
    found = []
    for a, b in zip(pictures, exact, strict=True):
        assert a.x0 is not None
        assert b.x0 is not None
        error = (a.x0.clamp(-1, 1) - b.x0.clamp(-1, 1)).square().mean().item()
        # Of pictures in [0, 1]: half the distances of [-1, 1].
        found.append(min(200.0, -10 * math.log10(error / 4)) if error > 0 else 200.0)
    return found


def _model(job: Job) -> dict[str, Any]:
    model = job.run.model
    return {
        "source": model.source,
        "kind": model.kind,
        "parameters": model.all_parameters,
        "channels": model.shape[0],
        "height": model.size[0],
        "width": model.size[1],
    }


def _machine(job: Job, peak: float) -> Mapping[str, Any]:
    runtime = {k: v for k, v in job.record["runtime"].items() if k not in ("batch_size", "compile")}
    return {
        **runtime,
        "platform": platform.platform(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "emulated": is_emulated(job.device, job.dtype),
        "matrix_peak_flops_per_second": peak,
    }
