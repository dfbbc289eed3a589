"""A small hub on 127.0.0.1 that speaks as much of the real one's protocol as huggingface_hub needs to download.

Model info, file listing and `resolve` with HEAD, ETag, X-Repo-Commit and ranges; large files are redirected to another
host name, as to the real hub's CDN; 401, 403 and 404 come with the X-Error-Code that the client tells errors apart by.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000
"""Files from this size on are stored as the hub stores LFS files."""
GOOD_TOKEN = "hf_may_read"


class Request(NamedTuple):
    """What was asked of the server."""

    method: str
    path: str
    token: str | None
    byte_range: str | None


@dataclass
class Repo:
    """One model repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Add a commit that a branch or tag then points at."""
        names = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        commit = hashlib.sha1(json.dumps([names, len(self.commits)], sort_keys=True).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


@dataclass
class Hub:
    """The repositories, what was asked so far, and what is broken."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    """Files of which only the first half is sent, once."""
    stalled: set[str] = field(default_factory=set)
    """Files of which the second half is sent only after `go_on` is set."""
    go_on: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    """What every request is answered with, where something is wrong with the whole hub."""
    page: bytes | None = None
    """What every request is answered with, where something else than a hub answers."""

    def repo(self, name: str) -> Repo:
        """A repository, made if need be."""
        return self.repos.setdefault(name, Repo())

    def asked(self) -> list[Request]:
        """The requests that are about a repository, and forget them."""
        asked = [request for request in self.requests if not request.path.startswith("/api/agent-harnesses")]
        self.requests.clear()
        return asked


class _Answer(NamedTuple):
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


def _refusal(status: int, code: str, message: str) -> _Answer:
    return _Answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, *_: object) -> None:
        """Tests look at `Hub.requests` instead."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(self.command, path, token, self.headers.get("Range")))
        answer = self._answer(path, token)
        body, sent, name = answer.body, len(answer.body), path.rpartition("/")[2]
        is_download = self.command == "GET" and answer.status in (200, 206)
        if is_download and name in self.hub.cut:
            self.hub.cut.remove(name)
            sent //= 2
        self.send_response(answer.status)
        for key, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = sent < len(body)
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # a client that was interrupted
                self.wfile.write(body[: sent // 2])
                if is_download and name in self.hub.stalled:
                    self.hub.go_on.wait(20)
                self.wfile.write(body[sent // 2 : sent])

    def _answer(self, path: str, token: str | None) -> _Answer:
        if self.hub.status:
            return _Answer(self.hub.status, b"{}")
        if self.hub.page is not None:
            return _Answer(200, self.hub.page, {"Content-Type": "text/html"})
        if found := re.fullmatch(r"/cdn/(\w+)/[^/]+", path):
            return self._large(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            return self._in_repo(found[1], found[3] or "main", token, kind=found[2] or "revision")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self._in_repo(found[1], found[2], token, file=found[3])
        return _Answer(404, b"{}")

    def _in_repo(self, name: str, revision: str, token: str | None, kind: str = "", file: str = "") -> _Answer:
        repo = self.hub.repos.get(name)
        if token not in (None, GOOD_TOKEN, "hf_stranger"):
            return _Answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.private and token != GOOD_TOKEN):
            return _refusal(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and file and token != GOOD_TOKEN:
            return _refusal(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if kind == "tree":
            return _Answer(200, json.dumps([_entry(path, data) for path, data in files.items()]).encode())
        if kind:
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            return _Answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
        if file not in files:
            refusal = _refusal(404, "EntryNotFound", "Entry not found")
            return refusal._replace(headers={**refusal.headers, "X-Repo-Commit": commit})
        return self._file(file, files[file], commit)

    def _file(self, name: str, data: bytes, commit: str) -> _Answer:
        if len(data) < LARGE_BYTES:
            return self._part(data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        digest = hashlib.sha256(data).hexdigest()
        cdn = self.hub.url.replace("127.0.0.1", "localhost")
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return _Answer(302, b"", {**headers, "Location": f"{cdn}/cdn/{digest}/{name.rpartition('/')[2]}"})

    def _large(self, digest: str) -> _Answer:
        for repo in self.hub.repos.values():
            for data in (data for files in repo.commits.values() for data in files.values()):
                if len(data) >= LARGE_BYTES and hashlib.sha256(data).hexdigest() == digest:
                    return self._part(data, {"ETag": f'"{digest}"'})
        return _Answer(404)

    def _part(self, data: bytes, headers: Mapping[str, str]) -> _Answer:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not found:
            return _Answer(200, data, {**headers, "Accept-Ranges": "bytes"})
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if first > last:
            return _Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        return _Answer(206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"})


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) >= LARGE_BYTES:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def serving() -> AbstractContextManager[Hub]:
    """A hub on a free port, stopped at the end."""
    return answering(Hub(), _Handler)


class HasUrl(Protocol):
    """A hub that is told where it is."""

    url: str


AnyHub = TypeVar("AnyHub", bound=HasUrl)


@contextmanager
def answering(hub: AnyHub, answers: type[BaseHTTPRequestHandler]) -> Iterator[AnyHub]:
    """A hub whose requests that class answers, on a free port, stopped at the end."""
    handler = type("Handler", (answers,), {"hub": hub, "timeout": 10})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
