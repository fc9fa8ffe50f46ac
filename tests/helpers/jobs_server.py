"""The Jobs and buckets of `hub_server.LoopbackHub`: jobs really run on this machine, a bucket is a folder.

Xet, which moves the bytes of buckets, is a compiled library with a protocol of its own: `jobs_here` puts a session in its
place that reads and writes the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from helpers.hub_server import Answer, Handler, LoopbackHub, in_process

HARDWARE = {"cpu-basic": 0, "t4-small": 1, "a100-large": 1, "h200x8": 8}
WHEN = "2026-01-01T00:00:00.000Z"


class LoopbackJobs(LoopbackHub):
    """`folder` holds buckets and the working folders of jobs; `specs` are the requests for jobs, with their secrets."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.specs, self.buckets = folder, list[dict[str, Any]](), dict[str, bool]()
        self.stages: dict[str, str] = {}
        self.logs: dict[str, list[str]] = {}
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.contents: dict[str, bytes] = {}  # by hash
        self.handler = JobsHandler

    def __exit__(self, *given: object) -> None:
        for child in self.running.values():
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        super().__exit__(*given)

    def bucket(self, name: str) -> Path:
        return self.folder / "buckets" / name

    def job(self, name: str) -> dict[str, Any]:
        number = int(name)
        spec = self.specs[number]
        status = {"stage": self.stages[name], "message": None}
        public = {key: value for key, value in spec.items() if key != "secrets"}
        return {"id": name, "createdAt": WHEN, "status": status, "owner": {"id": "1", "name": "me", "type": "user"}, **public}

    def start(self, spec: dict[str, Any]) -> str:
        name = str(len(self.specs))
        self.specs.append(spec)
        self.stages[name], self.logs[name] = "RUNNING", []
        threading.Thread(target=self._run, args=(name, spec), daemon=True).start()
        return name

    def _run(self, name: str, spec: dict[str, Any]) -> None:
        """All attempts of a job, each in an empty working folder."""
        mounts = {volume["mountPath"]: str(self.bucket(volume["source"])) for volume in spec["volumes"]}
        for attempt in range(spec.get("attempts", 1)):
            work = self.folder / "work" / f"{name}-{attempt}"
            body = spec["environment"]["HFSTRAT_JOB"].replace("/tmp/hfstrat", str(work))
            for mount, folder in mounts.items():
                body = body.replace(mount, folder)
            environment = {**os.environ, **spec["environment"], **spec.get("secrets", {}), "HFSTRAT_JOB": body}
            with subprocess.Popen(
                spec["command"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                start_new_session=True,
            ) as child:
                self.running[name] = child
                assert child.stdout is not None
                for line in child.stdout:
                    self.logs[name].append(line.rstrip("\n"))
            shutil.rmtree(work, ignore_errors=True)
            if child.returncode == 0:
                break
        self.stages[name] = "COMPLETED" if child.returncode == 0 else "ERROR"

    def tree(self, name: str, prefix: str) -> list[dict[str, Any]]:
        root = self.bucket(name)
        found = []
        for file in sorted(root.rglob("*")):
            path = str(file.relative_to(root))
            if file.is_file() and path.startswith(prefix):
                content = file.read_bytes()
                self.contents[digest := hashlib.sha256(content).hexdigest()] = content
                found.append({"type": "file", "path": path, "size": len(content), "xetHash": digest, "mtime": WHEN})
        return found


class JobsHandler(Handler):
    hub: LoopbackJobs

    def answer(self, body: bytes) -> Answer:
        path, hub = unquote(self.url.path), self.hub
        if not path.startswith(("/api/jobs", "/api/buckets", "/buckets")):
            return super().answer(body)
        if not self.headers.get("Authorization"):
            return 401, {"error": "Invalid username or password."}, {}
        if path == "/api/jobs/hardware":
            return 200, [self._hardware(name, count) for name, count in HARDWARE.items()], {}
        if found := re.fullmatch(r"/api/jobs/(\w+)", path):
            if found[1] != "me":
                return 403, {"error": f"you may not start jobs in {found[1]}"}, {}
            return 200, hub.job(hub.start(json.loads(body))), {}
        if found := re.fullmatch(r"/api/jobs/me/(\d+)(/logs)?", path):
            if not found[2]:
                return 200, hub.job(found[1]), {}
            while hub.stages[found[1]] == "RUNNING":
                time.sleep(0.02)
            events = [f"data: {json.dumps({'timestamp': WHEN, 'data': line})}\n\n" for line in hub.logs[found[1]]]
            return 200, "".join(events).encode(), {"Content-Type": "text/event-stream"}
        return self._buckets(path, body)

    @staticmethod
    def _hardware(name: str, count: int) -> dict[str, Any]:
        gpu = {"type": "gpu", "model": "a GPU", "quantity": str(count), "vram": "16 GB", "manufacturer": "Nvidia"}
        price = {"unitCostMicroUSD": 1, "unitCostUSD": 1e-6, "unitLabel": "minute"}
        return {"name": name, "prettyName": name, "cpu": "2", "ram": "16 GB", "accelerator": gpu if count else None, **price}

    def _buckets(self, path: str, body: bytes) -> Answer:
        hub = self.hub
        if found := re.fullmatch(r"/api/buckets/([\w-]+/[\w-]+)", path):
            name = found[1]
            if self.command == "POST":
                if name in hub.buckets:
                    return 409, {"error": "exists", "url": f"{hub.url}/buckets/{name}"}, {}
                hub.buckets[name] = json.loads(body).get("visibility") == "private"
                hub.bucket(name).mkdir(parents=True)
                return 200, {"url": f"{hub.url}/buckets/{name}"}, {}
            facts = {"id": name, "private": hub.buckets[name], "createdAt": WHEN, "size": 0, "totalFiles": 0}
            return 200, facts, {}
        if found := re.fullmatch(r"/api/buckets/([\w-]+/[\w-]+)/tree/?(.*)", path):
            return 200, hub.tree(found[1], found[2]), {}
        if found := re.fullmatch(r"/api/buckets/([\w-]+/[\w-]+)/batch", path):
            for line in body.splitlines():
                change = json.loads(line)
                file = hub.bucket(found[1]) / change["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(hub.contents[change["xetHash"]])
            return 200, {"success": True, "processed": len(body.splitlines()), "succeeded": 1, "failed": []}, {}
        if found := re.fullmatch(r"/buckets/([\w-]+/[\w-]+)/resolve/(.+)", path):
            content = (hub.bucket(found[1]) / found[2]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            return (
                200,
                content,
                {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{hub.url}/token", "X-Linked-Size": str(len(content))},
            )
        return 404, {"error": f"this Hub has no {self.command} {path}"}, {}


class XetHere:
    """What `get_xet_session` returns, over the contents of the server."""

    def __init__(self, hub: LoopbackJobs) -> None:
        self.hub = hub

    @contextmanager
    def _group(self, **_: Any) -> Iterator[XetHere]:
        yield self

    new_file_download_group = new_upload_commit = _group

    def start_download_file(self, info: Any, target: str) -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(self.hub.contents[info.hash])

    def start_upload_file(self, path: str, **_: Any) -> Any:
        return self.start_upload_bytes(Path(path).read_bytes())

    def start_upload_bytes(self, content: bytes, **_: Any) -> Any:
        self.hub.contents[digest := hashlib.sha256(content).hexdigest()] = content
        info = SimpleNamespace(xet_info=SimpleNamespace(hash=digest, file_size=len(content)))
        return SimpleNamespace(result=lambda: info)


@contextmanager
def jobs_here(folder: Path) -> Iterator[LoopbackJobs]:
    """Make this process use a server with jobs as the Hub; it stops at the end, and its jobs with it."""
    import pytest
    from huggingface_hub.utils import _xet

    with LoopbackJobs(folder) as hub, in_process(hub, folder / "home"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xet, "get_xet_session", lambda: XetHere(hub))
        yield hub
