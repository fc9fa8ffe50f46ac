"""The head of a classifier that training continues from: its outputs follow the names of the data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.classifiers import FAMILIES

from hfstrat import strategies
from hfstrat.data.label_names import same_names, sources_of
from hfstrat.errors import UserError
from hfstrat.models import output_scale
from hfstrat.models.load import load_tokenizer
from hfstrat.models.output_scale import Units
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import TASKS
from hfstrat.tasks.loading import load_base

KNOWN = ("contradiction", "neutral", "entailment")
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def rows_of(names: tuple[str, ...], task: str = "text-classification", many: bool = False) -> Any:
    units = Units(torch.full((len(names),), 3.0).double(), torch.full((len(names),), 2.0).double())
    return SimpleNamespace(
        label_names=names, many=many, units=units, train=[{"input_ids": IDS[0].tolist(), "label": [1.0]}] * 4
    )


def recipe_of(folder: Path, task: str, strategy: Any = "full") -> Recipe:
    return Recipe.model_validate({"task": task, "model": str(folder), "strategy": strategy, "data": "x", "output_dir": "x"})


def load(folder: Path, names: tuple[str, ...], task: str = "text-classification", strategy: Any = "full", **rows: Any) -> Any:
    """The base and the model to train, in evaluation mode."""
    recipe, data = recipe_of(folder, task, strategy), rows_of(names, task, **rows)
    tokenizer = load_tokenizer(recipe.model)
    base = load_base(recipe.model, tokenizer, TASKS[task], data)
    collate = TASKS[task].rows.collator(base, data, tokenizer, 1)
    TASKS[task].model.fit_output(base, data, collate)
    return base, strategies.build(recipe.strategy).build_model(base).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.float()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found


def saved(bodies: Any, family: str, folder: Path, names: tuple[str, ...] = KNOWN, **options: Any) -> torch.Tensor:
    """Save a classifier for these names; returns its logits."""
    torch.manual_seed(0)
    base, model = load(bodies(family), names, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a trained head, and an adapter that does something
            parameter.data += 0.1 * torch.randn_like(parameter)
    found = logits(model)
    output_scale.fold(model)
    model.save_pretrained(folder)
    base.task.model.write_config(base, folder)
    load_tokenizer(recipe_of(bodies(family), "text-classification").model).save_pretrained(folder)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_follow_their_names(bodies: Any, family: str, tmp_path: Path) -> None:
    before = saved(bodies, family, tmp_path)
    base, model = load(tmp_path, ("contradiction", "entailment", "neutral"))
    torch.testing.assert_close(logits(model), before[:, [0, 2, 1]])
    assert base.model.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
    assert base.remarks == [
        "the outputs of the head of the checkpoint are reordered as in the data: contradiction, entailment, neutral"
    ]
    assert not base.new_head


def test_the_order_of_the_checkpoint_needs_no_words(bodies: Any, tmp_path: Path) -> None:
    before = saved(bodies, "bert", tmp_path)
    base, model = load(tmp_path, KNOWN)
    assert torch.equal(logits(model), before)
    assert not base.remarks


def test_more_and_fewer_labels_keep_the_known_ones(bodies: Any, tmp_path: Path) -> None:
    before = saved(bodies, "roberta", tmp_path)
    base, model = load(tmp_path, ("entailment", "other", "neutral", "contradiction"))
    torch.testing.assert_close(logits(model)[:, [0, 2, 3]], before[:, [2, 1, 0]])
    assert base.remarks == ["the head of the checkpoint has no output for other: these start with random weights"]
    base, model = load(tmp_path, ("entailment", "contradiction"))
    torch.testing.assert_close(logits(model), before[:, [2, 0]])
    assert base.remarks == ["the data lack neutral: these outputs of the head of the checkpoint are removed"]


@pytest.mark.parametrize(
    ("names", "known", "sources"),
    [
        (("0", "1"), ("LABEL_0", "LABEL_1"), [0, 1]),
        (("1", "0"), ("LABEL_0", "LABEL_1"), [1, 0]),
        (("LABEL_1", "LABEL_0"), ("0", "1"), [1, 0]),
        (("Very Good", "BAD"), ("bad", "very_good"), [1, 0]),
        (("a", "A"), ("A", "b"), [None, 0]),
        (("0", "1"), ("neg", "pos"), [None, None]),
        (("x", "y"), ("LABEL_0", "LABEL_1"), [None, None]),
        (("01", "1"), ("LABEL_1", "LABEL_2"), [None, None]),
    ],
)
def test_names_that_mean_the_same(names: tuple[str, ...], known: tuple[str, ...], sources: list[int | None]) -> None:
    assert sources_of(names, known) == sources
    assert len(set(same_names(names, known).values())) == len(same_names(names, known))


def test_a_head_for_other_labels_starts_with_random_weights_and_says_so(bodies: Any, tmp_path: Path) -> None:
    before = saved(bodies, "bert", tmp_path, ("neg", "pos"))
    base, model = load(tmp_path, ("0", "1"))
    assert base.new_head
    assert base.remarks == ["the head of the checkpoint predicts neg, pos, the data have 0, 1: it is re-initialized"]
    assert not torch.allclose(logits(model), before, atol=1e-2)


def test_numbers_and_labels_do_not_continue_each_other(bodies: Any, tmp_path: Path) -> None:
    saved(bodies, "bert", tmp_path / "labels", ("neg", "pos"))
    base, _ = load(tmp_path / "labels", ("neg", "pos"), "regression")
    assert "predicts labels (neg, pos): it is re-initialized" in base.remarks[0]
    saved(bodies, "bert", tmp_path / "numbers", ("score",), task="regression")
    base, _ = load(tmp_path / "numbers", ("neg", "pos"))
    assert "predicts numbers (score): it is re-initialized" in base.remarks[0]


def test_several_labels_per_text_continue_from_one(bodies: Any, tmp_path: Path) -> None:
    before = saved(bodies, "bert", tmp_path)
    base, model = load(tmp_path, ("neutral", "entailment", "contradiction"), many=True)
    torch.testing.assert_close(logits(model), before[:, [1, 2, 0]])
    assert "was trained as single_label_classification, and continues as multi_label_classification" in base.remarks[-1]


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_the_head_of_an_adapter_follows_its_names(bodies: Any, family: str, tmp_path: Path) -> None:
    lora = {"name": "lora", "r": 4}
    before = saved(bodies, family, tmp_path, strategy=lora)
    again = {"name": "lora", "adapter": str(tmp_path)}
    for names in (("contradiction", "entailment", "neutral"), ("entailment", "other", "neutral", "contradiction"), KNOWN[1:]):
        base, model = load(bodies(family), names, strategy=again)
        places = [KNOWN.index(name) for name in names if name in KNOWN]
        torch.testing.assert_close(logits(model)[:, [i for i, name in enumerate(names) if name in KNOWN]], before[:, places])
        assert base.model.config.id2label == dict(enumerate(names))
        assert any("the head of the adapter" in line for line in base.remarks)
        assert all(p.requires_grad for name, p in model.named_parameters() if "modules_to_save" in name)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_adapter_that_predicts_numbers_continues_in_their_units(bodies: Any, family: str, tmp_path: Path) -> None:
    base, model = load(bodies(family), ("score",), "regression", {"name": "lora", "r": 4})
    before = logits(model)
    output_scale.fold(model)
    model.save_pretrained(tmp_path)
    base.task.model.write_config(base, tmp_path)
    base, model = load(bodies(family), ("stars",), "regression", {"name": "lora", "adapter": str(tmp_path)})
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert "the output of the adapter for score continues as stars" in base.remarks
    with pytest.raises(UserError, match="expected an adapter for the same numbers"):
        load(bodies(family), ("stars", "price"), "regression", {"name": "lora", "adapter": str(tmp_path)})
