"""An output folder: where each seed's pair lies, what is done, the run manifest and the contact sheet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ddim_cli.config.seeds import Seeds, format_seeds, parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import is_shared, locked, shared, write_atomically
from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
from ddim_cli.outputs.files import File, Member, Place, is_here, members_in
from ddim_cli.outputs.jsontext import dump_json
from ddim_cli.outputs.open_shard import remove_shard, shards_in
from ddim_cli.outputs.picture import Encoding, encode_png, read_own
from ddim_cli.outputs.sidecar import SCHEMA, identity, is_row, run_identity, utc_now
from ddim_cli.outputs.store import Name, PairFolder, read_json, remove_pair

RUN_SCHEMA = "ddim-cli/run/1"


@dataclass(frozen=True)
class OutputFolder(PairFolder):
    """A folder of pairs with a run.json: which seeds belong there, and with which settings they are made."""

    @property
    def manifest(self) -> Place:
        return self.path / "run.json"

    @property
    def grid(self) -> Place:
        return self.path / "grid.png"

    @property
    def layout(self) -> tuple[str, int | None]:
        """output.format, and of "tar" how many pictures a shard has."""
        return "files", None

    def _coding_there(self) -> Encoding | None:
        manifest = self.read_manifest() or {}
        return Encoding.told_by(manifest) if manifest.get("schema") == RUN_SCHEMA else super()._coding_there()

    @property
    def output(self) -> dict[str, Any]:
        """What run.json says of how the pictures are encoded; nothing of PNGs."""
        return {"output": settings} if (settings := self.coding.settings) else {}

    def difference(
        self,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = identity,
    ) -> tuple[str, Any, Any] | None:
        found = super().difference(record, settings, of)
        if found is not None or record.get("schema") != RUN_SCHEMA:
            return found
        return _laid_out_apart(layout_of(record), self.layout)

    def is_planned_by(self, manifest: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
        """Whether a run.json is of a run with the settings of ``record``, whose pictures are encoded as here."""
        return (
            manifest is not None
            and manifest.get("schema") == RUN_SCHEMA
            and self.difference(manifest, identity(record)) is None
        )

    def missing(self, seeds: Sequence[int], settings: Mapping[str, Any]) -> Seeds:
        """Those of ``seeds`` that are not done, in order. Raises UsageError as `is_done`."""
        seeds = Seeds.of(seeds)
        if not seeds:
            return seeds
        if not is_here(self.path):
            # run.json tells of the settings: so nothing has to be fetched.
            numbers = {int(name) for name in self.listed() if name.isdecimal()}
            return seeds.without({seed for seed in numbers if seed in seeds})
        there = self.numbered("json")
        # What is there is looked at, not what is asked for: a plan may have millions.
        return seeds.without({s for s, paths in there.items() if s in seeds and self.is_done(s, settings, paths)})

    def left(self, seeds: Sequence[int], settings: Mapping[str, Any]) -> Seeds:
        """Those of ``seeds`` that others have still to make. Raises as `missing`."""
        return self.missing(seeds, settings)

    @property
    def items(self) -> Place:
        """The plan of a job file's rows; see `row_plan`."""
        return self.path / "items.jsonl"

    def read_manifest(self) -> dict[str, Any] | None:
        return read_json(self.manifest)

    def planned(self) -> Seeds:
        """The seeds that run.json names; where it is lost, those of the sidecars that are there."""
        try:
            return parse_seeds((self.read_manifest() or {})["seeds"])
        except (KeyError, ValueError, AttributeError):
            return Seeds.of(self.numbered("json"))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """UsageError if the folder holds pictures of other settings: as run.json says, or the first sidecar.

        A run.json without pictures binds nobody, unless a process is at work on them.
        """
        manifest = self.read_manifest() or {}
        ours = manifest.get("schema") == RUN_SCHEMA
        if ours and self.difference(manifest, settings) is None:
            return
        first = self._first_there()
        if not ours and first is not None and isinstance(first, Member) != (self.layout[0] == "tar"):
            what = "tar shards" if isinstance(first, Member) else "files"
            raise UsageError(
                f"output folder {self.path}: holds pictures in {what}; choose another folder with --out, or replace "
                "what is there with --overwrite"
            )
        if ours and (first is not None or is_shared(self.manifest)):
            self.check_same(manifest, settings, self.manifest)
        elif first is not None:
            self.check_same(read_json(first) or {}, settings, first, run_identity)

    def _first_there(self) -> File | None:
        """The first sidecar of a picture that a run.json can name, in files or in shards; None where there is none."""
        there = chain(self._of_plans(), members_in(self.path, "json"))
        return next((path for path in there if (read_json(path) or {}).get("schema") == SCHEMA), None)

    def _of_plans(self) -> Iterator[File]:
        """The sidecars of pictures that a run.json can name: those of seeds and of rows."""
        yield from self.pairs()
        if self.items.exists():
            # Many may be there that belong to no plan: it has to be worth the reading.
            yield from (path for path in self.unnumbered_pairs() if is_row(read_json(path) or {}))

    def start(self, seeds: Sequence[int], record: Mapping[str, Any], complete: bool) -> None:
        """As `claimed`, for a moment."""
        with self.claimed(seeds, record, complete):
            pass

    @contextlib.contextmanager
    def claimed(self, seeds: Sequence[int], record: Mapping[str, Any], complete: bool) -> Iterator[None]:
        """Write run.json: the seeds of this plan and of the plans before it, and the settings.

        For as long as the block runs, no process with other settings may do so. Where nothing is to be made
        (``complete``) totals that stand there are kept, and a run.json that has the seeds stays as it is. What
        processes left behind that were killed here is removed.

        Raises:
            UsageError: if the folder holds pictures of other settings, or another process is about to make some.
        """
        self.remove_leftovers()
        if complete and self._is_planned(seeds, record):
            yield
            return
        with self.held(record, lambda: self._extend(seeds, record, complete)):
            yield

    @contextlib.contextmanager
    def held(self, record: Mapping[str, Any], extend: Callable[[], None]) -> Iterator[None]:
        """For as long as the block runs, no process with other settings may plan here; ``extend`` writes the plan.

        Raises UsageError as `claimed`.
        """
        with contextlib.ExitStack() as work:
            # Between reading and writing, no other process may add its pictures, or settings of its own.
            with locked(self.manifest):
                self.check_settings(identity(record))
                work.enter_context(shared(self.manifest))
                extend()
            yield

    def _is_planned(self, seeds: Sequence[int], record: Mapping[str, Any]) -> bool:
        """Whether run.json has these seeds and settings already."""
        same, planned = self.is_planned_by(self.read_manifest(), record), self.planned()
        return same and (planned == seeds or all(seed in planned for seed in seeds))

    def check_plan(self, seeds: Sequence[int]) -> None:
        """UsageError for seeds that the folder's plan cannot be extended by; of files there are none."""

    def merged(self, planned: Seeds, seeds: Sequence[int]) -> Sequence[int]:
        """The plan of those ``planned`` before and these ``seeds``."""
        return sorted({*seeds, *planned}) if planned and planned != seeds else seeds

    def seeds_text(self, seeds: Sequence[int]) -> str:
        """The seeds as run.json has them."""
        return format_seeds(seeds)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within the block pictures are written."""
        yield

    def _extend(self, seeds: Sequence[int], record: Mapping[str, Any], complete: bool) -> None:
        before, planned = self.read_manifest() or {}, self.planned()
        if before.get("schema") == RUN_SCHEMA and not self.is_planned_by(before, record):
            # Nothing came of it.
            before, planned = {}, Seeds(())
        seeds = self.merged(planned, seeds)
        manifest = {
            "schema": RUN_SCHEMA,
            "seeds": self.seeds_text(seeds),
            "images": len(seeds),
            "created": before.get("created") or utc_now(),
            **record,
            **self.output,
        }
        if complete and "totals" in before and before.get("seeds") == manifest["seeds"]:
            manifest["totals"] = before["totals"]
        self.write_manifest(manifest)

    def finish(self, made: int, seconds: float, grid: bool, seeds: Sequence[int] | None = None) -> None:
        """Write the contact sheet, and the totals into run.json.

        Not where another process has extended the plan beyond the ``seeds`` that were found complete, nor where
        nothing was ``made`` and both are there already.
        """
        if not made and self.is_finished(grid):
            return
        with locked(self.manifest):
            planned = self.planned()
            extended = seeds is not None and planned != seeds and set(planned) != set(seeds)
            if extended or (not made and self.is_finished(grid)):
                return
            self.write_totals(made, seconds, len(planned), planned if grid else None)

    def is_finished(self, grid: bool) -> bool:
        """Whether the totals are there, and the contact sheet if one is wanted."""
        return "totals" in (self.read_manifest() or {}) and (self.grid.exists() or not grid)

    def write_totals(self, made: int, seconds: float, images: int, sheet: Sequence[Name] | None) -> None:
        """Write the contact sheet of the pictures ``sheet``, if it is wanted, and the totals into run.json."""
        if sheet is not None:
            self.write_grid(sheet)
        manifest = self.read_manifest() or {}
        manifest["totals"] = {
            "finished": utc_now(),
            "images": images,
            "images_by_last_process": made,
            "seconds": round(seconds, 3),
            "images_per_second": round(made / seconds, 3) if made and seconds > 0 else None,
        }
        self.write_manifest(manifest)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.manifest, (dump_json(manifest) + "\n").encode(), self.fsync)

    def write_grid(self, names: Sequence[Name]) -> None:
        """Write grid.png: the first of these pictures. Raises OSError, and RunError for a damaged picture."""
        images = [read_own(self.picture(name)) for name in names[:MOST_IMAGES]]
        write_atomically(self.grid, encode_png(contact_sheet(images)), self.fsync)

    def clear(self, names: Iterable[Name], settings: Mapping[str, Any]) -> None:
        """Remove the pairs of ``names``, and every pair and manifest of ours with other settings: ``--overwrite``.

        Raises:
            UsageError: while a process is making pictures of other settings here.
        """
        manifest = self.read_manifest()
        ours = manifest is not None and manifest.get("schema") == RUN_SCHEMA
        apart = manifest is not None and self.difference(manifest, settings) is not None
        if apart and is_shared(self.manifest):
            raise UsageError(
                f"output folder {self.path}: a process is making pictures of other settings here; wait for it, or "
                "choose another folder with --out"
            )
        if apart or not ours:
            for number in shards_in(self.path):
                remove_shard(self.path, number)
        self.remove_pairs(names, settings, manifest if ours else None)
        with locked(self.manifest):
            manifest = self.read_manifest()
            if manifest is not None and self.difference(manifest, settings) is not None:
                self.manifest.unlink(missing_ok=True)
                self.grid.unlink(missing_ok=True)
                self.items.unlink(missing_ok=True)

    def remove_pairs(
        self, names: Iterable[Name], settings: Mapping[str, Any], manifest: Mapping[str, Any] | None
    ) -> None:
        """Remove the pairs of ``names``, and those of other settings; all, where ``manifest`` is of shards."""
        # What a run of another encoding left half made, and without a sidecar that tells.
        before = [Encoding.told_by(manifest)] if manifest is not None else []
        for name in names:
            self.remove(name, *before)
        all_of_them = self.layout[0] != "files"
        for path in self._of_plans():
            assert not isinstance(path, Member)
            # Another rank may be replacing it with a picture of the new settings.
            with locked(path):
                sidecar = read_json(path) or {}
                ours = sidecar.get("schema") == SCHEMA
                if ours and (all_of_them or self.difference(sidecar, settings, run_identity) is not None):
                    remove_pair(path)


def layout_of(manifest: Mapping[str, Any]) -> tuple[str, int | None]:
    """How a run.json says that pictures are laid out: see `OutputFolder.layout`."""
    told = manifest.get("output")
    if not isinstance(told, Mapping) or told.get("format") != "tar":
        return "files", None
    size = told.get("shard_size")
    return "tar", size if type(size) is int and size > 0 else None


def _laid_out_apart(before: tuple[str, int | None], now: tuple[str, int | None]) -> tuple[str, Any, Any] | None:
    """As `first_difference`, of two layouts."""
    if before == now:
        return None
    if before[0] != now[0]:
        return "output.format", before[0], now[0]
    return "output.shard_size", before[1], now[1]
