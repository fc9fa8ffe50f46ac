"""The cache: an entry is built once, used only if complete, never removed while in use, and the size stays within the limit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl

from hfstrat import errors
from hfstrat.cli import cache
from hfstrat.data import cache as data_cache
from hfstrat.data.prepare import prepare
from hfstrat.errors import RunError, UserError
from hfstrat.recipe.data import Data

SIZE = 100_000


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HFSTRAT_CACHE_MAX", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def make() -> Callable[..., data_cache.Entry]:
    """`make("a")` fetches an entry of SIZE bytes and releases it, as the end of a process would; `make.built` lists the
    builds."""
    built: list[str] = []
    clock = [time.time() - 10**6]

    def get(name: str, kind: str = "rows", keep: bool = False) -> data_cache.Entry:
        def build(target: Path) -> dict[str, Any]:
            built.append(name)
            target.write_bytes(name.encode() * SIZE)
            return {"of": [name, None]}

        entry = data_cache.fetch(kind, name, f"made of {name}", build)
        clock[0] += 1  # a file system may count in seconds
        os.utime(data_cache.note_path(entry.path), (clock[0], clock[0]))
        if not keep:
            data_cache.release(entry.path)
        return entry

    get.built = built  # type: ignore[attr-defined]
    return get


def names() -> list[str]:
    return [entry.name for entry in data_cache.entries()]


def test_an_entry_is_built_once_and_returned_complete(make: Any, place: Path) -> None:
    first, second = make("a"), make("a")
    assert make.built == ["a"]
    assert first.path == second.path
    assert second.path.read_bytes() == b"a" * SIZE
    assert (second.kind, second.description, second.value) == ("rows", "made of a", {"of": ["a", None]})
    assert second.size == sum(file.stat().st_size for file in place.iterdir())
    make("a", kind="features")  # the same name of another kind
    assert make.built == ["a", "a"]
    assert names() == ["rows-a", "features-a"]


def test_the_least_recently_used_entry_is_removed_and_built_again(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE_MAX", "350kB")
    for name in "abc":
        make(name)
    assert capsys.readouterr().err == ""
    make("a")
    make("d")
    assert names() == ["rows-c", "rows-a", "rows-d"]
    printed = capsys.readouterr().err
    assert "removed rows-b" in printed
    assert "made of b" in printed
    assert "HFSTRAT_CACHE_MAX" in printed
    assert make("b").path.read_bytes() == b"b" * SIZE
    assert make.built == ["a", "b", "c", "d", "b"]


def test_entries_in_use_are_not_removed(make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE_MAX", "150kB")
    first = make("a", keep=True)
    make("b", keep=True)
    assert names() == ["rows-a", "rows-b"]
    assert "in use" in capsys.readouterr().err
    assert cache.remove(["rows-a"], False, None)[0].startswith("in use, kept")
    data_cache.release(first.path)
    make("c", keep=True)
    assert names() == ["rows-b", "rows-c"]


def test_one_process_builds_and_the_others_wait(make: Any, place: Path) -> None:
    built: list[int] = []

    def build(target: Path) -> int:
        built.append(1)
        time.sleep(0.2)
        target.write_bytes(b"x")
        return len(built)

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(data_cache.fetch("rows", "a", "", build).value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (built, found) == ([1], [1] * 4)
    assert sorted(path.name for path in place.iterdir()) == ["rows-a.arrow", "rows-a.json"]


KILLED = """
import os, pathlib
from hfstrat.data import cache
def build(target):
    target.write_bytes(b"half")
    os._exit(9)
cache.fetch("rows", "a", "half", build)
"""


def test_an_unfinished_entry_is_never_used(make: Any, place: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED], check=False).returncode == 9
    assert len(list(place.iterdir())) == 2  # the unfinished build and its lock
    assert names() == []
    assert make("a").path.read_bytes() == b"a" * SIZE
    assert sorted(path.name for path in place.iterdir()) == ["rows-a.arrow", "rows-a.json"]


@pytest.mark.parametrize("lost", [".arrow", ".json"])
def test_an_entry_without_note_or_payload_is_built_again(make: Any, place: Path, lost: str) -> None:
    (place / make("a").path.with_suffix(lost).name).unlink()
    assert data_cache.entries()[0].size > 0
    assert make("a").path.read_bytes() == b"a" * SIZE
    assert make.built == ["a", "a"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("[Errno 28] No space left on device")]
)
def test_a_full_disk_has_an_exit_code_and_leaves_nothing(place: Path, error: OSError) -> None:
    def build(target: Path) -> None:
        target.write_bytes(b"half")
        raise error

    with pytest.raises(RunError, match=r"the disk is full: .* has no room for my rows") as caught:
        data_cache.fetch("rows", "a", "my rows", build)
    assert caught.value.code == errors.DISK_FULL
    assert list(place.iterdir()) == []


def test_data_that_do_not_fit_on_the_disk_are_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"the cat {n}"} for n in range(200)])
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    with pytest.raises(UserError, match=r"rows\.jsonl.* about .* kB are needed, but only 5\.00 kB are free") as caught:
        prepare(Data(train=str(file)), make_tokenizer(), seed=0)
    assert caught.value.code == errors.USER
    assert list(place.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("HFSTRAT_CACHE", str(place))
    prepare(Data(train=str(file)), make_tokenizer(), seed=0)
    monkeypatch.setattr(data_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000))
    prepare(Data(train=str(file)), make_tokenizer(), seed=0)  # a cached entry needs no space


@pytest.mark.parametrize("at", ["first", "last", "cut", "longer"])
def test_a_damaged_large_payload_is_built_again(make: Any, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setattr(data_cache, "CHUNK", 1000)
    monkeypatch.setattr(data_cache, "SAMPLES", 5)
    file = make("a").path
    content = bytearray(file.read_bytes())
    if at in ("first", "last"):
        content[0 if at == "first" else -1] ^= 1
    file.write_bytes(content[:-1] if at == "cut" else content + b"a" * (at == "longer"))
    assert make("a").path.read_bytes() == b"a" * SIZE
    assert make.built == ["a", "a"]


@pytest.mark.parametrize(
    ("text", "size"), [("50GB", 5e10), ("800 mb", 8e8), ("1.5T", 1.5e12), ("12", 12), ("none", float("inf")), ("", 5e10)]
)
def test_size_limits_are_parsed(monkeypatch: pytest.MonkeyPatch, text: str, size: float) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE_MAX", text)
    assert data_cache.size_limit() == size


@pytest.mark.parametrize("text", ["much", "-1GB", "5 GiB"])
def test_invalid_size_limits_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HFSTRAT_CACHE_MAX", text)
    with pytest.raises(UserError, match="HFSTRAT_CACHE_MAX"):
        data_cache.size_limit()


def test_entries_are_listed_and_removed(make: Any, place: Path) -> None:
    assert "0 entries" in cache.lines()[0]
    for name in ("abcd" * 8, "abce" * 8, "ffff" * 8):
        make(name, kind="hidden-states")
    (place / "old.json").write_text("{}")  # of another version
    lines = cache.lines()
    assert "4 entries" in lines[-1]
    assert "at most 50.0 GB" in lines[-1]
    assert any("hidden-states-abcdabcdabcd" in line and "3.20 MB" in line and "11 d ago" in line for line in lines)
    with pytest.raises(UserError, match="2 entries begin"):
        cache.remove(["hidden-states-abc"], False, None)
    with pytest.raises(UserError, match="no such entry"):
        cache.remove(["rows-1"], False, None)
    with pytest.raises(UserError, match="--all"):
        cache.remove([], False, None)
    with pytest.raises(UserError, match="--older-than"):
        cache.remove([], False, "soon")
    assert cache.remove(["hidden-states-abcd"], False, None)[0].startswith("removed")
    assert len(data_cache.entries()) == 3
    cache.remove([], False, "1h")
    assert names() == ["old"]
    cache.remove([], True, None)
    assert list(place.iterdir()) == []


def test_the_commands(make: Any) -> None:
    make("a")
    code = (
        "import sys; from hfstrat.cli.main import app; app(sys.argv[1:], standalone_mode=False); print('torch' in sys.modules)"
    )
    for words, printed in ((["ls"], "made of a"), (["rm", "--all"], "removed  rows-a"), (["ls"], "0 entries")):
        done = subprocess.run([sys.executable, "-c", code, "cache", *words], capture_output=True, text=True, check=True)
        assert printed in done.stdout
        assert done.stdout.endswith("False\n")
    assert names() == []


def test_a_note_is_json(make: Any) -> None:
    note = json.loads(data_cache.note_path(make("a").path).read_text())
    assert set(note) == {"kind", "description", "created", "sha256", "value"}
