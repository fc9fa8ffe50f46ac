"""The losses of transformers' detectors, so that equal splits of a step give equal gradients.

Each loss matches queries with boxes (DETR, arXiv 2005.12872) and sums terms over them. transformers divides the sums by the
boxes of a forward pass, or of the passes of all processes, and DETR's cross-entropy by the weights of its queries: with
gradient accumulation, passes with few boxes would then count as much as passes with many. Here the model returns the sums, and
`Metrics.loss` divides by the boxes, query weights and images of the complete optimizer step.

The matching and the terms are transformers' own. Denoising queries (RT-DETR, D-FINE) are random and depend on the images of
their pass, as dropout does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from hfstrat.data.render import IGNORED
from hfstrat.models import unused_parameters
from hfstrat.tasks.object_detection.families import DISTRIBUTION, FOCAL, GROUPED, SOFTMAX, VARIFOCAL

Targets = list[dict[str, torch.Tensor]]


class Sums(NamedTuple):
    """The loss of a forward pass, not yet divided, as tensors without dimensions.

    `boxes` is to be divided by the boxes of the step, `queries` by the weights of its queries, `images` by its images; `slots`
    are the queries of an image and `empty` the weight of one without a box.
    """

    boxes: torch.Tensor
    queries: torch.Tensor
    images: torch.Tensor
    slots: torch.Tensor
    empty: torch.Tensor


def scaled(loss: torch.Tensor, boxes: torch.Tensor, images: int) -> torch.Tensor:
    """The loss of a forward pass for the optimizer.

    Args:
        loss: the `Sums` of the pass, stacked.
        boxes: of the complete step.
        images: of the complete step.
    """
    found = Sums(*loss.unbind())
    some = boxes.clamp(min=1)
    weights = boxes + (images * found.slots - boxes) * found.empty
    total: torch.Tensor = found.boxes / some + found.queries / weights.clamp(min=1e-9) + found.images / images
    return total


def bind(model: Any) -> Callable[[], None]:
    """Make a model in training take `boxes` and `class_labels` of a batch and return the sums of its loss, in place.

    Returns:
        What undoes it.
    """
    forward, sums = model.forward, SUMS_OF[model.config.model_type]

    def bound(
        pixel_values: torch.Tensor,
        boxes: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
        num_items_in_batch: Any = None,
        **options: Any,
    ) -> Any:
        if boxes is None or class_labels is None or not model.training:
            return forward(pixel_values=pixel_values, **options)
        return forward(pixel_values=pixel_values, labels=targets_of(boxes, class_labels), **options)

    def loss_function(logits: Any, labels: Any, device: Any, pred_boxes: Any, config: Any, *args: Any, **options: Any) -> Any:
        wide = [_float(each) for each in args]
        more = {name: _float(value) for name, value in options.items()}
        return torch.stack(sums(_float(logits), labels, device, _float(pred_boxes), config, *wide, **more)), None, None

    model.forward, model.loss_function = bound, loss_function
    remove = unused_parameters.use_all(model)  # without boxes there are no denoising queries, which have an embedding

    def undo() -> None:
        remove()
        del model.forward, model._loss_function

    return undo


def _float(value: Any) -> Any:
    """Half precision as float32: a loss is a sum of many terms."""
    half = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if half else value


def targets_of(boxes: torch.Tensor, classes: torch.Tensor) -> Targets:
    """The boxes of each image as the models take them, from `[B, M, 4]` and `[B, M]`."""
    there = classes != IGNORED
    return [
        {"class_labels": labels[kept], "boxes": some[kept]} for some, labels, kept in zip(boxes, classes, there, strict=True)
    ]


def _sums(like: torch.Tensor, config: Any, boxes: Any = 0.0, queries: Any = 0.0, images: Any = 0.0, slots: int = 0) -> Sums:
    empty = getattr(config, "eos_coefficient", 0.0) if slots else 0.0
    return Sums(
        *(torch.as_tensor(each, dtype=like.dtype, device=like.device) for each in (boxes, queries, images, slots, empty))
    )


def _heads(logits: Any, boxes: Any, config: Any, classes: Any, coordinates: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The outputs of the last layer, and of those before if they have a loss."""
    yield {"logits": logits, "pred_boxes": boxes}
    if config.auxiliary_loss:
        for one, other in zip(classes[:-1], coordinates[:-1], strict=True):
            yield {"logits": one, "pred_boxes": other}


def _box_sum(criterion: Any, head: dict[str, torch.Tensor], labels: Targets, indices: Any, config: Any) -> torch.Tensor:
    terms = criterion.get_loss("boxes", head, labels, indices, 1.0)
    found: torch.Tensor = config.bbox_loss_coefficient * terms["loss_bbox"] + config.giou_loss_coefficient * terms["loss_giou"]
    return found


def softmax_criterion(config: Any, like: torch.Tensor) -> Any:
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = ImageLoss(matcher, config.num_labels, config.eos_coefficient, ["labels", "boxes"])
    criterion.empty_weight = criterion.empty_weight.to(like)
    return criterion


def softmax_sums(
    logits: Any, labels: Targets, device: Any, pred_boxes: Any, config: Any, classes: Any = None, coords: Any = None, **_: Any
) -> Sums:
    """DETR and YOLOS: cross-entropy with a class for no object, L1 and generalized IoU."""
    criterion, boxes, queries = softmax_criterion(config, logits), logits.new_zeros(()), logits.new_zeros(())
    count, slots = logits.shape[:2]
    for head in _heads(logits, pred_boxes, config, classes, coords):
        indices = criterion.matcher(head, labels)
        matched = sum(len(one) for one, _ in indices)
        weight = matched + (count * slots - matched) * config.eos_coefficient
        queries = queries + criterion.get_loss("labels", head, labels, indices, 1.0)["loss_ce"] * weight
        boxes = boxes + _box_sum(criterion, head, labels, indices, config)
    return _sums(logits, config, boxes=boxes, queries=queries, slots=slots)


def focal_criterion(config: Any, like: torch.Tensor) -> Any:
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    return DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"]).to(like)


def focal_sums(
    logits: Any, labels: Targets, device: Any, pred_boxes: Any, config: Any, classes: Any = None, coords: Any = None, **_: Any
) -> Sums:
    """Conditional, Deformable and DAB-DETR: focal loss, L1 and generalized IoU, all per box."""
    criterion, boxes = focal_criterion(config, logits), logits.new_zeros(())
    for head in _heads(logits, pred_boxes, config, classes, coords):
        indices = criterion.matcher(head, labels)
        boxes = boxes + criterion.get_loss("labels", head, labels, indices, 1.0)["loss_ce"]
        boxes = boxes + _box_sum(criterion, head, labels, indices, config)
    return _sums(logits, config, boxes=boxes)


def grouped_criterion(config: Any, like: torch.Tensor) -> Any:
    from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

    matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    return LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"], config.group_detr).to(like)


def grouped_sums(
    logits: Any,
    labels: Targets,
    device: Any,
    pred_boxes: Any,
    config: Any,
    classes: Any = None,
    coords: Any = None,
    first_classes: Any = None,
    first_coords: Any = None,
    **_: Any,
) -> Sums:
    """LW-DETR and RF-DETR: an IoU-aware class loss, L1 and generalized IoU; each group of queries counts equally."""
    criterion, boxes = grouped_criterion(config, logits), logits.new_zeros(())
    groups = logits.shape[1] // config.num_queries
    heads = [*_heads(logits, pred_boxes, config, classes, coords), {"logits": first_classes, "pred_boxes": first_coords}]
    for head in heads:
        indices = criterion.matcher(head, labels, groups)
        term = criterion.get_loss("labels", head, labels, indices, 1.0)["loss_ce"]
        boxes = boxes + (config.class_loss_coefficient * term + _box_sum(criterion, head, labels, indices, config)) / groups
    return _sums(logits, config, boxes=boxes)


def varifocal_sums(logits: Any, labels: Targets, device: Any, pred_boxes: Any, config: Any, *args: Any, **options: Any) -> Sums:
    """RT-DETR: varifocal loss, L1 and generalized IoU, also of denoising queries; all per box of the pass."""
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    total, _, _ = RTDetrForObjectDetectionLoss(logits, labels, device, pred_boxes, config, *args, **options)
    return _sums(logits, config, boxes=total * max(1, _count(labels)))


def _count(labels: Targets) -> int:
    return sum(len(one["class_labels"]) for one in labels)


def distribution_sums(
    logits: Any, labels: Targets, device: Any, pred_boxes: Any, config: Any, *args: Any, **options: Any
) -> Sums:
    """D-FINE (arXiv 2410.13842): as RT-DETR, with distributions of the corners.

    The distillation between its layers is a mean over the queries of a pass, so it is computed image by image and counts per
    image.
    """
    from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss

    boxes, images = torch.zeros_like(logits.sum()), torch.zeros_like(logits.sum())
    meta = options.pop("denoising_meta_values", None)
    for index, target in enumerate(labels):
        at = slice(index, index + 1)
        own = [_part(each, at) for each in args]
        more = {name: _part(value, at) for name, value in options.items()}
        if meta is not None:
            more["denoising_meta_values"] = {**meta, "dn_positive_idx": meta["dn_positive_idx"][at]}
        _, terms, _ = DFineForObjectDetectionLoss(logits[at], [target], device, pred_boxes[at], config, *own, **more)
        for name, term in terms.items():
            if name.startswith("loss_ddf"):
                images = images + term
            else:
                boxes = boxes + term * max(1, len(target["class_labels"]))
    return _sums(logits, config, boxes=boxes, images=images)


def _part(value: Any, at: slice) -> Any:
    return value[at] if isinstance(value, torch.Tensor) and value.dim() > 1 else value


SUMS_OF: dict[str, Callable[..., Sums]] = {
    **dict.fromkeys(SOFTMAX, softmax_sums),
    **dict.fromkeys(FOCAL, focal_sums),
    **dict.fromkeys(GROUPED, grouped_sums),
    **dict.fromkeys(VARIFOCAL, varifocal_sums),
    **dict.fromkeys(DISTRIBUTION, distribution_sums),
}


def image_sums(config: Any, logits: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The loss of the last layer of each image, summed over its boxes, `[B]`, for evaluations."""
    alone = _OneLayer(config)
    found = []
    for index, target in enumerate(targets):
        at = slice(index, index + 1)
        sums = _last_layer(alone, logits[at], boxes[at], [target])
        found.append(sums.boxes + sums.queries)
    return torch.stack(found)


class _OneLayer:
    """A config without losses of earlier layers, denoising and groups."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return False if name == "auxiliary_loss" else getattr(self.config, name)


def _last_layer(config: Any, logits: torch.Tensor, boxes: torch.Tensor, targets: Targets) -> Sums:
    family = config.model_type
    if family in (*VARIFOCAL, *DISTRIBUTION):
        return varifocal_sums(logits, targets, logits.device, boxes, config)
    if family in GROUPED:
        criterion, head = grouped_criterion(config, logits), {"logits": logits, "pred_boxes": boxes}
        indices = criterion.matcher(head, targets, 1)
        term = criterion.get_loss("labels", head, targets, indices, 1.0)["loss_ce"] * config.class_loss_coefficient
        return _sums(logits, config, boxes=term + _box_sum(criterion, head, targets, indices, config))
    return SUMS_OF[family](logits, targets, logits.device, boxes, config)
