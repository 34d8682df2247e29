"""A small HTTP server on loopback that speaks the routes of the Hugging Face Hub which models are fetched by."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """``repositories`` maps OWNER/NAME to a folder; ``gated`` names those that want a token.

    ``requests`` has every (method, path) that came; ``break_download`` cuts each file's body short.
    """

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = (), token: str = "hf_secret"):
        self.repositories, self.gated, self.token = repositories, gated, token
        self.requests: list[tuple[str, str]] = []
        self.break_download = False
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
                hub.requests.append((self.command, path))
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
                return self.send(data, headers, body, cut=hub.break_download)

            def send(self, data, headers, body, cut=False):
                self.send_response(200)
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
