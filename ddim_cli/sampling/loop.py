"""The denoising loop: from the states that items start from to pictures, a batch at a time, on the device."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddim_cli.diffusion.coefficients import Coefficients, StepTable
from ddim_cli.diffusion.resampling import stretches
from ddim_cli.diffusion.solvers import Solver
from ddim_cli.diffusion.step import X0Treatment, undone
from ddim_cli.errors import RunError, UsageError, first_line
from ddim_cli.models.conditions import Condition, Conditioning
from ddim_cli.models.decoders import Decoder
from ddim_cli.sampling.begin import Beginnings, Canvases, Climb, Frame, Kept
from ddim_cli.sampling.items import Inversion, Item
from ddim_cli.sampling.network import StepNetwork
from ddim_cli.sampling.noise import BatchNoise

# Called after each step with the number of steps done.
OnStep = Callable[[int], None]
# Called with the new batch size when memory did not suffice for the old one.
OnHalved = Callable[[int], None]
# Called with what runs slower than it could, and why.
OnSlower = Callable[[str, str], None]
NOT_CAPTURED = "the step cannot be captured as a CUDA graph, and runs kernel by kernel, which is slower"
# Passes of which buffers, and on a GPU a graph, are kept: up, and down with guidance and without, and one to spare.
MOST_STEPPERS = 4
# Bytes of latents and of states on the way to them that are kept for items of later batches.
KEPT_CLIMBS = 2**28
# Steps that a GPU may be behind the host: enough to keep it busy, few enough for a progress bar to be true.
STEPS_AHEAD = 8


class Observer:
    """Watches one batch on its way along the grid, and says what it saw of each item. This one sees nothing."""

    def begin(self, x: Tensor) -> None:
        """The states before the first step, float32 [B, C, H, W], padding included."""

    def step(self, i: int, x: Tensor, x0: Tensor) -> None:
        """The states after step ``i`` and the x0 it predicted: buffers that the next step overwrites."""

    def seen(self, row: int) -> Any:
        """What `Picture.seen` of the item in this row is to be."""


# The items of a batch, and what makes pictures of its states -> who watches it
Watch = Callable[[Sequence[Item], Decoder], Observer]


@dataclass(frozen=True)
class Refinement:
    """``count`` iterations of `undone` a step up. ``network`` and ``table`` are of the steps down that are to undo it.

    Both are in the order of the way up.
    """

    network: StepNetwork
    table: StepTable[Coefficients]
    count: int


@dataclass(frozen=True)
class Pass:
    """One way along the grid: down it, from a latent to a picture, or up it (inversion).

    ``network`` takes the number of the step in place of a timestep, in the order of ``table``.
    """

    network: StepNetwork
    table: StepTable[Any]
    treatment: X0Treatment
    solver: Solver
    draws_noise: bool = False
    refinement: Refinement | None = None


class Way(NamedTuple):
    """The part of a grid that a batch goes: the ``steps`` between two jumps (see `resampling`), by their numbers on
    the grid. ``first`` is the number of the first step that the table of the pass has."""

    of: Pass
    steps: list[range]
    first: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.steps))


@dataclass(frozen=True)
class Sampler:
    """All that a batch needs besides its items.

    ``shape`` is (C, H, W) of a state, ``picture_shape`` of a picture, by default the same; ``dtype`` the network's;
    ``passes`` gives other passes than ``down``: from a step of the grid on, inverse ones (up the grid), and with
    another guidance scale (None: the run's); ``keeps_x0`` whether pictures carry the result before it was rounded, and
    the latent of an inversion; ``resample`` how often steps run beside a mask; ``inpaints`` whether the network takes
    what is known as channels.
    """

    down: Pass
    passes: Callable[[int, bool, float | None], Pass]
    shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    condition: Condition = field(default_factory=Condition)
    decoder: Decoder = field(default_factory=Decoder)
    keeps_x0: bool = True
    picture_shape: tuple[int, int, int] | None = None
    resample: int = 1
    inpaints: bool = False

    @property
    def runs_ahead(self) -> bool:
        """Whether calls return before they are done: on a GPU, where the step is a graph and a batch is in flight."""
        return self.device.type == "cuda"

    @property
    def up(self) -> Pass:
        """The pass from pictures to their latents."""
        return self.passes(0, True, None)

    def prepare(self) -> None:
        """Load what else is needed, where it is to stay: so that it is not counted as time of the first batch."""
        self.condition.prepare()
        self.decoder.prepare()

    def conditions(self, items: Sequence[Item], rows: int) -> tuple[Tensor, ...]:
        """What the network takes after x and the step, for ``rows`` rows; the last item pads them."""
        return self.conditions_of([item.conditioning for item in items], rows)

    def conditions_of(self, wanted: Sequence[Conditioning], rows: int) -> tuple[Tensor, ...]:
        """As `conditions`."""
        return self.condition.of([*wanted, *list(wanted)[-1:] * (rows - len(wanted))], self.device)

    def noise(self, items: Sequence[Item], rows: int) -> BatchNoise:
        """The noise that items begin with, and that of their steps."""
        return BatchNoise(items, rows, self.shape, self.device)

    def beginnings(self) -> Beginnings:
        """What begins batches."""
        canvases = Canvases(self.decoder, self.picture_shape or self.shape, self.inpaints)
        return Beginnings(self.shape, self.device, canvases, self.down.table)

    def way_down(self, begin: int, guidance_scale: float | None, masked: bool) -> Way:
        """From step ``begin`` of the grid to its end."""
        count = len(self.down.table) - begin
        steps = stretches(count, self.resample if masked else 1)
        of, first = self._pass(begin, False, guidance_scale)
        return Way(of, [range(part.start + begin, part.stop + begin) for part in steps], first)

    def way_up(self, begin: int, guidance_scale: float | None) -> Way:
        """From a picture to where step ``begin`` of the grid starts."""
        of, _ = self._pass(begin, True, guidance_scale)
        return Way(of, [range(len(self.down.table) - begin)])

    def _pass(self, begin: int, inverse: bool, guidance_scale: float | None) -> tuple[Pass, int]:
        """A pass that has all steps from ``begin`` on, and the number of its first one.

        A step of DDIM is the same on a part of the grid; one of higher order depends on where the grid begins.
        """
        begin = begin if self.down.solver.order > 1 else 0
        if not begin and not inverse and guidance_scale is None:
            return self.down, 0
        return self.passes(begin, inverse, guidance_scale), 0 if inverse else begin


class Picture(NamedTuple):
    """One sampled image, with its share of its batch's seconds.

    ``pixels`` uint8 [H, W, C]; ``x0``, the same before it was rounded, float32 [C, H, W] in about [-1, 1], and
    ``latent``, the state an inversion came to, where the sampler keeps them; ``batch_size`` the rows that the network
    saw; ``seen`` what an observer says of it; ``known`` what the encoder of its condition says of that; ``residual``
    that of `Stepper`, of an inversion that was refined.
    """

    item: Item
    pixels: np.ndarray
    x0: Tensor | None
    latent: Tensor | None
    seconds: float
    batch_size: int
    seen: Any = None
    known: Mapping[str, Any] = {}
    residual: float | None = None


def captured(
    call: Callable[[], Any], device: torch.device, reset: Callable[[], Any] = lambda: None
) -> Callable[[], Any]:
    """``call`` as a CUDA graph: what replays it, on whatever stream is current then.

    It is called twice before, so that libraries choose and allocate, each time after ``reset``. Raises RuntimeError
    for what no graph can hold.
    """
    here = torch.cuda.current_stream(device)
    # Streams of this device, which need not be the current one. The warm-up has one of its own: what libraries allocate
    # on a stream for good is then the graph's where the graph uses it.
    warm_up, capture = torch.cuda.Stream(device), torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    # Where a capture fails, torch leaves its stream the current one; this block does not.
    with torch.cuda.stream(here):
        warm_up.wait_stream(here)
        with torch.cuda.stream(warm_up):
            for _ in range(2):
                reset()
                call()
        here.wait_stream(warm_up)
        # Threads that write pictures may free pinned memory meanwhile.
        with torch.cuda.graph(graph, stream=capture, capture_error_mode="thread_local"):
            call()
    return graph.replay


class Stepper:
    """The step of a pass over buffers that stay where they are, its number counted on the device.

    So one CUDA graph of it serves every step of every batch: its kernels are launched at once, and nothing between
    two steps waits for the host. ``x`` and, where somebody watches, ``x0``, float32 [B, C, H, W], hold the results of
    the last step. Of a pass with a refinement ``residual``, float32 [B], is by how much its last iteration moved each
    state, the root mean square of its values, in the step in which that was most.
    """

    def __init__(self, sampler: Sampler, of: Pass, rows: int, condition: tuple[Tensor, ...], watched: bool = True):
        device = sampler.device
        self._pass, self._dtype = of, sampler.dtype
        self.x = torch.zeros(rows, *sampler.shape, device=device)
        self.x0 = torch.zeros_like(self.x) if watched else self.x
        self._i = torch.zeros(1, dtype=torch.int64, device=device)
        self.noise = torch.zeros_like(self.x) if of.draws_noise else None
        self._condition = condition
        self._state = of.solver.state(self.x)
        self.residual = torch.zeros(rows, device=device)
        self._run: Callable[[], None] = self._step

    def _step(self) -> None:
        output = self._pass.network(self.x.to(self._dtype), self._i, *self._condition)
        if output.shape != self.x.shape:
            raise UsageError(f"the network gives {list(output.shape)} for an input of {list(self.x.shape)}")
        row = self._pass.table.row(self._i)
        x, x0 = self._pass.solver.step(self.x, output, row, self._pass.treatment, self.noise, self._state)
        if self._pass.refinement is not None:
            x = self._refined(x, self._pass.refinement)
        self.x.copy_(x)
        if self.x0 is not self.x:
            self.x0.copy_(x0)
        self._i.add_(1)

    def _refined(self, x: Tensor, refinement: Refinement) -> Tensor:
        """The state ``x`` to which a step up came, nearer to the one from which the step down leads back.

        Each state is iterated for as long as it moves less than the time before; from then on it stays.
        """
        row = refinement.table.row(self._i)
        moved, last = x.new_full((len(x),), torch.inf), torch.zeros_like(self.residual)
        for k in range(refinement.count):
            following = undone(self.x, x, refinement.network(x.to(self._dtype), self._i, *self._condition), row)
            distance = (following - x).square().flatten(1).mean(1).sqrt()
            nearer = distance < moved
            x = torch.where(nearer.view(-1, 1, 1, 1), following, x)
            # The first is told also where it leads nowhere, so that 0 means that nothing was left to do.
            last = torch.where(nearer, distance, last) if k else distance
            # Nothing is less than 0: a state that has once moved further stays.
            moved = torch.where(nearer, distance, 0)
        self.residual.copy_(torch.maximum(self.residual, last))
        return x

    def capture(self) -> Stepper:
        """Run as a CUDA graph from here on. Raises RuntimeError where the step cannot be captured."""
        self._run = captured(self._step, self.x.device, self._i.zero_)
        return self

    def begin(self, x: Tensor, condition: tuple[Tensor, ...]) -> None:
        """Start a batch at the states ``x``, with the first step of the pass."""
        self.x.copy_(x)
        self.turn_to(0)
        for buffer in (self.residual, *self._state):
            buffer.zero_()
        for buffer, value in zip(self._condition, condition, strict=True):
            buffer.copy_(value)

    def turn_to(self, i: int) -> None:
        """Have step ``i`` of the pass be the next."""
        self._i.fill_(i)

    def step(self, noise: BatchNoise) -> None:
        """The next step of the batch, with the noise it draws, if it draws any."""
        if self.noise is not None:
            self.noise.copy_(noise.draw())
        self._run()


def denoise(
    stepper: Stepper,
    way: Way,
    x: Tensor,
    condition: tuple[Tensor, ...],
    noise: BatchNoise,
    on_step: OnStep,
    observer: Observer | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """All steps of a way, from the states ``x`` on. What is ``kept`` is put back after each.

    Returns the final states, float32 [B, C, H, W]: a buffer that the next batch overwrites.
    """
    stepper.begin(x, condition)
    if observer is not None:
        observer.begin(stepper.x)
    # RePaint's known part has new noise in each step: that of the step, which at its pixels nothing else uses.
    # Diffusers' inpainting, which never jumps, has one noise for all.
    done, jumps = 0, len(way.steps) > 1
    for n, part in enumerate(way.steps):
        if n:
            assert kept is not None  # without a mask nothing jumps
            kept.rise(stepper.x, way.steps[n - 1].stop - 1, part.start, noise.draw())
        stepper.turn_to(part.start - way.first)
        for i in part:
            stepper.step(noise)
            if kept is not None:
                kept.put_back(i, stepper.x, stepper.noise if jumps else None)
            if observer is not None:
                observer.step(i, stepper.x, stepper.x0 if kept is None else kept.x0(stepper.x0))
            done += 1
            on_step(done)
    return stepper.x


class _States(Observer):
    """Keeps the states of a pass, and those it began with; and tells another observer."""

    def __init__(self, other: Observer | None = None):
        self._other = other or Observer()
        self.found: list[Tensor] = []

    def begin(self, x: Tensor) -> None:
        self.found.append(x.cpu().clone())
        self._other.begin(x)

    def step(self, i: int, x: Tensor, x0: Tensor) -> None:
        self.found.append(x.cpu().clone())
        self._other.step(i, x, x0)


class Pace:
    """Passes steps on as the GPU does them, and keeps the host at most `STEPS_AHEAD` of them before it."""

    def __init__(self, device: torch.device, on_step: OnStep):
        self._stream, self._on_step = torch.cuda.current_stream(device), on_step
        self._events: list[torch.cuda.Event] = []

    def __call__(self, done: int) -> None:
        event = torch.cuda.Event()
        event.record(self._stream)
        self._events.append(event)
        if len(self._events) > STEPS_AHEAD:
            # An event of a few steps ago: the GPU has work left while the host waits.
            self._events.pop(0).synchronize()
            self._on_step(done - STEPS_AHEAD)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] float32 [B, C, H, W] -> 0..255 uint8 [B, H, W, C], rounded half to even as diffusers' pipelines do."""
    return (x / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_host(x: Tensor) -> Tensor:
    """A copy on the host; from a GPU into pinned memory, without waiting for it."""
    if x.device.type == "cuda":
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    return x.clone() if x.device.type == "cpu" else x.cpu()


def is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU, torch says so in a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Framed(Decoder):
    """A decoder, and what is around the pictures of a batch where a mask keeps it."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self.frame: Frame | None = None

    def decode(self, x: Tensor) -> Tensor:
        pictures = self._decoder.decode(x)
        return pictures if self.frame is None else self.frame.around(pictures)


class _FirstNotFinite(Observer):
    """The first step of a pass after which the state of the first row is NaN or infinite, in words."""

    def __init__(self, of: Pass, what: str = ""):
        self._table, self._what = of.table, what
        self.found: str | None = None

    def step(self, i: int, x: Tensor, x0: Tensor) -> None:
        if self.found is None and not bool(x[0].isfinite().all()):
            kind, timestep = "NaN" if bool(x[0].isnan().any()) else "an infinity", int(self._table.timesteps[i])
            self.found = f"{kind} at step {i + 1} of {len(self._table)}{self._what} (timestep {timestep})"


@dataclass(frozen=True)
class Launched:
    """A batch whose steps and copies are queued on the device; `collect` waits for its pictures."""

    denoiser: Denoiser
    items: Sequence[Item]
    rows: int
    started: float
    finite: Tensor
    pixels: Tensor
    x0: Tensor | None
    climbs: Sequence[Climb | None]
    observer: Observer | None
    known: Sequence[Mapping[str, Any]]
    copied: torch.cuda.Event | None

    @torch.inference_mode()
    def collect(self) -> list[Picture]:
        """Raises RunError for a result that is not finite, naming the item and the step."""
        if self.copied is not None:
            self.copied.synchronize()
        finite = self.finite.tolist()
        if not all(finite):
            raise self.denoiser.explain_not_finite(self.items[finite.index(False)], self.rows)
        seconds = (time.perf_counter() - self.started) / len(self.items)
        pixels = self.pixels.numpy()
        return [
            Picture(
                item,
                pixels[i],
                None if self.x0 is None else self.x0[i],
                None if climb is None else climb.latent,
                seconds,
                self.rows,
                None if self.observer is None else self.observer.seen(i),
                self.known[i],
                None if climb is None or climb.residual is None else climb.residual.item(),
            )
            for i, (item, climb) in enumerate(zip(self.items, self.climbs, strict=True))
        ]


class Denoiser:
    """Runs batches of one sampler: step by step on a CPU, by a captured step on a GPU where it can be captured."""

    def __init__(
        self,
        sampler: Sampler,
        watch: Watch | None = None,
        on_slower: OnSlower = lambda what, why: None,
    ):
        self.sampler, self._watch, self._on_slower = sampler, watch, on_slower
        self._steppers: dict[int, Stepper] = {}
        self._rows = 0
        self._beginnings = sampler.beginnings()
        self._climbs: dict[Inversion, Climb] = {}

    def forget(self) -> None:
        """Give back what is kept for batches of one size."""
        self._steppers.clear()
        self._rows = 0

    def _stepper(self, of: Pass, rows: int, condition: tuple[Tensor, ...]) -> Stepper:
        if rows != self._rows:
            self.forget()
            self._rows = rows
        if id(of) not in self._steppers:
            if len(self._steppers) == MOST_STEPPERS:
                # Items come by kind: what was first needed is not needed any more.
                del self._steppers[next(iter(self._steppers))]
            buffers = tuple(value.clone() for value in condition)
            self._steppers[id(of)] = self._captured(Stepper(self.sampler, of, rows, buffers, self._watch is not None))
        return self._steppers[id(of)]

    def _captured(self, stepper: Stepper) -> Stepper:
        if not self.sampler.runs_ahead:
            return stepper
        try:
            return stepper.capture()
        except RuntimeError as error:
            # Nothing of the attempt is to run on beside what follows.
            torch.cuda.synchronize(self.sampler.device)
            # Of an error in the middle of a capture, the one that ends the capture says nothing.
            error = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if is_out_of_memory(error):
                raise error from None
            # A network from outside may do what no graph can hold; it runs as it is.
            self._on_slower(NOT_CAPTURED, first_line(error, None))
            # Both passes, and batches of other sizes, would fail likewise.
            self._on_slower = lambda what, why: None
            return stepper

    @torch.inference_mode()
    def launch(self, items: Sequence[Item], rows: int, on_step: OnStep = lambda done: None) -> Launched:
        """Sample ``items`` as one batch of ``rows`` rows. Raises UsageError for an item whose start cannot be read."""
        started, sampler = time.perf_counter(), self.sampler
        decoder = _Framed(sampler.decoder)
        observer = self._watch(items, decoder) if self._watch is not None else None
        x, climbs = self._run(items, rows, on_step, decoder, observer)
        x = x[: len(items)]
        finite, decoded = to_host(x.isfinite().flatten(1).all(1)), decoder.decode(x)
        pixels, x0 = to_host(to_uint8(decoded)), to_host(decoded) if sampler.keeps_x0 else None
        sampler.decoder.release()
        known = [sampler.condition.facts(item.conditioning) for item in items]
        copied = None
        if x.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(x.device))
        return Launched(self, items, rows, started, finite, pixels, x0, climbs, observer, known, copied)

    def _run(
        self,
        items: Sequence[Item],
        rows: int,
        on_step: OnStep,
        decoder: _Framed,
        observer: Observer | None,
        up_observer: Observer | None = None,
    ) -> tuple[Tensor, list[Climb | None]]:
        """The final states of a batch, and of each item that was inverted what came of that.

        ``decoder`` is told what is around its pictures.
        """
        sampler, first = self.sampler, items[0]
        if sampler.runs_ahead:
            on_step = Pace(sampler.device, on_step)
        noise = sampler.noise(items, rows)
        before = self._climb(items, rows, on_step, up_observer)
        begun = self._beginnings.of(items, rows, noise, self._climbs)
        decoder.frame = begun.frame
        if before or first.canvas is not None:
            # What encoded pictures is not needed while the network runs.
            sampler.decoder.release()
        condition = sampler.conditions(items, rows)
        if begun.channels is not None:
            condition = (*condition, begun.channels)
        way = sampler.way_down(first.begin, first.conditioning.guidance_scale, begun.kept is not None)
        stepper = self._stepper(way.of, rows, condition)
        x = denoise(
            stepper, way, begun.states, condition, noise, lambda done: on_step(before + done), observer, begun.kept
        )
        climbs = [self._climbs[item.start] if isinstance(item.start, Inversion) else None for item in items]
        return x, climbs

    def _climb(self, items: Sequence[Item], rows: int, on_step: OnStep, observer: Observer | None) -> int:
        """Invert what the items start from, unless it is known from a batch before; how many steps were told of."""
        wanted = dict.fromkeys(inversion for item in items for inversion in item.inversions)
        if not wanted:
            return 0
        sampler, first = self.sampler, next(iter(wanted))
        masked = items[0].canvas is not None
        way = sampler.way_up(first.begin, first.conditioning.guidance_scale)
        # States on the way are large, and needed beside a mask alone.
        known = {i: climb for i, climb in self._climbs.items() if not masked or climb.states}
        missing = [inversion for inversion in wanted if inversion not in known or observer is not None]
        parts = [missing[start : start + rows] for start in range(0, len(missing), rows)]
        for n, part in enumerate(parts):

            def tell(done: int, n: int = n) -> None:
                on_step((n * len(way) + done) // len(parts))

            known |= self._climbed(part, rows, way, tell, observer, masked)
        self._climbs = _within({**self._climbs, **known}, wanted)
        return len(way)

    def _climbed(
        self,
        inversions: Sequence[Inversion],
        rows: int,
        way: Way,
        on_step: OnStep,
        observer: Observer | None,
        masked: bool,
    ) -> dict[Inversion, Climb]:
        """What the way up makes of as many pictures as there are rows, or fewer."""
        sampler = self.sampler
        noise = BatchNoise((), rows, sampler.shape, sampler.device)
        pictures = [self._beginnings.picture(inversion) for inversion in inversions]
        condition = sampler.conditions_of([inversion.conditioning for inversion in inversions], rows)
        stepper = self._stepper(way.of, rows, condition)
        states = _States(observer)
        x = denoise(stepper, way, noise.padded(pictures), condition, noise, on_step, states if masked else observer)
        latents, residuals = x.cpu(), stepper.residual.cpu()
        refined = way.of.refinement is not None

        def of_row(row: int) -> Climb:
            # A copy: one that is kept is not to hold its whole batch.
            way_up = tuple(level[row].clone() for level in states.found)
            return Climb(latents[row].clone(), residuals[row].clone() if refined else None, way_up)

        return {inversion: of_row(row) for row, inversion in enumerate(inversions)}

    def explain_not_finite(self, item: Item, rows: int) -> RunError:
        """Run one item again, looking at every step, to name the first whose result is NaN or infinite."""
        sampler = self.sampler
        down = _FirstNotFinite(sampler.down)
        up = _FirstNotFinite(sampler.up, " of the inversion") if item.inversions else None
        self._run([item], rows, lambda done: None, _Framed(sampler.decoder), down, up)
        found = (up.found if up is not None else None) or down.found
        if found is None:
            return RunError(f"{item.label}: the result was not finite, but was when it was run once more alone")
        remedy = "are the weights those of this model?" if sampler.dtype == torch.float32 else "try --dtype float32"
        return RunError(f"{item.label}: {found}; {remedy}")


def _within(climbs: dict[Inversion, Climb], wanted: Iterable[Inversion]) -> dict[Inversion, Climb]:
    """Those of ``climbs`` that memory is spent on: the ``wanted``, last, and before them of the others those that were
    wanted last, as many as fit."""
    own = {inversion: climbs[inversion] for inversion in wanted}
    left, others = KEPT_CLIMBS - sum(map(_bytes, own.values())), []
    for inversion, climb in reversed(climbs.items()):
        if inversion not in own and (left := left - _bytes(climb)) > 0:
            others.append((inversion, climb))
    return {**dict(reversed(others)), **own}


def _bytes(climb: Climb) -> int:
    return climb.latent.nbytes * (1 + len(climb.states))


def _batch(items: Sequence[Item], start: int, most: int) -> list[Item]:
    """The items from ``start`` on that run together: of one kind, and no more than ``most``."""
    batch = [items[i] for i in range(start, min(start + most, len(items)))]
    return list(itertools.takewhile(lambda item: item.kind == batch[0].kind, batch))


def _launches(
    denoiser: Denoiser, items: Sequence[Item], batch_size: int, on_step: OnStep, on_halved: OnHalved
) -> Iterator[Launched]:
    start, sampler = 0, denoiser.sampler
    while start < len(items):
        batch = _batch(items, start, batch_size)
        launched = None
        try:
            launched = denoiser.launch(batch, batch_size, on_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if launched is not None:
            start += len(batch)
            yield launched
        elif batch_size == 1:
            raise RunError(f"out of memory on {sampler.device}, even for a single image")
        else:
            # Here, outside of the handler, the failed step's tensors are no longer referred to.
            batch_size //= 2
            denoiser.forget()
            gc.collect()
            if sampler.runs_ahead:
                torch.cuda.empty_cache()
            on_halved(batch_size)


def run_batches(
    denoiser: Denoiser,
    items: Sequence[Item],
    batch_size: int,
    on_step: OnStep = lambda done: None,
    on_halved: OnHalved = lambda batch_size: None,
) -> Iterator[list[Picture]]:
    """Sample all ``items``, yielding each batch's pictures in their order.

    On a GPU a batch's pictures are fetched while the next one is denoised. Where memory does not suffice, the
    batch size is halved for the rest.

    Raises:
        RunError: for a result that is not finite, naming the item and the step; where memory does not suffice
            for one image.
    """
    waiting = None
    for launched in _launches(denoiser, items, batch_size, on_step, on_halved):
        if waiting is not None:
            yield waiting.collect()
        waiting = launched
        if not denoiser.sampler.runs_ahead:
            yield waiting.collect()
            waiting = None
    if waiting is not None:
        yield waiting.collect()
