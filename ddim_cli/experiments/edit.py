"""Pictures edited by inversion: up the grid as what they show, down it as what they are to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddim_cli.config.layers import Settings, layers_of
from ddim_cli.diffusion.solvers import solver_of
from ddim_cli.errors import UsageError
from ddim_cli.experiments.edits import Edits, resolve_edits
from ddim_cli.experiments.invert import drawn, reconstruction_error
from ddim_cli.outputs.atomic import write_atomically
from ddim_cli.outputs.contact_sheet import SMALLEST_TILE
from ddim_cli.outputs.figures import quoted
from ddim_cli.outputs.files import here
from ddim_cli.outputs.picture import encode_png, read_own
from ddim_cli.outputs.provenance import shows_strip, strip_inside
from ddim_cli.outputs.sidecar import describe_strip, to_text
from ddim_cli.outputs.store import read_json
from ddim_cli.outputs.strip import Row, draw_strip
from ddim_cli.sampling.executor import Summary, execute
from ddim_cli.sampling.items import Inversion, Item
from ddim_cli.sampling.job import Job, make_job
from ddim_cli.sampling.loop import Picture
from ddim_cli.sampling.pictures import read_input
from ddim_cli.sampling.plan import Shard
from ddim_cli.sampling.product import Ending, Product
from ddim_cli.sampling.reporter import Reporter
from ddim_cli.sampling.resolve import Run

# Of the sheet: pictures below each other, its width in pixels, and from which width on there is room for all it says.
MOST_SHOWN, WIDEST, WIDE_ENOUGH = 16, 4400, 570


@dataclass(frozen=True)
class EditedPicture:
    """One picture and what was made of it, in the order of the plan.

    ``error`` is the mean squared difference of ``reconstruction`` to it (see `invert.reconstruction_error`), NaN where
    it is not known.
    """

    picture: Path
    reconstruction: Path
    error: float
    edits: tuple[Path, ...]


@dataclass(frozen=True)
class EditedPictures(Product):
    """A reconstruction of each picture, its edits, and a sheet of all of them."""

    edits: Edits
    keeps_x0 = True

    def check(self, job: Job) -> None:
        """Raise UsageError if a picture lies where another's, or the sheet, is to be written.

        Raises ConfigError for settings that allow no inversion.
        """
        config = job.run.config
        grid = job.run.timesteps[self.edits.begin :]
        solver_of(config.sampling, inverse=True).table(config.scheduler, config.sampling, grid)
        sheet = sheet_path(job)
        if sheet.exists() and "edited" not in (strip_inside(sheet) or {}).get("strip", {}):
            raise UsageError(
                f"{sheet}: is no sheet of ddim edit, and would be replaced; choose another folder with --out"
            )
        written = {here(job.folder.picture(item.name)).resolve() for item in job.plan}
        for picture in self.edits.pictures:
            if picture.path.resolve() in written:
                raise UsageError(f"{picture.path}: would be replaced by an edit; choose another folder with --out")

    def save(self, job: Job, picture: Picture) -> None:
        item, told = picture.item, {}
        assert isinstance(item.start, Inversion)
        assert picture.x0 is not None
        if item.conditioning == item.start.conditioning:
            error = reconstruction_error(item.start.state(job.run.model.shape), picture.x0)
            told["error"] = float(f"{error:.6g}")
        if picture.residual is not None:
            told["residual"] = float(f"{picture.residual:.6g}")
        self.save_pair(job, picture, **({"reconstruction": told} if told else {}))

    def plan(self, job: Job) -> dict[str, Any]:
        return {"pictures": [str(picture.path) for picture in self.edits.pictures]}

    def draw(self, job: Job, made: int, reporter: Reporter) -> Ending:
        sheet = sheet_path(job)
        if made or not shows_strip(sheet, self._facts(), job.identity):
            reporter.closing(f"drawing {sheet.name}")
            self._draw(job, sheet)
        return Ending(0, sheet)

    def by_picture(self, job: Job) -> list[list[Item]]:
        """The items of each picture: its reconstruction, then its edits."""
        count = len(self.edits.pictures)
        return [list(job.plan[n::count]) for n in range(count)]

    def _facts(self) -> dict[str, Any]:
        """What the sheet says of itself."""
        shown = [{"file": p.path.name, "pixels_sha256": p.pixels_sha256} for p in self.edits.pictures[:MOST_SHOWN]]
        return {
            "edited": shown,
            "from": self.edits.source.to,
            "to": [{"to": edit.to, "guidance_scale": edit.scale} for edit in self.edits.edits],
        }

    def _draw(self, job: Job, sheet: Path) -> None:
        """A row a picture: the original as the network takes it, its reconstruction, its edits. Raises OSError."""
        scales = {edit.scale for edit in self.edits.edits}
        to = [f"{edit.to}, {edit.scale:g}" if len(scales) > 1 else edit.to for edit in self.edits.edits]
        rows = []
        for n, items in enumerate(self.by_picture(job)[:MOST_SHOWN]):
            original = drawn(read_input(self.edits.pictures[n].path, job.run.model.shape)[1])
            pictures = [read_own(job.folder.picture(item.name)) for item in items]
            labels = [self.edits.pictures[n].name, f"error {error_of(job, items[0]):.2g}", *to]
            rows.append(Row([original, *pictures], labels))
        settings, name = job.run.config.sampling, job.run.model.name
        about = [name, f"{len(job.run.timesteps)} steps"]
        about += [f"strength {settings.strength:g}"] if settings.strength is not None else []
        about += [f"guidance {max(scales):g}"] if len(scales) == 1 else []
        source = f"from {quoted(self.edits.source.to, 40)}"
        caption = f"original, reconstruction, edits {source} ({', '.join(about)})"
        wide = len(rows[0].images) * max(SMALLEST_TILE, rows[0].images[0].width) >= WIDE_ENOUGH
        strip = draw_strip(rows, caption if wide else source, widest=WIDEST)
        described = describe_strip(job.record, None, self._facts(), np.asarray(strip))
        write_atomically(sheet, encode_png(strip, to_text(described)), job.folder.fsync)


@dataclass(frozen=True)
class Edited:
    """What was done: pictures made now, ``present`` ones that were there, and the files of all, picture by picture.

    ``left`` are for other shards to make; until they are there, ``sheet`` is None.
    """

    made: int
    present: int
    left: int
    seconds: float
    folder: Path
    pictures: tuple[EditedPicture, ...]
    sheet: Path | None

    @classmethod
    def of(cls, job: Job, product: EditedPictures, summary: Summary) -> Edited:
        pictures = []
        for read, (reconstruction, *edits) in zip(product.edits.pictures, product.by_picture(job), strict=True):
            made = tuple(here(job.folder.picture(item.name)) for item in edits)
            error = error_of(job, reconstruction)
            remade = here(job.folder.picture(reconstruction.name))
            pictures.append(EditedPicture(read.path, remade, error, made))
        return cls(
            summary.made,
            summary.present,
            summary.left,
            summary.seconds,
            here(job.folder.path),
            tuple(pictures),
            None if summary.sheet is None else here(summary.sheet),
        )


def prepare(run: Run, edits: Edits, shard: Shard = Shard()) -> tuple[Job, EditedPictures]:
    """The job of edits, whose run is of `edits.resolve_edits`, and its product."""
    return make_job(run, edits.items(run), shard, edits.ending(), passes=2), EditedPictures(edits)


def edit(
    pictures: Sequence[str | Path],
    source: str | None = None,
    to: str | Sequence[str] = (),
    config: Settings = None,
    model: str | Path | None = None,
    out: str | Path | None = None,
    guidance_scales: Sequence[float] = (),
    keep_mask: str | Path | None = None,
    overwrite: bool = False,
) -> Edited:
    """Edit pictures by inversion, as ``ddim edit`` does.

    Args:
        pictures: files, or folders of them.
        source: what they show, as ``--from`` takes it: a prompt, or the number of a class.
        to: what they are to show: one prompt or class, or several.
        config: settings, as `sample` takes them; ``sampling.strength`` is how far up the grid pictures are inverted,
            ``sampling.mask`` what of them is edited.
        model: a source, as ``--model`` takes it, in place of the config's.
        out: the folder of what is made, in place of the config's or the default.
        guidance_scales: make each edit at each of these, in place of the config's one.
        keep_mask: what is white in this picture is kept.
        overwrite: replace what is in the folder.

    Raises:
        DdimError: (an ordinary exception with a sentence) for pictures that cannot be read, settings that cannot work,
            a model that cannot be loaded, a folder that cannot be used, and a run that fails.
    """
    wanted = [to] if isinstance(to, str) else list(to)
    paths = [Path(pictures)] if isinstance(pictures, (str, Path)) else [Path(path) for path in pictures]
    kept = None if keep_mask is None else str(keep_mask)
    run, edits, _ = resolve_edits(layers_of(config, model, out), paths, source, wanted, guidance_scales, kept)
    job, product = prepare(run, edits)
    return Edited.of(job, product, execute(job, product, overwrite=overwrite))


def sheet_path(job: Job) -> Path:
    return here(job.folder.path) / "edited.png"


def error_of(job: Job, item: Item) -> float:
    """That of a reconstruction, as its sidecar has it; NaN where there is none."""
    told = (read_json(job.folder.sidecar(item.name)) or {}).get("reconstruction")
    error = told.get("error") if isinstance(told, dict) else None
    return float(error) if isinstance(error, (int, float)) else float("nan")
