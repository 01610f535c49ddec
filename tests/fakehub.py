"""A Hugging Face hub on loopback, as far as downloading a model goes, with faults on demand.

    with FakeHub() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        snapshot_download("org/name", endpoint=hub.url)

It answers the real client: repository and tree look-ups, HEAD and GET of files with ETag and Range.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Request:
    """One request as it arrived; ``token`` is the whole authorization header."""

    method: str
    path: str
    token: str | None
    range: str | None


@dataclass
class Repository:
    """``listed`` adds names to the tree that need not be names of ``files``; ``promised`` are
    lengths that HEAD names instead of the true ones.
    """

    files: Mapping[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    listed: tuple[str, ...] = ()
    promised: Mapping[str, int] = field(default_factory=dict)
    commit: str = ""

    def __post_init__(self) -> None:
        seed = "".join(f"{k}{hashlib.sha1(v).hexdigest()}" for k, v in self.files.items())
        self.commit = self.commit or hashlib.sha1(seed.encode()).hexdigest()


class FakeHub:
    """Knobs, to be set at any time:

    cuts : for each file name, at which byte of the file to drop each coming connection.
    failures : for each part of a path, the statuses to answer first.
    storage : another hub's ``url``, to which GETs of files are redirected, as to a CDN.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        self.failures: dict[str, list[int]] = {}
        self.storage: str | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **settings: Any) -> Repository:
        self.repositories[name] = Repository(dict(files), **settings)
        return self.repositories[name]

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for."""
        paths = (r.path for r in self.requests if r.method == "GET" and "/resolve/" in r.path)
        return {path.split("/resolve/", 1)[1].split("/", 1)[1] for path in paths}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers, path = handler.headers, unquote(urlsplit(handler.path).path)
        self.requests.append(
            Request(handler.command, path, headers.get("authorization"), headers.get("range"))
        )
        for part, statuses in self.failures.items():
            if part in path and statuses:
                return self._send(handler, statuses.pop(0), b"no")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe(handler, "/".join(parts[2:4]), parts[4:])
        name, action = "/".join(parts[:2]), parts[2:3]
        repository = self.repositories.get(name)
        if repository is None or action != ["resolve"]:
            return self._send(handler, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.gated and not headers.get("authorization"):
            return self._send(handler, 401, b"", {"X-Error-Code": "GatedRepo"})
        self._serve(handler, repository, "/".join(parts[4:]))

    def _describe(self, handler: BaseHTTPRequestHandler, name: str, rest: list[str]) -> None:
        repository = self.repositories.get(name)
        if repository is None:  # what the Hub answers to a stranger, private or not there at all
            return self._send(handler, 401, b"", {"X-Error-Code": "RepoNotFound"})
        revision = "/".join(rest[1:]) or "main"
        if revision not in (*repository.revisions, repository.commit):
            return self._send(handler, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            names = dict.fromkeys([*repository.files, *repository.listed])
            answer: Any = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(repository.files.get(file, b"evil")),
                    "oid": hashlib.sha1(file.encode()).hexdigest(),
                }
                for file in names
            ]
        else:
            answer = {"_id": name, "id": name, "sha": repository.commit, "siblings": []}
        self._send(handler, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _serve(self, handler: BaseHTTPRequestHandler, repository: Repository, file: str) -> None:
        content = repository.files.get(file, b"evil" if file in repository.listed else None)
        if content is None:
            return self._send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        start = int((handler.headers.get("range") or "bytes=0-")[6:].split("-")[0])
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": repository.commit,
            "Accept-Ranges": "bytes",
        }
        if self.storage and file.endswith(".safetensors"):
            headers |= {
                "Location": f"{self.storage}{handler.path}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": headers["ETag"],
            }
            return self._send(handler, 302, b"", headers)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if handler.command == "HEAD" and file in repository.promised:
            headers["Content-Length"] = str(repository.promised[file])
        cuts = self.cuts.get(file)
        cut = cuts.pop(0) if cuts and handler.command == "GET" else None
        self._send(handler, 206 if start else 200, content[start:], headers, cut and cut - start)

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: Mapping[str, str] = {},
        cut: int | None = None,
    ) -> None:
        """Promises the whole ``body``; with ``cut``, breaks the connection after so many bytes."""
        # One request a connection, so that none outlives the hub.
        handler.close_connection = True
        handler.send_response(status)
        fixed = {"Connection": "close", "Content-Length": str(len(body))}
        for name, value in (fixed | dict(headers)).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body if cut is None else body[: max(cut, 0)])
