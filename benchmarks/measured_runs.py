"""The table of measured runs that `hfstrat advise` learns from, and how well it predicts data sets that were left out.

    python -m benchmarks.measured_runs [--no-new-facts]

Collects regret, classification, distill, scratch_recipes, quickstart and short_runs into
hfstrat/advisor/measured_runs.csv, and writes benchmarks/results/measured_runs.json and .md: for each kind of knowledge
(sizes alone, text scores, `--measure`) the error on each data set of a regression that has not seen it, and how often its 80 %
interval, computed from the other data sets alone, holds the measurement. What is known before a run is measured here as
`advise` measures it, and kept in measured_runs.json.

The cases SECOND of benchmarks/regret_cases.py tested the predictions, and are learned from since: the first answers in
results/regret.json are those of a table without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import classification, short_runs
from benchmarks.measure import RESULTS, machine, write
from benchmarks.memory_prediction import model_folder
from benchmarks.regret_cases import CASES, SETS, rows_of
from hfstrat.advisor import measured_runs, quality, text_scores
from hfstrat.advisor.measured_runs import CLASSES, TEXT, Run

RESULT = RESULTS / "measured_runs.json"
PARAMETERS = {"MiniLM": 22.7e6, "SmolLM2-135M": 134.5e6, "stories260K": 260_032.0}
BATCH = 16


def stored(name: str) -> dict[str, Any]:
    file = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def set_of(data: str) -> str:
    return SETS.get(data, data)


class Facts:
    """What is known before a run, measured once for each model and data."""

    def __init__(self, known: dict[str, Any], may_measure: bool) -> None:
        self.known, self.may_measure = known, may_measure

    def of(self, name: str, model: str, rows: list[dict[str, str]]) -> dict[str, Any]:
        key = f"{name} {model}"
        if key not in self.known and self.may_measure:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                self.known[key] = facts_of(model, folder)
            print(key, self.known[key], flush=True)
            file = {**stored("measured_runs"), "facts": self.known}
            RESULT.write_text(json.dumps(file, indent=1) + "\n")
        return self.known.get(key, {})


def facts_of(model: str, folder: Path) -> dict[str, Any]:
    from hfstrat.cli.advise import Request, situation_of

    (folder / "none").mkdir()
    given = Request(model_folder(model), str(folder / "train.jsonl"), memory="8GiB", reports=str(folder / "none"))
    situation = situation_of(given)
    return scores(short_runs.measured_before(situation, folder)) | words_of(situation.data)


def words_of(data: Any) -> dict[str, Any]:
    if data.outputs:
        return {"tf_idf": text_scores.tf_idf(tuple(data.texts), tuple(data.text_labels))}
    return {"ngram": text_scores.ngram_bits(tuple(data.texts))}


def scores(found: dict[str, Any]) -> dict[str, Any]:
    """The scores among what `hfstrat advise` measures."""
    if "probe" in found:
        return {"probe": found["probe"]["probe"]}
    bits = found["bits_per_byte"]["data"]
    return {"gap": bits["needed"] / bits["expected"] - 1, "base_bits": bits["needed"]}


def run_of(source: str, data: str, model: str, strategy: str, about: dict[str, Any]) -> Run:
    """A row of the table; a language model has a base, a classification has classes."""
    task = TEXT if about.get("base") or strategy == "scratch" else CLASSES
    decoder = not model.startswith("MiniLM")
    return Run(set_of(data), source, task, model, PARAMETERS.get(model, 0.0), decoder, strategy, **about)


def from_regret(facts: Facts) -> Iterator[Run]:
    for name, found in stored("regret").get("cases", {}).items():
        case = CASES[name]
        known = facts.of(name, case.model, rows_of(case)[0])
        measured, counted = found["measured"], found["metric"] == "accuracy"
        base = None if counted else measured["full"]["before"]
        classes = len({row["label"] for row in rows_of(case)[0]}) if counted else 1
        for strategy, one in measured.items():
            steps = 0 if strategy == "head" and counted else one["steps"]
            about = {"rows": found["train_rows"], "classes": classes, "steps": steps, "seen": BATCH * steps}
            yield run_of("regret", case.data, case.model, strategy, about | {"value": one["quality"], "base": base} | known)


def from_classification(facts: Facts) -> Iterator[Run]:
    """1,000 examples with SmolLM2, in batches of 32.

    MiniLM was trained there without its own pooling, and with one learning rate for the head and the rest: those runs are left
    out.
    """
    classes = {"sst2": 2, "trec6": 6, "banking77": 77, "imdb": 2}
    for key, found in stored("classification").get("runs", {}).items():
        name, way, seed = key.split("/")
        if way.startswith("minilm") or seed != "42":
            continue
        model = "SmolLM2-135M" if way.startswith("smollm2") else "MiniLM"
        strategy = way.split("-")[1]
        rows = classification_rows(name, classification.WAYS[way].get("rows"))
        known = facts.of(f"{name}-{'all' if len(rows) > 1000 else len(rows)}", model, rows)
        steps = 0 if strategy == "head" else found["steps"]
        about = {"rows": len(rows), "classes": classes[name], "steps": steps, "seen": 32 * steps}
        yield run_of("classification", name, model, strategy, about | {"value": found["metrics_after"]["accuracy"]} | known)


def classification_rows(name: str, count: int | None) -> list[dict[str, str]]:
    from benchmarks.regret_cases import table_of

    with tempfile.TemporaryDirectory() as folder:
        file = classification.DATA / classification.SETS[name]["train"]
        return table_of(classification.drawn(file, count, Path(folder)))


def from_short_runs() -> Iterator[Run]:
    runs = stored("short_runs").get("runs", {})
    for key, found in runs.items():
        name, _, rest = key.partition("/")
        if not rest or name not in short_runs.CASES:
            continue
        case, known, (strategy, _) = short_runs.CASES[name], runs[name], rest.split("/")
        counted = known["task"] == "text-classification"
        facts = scores(known) | words_of_short(name)
        steps = 0 if strategy == "head" and counted else found["steps"]
        after = found["metrics_after"]
        value = after["accuracy"] if counted else after["bits_per_byte"] if strategy == "scratch" else after["loss"]
        base = None if counted or strategy == "scratch" else base_of(runs, name)
        about = {"rows": known["rows"], "classes": known["classes"], "steps": steps, "seen": BATCH * steps}
        yield run_of("short_runs", case.data, case.model, strategy, about | {"value": value, "base": base} | facts)


@lru_cache
def words_of_short(name: str) -> dict[str, Any]:
    from hfstrat.advisor import data
    from hfstrat.recipe.data import Data

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        rows = short_runs.examples_of(short_runs.CASES[name])[0]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return words_of(data.survey(Data.model_validate({"train": str(file)}), None, 512, None))


def base_of(runs: dict[str, Any], name: str) -> float:
    """The loss of the base: that of lora before training."""
    return float(next(run["metrics_before"]["loss"] for key, run in runs.items() if key.startswith(f"{name}/lora/")))


def from_others(facts: Facts) -> Iterator[Run]:
    """Single results: the quickstart, a student of half the depth, a model from scratch."""
    known = facts.known.get("docstrings SmolLM2-135M", {})
    about = {"rows": 4648, "classes": 1, **known}
    for found in stored("quickstart").get("runs", [])[:1]:
        losses = {"value": found["metrics_after"]["loss"], "base": found["metrics_before"]["loss"]}
        yield run_of("quickstart", "docstrings", "SmolLM2-135M", "lora", {**about, "steps": 32, "seen": 512, **losses})
    runs = stored("distill").get("runs", {})
    if student := runs.get("smollm2/0.9/42"):
        losses = {"value": student["metrics_after"]["loss"], "base": runs["smollm2/teacher"]["metrics_before"]["loss"]}
        yield run_of("distill", "docstrings", "SmolLM2-135M", "distill", {**about, "steps": 16, "seen": 256, **losses})
    if found := stored("scratch_recipes").get("shakespeare"):
        ngram = facts.known.get("shakespeare stories260K", {}).get("ngram")
        about = {"rows": 2050, "classes": 1, "steps": found["steps"], "seen": 16 * found["steps"], "ngram": ngram}
        yield run_of(
            "scratch_recipes", "tinyshakespeare", "", "scratch", about | {"value": found["metrics_after"]["bits_per_byte"]}
        )


def checked(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """For each kind of knowledge, errors on data sets left out, and the share of measurements within the interval."""
    kinds = {
        "accuracy, sizes alone": (CLASSES, {"tf_idf": None, "probe": None}),
        "accuracy, with TF-IDF": (CLASSES, {"tf_idf": 0.5, "probe": None}),
        "accuracy, measured": (CLASSES, {"tf_idf": 0.5, "probe": 0.5}),
        "loss, sizes alone": (TEXT, {"gap": None}),
        "loss, measured": (TEXT, {"gap": 0.5}),
    }
    found = {}
    for name, (task, about) in kinds.items():
        like = Run("", "", task, "", 1e7, False, "lora", 1000, 2, 100, 1600)._replace(**about)
        chosen = quality.comparable(runs, like)
        learned = quality.learn(chosen)
        found[name] = {
            "runs": len(chosen),
            "sets": len({run.group for run in chosen}),
            "error": error_of(learned, task),
            "interval": {family: quality.half_width(learned.errors(family)) for family in ("lora", *extra(task, chosen))},
            "coverage": quality.coverage(learned),
            "by_set": {group: error_of_set(learned, group) for group in sorted({run.group for run in chosen})},
        }
    return found


def extra(task: str, runs: tuple[Run, ...]) -> tuple[str, ...]:
    """Strategies whose errors are counted apart."""
    return tuple(sorted({run.strategy for run in runs if quality.family(run.strategy) != "pretrained"}))


def points(one: quality.Missed) -> float:
    """The error in points of accuracy, or in percent of the loss."""
    wanted, given = (quality.to_unit(one.run.task, value) for value in (one.predicted + one.error, one.predicted))
    return 100 * (abs(wanted - given) if one.run.task == CLASSES else abs(given / wanted - 1))


def error_of(learned: quality.Learned, task: str) -> dict[str, float]:
    errors = [points(one) for one in learned.missed]
    return {"median": statistics.median(errors), "mean": float(np.mean(errors)), "worst": max(errors)}


def error_of_set(learned: quality.Learned, group: str) -> float:
    return float(np.mean([points(one) for one in learned.missed if one.run.group == group]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-new-facts", action="store_true", help="leave out what would have to be measured")
    given = parser.parse_args()
    facts = Facts(stored("measured_runs").get("facts", {}), not given.no_new_facts)
    runs = [*from_regret(facts), *from_classification(facts), *from_short_runs(), *from_others(facts)]
    measured_runs.write(runs, measured_runs.FILE)
    result = {"machine": machine(), "facts": facts.known, "checked": checked(measured_runs.read(measured_runs.FILE))}
    write("measured_runs", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = [
        "Errors on data sets that were left out, in points of accuracy or percent of the loss; the interval is computed from",
        "the other data sets alone.",
        "",
        "| prediction | runs | data sets | median error | mean | worst | within the 80 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in result["checked"].items():
        errors = " | ".join(f"{one['error'][key]:.1f}" for key in ("median", "mean", "worst"))
        lines.append(f"| {name} | {one['runs']} | {one['sets']} | {errors} | {one['coverage']:.0%} |")
    lines += ["", "Mean error by data set:", ""]
    for name, one in result["checked"].items():
        lines.append(f"- {name}: " + ", ".join(f"{group} {error:.1f}" for group, error in one["by_set"].items()) + ".")
    return lines


if __name__ == "__main__":
    main()
