"""Short runs of each strategy on data sets of many kinds: what the predictions of `hfstrat advise` are learned from.

    python -m benchmarks.short_runs [--only banking77-2000,speakers-1000] [--minutes 10]

Writes benchmarks/results/short_runs.json and .md; `python -m benchmarks.measured_runs` collects them with other results into
the table that ships with the package. Each case trains the advisor's own recipes for a few numbers of steps (a solved head
takes none), evaluates on test examples, and measures what `hfstrat advise` measures before training: the probe, TF-IDF, and how
unfamiliar texts are to a language model. One seed. All runs of a case are in one process, so that starting takes no time;
nothing is saved. Finished runs are stored in runs/benchmarks: an interrupted benchmark continues.

The cases SECOND of benchmarks/regret_cases.py are not here: they test the predictions.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measure import ROOT, machine, write
from benchmarks.memory_prediction import model_folder
from benchmarks.regret_cases import SHARED, Case, json_lines, rows_of

STORED = ROOT / "runs" / "benchmarks" / "short_runs.jsonl"
TUNED = ("partial", "lora", "full")
SEED = 7


class Short(NamedTuple):
    """Training examples of a data set, and the numbers of steps for each strategy that is trained."""

    model: str
    data: str
    rows: int | None
    steps: tuple[int, ...]
    strategies: tuple[str, ...] = TUNED
    eval_rows: int = 300


CASES = {
    "sources-200": Short("MiniLM", "sources", 200, (40,)),
    "modules-1500": Short("MiniLM", "modules", 1500, (80,)),
    "speakers-1000": Short("MiniLM", "speakers", 1000, (120,)),
    "boolq-1000": Short("MiniLM", "boolq", 1000, (120,)),
    "banking77-2000": Short("MiniLM", "banking77", 2000, (80,)),
    "gsm8k": Short("stories260K", "gsm8k", 600, (60,), ("lora", "full", "partial", "scratch", "head"), 40),
    "answers": Short("stories260K", "answers", 1000, (25,), ("lora", "full", "partial", "scratch", "head"), 40),
    "modules-200": Short("MiniLM", "modules", 200, (100,)),
    "speakers-200": Short("MiniLM", "speakers", 200, (80,)),
    "sst2-400": Short("MiniLM", "sst2", 400, (120,)),
    "trec6-300": Short("MiniLM", "trec6", 300, (120,)),
}


def modules() -> list[dict[str, str]]:
    """Docstrings of the standard library, labeled with their module: many classes of unequal size."""
    folder, rows = Path(sysconfig.get_paths()["stdlib"]), []
    for file in sorted(folder.rglob("*.py")):
        label = file.relative_to(folder).with_suffix("").parts[0]
        if label in ("test", "idlelib", "site-packages", "lib2to3", "pydoc_data", "turtledemo", "ensurepip"):
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (words := ast.get_docstring(node)):
                    rows.append({"text": words.partition("\n\n")[0][:160], "label": label})
    rows = list({row["text"]: row for row in rows}.values())
    counts = Counter(row["label"] for row in rows)
    return [row for row in rows if counts[row["label"]] >= 40]


def speakers() -> list[dict[str, str]]:
    """Speeches of Shakespeare's plays, labeled with the twelve speakers who speak most."""
    text = (SHARED / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    found = [speech.partition(":\n") for speech in re.split(r"\n\n", text)]
    rows = [{"text": words.replace("\n", " ")[:120], "label": name} for name, _, words in found if words.strip()]
    common = {name for name, _ in Counter(row["label"] for row in rows).most_common(12)}
    return [row for row in rows if row["label"] in common]


def sources() -> list[dict[str, str]]:
    """Reasons of six kinds of questions, labeled with the kind."""
    rows = json_lines(SHARED / "flan_cot" / "train.jsonl.gz")
    return [{"text": row["output"][:300], "label": row["task"]} for row in rows]


def boolq() -> list[dict[str, str]]:
    """Questions without their passage, labeled with the answer: a text tells little about its label."""
    rows = json_lines(SHARED / "commonsense_instruct" / "boolq_train.jsonl.gz")
    return [{"text": row["instruction"].partition("question: ")[2].partition("\n")[0], "label": row["answer"]} for row in rows]


def answers() -> list[dict[str, str]]:
    rows = json_lines(SHARED / "flan_cot" / "train.jsonl.gz")
    return [{"prompt": row["instruction"], "completion": row["output"]} for row in rows if len(row["instruction"]) < 400]


def gsm8k() -> list[dict[str, str]]:
    with gzip.open(SHARED / "gsm8k" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]


OWN: dict[str, Callable[[], list[dict[str, str]]]] = {
    "modules": modules,
    "speakers": speakers,
    "sources": sources,
    "boolq": boolq,
    "answers": answers,
    "gsm8k": gsm8k,
}


def examples_of(case: Short) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    if case.data not in OWN:
        return rows_of(Case(case.model, case.data, case.rows, case.eval_rows, 0))
    rows = random.Random(SEED).sample(found := OWN[case.data](), len(found))
    return rows[case.eval_rows :][: case.rows], rows[: case.eval_rows]


def facts_of(name: str, folder: Path) -> Any:
    """Write the examples; return what the advisor knows of them."""
    from hfstrat.cli.advise import Request, situation_of

    case = CASES[name]
    for part, rows in zip(("train", "eval"), examples_of(case), strict=True):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "none").mkdir(exist_ok=True)
    given = Request(model_folder(case.model), str(folder / "train.jsonl"), memory="8GiB", reports=str(folder / "none"))
    return situation_of(given)


def measured_before(situation: Any, folder: Path) -> dict[str, Any]:
    """What `hfstrat advise` finds out before training, apart from the time of steps."""
    from hfstrat.advisor import child, measure
    from hfstrat.recipe.load import load_recipe

    request = measure._request(situation, {})
    if "probe" in request:
        return {"probe": child.probe(load_recipe("probe.yaml", [f"output_dir={folder}/probe"], request["probe"]), 600)}
    texts = {"data": request["texts"], "reference": child.reference_texts(8)}
    return {"bits_per_byte": child.bits_per_byte(request["model"], texts, 10.0, request["longest"])}


def train(situation: Any, strategy: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train the advisor's recipe for some steps; return what its report would say."""
    from hfstrat.advisor import candidates, decide, recipes
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import measure, setup
    from hfstrat.run import train as run_train
    from hfstrat.strategies import defaults
    from hfstrat.trainer.distributed import join_world

    fitted = decide.fit(candidates.propose(strategy, situation.model, situation.data), situation)
    recipe = recipes.recipe_of(fitted, situation, {"max_steps": steps, "eval_steps": 1.0} if steps else {})
    recipe["data"]["eval"] = str(folder / "eval.jsonl")
    recipe["evaluation"] = {"samples": 0, **({"baselines": False, "eval_on_start": False} if situation.data.outputs else {})}
    recipe["output_dir"] = str(folder / f"{strategy}-{steps}")
    job = setup.set_up(load_recipe("short.yaml", [], defaults.recipe_text("a short run", recipe)), join_world(), overwrite=True)
    seconds = run_train.fit(job, [])
    result = measure.conclude(job, seconds)[0]
    job.release()
    keys = ("metrics_before", "metrics_after", "steps", "train_seconds", "step_seconds", "tokens", "trainable_parameters")
    return {key: getattr(result, key) for key in keys}


def one(name: str) -> None:
    """Run what is missing of a case, and store each result."""
    done, case = stored(), CASES[name]
    with tempfile.TemporaryDirectory(prefix=f"short-{name}-") as place:
        folder = Path(place)
        with contextlib.redirect_stdout(io.StringIO()):
            situation = facts_of(name, folder)
            if name not in done:
                data = situation.data
                about = {
                    "rows": data.rows,
                    "classes": max(1, len(data.labels)),
                    "mean_length": data.mean_length,
                    "task": data.task,
                }
                keep(name, about | measured_before(situation, folder))
            solved = [("head", 0)] if data_has_head(situation) else []
            for strategy, steps in [*solved, *((each, count) for count in case.steps for each in case.strategies)]:
                key = f"{name}/{strategy}/{steps}"
                if key not in done:
                    started = time.process_time()
                    keep(key, train(situation, strategy, steps, folder) | {"cpu": time.process_time() - started})


def data_has_head(situation: Any) -> bool:
    return bool(situation.data.outputs)


def keep(key: str, found: dict[str, Any]) -> None:
    STORED.parent.mkdir(parents=True, exist_ok=True)
    with STORED.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"name": key, "found": found}) + "\n")
    print(key, {name: found[name] for name in ("metrics_after", "probe", "cpu") if name in found}, file=sys.stderr, flush=True)


def stored() -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in STORED.read_text().splitlines()] if STORED.exists() else []
    return {line["name"]: line["found"] for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(CASES), help="cases")
    parser.add_argument("--minutes", type=float, default=600.0, help="no new case starts after them")
    parser.add_argument("--one")
    given = parser.parse_args()
    if given.one:
        one(given.one)
        return
    began = time.monotonic()
    for name in given.only.split(","):
        if time.monotonic() - began < 60 * given.minutes:
            subprocess.run([sys.executable, "-m", "benchmarks.short_runs", "--one", name], cwd=ROOT, check=False)
    runs = stored()
    result = {"machine": machine(), "cases": {name: case._asdict() for name, case in CASES.items()}, "runs": runs}
    write("short_runs", result, lines_of(result))


def lines_of(result: dict[str, Any]) -> list[str]:
    lines = ["| run | steps | before | after |", "|---|---|---|---|"]
    for key, found in result["runs"].items():
        if "/" in key:
            name, strategy, _ = key.split("/")
            metric = "accuracy" if "accuracy" in found["metrics_after"] else "loss"
            before = (found["metrics_before"] or {}).get(metric)
            cells = ["-" if value is None else f"{value:.3f}" for value in (before, found["metrics_after"][metric])]
            lines.append(f"| {name} {strategy} | {found['steps']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
