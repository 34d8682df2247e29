"""The console: messages, errors, the log file, JSON.

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
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from ddim_cli.cli.signals import interruptible
from ddim_cli.cli.signatures import with_named_paths
from ddim_cli.errors import DdimError, InterruptedRunError, RunError, UsageError
from ddim_cli.sampling.torchrun import Ranks

if TYPE_CHECKING:
    from rich.console import Console

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
    """Print a line to stderr, without breaking it: a terminal wraps it, a file keeps it whole."""
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
    """Append a line to the log file, if there is one. One that cannot be written is reported once, and ends no run."""
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
            warn(f"--log-file {_log.name}: cannot be written: {error.strerror}; messages go to stderr only")


@contextlib.contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Within the block, append a copy of every message to ``path``.

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
    """Log errors in the arguments to the log file that the arguments name, if it can be opened."""
    with contextlib.suppress(DdimError), logging_to(path):
        for line in text.splitlines():
            log(f"error: {line}")


def json_text(value: Any) -> str:
    """``value`` as one line of JSON; what stdout's encoding lacks, such as a file name's odd bytes, is escaped."""
    text = json_module.dumps(value, ensure_ascii=False) + "\n"
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return json_module.dumps(value) + "\n"
    return text


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    global _printed_json
    text = json_text(value)
    _printed_json = True
    sys.stdout.write(text)
    sys.stdout.flush()


def end_at_once(as_json: bool) -> None:
    """Print what a second Ctrl-C leaves time for, past Python's streams: the interrupted code may hold their locks."""
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
    """Say what went wrong; return the exit code."""
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
