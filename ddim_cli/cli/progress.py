"""The progress of a command on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ddim_cli.cli import console
from ddim_cli.cli.panels import counted, duration, speed_text, steps_text
from ddim_cli.interrupts import uninterrupted
from ddim_cli.sampling.reporter import Reporter

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.status import Status

    from ddim_cli.sampling.job import Job
    from ddim_cli.sampling.product import Product

SECONDS_BETWEEN_LINES = 10.0


def _steps(job: Job) -> str:
    return steps_text(job.steps_down, job.run.config.sampling.order)


class RunProgress(Reporter):
    """Shows a run: one bar for all of its images."""

    _task: TaskID
    _began = _last_line = 0.0
    _total = _made = _steps = _batch = 0

    def __init__(self, verbose: bool = False) -> None:
        self._console = console.stderr()
        self._verbose = verbose
        self._bar: Progress | None = None
        self._status: Status | None = None
        self._said: set[str] = set()

    def waiting(self, what: str) -> None:
        """Show a spinner, on a terminal, until the run starts or stops."""
        self._clear_status()
        if self._console.is_terminal:
            self._status = self._console.status(what)
            self._status.start()

    closing = waiting

    def loading(self, job: Job) -> None:
        self.waiting(f"loading {job.run.model.name}")

    def compiling(self, name: str, rows: int) -> None:
        self._clear_status()
        console.say(f"compiling {name} for batches of {rows}; this takes about a minute, once")
        self.waiting("compiling")

    def note(self, text: str) -> None:
        if self._verbose:
            console.say(text)

    def warn(self, text: str) -> None:
        console.warn(text)

    def slower(self, what: str, why: str) -> None:
        # The cells of a sweep, and each batch size, would all say the same.
        if what not in self._said:
            self._said.add(what)
            console.say(f"{what}: {why}" if self._verbose else f"{what} (--verbose: why)")

    def halved(self, batch_size: int) -> None:
        console.warn(f"out of memory; going on with batches of {batch_size}")
        self._batch = batch_size

    def started(self, job: Job, product: Product, todo: int) -> None:
        self._total, self._made, self._steps = todo, 0, job.steps
        self._batch = min(job.batch_size, todo)
        self._begin()
        done = len(job.items) - todo
        batches = -(-todo // job.batch_size)
        runtime = job.record["runtime"]
        refine = job.run.config.sampling.refine
        up = f" up, with {counted(refine, 'iteration')} each," if refine else " up"
        steps = _steps(job) + (f"{up} and as many down" if job.passes == 2 else " each")
        self._announce(
            f"{self._name(job)}: {counted(todo, 'image')} in {counted(batches, 'batch')} of {job.batch_size}, "
            f"{steps}, on {runtime['device']} in {runtime['dtype']}"
            + (", compiled" if runtime["compile"] else "")
            + (f"; {counted(done, 'image')} {'is' if done == 1 else 'are'} there already" if done else "")
        )

    def _announce(self, text: str) -> None:
        self._clear_status()
        console.say(text)
        self._start_bar()

    def _begin(self) -> None:
        self._began = self._last_line = time.monotonic()

    def _name(self, job: Job) -> str:
        return job.run.model.name

    def _start_bar(self) -> None:
        """Show the bar, on a terminal."""
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        names = {"images": "bold", "step": "dim", "rate": "none"}
        columns = [TextColumn(f"{{task.fields[{name}]}}", style=style) for name, style in names.items()]
        self._bar = Progress(BarColumn(bar_width=None), *columns, console=self._console, transient=True, expand=True)
        fields: dict[str, Any] = self._fields(0)
        self._task = self._bar.add_task("", total=self._steps_in_all(), **fields)
        self._bar.start()

    def _steps_in_all(self) -> int:
        return self._total * self._steps

    def _fields(self, step: int) -> dict[str, str]:
        seconds, units = time.monotonic() - self._began, self._units(step)
        rate = ""
        if units and seconds > 0:
            left = seconds / units * (self._steps_in_all() - units)
            rate = f"{speed_text(units / self._steps / seconds)}, {duration(left)} left"
        images = f"{self._made}/{self._total} images"
        return {"images": images, "step": f"step {step}/{self._steps}", "rate": rate}

    def _units(self, step: int) -> int:
        """How many steps are done, each image's counted by itself."""
        return self._made * self._steps + self._batch * step

    def _update_bar(self, step: int) -> dict[str, str]:
        fields = self._fields(step)
        if self._bar is not None:
            update: dict[str, Any] = {"completed": self._units(step), **fields}
            with uninterrupted():
                self._bar.update(self._task, **update)
        return fields

    def step(self, done: int) -> None:
        fields = self._update_bar(done)
        # Every few seconds a line: on stderr where there is no bar, in the log file always.
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            (console.say if self._bar is None else console.log)(", ".join(v for v in fields.values() if v))

    def batch(self, images: int) -> None:
        self._made += images
        self._batch = min(self._batch, self._total - self._made)
        # The next batch is at its start, and the last one stays at its end.
        self._update_bar(0 if self._made < self._total else self._steps)

    def others_done(self, there: int, planned: int) -> None:
        console.say(f"all ranks: {there:,} of {planned:,} images are there")

    def interrupted(self) -> None:
        console.say("interrupted; writing what is finished (press Ctrl-C again to stop at once)")

    def stopped(self) -> None:
        self._clear_status()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _clear_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class StreamProgress(RunProgress):
    """Shows a run whose rows come one by one: what it is ready for, and now and then how many pictures there are."""

    def __init__(self, label: str, verbose: bool = False) -> None:
        super().__init__(verbose)
        self._label = label

    def started(self, job: Job, product: Product, todo: int) -> None:
        self._clear_status()
        self._begin()
        runtime = job.record["runtime"]
        compiled = ", compiled" if runtime["compile"] else ""
        console.say(
            f"{job.run.model.name}: ready for the rows of {self._label}, in batches of {job.batch_size}, {_steps(job)} "
            f"each, on {runtime['device']} in {runtime['dtype']}{compiled}; into {job.folder.path}"
        )

    def step(self, done: int) -> None:
        pass

    def batch(self, images: int) -> None:
        self._made += images
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.say(f"{counted(self._made, 'image')} so far")


class SweepProgress(RunProgress):
    """Shows a sweep: one bar, and one estimate of the time left, for all of its cells."""

    _before = 0

    def sweeping(self, image_steps: int, cells: int) -> None:
        self._ahead, self._cells = image_steps, cells

    def cell(self, number: int, title: str) -> None:
        self._before += self._made * self._steps
        self._made, self._cell, self._title = 0, number, title

    def _begin(self) -> None:
        # What loading took before the first cell says nothing of the time left.
        if not self._began:
            super()._begin()

    def _name(self, job: Job) -> str:
        return f"cell {self._cell} of {self._cells}, {self._title}"

    def _steps_in_all(self) -> int:
        return self._ahead

    def _units(self, step: int) -> int:
        return self._before + super()._units(step)

    def _fields(self, step: int) -> dict[str, str]:
        fields, units = super()._fields(step), self._units(step)
        seconds = time.monotonic() - self._began
        left = f"{duration(seconds / units * (self._ahead - units))} left" if units else ""
        return {**fields, "images": f"cell {self._cell}/{self._cells}, {fields['images']}", "rate": left}


class PictureProgress(RunProgress):
    """Shows how pictures are read, one set after the other."""

    _steps = 1

    def looking_at(self, what: str) -> Callable[[int, int], None]:
        """Announce a set of pictures; call what is returned with how many are done, and their total."""
        self.stopped()
        self.waiting(f"opening {what}")
        self._begin()
        announced = False

        def update(done: int, total: int) -> None:
            nonlocal announced
            if not announced:
                announced, self._total, self._made = True, total, 0
                self._announce(f"{what}: {counted(total, 'picture')}")
            self._made = done
            self.step(0)

        return update

    def _fields(self, step: int) -> dict[str, str]:
        return {**super()._fields(step), "step": ""}


class RanksProgress(RunProgress):
    """Shows all ranks, on rank 0: the images of the plan that are in the folder, counted now and then."""

    SECONDS_BETWEEN_COUNTS = 1.0
    # Counting lists the folder, which takes long on a slow disk: the most of the time that it may take.
    MOST_OF_THE_TIME = 0.05

    _job: Job | None = None

    def started(self, job: Job, product: Product, todo: int) -> None:
        self._job, self._product, self._total = job, product, len(job.plan)
        self._begin()
        self._at_start = self.count(job)
        runtime, ranks = job.record["runtime"], job.shard.count
        self._announce(
            f"{job.run.model.name}: {counted(self._total, 'image')} on {counted(ranks, 'rank')} in batches of "
            f"{job.batch_size}, {_steps(job)} each, this one on {runtime['device']} in "
            f"{runtime['dtype']}" + (f"; {counted(self._at_start, 'image')} there already" if self._at_start else "")
        )

    def count(self, job: Job) -> int:
        """Count the images of the plan that are there."""
        began = time.monotonic()
        self._there = self._product.count(job)
        self._last_count = time.monotonic()
        self._pause = max(self.SECONDS_BETWEEN_COUNTS, (self._last_count - began) / self.MOST_OF_THE_TIME)
        return self._there

    def _steps_in_all(self) -> int:
        return self._total

    def _units(self, step: int) -> int:
        return self._there

    def _fields(self, step: int) -> dict[str, str]:
        seconds, made = time.monotonic() - self._began, self._there - self._at_start
        rate = ""
        if made and seconds > 0:
            rate = f"{speed_text(made / seconds)}, {duration(seconds / made * (self._total - self._there))} left"
        return {"images": f"{self._there}/{self._total} images", "step": "", "rate": rate}

    def step(self, done: int = 0) -> None:
        if self._job is not None and time.monotonic() - self._last_count >= self._pause:
            self.count(self._job)
            super().step(0)

    def batch(self, images: int) -> None:
        self.step()

    def waiting_for_others(self, job: Job, product: Product) -> None:
        if self._job is None:
            self.started(job, product, 0)
        else:
            self._start_bar()


AnyProgress = TypeVar("AnyProgress", bound=RunProgress)


@contextlib.contextmanager
def showing_progress(quiet: bool, progress: AnyProgress) -> Iterator[AnyProgress | None]:
    """Show progress, with a spinner while torch is imported; None if ``quiet``."""
    if quiet:
        yield None
        return
    try:
        progress.waiting("loading torch")
        yield progress
    finally:
        progress.stopped()


def stages(progress: RunProgress | None) -> Callable[[str, bool], None]:
    """Return a function that shows a stage of a long command: a spinner on a terminal, else a line.

    Its second argument says that the stage is one of many alike, which get a line only now and then.
    """
    if progress is None:
        return lambda what, one_of_many: None
    last_line = time.monotonic()

    def tell(what: str, one_of_many: bool) -> None:
        nonlocal last_line
        progress.waiting(what)
        if console.stderr().is_terminal or (one_of_many and time.monotonic() - last_line < SECONDS_BETWEEN_LINES):
            return
        last_line = time.monotonic()
        console.say(what)

    return tell


@contextlib.contextmanager
def spinner(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a spinner with a count while the block runs, on a terminal: call what is yielded with (done, total)."""
    screen = console.stderr()
    if quiet or not screen.is_terminal:
        yield lambda done, total: None
        return
    with screen.status(what) as status:
        shown = 0.0

        def update(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                status.update(f"{what}: {done:,} of {total:,}")

        yield update
