"""Models on the Hugging Face Hub, through huggingface_hub: its cache, its variables (HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE), its progress bar. Only the files that are needed are fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ddim_cli.errors import ModelError

# OWNER/NAME as the Hub allows it; a path with more parts, or starting with . or /, is none.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether ``source`` has the form OWNER/NAME."""
    return _HUB_ID.fullmatch(source) is not None


class UnreachableError(ModelError):
    """The Hub does not answer, or not with anything of use."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit: its ``files`` by path. Offline, those that are in the cache."""

    name: str
    revision: str
    commit: str
    files: frozenset[str]
    offline: bool

    def fetch(self, file: str) -> Path:
        """The path of a file in the cache, downloaded if it is not there yet. Raises ModelError."""
        from huggingface_hub import hf_hub_download

        with _errors(self.name, self.revision, file):
            # By the name of the revision, so that the cache knows offline which commit it was.
            path = Path(hf_hub_download(self.name, file, revision=self.revision, local_files_only=self.offline))
            if self.commit not in path.parts:
                # The branch has moved since the run began.
                path = Path(hf_hub_download(self.name, file, revision=self.commit, local_files_only=self.offline))
            return path


@contextmanager
def _errors(name: str, revision: str, file: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence each."""
    from huggingface_hub import errors

    what = f"{name}{f' at {revision}' if revision != 'main' else ''}{f': {file}' if file else ''}"
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{what}: gated on the Hub: accept its terms on its page there, then give a token in HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{what}: the Hub has the model, but no such revision") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{what}: not found on the Hub, nor as a directory or a bundled model; a private one needs HF_TOKEN"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(f"{what}: not in the cache, and HF_HUB_OFFLINE is set") from None
    except errors.LocalEntryNotFoundError:
        raise UnreachableError(f"{what}: not in the cache, and the Hub cannot be reached") from None
    except errors.EntryNotFoundError:
        raise ModelError(f"{what}: the Hub has no such file") from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        raise UnreachableError(f"{what}: the Hub answered with status {status}; try again later") from None
    except errors.HFValidationError as error:
        raise ModelError(f"{what}: {error}") from None
    except OSError as error:
        # A download of the wrong size, a broken connection, a full cache disk.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{what}: the download broke: {first}") from None
    except Exception as error:
        # The HTTP library under huggingface_hub has changed before, and its connection errors with it.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        if "Connect" in type(error).__name__:
            raise UnreachableError(f"{what}: not in the cache, and the Hub cannot be reached: {error}") from None
        raise ModelError(f"{what}: the download broke: {error}") from None


def _cached(name: str, revision: str, known: Sequence[str]) -> Repository | None:
    """What the cache holds of a repository that has one of the files ``known``, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache

    for file in known:
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parents[file.count("/")]
            files = frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            return Repository(name, revision, folder.name, files, offline=True)
    return None


def open_repository(name: str, revision: str | None, known: Sequence[str], cached_only: bool = False) -> Repository:
    """The repository ``name`` at ``revision`` (default: main), from the cache where the Hub cannot be reached.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit.
        known: files one of which it must have, by which it is found in the cache.
        cached_only: ask nobody.

    Raises:
        ModelError: for one that is not there, is gated, or is neither cached nor reachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    revision = revision or "main"
    if cached_only or HF_HUB_OFFLINE:
        found = _cached(name, revision, known)
        if found is None:
            reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hub was not asked"
            raise ModelError(f"{name}: not in the cache, and {reason}")
        return found
    try:
        with _errors(name, revision):
            info = HfApi().model_info(name, revision=revision)
    except UnreachableError:
        found = _cached(name, revision, known)
        if found is None:
            raise
        return found
    return Repository(name, revision, info.sha, frozenset(s.rfilename for s in info.siblings or ()), offline=False)
