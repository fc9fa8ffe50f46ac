"""A Hugging Face Hub on the loopback interface for tests: repositories in memory, the protocol, and injected faults.

Spoken is what huggingface_hub 2.4 asks for without Xet: whoami, create repo and branch, auth-check, repo info, tree, preupload,
LFS batch, upload and verify, commit, validate-yaml, resolve with ranges. `with LoopbackHub() as hub:` starts and stops it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "loopbacktokenofnobody"
LFS = re.compile(r"\.(safetensors|bin|gguf|onnx|model)$")


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The blob's git hash, or the SHA-256 of an LFS file."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Branches point to commits; a commit maps paths to files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        seed = f"{branch}{len(self.commits)}{sorted((p, f.oid) for p, f in files.items())}"
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    @property
    def main(self) -> dict[str, File]:
        return self.commits[self.branches["main"]]


@dataclass
class Fault:
    """The fault for requests whose `METHOD /path` matches the pattern."""

    pattern: str
    status: int = 0  # 0: the regular response
    headers: dict[str, str] = field(default_factory=dict)
    slow: float = 0.0  # seconds before the response
    cut: bool = False  # close the connection, in the middle of the body if there is one
    times: float = float("inf")
    after: int = 0  # requests that pass first


class LoopbackHub:
    """`role` of the one token (read, write, fineGrained); `requests` are the received requests; `lfs` the stored objects."""

    def __init__(self, role: str = "write") -> None:
        self.role, self.user, self.orgs = role, "me", ["ours"]
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.handler: type[Handler] | None = None

    def fail(self, pattern: str, status: int = 0, times: float = float("inf"), **more: Any) -> None:
        self.faults.append(Fault(pattern, status, times=times, **more))

    def heal(self) -> None:
        self.faults.clear()

    def add(self, name: str, private: bool = True) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        return repo

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    if fault.after > 0:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def __enter__(self) -> LoopbackHub:
        hub = self

        class Bound(self.handler or Handler):  # type: ignore[misc]
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Any, token: str = TOKEN) -> dict[str, str]:
        """Environment variables of a process that uses this server as the Hub."""
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": token, "HF_HOME": str(home), **quiet}


@contextmanager
def in_process(hub: LoopbackHub, home: Any) -> Iterator[None]:
    """Make this process use `hub` as the Hub: huggingface_hub reads its variables only on import."""
    import pytest
    from huggingface_hub import constants, hf_api, utils

    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(home).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # for the module-level functions, which peft uses
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        utils.close_session()
        yield
    utils.close_session()


Answer = tuple[int, Any, dict[str, str]]
NO_REPO: Answer = (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
NO_REVISION: Answer = (404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
NO_ENTRY: Answer = (404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def respond(self) -> None:
        self.url = urlsplit(self.path)
        fault = self.hub.fault(f"{self.command} {unquote(self.url.path)}")
        if fault and fault.slow:
            time.sleep(fault.slow)
        if fault and fault.cut and self.command != "GET":
            self.close_connection = True  # the body is not read: the client is disconnected while it sends
            return
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self.chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        ordered = (fault.status, {"error": "a fault to order"}, fault.headers) if fault and fault.status else None
        status, content, headers = ordered or self.answer(body)
        self.send(status, content, headers, cut=bool(fault and fault.cut))

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: Any, headers: dict[str, str], cut: bool = False) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut:
            self.close_connection = True
            body = body[: len(body) // 2]
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, body: bytes) -> Answer:
        path = unquote(self.url.path)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != TOKEN:
            return 401, {"error": "Invalid credentials"}, {}
        for method, pattern, name in ROUTES:
            if self.command in method and (found := re.fullmatch(pattern, path)):
                with self.hub.lock:
                    return getattr(self, name)(*found.groups(), body=body, known=bool(given))
        return 404, {"error": f"this Hub has no {self.command} {path}"}, {}

    def may(self, name: str, known: bool, write: bool = False) -> Answer | None:
        """The response to a request that may not read (or write) this repository."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            return NO_REPO if known else (401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        mine = name.split("/")[0] in (self.hub.user, *self.hub.orgs)
        if write and (not known or not mine or self.hub.role == "read"):
            return 403, {"error": "Forbidden: you have no right to write here"}, {}
        return None

    # accounts and repositories

    def whoami(self, *, body: bytes, known: bool) -> Answer:
        if not known:
            return 401, {"error": "Invalid username or password."}, {}
        token = {"displayName": "test", "role": self.hub.role}
        orgs = [{"name": org, "type": "org", "roleInOrg": "write"} for org in self.hub.orgs]
        return 200, {"type": "user", "name": self.hub.user, "orgs": orgs, "auth": {"accessToken": token}}, {}

    def create(self, *, body: bytes, known: bool) -> Answer:
        asked = json.loads(body)
        owner = asked.get("organization") or self.hub.user
        name = f"{owner}/{asked['name']}"
        if not known or self.hub.role == "read" or owner not in (self.hub.user, *self.hub.orgs):
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner!r}"}, {}
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        self.hub.add(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": url, "name": name, "id": name}, {}

    def branch(self, name: str, branch: str, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known, write=True):
            return refused
        repo = self.hub.repos[name]
        if branch in repo.branches:
            return 409, {"error": "Reference already exists"}, {}
        repo.branches[branch] = repo.branches["main"]
        return 200, {}, {}

    def auth_check(self, name: str, write: str, *, body: bytes, known: bool) -> Answer:
        return self.may(name, known, write=bool(write)) or (200, {}, {})

    def info(self, name: str, revision: str | None, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known):
            return refused
        repo = self.hub.repos[name]
        if (sha := repo.find(revision or "main")) is None:
            return NO_REVISION
        files = [{"rfilename": path} for path in repo.commits[sha]]
        return 200, {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": files, "tags": []}, {}

    def tree(self, name: str, revision: str, under: str | None, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known):
            return refused
        repo = self.hub.repos[name]
        if (sha := repo.find(revision)) is None:
            return NO_REVISION
        recursive = parse_qs(self.url.query).get("recursive", [""])[0].lower() == "true"
        found = []
        folder = f"{under.strip('/')}/" if under else ""
        for path, file in sorted(repo.commits[sha].items()):
            if path.startswith(folder) and (recursive or "/" not in path[len(folder) :]):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
                if file.lfs:
                    entry |= {"oid": file.oid[:40], "lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}}
                found.append(entry)
        return (200, found, {}) if found or not folder else NO_ENTRY

    # uploads

    def preupload(self, name: str, revision: str, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known, write=True):
            return refused
        repo = self.hub.repos[name]
        if (sha := repo.find(revision)) is None:
            return NO_REVISION
        there = repo.commits[sha]
        found = [
            {
                "path": (path := file["path"]),
                "uploadMode": "lfs" if LFS.search(path) or file["size"] > 10 * 2**20 else "regular",
                "shouldIgnore": False,
                "oid": there[path].oid if path in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": found}, {}

    def batch(self, name: str, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known, write=True):
            return refused
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:  # stored objects are not requested again
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def upload(self, oid: str, *, body: bytes, known: bool) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "the content is not what its name says"}, {}
        self.hub.lfs[oid] = body
        return 200, {}, {"ETag": f'"{oid}"'}

    def verify(self, oid: str, *, body: bytes, known: bool) -> Answer:
        there = len(self.hub.lfs.get(oid, b"")) == json.loads(body)["size"]
        return (200, {}, {}) if there else (404, {"error": "not there"}, {})

    def commit(self, name: str, revision: str, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known, write=True):
            return refused
        repo = self.hub.repos[name]
        if revision not in repo.branches:
            return NO_REVISION
        files = dict(repo.commits[repo.branches[revision]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return 400, {"error": "an LFS object is missing"}, {}
                files[value["path"]] = File(self.hub.lfs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(revision, files)
        return 200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"}, {}

    def validate(self, *, body: bytes, known: bool) -> Answer:
        """The first rules of the Hub's card validation, not all of them."""
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        data = yaml.safe_load(found.group(1)) if found else None
        if not isinstance(data, dict):
            errors.append({"message": "the card has no metadata"})
        else:
            if data.get("base_model") and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(data["base_model"])):
                errors.append({"message": '"base_model" with value is not valid. Use a model id from the Hub.'})
            for model in data.get("model-index", []):
                for result in model["results"]:
                    ok = {"task", "dataset", "metrics"} <= set(result) and {"type", "name"} <= set(result["dataset"])
                    if not ok or not all({"type", "value"} <= set(metric) for metric in result["metrics"]):
                        errors.append({"message": '"model-index[0].results" is not valid'})
        return (400, {"errors": errors, "warnings": []}, {}) if errors else (200, {"errors": [], "warnings": []}, {})

    # downloads

    def resolve(self, name: str, revision: str, path: str, *, body: bytes, known: bool) -> Answer:
        if refused := self.may(name, known):
            return refused
        repo = self.hub.repos[name]
        if (sha := repo.find(revision)) is None:
            return NO_REVISION
        if (file := repo.commits[sha].get(path)) is None:
            return NO_ENTRY[0], NO_ENTRY[1], NO_ENTRY[2] | {"X-Repo-Commit": sha}
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2] or len(file.content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
            return 206, file.content[first : last + 1], headers
        return 200, file.content, headers

    def log_message(self, *args: object) -> None:
        pass


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, str]] = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", "branch"),
    (("GET",), rf"/api/models/{_REPO}/auth-check(/write)?", "auth_check"),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)(/.*)?", "tree"),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", "commit"),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/(.+))?", "info"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/(\w+)", "upload"),
    (("POST",), r"/lfs/(\w+)/verify", "verify"),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]
