"""The runs below a folder, and the differences of two runs, read from their reports alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hub_runs import finished_run

from hfstrat.cli import runs
from hfstrat.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two finished runs, one that failed, and files that are no reports of ours."""
    finished_run(tmp_path / "a")
    second = finished_run(tmp_path / "deep" / "b", strategy={"name": "full"}, seed=7)
    change(second, loss=1.5, total_seconds=3.0)
    failed = finished_run(tmp_path / "c")
    report = json.loads((failed / "report.json").read_text())
    report = {"run": {"recipe": report["run"]["recipe"]}, "result": {"status": "non-finite", "message": "no"}}
    (failed / "report.json").write_text(json.dumps(report))
    for name, text in {"broken": "{", "other": '{"run": 3}', "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    return tmp_path


def change(run: Path, loss: float | None = None, **result: Any) -> None:
    report = json.loads((run / "report.json").read_text())
    report["result"] |= result
    if loss:
        report["result"]["metrics_after"]["loss"] = loss
    (run / "report.json").write_text(json.dumps(report))


def test_runs_are_listed_with_costs_and_results(folder: Path) -> None:
    head, *lines = runs.table(folder, "name")
    assert head.split()[:4] == ["run", "strategy", "model", "data"]
    assert [line.split()[0] for line in lines] == ["a", "c", "deep/b"]
    assert lines[0].split()[1:6] == ["lora", "Tiny-Base", "train.jsonl", "3.5000", "2.5000"]
    assert "2.00%" in lines[0]
    assert "14s" in lines[0]
    assert "1.00 GiB" in lines[0]
    assert "(non-finite)" in lines[1]


@pytest.mark.parametrize(("sort", "order"), [("loss", ["deep/b", "a", "c"]), ("cost", ["deep/b", "a", "c"])])
def test_runs_are_sorted_and_those_without_a_result_come_last(folder: Path, sort: str, order: list[str]) -> None:
    assert [line.split()[0] for line in runs.table(folder, sort)[1:]] == order


def test_the_latest_first(folder: Path) -> None:
    os.utime(folder / "deep/b/report.json", (10, 10))
    os.utime(folder / "c/report.json", (30, 30))
    os.utime(folder / "a/report.json", (20, 20))
    assert [line.split()[0] for line in runs.table(folder, "time")[1:]] == ["c", "a", "deep/b"]


def test_what_differs(folder: Path) -> None:
    printed = runs.diff(folder / "a", folder / "deep/b")
    text = "\n".join(" ".join(line.split()) for line in printed)
    assert "strategy.name lora full" in text
    assert "seed 42 7" in text
    assert "metrics_after.loss 2.5 1.5 -1 (-40.0%)" in text
    assert "total_seconds 14 3 -11" in text
    assert "output_dir" not in text
    assert "environment" not in printed
    assert runs.diff(folder / "a", folder / "a")[2:] == ["recipe, data, environment and result are identical"]


def test_other_rows_under_the_same_name_differ(folder: Path) -> None:
    other = finished_run(folder / "d")
    report = json.loads((other / "report.json").read_text())
    report["run"]["data"]["train"]["sha256"] = "77" * 32
    (other / "report.json").write_text(json.dumps(report))
    assert any("train.sha256" in line for line in runs.diff(folder / "a", other))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: runs.table(folder / "nowhere", "name"), "no such folder"),
        (lambda folder: runs.table(folder / "broken", "name"), "no run below this folder"),
        (lambda folder: runs.table(folder, "size"), "expected one of name, loss, time, cost"),
        (lambda folder: runs.diff(folder / "a", folder / "broken"), "not a report"),
    ],
)
def test_folders_that_are_no_runs_are_refused(folder: Path, call: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(folder)


def test_the_command_line_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from hfstrat.cli import main as cli; sys.argv = ['hfstrat', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    code = end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\nsys.exit(code)"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "runs", *words], capture_output=True, text=True, cwd=folder, check=False
        )

    assert "deep/b" in run(".").stdout
    assert "strategy.name" in run("diff", "a", "deep/b").stdout
    assert run("diff", "a").returncode == 2
    assert "expected two runs" in run("diff", "a").stderr
    assert run().returncode == 2, "there is no folder runs here"
