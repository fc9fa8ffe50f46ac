"""Losses, rewards and their names are those of TRL's trainers, for the same rows in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import preferences
from helpers.runs import log_history, run

from hfstrat import strategies
from hfstrat.data.collate import BatchOrder
from hfstrat.data.preference_rows import two
from hfstrat.recipe.load import load_recipe

STEPS, BATCH = 50, 4
RATE = 0.03
SAME = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def model(models: Callable[..., Path]) -> Path:
    return models()


def in_order(loaded: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all steps of a run."""
    _, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    order = BatchOrder(data.lengths, BATCH, STEPS, loaded.recipe.seed)
    numbers = data.train["row"][:]
    return [rows[numbers[int(place)]] for step in range(STEPS) for place in order.batch(step)]


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "max_length": 64,
        "use_cpu": True,
        "disable_tqdm": True,
        "weight_decay": 0.0,
        "optim": "sgd",  # Adam turns the rounding of gradients that are nearly zero into steps
    }


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], names: dict[str, str], steps: int = STEPS) -> None:
    logged = [entry for entry in ours if "loss" in entry], [entry for entry in theirs if "loss" in entry]
    assert [len(each) for each in logged] == [steps, steps]
    for name, their_name in names.items():
        values = [torch.tensor([entry[key] for entry in each]) for each, key in zip(logged, (name, their_name), strict=True)]
        torch.testing.assert_close(*values, **SAME, msg=lambda text, name=name: f"{name}: {text}")
    assert float(values[0].std()) > 0


def ours_and_data(tmp_path: Path, model: Path, objective: Any, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
    file = preferences.recipe_for(
        tmp_path,
        model,
        rows,
        objective,
        training={"max_steps": STEPS, "eval_steps": STEPS, "optim": "sgd", "learning_rate": RATE},
    )
    loaded = load_recipe(str(file))
    return log_history(run(loaded)), loaded


def loaded_model(model: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), AutoTokenizer.from_pretrained(model)


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


OTHER_LOSSES = [
    {"loss_type": "ipo"},
    {"loss_type": "hinge", "beta": 0.3},
    {"loss_type": "robust", "label_smoothing": 0.1},
    {"loss_type": "exo_pair", "label_smoothing": 0.001},
    *(
        {"loss_type": kind}
        for kind in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm")
    ),
]


@pytest.mark.parametrize(
    "given",
    [{}, *(pytest.param(given, marks=pytest.mark.slow) for given in OTHER_LOSSES)],
    ids=lambda given: given.get("loss_type", "sigmoid"),
)
def test_dpo(tmp_path: Path, model: Path, given: dict[str, Any]) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = preferences.pairs(40)
    ours, loaded = ours_and_data(tmp_path, model, {"name": "dpo", **given}, rows)
    network, tokenizer = loaded_model(model)
    kind = {"loss_type": [given["loss_type"]]} if "loss_type" in given else {}
    trainer = DPOTrainer(
        model=network,
        args=DPOConfig(**arguments(tmp_path / "trl"), train_sampling_strategy="sequential", **{**given, **kind}),
        train_dataset=Dataset.from_list(in_order(loaded, rows)),
        processing_class=tokenizer,
    )
    trainer.train()
    compare(ours, trainer.state.log_history, {name: name for name in ("loss", *REWARDS)})


def token_rows(loaded: Any) -> list[dict[str, Any]]:
    """The tokens of all steps of a run, by TRL's names: its own tokenization adds another end to a rendered conversation."""
    _, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    order, found = BatchOrder(data.lengths, BATCH, STEPS, loaded.recipe.seed), []
    for step in range(STEPS):
        for place in order.batch(step):
            row = {"prompt_input_ids": [0], "prompt_attention_mask": [1]}
            for name, part in zip(("chosen", "rejected"), two(data.train[int(place)]), strict=True):
                row |= {f"{name}_input_ids": part["input_ids"], f"{name}_labels": part["labels"]}
                row[f"{name}_attention_mask"] = [1] * len(part["input_ids"])
            found.append(row)
    return found


def trained_by(trainer_class: Any, config: Any, model: Path, rows: list[dict[str, Any]], loaded: Any) -> list[dict[str, Any]]:
    """The log of TRL's trainer on the tokens of our run."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    network, tokenizer = loaded_model(model)
    trainer = trainer_class(model=network, args=config, train_dataset=Dataset.from_list(rows[:4]), processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_list(token_rows(loaded))
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.train()
    found: list[dict[str, Any]] = trainer.state.log_history
    return found


@pytest.mark.slow
def test_orpo(tmp_path: Path, model: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = preferences.pairs(40)
    ours, loaded = ours_and_data(tmp_path, model, {"name": "orpo", "beta": 0.2}, rows)
    config = ORPOConfig(**arguments(tmp_path / "trl"), beta=0.2, remove_unused_columns=False)
    theirs = trained_by(ORPOTrainer, config, model, rows, loaded)
    compare(
        ours, theirs, {name: name for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "nll_loss")}
    )


@pytest.mark.slow
def test_simpo(tmp_path: Path, model: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    rows, given = preferences.pairs(40), {"beta": 1.5, "simpo_gamma": 0.7}
    ours, loaded = ours_and_data(tmp_path, model, {"name": "simpo", **given}, rows)
    own = {"loss_type": "simpo", "cpo_alpha": 0.0, "remove_unused_columns": False}
    theirs = trained_by(CPOTrainer, CPOConfig(**arguments(tmp_path / "trl"), **given, **own), model, rows, loaded)
    compare(ours, theirs, {name: name for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")})


@pytest.mark.parametrize("loss_type", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_kto(tmp_path: Path, model: Path, loss_type: str) -> None:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import KTOConfig, KTOTrainer

    rows, given = preferences.labeled(40), {"loss_type": loss_type, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    ours, loaded = ours_and_data(tmp_path, model, {"name": "kto", **given}, rows)
    _, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    order, tokens = BatchOrder(data.lengths, BATCH, STEPS, loaded.recipe.seed), []
    for step in range(STEPS):
        for place in order.batch(step):
            own, other = two(row := data.train[int(place)])
            cut = [next(i for i, label in enumerate(part["labels"]) if label >= 0) for part in (own, other)]
            ids = {"prompt_ids": own["input_ids"][: cut[0]], "completion_ids": own["input_ids"][cut[0] :]}
            tokens.append({**ids, "KL_completion_ids": other["input_ids"][cut[1] :], "label": row["desirable"] == 1})
    network, tokenizer = loaded_model(model)
    config = KTOConfig(**arguments(tmp_path / "trl"), **given)
    trainer = KTOTrainer(model=network, args=config, train_dataset=Dataset.from_list(rows[:4]), processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_list(tokens)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    trainer.train()
    names = ["loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"]
    both = [place for place, entry in enumerate(trainer.state.log_history[:STEPS]) if set(names) <= set(entry)]
    logged = [entry for entry in ours if "loss" in entry]
    assert len(both) > STEPS / 2
    compare([logged[i] for i in both], [trainer.state.log_history[i] for i in both], {name: name for name in names}, len(both))
    if loss_type == "kto":
        assert max(entry["kl"] for entry in logged) > 0
