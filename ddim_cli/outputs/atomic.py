"""Files that are whole or absent, and locks between processes that share a folder.

A file is written under a hidden temporary name in its folder, then renamed. While a process writes,
it holds a lock (flock) on the hidden file; the lock goes with the process, however that ends. So a
hidden file of ours that nobody has locked is left over from a process that was killed. Where the file
system has no locks, age tells.

In an object store a file is written by one request, and is whole or absent by that. There are no locks there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from ddim_cli.outputs.files import Place

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # no type says "a module, or not"

# .000012.png.1f2e3d4c5b6a.tmp, .000012.png.lock, .run.json.work
_OURS = re.compile(
    r"\.((\d{6,}|frame_\d{3,})\.(png|webp|jpg|json)|\d{6,}\.(x0|xt)\.(png|gif)|run\.json|grid\.png|strip\.(png|gif)"
    r"|sweep\.(json|png)|.+\.(recon|latent|edit)\.(png|webp|jpg|json)|.+\.latent\.safetensors|(inverted|edited)\.png"
    r"|report\.html|items\.jsonl|\d{6,}\.(tar|index\.json))"
    r"(\.[0-9a-f]{12}\.tmp|\.lock|\.work)"
)
# The same of a pair whose name is a user's: ours only where that is known.
_OF_A_PAIR = re.compile(r"\.(.+)\.(png|webp|jpg|json)(\.[0-9a-f]{12}\.tmp|\.lock)")
# Without locks: a temporary file lives for as long as one file takes to write.
SECONDS_BEFORE_ABANDONED = 3600.0
TRIES = 5


def _try_lock(stream: BinaryIO, wait: bool, alone: bool = True) -> bool | None:
    """Lock an open file; False if another process has it, None where the file system has no locks.

    Not ``alone``, others may hold it likewise.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(stream, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _still_named(stream: BinaryIO, path: Path) -> bool:
    """Whether the open file is the one that ``path`` names now."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def flush_folder(folder: Path) -> None:
    """Have a rename reach the disk. Windows opens no folders, and needs none of this."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Place, fsync: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose content appears at ``path`` in one step when the block ends, and not at all if it fails.

    ``fsync`` waits until content and name are on the disk. Raises OSError naming ``path``, leaving no temporary file.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryFile() as whole:
            yield cast(BinaryIO, whole)
            size = whole.tell()
            whole.seek(0)
            path.upload(cast(BinaryIO, whole), size)
        return
    # Not the process id: two machines that share a disk can have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as stream:
            _try_lock(stream, wait=False)
            yield stream
            stream.flush()
            if fsync:
                os.fsync(stream.fileno())
            if fcntl is None:
                # Windows renames no open file.
                stream.close()
            os.replace(temporary, path)
        if fsync:
            flush_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Place, data: bytes, fsync: bool = False) -> None:
    """Write ``data`` to ``path`` in one step as others see it. Raises OSError, leaving no temporary file."""
    if not isinstance(path, Path):
        path.write_bytes(data)
        return
    for left in reversed(range(TRIES)):
        try:
            with atomic_file(path, fsync) as stream:
                stream.write(data)
            return
        except FileNotFoundError:
            # Where locks do not reach, another machine may have taken the temporary file for a leftover.
            if not left or not path.parent.is_dir():
                raise


def append(path: Path, data: bytes, fsync: bool = False) -> None:
    """Write ``data`` behind what is there, for a caller that has the path `locked`; a kill may leave it cut off.

    ``fsync`` waits until it is on the disk. Raises OSError naming ``path``.
    """
    try:
        with path.open("ab") as stream:
            stream.write(data)
            stream.flush()
            if fsync:
                os.fsync(stream.fileno())
                flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def cut_torn_line(path: Path) -> None:
    """Cut off what stands behind the last line end: a line that `append` was killed in. Raises OSError.

    A file that is not there stays so.
    """
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        whole = end
        while whole:
            start = max(0, whole - 4096)
            stream.seek(start)
            place = stream.read(whole - start).rfind(b"\n")
            whole = start + place + 1
            if place >= 0:
                break
        if whole < end:
            stream.truncate(whole)


class Held:
    """A path that this process alone may write; see `locked`."""

    def __init__(self, path: Place, hidden: Path | None = None, stream: BinaryIO | None = None):
        self._path, self._hidden, self._stream = path, hidden, stream

    def write(self, data: bytes, fsync: bool = False) -> None:
        """As `write_atomically`, once, and last: the locked file becomes the path, which saves making another."""
        if self._stream is None or self._hidden is None or not isinstance(self._path, Path):
            write_atomically(self._path, data, fsync)
            return
        self._stream.truncate(0)
        self._stream.write(data)
        self._stream.flush()
        if fsync:
            os.fsync(self._stream.fileno())
        os.replace(self._hidden, self._path)
        if fsync:
            flush_folder(self._path.parent)


@contextlib.contextmanager
def locked(path: Place) -> Iterator[Held]:
    """Hold ``path`` for this process alone, by a hidden file beside it; waits for another holder.

    Where the file system has no locks, and in an object store, nothing is held. Raises OSError naming ``path``.
    """
    if not isinstance(path, Path):
        yield Held(path)
        return
    hidden = path.with_name(f".{path.name}.lock")
    try:
        stream = _open_locked(hidden)
        try:
            yield Held(path, hidden, stream)
        finally:
            if stream is not None:
                # Under the lock, so that no other holder's is removed; gone already where it became the path.
                if _still_named(stream, hidden):
                    with contextlib.suppress(OSError):
                        hidden.unlink()
                with contextlib.suppress(OSError):
                    stream.close()
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(hidden)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def shared(path: Place) -> Iterator[None]:
    """Within the block this process is at work on ``path``, beside others that are; see `is_shared`.

    Where the file system has no locks, nothing tells. Raises OSError naming ``path``.
    """
    if not isinstance(path, Path):
        yield
        return
    hidden = _work_file(path)
    try:
        stream = _open_locked(hidden, alone=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield
    finally:
        if stream is not None:
            stream.close()
            # The last to leave removes the file.
            with contextlib.suppress(OSError), hidden.open("r+b") as again:
                if _try_lock(again, wait=False) and _still_named(again, hidden):
                    hidden.unlink()


def is_shared(path: Place) -> bool:
    """Whether a process is at work on ``path``, as far as locks tell. Writes nothing."""
    if not isinstance(path, Path):
        return False
    try:
        # Over NFS, only what is open for writing can be held alone.
        with _work_file(path).open("r+b") as stream:
            return _try_lock(stream, wait=False) is False
    except OSError:
        return False


def claimed_file(path: Path, make: bool = True) -> BinaryIO | None:
    """The file, open for this process alone to read and write, and made if it is not there and ``make`` says so.

    None where another process has it, where the file system has no locks, and where it is not there. Raises OSError.
    """
    while True:
        try:
            stream = path.open("r+b")
        except FileNotFoundError:
            if not make:
                return None
            with contextlib.suppress(FileExistsError):
                path.open("xb").close()
            continue
        held = _try_lock(stream, wait=False)
        if held and _still_named(stream, path):
            return stream
        stream.close()
        if not held:
            return None


def _work_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.work")


def _open_locked(hidden: Path, alone: bool = True) -> BinaryIO | None:
    """The hidden file, locked as `_try_lock` does; None where there are no locks."""
    while fcntl is not None:
        stream: BinaryIO = hidden.open("ab")
        if not alone:
            # Held for long, and a disk must be able to turn read-only meanwhile.
            stream.close()
            try:
                stream = hidden.open("rb")
            except FileNotFoundError:
                continue
        held = _try_lock(stream, wait=True, alone=alone)
        # Its last holder removes or renames it: then the name is free, or another's.
        if held and _still_named(stream, hidden):
            return stream
        stream.close()
        if held is None:
            with contextlib.suppress(OSError):
                hidden.unlink()
            break
    return None


def remove_leftovers(folder: Path, is_item: Callable[[str], bool] = lambda name: False) -> int:
    """Remove the hidden files of processes that were killed while they wrote here; how many there were.

    ``is_item`` tells of a name whether pictures of ours are called so, beside those that nobody else would give.
    """

    def is_ours(file: str) -> bool:
        match = _OF_A_PAIR.fullmatch(file)
        return _OURS.fullmatch(file) is not None or (match is not None and is_item(match[1]))

    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if is_ours(entry.name) and _remove_abandoned(Path(entry.path)):
                removed += 1
    return removed


def _remove_abandoned(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            held = _try_lock(stream, wait=False)
            if held is None:
                held = time.time() - os.fstat(stream.fileno()).st_mtime > SECONDS_BEFORE_ABANDONED
            if not held:
                return False
            path.unlink()
    except OSError:
        return False
    return True
