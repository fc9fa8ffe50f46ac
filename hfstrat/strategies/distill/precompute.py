"""Whether the teacher is asked once, in which form its answers are kept, and the asking."""

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
from hfstrat.strategies.distill.teacher_cache import Form, Rows, TeacherCollator, WithTeacher, write
from hfstrat.strategies.frozen.states import digest_of_weights, surroundings

if TYPE_CHECKING:
    from hfstrat.recipe.distill import Cache
    from hfstrat.strategies.distill.objective import Distiller, FrozenTeacher
    from hfstrat.trainer.train_data import TrainData

TOLERANCE = {4: 1e-3, 2: 5e-2}  # by the bytes of a number; of the largest state: other batches, other kernels


def ask_once(feed: TrainData, distiller: Distiller, wish: Cache) -> TrainData:
    """The feed whose rows bring along what the teacher says about them, where that pays and fits; said aloud either way.

    Raises:
        UserError: a form was asked for that takes more than its budget.
    """
    teacher = distiller.teacher
    assert teacher is not None
    if wish.form == "off":
        return ask_anew(feed, distiller, "teacher_cache: {form: off}")
    if distiller.match is not None:
        return ask_anew(feed, distiller, "the states of its layers are compared, which are not kept")
    again = feed.is_endless or feed.epochs > 1 or wish.form != "auto"
    rows = {"eval": Rows.of(feed.eval)} | ({"train": Rows.of(feed.unpacked.train)} if again else {})
    positions = sum(int(part.supervised.sum()) for part in rows.values())
    form, reason = choose(feed, distiller, wish, positions)
    if form is None:
        return ask_anew(feed, distiller, reason)
    feed = _fetch(feed, distiller, form, rows, positions)
    feed = judge(feed, distiller)
    if again:
        distiller.head, distiller.teacher = _own(teacher.head), None
        del teacher
        gc.collect()  # its body goes now, before gradients and moments come
    return feed


def choose(feed: TrainData, distiller: Distiller, wish: Cache, positions: int) -> tuple[Form | None, str]:
    """The form, or None and why.

    `auto` takes the exact one if the budget has room for it, then draws; never likeliest tokens, which are a lower bound.
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
                f"more than {wish.budget}; raise it, or take auto"
            )
        return forms[wish.form], ""
    fits = [name for name in ("hidden", "sampled") if needed[name] <= wish.bytes]
    fits = [name for name in fits if name == "hidden" or mix.divergence == "forward_kl"]
    if not fits:
        return None, f"its hidden states take {file_size(needed['hidden'])}, more than teacher_cache.budget {wish.budget}"
    return forms[fits[0]], ""


def ask_anew(feed: TrainData, distiller: Distiller, reason: str) -> TrainData:
    """The feed as it is, with the teacher's own metrics among its facts."""
    feed.say(f"{'teacher':<9} is asked about every batch anew: {reason}")
    return judge(feed, distiller)


def _own(head: Any) -> Any:
    """A head that keeps nothing else alive."""
    return head._replace(weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())


def _fetch(feed: TrainData, distiller: Distiller, form: Form, parts: dict[str, Rows], positions: int) -> TrainData:
    teacher = distiller.teacher
    assert teacher is not None
    started, built, size, mass = time.monotonic(), list[str](), 0, 0.0
    unpacked = feed.unpacked  # packed or not, the teacher is asked about rows that stand alone
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
            **surroundings(unpacked, teacher.model, feed.dtype),
        }

        def build(target: Path | None, name: str = name, part: Rows = part, rows: Any = rows, order: Any = order) -> Any:
            built.append(name)
            kept = [0.0]
            write(target, _answers(unpacked, distiller, form, rows, part, order, kept))
            return {"mass": kept[0]}

        needed = int(part.supervised.sum()) * form.position.itemsize
        text = f"{form.kind} of a teacher for {len(part.first):,} rows"
        entry = feed.group.fetch("teacher", cache.fingerprint(inputs), text, build, needed)
        found += [] if name in built else [entry.path.stem]
        made[name] = WithTeacher(rows, entry.path, np.argsort(order)[part.which])
        size, mass = size + entry.size, mass + float(entry.value["mass"])
    seconds, share = time.monotonic() - started, mass / max(positions, 1)
    when = f"asked once, in {seconds:.1f} s" if built else "was asked before: found in the cache"
    what = {
        "hidden": "hidden states, exact",
        "sampled": f"{form.width} draws each",
        "top_k": f"{form.width} likeliest and the rest",
    }
    which = "all rows" if "train" in parts else "evaluation rows (training asks once anyway)"
    feed.say(
        f"{'teacher':<9} {when} about {positions:,} positions of {which}: {what[form.kind]}, {file_size(size)}, "
        f"{share:.1%} of its probability mass"
    )
    facts = {"form": form.kind, "width": form.width, "bytes": size, "mass": share, "seconds": seconds, "built": built}
    feed = feed.with_rows(TeacherCollator(feed.collate, form), made.get("train", unpacked.train), made["eval"])
    distiller.head = teacher.head
    if form.kind == "hidden":
        _check(feed, teacher, found)
    return with_facts(feed, cache=facts)


def _answers(
    feed: TrainData, distiller: Distiller, form: Form, rows: Any, part: Rows, order: np.ndarray, kept: list[float]
) -> Iterator[list[bytes]]:
    """What is kept of each row, batch by batch, in this order; adds up the mass in `kept`."""
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
        hidden = states_of(feed, teacher, feed.batch([int(part.first[one]) for one in group], rows))
        counts = part.supervised[group]
        if counts.sum() != len(hidden):
            raise RuntimeError("rows and batches disagree about which positions carry loss")
        with torch.no_grad():
            # each batch draws by itself, whichever process it falls to
            blob, mass = form.bytes_of(hidden, logits, torch.Generator().manual_seed(number))
        ends = np.cumsum([0, *counts]) * form.position.itemsize
        return [blob[start:end] for start, end in pairwise(ends)], mass

    for blobs, mass in feed.each(groups, ask, "asking the teacher"):
        kept[0] += mass
        yield blobs


def states_of(feed: TrainData, teacher: FrozenTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The teacher's hidden states of a batch's supervised positions, `[n, H]`."""
    inputs = {name: tensor for name, tensor in batch.items() if not name.startswith(("teacher_", "loss_rows", "targets"))}
    with feed.computing():
        states: torch.Tensor = teacher.hidden((), inputs, batch["loss_rows"])
    return states


def _check(feed: TrainData, teacher: FrozenTeacher, found: list[str]) -> None:
    """Compare what the rows bring along with what the teacher says, for some rows in another order.

    Raises:
        UserError: it was found in the cache (these entries), and somebody has put it there.
    """
    batch = feed.batch([len(feed.eval) - 1, 0] if len(feed.eval) > 1 else [0])
    said, brought = states_of(feed, teacher, batch).float(), batch["teacher_hidden"].float()
    allowed = TOLERANCE[batch["teacher_hidden"].dtype.itemsize] * float(said.abs().max())
    if float((said - brought).abs().max()) <= allowed:
        return
    if found:
        raise UserError(
            f"strategy.teacher_cache: the outputs in the cache ({', '.join(found)}) are not those of this teacher, but of "
            f"another one. Remove them (hfstrat cache rm {' '.join(found)}), or set teacher_cache: {{form: 'off'}}"
        )
    raise RuntimeError("what the rows bring along is not what the teacher says")


@torch.no_grad()
def judge(feed: TrainData, distiller: Distiller) -> TrainData:
    """The teacher's own loss and accuracy on the evaluation rows, as the student's are measured."""
    teacher, nll, right, count = distiller.teacher, 0.0, 0.0, 0
    assert teacher is not None
    head, size = teacher.head, feed.plan.eval_batch

    def measure(start: int) -> tuple[float, float, int]:
        batch = feed.batch(list(range(start, min(start + size, len(feed.eval)))))
        hidden = batch.get("teacher_hidden")
        hidden = states_of(feed, teacher, batch) if hidden is None else hidden
        with feed.computing():
            losses, correct = head_scores(hidden, head.weight, batch["targets"], head.bias, head.softcap, head.scale)
        return float(losses.sum()), float(correct.sum()), len(losses)

    for one in feed.each(list(range(0, len(feed.eval), size)), measure, "judging the teacher", for_all=True):
        nll, right, count = nll + one[0], right + one[1], count + one[2]
    from hfstrat.models.load import count_parameters

    found = {
        "loss": nll / max(count, 1),
        "token_accuracy": right / max(count, 1),
        "parameters": count_parameters(teacher.model)[1],
    }
    feed.say(f"{'teacher':<9} evaluation loss {found['loss']:.4f}, token accuracy {found['token_accuracy']:.1%}")
    return with_facts(feed, teacher=found)


def with_facts(feed: TrainData, **facts: Any) -> TrainData:
    return replace(feed, facts={**feed.facts, "distillation": {**feed.facts.get("distillation", {}), **facts}})
