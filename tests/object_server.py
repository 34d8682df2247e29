"""A real S3 server on loopback (rclone's, on a folder: a bucket is a folder there), and before it a proxy of ours that
does to requests what networks and stores do: connections reset, 503, bodies cut, answers slow or lost."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import secrets
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SECONDS = 30


@dataclass(frozen=True)
class Request:
    """What came: ``key`` is the object's name in its ``bucket``, "" for the bucket itself, ``query`` as it came."""

    method: str
    bucket: str
    key: str
    query: str

    @property
    def what(self) -> str:
        return f"{self.bucket}/{self.key}" + (f"?{self.query}" if self.query else "")

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.query


@dataclass
class Fault:
    """One that happens to requests of ``method`` (any) whose BUCKET/KEY?QUERY has ``key`` in it, a regular expression.

    It happens the first ``times`` (None: always), each with ``probability``. ``kind`` is:

    - reset: the connection is broken before anything is read or answered;
    - status: the server answers with ``status`` and the S3 error ``code``, and with Retry-After, if ``retry_after``;
    - cut: half of the answer's body comes, then the connection closes;
    - cut request: half of the request's body reaches the server, then both connections close;
    - lost: the server does as asked, but the connection is broken before it answers;
    - slow: the answer comes after ``seconds``;
    - stall: half of the answer's body comes, and the rest after ``seconds``.
    """

    kind: str
    method: str | None = None
    key: str = ""
    times: int | None = 1
    probability: float = 1.0
    status: int = 503
    code: str = "SlowDown"
    retry_after: float | None = None
    seconds: float = 1.0

    def is_for(self, request: Request) -> bool:
        return self.method in (None, request.method) and bool(re.search(self.key, request.what))


@dataclass
class Faults:
    """What is to happen to requests, and what happened: the ``requests`` that came, and how often each kind did."""

    requests: list[Request] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)
    _planned: list[Fault] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, **details: object) -> None:
        """Plan a `Fault`. Of several that fit a request the first happens."""
        with self._lock:
            self._planned.append(Fault(kind, **details))

    def clear(self, seed: int = 0) -> None:
        """Plan nothing, and forget what came."""
        with self._lock:
            self._planned.clear()
            self.requests.clear()
            self.happened.clear()
            self._random.seed(seed)

    def count(self, method: str | None = None, key: str = "") -> int:
        """How many requests came that a `Fault` of this ``method`` and ``key`` would be for."""
        return sum(Fault("", method, key).is_for(request) for request in list(self.requests))

    @property
    def listings(self) -> int:
        """How many pages of listings were asked for."""
        return sum(request.is_listing for request in list(self.requests))

    def of(self, request: Request) -> Fault | None:
        """What happens to this request now."""
        with self._lock:
            self.requests.append(request)
            for fault in self._planned:
                if fault.times != 0 and fault.is_for(request) and self._random.random() < fault.probability:
                    fault.times = None if fault.times is None else fault.times - 1
                    self.happened[fault.kind] += 1
                    return fault
        return None


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *args):
        super().__init__(*args)
        self._connections: set[socket.socket] = set()

    def process_request(self, request, client_address):
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self._connections.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Take no connections, and break those that wait for their next request."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Connections break here, as they are meant to."""


def _break(connection: socket.socket) -> None:
    """Close with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def _handler(server: ObjectServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = SECONDS

        def log_message(self, *args):
            pass

        def broken(self):
            self.close_connection = True
            self.wfile = open("/dev/null", "wb")  # noqa: SIM115
            self.rfile.close()
            _break(self.connection)

        def do_any(self):
            parts = urlsplit(self.path)
            bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
            request = Request(self.command, bucket, key, parts.query)
            fault = server.faults.of(request) or Fault("none")
            if fault.kind == "reset":
                return self.broken()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fault.kind == "status":
                return self.refuse(fault)
            if fault.kind == "cut request":
                with contextlib.suppress(OSError), server.serving() as port:
                    upstream = socket.create_connection(("127.0.0.1", port), SECONDS)
                    head = f"{self.requestline}\r\n{self.headers}".replace("\r\n", "\n").replace("\n", "\r\n")
                    upstream.sendall(head.encode("latin-1") + body[: len(body) // 2])
                    upstream.close()
                return self.broken()
            if fault.kind == "slow":
                time.sleep(fault.seconds)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            with server.serving() as port:
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
                try:
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    data = answer.read()
                finally:
                    upstream.close()
            if fault.kind == "lost":
                return self.broken()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
            if fault.kind in ("cut", "stall"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                data = data[len(data) // 2 :]
                if fault.kind == "cut":
                    self.close_connection = True
                    return None
                time.sleep(fault.seconds)
            self.wfile.write(data)

        def refuse(self, fault):
            data = f"<Error><Code>{fault.code}</Code><Message>as planned</Message></Error>".encode()
            self.send_response(fault.status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            if fault.retry_after is not None:
                self.send_header("Retry-After", f"{fault.retry_after:g}")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815

    return Handler


class ObjectServer:
    """An S3 server of the files in ``folder``, a context. ``faults`` says what happens to requests.

    ``endpoint`` is the proxy's URL, which is what `environment` has programs use; ``secret`` is the key that no output
    may show.
    """

    def __init__(self, folder: Path):
        self.folder, self.faults = folder, Faults()
        self.name, self.secret = "AKIDFORTESTS", f"sEcReT{secrets.token_hex(16)}"
        self._process: subprocess.Popen[str] | None = None
        self._lock, self._at_work, self._left = threading.Lock(), 0, None
        self._proxy: _Proxy | None = None
        self.proxy_port = 0
        self.listen()
        self.endpoint = f"http://127.0.0.1:{self.proxy_port}"

    def _start(self) -> None:
        """Start rclone's server, anew if it runs: it remembers what its folders held."""
        self._stop()
        rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or "rclone"
        command = [rclone, "serve", "s3", str(self.folder), "--config", "/dev/null", "--addr", "127.0.0.1:0"]
        command += ["--auth-key", f"{self.name},{self.secret}", "--dir-cache-time", "24h", "--poll-interval", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said = []
        for line in self._process.stderr:
            said.append(line)
            if match := re.search(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)", line):
                self._port = int(match[1])
                # So that it never waits for its log to be read.
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return
        raise RuntimeError(f"rclone did not start: {''.join(said)}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(SECONDS)

    def _on_disk(self) -> list[tuple]:
        """What tells whether files changed; not those in which the server keeps what is on its way."""
        facts = []
        for root, folders, files in os.walk(self.folder):
            for name in (*folders, *(name for name in files if not name.startswith(".rclone_temp"))):
                with contextlib.suppress(FileNotFoundError):
                    facts.append((os.path.join(root, name), os.lstat(os.path.join(root, name))))
        return sorted((n, s.st_ino, *(() if stat.S_ISDIR(s.st_mode) else (s.st_size, s.st_mtime_ns))) for n, s in facts)

    @contextlib.contextmanager
    def serving(self) -> Iterator[int]:
        """The port of the server, for one request; started anew if files changed that it did not change itself."""
        with self._lock:
            # While requests are at work the server changes them.
            changed = self._at_work == 0 and self._on_disk() != self._left
            if self._process is None or self._process.poll() is not None or changed:
                self._start()
            self._at_work += 1
        try:
            yield self._port
        finally:
            with self._lock:
                self._at_work -= 1
                if self._at_work == 0:
                    self._left = self._on_disk()

    def listen(self) -> None:
        """Take connections, at the same port as before."""
        if self._proxy is None:
            self._proxy = _Proxy(("127.0.0.1", self.proxy_port), _handler(self))
            self.proxy_port = self._proxy.server_port
            threading.Thread(target=self._proxy.serve_forever, args=(0.02,), daemon=True).start()

    def refuse(self) -> None:
        """Have new connections refused, until `listen`."""
        if self._proxy is not None:
            self._proxy.stop()
            self._proxy = None

    @contextlib.contextmanager
    def refusing(self, seconds: float | None = None) -> Iterator[None]:
        """Within the block connections are refused; with ``seconds``, only so long."""
        self.refuse()
        timer = threading.Timer(seconds, self.listen) if seconds is not None else None
        if timer is not None:
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.join()
            self.listen()

    def bucket(self, name: str = "bucket") -> Path:
        """The folder that is a bucket, made if it is not there: an object is a file in it, to read or to change."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def url(self, bucket: str = "bucket", *names: str) -> str:
        """s3://BUCKET/NAMES; the bucket is made."""
        self.bucket(bucket)
        return "/".join([f"s3://{bucket}", *names])

    def environment(self) -> dict[str, str]:
        """What a program needs to use this server, and to be quick about tries."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.name,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "DDIM_STORE_WAIT": "0.01",
            "DDIM_STORE_TIMEOUT": "20",
        }

    def clear(self) -> None:
        """Remove all buckets, planned faults, and what came."""
        self.listen()
        self.faults.clear()
        for path in self.folder.iterdir():
            shutil.rmtree(path)

    def __enter__(self) -> ObjectServer:
        return self

    def __exit__(self, *exc) -> None:
        self.refuse()
        self._stop()
