"""From the outputs of a detector to boxes, by the image processor of the model, as in a pipeline of transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hfstrat.data.render import IGNORED
from hfstrat.tasks.object_detection.scores import MOST, NO_SCORE

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def kept_of(processor: Any, logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor, threshold: float) -> list[Kept]:
    """Scores, classes and corners in pixels of the boxes of each image with a score above the threshold, the best first.

    Args:
        logits, boxes: outputs of the model, `[B, Q, K]` and `[B, Q, 4]`.
        sizes: height and width of each image, `[B, 2]`.
    """
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes.to(boxes.device))
    kept = []
    for each in found:
        order = each["scores"].argsort(descending=True, stable=True)
        kept.append((each["scores"][order], each["labels"][order], each["boxes"][order]))
    return kept


def detections_of(processor: Any, logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Score, class and corners of the best detections of each image, `[B, MOST, 6]`, filled up with `NO_SCORE`."""
    table = boxes.new_full((len(boxes), MOST, 6), NO_SCORE, dtype=torch.float32)
    for index, (scores, labels, corners) in enumerate(kept_of(processor, logits, boxes, sizes, -1.0)):
        rows = torch.cat([scores[:, None], labels[:, None].to(scores), corners.to(scores)], dim=1)[:MOST]
        table[index, : len(rows)] = rows
    return table


def truth_of(boxes: torch.Tensor, classes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Class and corners in pixels of the boxes of each image, `[B, M, 5]`, filled up with the class -1.

    Args:
        boxes: center, width and height as shares of the image, `[B, M, 4]`.
    """
    scale = sizes.flip(1).repeat(1, 2)[:, None].to(boxes)  # width, height, width, height
    corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1) * scale
    kinds = torch.where(classes == IGNORED, -1, classes).to(boxes)
    return torch.cat([kinds[..., None], corners], dim=-1)
