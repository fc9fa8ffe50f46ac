"""Generated answers: the same in any batch, and compared as others compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfstrat.data.render import Renderer
from hfstrat.evaluation import text_metrics
from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.text_metrics import generate
from hfstrat.tasks import generation
from hfstrat.tasks.causal_lm import CausalLM


def subject_of(folder: Path) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():  # logits of random weights are nearly equal, which says nothing about padding
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return Subject.from_model(model, AutoTokenizer.from_pretrained(folder), CausalLM())


def runner(tokens: int) -> Runner:
    return Runner(torch.device("cpu"), torch.float32, Console(quiet=True), tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_do_not_depend_on_their_batch(models: Callable[..., Path], family: str) -> None:
    """Greedy ones are those of one prompt at a time without padding; drawn ones differ by seed and by nothing else."""
    subject = subject_of(models(family=family))
    renderer, prompts = Renderer(subject.tokenizer, "auto"), sentences(9, seed=4)
    ids = [renderer.prompt_ids(prompt) for prompt in prompts]
    expected = [generation.answer(subject.model, renderer, prompt, 8, torch.float32) for prompt in prompts]
    assert len(set(map(len, ids))) > 3
    assert generate(subject, ids, runner(1), 8) == generate(subject, ids, runner(10_000), 8) == expected
    drawn = [generate(subject, ids, runner(tokens), 8, temperature=1.5, seed=7) for tokens in (1, 100, 10_000)]
    assert drawn[0] == drawn[1] == drawn[2] != expected
    assert generate(subject, ids, runner(100), 8, temperature=1.5, seed=8) != drawn[0]


def test_a_frozen_head_is_one_product(tiny: Path) -> None:
    """torch would copy the weight of a frozen head for each prompt of a batch; generating leaves nothing in the model."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval().requires_grad_(False)
    vocabulary, products = model.config.vocab_size, list[tuple[int, ...]]()

    class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[1].shape[-1] == vocabulary:
                products.append(tuple(args[1].shape))
            return op(*args, **(kwargs or {}))

    seen: Callable[[], TorchDispatchMode] = Products
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    with seen():
        generation.continued(model, prompts, None, 3)
    assert products
    assert set(products) == {(model.config.hidden_size, vocabulary)}
    assert not model.lm_head._forward_pre_hooks  # evaluations use the head without logits of all positions only as it is
    products.clear()
    with seen(), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6], [7, 8]]), logits_to_keep=1)
    assert products == [(2, model.config.hidden_size, vocabulary)]  # as torch does it, and as the model does it again


def test_drawn_tokens_come_as_often_as_the_softmax_says(tiny: Path) -> None:
    from hfstrat.evaluation.text_metrics import GumbelSampling

    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).repeat(4000, 1)
    drawn = GumbelSampling(0.7, list(range(4000)))(torch.zeros(4000, 1), logits).argmax(-1)
    shares = np.bincount(drawn.numpy(), minlength=4) / 4000
    np.testing.assert_allclose(shares, (logits[0] / 0.7).softmax(-1).numpy(), atol=0.025)


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "f1"),
    [
        ("The cat.", "a cat", 1, 1),
        ("the black cat", "cat", 0, 2 / 3),
        ("", "the", 1, 1),
        ("", "cat", 0, 0),
        ("a b c", "b c d", 0, 0.8),  # "a" is an article
    ],
)
def test_words_are_compared_as_squad_does(answer: str, reference: str, exact: float, f1: float) -> None:
    assert text_metrics.exact_match(answer, reference) == exact
    assert text_metrics.f1(answer, reference) == pytest.approx(f1)


def test_json_and_patterns() -> None:
    assert [text_metrics.is_json(text) for text in ('{"a": [1]}', "[]", "3", '{"a": }', "so: {}")] == [1, 1, 0, 0, 0]
    number = text_metrics.matches(r"#### (-?\d+)")
    assert [number(text, "so #### 42") for text in ("#### 42", "#### 41", "42")] == [1, 0, 0]
    assert number("#### 42", "42") == 1  # the reference is the number itself
    assert text_metrics.matches("c.t")("a cat", "") == 1


def test_library_metrics() -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score (pip install 'hfstrat[eval]')")
    pytest.importorskip("sacrebleu", reason="needs sacrebleu (pip install 'hfstrat[eval]')")
    found = text_metrics.compare_answers(["rouge", "chrf"], ["the cat sat", "red"], ["the cat sat", "blue dog"])
    assert set(found) == {"rouge1", "rouge2", "rougeL", "chrf"}
    assert [found[name][0] for name in found] == pytest.approx([1, 1, 1, 1])
    assert found["rouge1"][1] == 0
