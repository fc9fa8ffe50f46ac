"""`--measure`: a child process takes real steps and asks the base about the texts; what it found, in words and numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from hfstrat.advisor import candidates, fitting, recipes, speed
from hfstrat.advisor.verdict import Advice, Situation
from hfstrat.errors import UserError

PROBED = 600  # rows
TEXTS = 48
LARGEST = 2e9  # parameters of a model that is measured on a CPU


def measure(situation: Situation, wanted: list[str], seconds: float) -> dict[str, Any]:
    """Rates by strategy (operations a second), `unlike`, `probe_gain`, and `lines` that say so.

    Raises:
        UserError: nothing to measure with, or the child ended without an answer.
    """
    model, data = situation.model, situation.data
    if model.by_hand or data.by_hand or model.folder is None:
        raise UserError("--measure: it needs a model folder and data; sizes given by hand cannot be measured")
    if model.parameters > LARGEST and situation.device.is_cpu:
        raise UserError(f"--measure: {model.parameters:,} parameters are too many to measure here; leave it out")
    able = {name: advice for name in wanted if (advice := _advice(situation, name)) is not None}
    request = _request(situation, able, seconds)
    found = _ask(request)
    loads = {name: _load(situation, advice) for name, advice in able.items()}
    rates = {
        name: loads[name] * one["tokens"] / one["seconds"]
        for name, one in found["rates"].items()
        if one["seconds"] and one["tokens"]
    }
    return {"rates": rates, "raw": found, **_findings(found)}


def _advice(situation: Situation, name: str) -> Advice | None:
    """The strategy as it would be run; None where it cannot be, or where there are no steps to time."""
    candidate = candidates.make(name, situation.model, situation.data)
    if candidate.reason or candidate.learning is None or candidate.learning.body_once or candidate.learning.teacher:
        return None  # what is computed once would be computed for all rows first
    fit = fitting.fit(candidate, situation.data, situation.device, situation.limit, situation.sharing, situation.compute)
    return Advice(name, candidate, fit=fit) if fit.fits_here else None


def _load(situation: Situation, advice: Advice) -> float:
    """Operations a token of the steps that were timed."""
    candidate, data = advice.candidate, situation.data
    assert candidate.model is not None
    assert candidate.learning is not None
    assert advice.fit is not None
    learning = candidate.learning._replace(body_once=False, keeps_prefix=False)
    recompute = advice.fit.shape.recompute
    return speed.work(candidate.model, learning, data.mean_length, data.supervised_share, recompute).training


def _request(situation: Situation, able: dict[str, Advice], seconds: float) -> dict[str, Any]:
    data, parts = situation.data, len(able) + 1
    found: dict[str, Any] = {
        "recipes": {name: _steps_recipe(situation, advice) for name, advice in able.items()},
        "seconds": seconds / parts,
        "model": str(situation.model.folder),
        "longest": min(data.max_length, situation.model.context, 512),
    }
    if data.labels and not data.many:
        found |= {"probe": _probe_recipe(situation), "probe_rows": PROBED}
    if not situation.model.is_encoder and data.task == "causal-lm":
        found["texts"] = data.texts[:: max(1, len(data.texts) // TEXTS)][:TEXTS]
    return found


def _steps_recipe(situation: Situation, advice: Advice) -> str:
    """The recipe that would be written, without evaluations and checkpoints on the way."""
    recipe = recipes.recipe_of(advice, situation)
    recipe["training"] = {
        **advice.fit.settings,  # type: ignore[union-attr]
        "max_steps": 10_000,
        "eval_steps": 10_000,
        "load_best_model_at_end": False,
        "resume": "never",
    }
    if "precompute" in advice.candidate.section_keys:
        recipe["strategy"] = {**recipe["strategy"], "precompute": "off"}
    recipe["evaluation"] = {"before": False, "samples": 0, "max_rows": 16}
    return yaml.safe_dump({**recipe, "output_dir": "OUTPUT"})


def _probe_recipe(situation: Situation) -> str:
    data = {"train": recipes.full_path(situation.data.source), "max_length": situation.data.max_length}
    recipe = {"task": situation.data.task, "model": recipes.full_path(situation.model.name), "strategy": "full", "data": data}
    return yaml.safe_dump({**recipe, "output_dir": "OUTPUT"})


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hfstrat-measure-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        words = [sys.executable, "-m", "hfstrat.advisor.measured", str(file)]
        ended = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--measure: the measuring process ended with code {ended.returncode}: {last}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _findings(found: dict[str, Any]) -> dict[str, Any]:
    """What the rules take up, and lines for people."""
    lines = [
        f"{name}: {one['tokens'] / one['seconds']:,.0f} tokens/s, by {one['passes']:.0f} passes"
        for name, one in found["rates"].items()
        if one["seconds"]
    ]
    lines += [f"{name}: no steps could be taken: {words}" for name, words in found["failed"].items()]
    made: dict[str, Any] = {}
    if (bits := found.get("bits_per_byte")) and bits["data"]["expected"]:
        needed, expected = bits["data"]["needed"], bits["data"]["expected"]
        made["unlike"] = needed / expected - 1
        lines.append(
            f"the base needs {needed:.3f} bits a byte for these texts and {bits['reference']['needed']:.3f} for Python's "
            f"documentation; of these it expected {expected:.3f} ({made['unlike']:+.0%}; about 0 where texts are of a kind "
            "that it was trained on)"
        )
    if probe := found.get("probe"):
        made["probe_gain"] = probe["probe"] - max(probe["tf_idf"], probe["majority"])
        lines.append(
            f"a probe ({probe['best']}) on {probe['rows']:,} rows, cross-validated: {probe['probe']:.1%}; TF-IDF and logistic "
            f"regression {probe['tf_idf']:.1%}, majority {probe['majority']:.1%}"
        )
        lines.append(_curve({int(count): right for count, right in probe["curve"].items()}))
    return made | {"lines": lines}


def _curve(curve: dict[int, float]) -> str:
    """The learning curve, and whether more data would help: what the last doubling of the rows brought."""
    counts = sorted(curve)
    said = ", ".join(f"{curve[count]:.1%} with {count:,} rows" for count in counts)
    if len(counts) < 2:
        return f"learning curve: {said}"
    gain = curve[counts[-1]] - curve[counts[-2]]
    more = "more rows would help" if gain > 0.01 else "more rows would bring the probe little"
    return f"learning curve: {said}: {more} ({100 * gain:+.1f} points by the last doubling)"
