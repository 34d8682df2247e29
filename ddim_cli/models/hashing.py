"""sha256 of weights files, remembered in the user's cache folder beside each file's size and time of change.

So a job of a hundred processes does not hash the same gigabytes a hundred times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddim_cli.errors import ModelError

# Below this, hashing is quicker than looking it up is worth.
SMALLEST_KEPT = 16 << 20


def cache_folder() -> Path:
    """``$DDIM_CACHE``, else ``ddim`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; one that is empty counts as unset."""
    if os.environ.get("DDIM_CACHE"):
        return Path(os.environ["DDIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim"


def hexdigest(path: Path, digest: Any) -> str:
    """A file's bytes, hashed by ``digest``, one of hashlib's. Raises OSError."""
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes. Raises ModelError if it cannot be read."""
    try:
        path = path.resolve(strict=True)
        stat = path.stat()
        if stat.st_size < SMALLEST_KEPT:
            return hexdigest(path, hashlib.sha256())
        # One small file for each weights file, so that processes never write the same one differently.
        key = hashlib.sha256(str(path).encode()).hexdigest()[:32]
        kept, facts = cache_folder() / "sha256" / f"{key}.json", [str(path), stat.st_size, stat.st_mtime_ns]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            remembered = json.loads(kept.read_bytes())
            if remembered["file"] == facts:
                return remembered["sha256"]
        digest = hexdigest(path, hashlib.sha256())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    # A cache that cannot be written only costs time.
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"file": facts, "sha256": digest}))
        os.replace(temporary, kept)
    return digest


def files_sha256(paths: Iterable[Path]) -> str:
    """As `joint_sha256`, of the files in the order given. Raises ModelError if one cannot be read."""
    return joint_sha256([file_sha256(path) for path in paths])


def joint_sha256(digests: Sequence[str]) -> str:
    """The sha256 of one file; of several, of their hashes in the order given."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
