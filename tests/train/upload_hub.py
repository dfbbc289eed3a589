"""A small hub on 127.0.0.1 that takes as much of an upload as huggingface_hub sends for files of ordinary size."""

from __future__ import annotations

import base64
import json
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from hub_server import answering

TOKEN = "hf_may_write"


@dataclass
class UploadHub:
    """What was pushed, and what is refused."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    broken: str | None = None
    """A part of a path that is answered with 500."""
    forbidden: str | None = None
    """A part of a path that is answered with 403."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: UploadHub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def log_message(self, *_: object) -> None:
        """Tests look at the hub instead."""

    def _answer(self, body: bytes) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        if (self.headers.get("Authorization") or "") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials"})
        if hub.broken and hub.broken in path:
            return self._send(500, {"error": "out of order"})
        if hub.forbidden and hub.forbidden in path:
            return self._send(403, {"error": "no write access"})
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "somebody", "type": "user", "auth": {}})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            return self._preupload(json.loads(body)) if found[2] == "preupload" else self._commit(found[1], body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            return self._send(200, {"id": found[1], "sha": "0" * 40, "siblings": []})
        return self._send(404, {"error": path})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        self.hub.repos.setdefault(name, {})
        if asked.get("visibility") == "private" or asked.get("private"):
            self.hub.private.add(name)
        self._send(200, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _preupload(self, asked: dict[str, Any]) -> None:
        files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
        self._send(200, {"files": files})

    def _commit(self, name: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.hub.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)


def serving() -> AbstractContextManager[UploadHub]:
    """A hub on a free port, stopped at the end."""
    return answering(UploadHub(), _Handler)
