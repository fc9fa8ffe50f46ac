"""`hfstrat runs`: what was trained under a folder, and what differs between two runs. Reads reports; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError

SORTS = ("name", "loss", "time", "cost")
APART = ("output_dir", "hub")  # of a recipe: where things go, not what is done
UNLIKE = ("data_sha256",)  # of an environment: named by file, said with the data


def find(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every run under a folder (or the folder itself) with its report.

    Raises:
        UserError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that your output_dir lie in")
    runs = []
    for file in sorted(folder.rglob("report.json")):
        report = _read(file)
        if report:
            runs.append((file.parent, report))
    if not runs:
        raise UserError(f"{folder}: no run below it (no report.json of hfstrat)")
    return runs


def _read(file: Path) -> dict[str, Any]:
    """A report; nothing where the file is another's, broken, or a published copy inside a result."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(report, dict) and isinstance(report.get("run"), dict) and "result" in report
    return report if known and "recipe" in report["run"] else {}


def row(run: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a run; numbers are None where a run did not come so far."""
    recipe, result = report["run"]["recipe"], report["result"]
    before, after = result.get("metrics_before") or {}, result.get("metrics_after") or {}
    strategy = recipe["strategy"]
    inner = strategy.get("student") or {}
    data = recipe["data"]["train"]
    sources = data if isinstance(data, list) else [data]
    names = [Path(each["path"] if isinstance(each, dict) else str(each)).name for each in sources]
    share = result.get("trainable_parameters"), result.get("total_parameters")
    return {
        "run": str(run),
        "status": result.get("status", "?"),
        "strategy": strategy["name"] + (f"/{inner['name']}" if isinstance(inner, dict) and inner.get("name") else ""),
        "model": Path(recipe["model"].get("name_or_path") or "-").name,
        "data": names[0] + (f" +{len(names) - 1}" if len(names) > 1 else ""),
        "before": before.get("loss"),
        "loss": after.get("loss"),
        "metric": _metric(after),
        "learnt": share[0] / share[1] if all(share) else None,
        "seconds": result.get("total_seconds"),
        "bytes": result.get("peak_memory_bytes"),
        "finished": (run / "report.json").stat().st_mtime,
    }


def _metric(after: dict[str, float]) -> str:
    """What tells most of a task, beside the loss."""
    for key, style in (
        ("accuracy", "accuracy {:.1%}"),
        ("bits_per_byte", "{:.3f} bits/byte"),
        ("perplexity", "perplexity {:.2f}"),
    ):
        if key in after:
            return style.format(after[key])
    return "-"


def table(folder: Path, sort: str) -> list[str]:
    """The runs under a folder as lines.

    Raises:
        UserError: an order that there is not, or no runs.
    """
    if sort not in SORTS:
        raise UserError(f"--sort: {sort}; expected one of {', '.join(SORTS)}")
    rows = [row(run, report) for run, report in find(folder)]
    keys = {
        "name": lambda each: each["run"],
        "loss": lambda each: (each["loss"] is None, each["loss"] or 0.0),
        "time": lambda each: -each["finished"],
        "cost": lambda each: (each["seconds"] is None, each["seconds"] or 0.0),
    }
    head = ["run", "strategy", "model", "data", "loss before", "after", "metric", "learnt", "time", "memory"]
    cells = [head]
    for each in sorted(rows, key=keys[sort]):
        name = str(Path(each["run"]).relative_to(folder)) if each["run"] != str(folder) else folder.name
        cells.append(
            [
                name + ("" if each["status"] == "done" else f" ({each['status']})"),
                each["strategy"],
                each["model"],
                each["data"],
                _number(each["before"], "{:.4f}"),
                _number(each["loss"], "{:.4f}"),
                each["metric"],
                _number(each["learnt"], "{:.2%}"),
                _number(each["seconds"], "{:,.0f} s"),
                _number(each["bytes"] and each["bytes"] / 2**30, "{:.2f} GiB"),
            ]
        )
    return _aligned(cells)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else style.format(value)


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def diff(one: Path, two: Path) -> list[str]:
    """What differs between two runs: recipe, data, environment and result.

    Raises:
        UserError: one of them is no run.
    """
    reports = []
    for run in (one, two):
        report = _read(run / "report.json")
        if not report:
            raise UserError(f"{run}: no run (no report.json of hfstrat in it)")
        reports.append(report)
    lines: list[str] = []
    for title, parts in (
        ("recipe", [_recipe(report) for report in reports]),
        ("data", [_data(report) for report in reports]),
        ("environment", [_environment(report) for report in reports]),
        ("result", [_result(report) for report in reports]),
    ):
        left, right = parts
        keys = [key for key in [*left, *(key for key in right if key not in left)] if left.get(key) != right.get(key)]
        if keys:
            cells = [
                [f"  {key}", _said(left.get(key)), _said(right.get(key)), _change(left.get(key), right.get(key))]
                for key in keys
            ]
            lines += [title, *_aligned(cells)]
    same = ["recipe, data, environment and result are the same"]
    return [f"a: {one}", f"b: {two}", *(lines or same)]


def _recipe(report: dict[str, Any]) -> dict[str, Any]:
    return _flat({key: value for key, value in report["run"]["recipe"].items() if key not in APART})


def _data(report: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints and counts: the same file name may hold other rows."""
    data = report["run"].get("data") or {}
    kept = ("rows_kept", "tokens", "supervised", "sha256")
    return {f"{part}.{key}": (data.get(part) or {}).get(key) for part in ("train", "eval") for key in kept}


def _environment(report: dict[str, Any]) -> dict[str, Any]:
    return _flat({key: value for key, value in (report.get("environment") or {}).items() if key not in UNLIKE})


def _result(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a result that a person compares."""
    result = report["result"]
    names = [
        *("status", "steps", "best_step", "train_seconds", "total_seconds", "tokens", "tokens_per_second"),
        *("peak_memory_bytes", "trainable_parameters", "total_parameters", "artefact_bytes"),
    ]
    found: dict[str, Any] = {name: result.get(name) for name in names}
    for part in ("metrics_before", "metrics_after"):
        found |= {f"{part}.{key}": value for key, value in (result.get(part) or {}).items()}
    return found


def _flat(tree: dict[str, Any], under: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{under}{key}.") if isinstance(value, dict) and value else {f"{under}{key}": value}
    return flat


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "-" if value is None else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _change(one: Any, two: Any) -> str:
    """The difference of two numbers, as a share where that means something."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, two))
    return f"{two - one:+.4g}" + (f" ({two / one - 1:+.1%})" if one else "") if numbers else ""
