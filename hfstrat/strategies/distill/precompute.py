"""Caching the outputs of a teacher that is a language model: whether, in which form, and computing them."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfstrat.data import cache
from hfstrat.errors import UserError
from hfstrat.models.chunked_loss import blocks, head_scores
from hfstrat.recipe.format import file_size
from hfstrat.strategies.cached_columns import cache_inputs, digest_of_weights
from hfstrat.strategies.distill.teacher_cache import Form, Rows, TeacherCollator, WithTeacher, write

if TYPE_CHECKING:
    from hfstrat.recipe.distill import Cache
    from hfstrat.strategies.distill.objective import Distiller, FrozenTeacher
    from hfstrat.trainer.train_data import TrainData

TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number, as a share of the largest state: other batches use other kernels


def cache_outputs(feed: TrainData, distiller: Distiller, wish: Cache) -> TrainData:
    """The data with cached outputs of the teacher, if that saves time and fits; prints the decision.

    Raises:
        UserError: the given form takes more than its budget.
    """
    teacher = distiller.teacher
    assert teacher is not None
    if wish.form == "off":
        return compute_each_batch(feed, distiller, "teacher_cache: {form: off}")
    if distiller.match is not None:
        return compute_each_batch(feed, distiller, "hidden states of its layers are matched, which are not cached")
    again = feed.is_endless or feed.epochs > 1 or wish.form != "auto"
    rows = {"eval": Rows.of(feed.eval)} | ({"train": Rows.of(feed.unpacked.train)} if again else {})
    positions = sum(int(part.supervised.sum()) for part in rows.values())
    form, reason = choose_form(feed, distiller, wish, positions)
    if form is None:
        return compute_each_batch(feed, distiller, reason)
    feed = _load_or_compute(feed, distiller, form, rows, positions)
    feed = evaluate_teacher(feed, distiller)
    if again:
        distiller.head, distiller.teacher = _copy_head(teacher.head), None
        del teacher
        gc.collect()  # its memory is freed before gradients and moments are allocated
    return feed


def choose_form(feed: TrainData, distiller: Distiller, wish: Cache, positions: int) -> tuple[Form | None, str]:
    """The form of the cache, or None and the reason.

    `auto` selects the exact form if it fits the budget, then samples; never the most likely tokens, which are a lower bound.
    """
    assert distiller.teacher is not None
    mix, dtype = distiller.mix, str(feed.dtype).removeprefix("torch.")
    forms = {
        "hidden": Form("hidden", distiller.teacher.head.weight.shape[1], dtype),
        "sampled": Form("sampled", wish.tokens, temperature=mix.temperature),
        "top_k": Form("top_k", min(wish.tokens, distiller.width), temperature=mix.temperature),
    }
    needed = {name: form.position.itemsize * positions for name, form in forms.items()}
    if wish.form != "auto":
        if needed[wish.form] > wish.bytes:
            raise UserError(
                f"strategy.teacher_cache.budget: {wish.form} takes {file_size(needed[wish.form])} for {positions:,} positions, "
                f"more than {wish.budget}; raise it, or set form: auto"
            )
        return forms[wish.form], ""
    fits = [name for name in ("hidden", "sampled") if needed[name] <= wish.bytes]
    fits = [name for name in fits if name == "hidden" or mix.divergence == "forward_kl"]
    if not fits:
        return None, f"hidden states take {file_size(needed['hidden'])}, more than teacher_cache.budget {wish.budget}"
    return forms[fits[0]], ""


def compute_each_batch(feed: TrainData, distiller: Distiller, reason: str) -> TrainData:
    """The data unchanged, with the teacher's metrics for the report."""
    feed.say(f"{'teacher':<9} outputs are computed on the fly: {reason}")
    return evaluate_teacher(feed, distiller)


def _copy_head(head: Any) -> Any:
    """A copy of a head, which keeps no other memory alive."""
    return head._replace(weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())


def _load_or_compute(feed: TrainData, distiller: Distiller, form: Form, parts: dict[str, Rows], positions: int) -> TrainData:
    teacher = distiller.teacher
    assert teacher is not None
    started, built, size, mass = time.monotonic(), list[str](), 0, 0.0
    unpacked = feed.unpacked  # with or without packing, the teacher runs on unpacked examples
    weights = digest_of_weights(teacher.model)
    made: dict[str, Any] = {}
    found: list[str] = []
    for name, part in parts.items():
        rows = getattr(unpacked, name)
        order = np.lexsort((part.first, -part.lengths))
        inputs = {
            "teacher": weights,
            "rows": part.digest,
            "order": hashlib.sha256(part.first[order].tobytes()).hexdigest(),
            "form": [form.kind, form.width, form.dtype, form.temperature, "drawn by batch"],
            "vocabulary": distiller.width,
            "batch": feed.plan.eval_batch,
            "dtype": str(feed.dtype),
            "head": [teacher.scale, teacher.softcap],
            "adapter": teacher.adapted is not None,
            **cache_inputs(unpacked, teacher.model, feed.dtype),
        }

        def build(target: Path | None, name: str = name, part: Rows = part, rows: Any = rows, order: Any = order) -> Any:
            built.append(name)
            kept = [0.0]
            write(target, _compute_outputs(unpacked, distiller, form, rows, part, order, kept))
            return {"mass": kept[0]}

        needed = int(part.supervised.sum()) * form.position.itemsize
        text = f"{form.kind} of a teacher for {len(part.first):,} examples"
        entry = feed.group.fetch("teacher", cache.fingerprint(inputs), text, build, needed)
        found += [] if name in built else [entry.path.stem]
        made[name] = WithTeacher(rows, entry.path, np.argsort(order)[part.which])
        size, mass = size + entry.size, mass + float(entry.value["mass"])
    seconds, share = time.monotonic() - started, mass / max(positions, 1)
    when = f"outputs computed in {seconds:.1f} s" if built else "outputs loaded from the cache"
    what = {
        "hidden": "hidden states, exact",
        "sampled": f"{form.width} samples each",
        "top_k": f"{form.width} most likely tokens each",
    }
    which = "all examples" if "train" in parts else "evaluation examples (training has one epoch)"
    feed.say(
        f"{'teacher':<9} {when} for {positions:,} positions of {which}: {what[form.kind]}, {file_size(size)}, "
        f"{share:.1%} of its probability mass"
    )
    facts = {"form": form.kind, "width": form.width, "bytes": size, "mass": share, "seconds": seconds, "built": built}
    feed = feed.with_rows(TeacherCollator(feed.collate, form), made.get("train", unpacked.train), made["eval"])
    distiller.head = teacher.head
    if form.kind == "hidden":
        _check(feed, teacher, found)
    return add_facts(feed, cache=facts)


def _compute_outputs(
    feed: TrainData, distiller: Distiller, form: Form, rows: Any, part: Rows, order: np.ndarray, kept: list[float]
) -> Iterator[list[bytes]]:
    """The bytes to cache of each example, batch by batch, in this order; adds the probability mass to `kept`."""
    teacher, size = distiller.teacher, feed.plan.eval_batch
    assert teacher is not None
    groups = [(number, order[start : start + size]) for number, start in enumerate(range(0, len(order), size))]
    head = teacher.head
    head = head._replace(
        weight=head.weight[: distiller.width], bias=None if head.bias is None else head.bias[: distiller.width]
    )

    def logits(hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        return blocks(hidden, head)

    def ask(numbered: tuple[int, np.ndarray]) -> tuple[list[bytes], float]:
        number, group = numbered
        hidden = teacher_states(feed, teacher, feed.batch([int(part.first[one]) for one in group], rows))
        counts = part.supervised[group]
        if counts.sum() != len(hidden):
            raise RuntimeError("examples and batches disagree about the supervised positions")
        with torch.no_grad():
            # each batch has its own generator, on whichever process it runs
            blob, mass = form.bytes_of(hidden, logits, torch.Generator().manual_seed(number))
        ends = np.cumsum([0, *counts]) * form.position.itemsize
        return [blob[start:end] for start, end in pairwise(ends)], mass

    for blobs, mass in feed.each(groups, ask, "running the teacher"):
        kept[0] += mass
        yield blobs


def teacher_states(feed: TrainData, teacher: FrozenTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's hidden states of a batch's supervised positions, `[n, H]`."""
    inputs = {name: tensor for name, tensor in batch.items() if not name.startswith(("teacher_", "loss_rows", "targets"))}
    with feed.autocast():
        states: torch.Tensor = teacher.hidden((), inputs, batch["loss_rows"])
    return states


def _check(feed: TrainData, teacher: FrozenTeacher, found: list[str]) -> None:
    """Compare cached outputs with the teacher's, for some examples in another order.

    Raises:
        UserError: entries loaded from the cache (`found`) are those of another teacher.
    """
    batch = feed.batch([len(feed.eval) - 1, 0] if len(feed.eval) > 1 else [0])
    said, brought = teacher_states(feed, teacher, batch).float(), batch["teacher_hidden"].float()
    allowed = TOLERANCE[batch["teacher_hidden"].dtype.itemsize] * float(said.abs().max())
    if float((said - brought).abs().max()) <= allowed:
        return
    if found:
        raise UserError(
            f"strategy.teacher_cache: the outputs in the cache ({', '.join(found)}) are not those of this teacher; remove them "
            f"(hfstrat cache rm {' '.join(found)}), or set teacher_cache: {{form: 'off'}}"
        )
    raise RuntimeError("cached outputs differ from those of the teacher")


@torch.no_grad()
def evaluate_teacher(feed: TrainData, distiller: Distiller) -> TrainData:
    """The data with loss and accuracy of the teacher on the evaluation data, measured like the student's."""
    teacher, nll, right, count = distiller.teacher, 0.0, 0.0, 0
    assert teacher is not None
    head, size = teacher.head, feed.plan.eval_batch

    def measure(start: int) -> tuple[float, float, int]:
        batch = feed.batch(list(range(start, min(start + size, len(feed.eval)))))
        hidden = batch.get("teacher_hidden")
        hidden = teacher_states(feed, teacher, batch) if hidden is None else hidden
        with feed.autocast():
            losses, correct = head_scores(hidden, head.weight, batch["targets"], head.bias, head.softcap, head.scale)
        return float(losses.sum()), float(correct.sum()), len(losses)

    for one in feed.each(list(range(0, len(feed.eval), size)), measure, "evaluating the teacher", for_all=True):
        nll, right, count = nll + one[0], right + one[1], count + one[2]
    from hfstrat.models.load import count_parameters

    found = {
        "loss": nll / max(count, 1),
        "token_accuracy": right / max(count, 1),
        "parameters": count_parameters(teacher.model)[1],
    }
    feed.say(f"{'teacher':<9} evaluation loss {found['loss']:.4f}, token accuracy {found['token_accuracy']:.1%}")
    return add_facts(feed, teacher=found)


def add_facts(feed: TrainData, **facts: Any) -> TrainData:
    return replace(feed, facts={**feed.facts, "distillation": {**feed.facts.get("distillation", {}), **facts}})
