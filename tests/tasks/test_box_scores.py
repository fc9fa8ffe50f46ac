"""Average precision against pycocotools and faster-coco-eval, and as a function of weights."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from hfstrat.tasks.object_detection.scores import NO_SCORE, Detections

IMAGES, MOST_FOUND, MOST_TRUE, CLASSES = 25, 60, 12, 3


def random_boxes(source: np.random.Generator, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Detections around boxes and others, with scores of one digit if there are to be ties."""
    true = np.full((IMAGES, MOST_TRUE, 5), -1.0)
    found = np.full((IMAGES, MOST_FOUND, 6), NO_SCORE)
    for image in range(IMAGES):
        count = int(source.integers(0, MOST_TRUE))
        low, size = source.random((count, 2)) * 400, source.random((count, 2)) * 120 + 5
        labels = source.integers(0, CLASSES, count)
        true[image, :count] = np.concatenate([labels[:, None], low, low + size], axis=1)
        rows = []
        for place in range(count):
            for _ in range(int(source.integers(0, 4))):
                label = labels[place] if source.random() < 0.8 else source.integers(CLASSES)
                rows.append([source.random(), label, *(true[image, place, 1:] + source.normal(0, 8, 4))])
        rows += [[source.random(), source.integers(CLASSES), *source.random(4) * 300] for _ in range(5)]
        table = np.array(rows)
        table[:, 4:] = np.maximum(table[:, 4:], table[:, 2:4] + 1)
        table[:, 0] = table[:, 0].round(1) if ties else table[:, 0]
        found[image, : len(table)] = table
    return found, true


def by_coco(kinds: Any, found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Average precision by class and threshold, `[classes, thresholds]`."""
    boxes, answers = [], []
    for image in range(len(true)):
        for label, left, top, right, bottom in true[image][true[image, :, 0] >= 0].tolist():
            box = [left, top, right - left, bottom - top]
            area = box[2] * box[3]
            boxes.append(
                {"id": len(boxes) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0, "area": area, "bbox": box}
            )
        for score, label, left, top, right, bottom in found[image][found[image, :, 0] > NO_SCORE].tolist():
            box = [left, top, right - left, bottom - top]
            answers.append({"image_id": image, "category_id": int(label), "score": score, "bbox": box})
    coco, evaluation = kinds
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco()
        truth.dataset = {
            "images": [{"id": image} for image in range(len(true))],
            "annotations": boxes,
            "categories": [{"id": label} for label in range(CLASSES)],
            "info": {},
        }
        truth.createIndex()
        made = evaluation(truth, truth.loadRes(answers), "bbox")
        made.evaluate()
        made.accumulate()
    return np.asarray(made.eval["precision"])[:, :, :, 0, 2].mean(1).T


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
def test_average_precision_is_that_of_coco(library: str, ties: bool) -> None:
    pytest.importorskip(library)
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as evaluation
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as evaluation
    found, true = random_boxes(np.random.default_rng(1 + ties), ties)
    expected = by_coco((COCO, evaluation), found, true)
    assert np.allclose(Detections(found, true, CLASSES).by_class(np.ones(IMAGES)), expected, atol=1e-12)
    assert 0.05 < expected.mean() < 0.9


def test_a_weight_is_a_number_of_copies() -> None:
    source = np.random.default_rng(5)
    found, true = random_boxes(source, ties=False)
    weights = source.integers(0, 3, IMAGES)
    copies = np.repeat(np.arange(IMAGES), weights)
    repeated = Detections(found[copies], true[copies], CLASSES).score(np.ones(len(copies)))
    weighted = Detections(found, true, CLASSES).score(weights.astype(float))
    assert weighted == pytest.approx(repeated, abs=1e-9)


def test_right_boxes_have_precision_one_and_no_boxes_none() -> None:
    _, true = random_boxes(np.random.default_rng(2), ties=False)
    found = np.full((IMAGES, MOST_TRUE, 6), NO_SCORE)
    there = true[:, :, 0] >= 0
    found[there] = np.concatenate([np.full((there.sum(), 1), 0.9), true[there]], axis=1)
    names = ("a", "b", "c")
    perfect = Detections(found, true, CLASSES).score(np.ones(IMAGES), names)
    assert list(perfect.values()) == pytest.approx([1.0] * len(perfect))
    assert set(perfect) == {"map", "map50", "map75", "ap50_a", "ap50_b", "ap50_c"}
    nothing = Detections(np.full_like(found, NO_SCORE), true, CLASSES).score(np.ones(IMAGES))
    assert set(nothing.values()) == {0.0}
    assert Detections(found, np.full_like(true, -1), CLASSES).score(np.ones(IMAGES)) == {"map": 0.0, "map50": 0.0, "map75": 0.0}


def test_a_class_without_boxes_is_left_out_of_the_mean() -> None:
    true, found = np.full((1, 1, 5), -1.0), np.full((1, 2, 6), NO_SCORE)
    true[0, 0], found[0, 0], found[0, 1] = [0, 0, 0, 10, 10], [0.9, 0, 0, 0, 10, 10], [0.8, 1, 50, 50, 60, 60]
    expected = {"map": 1.0, "map50": 1.0, "map75": 1.0, "ap50_a": 1.0}
    assert Detections(found, true, 2).score(np.ones(1), ("a", "b")) == pytest.approx(expected)
