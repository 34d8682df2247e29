"""Writer threads: what is finished goes to disk while the next batch is denoised."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from ddim_cli.errors import RunError
from ddim_cli.interrupts import LONGEST_SLEEP, uninterrupted
from ddim_cli.outputs.files import Place

THREADS = 2
# Pictures that may wait for a thread: memory stays flat, and a slow disk slows the run instead.
QUEUE = 64


def not_written(error: OSError, folder: Place) -> RunError:
    """What is said where a run cannot write into its folder."""
    return RunError(
        f"{error.filename or folder}: cannot be written: {error.strerror}; what was finished before is whole, and the "
        "same command goes on from there"
    )


class BackgroundWriter:
    """Runs functions that write into ``folder``, in the background; a context that waits for all of them at its end.

    After an error in a thread nothing more is written; it is raised by the next ``check`` or ``submit``, or at the end.
    ``on_failure`` is called, in that thread, once there is something to raise.
    """

    def __init__(self, folder: Place, on_failure: Callable[[], None] = lambda: None):
        self._folder, self._on_failure = folder, on_failure
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ddim-writer")
        self._free = threading.Semaphore(QUEUE)
        self._failure: BaseException | None = None

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Queue ``write(*args)``. Waits while the queue is full; raises RunError if a write failed."""
        self.check()
        while True:
            with uninterrupted():
                if self._free.acquire(timeout=LONGEST_SLEEP):
                    self._pool.submit(self._run, write, args).add_done_callback(self._done)
                    return

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            self._pool.shutdown(wait=True)
        self.check()

    def _run(self, write: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._failure is None:
            write(*args)

    def _done(self, future: Future) -> None:
        self._free.release()
        self._failure = self._failure or future.exception()
        if self._failure is not None:
            self._on_failure()

    def check(self) -> None:
        """Raise RunError if a write has failed."""
        if isinstance(self._failure, OSError):
            raise not_written(self._failure, self._folder)
        if self._failure is not None:
            raise self._failure
