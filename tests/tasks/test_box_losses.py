"""The losses of detectors: equal splits of a step give equal gradients, and one pass gives transformers' own loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.detectors import CLASSES, FAMILIES, SIDE, config_of
from torch import nn

from hfstrat.models import unused_parameters
from hfstrat.models.batch_norm import contiguous_gradients
from hfstrat.models.transformers_source import families_of
from hfstrat.tasks.object_detection.class_layers import arrange, class_layers
from hfstrat.tasks.object_detection.families import FAMILIES as KNOWN
from hfstrat.tasks.object_detection.loss import bind, image_sums, scaled, targets_of

FAST = ("yolos", "rt_detr", "rf_detr")
SINGLE = ("d_fine",)  # families whose loss mixes in float32
SPLITS = ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[2], [0, 1, 3]])
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    family = request.getfixturevalue("family")
    kind = torch.float32 if family in SINGLE else torch.float64
    torch.set_default_dtype(kind)
    yield kind
    torch.set_default_dtype(torch.float32)


def make(family: str, **more: Any) -> Any:
    """A detector in training without randomness, whose activations are of about the size of one."""
    import transformers as tf

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    model = tf.AutoModelForObjectDetection.from_config(config_of(family, **names, **more)).to(torch.get_default_dtype())
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    norms = [module for module in model.modules() if hasattr(module, "running_mean")]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        model(pixel_values=batch()[0])
    model.train()
    for norm in norms:
        norm.eval()
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, boxes and classes of four images: one has no box."""
    source = torch.Generator().manual_seed(1)
    boxes = torch.rand(4, 3, 4, generator=source) * 0.3 + 0.3
    classes = torch.tensor([[0, 1, 2], [1, -100, -100], [-100] * 3, [2, 2, -100]])
    return torch.randn(4, 3, SIDE, SIDE, generator=source), boxes, classes


def gradients(model: Any, parts: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step that is divided into these passes, and its gradients."""
    pixels, boxes, classes = batch()
    model.zero_grad()
    total = 0.0
    for part in parts:
        outputs = model(pixel_values=pixels[part], boxes=boxes[part], class_labels=classes[part])
        loss = scaled(outputs.loss, (classes >= 0).sum().to(pixels), len(pixels))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", EACH)
def test_equal_splits_have_equal_gradients(family: str, precision: torch.dtype) -> None:
    model = make(family)
    with torch.no_grad():
        own = float(model(pixel_values=batch()[0], labels=targets_of(*batch()[1:])).loss)
    undo, free = bind(model), contiguous_gradients(model)
    loss, whole = gradients(model, [[0, 1, 2, 3]])
    near = 1e-3 if precision == torch.float32 else 1e-9
    assert loss == pytest.approx(own, rel=1e-5 if precision == torch.float32 else 1e-9), "one pass: transformers' own loss"
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for parts in SPLITS:
        again, split = gradients(model, parts)
        assert again == pytest.approx(loss, rel=1e-5 if precision == torch.float32 else 1e-9)
        off = max(float((gradient - split.get(name, torch.zeros(()))).abs().max()) for name, gradient in whole.items())
        assert off < near * largest, (parts, off, largest)
    undo()
    free()
    assert "forward" not in vars(model)
    with torch.no_grad():
        assert float(model(pixel_values=batch()[0], labels=targets_of(*batch()[1:])).loss) == own


@pytest.mark.parametrize("family", EACH)
def test_evaluation_losses_do_not_depend_on_the_batch(family: str, precision: torch.dtype) -> None:
    model, (pixels, boxes, classes) = make(family).eval(), batch()
    targets = targets_of(boxes, classes)
    with torch.no_grad():
        outputs = model(pixel_values=pixels)
        together = image_sums(model.config, outputs.logits, outputs.pred_boxes, targets)
        alone = [
            image_sums(model.config, outputs.logits[i : i + 1], outputs.pred_boxes[i : i + 1], targets[i : i + 1])
            for i in range(4)
        ]
    assert torch.equal(together, torch.cat(alone))
    assert bool(together.isfinite().all())


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow) for name in ("rt_detr", "d_fine")])
def test_denoising_queries_are_trained(family: str, precision: torch.dtype) -> None:
    model = make(family, num_denoising=6)
    bind(model)
    _, found = gradients(model, [[0, 1], [2, 3]])
    assert float(found["model.denoising_class_embed.weight"].abs().max()) > 0


def test_every_known_family_is_a_detector_of_transformers() -> None:
    assert set(KNOWN) <= set(families_of("AutoModelForObjectDetection"))
    assert set(FAMILIES) | {"table-transformer"} == set(KNOWN), "table-transformer is DETR"


@pytest.mark.parametrize("family", ["yolos", "rt_detr", "rf_detr"])
def test_classes_continue_by_their_names(family: str) -> None:
    """Outputs of classes that stay are the same bit for bit, and those of another order are reordered."""
    import transformers as tf

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: index for index, name in enumerate(CLASSES)}}
    model = tf.AutoModelForObjectDetection.from_config(config_of(family, **names)).eval()
    pixels = batch()[0]
    with torch.no_grad():
        before = model(pixel_values=pixels)
        arrange(model, [2, None, 0], ["red", "violet", "blue"])
        after = model(pixel_values=pixels)
    assert torch.equal(after.pred_boxes, before.pred_boxes) or family != "yolos"  # two stages choose queries by their scores
    if family == "yolos":
        assert torch.allclose(after.logits[..., [0, 2, 3]], before.logits[..., [2, 0, 3]], atol=1e-6)
    assert model.config.id2label == {0: "red", 1: "violet", 2: "blue"}
    for layer in class_layers(model).values():
        assert len(layer.weight) in (3, 4)


@pytest.mark.parametrize("family", EACH)
def test_a_pass_of_several_processes_uses_every_parameter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else images without boxes, which have no denoising queries, would end a distributed run."""
    more = {"num_denoising": 4} if family in ("rt_detr", "rt_detr_v2", "d_fine") else {}
    model = make(family, **more)
    bind(model)
    pixels, boxes, classes = batch()
    inputs = {"pixel_values": pixels[2:3], "boxes": boxes[2:3], "class_labels": classes[2:3]}
    plain = model(**inputs).loss
    monkeypatch.setattr(unused_parameters, "several_processes", lambda: True)
    loss = model(**inputs).loss
    assert torch.equal(loss, plain)
    scaled(loss, torch.tensor(1.0), 1).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
