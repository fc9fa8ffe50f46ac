"""What holds for a run with rewards: TRL's numbers, the same run after an interruption, errors with names, what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.rewarded import ANSWERS, MINE, PROMPTS, STEPS, prompts, recipe
from helpers.runs import log_history, run, stop_at, weights

from hfstrat import strategies
from hfstrat.data.collate import BatchOrder
from hfstrat.engine import entries
from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import Request, evaluate
from hfstrat.evaluation.intervals import ROWS
from hfstrat.objectives.reinforcement.trainer import FILE, GroupSampler, GrpoTrainer
from hfstrat.recipe.load import load_recipe


def rewards_of(report: dict[str, Any]) -> list[float]:
    return [entry["reward"] for entry in log_history(report) if "reward" in entry]


@pytest.fixture(scope="module")
def model(models: Callable[..., Path]) -> Path:
    return models()


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run, and its report."""
    from hfstrat.tasks import verify

    patch = pytest.MonkeyPatch()
    from conftest import compare_here

    patch.setattr(verify, "compare", compare_here)
    file = recipe(tmp_path_factory.mktemp("whole"), model)
    report = run(load_recipe(str(file), ["evaluation.eval_on_start=false", "training.save_steps=1"]))
    patch.undo()
    return file, report


@pytest.mark.slow
def test_sampled_answers_rewards_and_losses_are_those_of_trl(
    model: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    file, report = whole
    loaded = load_recipe(str(file))
    _, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    order, rows = BatchOrder(data.lengths, PROMPTS, STEPS, loaded.recipe.seed), prompts(24)
    numbers = data.train["row"][:]
    in_order = [rows[numbers[int(place)]] for step in range(STEPS) for place in order.batch(step)]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=ANSWERS,
        gradient_accumulation_steps=PROMPTS,
        num_generations=ANSWERS,
        max_completion_length=12,
        max_steps=STEPS,
        learning_rate=loaded.recipe.training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=loaded.recipe.training.weight_decay,
        optim=loaded.recipe.training.optim,
        max_grad_norm=loaded.recipe.training.max_grad_norm,
        adam_beta2=loaded.recipe.training.extra.get("adam_beta2", 0.999),
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=loaded.recipe.seed,
    )
    space: dict[str, Any] = {}
    exec(MINE, space)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = GRPOTrainer(
        model=network,
        reward_funcs=[space["letters"]],
        args=args,
        train_dataset=Dataset.from_list(in_order),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    theirs.train()
    logs = [entry for entry in theirs.state.log_history if "reward" in entry]
    ours = [entry for entry in log_history(report) if "reward" in entry]
    assert len(ours) == len(logs) == STEPS
    for name in ("reward", "reward_std", "rewards/letters/mean", "completions/mean_length", "entropy", "loss", "grad_norm"):
        assert [entry[name] for entry in ours] == pytest.approx([entry[name] for entry in logs], rel=1e-5, abs=1e-6), name


def test_a_resumed_run_is_the_same(
    model: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: sampling is a part of the step, and its random state is in the checkpoint."""
    _, report = whole
    file = recipe(tmp_path, model)
    loaded = load_recipe(str(file), ["evaluation.eval_on_start=false", "training.save_steps=1"])
    with monkeypatch.context() as patch:
        stop_at(patch, 2, GrpoTrainer)
        with pytest.raises(KeyboardInterrupt):
            run(loaded)
    resumed = run(loaded)
    folder = Path(report["run"]["recipe"]["output_dir"])
    one, other = (weights(each) for each in (folder, Path(loaded.recipe.output_dir)))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rewards_of(report) == rewards_of(resumed)
    lines = [(each / FILE).read_text().splitlines() for each in (folder, Path(loaded.recipe.output_dir))]
    assert lines[0] == lines[1]
    assert {json.loads(line)["step"] for line in lines[0]} == {1, 2, 3, 4}


def test_what_the_report_says(whole: tuple[Path, dict[str, Any]]) -> None:
    _, report = whole
    result = report["result"]
    assert [entry["step"] for entry in result["rewards"]] == [1, 2, 3, 4]
    assert all({"reward", "rewards/letters/mean", "frac_reward_zero_std"} <= set(entry) for entry in result["rewards"])
    after = result["metrics_after"]
    assert after["reward"] == pytest.approx(after["rewards/letters/mean"]) == pytest.approx(-after["loss"])
    assert result["tokens"] == [entry["num_tokens"] for entry in log_history(report) if "num_tokens" in entry][-1]


def test_evaluate_measures_what_the_run_measured(whole: tuple[Path, dict[str, Any]]) -> None:
    _, report = whole
    found = evaluate(Request(report["run"]["recipe"]["output_dir"], overrides=("evaluation.control=off",)))
    assert found is not None
    measured = found["measured"][ROWS]["after"]
    assert measured["reward"]["value"] == pytest.approx(report["result"]["metrics_after"]["reward"], abs=1e-6)


RUNS = [
    ("lora", 0.1),
    pytest.param("full", 0.1, marks=pytest.mark.slow),
    pytest.param({"name": "partial", "last_n_layers": 2}, 0.0, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("strategy", "beta"), RUNS)
def test_strategies(model: Path, tmp_path: Path, strategy: Any, beta: float) -> None:
    """The divergence from the initial weights is zero in the first step, and not in later ones."""
    file = recipe(tmp_path, model, strategy=strategy, objective={"beta": beta}, training={"max_steps": 2, "eval_steps": 2})
    report = run(load_recipe(str(file), ["training.learning_rate=0.01"]))
    assert report["result"]["verified"]["bit_equal"]
    divergences = [entry["kl"] for entry in report["result"]["rewards"] if "kl" in entry]
    if beta:
        assert divergences[0] == pytest.approx(0.0, abs=1e-6)
        assert divergences[1] > 1e-5
    else:
        assert not divergences


def test_order_of_the_prompts() -> None:
    order = BatchOrder([5] * 6, 2, 2, seed=0)
    found = list(GroupSampler(order, 2, 3, 2))
    one, two, three, four = (int(place) for step in (0, 1) for place in order.batch(step))
    assert found == [one, one, one, two, two, two] * 2 + [three, three, three, four, four, four] * 2
    assert len(found) == len(GroupSampler(order, 2, 3, 2))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", ["mine", "ZeroDivisionError", "for the prompt"]),
        ("return [0.0]", ["1 values for 2 answers", "return one each"]),
        ("return [float('nan')] * len(completions)", ["returned nan", "for the prompt", "or None"]),
        ("return None", ["TypeError"]),
        ("return ['good'] * len(completions)", ["ValueError", "good"]),
    ],
)
def test_a_reward_that_fails_is_named_before_training(model: Path, tmp_path: Path, body: str, message: list[str]) -> None:
    file = recipe(tmp_path, model)
    (tmp_path / "bad.py").write_text(f"def mine(completions, **columns):\n    {body}\n")
    loaded = load_recipe(str(file), [f"objective.rewards=['{tmp_path}/bad.py:mine']"])
    with pytest.raises(UserError) as error:
        run(loaded)
    assert all(part in str(error.value) for part in message), error.value
    assert not Path(loaded.recipe.output_dir).exists() or not list(Path(loaded.recipe.output_dir).glob("checkpoint-*"))


def test_a_reward_that_fails_in_training_is_named(model: Path, tmp_path: Path) -> None:
    """The trial before training had no answer of this length."""
    file = recipe(tmp_path, model)
    body = (
        "def mine(completions, trainer_state, **columns):\n    return [1 / (trainer_state.max_steps == 0)] * len(completions)\n"
    )
    (tmp_path / "late.py").write_text(body)
    loaded = load_recipe(str(file), [f"objective.rewards=['{tmp_path}/late.py:mine']"])
    with pytest.raises(UserError, match=r"late\.py:mine, for the prompt .* ZeroDivisionError"):
        run(loaded)


def test_rewards_without_differences_are_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(tmp_path, model, rewards=["json_valid"], training={"max_steps": 11, "eval_steps": 11})
    report = run(load_recipe(str(file), ["evaluation.eval_on_start=false"]))
    assert all(entry["frac_reward_zero_std"] == 1.0 for entry in report["result"]["rewards"])
    assert "in the last 10 steps all answers to each prompt had the same reward" in " ".join(capsys.readouterr().out.split())


def test_runs_are_compared_by_the_same_rewards(model: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    file = recipe(tmp_path / "one", model, rewards=["json_valid"])
    given = [load_recipe(str(file), [f"objective.rewards=[{name}]"]) for name in ("json_valid", "exact_match")]
    loaded = [SimpleNamespace(loaded=each, label=str(number)) for number, each in enumerate(given)]
    budget = entries.parse_budget("10-steps")
    with pytest.raises(UserError, match=r"objective: .prompts, scored by"):
        entries.check_comparable(loaded, budget)  # type: ignore[arg-type]
    entries.check_comparable(loaded[:1] * 2, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[/INST] [red]", "a\u2028b\u0085c", '{"a": ["b"]}'])
def test_sampled_text_of_any_kind_is_shown_and_stored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """It is neither markup of the terminal nor the end of a line, and a line that a kill has cut does not end the next run."""
    original = GrpoTrainer._sampled
    monkeypatch.setattr(GrpoTrainer, "_sampled", lambda self: [row | {"completion": text} for row in original(self)])
    loaded = load_recipe(str(recipe(tmp_path, model, training={"max_steps": 2, "eval_steps": 1, "save_steps": 2})))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).write_text('{"step": 0, "completion": "earlier"}\n{"step": 1, "comp', encoding="utf-8")
    (tmp_path / "out" / ".hfstrat.lock").touch()
    run(loaded, overwrite=False)
    lines = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text(encoding="utf-8").split("\n") if line]
    assert lines[0]["completion"] == "earlier"
    assert {row["completion"] for row in lines[1:]} == {text}
    assert "".join(json.dumps(text, ensure_ascii=False).split()) in "".join(capsys.readouterr().out.split())


def test_save_steps_need_not_be_a_multiple_of_eval_steps(model: Path, tmp_path: Path) -> None:
    training = {"max_steps": 3, "eval_steps": 2, "save_steps": 3, "load_best_model_at_end": True}
    assert run(load_recipe(str(recipe(tmp_path, model, training=training))))["result"]["status"] == "done"


def test_checkpointed_blocks_stay_those_that_train(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And generation runs without checkpointing."""
    seen: list[tuple[bool, list[bool]]] = []

    def flags(trainer: Any) -> list[bool]:
        return [bool(block.gradient_checkpointing) for block in trainer.model.model.layers]

    original, step = GrpoTrainer._generate_single_turn, GrpoTrainer.training_step
    monkeypatch.setattr(
        GrpoTrainer,
        "_generate_single_turn",
        lambda self, *a, **k: (seen.append((True, flags(self))), original(self, *a, **k))[1],
    )
    monkeypatch.setattr(
        GrpoTrainer, "training_step", lambda self, *a, **k: (step(self, *a, **k), seen.append((False, flags(self))))[0]
    )
    strategy = {"name": "partial", "last_n_layers": 1}
    run(load_recipe(str(recipe(tmp_path, model, strategy=strategy)), ["training.activation_checkpointing=true"]))
    assert all(not any(marks) for generates, marks in seen if generates)
    assert all(marks == [False, False, False, True] for generates, marks in seen if not generates)


def test_a_changed_reward_is_not_continued(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by a resumed run, nor as the same run of a comparison."""
    loaded = load_recipe(str(recipe(tmp_path, model)), ["training.save_steps=1", "evaluation.eval_on_start=false"])
    budget = entries.parse_budget("10-steps")
    before = entries.fingerprint(loaded, budget)
    with monkeypatch.context() as patch:
        stop_at(patch, 2, GrpoTrainer)
        with pytest.raises(KeyboardInterrupt):
            run(loaded)
    (tmp_path / "mine.py").write_text(MINE.replace("'a'", "'b'"))
    assert entries.fingerprint(loaded, budget) != before
    with pytest.raises(UserError, match=r"mine\.py has changed since"):
        run(loaded)


def test_what_is_published_has_no_arguments_of_rewards(whole: tuple[Path, dict[str, Any]]) -> None:
    from hfstrat.publish.scrub import Scrubber, published_report
    from hfstrat.tasks.report import parse

    _, report = whole
    report = json.loads(json.dumps(report))
    objective = report["run"]["recipe"]["objective"]
    objective["rewards"] = [{"name": objective["rewards"][0], "kwargs": {"url": "internal"}}]
    read = parse(report)
    public = json.dumps(published_report(read, Scrubber(read.run.recipe.model_dump())))
    assert "internal" not in public
    assert str(Path(objective["rewards"][0]["name"]).parent) not in public


REFUSED = [
    ("lora", ["model.add_tokens=['<x>']"], "model.add_tokens"),
    ({"name": "lora", "init_lora_weights": "pissa"}, ["objective.beta=0.1"], "objective.beta"),
]


@pytest.mark.parametrize(("strategy", "overrides", "key"), REFUSED)
def test_what_would_measure_from_elsewhere_is_refused(
    model: Path, tmp_path: Path, strategy: Any, overrides: list[str], key: str
) -> None:
    loaded = load_recipe(str(recipe(tmp_path, model, strategy=strategy)), overrides)
    with pytest.raises(UserError, match=key):
        run(loaded)


def test_an_answer_beyond_the_context_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"objective\.max_completion_length: the longest prompt has"):
        run(load_recipe(str(recipe(tmp_path, model, objective={"max_completion_length": 300}))))
