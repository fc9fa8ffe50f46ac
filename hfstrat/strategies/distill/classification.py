"""The loss of a student that is a classifier, and caching the class logits of its teacher."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hfstrat.data.collate import TEACHER_TYPES, ClassCollator, has_token_types
from hfstrat.data.label_names import sources_of
from hfstrat.models.chunked_loss import Head
from hfstrat.models.fused_loss import is_bound
from hfstrat.models.load import Base, count_parameters
from hfstrat.recipe.distill import Cache
from hfstrat.recipe.format import file_size, plural
from hfstrat.strategies.distill.loss import Mix, Teacher, distill_loss_of_logits
from hfstrat.strategies.distill.teacher_cache import COLUMN, Rows, fetch_outputs, write
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Metrics
from hfstrat.tasks.text_classification.scores import class_loss
from hfstrat.trainer.cached_columns import CachedColumnCollator, digest_of_weights, groups_of
from hfstrat.trainer.train_data import TrainData

NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "return_dict", "token_type_ids")


@dataclass
class ClassOutput(ModelOutput):  # type: ignore[misc]
    """Logits `[B, labels]` of the student and, in training, of its teacher."""

    logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None


def class_distill_sum(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, mix: Mix) -> torch.Tensor:
    """The mixed loss of `Mix` summed over examples; with several labels per example also over the labels, each a binary choice.

    Args:
        logits: `[B, labels]` of the student, as `teacher` of the teacher.
        labels: int64 `[B]`, or float `[B, labels]` of 0 and 1.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, teacher = logits.to(wide), teacher.to(wide)
    if labels.is_floating_point():  # a binary choice is one between the logit and 0
        logits, teacher = (torch.stack([one, torch.zeros_like(one)], -1).flatten(0, 1) for one in (logits, teacher))
        labels = (labels < 0.5).long().flatten()
    width = logits.shape[-1]
    exact = Head(torch.eye(width, dtype=wide, device=logits.device))
    return distill_loss_of_logits(logits, labels, Teacher(width, teacher, exact), mix)


class ClassDistiller:
    """The loss of a classifier with a teacher. Bound to the model, it adds the teacher's logits to the outputs.

    In evaluation the teacher does not run: metrics are the student's own.
    """

    task = "text-classification"

    def __init__(self, mix: Mix) -> None:
        self.mix = mix
        self.teacher: PreTrainedModel | None = None
        self.order: torch.Tensor | None = None  # the teacher's labels in the student's order
        self.names: tuple[str, ...] = ()
        self.is_active = False

    def bind(self, model: PreTrainedModel) -> str | None:
        """Bind to the model; returns the reason if that is not possible. `fused_loss.unbind_head_loss` removes it."""
        if is_bound(model):
            return "its forward has been replaced already"
        original, distiller = type(model).forward, self

        def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            cached, types = kwargs.pop("teacher_logits", None), kwargs.pop(TEACHER_TYPES, None)
            outputs = original(self, *args, **kwargs)
            if not (distiller.is_active and self.training):
                return outputs
            if cached is None:
                cached = distiller.teacher_outputs(args, {**kwargs, TEACHER_TYPES: types})
            return ClassOutput(logits=outputs.logits, teacher_logits=cached)

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        forward.objective = distiller  # type: ignore[attr-defined]
        model.forward = MethodType(forward, model)
        return None

    def other_models(self, base: Base) -> list[PreTrainedModel]:
        """The models that are given the student's batches."""
        return [] if self.teacher is None else [self.teacher]

    def freeze(self, teacher: PreTrainedModel, is_own: bool) -> PreTrainedModel:
        """The frozen teacher."""
        return teacher if is_own else teacher.requires_grad_(False).eval()

    def set_teacher(self, teacher: PreTrainedModel, base: Base, trained: Any) -> None:
        """Use this teacher from now on. Raises ValueError: it has other labels."""
        if teacher is base.model:
            raise ValueError(
                "a classifier cannot be its own teacher, since its head is trained; set teacher, or shrink a trained one"
            )
        ours, theirs = (_names(model) for model in (base.model, teacher))
        order = sources_of(ours, theirs)
        if None in order or len(ours) != len(theirs):
            odd = sorted(set(ours) ^ set(theirs))[0]
            raise ValueError(
                f"its labels are {', '.join(theirs[:4])}, and those of the data {', '.join(ours[:4])} (only one has {odd}); "
                "use a teacher with these labels, or, if only the names differ, change id2label in its config.json"
            )
        # the head of a decoder finds the last token by the id of the padding token
        padding = getattr(base.model.config.get_text_config(), "pad_token_id", None)
        if padding is not None:  # models of images have none
            teacher.config.get_text_config().pad_token_id = padding
        self.order = torch.tensor(order)
        self.teacher, self.names, self.is_active = teacher, ours, True

    @torch.no_grad()
    def teacher_outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits `[B, labels]`, in the student's order."""
        assert self.teacher is not None, "no teacher, and no cached outputs in the batch"
        assert self.order is not None
        taken = inspect.signature(self.teacher.forward).parameters  # the student may distinguish two texts in another way
        given = {name: value for name, value in kwargs.items() if name not in NOT_FOR_THE_TEACHER and name in taken}
        if kwargs.get(TEACHER_TYPES) is not None:
            given["token_type_ids"] = kwargs[TEACHER_TYPES]
        device = next(iter(given.values())).device if given else args[0].device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        logits: torch.Tensor = self.teacher(*args, **given).logits
        return logits.index_select(-1, self.order.to(device)).float()

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """As `losses.class_loss`, with the teacher."""
        teacher = outputs.get("teacher_logits")
        if teacher is None:
            return class_loss(outputs, labels, num_items_in_batch)
        total = class_distill_sum(outputs["logits"], teacher, labels, self.mix)
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    def collator(self, collate: ClassCollator, teacher: PreTrainedModel) -> ClassCollator:
        """The collator with token types for a teacher that distinguishes two texts by them."""
        return collate.with_teacher(has_token_types(teacher))

    @property
    def metrics(self) -> Metrics:
        """The metrics of the teacher itself."""
        return replace(TASKS[self.task].metrics, labels=self.names)


class ImageDistiller(ClassDistiller):
    """The same for classes of images: a teacher is given the pixels of the student."""

    task = "image-classification"


class AudioDistiller(ClassDistiller):
    """The same for classes of recordings: a teacher is given the inputs of the student."""

    task = "audio-classification"


class RegressionDistiller(ClassDistiller):
    """The same for numbers: the squared error from the teacher's predictions in place of the divergence, standardized."""

    task = "regression"
    units: Any = None

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        predicted, metrics = outputs.get("teacher_logits"), self.metrics
        own = metrics.loss(outputs, labels, num_items_in_batch)
        if predicted is None:
            return own
        matched = metrics.loss(outputs, self.units.standardize(predicted.float()), num_items_in_batch)
        return self.mix.alpha * matched + (1 - self.mix.alpha) * own

    def collator(self, collate: ClassCollator, teacher: PreTrainedModel) -> ClassCollator:
        self.units = collate.units
        return super().collator(collate, teacher)

    @property
    def metrics(self) -> Metrics:
        of_data: Any = SimpleNamespace(label_names=self.names, units=self.units)
        return TASKS[self.task].metrics.for_data(of_data)


def cache_outputs(data: TrainData, distiller: ClassDistiller, options: Cache) -> TrainData:
    """The data with cached class logits of the teacher, if there is more than one epoch."""
    facts: dict[str, Any] = {"teacher": _evaluate_teacher(data, distiller)}
    if getattr(data.collate, "varies", False):
        data.say(f"{'teacher':<9} outputs are computed on the fly: examples are augmented in each epoch")
    elif options.form == "auto" and (data.is_endless or data.epochs > 1):
        data, facts["cache"] = _cache_logits(data, distiller)
    else:
        data.say(f"{'teacher':<9} outputs are computed on the fly: {'form: off' if options.form == 'off' else 'one epoch'}")
    return replace(data, facts={**data.facts, "distillation": facts})


def _cache_logits(data: TrainData, distiller: ClassDistiller) -> tuple[TrainData, dict[str, Any]]:
    assert distiller.teacher is not None
    assert distiller.order is not None
    part, started = Rows.of(data.train), time.monotonic()
    inputs = {"labels": distiller.names, "classes": distiller.order.tolist(), "form": "class logits"}

    def logits_of(group: list[int]) -> list[bytes]:
        batch = data.batch([int(part.first[one]) for one in group], data.train)
        with data.autocast():
            return [row.numpy().tobytes() for row in distiller.teacher_outputs((), batch).cpu()]

    def build(target: Path | None) -> None:
        write(target, data.each(groups_of(part.order, data.plan.eval_batch), logits_of, "running the teacher"))

    teacher, needed = distiller.teacher, 4 * len(distiller.names) * len(part.first)
    text = f"class logits of a teacher for {plural(len(part.first), 'example')}"
    found = fetch_outputs(data, data.train, part, teacher, digest_of_weights(teacher), inputs, text, build, needed)
    seconds, size = time.monotonic() - started, found.entry.size
    when = f"outputs computed in {seconds:.1f} s" if found.is_new else "outputs loaded from the cache"
    data.say(f"{'teacher':<9} {when} for {plural(len(part.first), 'example')}: class logits, exact, {file_size(size)}")
    distiller.teacher = None
    built = ["train"] if found.is_new else []
    facts = {"form": "class_logits", "bytes": size, "mass": 1.0, "seconds": seconds, "built": built}
    return replace(data, train=found.rows, collate=ClassTeacherCollator(data.collate)), facts


def _evaluate_teacher(data: TrainData, distiller: ClassDistiller) -> dict[str, Any]:
    """The metrics of the teacher on the evaluation data."""
    assert distiller.teacher is not None
    size = data.plan.eval_batch

    def measure(start: int) -> Any:
        places = list(range(start, min(start + size, len(data.eval))))
        labels = data.collate([data.eval[place] for place in places])["labels"]
        with data.autocast():
            logits = distiller.teacher_outputs((), data.batch(places)).cpu()
        return distiller.metrics.sums(lambda: {"logits": logits}, {"labels": labels})

    parts = data.each(list(range(0, len(data.eval), size)), measure, "evaluating the teacher", for_all=True)
    metrics, _ = distiller.metrics.measure(tuple(torch.cat(one).numpy() for one in zip(*parts, strict=True)))
    data.say(f"{'teacher':<9} evaluation {TASKS[distiller.task].text.metrics(metrics)}")
    return {**metrics, "parameters": count_parameters(distiller.teacher)[1]}


class ClassTeacherCollator(CachedColumnCollator):
    """Adds the cached class logits, `[B, labels]`."""

    column = COLUMN

    def added(self, values: list[list[Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"teacher_logits": torch.from_numpy(np.stack([np.frombuffer(one, dtype=np.float32) for (one,) in values]))}


def _names(model: PreTrainedModel) -> tuple[str, ...]:
    names: dict[int, str] = model.config.id2label
    return tuple(names[number] for number in sorted(names))
