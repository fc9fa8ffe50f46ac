"""What holds for every preference objective: equal splits, packing, the reference, resuming, and what is saved."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import preferences
from helpers.runs import log_history, run, stop_at, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfstrat import strategies
from hfstrat.data.collate import BatchOrder
from hfstrat.data.packing import PackedRows
from hfstrat.data.preference_rows import two
from hfstrat.engine import entries
from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.evaluation.intervals import ROWS
from hfstrat.models import fused_loss
from hfstrat.models.load import Base
from hfstrat.objectives import objective_of, task_of
from hfstrat.objectives.preference import divergence
from hfstrat.objectives.preference.collate import REFERENCE, split_others
from hfstrat.objectives.preference.loss import PreferenceLoss
from hfstrat.objectives.preference.objective import DIVERGENCE
from hfstrat.recipe.load import load_recipe
from hfstrat.trainer.autobatch import evaluation_pass, worst_step
from hfstrat.trainer.cached_columns import WithColumn

OBJECTIVES = ("dpo", "orpo", "simpo", "kto")


def first_fast(*names: str) -> list[Any]:
    """Objectives as parameters; all but the first are slow tests."""
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


def rows_for(name: str, count: int = 40) -> list[dict[str, Any]]:
    return preferences.labeled(count) if name == "kto" else preferences.pairs(count)


def prepared(folder: Path, model: Path, name: str, dtype: torch.dtype = torch.float64, **sections: Any) -> Any:
    """The recipe, the prepared data, the model with the loss of the objective bound to it, and the collator."""
    recipe = load_recipe(str(preferences.recipe_for(folder, model, rows_for(name), name, **sections))).recipe
    tokenizer, data = strategies.build(recipe.strategy).read(recipe)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    task = task_of(recipe)
    base = Base(network, task, str(model), None, [], dtype, dtype)
    task.model.bind_loss(base)
    return SimpleNamespace(
        recipe=recipe, data=data, model=network, collate=task.rows.collator(base, data, tokenizer, 1), tokenizer=tokenizer
    )


def with_some_reference(rows: Any) -> Any:
    """Any reference will do: that of another model."""
    values = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(0)) - 40
    return WithColumn(rows, REFERENCE, lambda place: values[place].tolist(), torch.arange(len(rows)).numpy())


def gradients(found: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Those of an optimizer step of some micro-batches, with what the Trainer adds to them."""
    found.model.zero_grad()
    parts = [split_others(batch) for batch in batches]
    items = sum(len(batch["labels"]) for batch, _ in parts)
    tokens = sum(int((batch["pair_sequence"] % 2 == 0).sum()) for batch, _ in parts)
    ratios = [found.model(**others)["logps"] - batch[REFERENCE][:, 1] for batch, others in parts if others]
    more = {"pair_divergence": torch.cat(ratios).mean().detach().clamp(min=0)} if ratios else {}
    for batch, _ in parts:
        share = {"pair_share": torch.tensor(items / tokens)} if "pair_answer" in batch else {}
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found.model(**inputs, **share, **more, num_items_in_batch=items).loss.backward()
    return {name: p.grad.clone() for name, p in found.model.named_parameters() if p.grad is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    assert max(float(each.abs().max()) for each in one.values()) > 1e-4
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], atol=tolerance, rtol=1e-6), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_splits_give_equal_gradients(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    found = prepared(tmp_path, models(), name)
    rows = with_some_reference(found.data.train)
    chosen = [rows[place] for place in range(6)]
    whole = gradients(found, [found.collate(chosen)])
    for sizes in ([1] * 6, [4, 2], [2, 3, 1]):
        cuts = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
        parts = [found.collate(chosen[a:b]) for a, b in itertools.pairwise(cuts)]
        same(whole, gradients(found, parts))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_definition(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    """Logits of everything, and autograd through the loss."""
    found = prepared(tmp_path, models(), name)
    rows = with_some_reference(found.data.train)
    batch, others = split_others(found.collate([rows[place] for place in range(5)]))
    more = {"pair_divergence": torch.tensor(0.3, dtype=torch.float64)} if others else {}
    labels = batch.pop("labels")
    found.model.zero_grad()
    output = found.model(**batch, **more, num_items_in_batch=len(labels))
    output.loss.backward()
    ours = {key: p.grad.clone() for key, p in found.model.named_parameters()}
    fused_loss.unbind_head_loss(found.model)
    found.model.zero_grad()
    logits = found.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits[batch["loss_rows"]], batch["targets"], reduction="none")
    right = logits[batch["loss_rows"]].argmax(-1) == batch["targets"]
    expected = PreferenceLoss(found.recipe.objective).of_tokens(nll, right, {**batch, **more})
    (expected.total / len(labels)).backward()
    same({key: p.grad for key, p in found.model.named_parameters()}, ours, 1e-8)
    torch.testing.assert_close(output.pairs, expected.pairs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo"])
def test_packed_pairs_have_the_same_gradients(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    found = prepared(tmp_path, models(), name)
    rows = with_some_reference(found.data.train)
    order = BatchOrder(found.data.lengths, 6, 2, 42)
    packed = PackedRows(rows, order, 2, 1)
    collates = [found.collate.packed(flatten, few_widths=False) for flatten in (False, True)]
    for step, collate in product(range(2), collates):
        bins = [packed[2 * step + place] for place in range(2)]
        assert sum(len(each.rows) for each in bins) == 6
        plain = [found.collate([rows[int(place)] for place in order.batch(step)])]
        same(gradients(found, plain), gradients(found, [collate(bins)]))
        same(gradients(found, plain), gradients(found, [collate([each]) for each in bins]))


def test_a_pair_does_not_see_the_other_answer(tmp_path: Path, models: Callable[..., Path]) -> None:
    found = prepared(tmp_path, models(), "dpo")
    row = found.data.train[0]
    chosen, rejected = two(row)
    changed = {**row, "input_ids": [*chosen["input_ids"], *([5] * len(rejected["input_ids"]))]}
    logps = [
        found.model(**{k: v for k, v in found.collate([each]).items() if k != "labels"})["logps"] for each in (row, changed)
    ]
    assert logps[0][0, 0] == logps[1][0, 0]
    assert logps[0][0, 1] != logps[1][0, 1]


@pytest.mark.parametrize("strategy", ["full", {"name": "lora", "r": 4}, {"name": "partial", "last_n_layers": 2}], ids=str)
def test_the_reference_is_the_untrained_model(tmp_path: Path, models: Callable[..., Path], strategy: Any) -> None:
    """The cached column is what transformers computes for the base model."""
    file = preferences.recipe_for(tmp_path, models(), rows_for("dpo"), "dpo", strategy=strategy, training={"max_steps": 3})
    loaded = load_recipe(str(file))
    report = run(loaded)
    losses = [entry for entry in log_history(report) if "loss" in entry]
    assert losses[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert losses[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    tokenizer, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    base = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32)
    expected = [float(summed(base, two(data.eval[place])[0])) for place in range(len(data.eval))]
    assert report["result"]["metrics_before"]["logps/chosen"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    trained = artifact_of(tmp_path / "out" / "final")
    after = [float(summed(trained, two(data.eval[place])[0])) for place in range(len(data.eval))]
    assert report["result"]["metrics_after"]["logps/chosen"] == pytest.approx(sum(after) / len(after), rel=1e-4)
    assert tokenizer is not None


def artifact_of(folder: Path) -> Any:
    if (folder / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def summed(model: Any, row: dict[str, Any]) -> torch.Tensor:
    """The summed log-likelihood of the supervised tokens of one sequence."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[labels >= 0].sum()


@pytest.mark.parametrize("name", first_fast(*OBJECTIVES))
def test_a_resumed_run_is_the_same(
    tmp_path: Path, models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    training = {"max_steps": 4, "eval_steps": 2, "save_steps": 1}
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    files = [preferences.recipe_for(each, models(), rows_for(name), name, training=training) for each in folders]
    whole = run(load_recipe(str(files[0])))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(load_recipe(str(files[1])))
    stopped = run(load_recipe(str(files[1])))
    assert stopped["result"]["resumed_from"]
    one, other = (weights(each / "out") for each in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole["result"]["metrics_after"] == stopped["result"]["metrics_after"]
    assert whole["result"]["measured"] == stopped["result"]["measured"]


@pytest.mark.parametrize("name", first_fast("dpo", "kto"))
@pytest.mark.slow
def test_on_a_quantized_base(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    given = {"form": {"quantization": "nf4"}, "strategy": {"name": "lora", "r": 4}, "training": {"max_steps": 2}}
    file = preferences.recipe_for(tmp_path, models(), rows_for(name), name, **given)
    report = run(load_recipe(str(file)))
    first = next(entry for entry in log_history(report) if "loss" in entry)
    assert first["loss"] == pytest.approx(0.693147 if name == "dpo" else 0.5, abs=1e-3)


def test_routers_are_balanced_too(tmp_path: Path, families: Callable[[str], Path]) -> None:
    """The load-balancing loss of a mixture of experts is added to the mean over pairs."""
    found = prepared(tmp_path, families("mixtral"), "dpo", torch.float32)
    rows = with_some_reference(found.data.train)
    batch = {key: value for key, value in found.collate([rows[0], rows[1]]).items() if key != "labels"}
    found.model.train()
    plain = found.model(**batch).loss
    found.model.config.router_aux_loss_coef = 0.0
    without = found.model(**batch).loss
    assert 0 < float(plain - without) < 1


@pytest.mark.parametrize("name", first_fast("dpo", "orpo"))
def test_a_packed_run_is_the_same(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    losses = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        file = preferences.recipe_for(folder, models(), rows_for(name), name, training={"packing": packing, "max_steps": 4})
        losses.append([entry["loss"] for entry in log_history(run(load_recipe(str(file)))) if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_longest_example_that_memory_is_measured_with(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    """It pads both sequences to the longest of the data; a step on copies of it runs, and so does an evaluation."""
    found = prepared(tmp_path, models(), name, torch.float32)
    rows = task_of(found.recipe).rows
    row = rows.worst_row(found.data, int(found.data.lengths.max()))
    assert [len(part["input_ids"]) for part in two(row)] == [rows.longest(found.data)] * 2
    given = SimpleNamespace(
        collate=found.collate,
        device=torch.device("cpu"),
        plan=SimpleNamespace(processes=1),
        autocast=contextlib.nullcontext,
        batch=lambda places, rows: {
            key: value for key, value in found.collate([rows[0]] * len(places)).items() if key != "labels"
        },
    )
    worst_step(found.model, given, row, lambda outputs, labels: outputs.loss)(2)
    evaluation_pass(found.model, given, row)(2)


@pytest.mark.parametrize("name", first_fast("dpo", "kto"))
@pytest.mark.slow
def test_evaluate_against_the_base(tmp_path: Path, models: Callable[..., Path], name: str) -> None:
    """After training the numbers are those of the report; the base is its own reference, so its margins are 0."""
    recipe = preferences.recipe_for(tmp_path, models(), rows_for(name), name)
    result = run(load_recipe(str(recipe)))["result"]
    metrics = result["metrics_after"]
    found = evaluate(Request(str(tmp_path / "out"), against="base"))
    assert found is not None
    measured = found["measured"][ROWS]
    for metric in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert measured["after"][metric]["value"] == pytest.approx(metrics[metric], abs=1e-6), metric
    assert measured["before"]["rewards/margins"]["value"] == pytest.approx(0, abs=1e-6)
    moved, known = (each["measured"][DIVERGENCE]["after"]["kl_per_answer"] for each in (found, result))
    assert moved["value"] == pytest.approx(known["value"], abs=1e-5)
    assert abs(moved["value"]) > 1e-4, "the model has moved"


def test_objectives_with_and_without_a_reference_are_not_compared(tmp_path: Path, models: Callable[..., Path]) -> None:
    """The rewards of one are relative to its reference, those of the other are not."""
    files = [preferences.recipe_for(tmp_path / name, models(), rows_for("dpo"), name) for name in ("dpo", "simpo")]
    for file in files:  # the same examples in the same place
        file.write_text(file.read_text().replace("/simpo/rows.jsonl", "/dpo/rows.jsonl"))
    loaded = [
        SimpleNamespace(label=name, loaded=load_recipe(str(file))) for name, file in zip(("dpo", "simpo"), files, strict=True)
    ]
    budget = entries.parse_budget("10-steps")
    with pytest.raises(UserError, match="objective: 'pairs, with rewards relative to a reference' in dpo, 'pairs' in simpo"):
        entries.check_comparable(loaded, budget)  # type: ignore[arg-type]
    entries.check_comparable(loaded[:1] * 2, budget)  # type: ignore[arg-type]


def test_an_objective_of_its_own_has_a_task_of_its_own(tmp_path: Path, models: Callable[..., Path]) -> None:
    recipe = load_recipe(str(preferences.recipe_for(tmp_path, models(), rows_for("dpo"), "sft", strategy="full"))).recipe
    assert objective_of(recipe).task.rows.noun == "sequence"
    assert AutoTokenizer is not None


@pytest.mark.slow
def test_the_divergence_is_that_of_sampled_answers(tmp_path: Path, models: Callable[..., Path]) -> None:
    """Zero for the reference itself; of a trained model the mean log-ratio of the answers, computed from their logits."""
    given = {"evaluation": {"max_new_tokens": 6}, "data": {"eval_size": 12}, "training": {"max_steps": 5}}
    loaded = load_recipe(str(preferences.recipe_for(tmp_path, models(), rows_for("dpo"), "dpo", **given)))
    kept: list[Any] = []

    def keep(model: Any, answers: Any, data: Any) -> Any:
        kept.append(answers)
        return computed(model, answers, data)

    computed = divergence.divergence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergence, "divergence", keep)
        measured = run(loaded)["result"]["measured"]["divergence from the reference"]
    answers = kept[0]
    base = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.float32).eval()
    trained = artifact_of(tmp_path / "out" / "final")
    theirs, ours = ([float(summed(model, row)) for row in answers.rows] for model in (base, trained))
    assert answers.logps.tolist() == pytest.approx(theirs, rel=1e-4)
    expected = sum(before - after for before, after in zip(theirs, ours, strict=True)) / len(theirs)
    assert measured["after"]["kl_per_answer"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert measured["after"]["kl_per_answer"]["low"] is not None
    assert len(answers.rows) == measured["rows"] == 12
