"""A model with layers left out is that model with layers left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_head_loss import family
from test_strategies import recipe_of

from hfstrat.distillation.shrink import drop_layers, kept_layers
from hfstrat.errors import UserError
from hfstrat.model import count_parameters, read_shapes

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


MODELS: dict[str, Callable[[Callable[..., Path]], Any]] = {
    "llama": lambda models: load(models()),
    "llama-tied": lambda models: load(models(tied=True)),
    "gpt2": lambda models: load(models(family="gpt2")),
    "gemma2": lambda models: family("Gemma2", num_hidden_layers=4, sliding_window=4),
    "qwen3": lambda models: family("Qwen3", num_hidden_layers=4),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_layers_are_spaced_evenly_with_the_first_and_the_last() -> None:
    assert kept_layers(15, 30) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert kept_layers(2, 4) == [0, 3]
    assert kept_layers(1, 4) == [0]
    assert kept_layers(4, 4) == [0, 1, 2, 3]
    assert kept_layers([1, 2], 4) == [1, 2]
    for wish, said in ((5, "at most 4"), ([0, 4], "no layer 4"), ([2, 1], "order"), ([1, 1], "once")):
        with pytest.raises(UserError, match=said):
            kept_layers(wish, 4)


@pytest.mark.parametrize("name", MODELS)
def test_keeping_all_changes_nothing(models: Callable[..., Path], name: str) -> None:
    model = MODELS[name](models)
    before = torch.get_rng_state()
    smaller = drop_layers(model, list(range(model.config.num_hidden_layers)))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(smaller), logits(model))
    assert smaller.config.to_dict() | {"dtype": None} == model.config.to_dict() | {"dtype": None}


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_model_is_the_large_one_without_those_layers(models: Callable[..., Path], name: str, tmp_path: Path) -> None:
    model = MODELS[name](models)
    count = model.config.num_hidden_layers
    keep = [0, 1, count - 1]
    smaller = drop_layers(model, keep)
    assert smaller.config.num_hidden_layers == 3
    if types := getattr(model.config, "layer_types", None):
        assert smaller.config.layer_types == [types[layer] for layer in keep]
    head, embeddings = smaller.get_output_embeddings().weight, smaller.get_input_embeddings().weight
    assert (head is embeddings) == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert not {p.data_ptr() for p in smaller.parameters()} & {p.data_ptr() for p in model.parameters()}
    for layer in set(range(count)) - set(keep):  # the reference: a layer whose output is its input
        block = (model.transformer.h if name == "gpt2" else model.model.layers)[layer]
        block.forward = lambda hidden, *_, **__: hidden
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-12, atol=1e-12)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(smaller))
    said = smaller.generate(input_ids=IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(smaller(said[:, :-1]).logits.argmax(-1)[:, -4:], said[:, -4:])  # the cache knows its layers


@pytest.mark.parametrize("student", ["full", {"name": "partial", "last_n_layers": 1}])
@pytest.mark.parametrize("tied", [False, True])
def test_footprint_counts_what_is_left(models: Callable[..., Path], tied: bool, student: Any) -> None:
    from hfstrat.model import load_tokenizer

    folder = models(tied=tied)
    recipe = recipe_of(folder, {"name": "distill", "shrink": {"layers": [0, 2]}, "student": student})
    base = recipe.strategy.load_base(recipe, load_tokenizer(recipe.model), None)
    trained = recipe.strategy.build_model(base)
    assert recipe.strategy.footprint(read_shapes(folder), tied) == count_parameters(trained)
