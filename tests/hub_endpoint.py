"""A Hugging Face hub on the loopback address: the routes that `huggingface_hub`, `transformers` and `datasets` ask for, and the ways in which they fail.

It answers as the hub does: a file's commit and ETag stand in its head, large files are a redirect to another origin that must not see the token, and what
cannot be had says why in `X-Error-Code`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gz")  # what the hub stores apart and answers with a redirect
TOKEN = "hf_of_somebody_who_was_let_in"
NO_ACCESS_TOKEN = "hf_of_somebody_who_was_not"
PROBLEMS = {"missing": (404, "RepoNotFound", "Repository not found"), "limited": (429, None, "We had to rate limit you"), "down": (503, None, "Service Unavailable")}


@dataclass
class Repository:
    """Files of a model ("models") or data set ("datasets"), and what is wrong: "gated", a key of PROBLEMS, "slow" (no answer at all), or with each large file "broken" or
    "stalled" (after half of it the connection ends, or nothing more comes)."""

    kind: str
    name: str
    files: dict[str, bytes]
    revision: str = "main"
    problem: str | None = None
    only: str | None = None  # the file that has the problem (None: all, and the API's answers, too)
    good_answers: int = 0  # so many files, or parts of one, are sent before the problem begins
    bad_answers: float = math.inf  # so many are broken before it ends
    served: list[str] = field(default_factory=list)  # the files that were sent, whole or not

    @property
    def commit(self) -> str:
        return hashlib.sha1("".join(f"{name} {_digest(content)}" for name, content in sorted(self.files.items())).encode()).hexdigest()

    def problem_of(self, file: str | None) -> str | None:
        """What is wrong with an answer about `file` ("": about the repository; None: about its folders)."""
        answers = len(self.served) if self.only is None else self.served.count(self.only)
        if self.only not in (None, file) or not self.good_answers <= answers < self.good_answers + self.bad_answers:
            return None
        return None if self.problem in ("broken", "stalled") and not (file or "").endswith(LARGE if self.only is None else "") else self.problem

    def info(self) -> dict:
        """What the API says of the repository."""
        return {"_id": "0", "id": self.name, "modelId": self.name, "sha": self.commit, "private": False, "gated": "manual" if self.problem == "gated" else False, "disabled": False,
                "tags": [], "downloads": 1, "likes": 0, "siblings": [{"rfilename": name} for name in self.files]}

    def entries(self, folder: str, recursive: bool) -> list[dict] | None:
        """What lies in `folder`, as the API lists it; None where there is no such folder."""
        inside = [name for name in self.files if not folder or name.startswith(f"{folder}/")]
        if folder and not inside:
            return None
        depth = folder.count("/") + 1 if folder else 0
        near = [name for name in inside if recursive or name.count("/") == depth]
        folders = {"/".join(name.split("/")[:end]) for name in inside for end in range(depth + 1, name.count("/") + 1) if recursive or end == depth + 1}
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)] + [self.entry(name) for name in near]

    def entry(self, name: str) -> dict:
        content = self.files[name]
        large = {"lfs": {"oid": _digest(content), "size": len(content), "pointerSize": 130}} if name.endswith(LARGE) else {}
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name, **large}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Hub:
    """The endpoint: `url` is HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str, str], Repository] = {}
        self.tokens_at_storage: list[str] = []
        self.closing = threading.Event()
        self._servers = [_server(self, handler) for handler in (_Api, _Storage)]
        ports = [server.server_address[1] for server in self._servers]
        self.url, self.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"  # a host of its own: a token and a HEAD go no further than the hub's

    def add(self, repository: Repository) -> Repository:
        self.repositories[repository.kind, repository.name, repository.revision] = repository
        return repository

    def find(self, kind: str, name: str, revision: str) -> Repository | None:
        found = self.repositories.get((kind, name, revision))
        return found or next((one for one in self.repositories.values() if (one.kind, one.name, one.commit) == (kind, name, revision)), None)

    def close(self) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _server(hub: Hub, handler: type[_Answer]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class _Answer(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # a client that gave up
            self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, content: bytes = b"", sent: int | None = None, **headers: str) -> None:
        """An answer, or the first bytes that are `sent` of it, after which the connection breaks."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        self.close_connection = self.close_connection or sent is not None

    def send_json(self, value: object, **headers: str) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str | None, message: str, **headers: str) -> None:
        codes = {} if code is None else {"X_Error_Code": code}
        self.send(status, json.dumps({"error": message}).encode(), Content_Type="application/json", X_Error_Message=message, **codes, **headers)

    def send_file(self, repository: Repository, name: str, **headers: str) -> None:
        """A file, or the part that the request names."""
        content = repository.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (0, len(content) - 1) if wanted is None else (int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1))
        if first > last and content:
            return self.send(416, Content_Range=f"bytes */{len(content)}")
        problem = repository.problem_of(name) if self.command == "GET" else None
        if self.command == "GET":
            repository.served.append(name)
        where = {} if wanted is None else {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
        sent = None if problem not in ("broken", "stalled") else len(content) // 2 if wanted is None else 0
        self.send(200 if wanted is None else 206, content[first : last + 1], sent, Accept_Ranges="bytes", **where, **headers)
        if problem == "stalled":
            self.hub.closing.wait(60)
        return None


class _Storage(_Answer):
    """Where large files lie: /<kind>/<owner>/<name>/<revision>/<file>."""

    def answer(self) -> None:
        if "Authorization" in self.headers:
            self.hub.tokens_at_storage.append(self.headers["Authorization"])
        kind, owner, name, revision, file = unquote(self.path).strip("/").split("/", 4)
        found = self.hub.find(kind, f"{owner}/{name}", revision)
        if found.problem_of(file) in PROBLEMS:
            return self.refuse(*PROBLEMS[found.problem])
        return self.send_file(found, file)


class _Api(_Answer):
    """The hub itself."""

    def answer(self) -> None:
        place = urlsplit(self.path)
        path, self.query = place.path, {name: values[0] for name, values in parse_qs(place.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        resolve = re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if resolve:
            self._with(resolve[1] or "models", resolve[2], resolve[3], lambda found: self._file(found, unquote(resolve[4])), unquote(resolve[4]))
        elif api and api[3] in (None, "revision"):
            self._with(api[1], api[2], api[4], lambda found: self.send_json(found.info()), "")
        elif api and api[3] == "tree":
            self._with(api[1], api[2], api[4], lambda found: self._tree(found, unquote(api[5] or "")))
        elif api:
            self._with(api[1], api[2], api[4], lambda found: self._paths(found, body))
        else:
            self.refuse(*PROBLEMS["missing"])

    def _with(self, kind: str, name: str, revision: str | None, answer: Callable[[Repository], None], file: str | None = None) -> None:
        """`answer` for the repository, or what keeps from it. Of a gated one everybody may know that it is there, but not read it."""
        found = self.hub.find(kind, name, unquote(revision or "main"))
        problem = "missing" if found is None else found.problem_of(file)
        if problem == "slow":
            self.hub.closing.wait(60)
        elif problem == "gated" and file != "" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 403 if "Authorization" in self.headers else 401
            self.refuse(status, "GatedRepo", f"Access to {'dataset' if kind == 'datasets' else 'model'} {name} is restricted", X_Repo_Commit=found.commit)
        elif problem in PROBLEMS:
            self.refuse(*PROBLEMS[problem], **({"RateLimit": '"resolvers";r=0;t=3'} if problem == "limited" else {}))
        else:
            answer(found)

    def _file(self, found: Repository, name: str) -> None:
        commit = {"X_Repo_Commit": found.commit}
        if name not in found.files:
            return self.refuse(404, "EntryNotFound", "Entry not found", **commit)
        content = found.files[name]
        if not name.endswith(LARGE):
            return self.send_file(found, name, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **commit)
        where = f"{self.hub.storage}/{found.kind}/{found.name}/{found.commit}/{name}"
        return self.send(302, Location=where, X_Linked_Size=str(len(content)), X_Linked_ETag=f'"{_digest(content)}"', Accept_Ranges="bytes", **commit)

    def _tree(self, found: Repository, folder: str) -> None:
        entries = found.entries(folder, self.query.get("recursive", "").lower() in ("true", "1"))
        if entries is None:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {found.revision}")
        return self.send_json(entries)

    def _paths(self, found: Repository, body: bytes) -> None:
        form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        paths = [form["paths"]] if isinstance(form["paths"], str) else form["paths"]
        folders = [{"type": "directory", "oid": "0" * 40, "path": path} for path in paths if path not in found.files and found.entries(path, False)]
        self.send_json([found.entry(path) for path in paths if path in found.files] + folders)


@contextmanager
def hub_endpoint() -> Iterator[Hub]:
    """A Hub for as long as the block runs."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()
