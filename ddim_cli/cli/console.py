"""The console: messages and errors, the progress of a run, its closing panel.

Results go to stdout, everything else to stderr, and a plain copy of that to the log file where
there is one. Where there is no terminal: plain lines, no control characters.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json as json_module
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ddim_cli.cli.options import with_named_paths
from ddim_cli.cli.signals import interruptible
from ddim_cli.errors import DdimError, InterruptedRunError, RunError, UsageError
from ddim_cli.outputs.figures import speed_text
from ddim_cli.sampling.torchrun import Ranks

if TYPE_CHECKING:
    from rich.console import Console

    from ddim_cli.sampling.run import Job, Summary

SECONDS_BETWEEN_LINES = 10.0

# The log file, where there is one, whether it has failed, and whether the one JSON document has been printed.
_log: TextIO | None = None
_log_has_failed = False
_printed_json = False


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def say(text: str, style: str = "") -> None:
    """A line on stderr, wrapped by the terminal alone."""
    log(text)
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    from rich.text import Text

    log(f"warning: {text}")
    stderr().print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def show_error(text: str) -> None:
    from rich.text import Text

    console = stderr()
    for line in text.splitlines() or [""]:
        log(f"error: {line}")
        console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def log(text: str) -> None:
    """A line in the log file, if there is one; a log that cannot be written any more ends no run, and is told once."""
    global _log_has_failed
    if _log is None:
        return
    try:
        # One write a line, so that the lines of several processes do not mix.
        _log.write(f"{text}\n")
        _log.flush()
    except OSError as error:
        if not _log_has_failed:
            _log_has_failed = True
            warn(f"--log-file {_log.name}: cannot be written: {error.strerror}; stderr alone has what is said")


@contextlib.contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Within the block, append a copy of what is said to ``path``.

    Raises UsageError if it cannot be opened, RunError if that is for want of space.
    """
    global _log, _log_has_failed
    if path is None:
        yield
        return
    try:
        _log = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        kind = RunError if error.errno == errno.ENOSPC else UsageError
        raise kind(f"--log-file {path}: cannot be written: {error.strerror}") from None
    _log_has_failed = False
    try:
        yield
    finally:
        stream, _log = _log, None
        with contextlib.suppress(OSError):
            stream.close()


def log_refusal(path: Path, text: str) -> None:
    """What is wrong with the arguments themselves, into the log file that is among them, if it can be opened."""
    with contextlib.suppress(DdimError), logging_to(path):
        for line in text.splitlines():
            log(f"error: {line}")


def json_text(value: Any) -> str:
    """``value`` as one line; what stdout's encoding lacks, such as a file name's odd bytes, is escaped."""
    text = json_module.dumps(value, ensure_ascii=False) + "\n"
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return json_module.dumps(value) + "\n"
    return text


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    global _printed_json
    text = json_text(value)
    _printed_json = True
    sys.stdout.write(text)
    sys.stdout.flush()


def end_at_once(as_json: bool) -> None:
    """What a second Ctrl-C still prints. Straight to the file: the interrupted code may hold stdout's lock."""
    code = InterruptedRunError.exit_code
    if as_json and not _printed_json:
        os.write(1, json_text({"error": "interrupted", "exit_code": code}).encode())
    os.write(2, b"interrupted at once; the same command goes on\n")


def speaks() -> bool:
    """Whether this process is the one that shows progress and results: under torchrun, rank 0 alone."""
    ranks = Ranks.of()
    return ranks is None or ranks.rank == 0


def handles_errors(command: Callable) -> Callable:
    """End a command that fails with a sentence on stderr and its exit code, never a traceback unless --verbose.

    Ctrl-C and SIGTERM end it with 130; its ``log_file``, if it has one, is kept from here on.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _printed_json
        _printed_json, as_json, verbose = False, kwargs.get("json", False), kwargs.get("verbose", False)
        log_file = kwargs.pop("log_file", None)
        try:
            as_json = as_json and speaks()
            with interruptible(lambda: end_at_once(as_json)), logging_to(log_file):
                try:
                    return command(*args, **kwargs)
                except (typer.Exit, typer.Abort, typer.BadParameter):
                    raise
                except (Exception, KeyboardInterrupt) as error:
                    raise typer.Exit(report(error, as_json, verbose)) from None
        except (DdimError, KeyboardInterrupt) as error:
            raise typer.Exit(report(error, as_json, verbose)) from None

    with_named_paths(run)
    return run


def report(error: BaseException, as_json: bool = False, verbose: bool = False) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read stdout has gone; there is nobody to tell.
        sys.stdout = None
        return 1
    if isinstance(error, KeyboardInterrupt):
        error = InterruptedRunError("interrupted")
    if isinstance(error, DdimError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError):
        text, code = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    elif isinstance(error, MemoryError):
        text, code = "out of memory on the host; use a smaller --batch-size", 1
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        text, code = f"unexpected {type(error).__name__}: {first} (--verbose shows where)", 1
    if verbose and not isinstance(error, InterruptedRunError):
        say("".join(traceback.format_exception(error)))
    if isinstance(error, InterruptedRunError):
        say(text)
    else:
        show_error(text)
    if as_json and not _printed_json:
        print_json({"error": text, "exit_code": code})
    return code


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else ('es' if noun.endswith('h') else 's')}"


class RunProgress:
    """Shows a run on stderr: a bar on a terminal, else a line now and then. A `Reporter` by its methods."""

    def __init__(self, verbose: bool = False) -> None:
        self._console = stderr()
        self._verbose = verbose
        self._bar = None
        self._task = None
        self._status = None

    def waiting(self, what: str) -> None:
        """A spinner, on a terminal, until the run starts or stops."""
        self._clear_status()
        if self._console.is_terminal:
            self._status = self._console.status(what)
            self._status.start()

    def loading(self, job: Job) -> None:
        self.waiting(f"loading {job.run.model.name}")

    def compiling(self, job: Job) -> None:
        self._clear_status()
        say(f"compiling {job.run.model.name} for batches of {job.batch_size}: about a minute, once")
        self.waiting("compiling")

    def note(self, text: str) -> None:
        if self._verbose:
            say(text)

    def halved(self, batch_size: int) -> None:
        warn(f"out of memory; going on with batches of {batch_size}")
        self._batch = batch_size

    def started(self, job: Job, todo: Sequence[int], passes: int = 1) -> None:
        self._clear_status()
        self._total, self._made, self._steps = len(todo), 0, passes * len(job.run.timesteps)
        self._batch = min(job.batch_size, self._total)
        self._begin()
        done = len(job.seeds) - len(todo)
        batches = -(-len(todo) // job.batch_size)
        runtime = job.record["runtime"]
        steps = counted(len(job.run.timesteps), "step") + (" up and as many down" if passes == 2 else " each")
        say(
            f"{self._name(job)}: {counted(len(todo), 'image')} in {counted(batches, 'batch')} of {job.batch_size}, "
            f"{steps}, on {runtime['device']} in {runtime['dtype']}"
            + (", compiled" if runtime["compile"] else "")
            + (f"; {counted(done, 'image')} {'is' if done == 1 else 'are'} there already" if done else "")
        )
        if self._console.is_terminal:
            self._start_bar()

    def _begin(self) -> None:
        self._began = self._last_line = time.monotonic()

    def _name(self, job: Job) -> str:
        return job.run.model.name

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[images]}", style="bold"),
            TextColumn("{task.fields[step]}", style="dim"),
            TextColumn("{task.fields[rate]}"),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=self._steps_in_all(), **self._fields(0))
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
        """Of the steps in all, an image and step being one, those that are done."""
        return self._made * self._steps + self._batch * step

    def step(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._units(done), **self._fields(done))
        self._line_now_and_then(self._fields(done))

    def _line_now_and_then(self, fields: Mapping[str, str]) -> None:
        """Every few seconds a line: on stderr where there is no bar, in the log file always."""
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            (say if self._bar is None else log)(", ".join(v for v in fields.values() if v))

    def batch(self, images: int) -> None:
        self._made += images
        self._batch = min(self._batch, self._total - self._made)
        if self._bar is not None:
            # The next batch is at its start, and the last one stays at its end.
            step = 0 if self._made < self._total else self._steps
            self._bar.update(self._task, completed=self._units(step), **self._fields(step))

    def interrupted(self) -> None:
        say("interrupted; what was finished is being written (Ctrl-C once more ends it at once)")

    def closing(self, what: str) -> None:
        self.waiting(what)

    def stopped(self) -> None:
        self._clear_status()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _clear_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


class SweepProgress(RunProgress):
    """One bar, and one estimate of the time left, for all cells of a sweep. A `SweepReporter` by its methods."""

    # Of the cells before, and of this one.
    _before = _made = _steps = 0
    _began = None

    def sweeping(self, image_steps: int, cells: int) -> None:
        self._ahead, self._cells = image_steps, cells

    def cell(self, number: int, title: str) -> None:
        self._before += self._made * self._steps
        self._made, self._cell, self._title = 0, number, title

    def _begin(self) -> None:
        # What the time before the first cell was spent on says nothing of the rest.
        if self._began is None:
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
    """Pictures that are looked at, one set of them after the other."""

    _steps = 1

    def looking_at(self, what: str) -> Callable[[int, int], None]:
        """A set of pictures is next; what is returned is called with how many are done, and their total."""
        self.stopped()
        self.waiting(f"opening {what}")
        self._total = None
        self._begin()

        def update(done: int, total: int) -> None:
            if self._total is None:
                self._clear_status()
                self._total, self._made, self._batch = total, 0, 0
                say(f"{what}: {counted(total, 'picture')}")
                if self._console.is_terminal:
                    self._start_bar()
            self._made = done
            self.step(0)

        return update

    def _fields(self, step: int) -> dict[str, str]:
        return {**super()._fields(step), "step": ""}


class RanksProgress(RunProgress):
    """What rank 0 shows of all ranks: the images of the plan that are in the folder, counted now and then."""

    SECONDS_BETWEEN_COUNTS = 1.0
    # Listing a large folder on a slow disk must not become the work.
    MOST_OF_THE_TIME = 0.05

    _plan: frozenset[int] | None = None

    def started(self, job: Job, todo: Sequence[int], passes: int = 1) -> None:
        self._clear_status()
        self._plan, self._folder = frozenset(job.run.config.seeds()), job.folder
        self._total, self._last_count = len(self._plan), -float("inf")
        self._began = self._last_line = time.monotonic()
        self._pause = 0.0
        self._at_start = self.count()
        runtime, ranks = job.record["runtime"], job.shard.count
        say(
            f"{job.run.model.name}: {counted(self._total, 'image')} on {counted(ranks, 'rank')} in batches of "
            f"{job.batch_size}, {counted(len(job.run.timesteps), 'step')} each, this one on {runtime['device']} in "
            f"{runtime['dtype']}" + (f"; {counted(self._at_start, 'image')} there already" if self._at_start else "")
        )
        if self._console.is_terminal:
            self._start_bar()

    def count(self) -> int:
        """The images of the plan whose sidecars are there."""
        began = time.monotonic()
        self._there = len(self._plan.intersection(self._folder.numbered("json")))
        self._last_count = time.monotonic()
        self._pause = max(self.SECONDS_BETWEEN_COUNTS, (self._last_count - began) / self.MOST_OF_THE_TIME)
        return self._there

    def _steps_in_all(self) -> int:
        return self._total

    def _fields(self, step: int) -> dict[str, str]:
        seconds, made = time.monotonic() - self._began, self._there - self._at_start
        rate = ""
        if made and seconds > 0:
            rate = f"{speed_text(made / seconds)}, {duration(seconds / made * (self._total - self._there))} left"
        return {"images": f"{self._there}/{self._total} images", "step": "", "rate": rate}

    def step(self, done: int = 0) -> None:
        if time.monotonic() - self._last_count < self._pause:
            return
        self.count()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._there, **self._fields(0))
        self._line_now_and_then(self._fields(0))

    def batch(self, images: int) -> None:
        self.step()

    def waiting_for_others(self, job: Job) -> None:
        """This rank's own images are made."""
        if self._plan is None:
            self.started(job, ())
        elif self._console.is_terminal:
            self._start_bar()


@contextlib.contextmanager
def progress(
    quiet: bool, verbose: bool = False, ranks: Ranks | None = None, kind: type[RunProgress] = RunProgress
) -> Iterator[RunProgress | None]:
    """The progress of a run, with a spinner while torch is imported; None where ``quiet``, or on any rank but 0."""
    if quiet or (ranks is not None and ranks.rank):
        shown = None
    else:
        shown = (kind if ranks is None else RanksProgress)(verbose)
    try:
        if shown is not None:
            shown.waiting("loading torch")
        yield shown
    finally:
        if shown is not None:
            shown.stopped()


def stages(progress: RunProgress | None) -> Callable[[str, bool], None]:
    """What to call with each stage of a command of many: a spinner on a terminal, else a line; None: nothing.

    Of stages that are one of many of their kind (the second argument) there is a line now and then.
    """
    if progress is None:
        return lambda what, one_of_many: None
    last_line = time.monotonic()

    def tell(what: str, one_of_many: bool) -> None:
        nonlocal last_line
        progress.waiting(what)
        if stderr().is_terminal or (one_of_many and time.monotonic() - last_line < SECONDS_BETWEEN_LINES):
            return
        last_line = time.monotonic()
        say(what)

    return tell


@contextlib.contextmanager
def spinner(what: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, a spinner while something runs, with a count: call what is yielded with (done, total)."""
    console = stderr()
    if quiet or not console.is_terminal:
        yield lambda done, total: None
        return
    with console.status(what) as status:
        shown = 0.0

        def update(done: int, total: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.2:
                shown = time.monotonic()
                status.update(f"{what}: {done:,} of {total:,}")

        yield update


def show_columns(rows: Sequence[Mapping[str, str]], title: str = "", words: int = 1) -> None:
    """Rows of equal names on stdout: a table on a terminal, else a line a row. The first ``words`` columns are text."""
    console = stdout()
    for row in rows:
        line = ", ".join(f"{name}: {value}" for name, value in row.items() if value)
        log(line)
        if not console.is_terminal:
            console.print(line, markup=False, soft_wrap=True)
    if not console.is_terminal:
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", title_style="bold")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))
    console.print(table)


def crossed(
    across: tuple[str, Sequence[str]], down: tuple[str, Sequence[str]], texts: Mapping[tuple[int, int], str]
) -> list[dict[str, str]]:
    """Rows for `show_columns` of two axes, each a name and its labels; ``texts`` are by the places on them."""
    (name, labels), (other, rows) = across, down
    return [
        {f"{other} \\ {name}": row, **{label: texts.get((i, j), "") for i, label in enumerate(labels)}}
        for j, row in enumerate(rows)
    ]


def show_table(rows: Mapping[str, Any], title: str, style: str = "green") -> None:
    """Names and values on stdout: a panel on a terminal, else plain lines."""
    console = stdout()
    if not console.is_terminal:
        for name, value in rows.items():
            console.print(f"{name}: {value}".replace("\n", "\n  "), markup=False, soft_wrap=True)
        return
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(Panel(table, title=title, border_style=style, expand=False))


def show_summary(summary: Summary) -> None:
    """The closing panel of a run."""
    images = counted(summary.made, "image")
    if summary.present:
        images += f" made, {summary.present:,} there already" if summary.made else ""
    rows: dict[str, Any] = {
        "images": images if summary.made else f"nothing to do: all {summary.present:,} are there already"
    }
    if summary.made:
        rows["time"] = f"{summary.seconds:.1f} s ({speed_text(summary.images_per_second)})"
    if summary.left:
        rows["left"] = f"{counted(summary.left, 'image')} of the folder's plan, for other shards or runs"
    rows["folder"] = summary.folder
    if summary.grid is not None:
        rows["contact sheet"] = summary.grid
    if summary.npz is not None:
        rows["array"] = summary.npz
    for name, value in rows.items():
        log(f"{name}: {value}")
    show_table(rows, "done")
