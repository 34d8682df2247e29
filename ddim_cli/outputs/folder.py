"""An output folder: where each seed's pair lies, what is done, the run manifest and the contact sheet."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim_cli.config.seeds import Seeds, format_seeds, parse_seeds
from ddim_cli.errors import UsageError
from ddim_cli.outputs.atomic import is_shared, locked, remove_leftovers, shared, write_atomically
from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
from ddim_cli.outputs.figures import shortened
from ddim_cli.outputs.jsontext import dump_json
from ddim_cli.outputs.picture import encode_png, read_own
from ddim_cli.outputs.sidecar import SCHEMA, first_difference, identity, utc_now

RUN_SCHEMA = "ddim-cli/run/1"
SEEDS_A_FOLDER = 1000
_NUMBERED = re.compile(r"(\d{6,})\.(json|png)", re.ASCII)
_STRIP = re.compile(r"(\d{6,})\.(x0|xt)\.png", re.ASCII)
_SUBFOLDER = re.compile(r"\d{6,}", re.ASCII)


@dataclass(frozen=True)
class OutputFolder:
    """``path`` may not exist yet; ``subdirs`` puts every 1,000 seeds into a folder named after the first.

    With ``fsync`` a file that is there survives a power cut. ``size`` is (height, width) of the pictures that are to
    come, where it is known, to be named where it is what differs.
    """

    path: Path
    subdirs: bool = False
    fsync: bool = False
    size: tuple[int, int] | None = None

    @property
    def manifest(self) -> Path:
        return self.path / "run.json"

    @property
    def grid(self) -> Path:
        return self.path / "grid.png"

    def _place(self, seed: int, subdirs: bool) -> Path:
        name = f"{seed:06d}.png"
        return self.path / f"{seed // SEEDS_A_FOLDER * SEEDS_A_FOLDER:06d}" / name if subdirs else self.path / name

    def picture(self, seed: int) -> Path:
        """Where the PNG of ``seed`` lies, in either layout, or belongs; its sidecar has the ending .json."""
        path, other = self._place(seed, self.subdirs), self._place(seed, not self.subdirs)
        found_elsewhere = other.with_suffix(".json").exists() and not path.with_suffix(".json").exists()
        return other if found_elsewhere else path

    def sidecar(self, seed: int) -> Path:
        return self.picture(seed).with_suffix(".json")

    def check_usable(self) -> None:
        """UsageError if the path is a file, or the folder cannot be made. Creates nothing.

        One that is there may be finished, and then needs not be written to: see `check_writable`.
        """
        there = self.path
        if "\0" in str(there):
            raise UsageError(f"output folder {str(there)!r}: a path cannot hold a null character")
        try:
            while not there.exists() and there != there.parent:
                there = there.parent
        except (OSError, ValueError) as error:
            raise UsageError(
                f"output folder {str(self.path)[:80]!r}: {getattr(error, 'strerror', None) or error}"
            ) from None
        if not there.is_dir():
            raise UsageError(f"output folder {self.path}: {there} is a file")
        if there != self.path:
            self._check_access(there)

    def check_writable(self) -> None:
        """UsageError if the folder is there, and nothing can be written into it."""
        if self.path.exists():
            self._check_access(self.path)

    def _check_access(self, there: Path) -> None:
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"output folder {self.path}: {there} cannot be written to")

    def create(self) -> None:
        """Make the folder. Raises UsageError if that cannot be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output folder {self.path}: cannot be made: {error.strerror}") from None

    def folders(self) -> Iterator[Path]:
        """The folder itself, then those of either thousand seeds that are there."""
        yield self.path
        try:
            with os.scandir(self.path) as entries:
                names = sorted(e.name for e in entries if _SUBFOLDER.fullmatch(e.name) and e.is_dir())
        except OSError:
            return
        yield from (self.path / name for name in names)

    def numbered(self, kind: str) -> dict[int, list[str]]:
        """The files NUMBER.``kind`` (``"png"`` or ``"json"``) where a pair of that seed can lie, by seed.

        Two for a seed that is there in either layout. Reads directories alone; of 50,000 files, in a tenth of a second.
        """
        found: dict[int, list[str]] = {}
        for folder in self.folders():
            try:
                names = os.listdir(folder)
            except OSError:
                continue
            first = None if folder == self.path else int(folder.name)
            for name in names:
                match = _NUMBERED.fullmatch(name)
                if match is None or match[2] != kind:
                    continue
                seed = int(match[1])
                here = first is None or seed // SEEDS_A_FOLDER * SEEDS_A_FOLDER == first
                if here and len(match[1]) == max(6, len(str(seed))):
                    found.setdefault(seed, []).append(f"{folder}/{name}")
        return dict(sorted(found.items()))

    def is_done(self, seed: int, settings: Mapping[str, Any]) -> bool:
        """Whether the sidecar parses and the PNG has the size it records.

        Raises:
            UsageError: if the pair was made with settings of another identity than ``settings``.
        """
        return self.is_pair(str(self.sidecar(seed)), settings)

    def is_pair(self, path: str, settings: Mapping[str, Any]) -> bool:
        """As `is_done`, of the sidecar ``path``."""
        sidecar = read_json(path)
        if sidecar is None:
            return False
        self.check_same(sidecar, settings, path)
        try:
            return os.stat(f"{path.removesuffix('.json')}.png").st_size == sidecar["image"]["bytes"]
        except (OSError, KeyError, TypeError):
            return False

    def check_same(self, found: Mapping[str, Any], settings: Mapping[str, Any], where: Path | str) -> None:
        """UsageError naming the first setting of ``found`` that would change the pictures."""
        difference = first_difference(identity(found), settings)
        if difference is not None:
            key, *values = difference
            before, now = (shortened(json.dumps(value), 70) for value in values)
            # All that a hash says of two sizes is that they are not the same.
            sizes = self._sizes(found) if key == "model.config_sha256" else None
            text = "images of {}, this run has {}".format(*sizes) if sizes else f"{key} = {before}, this run has {now}"
            raise UsageError(
                f"{where} was made with {text}; choose another folder with --out, or replace what is there with "
                "--overwrite"
            )

    def _sizes(self, found: Mapping[str, Any]) -> tuple[str, str] | None:
        """The size of the pictures that are there, by a sidecar or the first of run.json's, and of those to come.

        None where they are the same, or one is not known.
        """
        image = found.get("image")
        if image is None:
            image = next((sidecar.get("image") for path in self.pairs() if (sidecar := read_json(path))), None)
        if self.size is None or not isinstance(image, dict):
            return None
        height, width = self.size
        before, now = f"{image.get('width')} x {image.get('height')}", f"{width} x {height}"
        return None if before == now else (before, now)

    def missing(self, seeds: Sequence[int], settings: Mapping[str, Any]) -> Seeds:
        """Those of ``seeds`` that are not done, in order. Raises UsageError as `is_done`."""
        seeds, there = Seeds.of(seeds), self.numbered("json")

        def done(seed: int) -> bool:
            paths = there[seed]
            # There in either layout: `picture` knows which of them counts.
            return self.is_pair(paths[0], settings) if len(paths) == 1 else self.is_done(seed, settings)

        # What is there is looked at, not what is asked for: a plan may have millions.
        return seeds.without({seed for seed in there if seed in seeds and done(seed)})

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
        manifest = self.read_manifest()
        ours = manifest is not None and manifest.get("schema") == RUN_SCHEMA
        if ours and first_difference(identity(manifest), settings) is None:
            return
        first = next((path for path in self.pairs() if (read_json(path) or {}).get("schema") == SCHEMA), None)
        if ours and (first is not None or is_shared(self.manifest)):
            self.check_same(manifest, settings, self.manifest)
        elif first is not None:
            self.check_same(read_json(first) or {}, settings, first)

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
        for folder in self.folders():
            remove_leftovers(folder)
        if complete and self._is_planned(seeds, record):
            yield
            return
        with contextlib.ExitStack() as work:
            # Between reading and writing, no other process may add its seeds, or settings of its own.
            with locked(self.manifest):
                self.check_settings(identity(record))
                work.enter_context(shared(self.manifest))
                self._extend(seeds, record, complete)
            yield

    def _is_planned(self, seeds: Sequence[int], record: Mapping[str, Any]) -> bool:
        """Whether run.json has these seeds and settings already."""
        manifest = self.read_manifest() or {}
        same, planned = manifest.get("schema") == RUN_SCHEMA and identity(manifest) == identity(record), self.planned()
        return same and all(seed in planned for seed in seeds)

    def _extend(self, seeds: Sequence[int], record: Mapping[str, Any], complete: bool) -> None:
        before, planned = self.read_manifest() or {}, self.planned()
        if before.get("schema") == RUN_SCHEMA and identity(before) != identity(record):
            # Nothing came of it.
            before, planned = {}, ()
        if planned and planned != seeds:
            seeds = sorted({*seeds, *planned})
        manifest = {
            "schema": RUN_SCHEMA,
            "seeds": format_seeds(seeds),
            "images": len(seeds),
            "created": before.get("created") or utc_now(),
            **record,
        }
        if complete and "totals" in before and before.get("seeds") == manifest["seeds"]:
            manifest["totals"] = before["totals"]
        self._write_manifest(manifest)

    def finish(self, made: int, seconds: float, grid: bool, seeds: Sequence[int] | None = None) -> None:
        """Write the contact sheet, and the totals into run.json.

        Not where another process has extended the plan beyond the ``seeds`` that were found complete, nor where
        nothing was ``made`` and both are there already.
        """
        if not made and self._is_finished(grid):
            return
        with locked(self.manifest):
            manifest, planned = self.read_manifest() or {}, self.planned()
            if (seeds is not None and set(planned) != set(seeds)) or (not made and self._is_finished(grid)):
                return
            if grid:
                self.write_grid(planned)
            manifest["totals"] = {
                "finished": utc_now(),
                "images": len(planned),
                "images_by_last_process": made,
                "seconds": round(seconds, 3),
                "images_per_second": round(made / seconds, 3) if made and seconds > 0 else None,
            }
            self._write_manifest(manifest)

    def _is_finished(self, grid: bool) -> bool:
        """Whether the totals are there, and the contact sheet if one is wanted."""
        return "totals" in (self.read_manifest() or {}) and (self.grid.exists() or not grid)

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_atomically(self.manifest, (dump_json(manifest) + "\n").encode(), self.fsync)

    def write_grid(self, seeds: Sequence[int]) -> None:
        images = [read_own(self.picture(seed)) for seed in seeds[:MOST_IMAGES]]
        write_atomically(self.grid, encode_png(contact_sheet(images)), self.fsync)

    def pairs(self) -> Iterator[Path]:
        """The sidecars of the folder, in either layout, in the order of their seeds."""
        for paths in self.numbered("json").values():
            yield from map(Path, paths)

    def unnumbered_pairs(self) -> Iterator[Path]:
        """The sidecars of the folder that are of no seed: of frames, reconstructions, and pictures from latents."""
        try:
            names = sorted(name for name in os.listdir(self.path) if name.endswith(".json"))
        except OSError:
            return
        for name in names:
            path = self.path / name
            ours = not _NUMBERED.fullmatch(name) and (read_json(path) or {}).get("schema") == SCHEMA
            if ours and not name.startswith("."):
                yield path

    def strips(self) -> list[tuple[int, str, Path]]:
        """(seed, "x0" or "xt", file) of the strips of ddim trajectory in the folder, in the order of their names."""
        try:
            names = sorted(os.listdir(self.path))
        except OSError:
            return []
        return [(int(m[1]), m[2], self.path / name) for name in names if (m := _STRIP.fullmatch(name))]

    def remove(self, seeds: Iterable[int]) -> None:
        """Remove the pairs of ``seeds``."""
        for seed in seeds:
            self.sidecar(seed).unlink(missing_ok=True)
            self.picture(seed).unlink(missing_ok=True)

    def clear(self, seeds: Iterable[int], settings: Mapping[str, Any]) -> None:
        """Remove the pairs of ``seeds``, and every pair and manifest of ours with other settings: ``--overwrite``.

        Raises:
            UsageError: while a process is making pictures of other settings here.
        """
        manifest = self.read_manifest()
        if manifest is not None and identity(manifest) != settings and is_shared(self.manifest):
            raise UsageError(
                f"output folder {self.path}: a process is making pictures of other settings here; wait for it, or "
                "choose another folder with --out"
            )
        self.remove(seeds)
        for path in self.pairs():
            # Another rank may be replacing it with a picture of the new settings.
            with locked(path):
                sidecar = read_json(path) or {}
                ours = sidecar.get("schema") == SCHEMA
                if ours and first_difference(identity(sidecar), settings) is not None:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".png").unlink(missing_ok=True)
        with locked(self.manifest):
            manifest = self.read_manifest()
            if manifest is not None and first_difference(identity(manifest), settings) is not None:
                self.manifest.unlink(missing_ok=True)
                self.grid.unlink(missing_ok=True)


def read_json(path: Path | str) -> dict[str, Any] | None:
    """A JSON object from a file; None where there is none."""
    try:
        with open(path, "rb") as stream:
            found = json.loads(stream.read())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
