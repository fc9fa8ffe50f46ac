"""A Hub id that is misspelled, gated or unreachable is refused at once; a loopback server returns the Hub's errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ANSWERS = {  # repository: status, error code
    "me/gated": (403, "GatedRepo"),
    "me/nothing": (404, "RepoNotFound"),
    "me/there": (404, "RevisionNotFound"),
    "me/broken": (500, None),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, code = next((answer for name, answer in ANSWERS.items() if name in self.path), (404, "RepoNotFound"))
        body = json.dumps({"error": "no"}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    """Accepts connections and never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def check(endpoint: str, model: str, tmp_path: Path, *overrides: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\nstrategy: lora\ndata: {data}\noutput_dir: {tmp_path / 'run'}\n")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "hfstrat", "train", str(recipe), *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [
        ("me/gated", (), "gated; request access"),
        ("me/nothing", (), "no such model on the Hub"),
        ("me/there", ("model.revision=v9",), "has no revision v9"),
        ("me/broken", (), "the Hub cannot be reached"),
    ],
)
def test_responses_are_explained(server: str, tmp_path: Path, model: str, overrides: tuple[str, ...], words: str) -> None:
    done = check(server, model, tmp_path, *overrides)
    assert done.returncode == 2
    assert words in done.stderr
    assert "recipe.yaml:1: model" in done.stderr or "command line" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_hub_that_never_responds_is_not_awaited(silent: str, tmp_path: Path) -> None:
    """One request of four seconds, not a minute of retries; the limit is generous because the machine may be busy."""
    done = check(silent, "me/slow", tmp_path, timeout=25)
    assert done.returncode == 2
    assert "the Hub cannot be reached" in done.stderr
