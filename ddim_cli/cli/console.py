"""The console: messages and errors, the progress of a run, its closing panel.

Results go to stdout, everything else to stderr. Where there is no terminal: plain lines, no
control characters.
"""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ddim_cli.errors import DdimError, InterruptedRunError

if TYPE_CHECKING:
    from rich.console import Console

    from ddim_cli.sampling.run import Job, Summary

SECONDS_BETWEEN_LINES = 10.0


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def say(text: str, style: str = "") -> None:
    """A line on stderr, wrapped by the terminal alone."""
    stderr().print(text, style=style, markup=False, soft_wrap=True)


def warn(text: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def show_error(text: str) -> None:
    from rich.text import Text

    console = stderr()
    for line in text.splitlines() or [""]:
        console.print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json_module.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def handles_errors(command: Callable) -> Callable:
    """End a command that fails with a sentence on stderr and its exit code, never a traceback unless --verbose."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(report(error, kwargs.get("json", False), kwargs.get("verbose", False))) from None

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
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        text, code = f"unexpected {type(error).__name__}: {first} (--verbose shows where)", 1
    if verbose and not isinstance(error, InterruptedRunError):
        stderr().print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
    if isinstance(error, InterruptedRunError):
        say(text)
    else:
        show_error(text)
    if as_json:
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

    def started(self, job: Job, todo: Sequence[int]) -> None:
        self._clear_status()
        self._total, self._made, self._steps = len(todo), 0, len(job.run.timesteps)
        self._batch = min(job.batch_size, self._total)
        self._began = self._last_line = time.monotonic()
        done = len(job.seeds) - len(todo)
        batches = -(-len(todo) // job.batch_size)
        runtime = job.record["runtime"]
        say(
            f"{job.run.model.name}: {counted(len(todo), 'image')} in {counted(batches, 'batch')} of {job.batch_size}, "
            f"{counted(self._steps, 'step')} each, on {runtime['device']} in {runtime['dtype']}"
            + (", compiled" if runtime["compile"] else "")
            + (f"; {counted(done, 'image')} {'is' if done == 1 else 'are'} there already" if done else "")
        )
        if self._console.is_terminal:
            self._start_bar()

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
        self._task = self._bar.add_task("", total=self._total * self._steps, **self._fields(0))
        self._bar.start()

    def _fields(self, step: int) -> dict[str, str]:
        units = self._made * self._steps + self._batch * step
        seconds = time.monotonic() - self._began
        rate = ""
        if units:
            left = seconds / units * (self._total * self._steps - units)
            rate = f"{units / self._steps / seconds:.3g} images/s, {duration(left)} left"
        images = f"{self._made}/{self._total} images"
        return {"images": images, "step": f"step {step}/{self._steps}", "rate": rate}

    def step(self, done: int) -> None:
        if self._bar is not None:
            units = self._made * self._steps + self._batch * done
            self._bar.update(self._task, completed=units, **self._fields(done))
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(", ".join(v for v in self._fields(done).values() if v))

    def batch(self, images: int) -> None:
        self._made += images
        if self._bar is not None:
            self._bar.update(self._task, completed=self._made * self._steps, **self._fields(0))
        self._batch = min(self._batch, self._total - self._made)

    def stopped(self) -> None:
        self._clear_status()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _clear_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


@contextlib.contextmanager
def progress(quiet: bool, verbose: bool = False) -> Iterator[RunProgress | None]:
    """The progress of a run, with a spinner while torch is imported; None where ``quiet``."""
    shown = None if quiet else RunProgress(verbose)
    try:
        if shown is not None:
            shown.waiting("loading torch")
        yield shown
    finally:
        if shown is not None:
            shown.stopped()


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
        rows["time"] = f"{summary.seconds:.1f} s ({summary.images_per_second:.3g} images/s)"
    if summary.left:
        rows["left"] = f"{counted(summary.left, 'image')} of the folder's plan, for other shards or runs"
    rows["folder"] = summary.folder
    if summary.grid is not None:
        rows["contact sheet"] = summary.grid
    show_table(rows, "done")
