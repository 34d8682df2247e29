"""A sweep: the same seeds in every cell of a table of settings, each cell a normal output folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ddim_cli.config.seeds import format_seeds
from ddim_cli.config.sweep import Cell, Sweep
from ddim_cli.errors import InterruptedRunError, RunError, UsageError
from ddim_cli.experiments.cells import CellRun
from ddim_cli.models.load import SamplingNetwork, load_sampling_network
from ddim_cli.outputs.atomic import locked, remove_leftovers, write_atomically
from ddim_cli.outputs.figures import distance_text
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import encode_png, read_own
from ddim_cli.outputs.sidecar import identity_hash, utc_now
from ddim_cli.outputs.sweep_manifest import MANIFEST, SHEET, SWEEP_SCHEMA, encode_sweep, is_sweep, read_sweep
from ddim_cli.outputs.sweep_sheet import Block, Panel, draw_sweep, pictures_in_a_cell
from ddim_cli.sampling.network import load_network
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.precision import set_tf32
from ddim_cli.sampling.run import Job, Reporter, Summary, make_job, pending, says_compiled
from ddim_cli.sampling.run import execute as execute_job

# What is said of the pictures of a cell, as in `evaluation.score`: the files -> a value, its name and the rest.
Score = Mapping[str, Any]


class Scorer(Protocol):
    """Scores picture files; every score of it contains ``facts``, on which it depends beside the pictures."""

    facts: Mapping[str, Any]

    def __call__(self, pictures: Sequence[Path]) -> Score: ...


class SweepReporter(Reporter):
    """Told what a sweep is doing, beside what each of its cells does."""

    def sweeping(self, image_steps: int, cells: int) -> None:
        """The work ahead: the sum over cells of images to make times steps, and how many cells there are."""

    def cell(self, number: int, title: str) -> None:
        """Cell ``number``, from 1 on, is next."""


@dataclass(frozen=True)
class SweepCell:
    """A cell and its job, whose folder is the cell's."""

    cell: Cell
    job: Job

    @property
    def name(self) -> str:
        return self.job.folder.path.name


@dataclass(frozen=True)
class Plan:
    """What a sweep makes, and where."""

    sweep: Sweep
    cells: tuple[SweepCell, ...]
    folder: Path

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the cell with the most; any other's are the first of them."""
        return max((own.job.run.config.seeds() for own in self.cells), key=len)


@dataclass(frozen=True)
class CellResult:
    """What became of a cell; ``images_per_second`` is that of the run that finished it, ``score`` if it has one."""

    own: SweepCell
    summary: Summary
    images_per_second: float | None
    score: Score | None

    def as_json(self) -> dict[str, Any]:
        return {
            **_describe(self.own),
            "finished": self.summary.left == 0,
            "images_per_second": self.images_per_second,
            "score": dict(self.score) if self.score is not None else None,
        }


@dataclass(frozen=True)
class Swept:
    """What a sweep did. ``sheet`` is None until all cells are finished."""

    plan: Plan
    results: tuple[CellResult, ...]
    sheet: Path | None

    @property
    def made(self) -> int:
        return sum(result.summary.made for result in self.results)

    @property
    def present(self) -> int:
        return sum(result.summary.present for result in self.results)

    @property
    def left(self) -> int:
        return sum(result.summary.left for result in self.results)

    @property
    def seconds(self) -> float:
        return sum(result.summary.seconds for result in self.results)


def make_plan(sweep: Sweep, cells: Sequence[CellRun], shard: Shard = Shard()) -> Plan:
    """Settle the folders. Without output.dir the sweep's is outputs/MODEL-sweep-HASH, HASH over all of its cells.

    Raises:
        UsageError: for a device that is not there, or a folder that cannot be used.
        ConfigError: for coefficients that cannot be computed.
    """
    jobs = [make_job(own.run, shard) for own in cells]
    output = jobs[0].run.config.output
    if output.dir:
        folder = jobs[0].folder.path
    else:
        hashes = "".join(f"{own.name}:{identity_hash(job.record)} " for own, job in zip(cells, jobs, strict=True))
        name = f"{jobs[0].run.model.name}-sweep-{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"
        folder = Path("outputs") / name
    if (folder / "run.json").exists():
        raise UsageError(f"output folder {folder}: it holds pictures of ddim sample; choose another with --out")
    placed = []
    for own, job in zip(cells, jobs, strict=True):
        of_cell = OutputFolder(folder / own.name, output.subdirs, output.fsync)
        of_cell.check_usable()
        placed.append(SweepCell(own.cell, replace(job, folder=of_cell)))
    return Plan(sweep, tuple(placed), folder)


class _Networks:
    """Networks of the cells, each loaded once for as long as cells in turn have the same model."""

    def __init__(self, jobs: Mapping[int, tuple[Job, int]]):
        """``jobs`` are those with images to make: number -> (job, images)."""
        self._jobs = jobs
        self._weights: tuple[Any, SamplingNetwork] | None = None
        self._last: tuple[Any, tuple[SamplingNetwork, bool]] | None = None

    def _load_weights(self, *which: Any) -> SamplingNetwork:
        if self._weights is None or self._weights[0] != which:
            self._weights = None
            self._weights = (which, load_sampling_network(*which))
        return self._weights[1]

    def load(self, job: Job, images: int, reporter: Reporter) -> tuple[SamplingNetwork, Job]:
        """See `sampling.run.Load`. Whether compiled code pays is judged by all cells that would use it."""
        set_tf32(job.run.config.runtime.tf32)
        setting, target = job.run.config.runtime.compile, job.target
        key = (target, setting, job.run.config.runtime.tf32)
        if self._last is None or self._last[0] != key:
            same = [(other, count) for other, count in self._jobs.values() if other.target == target]
            calls = sum(-(-count // other.batch_size) * len(other.run.timesteps) for other, count in same)
            self._last = None
            loaded = load_network(
                target, setting, calls, lambda: reporter.compiling(job), reporter.note, self._load_weights
            )
            self._last = (key, loaded)
        network, compiled = self._last[1]
        return network, says_compiled(job, compiled)


def _describe(own: SweepCell) -> dict[str, Any]:
    seeds = own.job.run.config.seeds()
    return {
        "at": list(own.cell.at),
        "title": own.cell.title,
        "folder": own.name,
        "seeds": format_seeds(seeds),
        "images": len(seeds),
        "set": own.cell.settings,
    }


def manifest(
    plan: Plan, results: Sequence[CellResult], created: str, done: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """sweep.json. Cells without a result yet were finished before if ``done`` has what is known of them, by name."""
    sweep = plan.sweep
    first = plan.cells[0].job
    waiting = [
        {**_describe(own), "finished": own.name in done, **done.get(own.name, {})} for own in plan.cells[len(results) :]
    ]
    return {
        "schema": SWEEP_SCHEMA,
        "created": created,
        "model": first.record["model"],
        "seeds": format_seeds(plan.seeds),
        "images": len(plan.seeds),
        "axes": [
            {
                "name": axis.name,
                "values": [{"label": value.label, "set": dict(value.layer.values)} for value in axis.values],
            }
            for axis in sweep.axes
        ],
        "overrides": [
            {"when": {key: list(wanted) for key, wanted in each.when.items()}, "set": dict(each.layer.values)}
            for each in sweep.overrides
        ],
        "cells": [*(result.as_json() for result in results), *waiting],
        "sheet": SHEET,
    }


def within(plan: Plan, there: Mapping[str, Any]) -> bool:
    """Whether ``there``, a sweep.json, has all cells of the plan and others beside.

    Raises:
        UsageError: where each has cells that the other has not: those would be lost.
    """
    ours, theirs = {own.name for own in plan.cells}, {cell["folder"] for cell in there.get("cells", ())}
    if ours < theirs:
        return True
    if not theirs <= ours:
        path, other = plan.folder / MANIFEST, next(c for c in there["cells"] if c["folder"] not in ours)
        raise UsageError(
            f"{path} is of another sweep, with a cell {other.get('title', other['folder'])} that this one lacks; "
            "choose another folder with --out, give one sweep the values of both, or replace it with --overwrite"
        )
    return False


def _joined(there: Mapping[str, Any], plan: Plan, results: Sequence[CellResult]) -> dict[str, Any]:
    """A sweep.json with more cells than the plan, and in it what became of the plan's."""
    found = {result.own.name: result.as_json() for result in results}
    new = [{**cell, **found.get(cell["folder"], {}), "at": cell["at"]} for cell in there["cells"]]
    seeds = {} if len(plan.seeds) <= there.get("images", 0) else {"seeds": format_seeds(plan.seeds)}
    return {**there, **seeds, **({"images": len(plan.seeds)} if seeds else {}), "cells": new}


def look(plan: Plan, overwrite: bool = False) -> list[int]:
    """How many images of each cell are to be made.

    Raises:
        UsageError: if the folder holds another sweep, or a cell's pictures of other settings, and ``overwrite`` is
            false.
    """
    todo = [len(pending(own.job, overwrite)) for own in plan.cells]
    if not overwrite and is_sweep(plan.folder):
        within(plan, read_sweep(plan.folder))
    return todo


def _rate(folder: OutputFolder, summary: Summary) -> float | None:
    """Images a second: of this run, or of the one before that finished the folder."""
    if summary.images_per_second is not None:
        return round(summary.images_per_second, 3)
    totals = (folder.read_manifest() or {}).get("totals")
    return totals.get("images_per_second") if isinstance(totals, Mapping) else None


def _left(own: SweepCell) -> int:
    """How many images of the cell are not there yet, whoever is to make them."""
    return len(own.job.folder.missing(own.job.run.config.seeds(), own.job.identity))


def _left_by_shards(own: SweepCell) -> int:
    """`_left` of a cell of which this process has nothing to make: all, unless it makes but a part."""
    return _left(own) if own.job.shard.count > 1 else 0


def _looked_at_again(result: CellResult) -> CellResult:
    """Other shards may have finished a cell since this one left it; the last of them to look finds all finished."""
    if not result.summary.left:
        return result
    summary = replace(result.summary, left=_left(result.own))
    return replace(result, summary=summary, images_per_second=_rate(result.own.job.folder, summary))


def _known(before: Mapping[str, Any], own: SweepCell) -> dict[str, Any]:
    """What sweep.json had of a cell with these seeds: speed and score."""
    seeds = format_seeds(own.job.run.config.seeds())
    same = [cell for cell in before.get("cells", ()) if cell["folder"] == own.name and cell.get("seeds") == seeds]
    return {key: same[0][key] for key in ("images_per_second", "score") if key in same[0]} if same else {}


def _score(result: CellResult, scorer: Scorer) -> Score:
    folder, seeds = result.own.job.folder, result.own.job.run.config.seeds()
    return scorer([folder.picture(seed) for seed in seeds])


def _kept_score(before: Mapping[str, Any], result: CellResult, scorer: Scorer | None) -> Score | None:
    """The score that sweep.json had for the same pictures, by the extractor and reference of ``scorer``, or any."""
    score = _known(before, result.own).get("score")
    if result.summary.made or result.summary.left or not isinstance(score, Mapping):
        return None
    asked = scorer.facts if scorer is not None else {}
    return score if all(score.get(key) == value for key, value in asked.items()) else None


def execute(
    plan: Plan,
    reporter: SweepReporter | None = None,
    overwrite: bool = False,
    scorer: Scorer | None = None,
) -> Swept:
    """Make what is missing of every cell, score them, and draw the sheet.

    Raises:
        UsageError: as `look` does, before any is made; also where another sweep begins in this folder at the same time.
        RunError: if a cell fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter = reporter or SweepReporter()
    before = read_sweep(plan.folder) if is_sweep(plan.folder) and not overwrite else {}
    ahead = look(plan, overwrite)
    todo = {i: (own.job, count) for i, (own, count) in enumerate(zip(plan.cells, ahead, strict=True)) if count}
    busy = {plan.cells[i].name for i in todo}
    OutputFolder(plan.folder).create()
    remove_leftovers(plan.folder)
    created = before.get("created") or utc_now()
    fsync = plan.cells[0].job.folder.fsync
    reporter.sweeping(sum(count * len(job.run.timesteps) for job, count in todo.values()), len(plan.cells))
    networks = _Networks(todo)
    done = {own.name: _known(before, own) for own in plan.cells if own.name not in busy and not _left_by_shards(own)}
    results: list[CellResult] = []

    def write(anew: bool = False) -> bool:
        """Write sweep.json; whether it has the cells of this sweep alone. What is there is checked under the lock."""
        path = plan.folder / MANIFEST
        with locked(path):
            there = read_sweep(plan.folder) if path.exists() and not anew else {}
            joins = within(plan, there)
            found = _joined(there, plan, results) if joins else manifest(plan, results, created, done)
            _write_changed(path, encode_sweep(found), fsync)
        return not joins

    try:
        if todo or overwrite:
            # Whoever comes later finds which cells this folder is for.
            write(anew=overwrite)
        for number, own in enumerate(plan.cells, start=1):
            reporter.cell(number, own.cell.title)
            summary = _named(own, lambda job=own.job: execute_job(job, reporter, overwrite, load=networks.load))
            result = CellResult(own, summary, _rate(own.job.folder, summary), None)
            results.append(replace(result, score=_kept_score(before, result, scorer)))
            if summary.made:
                write()
        results = [_looked_at_again(result) for result in results]
        for number, result in enumerate(results):
            if scorer is not None and result.score is None and not result.summary.left:
                reporter.closing(f"scoring {result.own.cell.title}, {number + 1} of {len(results)}")
                score = _named(result.own, lambda r=result: _score(r, scorer))
                results[number] = replace(result, score=score)
        whole, sheet = write(), plan.folder / SHEET
        if not whole or any(result.summary.left for result in results):
            # One of a sweep with more cells shows this one's too.
            sheet = sheet if not whole and sheet.exists() else None
        else:
            reporter.closing("drawing the sheet")
            with locked(sheet):
                _write_changed(sheet, encode_png(draw(plan, results)), fsync)
    except OSError as error:
        raise RunError(f"{error.filename or plan.folder}: cannot be written: {error.strerror}") from None
    finally:
        reporter.stopped()
    return Swept(plan, tuple(results), sheet)


def _write_changed(path: Path, content: bytes, fsync: bool) -> None:
    """Write a file, unless it is there with this content: a sweep that does nothing touches nothing. Raises OSError."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content, fsync)


def _named(own: SweepCell, run: Callable[[], Any]) -> Any:
    """What ``run`` gives; an error of it says which cell it is about."""
    try:
        return run()
    except InterruptedRunError:
        raise
    except RunError as error:
        raise RunError(f"cell {own.cell.title}: {error}") from None


def draw(plan: Plan, results: Sequence[CellResult]) -> Image.Image:
    """The sheet: the first axis across and the second down; further ones as panels below each other.

    With one axis a row a cell. Every cell shows the same seeds.
    """
    axes, by_place = plan.sweep.axes, {result.own.cell.at: result for result in results}
    fewest = min(len(own.job.run.config.seeds()) for own in plan.cells)
    several = len(axes) > 1
    columns = len(axes[0].values) if several else 1
    first = plan.cells[0].job.run.model
    size = (first.size[1], first.size[0])
    across, down = pictures_in_a_cell(size, columns, several, fewest)
    shown = across * down

    def block(at: tuple[int, ...]) -> Block:
        result = by_place[at]
        folder, seeds = result.own.job.folder, result.own.job.run.config.seeds()[:shown]
        note = distance_text(result.score["value"]) if result.score is not None else ""
        return Block([read_own(folder.picture(seed)) for seed in seeds], note)

    panels = []
    for rest in sorted({at[2:] for at in by_place}):
        heading = ", ".join(axis.title(axis.values[i]) for axis, i in zip(axes[2:], rest, strict=True))
        if several:
            rows = [[block((i, j, *rest)) for i in range(columns)] for j in range(len(axes[1].values))]
            tops = [axes[0].title(value) for value in axes[0].values]
            panels.append(Panel(rows, tops, [axes[1].title(value) for value in axes[1].values], heading))
        else:
            rows = [[block((i,))] for i in range(len(axes[0].values))]
            panels.append(Panel(rows, (), [axes[0].title(value) for value in axes[0].values]))
    return draw_sweep(panels, _caption(plan, results, shown), across)


def _caption(plan: Plan, results: Sequence[CellResult], shown: int) -> str:
    seeds = format_seeds(plan.seeds[:shown])
    score = next((result.score for result in results if result.score is not None), None)
    below = f"; below them the {score['label']} of all" if score is not None else ""
    name = plan.cells[0].job.run.model.name
    return f"{name}: in every cell the pictures of {'seed' if shown == 1 else 'seeds'} {seeds}{below}"
