"""What a job makes of the rows of a job file: their pictures, run.json with items.jsonl, a contact sheet, an array."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ddim_cli.errors import UsageError
from ddim_cli.outputs.files import File, is_here
from ddim_cli.outputs.named import NamedFile
from ddim_cli.outputs.row_plan import RowPlan
from ddim_cli.outputs.sidecar import ROW, first_difference, row_settings
from ddim_cli.outputs.tar_folder import TarFolder
from ddim_cli.sampling.items import Item
from ddim_cli.sampling.job import Job
from ddim_cli.sampling.product import Ending, Product, check_npz, collect_npz, others
from ddim_cli.sampling.record import own_record
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.rows import RowItems


def line_of(item: Item, job: Job) -> dict[str, Any]:
    """The line of items.jsonl that plans an item."""
    own = own_record(item, job.record["sampling"])
    return {"name": item.name, "seed": own.pop(ROW)["seed"], **own}


@dataclass(frozen=True)
class Planned:
    """The lines of items.jsonl that a job plans, each made when it is its turn."""

    job: Job

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for item in self.job.plan:
            yield line_of(item, self.job)


def _others(job: Job) -> Sequence[Item]:
    """The items that other shards make."""
    plan, own = job.plan, job.items
    return plan.without(own.numbers) if isinstance(plan, RowItems) and isinstance(own, RowItems) else others(job)


def finder(items: Sequence[Item]) -> Callable[[str], bool]:
    """What tells of a name whether one of ``items`` has it."""
    if isinstance(items, RowItems):
        return lambda name: items.find(name) is not None
    return {item.name for item in items}.__contains__


def check_grows(job: Job, folder: TarFolder) -> None:
    """UsageError where the rows are not those of the folder's plan, or more behind them."""
    for number, (before, now) in enumerate(zip(RowPlan(folder), Planned(job), strict=False)):
        if row_settings(before) != row_settings(now) or before["name"] != now["name"]:
            where = job.plan.file.where(number) if isinstance(job.plan, RowItems) else f"row {number}"
            raise UsageError(
                f"{where}: output folder {folder.path} has another row at this place, {before['name']!r}, and a plan "
                "in shards can only grow at its end; choose another folder with --out, or replace what is there with "
                "--overwrite"
            )


@dataclass(frozen=True)
class RowPictures(Product):
    """A picture for each row, with what a folder has besides; ``npz`` is one array in the order of the rows."""

    npz: NamedFile | None = None

    def check(self, job: Job) -> None:
        check_npz(job, self.npz)

    @contextmanager
    def claimed(self, job: Job, overwrite: bool, complete: bool) -> Iterator[None]:
        if overwrite:
            job.folder.clear((item.name for item in job.items), job.identity)
        with RowPlan(job.folder).claimed(Planned(job), finder(job.plan), job.record, complete):
            yield

    def missing(self, job: Job, items: Sequence[Item]) -> Sequence[Item]:
        if not isinstance(items, RowItems):
            return super().missing(job, items)
        if isinstance(job.folder, TarFolder):
            return self._missing_in_shards(job, job.folder, items)
        if not is_here(job.folder.path):
            return self._missing_by_plan(job, items)
        done = []
        # What is there is looked at, not what is asked for: a plan may have millions.
        for name, paths in job.folder.sidecars().items():
            number = items.find(name)
            if number is not None and self._is_done(job, items, number, name, paths):
                done.append(number)
        return items.without(done)

    def _is_done(self, job: Job, items: RowItems, number: int, name: str, paths: Sequence[File]) -> bool:
        try:
            return job.folder.is_done(name, self._settings(job, items.of(number)), paths)
        except UsageError as error:
            raise UsageError(f"{items.file.where(number)}: {error}") from None

    def _settings(self, job: Job, item: Item) -> dict[str, Any]:
        """What decides the picture of a row."""
        own = own_record(item, job.record["sampling"])
        return {**job.identity, **row_settings({**own, "seed": own[ROW]["seed"]})}

    def _left(self, job: Job, items: Sequence[Item]) -> Sequence[Item]:
        """Those of ``items`` that others have still to make."""
        if isinstance(job.folder, TarFolder) and isinstance(items, RowItems):
            return self._missing_in_shards(job, job.folder, items, begun=False)
        return self.missing(job, items)

    def _missing_in_shards(self, job: Job, folder: TarFolder, items: RowItems, begun: bool = True) -> RowItems:
        """As `missing`, by the plan: a shard is of its positions, so that the pictures in it need not be read."""
        names = list(folder.keys(begun))
        if names:
            check_grows(job, folder)
        numbers = (items.find(name) for name in names)
        return items.without([number for number in numbers if number is not None])

    def _missing_by_plan(self, job: Job, items: RowItems) -> RowItems:
        """As `missing`, by the plan that is there: so no sidecar has to be fetched from an object store."""
        there, done = job.folder.listed(), []
        for line in RowPlan(job.folder) if there else ():
            number = items.find(line["name"])
            if number is None or line["name"] not in there:
                continue
            made = {**job.identity, **row_settings(line)}
            difference = first_difference(made, self._settings(job, items.of(number)))
            if difference is not None:
                raise UsageError(
                    f"{items.file.where(number)}: {job.folder.picture(line['name'])} was made with {difference[0]} = "
                    f"{difference[1]}, this run has {difference[2]}; choose another folder with --out, or replace what "
                    "is there with --overwrite"
                )
            done.append(number)
        return items.without(done)

    def plan(self, job: Job) -> dict[str, Any]:
        told = {"rows": len(job.plan)}
        return {**told, "items": job.plan.file.label} if isinstance(job.plan, RowItems) else told

    def count(self, job: Job) -> int:
        if isinstance(job.folder, TarFolder):
            return job.folder.count()
        return sum(map(finder(job.plan), job.folder.sidecars()))

    def close(self, job: Job, made: int, seconds: float, reporter: Reporter) -> Ending:
        """What is left is of the folder's plan, which other runs may have extended."""
        folder, grid, plan = job.folder, job.run.config.output.grid, RowPlan(job.folder)
        version, left = plan.version, 0
        if job.shard.count > 1:
            left = len(self._left(job, _others(job)))
        more = self._left_of_others(job, plan) if len(plan) > len(job.plan) else 0
        if not left and not more:
            plan.finish(made, seconds, grid, version)
        sheet = folder.grid if grid and folder.grid.exists() else None
        if left or self.npz is None:
            return Ending(left + more, sheet)
        reporter.closing(f"writing {self.npz}")
        collect_npz(job, job.plan, self.npz)
        return Ending(left + more, sheet, self.npz)

    def _left_of_others(self, job: Job, plan: RowPlan) -> int:
        """How many rows are missing that only other job files have."""
        there, is_ours = job.folder.sidecars(), finder(job.plan)
        more = (line for line in plan if not is_ours(line["name"]))
        return sum(
            line["name"] not in there
            or not job.folder.is_done(line["name"], {**job.identity, **row_settings(line)}, there[line["name"]])
            for line in more
        )
