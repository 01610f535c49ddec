"""A Hugging Face hub on loopback, as far as downloading and uploading go, with faults on demand.

    with FakeHub() as hub:
        hub.add("org/name", {"config.json": b"{}"})
        snapshot_download("org/name", endpoint=hub.url)

It answers the real client: repository and tree look-ups, HEAD and GET of files with ETag and Range;
new repositories and commits of plain files.
"""

import base64
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
    etags : for each file name, what stands in the place of its hash.
    commit : what every look-up calls the commit, instead of its hash.
    storage : another hub's ``url``, to which GETs of files are redirected, as to a CDN.

    What clients did is in ``requests``, and in ``created`` and ``commits`` what they asked for when
    they made repositories and commits.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        self.failures: dict[str, list[int]] = {}
        self.storage: str | None = None
        self.etags: dict[str, str] = {}
        self.commit: str | None = None
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

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
        if handler.command == "POST":
            body = handler.rfile.read(int(headers.get("content-length") or 0))
            return self._take(handler, parts, body)
        if parts[:2] == ["api", "models"]:
            return self._describe(handler, "/".join(parts[2:4]), parts[4:])
        name, action = "/".join(parts[:2]), parts[2:3]
        repository = self.repositories.get(name)
        if repository is None or action != ["resolve"]:
            return self._send(handler, 404, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.gated and not headers.get("authorization"):
            return self._send(handler, 401, b"", {"X-Error-Code": "GatedRepo"})
        self._serve(handler, repository, "/".join(parts[4:]))

    def _take(self, handler: BaseHTTPRequestHandler, parts: list[str], body: bytes) -> None:
        """What a client does to a repository: create it, ask how to upload, commit."""
        answer: dict[str, Any] = {}
        name = "/".join(parts[2:4])
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            self.created.append(asked)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            name = name if "/" in name else f"someone/{name}"
            if name not in self.repositories:
                self.add(name, {})
            answer = {"url": f"{self.url}/{name}", "id": name, "name": name}
        elif parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif parts[4:5] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            given = {entry["key"]: entry["value"] for entry in lines if entry["key"] != "file"}
            pull = "create_pr=1" in handler.path
            files = {
                entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                for entry in lines
                if entry["key"] == "file"
            }
            gone = [entry["value"]["path"] for entry in lines if entry["key"] == "deletedFile"]
            self.commits.append(
                {**given, "pull": pull, "repository": name, "files": files, "gone": gone}
            )
            if not pull:
                now = {**self.repositories[name].files, **files}
                self.add(name, {path: data for path, data in now.items() if path not in gone})
            answer = {
                "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "pullRequestUrl": f"{self.url}/{name}/discussions/1" if pull else None,
            }
        self._send(handler, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

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
                    "oid": self.etags.get(file, hashlib.sha1(file.encode()).hexdigest()),
                }
                for file in names
            ]
        else:
            answer = {
                "_id": name,
                "id": name,
                "sha": self.commit or repository.commit,
                "siblings": [],
            }
        self._send(handler, 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _serve(self, handler: BaseHTTPRequestHandler, repository: Repository, file: str) -> None:
        content = repository.files.get(file, b"evil" if file in repository.listed else None)
        if content is None:
            return self._send(handler, 404, b"", {"X-Error-Code": "EntryNotFound"})
        first, _, last = (handler.headers.get("range") or "bytes=0-")[6:].partition("-")
        start, end = int(first), min(int(last or len(content)) + 1, len(content))
        large = file.endswith(".safetensors")  # which the Hub keeps by their SHA-256
        digest = (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        headers = {
            "ETag": f'"{self.etags.get(file, digest)}"',
            "X-Repo-Commit": self.commit or repository.commit,
            "Accept-Ranges": "bytes",
        }
        if self.storage and file.endswith(".safetensors"):
            headers |= {
                "Location": f"{self.storage}{handler.path}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": headers["ETag"],
            }
            return self._send(handler, 302, b"", headers)
        partial = start > 0 or bool(last)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if handler.command == "HEAD" and file in repository.promised:
            headers["Content-Length"] = str(repository.promised[file])
        cuts = self.cuts.get(file)
        cut = cuts.pop(0) if cuts and handler.command == "GET" else None
        self._send(
            handler, 206 if partial else 200, content[start:end], headers, cut and cut - start
        )

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


# Names of files in repositories: what a model is made of, what it is not, and hostile ones.


FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)
UNWANTED = (
    "modeling_evil.py",
    "pytorch_model.bin",
    "model.pt",
    "model.onnx",
    "model.gguf",
    "training_args.bin",
    "onnx/model.safetensors",
    "onnx/decoder_model.onnx",
    "video_processor/preprocessor_config.json",
    ".gitattributes",
    ".config.json",
    "archive.zip",
)
HOSTILE = (
    "../config.json",
    "../../config.json",
    "a/../../config.json",
    "..",
    ".",
    "../model.safetensors",
    "/tmp/model.safetensors",
    "/etc/config.json",
    "//host/share/config.json",
    "\\\\host\\share\\config.json",
    "..\\config.json",
    "..\\..\\model.safetensors",
    "C:\\config.json",
    "C:config.json",
    "C:/model.safetensors",
    "D:model.safetensors",
    "config.json\0.safetensors",
    "a\0b.safetensors",
    "~/config.json",
    "./config.json",
    "config.json/",
    "config.json/..",
    "%2e%2e/config.json",
    "..%2fmodel.safetensors/x",
    "blobs/../../../model.safetensors",
    "refs/main",
    "snapshots/main/config.json",
    "model.safetensors/config.json",
    "n" * 300 + "/config.json",
    "\u202econfig.json/x",
)
