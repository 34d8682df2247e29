"""Writer threads: PNG, then sidecar, while the next batch is denoised."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ddim_cli.errors import RunError
from ddim_cli.outputs.atomic import locked, write_atomically
from ddim_cli.outputs.folder import OutputFolder
from ddim_cli.outputs.picture import encode_png, to_image
from ddim_cli.outputs.sidecar import complete, describe_picture, identity, to_text

THREADS = 2
# Pictures that may wait for a thread: memory stays flat, and a slow disk slows the run instead.
QUEUE = 64


def write_pair(
    folder: OutputFolder,
    path: Path,
    described: Mapping[str, Any],
    pixels: np.ndarray,
    seconds: float,
    settings: Mapping[str, Any],
) -> None:
    """Write a picture, uint8 [H, W, C], to ``path`` in ``folder``, then its sidecar, unless the pair is there.

    ``described`` is what `describe_picture` says of it, ``settings`` its identity. Raises OSError, and UsageError for
    a pair of other settings.
    """
    png = encode_png(to_image(pixels), to_text(described))
    sidecar_path = path.with_suffix(".json")
    # Another process may be making the same picture, in batches of another size: a pair is of one of them.
    with locked(sidecar_path) as held:
        if folder.is_pair(str(sidecar_path), settings):
            return
        write_atomically(path, png, folder.fsync)
        # The sidecar last: its presence means that the pair is complete.
        sidecar = complete(described, path.name, len(png), seconds)
        held.write(to_text(sidecar).encode(), folder.fsync)


class PictureWriter:
    """Writes pictures of one folder in the background.

    ``record`` holds the sections that all sidecars share. After an error in a thread nothing more is
    written; it is raised by the next ``check``, ``write`` or ``close``.
    """

    def __init__(self, folder: OutputFolder, record: Mapping[str, Any]):
        self._folder = folder
        self._record = record
        self._settings = identity(record)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ddim-writer")
        self._free = threading.Semaphore(QUEUE)
        self._failure: BaseException | None = None

    def write(self, seed: int, pixels: np.ndarray, seconds: float, batch_size: int | None = None) -> None:
        """Queue a picture, uint8 [H, W, C], of a batch of ``batch_size`` rows (None: as many as the record says).

        Waits while the queue is full; raises RunError if a write failed.
        """
        self.check()
        self._free.acquire()
        self._pool.submit(self._write, seed, pixels, seconds, batch_size).add_done_callback(self._done)

    def close(self) -> None:
        """Wait until all that was queued is on disk. Raises RunError if a write failed."""
        self._pool.shutdown(wait=True)
        self.check()

    def _write(self, seed: int, pixels: np.ndarray, seconds: float, batch_size: int | None) -> None:
        if self._failure is not None:
            return
        path = self._folder.picture(seed)
        if self._folder.subdirs:
            path.parent.mkdir(exist_ok=True)
        described = describe_picture(self._record, seed, pixels, batch_size)
        write_pair(self._folder, path, described, pixels, seconds, self._settings)

    def _done(self, future: Future) -> None:
        self._free.release()
        self._failure = self._failure or future.exception()

    def check(self) -> None:
        """Raise RunError if a write has failed."""
        if isinstance(self._failure, OSError):
            error = self._failure
            raise RunError(
                f"{error.filename or self._folder.path}: cannot be written: {error.strerror}; "
                "what was finished before is whole, and the same command goes on from there"
            )
        if self._failure is not None:
            raise self._failure
