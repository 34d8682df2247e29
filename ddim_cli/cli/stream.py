"""``ddim sample --jsonl``: rows as they come, each answered with a line of JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ddim_cli.cli import console
from ddim_cli.cli.options import Layers, RunOptions
from ddim_cli.cli.panels import counted, speed_text
from ddim_cli.cli.progress import StreamProgress, showing_progress

if TYPE_CHECKING:
    from ddim_cli.sampling.resident import Served, Source

LONGEST_WAIT = 3600.0


def check_stream(
    jsonl: bool, max_wait: float | None, items: Path | None, options: RunOptions, others: Mapping[str, bool]
) -> None:
    """UsageError for options that have no place beside --jsonl, or none without it; ``others`` are given or not."""
    from ddim_cli.errors import UsageError
    from ddim_cli.sampling.torchrun import Ranks

    if not jsonl:
        raise UsageError("--max-wait is for --jsonl, where rows are sampled as they come")
    if items is None:
        raise UsageError("--jsonl answers rows; say with --items where they come from (-: stdin)")
    if options.json:
        raise UsageError("--json and --jsonl both want stdout; give one")
    refused = {
        "--show": "wants stdout, which is for the answers",
        "--npz": "collects a plan that is known from the start; make the array of the same rows with --items FILE",
        "--shard": "is a part of a plan that is known from the start; start a process for each part of the rows",
        "--dry-run": "shows a plan, and there is none before the rows come",
    }
    given = {**others, "--shard": options.shard is not None, "--dry-run": options.dry_run}
    for name, why in refused.items():
        if given[name]:
            raise UsageError(f"{name} has no place beside --jsonl: it {why}")
    if Ranks.of() is not None:
        raise UsageError("--jsonl: the ranks of torchrun would each read a part of the rows; start without torchrun")
    if max_wait is not None and not 0 <= max_wait <= LONGEST_WAIT:
        raise UsageError(f"--max-wait {max_wait:g}: is not from 0 to {LONGEST_WAIT:g} seconds")


def sample_stream(layers: Layers, path: Path, options: RunOptions, max_wait: float | None) -> None:
    """Sample rows as they come, and end when they do.

    Raises:
        RunError: in the end, where rows were answered with an error.
        BrokenPipeError: where nobody reads the answers any more.
    """
    from ddim_cli.errors import RunError
    from ddim_cli.experiments.start import check_no_seeds
    from ddim_cli.sampling.resolve import resolve

    check_no_seeds(layers, "--items", "which images there are")
    run = resolve(layers, conditions_follow=True)
    for warning in run.warnings:
        console.warn(warning)
    label = "stdin" if str(path) == "-" else str(path)
    with (
        opened_source(path, label) as source,
        showing_progress(options.quiet, StreamProgress(label, options.verbose)) as progress,
    ):
        from ddim_cli.sampling.resident import WAITS, UnheardError, serve

        waits = WAITS if max_wait is None else max_wait
        try:
            served = serve(run, source(), _tell, waits, options.overwrite, progress)
        except UnheardError:
            raise BrokenPipeError from None
    if not options.quiet:
        _say_done(served)
    if served.refused:
        were = "was" if served.refused == 1 else "were"
        raise RunError(f"{counted(served.refused, 'row')} {were} answered with an error")


@contextmanager
def opened_source(path: Path, label: str) -> Iterator[Callable[[], Source]]:
    """What makes the `Source` of --items, which imports torch, within the block in which it is open.

    Raises UsageError for a file in another format than JSONL, and ConfigError for one that cannot be opened.
    """
    from ddim_cli.config.job_file import STDIN
    from ddim_cli.errors import ConfigError, UsageError

    if str(path) == STDIN:
        if sys.stdin is None:
            raise UsageError("--items -: stdin is closed")
        yield lambda: _source(sys.stdin.buffer, label)
        return
    regular = path.is_file()
    if regular and path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        raise UsageError(f"--items {label}: --jsonl takes rows as JSONL, and this is another format by its name")
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ConfigError(f"--items {label}: cannot be read: {error.strerror}") from None
    with stream:
        yield lambda: _source(stream, label, path if regular else None)


def _source(stream: BinaryIO, label: str, path: Path | None = None) -> Source:
    from ddim_cli.sampling.resident import Source

    return Source(stream, label) if path is None else Source(stream, label, path.stem, path.parent)


def _tell(answer: Mapping[str, Any]) -> None:
    """Print an answer. Raises UnheardError where nobody reads, RunError where it cannot be written."""
    from ddim_cli.errors import RunError
    from ddim_cli.sampling.resident import UnheardError

    try:
        console.print_json(answer)
    except BrokenPipeError:
        raise UnheardError from None
    except OSError as error:
        raise RunError(f"stdout: cannot be written: {error.strerror}; every picture is in its folder") from None


def _say_done(served: Served) -> None:
    summary = served.summary
    rows = summary.made + summary.present + served.refused
    parts = [f"{counted(rows, 'row')}: {counted(summary.made, 'image')} made"]
    if summary.made:
        parts[0] += f" in {summary.seconds:.1f} s ({speed_text(summary.images_per_second or 0.0)})"
    if summary.present:
        parts.append(f"{summary.present:,} there already")
    if served.refused:
        parts.append(counted(served.refused, "error"))
    console.say(f"{', '.join(parts)}; {summary.sheet or summary.folder}")
    if summary.left:
        console.say(f"{counted(summary.left, 'planned image')} not there, for other processes or runs")
