"""Matched layers: value and gradient against a slow float64 reference, however a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.distillation import gradients, taught
from helpers.losses import assert_same, count, load, some_rows

from hfstrat.data.collate import Collator
from hfstrat.models import fused_loss
from hfstrat.strategies.distill.loss import Mix
from hfstrat.strategies.distill.objective import NAME, Distiller, LayerMatch, new_projections, remove_projections

PAIRS = [(0, 1), (1, 2), (3, 5)]  # of 4 layers to 6; the last ones are what the head gets, after the last norm
WEIGHT = 0.7


def distance(kind: str, made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of two vectors, by the textbook formula."""
    if kind == "mse":
        return sum(((a - b) ** 2 for a, b in zip(made, wanted, strict=True)), torch.zeros(())) / len(made)
    return 1 - (made @ wanted) / (made @ made).sqrt() / (wanted @ wanted).sqrt()


@pytest.mark.parametrize("widths", [(6, 6), (6, 9), (9, 6)], ids=["one width", "wider", "narrower"])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_value_and_gradients_equal_the_reference(kind: Any, widths: tuple[int, int]) -> None:
    source, rows = torch.Generator().manual_seed(5), 7
    ours, theirs = (
        [torch.randn(rows, width, generator=source, dtype=torch.float64) for _ in range(layers + 1)]
        for width, layers in zip(widths, (4, 6), strict=True)
    )
    for states in ours:
        states.requires_grad_()
    projections = None if widths[0] == widths[1] else new_projections(len(PAIRS), *widths).double()
    found = LayerMatch(PAIRS, kind, WEIGHT, projections)(ours, theirs)
    expected = torch.zeros((), dtype=torch.float64)
    for number, (student, teacher) in enumerate(PAIRS):
        for row in range(rows):
            made = ours[student + 1][row]
            made = made if projections is None else made @ projections[number]
            expected = expected + distance(kind, made, theirs[teacher + 1][row])
    expected = expected * WEIGHT / len(PAIRS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    learning = [*ours, *(projections or [])]
    given, wanted = (torch.autograd.grad(loss / 7, learning, allow_unused=True) for loss in (found, expected))
    for one, other in zip(given, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    compared = [layer + 1 in {student + 1 for student, _ in PAIRS} for layer in range(4)]
    assert [gradient is not None for gradient in given[1:5]] == compared  # counted from 0, the embeddings are none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_16_bits_are_summed_in_32(kind: Any, dtype: torch.dtype) -> None:
    """A sum of 16 bits would stop growing, or be infinite."""
    ours, theirs = ([torch.full((4096, 8), value, dtype=dtype).requires_grad_() for _ in range(7)] for value in (3.0, -5.0))
    found = LayerMatch(PAIRS, kind, 1.0, None)(ours, [states.detach() for states in theirs])
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(4096 * (64 if kind == "mse" else 2), rel=1e-3)


def test_no_rows_are_a_zero_with_zero_gradients() -> None:
    for kind in ("mse", "cosine"):
        ours, theirs = ([torch.zeros(0, width).requires_grad_() for _ in range(7)] for width in (6, 9))
        projections = new_projections(len(PAIRS), 6, 9)
        loss = LayerMatch(PAIRS, kind, 1.0, projections)(ours, [states.detach() for states in theirs])  # type: ignore[arg-type]
        assert float(loss.detach()) == 0.0
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(projections)))


# In a student


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width with more layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, **sizes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def brought_together(model: Any, teacher: Any, kind: Any, mix: Mix) -> Any:
    """The student, bound, with projections that are the same each time."""
    taught(model, teacher, mix)
    distiller = fused_loss.objective_of(model)
    assert isinstance(distiller, Distiller)
    torch.manual_seed(9)
    projections = new_projections(len(PAIRS), 32, 48).double()
    model.add_module(NAME, projections)
    distiller.match = LayerMatch(PAIRS, kind, WEIGHT, projections)
    return model


def states_of_layers(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """The output of each layer for one row, by hooks; that of the last one after the norm."""
    caught: list[torch.Tensor] = []
    body = model.model
    hooks = [layer.register_forward_hook(lambda *of: caught.append(of[-1])) for layer in [*body.layers[:-1], body.norm]]
    try:
        body(torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [(states[0] if isinstance(states, tuple) else states)[0] for states in caught]


def reference(model: Any, teacher: Any, rows: list[dict[str, Any]], kind: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Row by row without padding, position by position: only those count from which a supervised token is predicted."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ours = states_of_layers(model, row["input_ids"])
        with torch.no_grad():
            theirs = states_of_layers(teacher, row["input_ids"])
        for place in range(len(row["labels"]) - 1):
            if row["labels"][place + 1] == -100:
                continue
            for number, (student, above) in enumerate(PAIRS):
                made = ours[student][place] @ getattr(model, NAME)[number]
                total = total + distance(kind, made, theirs[above][place])
    loss = total * WEIGHT / len(PAIRS) / count(rows)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_student_has_the_reference_gradient_however_the_batch_is_split(
    models: Callable[..., Path], wide: Path, kind: Any
) -> None:
    """The divergence, which other tests check, is subtracted; the rest is the loss of the layers alone."""
    rows, teacher, mix = some_rows(), load(wide), Mix("forward_kl", 0.4, 2.0)
    plain = gradients(taught(load(models()), teacher, mix), rows, 8)
    model = brought_together(load(models()), teacher, kind, mix)
    layers = reference(model, teacher, rows, kind)
    of_layers = {name: gradient for name, gradient in layers[1].items() if name in plain[1]}
    both = {name: gradient + of_layers.get(name, 0.0) for name, gradient in plain[1].items()}
    both |= {name: gradient for name, gradient in layers[1].items() if name not in plain[1]}
    assert sum(name.startswith(NAME) for name in both) == len(PAIRS)
    for micro in (8, 1, 3):
        assert_same(gradients(model, rows, micro), (plain[0] + layers[0], both))
    assert not any(p.grad is not None for p in teacher.parameters())


def test_masked_rows_say_nothing(models: Callable[..., Path], wide: Path) -> None:
    model = brought_together(load(models()), load(wide), "mse", Mix())
    loss, found = gradients(model, [{"input_ids": [5, 6, 7], "labels": [-100] * 3}], 1)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in found.values())


def test_evaluation_has_no_part_of_it(models: Callable[..., Path], wide: Path) -> None:
    teacher, mix = load(wide), Mix("forward_kl", 0.4)
    batch = Collator(0, 8, masks_logits=False, selects_rows=True)(some_rows())
    batch.pop("labels")
    with torch.no_grad():
        plain = taught(load(models()), teacher, mix).eval()(**batch)
        model = brought_together(load(models()), teacher, "mse", mix).eval()
        found = model(**batch)
    assert float(found.total) == pytest.approx(float(plain.total))
    torch.testing.assert_close(found.kl, plain.kl)
    remove_projections(model)
    assert not any(NAME in name for name, _ in model.named_parameters())
