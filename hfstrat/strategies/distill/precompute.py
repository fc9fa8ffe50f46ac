"""Caching the outputs of a teacher that is a language model: whether, in which form, and computing them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfstrat.errors import UserError
from hfstrat.models.chunked_loss import blocks, head_scores
from hfstrat.models.load import count_parameters
from hfstrat.recipe.distill import Cache
from hfstrat.recipe.format import file_size, plural
from hfstrat.strategies.distill.objective import Distiller, FrozenTeacher
from hfstrat.strategies.distill.teacher_cache import Fetched, Form, Rows, TeacherCollator, fetch_outputs, write
from hfstrat.trainer.cached_columns import digest_of_weights, groups_of, sample_batch
from hfstrat.trainer.train_data import TrainData

TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number, as a share of the largest state: other batches use other kernels


def cache_outputs(data: TrainData, distiller: Distiller, options: Cache) -> TrainData:
    """The data with cached outputs of the teacher, if that saves time and fits; prints the decision.

    Raises UserError: the given form takes more than its budget.
    """
    if options.form == "off":
        return compute_each_batch(data, distiller, "teacher_cache: {form: off}")
    if distiller.match is not None:
        return compute_each_batch(data, distiller, "hidden states of its layers are matched, which are not cached")
    several = data.is_endless or data.epochs > 1 or options.form != "auto"
    parts = {"eval": Rows.of(data.eval)} | ({"train": Rows.of(data.unpacked.train)} if several else {})
    positions = sum(int(part.supervised.sum()) for part in parts.values())
    form, reason = choose_form(data, distiller, options, positions)
    if form is None:
        return compute_each_batch(data, distiller, reason)
    data = _load_or_compute(data, distiller, form, parts, positions)
    data = evaluate_teacher(data, distiller)
    if several:
        assert distiller.head is not None
        distiller.head, distiller.teacher = distiller.head.map(torch.clone), None  # a copy keeps no other memory alive
        gc.collect()  # the teacher's memory is freed before gradients and moments are allocated
    return data


def choose_form(data: TrainData, distiller: Distiller, options: Cache, positions: int) -> tuple[Form | None, str]:
    """The form of the cache, or None and the reason.

    `auto` selects the exact form if it fits the budget, then samples; never the most likely tokens, which are a lower bound.
    """
    assert distiller.teacher is not None
    mix, dtype = distiller.mix, str(data.dtype).removeprefix("torch.")
    forms = {
        "hidden": Form("hidden", distiller.teacher.head.weight.shape[1], dtype),
        "sampled": Form("sampled", options.tokens, temperature=mix.temperature),
        "top_k": Form("top_k", min(options.tokens, distiller.width), temperature=mix.temperature),
    }
    needed = {name: form.position.itemsize * positions for name, form in forms.items()}
    if options.form != "auto":
        if needed[options.form] > options.bytes:
            raise UserError(
                f"strategy.teacher_cache.budget: {options.form} takes {file_size(needed[options.form])} for {positions:,} "
                f"positions, more than {options.budget}; raise it, or set form: auto"
            )
        return forms[options.form], ""
    possible = ("hidden", "sampled") if mix.divergence == "forward_kl" else ("hidden",)
    found = next((forms[name] for name in possible if needed[name] <= options.bytes), None)
    return found, f"hidden states take {file_size(needed['hidden'])}, more than teacher_cache.budget {options.budget}"


def compute_each_batch(data: TrainData, distiller: Distiller, reason: str) -> TrainData:
    """The data unchanged, with the teacher's metrics for the report."""
    data.say(f"{'teacher':<9} outputs are computed on the fly: {reason}")
    return evaluate_teacher(data, distiller)


def _load_or_compute(data: TrainData, distiller: Distiller, form: Form, parts: dict[str, Rows], positions: int) -> TrainData:
    teacher, unpacked, started = distiller.teacher, data.unpacked, time.monotonic()
    assert teacher is not None
    weights, made = digest_of_weights(teacher.model), dict[str, Fetched]()
    inputs = {
        "form": [form.kind, form.width, form.dtype, form.temperature, "drawn by batch"],
        "vocabulary": distiller.width,
        "head": [teacher.scale, teacher.softcap],
        "adapter": teacher.adapted is not None,
    }
    for name, part in parts.items():  # with or without packing, the teacher runs on unpacked examples
        rows = getattr(unpacked, name)

        def build(target: Path | None, part: Rows = part, rows: Any = rows) -> Any:
            mass = [0.0]
            write(target, _compute_outputs(unpacked, distiller, form, rows, part, mass))
            return {"mass": mass[0]}

        needed = int(part.supervised.sum()) * form.position.itemsize
        text = f"{form.kind} of a teacher for {plural(len(part.first), 'example')}"
        made[name] = fetch_outputs(unpacked, rows, part, teacher.model, weights, inputs, text, build, needed)
    facts = {
        "form": form.kind,
        "width": form.width,
        "bytes": sum(one.entry.size for one in made.values()),
        "mass": sum(float(one.entry.value["mass"]) for one in made.values()) / max(positions, 1),
        "seconds": time.monotonic() - started,
        "built": [name for name, one in made.items() if one.is_new],
    }
    data.say(_cache_line(form, facts, positions, "train" in parts))
    train = made["train"].rows if "train" in made else unpacked.train
    data = data.with_rows(TeacherCollator(data.collate, form), train, made["eval"].rows)
    distiller.head = teacher.head
    if form.kind == "hidden":
        _check(data, teacher, [one.entry.path.stem for one in made.values() if not one.is_new])
    return add_facts(data, cache=facts)


def _cache_line(form: Form, facts: dict[str, Any], positions: int, with_train: bool) -> str:
    when = f"outputs computed in {facts['seconds']:.1f} s" if facts["built"] else "outputs loaded from the cache"
    what = {
        "hidden": "hidden states, exact",
        "sampled": f"{form.width} samples each",
        "top_k": f"{form.width} most likely tokens each",
    }
    which = "all examples" if with_train else "evaluation examples (training has one epoch)"
    return (
        f"{'teacher':<9} {when} for {positions:,} positions of {which}: {what[form.kind]}, {file_size(facts['bytes'])}, "
        f"{facts['mass']:.1%} of its probability mass"
    )


def _compute_outputs(
    data: TrainData, distiller: Distiller, form: Form, rows: Any, part: Rows, mass: list[float]
) -> Iterator[list[bytes]]:
    """The bytes to cache of each example, batch by batch; adds the probability mass to `mass`."""
    teacher = distiller.teacher
    assert teacher is not None
    head = teacher.head.map(lambda one: one[: distiller.width])

    def logits(hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        return blocks(hidden, head)

    def compute(numbered: tuple[int, list[int]]) -> tuple[list[bytes], float]:
        number, group = numbered
        hidden = teacher_states(data, teacher, data.batch([int(part.first[one]) for one in group], rows))
        counts = part.supervised[group]
        if counts.sum() != len(hidden):
            raise RuntimeError("examples and batches disagree about the supervised positions")
        with torch.no_grad():
            # each batch has its own generator, on whichever process it runs
            blob, share = form.bytes_of(hidden, logits, torch.Generator().manual_seed(number))
        ends = np.cumsum([0, *counts]) * form.position.itemsize
        return [blob[start:end] for start, end in pairwise(ends)], share

    groups = list(enumerate(groups_of(part.order, data.plan.eval_batch)))
    for blobs, share in data.each(groups, compute, "running the teacher"):
        mass[0] += share
        yield blobs


def teacher_states(data: TrainData, teacher: FrozenTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's hidden states of a batch's supervised positions, `[n, H]`."""
    inputs = {name: tensor for name, tensor in batch.items() if not name.startswith(("teacher_", "loss_rows", "targets"))}
    with data.autocast():
        states: torch.Tensor = teacher.hidden((), inputs, batch["loss_rows"])
    return states


def _check(data: TrainData, teacher: FrozenTeacher, loaded: list[str]) -> None:
    """Compare cached outputs with the teacher's, for some examples in another order.

    Raises UserError: entries loaded from the cache are those of another teacher.
    """
    batch = sample_batch(data)
    computed, cached = teacher_states(data, teacher, batch).float(), batch["teacher_hidden"].float()
    allowed = TOLERANCE[batch["teacher_hidden"].dtype.itemsize] * float(computed.abs().max())
    if float((computed - cached).abs().max()) <= allowed:
        return
    if loaded:
        raise UserError(
            f"strategy.teacher_cache: the outputs in the cache ({', '.join(loaded)}) are not those of this teacher; "
            f"remove them (hfstrat cache rm {' '.join(loaded)}), or set teacher_cache: {{form: 'off'}}"
        )
    raise RuntimeError("cached outputs differ from those of the teacher")


@torch.no_grad()
def evaluate_teacher(data: TrainData, distiller: Distiller) -> TrainData:
    """The data with loss and accuracy of the teacher on the evaluation data, measured like the student's."""
    teacher, size = distiller.teacher, data.plan.eval_batch
    assert teacher is not None

    def measure(start: int) -> tuple[float, float, int]:
        batch = data.batch(list(range(start, min(start + size, len(data.eval)))))
        hidden = batch.get("teacher_hidden")
        hidden = teacher_states(data, teacher, batch) if hidden is None else hidden
        with data.autocast():
            losses, correct = head_scores(hidden, teacher.head, batch["targets"])
        return float(losses.sum()), float(correct.sum()), len(losses)

    parts = data.each(list(range(0, len(data.eval), size)), measure, "evaluating the teacher", for_all=True)
    nll, right, count = map(sum, zip(*parts, strict=True))
    parameters = count_parameters(teacher.model)[1]
    found = {"loss": nll / max(count, 1), "token_accuracy": right / max(count, 1), "parameters": parameters}
    data.say(f"{'teacher':<9} evaluation loss {found['loss']:.4f}, token accuracy {found['token_accuracy']:.1%}")
    return add_facts(data, teacher=found)


def add_facts(data: TrainData, **facts: Any) -> TrainData:
    return replace(data, facts={**data.facts, "distillation": {**data.facts.get("distillation", {}), **facts}})
