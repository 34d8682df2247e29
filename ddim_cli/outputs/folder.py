"""An output folder: where each seed's pair lies, what is done, the run manifest and the contact sheet."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ddim_cli.config.seeds import format_seeds, parse_seeds
from ddim_cli.errors import RunError, UsageError
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.contact_sheet import MOST_IMAGES, contact_sheet
from ddim_cli.outputs.jsontext import dump_json
from ddim_cli.outputs.picture import encode_png
from ddim_cli.outputs.sidecar import SCHEMA, first_difference, identity, utc_now

RUN_SCHEMA = "ddim-cli/run/1"
SEEDS_A_FOLDER = 1000
_SIDECAR = re.compile(r"\d{6,}\.json")


@dataclass(frozen=True)
class OutputFolder:
    """``path`` may not exist yet; ``subdirs`` puts every 1,000 seeds into a folder named after the first."""

    path: Path
    subdirs: bool = False

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
        """UsageError if the path is a file, or nothing can be written there. Creates nothing."""
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
        if not os.access(there, os.W_OK | os.X_OK):
            raise UsageError(f"output folder {self.path}: {there} cannot be written to")

    def create(self) -> None:
        """Make the folder. Raises UsageError if that cannot be done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"output folder {self.path}: cannot be made: {error.strerror}") from None

    def is_done(self, seed: int, settings: Mapping[str, Any]) -> bool:
        """Whether the sidecar parses and the PNG has the size it records.

        Raises:
            UsageError: if the pair was made with settings of another identity than ``settings``.
        """
        picture = self.picture(seed)
        sidecar = _read_json(picture.with_suffix(".json"))
        if sidecar is None:
            return False
        self.check_same(sidecar, settings, picture.with_suffix(".json"))
        try:
            return picture.stat().st_size == sidecar["image"]["bytes"]
        except (OSError, KeyError, TypeError):
            return False

    def check_same(self, found: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> None:
        """UsageError naming the first setting of ``found`` that would change the pictures."""
        difference = first_difference(identity(found), settings)
        if difference is not None:
            key, before, now = difference
            raise UsageError(
                f"{where} was made with {key} = {_short(before)}, this run has {_short(now)}; "
                "choose another folder with --out, or replace what is there with --overwrite"
            )

    def missing(self, seeds: Iterable[int], settings: Mapping[str, Any]) -> list[int]:
        """Those of ``seeds`` that are not done, in order. Raises UsageError as `is_done`."""
        return [seed for seed in seeds if not self.is_done(seed, settings)]

    def read_manifest(self) -> dict[str, Any] | None:
        return _read_json(self.manifest)

    def planned(self) -> tuple[int, ...]:
        """The seeds that run.json names; where it is lost, those of the sidecars that are there."""
        try:
            return parse_seeds((self.read_manifest() or {})["seeds"])
        except (KeyError, ValueError, AttributeError):
            return tuple(sorted({int(path.stem) for path in self.pairs()}))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """UsageError if the folder holds pictures of other settings: as run.json says, or the first sidecar."""
        first = next((path for path in self.pairs() if (_read_json(path) or {}).get("schema") == SCHEMA), None)
        if first is None:
            return
        manifest = self.read_manifest()
        if manifest is not None and manifest.get("schema") == RUN_SCHEMA:
            self.check_same(manifest, settings, self.manifest)
        else:
            self.check_same(_read_json(first) or {}, settings, first)

    def start(self, seeds: Sequence[int], record: Mapping[str, Any], complete: bool) -> None:
        """Write run.json: the seeds of this plan and of the plans before it, and the settings.

        Totals that stand there are kept where nothing is to be made (``complete``).
        """
        before = self.read_manifest() or {}
        seeds = sorted({*seeds, *self.planned()})
        manifest = {
            "schema": RUN_SCHEMA,
            "seeds": format_seeds(seeds),
            "images": len(seeds),
            "created": before.get("created") or utc_now(),
            **record,
        }
        if complete and "totals" in before and before.get("seeds") == manifest["seeds"]:
            manifest["totals"] = before["totals"]
        write_atomically(self.manifest, (dump_json(manifest) + "\n").encode())

    def finish(self, made: int, seconds: float, grid: bool) -> None:
        """Write the contact sheet and the totals into run.json."""
        manifest = self.read_manifest() or {}
        seeds = self.planned()
        if grid:
            self.write_grid(seeds)
        manifest["totals"] = {
            "finished": utc_now(),
            "images": len(seeds),
            "images_by_last_process": made,
            "seconds": round(seconds, 3),
            "images_per_second": round(made / seconds, 3) if seconds > 0 else None,
        }
        write_atomically(self.manifest, (dump_json(manifest) + "\n").encode())

    def write_grid(self, seeds: Sequence[int]) -> None:
        images = []
        for seed in seeds[:MOST_IMAGES]:
            path = self.picture(seed)
            try:
                with Image.open(path) as image:
                    images.append(image.copy())
            except (OSError, SyntaxError, ValueError):
                raise RunError(
                    f"{path}: cannot be read as a picture; delete it, and the same command makes it again"
                ) from None
        write_atomically(self.grid, encode_png(contact_sheet(images)))

    def pairs(self) -> Iterator[Path]:
        """The sidecars of the folder, in either layout."""
        for pattern in ("*.json", "[0-9]*/*.json"):
            yield from (p for p in sorted(self.path.glob(pattern)) if _SIDECAR.fullmatch(p.name))

    def clear(self, seeds: Iterable[int], settings: Mapping[str, Any]) -> None:
        """Remove the pairs of ``seeds``, and every pair and manifest of ours with other settings: ``--overwrite``."""
        for seed in seeds:
            self.sidecar(seed).unlink(missing_ok=True)
            self.picture(seed).unlink(missing_ok=True)
        for path in list(self.pairs()):
            sidecar = _read_json(path) or {}
            ours = sidecar.get("schema") == SCHEMA
            if ours and first_difference(identity(sidecar), settings) is not None:
                path.unlink(missing_ok=True)
                path.with_suffix(".png").unlink(missing_ok=True)
        manifest = self.read_manifest()
        if manifest is not None and first_difference(identity(manifest), settings) is not None:
            self.manifest.unlink(missing_ok=True)
            self.grid.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
