"""`hfstrat advise --measure`: real training steps, the fit of the texts to the base, and a probe on its features.

A child process measures: `python -m hfstrat.advisor.measure REQUEST.json` prints its answer as JSON in the last line. Only the
child imports torch. The parent turns the answer into operations per second, facts for the rules, and lines of text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat import strategies
from hfstrat.advisor import candidates, decide, recipes, speed
from hfstrat.advisor.decide import Fitted, Measured, Situation
from hfstrat.errors import UserError, first_line, quiet_libraries
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS

if TYPE_CHECKING:
    import torch

PROBED = 600  # examples
TEXTS = 48
LARGEST = 2e9  # parameters of a model that is measured on a CPU
UNTIMED = 2  # first passes, in which kernels are compiled
TERMS = 4096  # most frequent words and pairs of words of TF-IDF
FOLDS = 3
NO_STEPS = 10_000  # an interval that is never reached


def measure(situation: Situation, names: Sequence[str], seconds: float) -> Measured:
    """Measure strategies for a number of seconds in total.

    Raises:
        UserError: only sizes are given, the model is too large, or the child process failed.
    """
    model, data = situation.model, situation.data
    if model.by_hand or data.by_hand or model.folder is None:
        raise UserError("--measure: needs a model folder and data; sizes given by hand cannot be measured")
    if model.parameters > LARGEST and situation.device.is_cpu:
        raise UserError(f"--measure: {model.parameters:,} parameters are too many for a CPU; remove the option")
    fitted = {name: found for name in names if (found := _fitted(name, situation)) is not None}
    raw = _run_child(_request(situation, fitted, seconds))
    rates = {
        name: _operations(fitted[name], situation) * step["tokens"] / step["seconds"]
        for name, step in raw["rates"].items()
        if step["seconds"] and step["tokens"]
    }
    return interpret(raw, rates)


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
    candidate, data = fitted.candidate, situation.data
    description = candidate.description._replace(body_once=False, keeps_prefix=False)
    recompute = fitted.shape.recompute
    return speed.work(candidate.model, description, data.mean_length, data.supervised_share, recompute).training


def _request(situation: Situation, fitted: dict[str, Fitted], seconds: float) -> dict[str, Any]:
    """What the child process has to measure."""
    data = situation.data
    request: dict[str, Any] = {
        "recipes": {name: _steps_recipe(each, situation) for name, each in fitted.items()},
        "seconds": seconds / (len(fitted) + 1),
        "model": str(situation.model.folder),
        "longest": min(data.max_length, situation.model.context, 512),
    }
    if data.outputs and not data.many:
        request |= {"probe": _probe_recipe(situation), "probe_rows": PROBED}
    if TASKS[data.task].text.generates and not situation.model.is_encoder:
        request["texts"] = data.texts[:: max(1, len(data.texts) // TEXTS)][:TEXTS]
    return request


def _steps_recipe(fitted: Fitted, situation: Situation) -> str:
    """The recipe that would be written, without evaluations, checkpoints and cached states."""
    recipe = recipes.recipe_of(fitted, situation, {})
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


def _probe_recipe(situation: Situation) -> str:
    data = {"train": recipes.absolute_path(situation.data.source), "max_length": situation.data.max_length}
    model = recipes.absolute_path(situation.model.name)
    recipe = {"task": situation.data.task, "model": model, "strategy": "full", "data": data}
    return defaults.recipe_text("a probe for `hfstrat advise --measure`", recipe)


def _run_child(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hfstrat-measure-") as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "hfstrat.advisor.measure", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--measure: the measuring process failed with exit code {ended.returncode}: {last}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def interpret(raw: dict[str, Any], rates: dict[str, float]) -> Measured:
    """Facts for the rules, and lines of text, from the answer of the child process."""
    lines = [
        f"{name}: {step['tokens'] / step['seconds']:,.0f} tokens/s, from {step['passes']:.0f} passes"
        for name, step in raw["rates"].items()
        if step["seconds"]
    ]
    lines += [f"{name}: not measured: {message}" for name, message in raw["failed"].items()]
    domain_gap = probe_gain = None
    if (bits := raw.get("bits_per_byte")) and bits["data"]["expected"]:
        needed, expected = bits["data"]["needed"], bits["data"]["expected"]
        domain_gap = needed / expected - 1
        lines.append(
            f"the base needs {needed:.3f} bits per byte on these texts and expects {expected:.3f} ({domain_gap:+.0%}; about 0 "
            f"on texts like its pretraining data); on Python's documentation it needs {bits['reference']['needed']:.3f}"
        )
    if probe := raw.get("probe"):
        probe_gain = probe["probe"] - max(probe["tf_idf"], probe["majority"])
        lines.append(
            f"linear probe ({probe['best']}), cross-validated on {probe['rows']:,} examples: {probe['metric']} "
            f"{probe['probe']:.1%}; TF-IDF {probe['tf_idf']:.1%}, {probe['baseline']} {probe['majority']:.1%}"
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


# in the child process


class TimeIsOver(Exception):
    """Stops the training from a callback."""


def steps(loaded: Loaded, seconds: float) -> dict[str, float]:
    """Run real steps of a recipe for some seconds: seconds and tokens of a typical optimizer step, and the number of passes."""
    from hfstrat.run import setup
    from hfstrat.trainer.distributed import join_world

    job = setup.set_up(loaded, join_world(), overwrite=True)
    watch = stopwatch(seconds)
    job.trainer.add_callback(watch)
    with contextlib.suppress(TimeIsOver):
        job.trainer.train()
    job.progress.close()
    plan, lengths, sampler = job.plan, job.data.lengths, job.trainer.sampler
    each = plan.accumulation
    tokens = [
        float(lengths[sampler.batch(place // each)].reshape(each, -1)[place % each].sum())
        if hasattr(sampler, "batch")
        else float(lengths.mean()) * plan.global_batch_size / each
        for place in range(len(watch.passes))
    ]
    job.release()
    return typical_step(watch.passes, tokens, float(lengths.mean()) * plan.global_batch_size)


def stopwatch(limit: float) -> Any:
    """A callback that times each pass in `passes` (seconds, and whether an optimizer step is included), until `limit`."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.passes: list[tuple[float, bool]] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.since = self.began = time.monotonic()

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note(ends_step=False)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note(ends_step=True)

        def note(self, ends_step: bool) -> None:
            now = time.monotonic()
            self.passes.append((now - self.since, ends_step))
            self.since = now
            steps = sum(ends for _, ends in self.passes)
            if now - self.began > limit and len(self.passes) > 2 * UNTIMED and (steps or now - self.began > 2 * limit):
                raise TimeIsOver

    return Stopwatch()


def typical_step(passes: list[tuple[float, bool]], tokens: list[float], step_tokens: float) -> dict[str, float]:
    """Seconds of an average step: its tokens at the speed of plain passes, plus the optimizer step.

    Args:
        passes: seconds, and whether an optimizer step is included.
        tokens: of each pass.
        step_tokens: tokens of an average step.
    """
    timed = list(zip(passes, tokens, strict=True))[UNTIMED:]
    plain = [(seconds, count) for (seconds, ends), count in timed if not ends]
    last = [(seconds, count) for (seconds, ends), count in timed if ends]
    base = plain or last
    per_token = sum(seconds for seconds, _ in base) / sum(count for _, count in base)
    optimizer = statistics.median([seconds - per_token * count for seconds, count in last]) if plain and last else 0.0
    return {"seconds": per_token * step_tokens + max(0.0, optimizer), "tokens": step_tokens, "passes": float(len(timed))}


def bits_per_byte(name: str, texts: dict[str, list[str]], seconds: float, longest: int) -> dict[str, dict[str, float]]:
    """Bits per byte that the base needs and expects for each kind of text, as far as time allows, kinds in turn.

    What it expects is the entropy of its own predictions. On texts like its pretraining data, both are about equal
    (Braverman et al. 2020, arXiv 1906.05664); on other texts it needs more.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hfstrat.models.load import compute_dtype

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=compute_dtype("auto")).eval()
    sums = {kind: np.zeros(3) for kind in texts}  # nats needed, nats expected, bytes
    until = time.monotonic() + seconds
    for group in zip(*texts.values(), strict=False):
        for kind, text in zip(texts, group, strict=True):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=longest)["input_ids"]
            if ids.shape[1] < 2:
                continue
            with torch.inference_mode():
                logs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            size = len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
            sums[kind] += (-float(logs.gather(1, ids[0, 1:, None]).sum()), -float((logs.exp() * logs).sum()), size)
        if time.monotonic() > until:
            break
    return {
        kind: {"needed": needed / math.log(2) / max(1.0, size), "expected": expected / math.log(2) / max(1.0, size)}
        for kind, (needed, expected, size) in sums.items()
    }


def probe(loaded: Loaded, rows: int) -> dict[str, Any]:
    """Accuracy (of numbers R^2) of a cross-validated probe on the base's features, also on half and a quarter; of the same
    on TF-IDF; and of the constant prediction."""
    import torch

    from hfstrat.strategies.head.features import extract, split_body
    from hfstrat.strategies.head.pooled import candidate_layers

    recipe = loaded.recipe
    task, strategy = TASKS[recipe.task], strategies.build(recipe.strategy)
    data: Any
    tokenizer, data = strategy.read(recipe)
    base = strategy.load(recipe, tokenizer, data)
    body = split_body(base.model.base_model)
    places = np.random.default_rng(0).permutation(len(data.train))[:rows]
    layers, poolings = candidate_layers(body.depth, "auto"), ("mean", "last")
    collate = task.rows.collator(base, data, tokenizer, 16)
    found = extract(body, data.train, places, collate, layers, poolings, base.compute_dtype)
    labels, classes = torch.as_tensor(np.asarray(data.train["label"][:])[places]), len(data.label_names)
    names = ("R^2", "mean") if labels.is_floating_point() else ("accuracy", "majority class")
    constant = 0.0 if labels.is_floating_point() else float(torch.bincount(labels).max()) / len(labels)
    words = tf_idf([[str(token) for token in data.train[int(place)]["input_ids"]] for place in places])
    scores = {
        f"layer {layer}, {pooling}": cross_validate(found[:, i, j], labels, classes)
        for i, layer in enumerate(layers)
        for j, pooling in enumerate(poolings)
    }
    best = max(scores, key=lambda name: scores[name])
    i, j = divmod(list(scores).index(best), len(poolings))
    parts = [count for count in (len(places) // 4, len(places) // 2) if count]
    return {
        "rows": len(places),
        "best": best,
        "probe": scores[best],
        "tf_idf": cross_validate(words, labels, classes),
        "majority": constant,
        **dict(zip(("metric", "baseline"), names, strict=True)),
        "curve": {count: cross_validate(found[:count, i, j], labels[:count], classes) for count in parts}
        | {len(places): scores[best]},
    }


def cross_validate(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Accuracy of logistic regression on folds that it was not fitted on; of numbers R^2 of ridge regression, leave-one-out."""
    import torch

    from hfstrat.strategies.head.linear import fit_logistic, leave_one_out
    from hfstrat.strategies.head.pooled import score

    if labels.is_floating_point():
        targets = ((labels - labels.mean(0)) / labels.std(0, correction=0).clamp(min=1e-12)).float()
        return score(leave_one_out(features.float(), targets, numbers=True), targets, numbers=True)
    right = 0
    folds = torch.arange(len(labels)) % FOLDS
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        layer, _ = fit_logistic(features[train].float(), labels[train], classes, strength=1e-2)
        right += int((layer.logits(features[test]).argmax(1) == labels[test]).sum())
    return right / len(labels)


def tf_idf(texts: list[list[str]]) -> torch.Tensor:
    """TF-IDF of the most frequent tokens and pairs of tokens: `[texts, terms]`, rows of length 1."""
    import torch

    counts = [Counter([*words, *map(" ".join, itertools.pairwise(words))]) for words in texts]
    documents = Counter(term for each in counts for term in each)
    terms = {term: place for place, (term, _) in enumerate(documents.most_common(TERMS))}
    found = torch.zeros(len(texts), len(terms))
    for row, each in enumerate(counts):
        for term, count in each.items():
            if term in terms:
                found[row, terms[term]] = (1 + math.log(count)) * (1 + math.log(len(texts) / documents[term]))
    return torch.nn.functional.normalize(found)


def reference_texts(count: int) -> list[str]:
    """Prose of Python's own documentation, in pieces."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    return [" ".join(words[start : start + 120]) for start in range(0, len(words) - 120, 120)][:count]


def main(file: str) -> None:
    request = json.loads(Path(file).read_text(encoding="utf-8"))
    quiet_libraries()
    found: dict[str, Any] = {"rates": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:

        def load(name: str, text: str) -> Loaded:
            return load_recipe(f"{name}.yaml", [f"output_dir={json.dumps(str(Path(folder) / name))}"], text)

        for name, text in request["recipes"].items():
            try:
                found["rates"][name] = steps(load(name, text), request["seconds"])
            except Exception as error:  # the other strategies are still measured
                found["failed"][name] = f"{type(error).__name__}: {first_line(error)}"
        if request.get("probe"):
            found["probe"] = probe(load("probe", request["probe"]), request["probe_rows"])
    if request.get("texts"):
        texts = {"data": request["texts"], "reference": reference_texts(len(request["texts"]))}
        found["bits_per_byte"] = bits_per_byte(request["model"], texts, request["seconds"], request["longest"])
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
