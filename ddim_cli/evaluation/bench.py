"""How fast sampling is, a batch size at a time, beside diffusers on the same model where that is asked for.

What is timed is the whole way from seeds to pictures: noise, network, scheduler, the copy to the host, and
PNGs and sidecars in a temporary folder, as ``ddim sample`` makes them. Every contestant is warmed up by one
batch; then they take turns, so that whatever else the machine does falls on all of them, and a ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ddim_cli.errors import RunError
from ddim_cli.evaluation import pixels
from ddim_cli.evaluation.baselines import check_comparable, describe_baseline, make_baseline, stride_note
from ddim_cli.evaluation.gauges import (
    NetworkClock,
    PeakMemory,
    is_emulated,
    matrix_peak,
    network_alone,
    spread,
    synchronize,
)
from ddim_cli.models.device import choose_device
from ddim_cli.models.inspect import flops
from ddim_cli.outputs.writer import PictureWriter
from ddim_cli.sampling.host import keep_memory
from ddim_cli.sampling.loop import Picture, is_out_of_memory, run_batches
from ddim_cli.sampling.resolve import Run, judge
from ddim_cli.sampling.run import Job, Reporter, load_job_network, make_job, make_sampler

SCHEMA = "ddim-cli/bench/1"
# A GPU's batches overlap with the writing of the one before, which a single one would not show.
BATCHES_ON_GPU, BATCHES_ON_CPU = 4, 1
TIMED = {
    True: "from seeds to PNGs on disk (ours with their sidecars)",
    False: "from seeds to pictures in memory",
}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    ``repeats`` timed rounds after the warm-up, each of ``batches`` batches (None: by the device);
    ``against`` names of `BASELINES`; ``psnr_images`` how many to compare with float32, where the
    dtype is another; ``scratch`` an empty folder.
    """

    run: Run
    batch_sizes: tuple[int, ...]
    scratch: Path
    repeats: int = 5
    batches: int | None = None
    against: tuple[str, ...] = ()
    files: bool = True
    psnr_images: int = 16


class Lap(NamedTuple):
    """One timed round of one contestant; ``first`` is when its first batch's pictures were there. Seconds."""

    seconds: float
    first: float
    pictures: list[np.ndarray]


class Contestant(Protocol):
    """Someone who makes pictures of seeds."""

    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        """Yield each batch's pictures, uint8 [H, W, C]; at the end all are in ``folder``, unless it is None."""

    def close(self) -> None: ...


class Ours:
    """``ddim sample``, without the parts that happen once a run."""

    def __init__(self, job: Job):
        network, self._job = load_job_network(job, len(job.seeds), Reporter())
        shape = (job.run.model.channels, *job.run.model.size)
        sampler = make_sampler(job.run, network, job.device, job.dtype, shape)
        # A GPU's calls return before they are done: there, a clock around them would measure something else.
        self._clock = NetworkClock(sampler.network) if job.device.type == "cpu" else None
        self.sampler = replace(sampler, network=self._clock or sampler.network)

    @property
    def compiled(self) -> bool:
        """Whether its network is compiled code."""
        return self._job.record["runtime"]["compile"]

    def batches(self, seeds: Sequence[int], batch_size: int, folder: Path | None) -> Iterator[list[np.ndarray]]:
        def out_of_memory(halved: int) -> None:
            # A run would go on with the half; that is not what is to be measured.
            raise RunError(_no_memory_for(self.sampler.device, batch_size))

        if self._clock is not None:
            self._clock.seconds = 0.0
        writer = PictureWriter(replace(self._job.folder, path=folder), self._job.record) if folder else None
        try:
            for pictures in run_batches(self.sampler, seeds, batch_size, on_halved=out_of_memory):
                if writer is not None:
                    for picture in pictures:
                        writer.write(picture.seed, picture.pixels, picture.seconds, picture.batch_size)
                yield [picture.pixels for picture in pictures]
        finally:
            if writer is not None:
                writer.close()

    def network_seconds(self, seeds: Sequence[int], batch_size: int) -> float:
        """Of the last lap: what its network calls took; on a GPU, what they take alone, measured now."""
        if self._clock is not None:
            return self._clock.seconds
        return network_alone(self.sampler, seeds[:batch_size], batch_size) * (len(seeds) / batch_size)

    def close(self) -> None:
        pass


class Bench:
    """Measures a plan; ``tell`` is called with what is being done, for a person who waits, ``warn`` with what is wrong.

    Of what is told, the second argument says whether it is one of many of its kind, such as a round.
    """

    def __init__(
        self,
        plan: Plan,
        tell: Callable[[str, bool], None] = lambda text, one_of_many: None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        self._plan, self._tell, self._warn = plan, tell, warn
        self._device = choose_device(plan.run.config.runtime.device)
        on_gpu = self._device.type == "cuda"
        self._batches = plan.batches or (BATCHES_ON_GPU if on_gpu else BATCHES_ON_CPU)
        if plan.against:
            check_comparable(plan.run, plan.against)
        self._runs = {size: self._run_of(size, size * self._batches) for size in plan.batch_sizes}

    def measure(self) -> dict[str, Any]:
        """The whole of it, as JSON has it.

        Raises:
            RunError: where memory does not suffice for a batch size.
            DdimError: as `run.make_job` and `run.load_network` do.
        """
        plan, [first, *_] = self._plan, self._plan.batch_sizes
        # As ddim sample does, once for the process: diffusers beside it has the same of it.
        keep_memory()
        job = make_job(self._runs[first])
        if is_emulated(job.device, job.dtype):
            self._warn(_emulated(job))
        self._tell("measuring the device's matrix peak", False)
        peak = matrix_peak(job.device, job.dtype)
        cost = flops(plan.run.model)
        results = [self._at(size, cost, peak) for size in plan.batch_sizes]
        return {
            "schema": SCHEMA,
            "model": _model(job),
            "sampling": job.record["sampling"],
            "timed": TIMED[plan.files],
            "repeats": plan.repeats,
            "batches": self._batches,
            "machine": _machine(job, peak),
            "network_time": "summed over its calls" if job.device.type == "cpu" else "measured alone",
            "flops_per_image_and_step": cost,
            "against": {name: describe_baseline(name, job.dtype) for name in plan.against},
            "stride": stride_note(job.run) if plan.against else None,
            "results": results,
            "psnr": [result.pop("psnr") for result in results][-1],
        }

    def _run_of(self, batch_size: int, images: int, **runtime: Any) -> Run:
        """The plan's run with another batch size, number of images, and runtime. Raises ConfigError."""
        run, config = self._plan.run, self._plan.run.config
        sampling = {"batch_size": batch_size, "num_images": images, "seed": config.seeds()[0], "seeds": None}
        output = {"dir": str(self._plan.scratch / "ours"), "subdirs": False, "grid": False}
        changed = config.model_copy(
            update={
                "sampling": config.sampling.model_copy(update=sampling),
                "runtime": config.runtime.model_copy(update=runtime),
                "output": config.output.model_copy(update=output),
            }
        )
        return judge(replace(run.resolved, config=changed), run.model)

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
        if "diffusers+" in self._plan.against:
            # What was compiled for another batch size is out of use, and counts towards dynamo's limit.
            torch.compiler.reset()
        job = make_job(self._runs[batch_size])
        memory = PeakMemory(job.device)
        self._tell(f"batch {batch_size}: loading, and the first batch", False)
        started = time.perf_counter()
        ours = Ours(job)
        synchronize(job.device)
        loaded = time.perf_counter()
        seeds = job.seeds[:batch_size]
        warm = self._lap(ours, seeds, batch_size)
        used = memory.read()
        others = {}
        for name in self._plan.against:
            self._tell(f"batch {batch_size}: the first batch of {name}", False)
            others[name] = make_baseline(name, job.run, job.device, job.dtype)
        others_warm = {name: self._lap(other, seeds, batch_size) for name, other in others.items()}

        laps: dict[str, list[Lap]] = {name: [] for name in ("ours", *others)}
        network = []
        for i in range(self._plan.repeats):
            self._tell(f"batch {batch_size}: round {i + 1} of {self._plan.repeats}", True)
            laps["ours"].append(self._lap(ours, job.seeds, batch_size))
            network.append(ours.network_seconds(job.seeds, batch_size))
            for name, other in others.items():
                laps[name].append(self._lap(other, job.seeds, batch_size))
        for contestant in (ours, *others.values()):
            contestant.close()
        # Of the last batch size alone: it does not bear on the arithmetic, and what is compiled is used again.
        compared = self._psnr(ours, job) if batch_size == self._plan.batch_sizes[-1] else None

        rows = len(job.seeds) * len(job.run.timesteps)
        rows_in_network = rows * (2 if job.run.config.sampling.guidance_scale != 1 else 1)
        seconds = [lap.seconds for lap in laps["ours"]]
        speed = cost * rows_in_network / statistics.median(network)
        return {
            "batch_size": batch_size,
            "compiled": ours.compiled,
            "images": len(job.seeds),
            **speeds(seconds, len(job.seeds), len(job.run.timesteps)),
            "load_seconds": loaded - started,
            "first_batch_seconds": warm.seconds,
            "time_to_first_image_seconds": spread([lap.first for lap in laps["ours"]]),
            "peak_memory": {"bytes": used, "of": memory.meaning},
            "network_seconds": spread(network),
            "share_outside_network": spread([1 - n / s for n, s in zip(network, seconds, strict=True)]),
            "flops_per_second": speed,
            "share_of_matrix_peak": speed / peak,
            "against": {
                name: {
                    **speeds([lap.seconds for lap in laps[name]], len(job.seeds), len(job.run.timesteps)),
                    "first_batch_seconds": others_warm[name].seconds,
                    "ratio": ratio(seconds, [lap.seconds for lap in laps[name]]),
                    "largest_difference": largest_difference(warm.pictures, others_warm[name].pictures),
                }
                for name in others
            },
            "psnr": compared,
        }

    def _lap(self, contestant: Contestant, seeds: Sequence[int], batch_size: int) -> Lap:
        """Time one go, into a folder that is fresh and is deleted outside of the time."""
        folder = self._plan.scratch / "lap" if self._plan.files else None
        if folder is not None:
            folder.mkdir()
        first, pictures = math.nan, []
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
        images = self._plan.psnr_images
        if job.dtype == torch.float32 or images == 0:
            return None
        self._tell(f"{images} images in {str(job.dtype).removeprefix('torch.')} and in float32", False)
        exact = make_job(self._run_of(min(job.batch_size, images), images, dtype="float32", compile=False))

        def sample(contestant: Ours, batch_size: int) -> list[Picture]:
            return [p for batch in run_batches(contestant.sampler, exact.seeds, batch_size) for p in batch]

        values = psnr(sample(ours, job.batch_size), sample(Ours(exact), exact.batch_size))
        return {"images": images, "median_db": statistics.median(values), "worst_db": min(values)}


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
        error = (a.x0.float().clamp(-1, 1) - b.x0.float().clamp(-1, 1)).square().mean().item()
        # Of pictures in [0, 1]: half the distances of [-1, 1].
        found.append(min(200.0, -10 * math.log10(error / 4)) if error > 0 else 200.0)
    return found


def _model(job: Job) -> dict[str, Any]:
    model = job.run.model
    return {
        "source": model.source,
        "kind": model.kind,
        "parameters": model.parameters,
        "channels": model.channels,
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
