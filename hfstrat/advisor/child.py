"""The process that measures for `hfstrat advise`: `python -m hfstrat.advisor.child REQUEST.json`.

It prints all of its answer so far as a line of JSON after each thing that it has measured, the most informative first, so that
the process can be ended at any moment.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat import strategies
from hfstrat.advisor.hardware import Busyness
from hfstrat.errors import first_line, quiet_libraries
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.tasks import TASKS

if TYPE_CHECKING:
    import torch

UNTIMED = 2  # first passes, in which kernels are compiled
UNEQUAL = 1.2  # least ratio of tokens in longer to shorter passes; below it, fixed and per-token seconds cannot be separated
FOLDS = 3
PROBE_OPERATIONS = 4e12  # a few seconds on a CPU
CHUNK, LEAST_PROBED = 32, 64  # examples between two looks at the clock, and those without which nothing is said
LEAST_OF_CURVE = 8  # examples of a point of the learning curve
PROBE_SHARE = 0.5  # of the time that is left, for the features of a probe


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
    return typical_step(watch.passes, tokens, float(lengths.mean()) * plan.global_batch_size, each)


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


def typical_step(passes: list[tuple[float, bool]], tokens: list[float], step_tokens: float, each: int = 1) -> dict[str, float]:
    """Seconds of an average step, and those that do not depend on its tokens (`fixed`): of its passes, and the optimizer.

    Args:
        passes: seconds, and whether an optimizer step is included.
        tokens: of each pass.
        step_tokens: tokens of an average step.
        each: passes of a step.
    """
    timed = list(zip(passes, tokens, strict=True))[UNTIMED:]
    plain = [(seconds, count) for (seconds, ends), count in timed if not ends]
    last = [(seconds, count) for (seconds, ends), count in timed if ends]
    of_pass, per_token = line_through(plain or last)
    optimizer = statistics.median([seconds - of_pass - per_token * count for seconds, count in last]) if plain and last else 0.0
    fixed = of_pass * each + max(0.0, optimizer)
    return {
        "seconds": fixed + per_token * step_tokens,
        "tokens": step_tokens,
        "fixed": fixed,
        "passes": float(len(timed)),
    }


def line_through(passes: list[tuple[float, float]]) -> tuple[float, float]:
    """The fixed seconds of a pass and those per token, from the shorter and the longer half of the passes (seconds, tokens).

    Wald 1940: the line through the means of two groups. Where all passes are about equally long, or time does not grow with
    length as it can, all of it counts per token.
    """
    ordered = sorted(passes, key=lambda one: one[1])
    mean_seconds, mean_tokens = (statistics.fmean(column) for column in zip(*ordered, strict=True))
    per_token, half = mean_seconds / mean_tokens, len(ordered) // 2
    if half:
        short, long = ordered[:half], ordered[-half:]
        (short_seconds, short_tokens), (long_seconds, long_tokens) = (
            [statistics.median(column) for column in zip(*part, strict=True)] for part in (short, long)
        )
        if long_tokens > UNEQUAL * short_tokens:
            per_token = min(per_token, max(0.0, (long_seconds - short_seconds) / (long_tokens - short_tokens)))
    return mean_seconds - per_token * mean_tokens, per_token


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


def probe(loaded: Loaded, rows: int, until: float = math.inf) -> dict[str, Any]:
    """Accuracy (of numbers R^2) of a cross-validated probe on the base's features, also on half and a quarter; of the same
    on TF-IDF, where the rows are texts; and of the constant prediction.

    Args:
        rows: examples, at most.
        until: when extracting features has to end (`time.monotonic()`).
    """
    import torch

    from hfstrat.models.load import cast_weights
    from hfstrat.strategies.head.pooled import candidate_layers

    recipe = loaded.recipe
    task, strategy = TASKS[recipe.task], strategies.build(recipe.strategy)
    data: Any
    tokenizer, data = strategy.read(recipe)
    base = strategy.load(recipe, tokenizer, data)
    cast_weights(base.model, base.compute_dtype)  # the precision of frozen weights in every strategy
    collate = task.rows.collator(base, data, tokenizer, 16)
    body, most = probed_body(base, data, collate), rows
    if task.model.reads_tokens:
        most = min(rows, affordable(base, data))
    layers, poolings = candidate_layers(body.depth, "auto"), body.poolings[:2]
    places = np.random.default_rng(0).permutation(len(data.train))[:most]
    found = extract_until(body, data.train, places, collate, layers, poolings, base.compute_dtype, until)
    places = places[: len(found)]
    labels, classes = torch.as_tensor(np.asarray(data.train["label"][:])[places]), len(data.label_names)
    names = ("R^2", "mean") if labels.is_floating_point() else ("accuracy", "majority class")
    constant = 0.0 if labels.is_floating_point() else float(torch.bincount(labels).max()) / len(labels)
    words = None
    if task.model.reads_tokens:
        words = cross_validate_words([data.train[int(place)]["input_ids"] for place in places], labels, classes)
    fits = {(i, j): ridge_score(found[:, i, j], labels, classes) for i in range(len(layers)) for j in range(len(poolings))}
    i, j = max(fits, key=lambda place: fits[place])
    reached = cross_validate(found[:, i, j], labels, classes)
    parts = [count for count in (len(places) // 4, len(places) // 2) if count >= LEAST_OF_CURVE]
    return {
        "rows": len(places),
        "best": f"layer {layers[i]}, {poolings[j]}",
        "probe": reached,
        **({} if words is None else {"tf_idf": words}),
        "majority": constant,
        **dict(zip(("metric", "baseline"), names, strict=True)),
        "curve": {count: cross_validate(found[:count, i, j], labels[:count], classes) for count in parts}
        | {len(places): reached},
    }


def probed_body(base: Any, data: Any, collate: Any) -> Any:
    """The body whose features are probed: of a model that reads files with the pooling of its class."""
    from hfstrat.strategies.head.features import split_body
    from hfstrat.strategies.head.own_pooling import own_pooling

    if base.task.model.reads_tokens:
        return split_body(base.model.base_model)

    def sample() -> dict[str, torch.Tensor]:
        return {
            name: value for name, value in collate([data.train[0], data.train[len(data.train) - 1]]).items() if name != "labels"
        }

    return own_pooling(base.model, sample)


def extract_until(
    body: Any,
    rows: Any,
    places: np.ndarray,
    collate: Any,
    layers: list[int],
    poolings: tuple[str, ...],
    dtype: torch.dtype,
    until: float,
) -> torch.Tensor:
    """Features `[n, len(layers), len(poolings), H]` of as many examples as time allows, of all where it allows that."""
    import torch

    from hfstrat.strategies.head.features import extract

    found = []
    for start in range(0, len(places), CHUNK):
        found.append(extract(body, rows, places[start : start + CHUNK], collate, layers, poolings, dtype))
        if time.monotonic() > until and len(found) * CHUNK >= LEAST_PROBED:
            break
    return torch.cat(found)


def affordable(base: Any, data: Any) -> int:
    """The number of examples whose forward pass takes a few seconds on a CPU."""
    from hfstrat.models.load import forward_operations

    return max(64, int(PROBE_OPERATIONS / (forward_operations(base.model) * float(data.lengths.mean()))))


def ridge_score(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Accuracy (of numbers R^2) of ridge regression, leave-one-out. It takes less time than logistic regression; it selects
    the layer and the pooling, as in the strategy head."""
    from hfstrat.strategies.head.linear import leave_one_out, targets_of
    from hfstrat.strategies.head.pooled import score

    if labels.is_floating_point():
        return cross_validate(features, labels, classes)
    targets = targets_of(labels, classes)
    return score(leave_one_out(features.float(), targets), targets)


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


def cross_validate_words(ids: list[list[int]], labels: torch.Tensor, classes: int) -> float:
    """The same of a linear model of TF-IDF on token ids."""
    import torch

    from hfstrat.evaluation import simple_models
    from hfstrat.strategies.head.pooled import score

    folds, numbers = torch.arange(len(labels)) % FOLDS, labels.is_floating_point()
    targets = ((labels - labels.mean(0)) / labels.std(0, correction=0).clamp(min=1e-12)) if numbers else labels
    predicted = torch.zeros(len(labels), targets.shape[1] if numbers else classes, dtype=torch.float64)
    for fold in range(FOLDS):
        train, test = (folds != fold).nonzero()[:, 0].tolist(), (folds == fold).nonzero()[:, 0].tolist()
        rows, held = [ids[place] for place in train], [ids[place] for place in test]
        found = (
            simple_models.tf_idf_of_numbers(rows, targets[train], held)
            if numbers
            else simple_models.tf_idf(rows, labels[train], held, classes)
        )
        predicted[test] = torch.as_tensor(found)
    if numbers:
        return score(predicted, targets.double(), numbers=True)
    return float((predicted.argmax(1) == labels).double().mean())


def reference_texts(count: int) -> list[str]:
    """Prose of Python's own documentation, in pieces."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    return [" ".join(words[start : start + 120]) for start in range(0, len(words) - 120, 120)][:count]


def main(file: str) -> None:
    request = json.loads(Path(file).read_text(encoding="utf-8"))
    until = time.monotonic() + request["seconds"]
    quiet_libraries()
    waiting = [*(["probe"] * ("probe" in request)), *(["bits_per_byte"] * ("texts" in request)), *request["recipes"]]
    found: dict[str, Any] = {"rates": {}, "failed": {}, "left": list(waiting)}
    with tempfile.TemporaryDirectory() as folder:

        def load(name: str, text: str) -> Loaded:
            return load_recipe(f"{name}.yaml", [f"output_dir={json.dumps(str(Path(folder) / name))}"], text)

        for name in waiting:
            share = max(1.0, (until - time.monotonic()) / max(1, len(found["left"])))
            try:
                if name == "probe":
                    last = until - (1 - PROBE_SHARE) * max(0.0, until - time.monotonic())
                    found["probe"] = probe(load(name, request["probe"]), request["probe_rows"], last)
                elif name == "bits_per_byte":
                    texts = {"data": request["texts"], "reference": reference_texts(len(request["texts"]))}
                    found[name] = bits_per_byte(request["model"], texts, share / 2, request["longest"])
                else:
                    busyness = Busyness()
                    timed = steps(load(name, request["recipes"][name]), share / 2)  # the other half is for its start
                    found["rates"][name] = timed | {"others": busyness.of_others()}
            except Exception as error:  # the others are still measured
                found["failed"][name] = f"{type(error).__name__}: {first_line(error)}"
            found["left"].remove(name)
            print("\n" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
