"""What `hfstrat advise` measures: real training steps, the fit of the texts to the base, and a probe on its features.

A child process measures (`hfstrat.advisor.child`), since only it imports torch. This process ends it when the time is over, and
turns what it has answered by then into operations per second, scores for the prediction of quality, and lines of text.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hfstrat.advisor import candidates, decide, recipes, speed
from hfstrat.advisor.decide import Fitted, Measured, Situation
from hfstrat.errors import UserError
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS

PROBED = 600  # examples
TEXTS = 48
CHILD = ["-m", "hfstrat.advisor.child"]
LARGEST = 2e9  # parameters of a model that is measured on a CPU
DECODE_SHARE = 0.1  # of the time, for decoding the files that are measured
MOST_FIXED = 0.95  # of the seconds of a step
NO_STEPS = 10_000  # an interval that is never reached


def obstacle(situation: Situation) -> str | None:
    """Why nothing can be measured; None if it can be."""
    model, data = situation.model, situation.data
    if model.by_hand or data.by_hand or model.folder is None:
        return "it needs a model folder and data; sizes given by hand cannot be measured"
    if model.parameters > LARGEST and situation.device.is_cpu:
        return f"{model.parameters:,} parameters are too many for a CPU"
    if data.pictures is not None:
        return "steps with images and texts are not timed yet"
    if data.objective != "sft":
        return f"steps of objective {data.objective} are not timed yet"
    return None if importlib.util.find_spec("torch") else "torch is not installed"


def measure(situation: Situation, names: Sequence[str], seconds: float) -> Measured:
    """Measure strategies for a number of seconds, the start of the measuring process included.

    Raises:
        UserError: see `obstacle`; or the measuring process failed.
    """
    if (reason := obstacle(situation)) is not None:
        raise UserError(f"--measure: {reason}; remove the option")
    fitted = {name: found for name in names if (found := _fitted(name, situation)) is not None}
    with tempfile.TemporaryDirectory(prefix="hfstrat-sample-") as folder:
        files, sample = situation.data.files, None
        if files is not None:
            sample = files.write_sample(Path(folder) / "sample", DECODE_SHARE * seconds)
        raw = _run_child(_request(situation, fitted, sample), seconds)
    steps = {
        name: step
        for name, step in raw["rates"].items()
        if step["seconds"] and step["tokens"] and step.get("others", 0.0) <= speed.BUSY
    }
    fixed = {name: min(step.get("fixed", 0.0), MOST_FIXED * step["seconds"]) for name, step in steps.items()}
    rates = {
        name: _operations(fitted[name], situation) * step["tokens"] / (step["seconds"] - fixed[name])
        for name, step in steps.items()
    }
    unit = "tokens" if situation.data.files is None else "positions"
    return replace(interpret(raw, rates, unit), fixed=fixed)


def _fitted(name: str, situation: Situation) -> Fitted | None:
    """The strategy with its settings; None if it is impossible, does not fit, or has no steps to time."""
    try:
        candidate = candidates.propose(name, situation.model, situation.data)
    except UserError:
        return None
    if candidate.description.body_once or candidate.description.teacher:
        return None  # the frozen computations would have to run over all examples first
    fitted = decide.fit(candidate, replace(situation, quantizes=False))
    return fitted if fitted.fits_here else None


def _operations(fitted: Fitted, situation: Situation) -> float:
    """Operations per token of the measured steps."""
    candidate, data = fitted.candidate, situation.given_to(fitted.candidate).data
    description = candidate.description._replace(body_once=False, keeps_prefix=False)
    recompute = fitted.shape.recompute
    return speed.work(candidate.model, description, data.mean_length, data.supervised_share, recompute).training


def _request(situation: Situation, fitted: dict[str, Fitted], sample: Path | None = None) -> dict[str, Any]:
    """What the child process has to measure.

    Args:
        sample: files in the place of the data, all of which would be decoded before the first step.
    """
    data = situation.data
    request: dict[str, Any] = {
        "recipes": {name: _steps_recipe(each, situation, sample) for name, each in fitted.items()},
        "model": str(situation.model.folder),
        "longest": min(data.max_length, situation.model.context, 512),
    }
    if data.outputs and not data.many:
        request |= {"probe": _probe_recipe(situation, sample), "probe_rows": PROBED}
    if TASKS[data.task].text.generates and not situation.model.is_encoder:
        request["texts"] = data.texts[:: max(1, len(data.texts) // TEXTS)][:TEXTS]
    return request


def _steps_recipe(fitted: Fitted, situation: Situation, sample: Path | None) -> str:
    """The recipe that would be written, without evaluations, checkpoints and cached states."""
    recipe = recipes.recipe_of(fitted, situation, {})
    if sample is not None:
        recipe["data"] = {"train": str(sample)}
    recipe["training"] = {
        **fitted.settings,
        "max_steps": NO_STEPS,
        "eval_steps": NO_STEPS,
        "load_best_model_at_end": False,
        "resume_from_checkpoint": "never",
    }
    if "precompute" in type(fitted.candidate.strategy).model_fields:
        recipe["strategy"] = {**recipe["strategy"], "precompute": False}
    recipe["evaluation"] = {"eval_on_start": False, "samples": 0, "max_rows": 16}
    return defaults.recipe_text("real steps for `hfstrat advise --measure`", recipe)


def _probe_recipe(situation: Situation, sample: Path | None) -> str:
    data, model = recipes.data_of(situation.data), recipes.absolute_path(situation.model.name)
    recipe = {"task": situation.data.task, "model": model, "strategy": "full", "data": data}
    if sample is not None:
        recipe |= {"data": {"train": str(sample)}, "strategy": "head", **situation.data.sections}
    return defaults.recipe_text("a probe for `hfstrat advise --measure`", recipe)


def _run_child(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The last answer of the measuring process, which is ended after `seconds`. Raises UserError if there is none."""
    with tempfile.TemporaryDirectory(prefix="hfstrat-measure-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request | {"seconds": seconds}), encoding="utf-8")
        command = [sys.executable, *CHILD, str(file)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with (Path(folder) / "out").open("w+") as out, (Path(folder) / "err").open("w+") as err:
            child = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=seconds)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        printed, errors = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err"))
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if lines:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    if child.returncode == -signal.SIGKILL:
        raise UserError(f"--measure: {seconds:.0f} s are over before anything was measured; give more time")
    last = (errors.strip().splitlines() or ["no message"])[-1]
    raise UserError(f"--measure: the measuring process failed with exit code {child.returncode}: {last}")


def interpret(raw: dict[str, Any], rates: dict[str, float], unit: str = "tokens") -> Measured:
    """Scores and lines of text, from the answer of the child process."""
    lines = [
        f"{name}: {step['tokens'] / step['seconds']:,.0f} {unit}/s, from {step['passes']:.0f} passes"
        for name, step in raw["rates"].items()
        if step["seconds"]
    ]
    lines += [f"{name}: not measured: {message}" for name, message in raw["failed"].items()]
    others = max((step.get("others", 0.0) for step in raw["rates"].values()), default=0.0)
    if others > speed.BUSY:
        lines.append(
            f"other processes used {others:.0%} of the cores meanwhile, so these speeds are too low and are not used: "
            "repeat this when the machine is free"
        )
    if raw.get("left"):
        lines.append(f"no time was left for {', '.join(raw['left'])}; --measure with a longer time includes them")
    domain_gap = probe_gain = None
    if (bits := raw.get("bits_per_byte")) and bits["data"]["expected"]:
        needed, expected = bits["data"]["needed"], bits["data"]["expected"]
        domain_gap = needed / expected - 1
        lines.append(
            f"the base needs {needed:.3f} bits per byte on these texts and expects {expected:.3f} ({domain_gap:+.0%}; about 0 "
            f"on texts like its pretraining data); on Python's documentation it needs {bits['reference']['needed']:.3f}"
        )
    if probe := raw.get("probe"):
        words = probe.get("tf_idf")
        simple = "" if words is None else f"TF-IDF {words:.1%}, "
        probe_gain = probe["probe"] - max(words or 0.0, probe["majority"])
        lines.append(
            f"linear probe ({probe['best']}), cross-validated on {probe['rows']:,} examples: {probe['metric']} "
            f"{probe['probe']:.1%}; {simple}{probe['baseline']} {probe['majority']:.1%}"
        )
        lines.append(learning_curve({int(count): accuracy for count, accuracy in probe["curve"].items()}))
    return Measured(rates, domain_gap, probe_gain, lines, raw)


def learning_curve(curve: dict[int, float]) -> str:
    """The score of the probe by number of examples, and whether more data would help."""
    counts = sorted(curve)
    points = ", ".join(f"{curve[count]:.1%} with {count:,} examples" for count in counts)
    if len(counts) < 2:
        return f"learning curve: {points}"
    gain = curve[counts[-1]] - curve[counts[-2]]
    more = "more data would help" if gain > 0.01 else "more data would hardly help"
    return f"learning curve: {points}; {more} ({100 * gain:+.1f} pp from the last doubling)"
