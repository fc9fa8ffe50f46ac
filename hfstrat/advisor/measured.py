"""In a child process of `hfstrat advise --measure`: real steps, what the base says of the texts, what its features are worth.

    python -m hfstrat.advisor.measured REQUEST.json

The last line that it prints is JSON. This file imports torch; nothing else of the adviser does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hfstrat.errors import quiet_libraries
from hfstrat.recipe.load import load_recipe
from hfstrat.run import setup
from hfstrat.trainer.distributed import join_world

UNTIMED = 2  # first passes, in which kernels are compiled
TERMS = 4096  # words and pairs of words of TF-IDF, the most frequent ones
FOLDS = 3


class TimeIsOver(Exception):
    """Ends the training from within."""


class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Times each pass, that before an optimiser step with it, and stops when there has been time enough."""

    def __init__(self, seconds: float) -> None:
        self.limit = seconds
        self.passes: list[tuple[float, bool]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = self.began = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(ends_step=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(ends_step=True)

    def _note(self, ends_step: bool) -> None:
        now = time.monotonic()
        self.passes.append((now - self.since, ends_step))
        self.since = now
        steps = sum(ends for _, ends in self.passes)
        if now - self.began > self.limit and len(self.passes) > 2 * UNTIMED and (steps or now - self.began > 2 * self.limit):
            raise TimeIsOver


def steps(recipe: str, seconds: float) -> dict[str, float]:
    """Real steps of a recipe, for so long: seconds and tokens of a typical optimiser step, and how many passes say so."""
    job = setup.set_up(load_recipe(recipe), join_world(), overwrite=True)
    watch = Stopwatch(seconds)
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
    return typical(watch.passes, tokens, float(lengths.mean()) * plan.global_batch_size)


def typical(passes: list[tuple[float, bool]], tokens: list[float], step_tokens: float) -> dict[str, float]:
    """Seconds of an average step: its tokens by those of passes alone, and what the optimiser's step took beside.

    Args:
        passes: seconds, and whether an optimiser step is in them.
        tokens: of each pass.
    """
    timed = list(zip(passes, tokens, strict=True))[UNTIMED:]
    plain = [(taken, count) for (taken, ends), count in timed if not ends]
    whole = [(taken, count) for (taken, ends), count in timed if ends]
    base = plain or whole
    each = sum(taken for taken, _ in base) / sum(count for _, count in base)
    beside = statistics.median([taken - each * count for taken, count in whole]) if plain and whole else 0.0
    return {"seconds": each * step_tokens + max(0.0, beside), "tokens": step_tokens, "passes": float(len(timed))}


def bits_per_byte(name: str, texts: dict[str, list[str]], seconds: float, longest: int) -> dict[str, dict[str, float]]:
    """Of each kind of text what the base needs and what it expects to need, as much as there is time for, kinds in turn.

    What it expects is the entropy of its own predictions. On texts of the kind that it was trained on the two are about equal
    (Braverman et al. 2020, arXiv 1906.05664); where it needs more, the texts are of another kind.
    """
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
                told = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            size = len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
            sums[kind] += (-float(told.gather(1, ids[0, 1:, None]).sum()), -float((told.exp() * told).sum()), size)
        if time.monotonic() > until:
            break
    return {
        kind: {"needed": needed / math.log(2) / max(1.0, size), "expected": expected / math.log(2) / max(1.0, size)}
        for kind, (needed, expected, size) in sums.items()
    }


def probe(recipe: str, rows: int) -> dict[str, Any]:
    """A cross-validated probe on the base's features, TF-IDF and the majority, and the probe on a half and a quarter."""
    from hfstrat import strategies
    from hfstrat.strategies.head.bodies import take_apart
    from hfstrat.strategies.head.features import extract
    from hfstrat.strategies.head.select_layer import candidate_layers
    from hfstrat.tasks import TASKS

    loaded = load_recipe(recipe).recipe
    task, strategy = TASKS[loaded.task], strategies.build(loaded.strategy)
    tokenizer = strategy.load_tokenizer(loaded)
    data: Any = task.prepare(loaded.data, tokenizer, loaded.seed)
    base = strategy.load_base(loaded, tokenizer, data)
    body = take_apart(base.model.base_model)
    places = np.random.default_rng(0).permutation(len(data.train))[:rows]
    layers, poolings = candidate_layers(body.depth, "auto"), ("mean", "last")
    collate = task.collator(base, data, tokenizer, 16)
    found = extract(body, data.train, places, collate, layers, poolings, base.compute_dtype)
    labels = torch.as_tensor(np.asarray(data.train["label"][:])[places], dtype=torch.long)
    classes = len(data.label_names)
    words = tf_idf([[str(token) for token in data.train[int(place)]["input_ids"]] for place in places])
    scores = {
        f"layer {layer}, {pooling}": held_out(found[:, i, j], labels, classes)
        for i, layer in enumerate(layers)
        for j, pooling in enumerate(poolings)
    }
    best = max(scores, key=lambda name: scores[name])
    i, j = divmod(list(scores).index(best), len(poolings))
    curve = {
        count: held_out(found[:count, i, j], labels[:count], classes) for count in (len(places) // 4, len(places) // 2) if count
    }
    majority = float(torch.bincount(labels).max()) / len(labels)
    return {
        "rows": len(places),
        "best": best,
        "probe": scores[best],
        "tf_idf": held_out(words, labels, classes),
        "majority": majority,
        "curve": curve | {len(places): scores[best]},
    }


def held_out(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Accuracy of logistic regression on folds that it was not fitted on."""
    from hfstrat.strategies.head.linear import fit_logistic

    right = 0
    folds = torch.arange(len(labels)) % FOLDS
    for fold in range(FOLDS):
        kept, held = folds != fold, folds == fold
        layer, _ = fit_logistic(features[kept].float(), labels[kept], classes, strength=1e-2)
        right += int((layer.logits(features[held]).argmax(1) == labels[held]).sum())
    return right / len(labels)


def tf_idf(texts: list[list[str]]) -> torch.Tensor:
    """Of tokens and pairs of them, the most frequent ones: `[n, TERMS]`, rows of length 1."""
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
        for name, text in request["recipes"].items():
            recipe = Path(folder) / f"{name}.yaml"
            recipe.write_text(text.replace("OUTPUT", str(Path(folder) / name)), encoding="utf-8")
            try:
                found["rates"][name] = steps(str(recipe), request["seconds"])
            except Exception as error:  # one that fails does not keep the others from being measured
                found["failed"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if request.get("probe"):
            recipe = Path(folder) / "probe.yaml"
            recipe.write_text(request["probe"].replace("OUTPUT", str(Path(folder) / "probe")), encoding="utf-8")
            found["probe"] = probe(str(recipe), request["probe_rows"])
    if request.get("texts"):
        texts = {"data": request["texts"], "reference": reference_texts(len(request["texts"]))}
        found["bits_per_byte"] = bits_per_byte(request["model"], texts, request["seconds"], request["longest"])
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
