"""The least that a client of the server has to be, without a library in between."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """What has come back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The objects of a stream that has come to its end."""
        *events, done, end = self.body.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server, closed in the end."""
    host = urlsplit(url).netloc
    opened = http.client.HTTPConnection(host, timeout=60)
    try:
        yield opened
    finally:
        opened.close()


def get(url: str, path: str) -> Reply:
    """Asks for a path of the server."""
    return _ask(url, "GET", path, None, {})


def post(
    url: str, path: str, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] = JSON
) -> Reply:
    """Sends a body to a path of the server."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return _ask(url, "POST", path, data, headers)


def _ask(url: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Reply:
    with connection(url) as opened:
        opened.request(method, path, body, dict(headers))
        got = opened.getresponse()
        return Reply(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())
