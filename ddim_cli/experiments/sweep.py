"""A sweep: the same seeds in every cell of a table of settings, each cell a folder as ``ddim sample`` makes it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ddim_cli.config.layers import Settings, layers_of
from ddim_cli.config.seeds import Seeds, format_seeds
from ddim_cli.config.sweep import CellSettings, SweepSettings
from ddim_cli.errors import RunError, UsageError
from ddim_cli.experiments.cells import SweepRun, choose_part, resolve_sweep
from ddim_cli.outputs.atomic import locked, remove_leftovers
from ddim_cli.outputs.figures import distance_text
from ddim_cli.outputs.files import File
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import Encoding, encode_png, read_own
from ddim_cli.outputs.sidecar import identity_hash, utc_now
from ddim_cli.outputs.sweep_manifest import (
    SHEET,
    SWEEP_SCHEMA,
    holds_more,
    is_sweep,
    read_sweep,
    update_sweep,
    write_changed,
)
from ddim_cli.outputs.sweep_sheet import Block, Panel, draw_sweep, pictures_in_a_cell
from ddim_cli.sampling.executor import Summary, execute, pending
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.network import Networks
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import SeedPictures
from ddim_cli.sampling.reporter import Reporter


class Score(Protocol):
    """What a scorer says of pictures; as JSON ``value``, ``label``, the scorer's ``facts`` and whatever else."""

    def as_json(self) -> dict[str, Any]: ...


class Scorer(Protocol):
    """Scores picture files, as `evaluation.score.Judge` does. ``facts`` is what else a score depends on."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def score(self, pictures: Sequence[File], /) -> Score: ...


@dataclass(frozen=True)
class CellJob:
    """A cell and its job, whose folder is the cell's."""

    settings: CellSettings
    job: Job

    @property
    def name(self) -> str:
        return self.job.folder.path.name

    @property
    def seeds(self) -> Seeds:
        return self.job.run.config.seeds()

    def as_json(self) -> dict[str, Any]:
        return {
            "at": list(self.settings.at),
            "title": self.settings.title,
            "folder": self.name,
            "seeds": format_seeds(self.seeds),
            "images": len(self.seeds),
            "set": self.settings.values,
        }

    def left(self) -> int:
        """How many images of the cell are not there yet, whoever is to make them."""
        return len(self.job.folder.missing(self.seeds, self.job.identity))

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within the block, an error of the run says which cell it is about."""
        try:
            yield
        except RunError as error:
            raise RunError(f"cell {self.settings.title}: {error}") from None


@dataclass(frozen=True)
class SweepJob:
    """A sweep settled on this machine."""

    settings: SweepSettings
    cells: tuple[CellJob, ...]
    folder: Path

    @property
    def seeds(self) -> Seeds:
        """Those of the cell with the most; any other's are the first of them."""
        return max((cell.seeds for cell in self.cells), key=len)


@dataclass(frozen=True)
class CellResult:
    """What became of a cell. ``images_per_second`` is that of the run that finished it, ``score`` as `Score` has it."""

    cell: CellJob
    summary: Summary
    images_per_second: float | None
    score: Mapping[str, Any] | None

    def as_json(self) -> dict[str, Any]:
        return {
            **self.cell.as_json(),
            "finished": self.summary.left == 0,
            "images_per_second": self.images_per_second,
            "score": dict(self.score) if self.score is not None else None,
        }


@dataclass(frozen=True)
class Swept:
    """What a sweep did. ``sheet``, the picture of all cells, is None until they are finished."""

    job: SweepJob
    cells: tuple[CellResult, ...]
    sheet: Path | None

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def made(self) -> int:
        return sum(result.summary.made for result in self.cells)

    @property
    def present(self) -> int:
        return sum(result.summary.present for result in self.cells)

    @property
    def left(self) -> int:
        """How many images are for other shards or runs to make."""
        return sum(result.summary.left for result in self.cells)

    @property
    def seconds(self) -> float:
        return sum(result.summary.seconds for result in self.cells)

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "sheet": str(self.sheet) if self.sheet is not None else None,
            "made": self.made,
            "present": self.present,
            "left": self.left,
            "finished": self.left == 0,
            "seconds": round(self.seconds, 3),
            "cells": [result.as_json() for result in self.cells],
        }


def sweep(
    axes: Mapping[str, Sequence[Any]] | None = None,
    config: Settings = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    scorer: Scorer | None = None,
    shard: str | None = None,
    overwrite: bool = False,
) -> Swept:
    """Sample the same seeds under every combination of the values of the axes, as ``ddim sweep`` does.

    Args:
        axes: any TOML key, of [sampling] also without the section, and its values: ``{"steps": [10, 20], "eta": [0.0,
            1.0]}``. They replace or join those of the config's [sweep].
        config: settings, as `sample` takes them.
        model: a source, as ``--model`` takes it, in place of the config's.
        out: the folder of the sweep, in place of the config's or the default; each cell is a folder in it.
        scorer: scores the pictures of every cell that is finished, for example ``Judge.open("mnist")`` of
            `ddim_cli.evaluation.score`. The config's [sweep] names a reference for the command alone.
        shard: the part of every cell to make, ``"0/8"``.
        overwrite: replace what is in the folder.

    Returns:
        For each cell, the last axis varying fastest, what was made, its folder and its score; and the picture of all.

    Warns:
        UserWarning: where settings make garbage without being wrong, and where a reference is named without a scorer.

    Raises:
        DdimError: (an ordinary exception with a sentence) for settings that cannot work, a model that cannot be
            loaded, a folder that cannot be used or holds another sweep, and a cell that fails.
    """
    part = choose_part(shard)
    run = resolve_sweep(layers_of(config, model, out), axes or {})
    for text in run.warnings:
        warnings.warn(text, stacklevel=2)
    if run.settings.scoring and scorer is None:
        warnings.warn("[sweep] names what to score cells by, and no scorer is given: none is scored", stacklevel=2)
    return execute_sweep(prepare(run, part), overwrite=overwrite, scorer=scorer)


def prepare(run: SweepRun, shard: Shard = Shard()) -> SweepJob:
    """Settle the folders. Without output.dir the sweep's is outputs/MODEL-sweep-HASH, HASH over all of its cells.

    Raises:
        UsageError: for a device that is not there, or a folder that cannot be used.
        ConfigError: for coefficients that cannot be computed.
    """
    jobs = [make_job(cell.run, shard=shard) for cell in run.cells]
    if not isinstance(folder := jobs[0].folder.path, Path):
        raise UsageError(f"output folder {folder}: a sweep is made in a folder of this machine; choose one with --out")
    if not jobs[0].run.config.output.dir:
        hashes = "".join(f"{cell.name}:{identity_hash(job.record)} " for cell, job in zip(run.cells, jobs, strict=True))
        digest = hashlib.sha256(hashes.encode()).hexdigest()[:8]
        name = f"{jobs[0].run.model.name}-sweep-{digest}{Encoding.of(jobs[0].run.config.output).suffix}"
        folder = Path("outputs") / name
    if (folder / "run.json").exists():
        raise UsageError(f"output folder {folder}: it holds pictures of ddim sample; choose another with --out")
    placed = []
    for cell, job in zip(run.cells, jobs, strict=True):
        own = replace(job.folder, path=folder / cell.name)
        own.check_usable()
        placed.append(CellJob(cell.settings, replace(job, folder=own)))
    return SweepJob(run.settings, tuple(placed), folder)


def pending_images(sweep: SweepJob, overwrite: bool = False) -> list[int]:
    """How many images of each cell are to be made.

    Raises:
        UsageError: if the folder holds another sweep, or a cell's pictures of other settings, and ``overwrite`` is
            false.
    """
    counts = [len(pending(cell.job, SeedPictures(), overwrite)) for cell in sweep.cells]
    if not overwrite and is_sweep(sweep.folder):
        holds_more(sweep.folder, read_sweep(sweep.folder), [cell.name for cell in sweep.cells])
    return counts


def manifest(sweep: SweepJob, cells: Sequence[Mapping[str, Any]], created: str) -> dict[str, Any]:
    """sweep.json, with what is known of each of its cells."""
    return {
        "schema": SWEEP_SCHEMA,
        "created": created,
        "model": sweep.cells[0].job.record["model"],
        "seeds": format_seeds(sweep.seeds),
        "images": len(sweep.seeds),
        "axes": [
            {
                "name": axis.name,
                "values": [{"label": value.label, "set": dict(value.layer.values)} for value in axis.values],
            }
            for axis in sweep.settings.axes
        ],
        "overrides": [
            {"when": {key: list(wanted) for key, wanted in each.when.items()}, "set": dict(each.layer.values)}
            for each in sweep.settings.overrides
        ],
        "cells": list(cells),
        "sheet": SHEET,
    }


def _kept_score(score: Any, scorer: Scorer | None) -> Mapping[str, Any] | None:
    """A score from before, if it is by the extractor and the reference of ``scorer``, or any without one."""
    asked = scorer.facts if scorer is not None else {}
    same = isinstance(score, Mapping) and all(score.get(key) == value for key, value in asked.items())
    return score if same else None


def _rate(cell: CellJob, summary: Summary) -> float | None:
    """Images a second: of this run, or of the one before that finished the folder."""
    if summary.images_per_second is not None:
        return round(summary.images_per_second, 3)
    totals = (cell.job.folder.read_manifest() or {}).get("totals")
    return totals.get("images_per_second") if isinstance(totals, Mapping) else None


def execute_sweep(
    sweep: SweepJob,
    reporter: Reporter | None = None,
    overwrite: bool = False,
    scorer: Scorer | None = None,
) -> Swept:
    """Make what is missing of every cell, score them, and draw the sheet.

    Raises:
        UsageError: as `pending_images` does, before any is made; also where another sweep begins in this folder at the
            same time.
        RunError: if a cell fails; what was finished stays.
        InterruptedRunError: on Ctrl-C; likewise.
    """
    reporter, folder, fsync = reporter or Reporter(), sweep.folder, sweep.cells[0].job.folder.fsync
    before = read_sweep(folder) if is_sweep(folder) and not overwrite else {}
    counts = pending_images(sweep, overwrite)
    ahead = [(cell.job, count) for cell, count in zip(sweep.cells, counts, strict=True) if count]
    waiting = [_waiting(cell, count, before) for cell, count in zip(sweep.cells, counts, strict=True)]
    created = before.get("created") or utc_now()
    results: list[CellResult] = []

    def write(anew: bool = False) -> bool:
        cells = [*(result.as_json() for result in results), *waiting[len(results) :]]
        return update_sweep(folder, manifest(sweep, cells, created), anew, fsync)

    OutputFolder(folder).create()
    remove_leftovers(folder)
    reporter.sweeping(sum(count * job.steps for job, count in ahead), len(sweep.cells))
    networks = Networks([job.use(count) for job, count in ahead])
    sheet = folder / SHEET
    try:
        if ahead or overwrite:
            # Whoever comes later finds which cells this folder is for.
            write(anew=overwrite)
        for number, cell in enumerate(sweep.cells):
            reporter.cell(number + 1, cell.settings.title)
            with cell.named():
                summary = execute(cell.job, SeedPictures(), reporter, overwrite, networks)
            changed = summary.made or summary.left
            score = None if changed else _kept_score(waiting[number].get("score"), scorer)
            results.append(CellResult(cell, summary, _rate(cell, summary), score))
            if summary.made:
                write()
        # Other shards may have finished a cell since; the last of them to look finds all finished.
        results = [_looked_at_again(result) if result.summary.left else result for result in results]
        for number, result in enumerate(results, start=1):
            if scorer is not None and result.score is None and not result.summary.left:
                reporter.closing(f"scoring {result.cell.settings.title}, {number} of {len(results)}")
                results[number - 1] = _scored(result, scorer)
        if write():
            shown = not any(result.summary.left for result in results)
            if shown:
                reporter.closing("drawing the sheet")
                with locked(sheet):
                    write_changed(sheet, encode_png(draw(sweep, results)), fsync)
        else:
            # That of a sweep with more cells shows this one's too.
            shown = sheet.exists()
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    finally:
        reporter.stopped()
    return Swept(sweep, tuple(results), sheet if shown else None)


def _waiting(cell: CellJob, count: int, before: Mapping[str, Any]) -> dict[str, Any]:
    """What sweep.json says of a cell before its turn, of which this process has ``count`` images to make.

    Of one that is finished that is also what it said ``before`` of the same seeds: speed and score.
    """
    facts = cell.as_json()
    # Where this process has none to make, other shards may have some.
    if count or (cell.job.shard.count > 1 and cell.left()):
        return {**facts, "finished": False}
    same = (each for each in before.get("cells", ()) if all(each.get(key) == facts[key] for key in ("folder", "seeds")))
    known: Mapping[str, Any] = next(same, {})
    return {**facts, "finished": True, **{key: known[key] for key in ("images_per_second", "score") if key in known}}


def _looked_at_again(result: CellResult) -> CellResult:
    summary = replace(result.summary, left=result.cell.left())
    return replace(result, summary=summary, images_per_second=_rate(result.cell, summary))


def _scored(result: CellResult, scorer: Scorer) -> CellResult:
    folder = result.cell.job.folder
    with result.cell.named():
        return replace(result, score=scorer.score([folder.picture(seed) for seed in result.cell.seeds]).as_json())


def draw(sweep: SweepJob, results: Sequence[CellResult]) -> Image.Image:
    """The sheet: the first axis across and the second down; further ones as panels below each other.

    With one axis a row a cell. Every cell shows the same seeds.
    """
    axes, by_place = sweep.settings.axes, {result.cell.settings.at: result for result in results}
    fewest = min(len(cell.seeds) for cell in sweep.cells)
    several = len(axes) > 1
    height, width = sweep.cells[0].job.run.model.size
    across, down = pictures_in_a_cell((width, height), len(axes[0].values) if several else 1, several, fewest)
    shown = across * down

    def block(at: tuple[int, ...]) -> Block:
        result = by_place[at]
        folder, seeds = result.cell.job.folder, result.cell.seeds[:shown]
        note = distance_text(result.score["value"]) if result.score is not None else ""
        return Block([read_own(folder.picture(seed)) for seed in seeds], note)

    titles = [[axis.title(value) for value in axis.values] for axis in axes]
    if several:
        panels = []
        for rest in sorted({at[2:] for at in by_place}):
            heading = ", ".join(titles[axis][i] for axis, i in enumerate(rest, start=2))
            rows = [[block((i, j, *rest)) for i in range(len(titles[0]))] for j in range(len(titles[1]))]
            panels.append(Panel(rows, titles[0], titles[1], heading))
    else:
        panels = [Panel([[block((i,))] for i in range(len(titles[0]))], (), titles[0])]
    return draw_sweep(panels, _caption(sweep, results, shown), across)


def _caption(sweep: SweepJob, results: Sequence[CellResult], shown: int) -> str:
    seeds = format_seeds(sweep.seeds[:shown])
    score = next((result.score for result in results if result.score is not None), None)
    below = f"; below them the {score['label']} of all" if score is not None else ""
    name = sweep.cells[0].job.run.model.name
    return f"{name}: in every cell the pictures of {'seed' if shown == 1 else 'seeds'} {seeds}{below}"
