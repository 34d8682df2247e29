"""Models on the Hugging Face Hub, through huggingface_hub: its cache, its variables (HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE), its progress bar. Only the files that are needed are fetched, and the weights not before they are
loaded, as far as the Hub announces what they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ddim_cli.errors import ModelError, first_line
from ddim_cli.models.hashing import file_sha256

# OWNER/NAME as the Hub allows it; a path with more parts, or starting with . or /, is none.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The ETag of a file in LFS; that of a file in git itself is a hash of 40 digits, and not of its bytes alone.
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_hub_id(source: str) -> bool:
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
    _announced: dict[str, tuple[str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def announced(self, file: str) -> tuple[str, int] | None:
        """The sha256 of a safetensors file and the number of its elements, by what the Hub says and the file's header.

        None where that cannot be told: offline, of a file in the cache, one that is not in LFS, and any other than
        safetensors. `fetch` then holds the file to this hash.
        """
        if file not in self._announced:
            found = self._ask(file)
            if found is None:
                return None
            self._announced[file] = found
        return self._announced[file]

    def _ask(self, file: str) -> tuple[str, int] | None:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.errors import SafetensorsParsingError

        if self.offline or not file.endswith(".safetensors"):
            return None
        if isinstance(try_to_load_from_cache(self.name, file, revision=self.commit), str):
            return None
        # Whatever is wrong is said when the file itself is fetched.
        with (
            suppress(ModelError, SafetensorsParsingError, AttributeError, TypeError, RecursionError),
            _errors(self.name, self.revision, file),
        ):
            etag = get_hf_file_metadata(hf_hub_url(self.name, file, revision=self.commit)).etag
            if etag is None or not _SHA256.fullmatch(etag):
                return None
            header = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.commit)
            return etag, sum(math.prod(tensor.shape) for tensor in header.tensors.values())
        return None

    def fetch(self, file: str) -> Path:
        """The path of a file in the cache, downloaded if it is not there yet.

        Raises:
            ModelError: if it cannot be had, or is not what was `announced`; then it is taken out of the cache again.
        """
        path = self._download(file)
        if file in self._announced:
            expected, found = self._announced[file][0], file_sha256(path)
            if found != expected:
                for broken in {path.resolve(), path}:
                    broken.unlink(missing_ok=True)
                raise ModelError(
                    f"{self.name}: {file}: the download broke: its sha256 is {found[:12]}..., and the Hub announced "
                    f"{expected[:12]}...; run again to download it anew"
                )
        return path

    def _download(self, file: str) -> Path:
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
        raise ModelError(f"{what}: the download broke: {first_line(error, None)}") from None
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
        kept = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(kept, str):
            folder = Path(kept).parents[file.count("/")]
            files = frozenset(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
            return Repository(name, revision, folder.name, files, offline=True)
    return None


def open_repository(name: str, revision: str | None, known: Sequence[str], cached_only: bool = False) -> Repository:
    """The repository ``name`` at ``revision`` (default: main), from the cache where the Hub cannot be reached.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit.
        known: files one of which it must have, by which it is found in the cache.
        cached_only: do not ask the Hub.

    Raises:
        ModelError: for one that is not there, is gated, or is neither cached nor reachable.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    revision = revision or "main"
    if cached_only or HF_HUB_OFFLINE:
        repository = _cached(name, revision, known)
        if repository is None:
            reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hub was not asked"
            raise ModelError(f"{name}: not in the cache, and {reason}")
        return repository
    try:
        with _errors(name, revision):
            info = HfApi().model_info(name, revision=revision)
    except UnreachableError:
        repository = _cached(name, revision, known)
        if repository is None:
            raise
        return repository
    return Repository(
        name, revision, info.sha or revision, frozenset(s.rfilename for s in info.siblings or ()), offline=False
    )
