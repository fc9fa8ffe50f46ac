"""A model with layers or inner channels left out is that model without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.losses import family
from helpers.recipes import recipe_of

from hfstrat import strategies
from hfstrat.errors import UserError
from hfstrat.models.load import count_parameters, read_shapes
from hfstrat.strategies.distill.shrink import INTO, OUT_OF, drop_layers, layers_to_keep, most_active_channels

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
    assert layers_to_keep(15, 30) == [0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29]
    assert layers_to_keep(2, 4) == [0, 3]
    assert layers_to_keep(1, 4) == [0]
    assert layers_to_keep(4, 4) == [0, 1, 2, 3]
    assert layers_to_keep([1, 2], 4) == [1, 2]
    for wish, said in ((5, "at most 4"), ([0, 4], "no layer 4"), ([2, 1], "order"), ([1, 1], "once")):
        with pytest.raises(UserError, match=said):
            layers_to_keep(wish, 4)


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
    from hfstrat.models.load import load_tokenizer

    folder = models(tied=tied)
    recipe = recipe_of(folder, {"name": "distill", "shrink": {"layers": [0, 2]}, "student": student})
    strategy = strategies.build(recipe.strategy)
    base = strategy.load(recipe, load_tokenizer(recipe.model), None)
    trained = strategy.build_model(base)
    assert strategy.describe(read_shapes(folder), tied).footprint == count_parameters(trained)


# Narrower layers

ROWS = [{"input_ids": row.tolist()} for row in IDS]


def bert(models: Callable[..., Path]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).double()


NARROW = {**{name: MODELS[name] for name in ("llama", "llama-tied", "gemma2", "qwen3")}, "bert": bert}


@pytest.mark.parametrize("name", NARROW)
def test_keeping_all_channels_changes_nothing(models: Callable[..., Path], name: str) -> None:
    model = NARROW[name](models)
    width, layers = model.config.intermediate_size, list(range(model.config.num_hidden_layers))
    channels = most_active_channels(model, ROWS, width)
    assert all(torch.equal(kept, torch.arange(width)) for kept in channels.values())
    assert torch.equal(logits(drop_layers(model, layers, channels)), logits(model))


@pytest.mark.parametrize("name", NARROW)
def test_silent_channels_go_without_a_change(models: Callable[..., Path], name: str, tmp_path: Path) -> None:
    """Channels that are always zero are removed, and the outputs without them are the same."""
    model = NARROW[name](models)
    width, layers, silent = model.config.intermediate_size, model.config.num_hidden_layers, {}
    for layer in range(layers):
        silent[layer] = torch.randperm(width, generator=torch.Generator().manual_seed(layer))[: width // 4]
        for key, parameter in model.named_parameters():
            if INTO.search(key) and f".{layer}." in key:
                parameter.data[silent[layer]] = 0
            if OUT_OF.search(key) and f".{layer}." in key:
                parameter.data[:, silent[layer]] = 7  # what a silent channel would add
    channels = most_active_channels(model, ROWS, width - width // 4)
    assert not any(set(channels[layer].tolist()) & set(silent[layer].tolist()) for layer in range(layers))
    keep = list(range(layers))
    smaller = drop_layers(model, keep, channels)
    assert smaller.config.intermediate_size == width - width // 4
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-12, atol=1e-12)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path, dtype=torch.float64)), logits(smaller))


def test_fewer_and_narrower_layers_are_the_large_one_without_them(models: Callable[..., Path]) -> None:
    model = MODELS["llama"](models)
    channels = most_active_channels(model, ROWS, 24)
    smaller = drop_layers(model, [1, 3], channels)
    for layer in (0, 2):
        model.model.layers[layer].forward = lambda hidden, *_, **__: hidden
    for layer in (1, 3):
        silent = torch.ones(64, dtype=torch.bool)
        silent[channels[layer]] = False
        model.model.layers[layer].mlp.down_proj.weight.data[:, silent] = 0
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-12, atol=1e-12)


def test_the_loudest_are_those_of_the_largest_mean_absolute_activation(models: Callable[..., Path]) -> None:
    model = MODELS["llama"](models)
    said: list[torch.Tensor] = []
    hook = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda module, args: said.append(args[0][0]))
    channels = most_active_channels(model, ROWS, 5)
    hook.remove()
    assert channels[2].tolist() == sorted(torch.cat(said).abs().mean(0).topk(5).indices.tolist())


def test_what_cannot_be_made_narrower_is_refused(models: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="given 65, but this model has 64"):
        most_active_channels(MODELS["llama"](models), ROWS, 65)
    with pytest.raises(UserError, match=r"intermediate_size: the MLPs of a gpt2 model"):
        most_active_channels(MODELS["gpt2"](models), ROWS, 8)


def test_a_narrower_student_is_counted_and_taught(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.runs import run

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    strategy = "{name: distill, shrink: {layers: 3, intermediate_size: 16}, student: full, baseline: false}"
    loaded = recipe(f"strategy={strategy}", "model.dtype=float32")
    report = run(loaded)
    assert report is not None
    shapes = read_shapes(Path(loaded.recipe.model.name_or_path))
    described = strategies.build(loaded.recipe.strategy).describe(shapes, False)
    assert described.footprint.total == report["result"]["total_parameters"]
    assert read_shapes(Path(report["result"]["artifact"]))["model.layers.2.mlp.down_proj.weight"] == (32, 16)
