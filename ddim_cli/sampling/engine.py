"""A sampler for engines that hand out rows: Ray Data's ``map_batches``, and what else calls an object with batches."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim_cli.config.columns import LABEL, columns_of, told_by
from ddim_cli.config.job_file import job_of
from ddim_cli.config.layers import Settings, layers_of
from ddim_cli.errors import UsageError

if TYPE_CHECKING:
    from ddim_cli.sampling.opened import OpenRun
    from ddim_cli.sampling.resolve import Run

# The columns that a batch comes back with.
MADE = ("image", "record", "pixels_sha256")
# What "auto" is at most: the batches that come are not known, and what they lack is padded.
MOST_ROWS = 64
_PLACE = re.compile(rf"{LABEL}\[\d+\]")


class Sampler:
    """Makes the pictures of rows, a batch of them a call; each process loads the network once, in its first call.

    It is cheap to make and to send to another process: before the first call it holds settings alone, and of those that
    come after it a copy holds no more. To be called by one thread at a time.

    Args:
        config: a `Config`, a nested mapping such as ``{"sampling": {"steps": 20}}``, a TOML file, which is read here,
            or None for the defaults.
        model: what to sample from in place of ``config``'s [model]: a source, as ``--model`` takes it. Each process
            looks for it where it runs.

    Raises:
        UsageError: for a config or a model of another type.
        ConfigError: for settings that are unknown or wrong.
    """

    def __init__(self, config: Settings = None, model: str | Path | None = None):
        if model is not None and not isinstance(model, (str, Path)):
            raise UsageError(
                f"Sampler: model is a {type(model).__name__}; it must be a source, as --model takes it, since each "
                "process loads the network for itself"
            )
        self._layers = layers_of(config, model)
        self._begin()

    def _begin(self) -> None:
        self._run: Run | None = None
        self._opened: OpenRun | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # The sweep of a file is none of ours, and holds what cannot be sent.
        return {"layers": [replace(layer, sweep=None) for layer in self._layers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers = state["layers"]
        self._begin()

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Make the picture of each row of a batch.

        Args:
            batch: columns of equal length, numpy arrays or lists, by their names: a mapping, a pandas DataFrame, or a
                pyarrow table. Those called ``name``, ``seed``, ``prompt``, ``negative_prompt``, ``class``, ``latent``,
                ``init``, ``mask`` and ``strength`` mean what these keys mean in a job file; None, NaN and an empty text
                say nothing. ``latent`` may also be the latent itself, floats [C, H, W]. A row needs a seed, or a name
                or a latent in its place.

        Returns:
            the columns, their rows in the same order, and besides ``image``, uint8 [N, H, W, C]; ``record``, the text
            that a PNG of ``ddim sample`` has inside; ``pixels_sha256`` of the picture's bytes.

        A picture depends on its row and the settings alone, not on the rows beside it: the network is always given
        ``sampling.batch_size`` rows, the last of which may be padding; "auto" is what memory allows, and 64 at most.

        Raises:
            DdimError: (an ordinary exception with a sentence) for rows, settings or a model that cannot work.
        """
        columns = columns_of(batch)
        taken = next((name for name in MADE if name in columns.of), None)
        if taken is not None:
            raise UsageError(f"{LABEL}: has a column {taken}, where what is made is to go; give it another name")
        images, records, hashes = self._made(*told_by(columns, self._settled().config.sampling.seed))
        made = (images, _texts(records), _texts(hashes))
        return {**columns.of, **dict(zip(MADE, made, strict=True))}

    def _settled(self) -> Run:
        from ddim_cli.sampling.resolve import resolve, without_refinement

        if self._run is None:
            self._run = without_refinement(resolve(self._layers, conditions_follow=True))
        return self._run

    def _made(
        self, rows: list[dict[str, Any]], latents: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """The pictures of rows, uint8 [N, H, W, C], what is recorded of each, and the hashes of their pixels."""
        from ddim_cli.outputs.sidecar import to_text
        from ddim_cli.sampling.rows import items_of, nothing_to_lead_away_from

        run = self._settled()
        channels, height, width = run.model.shape
        images = np.empty((len(rows), height, width, channels), np.uint8)
        records: list[str] = []
        hashes: list[str] = []
        if not rows:
            return images, records, hashes
        job = job_of(rows, label=LABEL)
        items = items_of(job, run, latents=latents)
        self._warn([*run.warnings, *nothing_to_lead_away_from(job, run.config.sampling.guidance_scale)])
        opened = self._open(run)
        for pictures in opened.batches(items):
            for picture in pictures:
                described = opened.describe(picture)
                images[len(records)] = picture.pixels
                records.append(to_text(described))
                hashes.append(described["image"]["pixels_sha256"])
        self._warn(opened.warned)
        opened.warned.clear()
        return images, records, hashes

    def _open(self, run: Run) -> OpenRun:
        """The run of rows, with its network loaded."""
        if self._opened is None:
            from ddim_cli.models.device import choose_device, choose_dtype
            from ddim_cli.sampling.opened import open_run
            from ddim_cli.sampling.rows import run_of_rows

            device = choose_device(run.config.runtime.device)
            dtype = choose_dtype(run.config.runtime.dtype, device)
            asked = run.config.sampling.batch_size
            # How many rows there will be is not known, so nothing is compiled for them; what is kept is taken.
            most, images = MOST_ROWS if asked == "auto" else asked, 0
            self._opened = open_run(run_of_rows(run), device, dtype, most, images, keeps_x0=False)
        return self._opened

    def _warn(self, texts: Iterable[str]) -> None:
        """Warn of each once, and not with every batch that it is true of."""
        for text in texts:
            what = _PLACE.sub("", text)
            if what not in self._warned:
                self._warned.add(what)
                warnings.warn(text, stacklevel=4)


def _texts(values: list[str]) -> np.ndarray:
    """As a column."""
    column = np.empty(len(values), object)
    column[:] = values
    return column
