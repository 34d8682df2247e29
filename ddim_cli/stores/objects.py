"""Files in an object store, by their URL: s3://bucket/key, and whatever else fsspec knows that keeps whole objects.

An object appears whole or not at all, and nothing is renamed. What is transient (a refused or broken connection, a
slow answer, a body cut short, 429 and 5xx) is asked for again, later and later; what is not is said at once. Keys and
tokens come from the environment that each store's own tools read, and are in no message.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import io
import os
import random
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

from ddim_cli.errors import RunError, UsageError, first_line, missing_extra

T = TypeVar("T")

# One try and five more, after about 0.5, 1, 2, 4 and 8 seconds.
TRIES = 6
LONGEST_WAIT = 8.0
# What a store may ask for in Retry-After.
LONGEST_ASKED_WAIT = 30.0
CONNECT_TIMEOUT = 10.0
# A large object comes and goes in pieces, so many at a time; S3 takes at most 10,000 of them.
PIECE = 16 << 20
MOST_PIECES = 10_000
AT_A_TIME = 4
# Above this `open` keeps an object in a temporary file.
IN_MEMORY = 64 << 20

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_USUAL = "s3, gs or az"
# Which of our extras brings what reads a scheme.
_EXTRAS = {
    "s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "gcs": ("gcsfs", "gs"),
    "az": ("adlfs", "az"), "abfs": ("adlfs", "az"), "abfss": ("adlfs", "az"),
}  # fmt: skip
_HERE = ("file", "local")
# What fsspec knows but keeps no whole objects: files grow there, or cannot be written.
_NO_STORES = frozenset({
    "arrow_hdfs", "async_wrapper", "asynclocal", "asyncwrapper", "blockcache", "cached", "dask", "data", "dbfs", "dir",
    "filecache", "ftp", "generic", "gist", "git", "github", "hdfs", "http", "https", "jlab", "jupyter", "libarchive",
    "pyscript", "reference", "root", "sftp", "simplecache", "smb", "ssh", "tar", "webdav", "webhdfs", "zip",
})  # fmt: skip
# A container at an account: abfs://container@account.dfs.core.windows.net/path.
_WITH_ACCOUNT = ("az", "abfs", "abfss")
# Variables that say who asks, or where; the instance of a file system is for one state of them.
_VARIABLES = ("AWS_", "S3_", "GOOGLE_", "GCLOUD_", "AZURE_", "OSS_", "OCI_", "TOS_", "FSSPEC_", "DDIM_STORE_", "HOME")
_SECRETS = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|CONNECTION_STRING|SAS", re.IGNORECASE)

_STATUSES = {408, 429, 500, 502, 503, 504}
_CODES = {
    "SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "TooManyRequests", "OperationAborted", "BadDigest", "IncompleteBody",
    "RequestTimeoutException", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoAuthTokenError",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError",
    "ClientAuthenticationError", "RefreshError", "ConfigParseError", "LoginTokenLoadError",
}  # fmt: skip
_INSECURE = {"SSLError", "ClientConnectorCertificateError", "ClientConnectorSSLError"}
_UNREACHED = {
    "EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "ClientConnectorError",
    "ClientConnectorDNSError", "ConnectionRefusedError", "ConnectionTimeoutError", "ServiceRequestError",
}  # fmt: skip
_SLOW = {
    "ReadTimeoutError",
    "TimeoutError",
    "FSTimeoutError",
    "ServerTimeoutError",
    "SocketTimeoutError",
    "ReadTimeout",
}
_RESET = {"ConnectionResetError", "BrokenPipeError", "ServerDisconnectedError", "ConnectionClosedError"}
_BROKEN = _RESET | {
    "ClientPayloadError", "ResponseStreamingError", "IncompleteReadError", "IncompleteRead", "ClientOSError",
    "ConnectionAbortedError", "HTTPClientError", "ResponseParserError", "FlexibleChecksumError", "ContentLengthError",
    "ServiceResponseError", "ChunkedEncodingError", "ConnectionError",
}  # fmt: skip


# What happened, by what errors are called, themselves and their causes; the first that fits.
_HAPPENED = (
    ({"_ChangedError"}, "another object took its place while it was read"),
    (_RESET, "the connection broke off"),
    (_INSECURE, "no secure connection to the store: its certificate is not trusted, or the time is wrong"),
    (_UNREACHED, "the store cannot be reached"),
    (_SLOW, "the store did not answer within {seconds} seconds"),
    ({"_CutError", "ClientPayloadError", "IncompleteReadError", "IncompleteRead"}, "the answer broke off"),
    (_BROKEN, "the connection broke off"),
)


class StoreError(RunError, OSError):
    """A store did not do as asked, nor after all tries; ``filename`` is the URL, and ``strerror`` what happened."""

    def __init__(self, url: str, words: str, is_transient: bool = False):
        super().__init__(errno.EIO, words, url)
        # Whether it may be otherwise later: the store could not be reached, or was busy, at all tries.
        self.is_transient = is_transient

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class _CutError(Exception):
    """Fewer bytes came than there are."""


class _ChangedError(Exception):
    """The object became another one while it was read."""


class _HereError(Exception):
    """It is this machine's file that failed, as ``error`` says."""

    def __init__(self, error: OSError):
        self.error = error


class _GaveUpError(Exception):
    """All tries at one request failed; ``__cause__`` says how the last did."""


def is_url(text: str) -> bool:
    """Whether this names something by its URL: s3://bucket/run, memory://x; not a path, a drive or OWNER/NAME."""
    return _URL.fullmatch(text) is not None


def open_url(url: str) -> ObjectPath:
    """What ``url`` names. Asks nothing of the network.

    Raises:
        UsageError: for a scheme that nothing here knows or that is no object store, one whose package is not
            installed, a URL without a bucket, and one with a password in it.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise UsageError(f"{url}: not a URL: it is written SCHEME://BUCKET/NAME, the scheme being {_USUAL}")
    scheme, rest = match["scheme"].lower(), match["rest"].strip("/")
    account, at, _ = rest.partition("/")[0].rpartition("@")
    # The name of a store without what may be a secret.
    shown = f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"
    if at and (":" in account or scheme not in _WITH_ACCOUNT):
        raise UsageError(
            f"{shown}: a URL with a name or password in it would be kept beside every picture: give them in the "
            "environment, as the store's own tools read them"
        )
    _file_system_class(scheme)
    if not rest.partition("/")[0]:
        raise UsageError(f"{scheme}://: names no bucket: it is written {scheme}://BUCKET/NAME")
    parts = rest.split("/")
    if {"", ".", ".."} & set(parts[1:]):
        raise UsageError(f"{scheme}://{rest}: a name in an object store has no parts that are empty, '.' or '..'")
    if "?versionId=" in rest:
        raise UsageError(f"{scheme}://{rest}: one version of an object cannot be named; leave out ?versionId=")
    return ObjectPath(scheme, rest)


@functools.cache
def _file_system_class(scheme: str) -> Any:
    """fsspec's class for a scheme. Raises UsageError."""
    import fsspec
    from fsspec.registry import known_implementations

    if scheme in _HERE:
        raise UsageError(f"{scheme}:// is this machine: give the path without it")
    if scheme in _NO_STORES:
        raise UsageError(f"{scheme}:// is no object store: what is written there can be seen half done; use {_USUAL}")
    try:
        found = fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        if scheme in _EXTRAS:
            raise missing_extra(f"{scheme}://", *_EXTRAS[scheme]) from None
        hint = known_implementations.get(scheme, {}).get("err") or first_line(error)
        raise UsageError(f"{scheme}:// needs a package that is not installed: {hint}") from None
    except ValueError:
        raise UsageError(f"{scheme}:// is no object store that is known here: use {_USUAL}") from None
    return _patient(found) if scheme in ("s3", "s3a") else found


def _patient(s3_class: Any) -> Any:
    """s3fs's class, with every single request tried as we try: a page of a listing, a part of an upload."""

    class PatientS3(s3_class):
        # Its own tries wait as they like, and know fewer errors.
        retries = 1

        async def _call_s3(self, method: str, *args: Any, **keywords: Any) -> Any:
            import asyncio

            for left in reversed(range(TRIES)):
                try:
                    return await super()._call_s3(method, *args, **keywords)
                except Exception as error:
                    if not _is_transient(error):
                        raise
                    if not left:
                        raise _GaveUpError from error
                    wait = _wait(TRIES - left, error)
                await asyncio.sleep(wait)
            raise AssertionError

    return PatientS3


def _first_wait() -> float:
    """Seconds; ``DDIM_STORE_WAIT`` says otherwise."""
    return float(os.environ.get("DDIM_STORE_WAIT") or 0.5)


def _timeout() -> float:
    """Seconds that an answer may take; ``DDIM_STORE_TIMEOUT`` says otherwise."""
    return float(os.environ.get("DDIM_STORE_TIMEOUT") or 60)


# Of its own: nothing that is drawn for pictures comes from here.
_jitter = random.SystemRandom()


def _wait(tries: int, error: BaseException) -> float:
    """Seconds before the next try, after so many."""
    wait = min(LONGEST_WAIT, _first_wait() * 2 ** (tries - 1)) * _jitter.uniform(0.75, 1.25)
    return max(wait, min(_asked_wait(error), LONGEST_ASKED_WAIT))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _response(error: BaseException) -> Mapping[str, Any]:
    """What an S3 server answered, {} where it did not."""
    found = (getattr(e, "response", None) for e in _chain(error))
    return next((r for r in found if isinstance(r, Mapping) and "Error" in r), {})


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code") or "")


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer that was an error: S3's, or as gcsfs, adlfs and aiohttp have it."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    # aiohttp says 400 of an answer that breaks off.
    for e in (e for e in _chain(error) if not type(e).__module__.startswith("aiohttp.http_exceptions")):
        status = status or getattr(e, "status_code", None) or getattr(e, "status", None) or getattr(e, "code", None)
    return int(status) if isinstance(status, (int, str)) and str(status).isdigit() else None


def _asked_wait(error: BaseException) -> float:
    headers = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        return max(0.0, float(headers.get("retry-after") or 0))
    except ValueError:
        return 0.0


def _names(error: BaseException) -> set[str]:
    """What the classes of an error and of what led to it are called, their bases included."""
    return {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}


def _is_transient(error: BaseException) -> bool:
    """Whether asking again may help."""
    if isinstance(error, _GaveUpError):
        return False
    if isinstance(error, (_CutError, _ChangedError)):
        return True
    if _names(error) & (_NO_CREDENTIALS | _INSECURE):
        return False
    if _code(error) in _CODES or _status(error) in _STATUSES:
        return True
    if _response(error) or isinstance(error, (FileNotFoundError, PermissionError, FileExistsError)):
        return False
    return bool(_names(error) & (_UNREACHED | _SLOW | _BROKEN))


def _scrub(text: str) -> str:
    """Without what the environment keeps secret, or a URL has before its host."""
    text = re.sub(r"[^\s/@:\"']+(:[^\s@]*)?@", "", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRETS.search(name):
            text = text.replace(value, "***")
    return text


def _words(error: BaseException, bucket: str) -> str:
    """What happened, for a person."""
    names, tries = _names(error), f", {TRIES} times" if _gave_up(error) else ""
    if _code(error) == "NoSuchBucket":
        return f"there is no bucket {bucket!r}"
    if names & _NO_CREDENTIALS:
        return (
            "no credentials were found, or not all of them: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or what else this store's own tools read"
        )
    if _code(error) or _status(error):
        return _answer(error, tries)
    words = next((words for kinds, words in _HAPPENED if names & kinds), None)
    if words is not None:
        return words.format(seconds=f"{_timeout():g}") + tries
    if isinstance(error, PermissionError):
        return "the store refused"
    return f"{type(error).__name__}: {_scrub(first_line(error, 200))}"


def _answer(error: BaseException, tries: str) -> str:
    """What the store said."""
    code, status = _scrub(_code(error)), _status(error)
    facts = [f"status {status}"] if status else []
    if code and code != str(status):
        facts.append(code)
    verb = "refused" if status in (401, 403) else "answered with an error"
    message = str(_response(error).get("Error", {}).get("Message") or "").strip()
    message = f": {_scrub(message.splitlines()[0][:200])}" if message and message != code else ""
    return f"the store {verb} ({', '.join(facts)}){tries}{message}"


def _gave_up(error: BaseException) -> bool:
    return any(isinstance(e, _GaveUpError) for e in _chain(error))


_open: dict[str, tuple[Any, Any]] = {}
_lock = threading.Lock()


def _free_lock() -> None:
    """In a process that was forked while a thread of its parent held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free_lock)


def _file_system(scheme: str, url: str) -> Any:
    """The file system that a URL is in, kept for as long as the process and its environment are the same."""
    kind = _file_system_class(scheme)
    options = dict(kind._get_kwargs_from_urls(url))
    state = (os.getpid(), repr(options), [(k, v) for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)])
    with _lock:
        kept = _open.get(scheme)
        if kept is None or kept[0] != state:
            # Other processes write there too: what was listed before counts for nothing.
            options |= {"use_listings_cache": False, "skip_instance_cache": True, **_options(scheme)}
            kept = _open[scheme] = (state, kind(**options))
        return kept[1]


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("s3", "s3a"):
        return {}
    config: dict[str, Any] = {
        "connect_timeout": min(CONNECT_TIMEOUT, _timeout()),
        "read_timeout": _timeout(),
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": 32,
    }
    if "AWS_RESPONSE_CHECKSUM_VALIDATION" not in os.environ:
        # Some servers send the checksum of the whole object with a piece of it.
        config["response_checksum_validation"] = "when_required"
    # With one request for one object, and none for its size before.
    return {"config_kwargs": config, "max_concurrency": 1}


@dataclass(frozen=True)
class Entry:
    """An object: its ``size`` in bytes, and what changes with its content (``version``: an ETag or a time)."""

    size: int
    version: str


def _entry(info: Mapping[str, Any]) -> Entry:
    keys = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime", "created")
    version = next((info[key] for key in keys if info.get(key)), "")
    seconds = getattr(version, "timestamp", None)
    return Entry(int(info["size"] or 0), str(seconds() if seconds is not None else version).strip('"'))


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object in a store, or what begins with its name and a slash. Names are pathlib's where it does the same.

    What asks the store raises FileNotFoundError for what is not there and else `StoreError`, both with the URL as
    their ``filename``. Threads may share one; a process that is forked has connections of its own.
    """

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str | PurePosixPath) -> ObjectPath:
        below = str(name).strip("/")
        return ObjectPath(self.scheme, f"{self.path}/{below}") if below not in ("", ".") else self

    @property
    def bucket(self) -> str:
        return self.path.partition("/")[0]

    @property
    def key(self) -> str:
        """The name in the bucket; "" for the bucket itself."""
        return self.path.partition("/")[2]

    @property
    def name(self) -> str:
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> ObjectPath:
        """Of a bucket, itself."""
        return ObjectPath(self.scheme, self.path.rpartition("/")[0]) if self.key else self

    def with_name(self, name: str) -> ObjectPath:
        if not self.key:
            raise ValueError(f"{self} has an empty name")
        return self.parent / name

    def with_suffix(self, suffix: str) -> ObjectPath:
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    def relative_to(self, other: ObjectPath) -> PurePosixPath:
        if self.scheme != other.scheme:
            raise ValueError(f"{self} is not in {other}")
        return PurePosixPath(self.path).relative_to(other.path)

    @property
    def _fs(self) -> Any:
        return _file_system(self.scheme, str(self))

    @property
    def _there(self) -> str:
        """What the file system calls it."""
        return str(_file_system_class(self.scheme)._strip_protocol(str(self)))

    @property
    def _is_s3(self) -> bool:
        return self.scheme in ("s3", "s3a")

    def _ask(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, tried again after what is transient. Raises FileNotFoundError, StoreError."""
        for left in reversed(range(TRIES)):
            try:
                return work()
            except StoreError:
                raise
            except _HereError as failed:
                raise failed.error from None
            except Exception as caught:
                error: Exception = caught
                if not _is_transient(error):
                    raise self._said(error) from None
                if not left:
                    gave_up = _GaveUpError()
                    gave_up.__cause__ = error
                    raise self._said(gave_up) from None
            time.sleep(_wait(TRIES - left, error))
        raise AssertionError

    def _said(self, error: Exception) -> OSError:
        if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket":
            return FileNotFoundError(errno.ENOENT, "there is no such object", str(self))
        return StoreError(str(self), _words(error, self.bucket), _gave_up(error))

    def check(self) -> None:
        """Have the store say that the bucket is there and can be read.

        Raises:
            UsageError: without credentials, without such a bucket, where the store refuses or cannot be reached.
        """
        try:
            self._ask(self._look)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise UsageError(f"{self}: there is no bucket {self.bucket!r}") from None
            raise UsageError(f"{self}: {error.strerror}") from None

    def _look(self) -> bool:
        """Whether something begins with this name and a slash. Raises FileNotFoundError without a bucket."""
        if self._is_s3:
            prefix = f"{self.key}/" if self.key else ""
            found = self._fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, MaxKeys=1)
            return bool(found.get("Contents"))
        try:
            return any(name.startswith(f"{self._there}/") for name in self._fs.ls(self._there, detail=False))
        except FileNotFoundError:
            # Buckets of this one come with their first object.
            if self.scheme != "memory":
                self._fs.info(_bucket_of(self))
            return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        try:
            self.entry()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether something begins with this name and a slash."""
        try:
            return self._ask(self._look)
        except FileNotFoundError:
            return False

    def entry(self) -> Entry:
        """Size and version. Raises FileNotFoundError."""
        return self._ask(self._entry)

    def _entry(self) -> Entry:
        if not self.key:
            raise FileNotFoundError
        if self._is_s3:
            found = self._fs.call_s3("head_object", Bucket=self.bucket, Key=self.key)
            return _entry({**found, "size": found["ContentLength"]})
        info = self._fs.info(self._there)
        if info["type"] != "file":
            raise FileNotFoundError
        return _entry(info)

    def size(self) -> int:
        """In bytes. Raises FileNotFoundError."""
        return self.entry().size

    def sha256(self) -> str | None:
        """The hex sha256 of the object's bytes, where the store keeps it. Raises FileNotFoundError."""
        if not self._is_s3:
            return None
        here = {"Bucket": self.bucket, "Key": self.key, "ChecksumMode": "ENABLED"}
        kept = self._ask(lambda: self._fs.call_s3("head_object", **here)).get("ChecksumSHA256") or ""
        try:
            # Of an object that came in parts it is one of their hashes, and ends in their number.
            digest = base64.b64decode(kept, validate=True)
        except ValueError:
            return None
        return digest.hex() if len(digest) == 32 else None

    def entries(self) -> dict[str, Entry]:
        """What begins with this name and a slash: what follows these, in order. One listing, in pages."""

        def find() -> dict[str, Any]:
            try:
                return self._fs.find(self._there, detail=True)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return {}

        start = f"{self._there}/"
        found = {n: i for n, i in self._ask(find).items() if i["type"] == "file" and not n.endswith("/")}
        return {n.removeprefix(start): _entry(i) for n, i in sorted(found.items()) if n.startswith(start)}

    def listing(self) -> dict[str, int]:
        """As `entries`: the size of each."""
        return {name: entry.size for name, entry in self.entries().items()}

    def read_bytes(self) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        self._must_have_key()
        return self._ask(lambda: self._fs.cat_file(self._there))

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop``, all of which must be there. Raises FileNotFoundError."""
        self._must_have_key()
        return self._ask(lambda: self._read_range(start, stop))

    def _read_range(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        data: bytes = self._fs.cat_file(self._there, start=start, end=stop)
        if len(data) != stop - start:
            raise _CutError(f"{len(data)} of {stop - start} bytes")
        return data

    def open(self, mode: str = "rb") -> BinaryIO:
        """The whole object, to be read and sought in: in memory, a large one in a temporary file."""
        if mode != "rb":
            raise ValueError(f"mode {mode!r}: an object can only be opened to be read")
        stream: BinaryIO = io.BytesIO() if self.size() <= IN_MEMORY else tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.download(stream)
        except BaseException:
            stream.close()
            raise
        stream.seek(0)
        return stream

    def download(self, to: BinaryIO) -> Entry:
        """Write the whole object to a stream, from where it stands; what was read. Raises FileNotFoundError."""
        begin = to.tell()

        def read() -> Entry:
            entry = self._entry()
            with _here():
                to.seek(begin)
                to.truncate()
            pieces = [(start, min(start + PIECE, entry.size)) for start in range(0, entry.size, PIECE)]
            # A piece is tried again by itself.
            for data in _in_order(pieces, lambda piece: self.read_range(*piece)):
                with _here():
                    to.write(data)
            if self._entry() != entry:
                raise _ChangedError
            return entry

        return self._ask(read)

    def write_bytes(self, data: bytes) -> None:
        """Write one object, in the place of what was there. Others see it whole or not at all."""
        self._must_have_key()
        if self._is_s3:
            self._ask(lambda: self._fs.call_s3("put_object", Bucket=self.bucket, Key=self.key, Body=data))
        else:
            self._ask(lambda: self._fs.pipe_file(self._there, data))

    def upload(self, source: BinaryIO, size: int) -> None:
        """As `write_bytes`, of the next ``size`` bytes of a file, which can be large: in pieces, and complete at once.

        Of one that fails or is interrupted nothing stays in the store, as far as that can still be asked.
        """
        self._must_have_key()
        begin = source.tell()

        def send() -> None:
            with _here():
                source.seek(begin)
            if size <= 2 * PIECE:
                self.write_bytes(_exactly(source, size))
            elif self._is_s3:
                self._send_parts(source, size)
            else:
                self._send_file(source, size)

        self._ask(send)

    def _send_parts(self, source: BinaryIO, size: int) -> None:
        here = {"Bucket": self.bucket, "Key": self.key}
        call = functools.partial(self._fs.call_s3, **here)
        upload = call("create_multipart_upload")["UploadId"]
        length = max(PIECE, -(-size // MOST_PIECES))
        pieces = ((n, min(length, size - (n - 1) * length)) for n in range(1, -(-size // length) + 1))
        read = ((n, _exactly(source, count)) for n, count in pieces)

        def send(part: tuple[int, bytes]) -> dict[str, Any]:
            sent = call("upload_part", UploadId=upload, PartNumber=part[0], Body=part[1])
            return {"PartNumber": part[0], **{k: v for k, v in sent.items() if k == "ETag" or k.startswith("Checksum")}}

        try:
            parts = list(_in_order(read, send))
            try:
                call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
            except FileNotFoundError as error:
                # It may be complete by a try whose answer was lost. All is sent anew: nothing else tells for sure.
                if _code(error) != "NoSuchUpload":
                    raise
                raise _CutError from None
        except BaseException:
            with contextlib.suppress(Exception):
                call("abort_multipart_upload", UploadId=upload)
            raise

    def _send_file(self, source: BinaryIO, size: int) -> None:
        """Through a file's name, which is how fsspec sends one whole."""
        with tempfile.NamedTemporaryFile() as copy:
            left = size
            with _here():
                while left:
                    left -= copy.write(_exactly(source, min(PIECE, left)))
                copy.flush()
            self._fs.put_file(copy.name, self._there)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. Raises FileNotFoundError, unless ``missing_ok``."""
        if not missing_ok:
            self.entry()
        try:
            self._ask(lambda: self._fs.rm_file(self._there))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def _must_have_key(self) -> None:
        if not self.key:
            raise FileNotFoundError(errno.ENOENT, "names a bucket, and no object in it", str(self))


def _bucket_of(path: ObjectPath) -> str:
    return ObjectPath(path.scheme, path.bucket)._there


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """For what this machine's own files do within an answer of the store."""
    try:
        yield
    except OSError as error:
        raise _HereError(error) from None


def _exactly(source: BinaryIO, size: int) -> bytes:
    """The next bytes of a local file. Raises _HereError where it cannot be read, or ends before."""
    with _here():
        data = source.read(size)
        if len(data) != size:
            raise OSError(errno.EIO, "the file became shorter while it was sent", str(getattr(source, "name", "")))
        return data


def _in_order(things: Any, work: Callable[[Any], T]) -> Iterator[T]:
    """``work`` of each, in order, a few at a time in threads."""
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="ddim-store") as pool:
        running: deque[Future[T]] = deque()
        try:
            for thing in things:
                running.append(pool.submit(work, thing))
                if len(running) == AT_A_TIME:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
