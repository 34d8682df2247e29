"""A small HTTP server on loopback that speaks the routes of the Hugging Face Hub which models are fetched by."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """``repositories`` maps OWNER/NAME to a folder; ``gated`` names those that want a token.

    ``requests`` has every (method, path, range) that came, range being that header or None; ``break_download`` cuts
    each file's body short; of those that end in ``spoiled`` the last byte is not the one whose hash is announced.
    """

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = (), token: str = "hf_secret"):
        self.repositories, self.gated, self.token = repositories, gated, token
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_download = False
        self.spoiled: tuple[str, ...] = ()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def refuse(self, status, code, text):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", text)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def answer(self, body):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((self.command, path, self.headers.get("Range")))
                api = path.startswith("/api/models/")
                parts = path.removeprefix("/api/models/").strip("/").split("/")
                name, rest = "/".join(parts[:2]), parts[2:]
                folder = hub.repositories.get(name)
                if folder is None:
                    return self.refuse(401, "RepoNotFound", "Repository not found")
                if name in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self.refuse(403, "GatedRepo", "Access to this model is restricted")
                if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                    return self.refuse(404, "RevisionNotFound", "Revision not found")
                if api:
                    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
                    if rest and rest[0] == "tree":
                        found = [
                            {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40}
                            for f in files
                        ]
                    else:
                        found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                    return self.send(json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
                file = folder / "/".join(rest[2:])
                if not file.is_file():
                    return self.refuse(404, "EntryNotFound", "Entry not found")
                data = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if path.endswith(hub.spoiled):
                    data = data[:-1] + bytes([data[-1] ^ 1])
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
                if asked is None:
                    return self.send(data, headers, body, cut=hub.break_download)
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                if first > last:
                    return self.refuse(416, "RangeNotSatisfiable", "Range not satisfiable")
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return self.send(data[first : last + 1], headers, body, cut=hub.break_download, status=206)

            def send(self, data, headers, body, cut=False, status=200):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body and cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif body:
                    self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()
