"""A model hub on this machine: a folder served at 127.0.0.1 as huggingface_hub asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One model `name` at revision main; `served` lists the files that were fetched."""

    name: str
    root: Path
    url: str = ""
    served: list[str] = field(default_factory=list)


@contextmanager
def fake_hub(name: str, root: Path) -> Iterator[FakeHub]:
    """Serve `root` as the model `name`, until the block ends."""
    hub = FakeHub(name, root)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, hub = urlsplit(self.path).path, self.hub
        if path in (f"/api/models/{hub.name}", f"/api/models/{hub.name}/revision/main"):
            self.reply(json.dumps({"id": hub.name, "sha": SHA, "siblings": []}).encode())
        elif path == f"/api/models/{hub.name}/tree/{SHA}":
            self.reply(json.dumps([self.entry(p) for p in sorted(hub.root.rglob("*")) if p.is_file()]).encode())
        elif path.startswith(f"/{hub.name}/resolve/{SHA}/"):
            self.file(path.removeprefix(f"/{hub.name}/resolve/{SHA}/"))
        elif path.startswith(f"/api/models/{hub.name}/"):
            self.reply(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/gated/"):
            self.reply(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        else:
            self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, path: Path) -> dict[str, object]:
        size = path.stat().st_size
        return {"type": "file", "path": path.relative_to(self.hub.root).as_posix(), "size": size, "oid": _etag(path)}

    def file(self, name: str) -> None:
        path = self.hub.root / name
        if self.command == "GET":
            self.hub.served.append(name)
        self.reply(path.read_bytes(), 200, {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": SHA})

    def reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
