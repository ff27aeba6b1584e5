"""A local stand-in for ModelScope, for the real clients modelscope-hub and modelscope.

It knows what they ask for when a model is converted or served: the listing of the files
(`/api/v1/models/{repo}/repo/files`) and the bytes of one (`/api/v1/models/{repo}/repo`), with
ranges. The forms of the answers follow the client's source, not the real service, which cannot be
reached from a test machine.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class ModelScopeServer:
    """The server, a context manager; `damage` counts downloads that get a wrong byte."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.damage = 0
        self.refuse = 0
        self.downloads: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    def __enter__(self) -> ModelScopeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables that point the client here and keep the developer's own set-up out of it."""
        return {
            "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "MODELSCOPE_CACHE": str(cache),
            "MODELSCOPE_HOME": str(cache / "home"),
            "HOME": str(cache),
            "MODELSCOPE_API_TOKEN": "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def listing(self) -> dict[str, Any]:
        """The answer to the question for files."""
        files = [
            {
                "Path": path.name,
                "Name": path.name,
                "Size": path.stat().st_size,
                "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "Type": "blob",
            }
            for path in sorted(self.folder.iterdir())
        ]
        return {"Code": 200, "Success": True, "Data": {"Files": files}}

    def content(self, name: str, asked: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and bytes of a file or a range of it."""
        data = bytearray((self.folder / name).read_bytes())
        if asked is None or asked.startswith("bytes=0-") and asked.endswith(f"-{len(data) - 1}"):
            self.downloads.append(name)
            if self.damage and name.endswith(".safetensors"):
                self.damage -= 1
                data[-1] ^= 0xFF
        if asked is None:
            return 200, {}, bytes(data)
        first, last = asked.removeprefix("bytes=").split("-")
        stop = min(int(last) + 1, len(data)) if last else len(data)
        span = f"bytes {first}-{stop - 1}/{len(data)}"
        return 206, {"Content-Range": span}, bytes(data[int(first) : stop])


def _handler(server: ModelScopeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            base = f"/api/v1/models/{server.repo}/repo"
            if server.refuse and url.path == base:
                server.refuse -= 1
                self._send(503, {}, b"{}")
            elif url.path == f"{base}/files":
                self._send(200, {"Content-Type": "application/json"}, _json(server.listing()))
            elif url.path == base:
                name = parse_qs(url.query)["FilePath"][0]
                self._send(*server.content(name, self.headers.get("Range")))
            else:
                answer = {"Code": 404, "Success": False, "Message": "not found"}
                self._send(404, {"Content-Type": "application/json"}, _json(answer))

        def do_HEAD(self) -> None:
            self.do_GET()

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
