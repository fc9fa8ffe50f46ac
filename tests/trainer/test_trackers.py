"""Trackers by name: nothing is sent without a request, and the run continues if a tracker fails."""

from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hfstrat.errors import UserError
from hfstrat.run import preflight
from hfstrat.trainer import callbacks

FEW = ("training.max_steps=2", "evaluation.samples=0")


def test_a_missing_tracker_is_reported_first(recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hfstrat.run import preflight

    monkeypatch.setitem(preflight.TRACKER_PACKAGES, "wandb", "no_such_package")
    with pytest.raises(UserError, match="report_to: wandb is not installed: pip install no_such_package"):
        preflight.check(recipe("training.report_to=[wandb]"))
    (tmp_path / "a_tracker_folder").mkdir()  # as wandb creates one where it runs
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(preflight.TRACKER_PACKAGES, "wandb", "a_tracker_folder")
    with pytest.raises(UserError, match="is not installed"):
        preflight.check(recipe("training.report_to=[wandb]"))


def test_a_tracker_does_not_ask_for_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    callbacks.prepare_trackers(["mlflow"])
    assert "WANDB_MODE" not in os.environ
    callbacks.prepare_trackers(["wandb", "mlflow"])
    assert os.environ["WANDB_MODE"] == "offline"


class Recording(TrainerCallback):  # type: ignore[misc]
    """A tracker that fails at one event, or when it is created."""

    breaks: str = ""
    seen: list[str] = []

    def __init__(self) -> None:
        self._at("being made")

    def _at(self, event: str) -> None:
        self.seen.append(event)
        if event == self.breaks:
            raise OSError("no route to it\nat all")

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._at("on_train_begin")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._at("on_log")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._at("on_train_end")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(callbacks, "get_reporting_integration_callbacks", lambda names: [Recording])
    monkeypatch.setitem(preflight.TRACKER_PACKAGES, "trackio", "json")  # an installed package
    monkeypatch.setattr(Recording, "breaks", "")
    monkeypatch.setattr(Recording, "seen", [])
    return Recording


@pytest.mark.parametrize("event", ["being made", "on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_is_done_without(tracker: type[Recording], event: str) -> None:
    tracker.breaks = event
    printed: list[str] = []
    (one,) = callbacks.tracker_callbacks(["trackio"], printed.append)
    for name in ("on_init_end", "on_train_begin", "on_log", "on_log", "on_train_end", "on_log"):
        assert getattr(one, name)(None, None, None) is None
    assert printed == ["tracker   trackio failed, and the run continues without it: no route to it"]
    assert tracker.seen[-1] == event


def test_a_run_with_a_tracker_that_fails(tracker: type[Recording], recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers.runs import run

    tracker.breaks = "on_log"
    whole = run(recipe("training.report_to=[trackio]", *FEW))
    assert whole is not None
    assert whole["result"]["status"] == "done"
    assert tracker.seen == ["being made", "on_train_begin", "on_log"]
    assert capsys.readouterr().out.count("tracker   trackio failed") == 1


def test_what_comes_after_training_begins_no_second_run(tracker: type[Recording], recipe: Any) -> None:
    from helpers.runs import run

    run(recipe("training.report_to=[trackio]", *FEW))
    assert tracker.seen.count("on_log") > 2
    assert tracker.seen[-1] == "on_train_end"


# the real ones, where they are installed


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Requested addresses outside this machine; none of them answers."""
    asked: list[Any] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        asked.append(address)
        raise OSError("there is no network")

    def unknown(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host in (None, "", "127.0.0.1", "::1", "localhost", "0.0.0.0"):
            return look_up(host, *args, **kwargs)
        asked.append(host)
        raise socket.gaierror("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    return asked


@pytest.mark.parametrize(
    ("name", "variable", "where"),
    [
        ("tensorboard", "", "run"),
        ("trackio", "TRACKIO_DIR", "trackio"),
        ("wandb", "WANDB_DIR", "wandb"),
        ("mlflow", "MLFLOW_TRACKING_URI", "mlruns"),  # a folder: mlflow-skinny has no database
    ],
)
def test_losses_are_kept_on_this_machine(
    name: str,
    variable: str,
    where: str,
    recipe: Any,
    tmp_path: Path,
    offline: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec(preflight.TRACKER_PACKAGES[name]) is None:
        pytest.skip(f"needs {name}")
    from helpers.runs import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / where))
    whole = run(recipe(f"training.report_to=[{name}]", *FEW))
    assert whole is not None
    assert whole["result"]["status"] == "done"
    assert "failed" not in capsys.readouterr().out
    assert offline == []
    files = [file for file in (tmp_path / where).rglob("*") if file.is_file()]
    assert any(b"loss" in file.name.encode() + file.read_bytes() for file in files if file.suffix not in (".json", ".yaml"))
