"""Numbers for texts: trained on standardized targets, measured and saved in original units, by every strategy that suits it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from helpers.classifiers import ENCODERS, make_any, measured
from scipy import stats

from hfstrat.errors import UserError
from hfstrat.models import output_scale
from hfstrat.models.output_scale import CONSTANT_RIDGE, Units, constant_error
from hfstrat.recipe.load import load_recipe
from hfstrat.run.train import run
from hfstrat.strategies.head import linear
from hfstrat.tasks import TASKS
from hfstrat.tasks.regression.scores import score_of
from hfstrat.tasks.regression.targets import TargetFormat

TASK = TASKS["regression"]


@pytest.fixture
def regress(tmp_path: Path) -> Callable[..., Any]:
    """`regress("bert", "strategy=full", targets=2)` loads a recipe for tiny models."""

    def load(family: str, *overrides: str, targets: int = 1, offset: float = 2000.0) -> Any:
        model = make_any(tmp_path / family, family)
        file = tmp_path / "recipe.yaml"
        rows = measured(tmp_path, targets, offset)
        file.write_text(
            f"task: regression\nmodel: {model}\nstrategy: full\ndata: {{train: {rows}, eval_size: 20, max_length: 64}}\n"
            "training: {max_steps: 6, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
            "  eval_steps: 3, logging_steps: 1}\n"
            f"evaluation: {{samples: 2}}\noutput_dir: {tmp_path / 'run'}\n"
        )
        return load_recipe(str(file), list(overrides))

    return load


RUNS = [
    ("bert", "full"),
    ("bert", "lora"),
    ("bert", "{name: partial, last_n_layers: 1}"),
    ("bert", "head"),
    ("bert", "{name: head, head: mlp, hidden_size: 8}"),
    ("bert", "{name: head, then: full}"),
    ("roberta", "full"),
    ("modernbert", "head"),
    ("llama", "full"),
    ("llama", "lora"),
    ("llama", "{name: head, pooling: last}"),
    ("llama", "{name: head, pooling: last, solver: trainer}"),
    ("llama", "{name: head, then: lora}"),
    ("gpt2", "{name: head, pooling: mean}"),
]


SOLVED = ["head", "{name: head, pooling: last}", "{name: head, pooling: mean}"]
VERIFIED = [("bert", "lora"), ("llama", "full")]
UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy"), RUNS)
def test_a_run_predicts_in_original_units(regress: Any, family: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain libraries load the result, and its predictions have the metrics of the report."""
    if (family, strategy) not in VERIFIED:
        monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    offset = 2000.0 if family in ENCODERS else 0.0  # the heads of decoders have no bias
    loaded = regress(family, f"strategy={strategy}", targets=2, offset=offset)
    report = run(loaded)
    assert report is not None
    result = report.result
    assert result.verified.max_difference < 1
    after = result.metrics_after
    is_solved = strategy in SOLVED  # the head before it is random
    assert is_solved or result.metrics_before["loss"] < 3, "training begins near the mean, and not at 0 in original units"
    assert after["loss"] < 3
    folder = Path(result.artifact)
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert list(config["id2label"].values()) == ["scores_0", "scores_1"]
    found = predictions(loaded, folder)
    true, predicted = found[:, :, 0], found[:, :, 1]
    assert math.isclose(after["mae"], np.abs(true - predicted).mean(), rel_tol=1e-3)
    assert math.isclose(after["rmse"], np.sqrt(np.square(true - predicted).mean(0)).mean(), rel_tol=1e-3)
    for name, of_scipy in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        assert math.isclose(
            after[name], np.mean([of_scipy(true[:, k], predicted[:, k])[0] for k in range(2)]), abs_tol=2e-2
        )  # of float32 near 2,000


def predictions(loaded: Any, folder: Path) -> np.ndarray:
    """Targets and predictions `[examples, targets, 2]` of the evaluation examples, by the loaded result."""
    from hfstrat.tasks import artifact

    recipe = loaded.recipe
    model, tokenizer, _ = artifact.load(str(folder.parent))
    data = TASK.rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows)
    rows = []
    for row in data.eval:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([row["input_ids"]]), attention_mask=torch.ones(1, row["length"]).long()
            ).logits
        rows.append(np.stack([row["label"], logits[0].double().numpy()], axis=1))
    return np.stack(rows)


UNITS = Units(torch.tensor([2000.0, -0.01], dtype=torch.float64), torch.tensor([5.0, 0.02], dtype=torch.float64))


@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_layer_folds_exactly(bias: bool) -> None:
    """Folded away, and for weights that were trained in original units, outputs stay what they are."""
    torch.manual_seed(0)
    features = torch.randn(40, 16).double() + 1
    constant = None if bias else output_scale.constant_direction(features)
    layer = torch.nn.Linear(16, 2, bias=bias).double()
    before = layer(features)
    output_scale.scale(layer, UNITS, constant, keep=True)
    torch.testing.assert_close(layer(features).double(), before, rtol=1e-5, atol=1e-3)
    model = torch.nn.Sequential(layer)
    with torch.no_grad():
        layer.weight += 0.1
    scaled = model(features)
    output_scale.fold(model)
    assert type(layer) is torch.nn.Linear
    torch.testing.assert_close(model(features), scaled.double(), rtol=1e-5, atol=1e-3)
    assert set(layer.state_dict()) == ({"weight", "bias"} if bias else {"weight"})


def test_the_error_of_a_missing_bias_is_that_of_examples_left_out() -> None:
    source = torch.Generator().manual_seed(0)
    features = torch.randn(30, 12, generator=source).double() + torch.linspace(-1, 2, 12).double()
    gram = CONSTANT_RIDGE * features.square().sum(1).mean() * torch.eye(12).double()
    kept = [torch.cat([features[:place], features[place + 1 :]]) for place in range(30)]
    left_out = torch.stack(
        [1 - row @ torch.linalg.solve(x.T @ x + gram, x.sum(0)) for row, x in zip(features, kept, strict=True)]
    )
    assert math.isclose(constant_error(features), float(left_out.square().mean().sqrt()), rel_tol=1e-6)
    exact = torch.cat([features, torch.full((30, 1), 5.0).double()], dim=1)
    assert constant_error(exact) < 0.02


def test_the_loss_is_not_in_nats() -> None:
    assert "MSE" in TASK.text.loss_unit
    assert "nats" not in TASK.text.loss_unit


def test_equal_splits_of_a_batch_give_equal_gradients() -> None:
    """The loss is summed and divided by the numbers to predict of the complete optimizer step."""
    torch.manual_seed(0)
    metrics = TASK.metrics.for_data(Data())
    features, labels = torch.randn(8, 4), torch.randn(8, 2)
    found = []
    for parts in (1, 2, 8):
        weight = torch.ones(2, 4, requires_grad=True)
        for x, y in zip(features.chunk(parts), labels.chunk(parts), strict=True):
            logits = x @ weight.T * UNITS.std.float() + UNITS.mean.float()
            metrics.loss({"logits": logits}, y, num_items_in_batch=labels.numel()).backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-4)


class Data:
    label_names, units = ("one", "two"), UNITS


def test_metrics_are_those_of_other_libraries() -> None:
    """In original units, with ties in the ranks; counted twice, an example weighs twice."""
    from sklearn import metrics

    source = np.random.default_rng(0)
    true = source.integers(0, 5, (60, 2)).astype(float) * [10, 0.1]
    predicted = true + source.normal(0, 1, (60, 2)) * [10, 0.1]
    predicted[:9] = predicted[0]
    squared = np.square(true - predicted).sum(1)
    score = score_of(np.stack([squared, np.full(60, 2.0)], axis=1), true, predicted)
    for weights in (np.ones(60), source.integers(0, 3, 60).astype(float)):
        rows = np.repeat(np.arange(60), weights.astype(int))
        one, other, found = true[rows], predicted[rows], score(weights)
        assert math.isclose(found["mae"], metrics.mean_absolute_error(one, other))
        assert math.isclose(found["rmse"], metrics.root_mean_squared_error(one, other))
        for name, of_scipy in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            assert math.isclose(found[name], np.mean([of_scipy(one[:, k], other[:, k])[0] for k in range(2)]))


@pytest.mark.parametrize("bias", [True, False])
def test_the_solved_head_is_ridge_regression(bias: bool) -> None:
    from sklearn.linear_model import Ridge

    source = np.random.default_rng(1)
    x = source.normal(2, [1.0, 5.0, 0.1], (80, 3))
    y = x @ source.normal(size=(3, 2)) + source.normal(size=(80, 2))
    features = torch.tensor(x, dtype=torch.float32)
    layer, _ = linear.fit_ridge(features, torch.tensor(y), 1e-2, bias)
    scale = linear.Scale.of(features, centered=bias)
    peer = Ridge(alpha=80 * 1e-2, fit_intercept=bias).fit(scale.apply(features.double()).numpy(), y)
    wanted = peer.predict(scale.apply(features.double()).numpy())
    np.testing.assert_allclose(layer.logits(features.double()).numpy(), wanted, rtol=1e-4, atol=1e-4)


def read(rows: list[dict[str, Any]], **mapping: str) -> TargetFormat:
    return TargetFormat.detect(rows, "rows.csv", "auto", mapping)


def test_targets_are_detected_from_the_columns() -> None:
    assert read([{"text": "a", "label": 0.5}]).target_names == ["label"]
    assert read([{"sentence1": "a", "sentence2": "b", "score": 1}]).columns == ("sentence1", "sentence2")
    assert read([{"text": "a", "scores": [1, 2.5]}]).target_names == ["scores_0", "scores_1"]
    several = read([{"text": "a", "valence": 1, "arousal": 2}], valence="target", arousal="target")
    assert several.target_names == ["valence", "arousal"]
    assert several.example({"text": "a", "valence": "1.5", "arousal": 2}).labels == [1.5, 2.0]
    with pytest.raises(UserError, match=r"columns: \{review: text, stars: target\}"):
        read([{"review": "a", "stars": 4}])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "missing"),
        (float("nan"), "missing"),
        (float("inf"), "finite"),
        ("good", "task: text-classification"),
        (True, "is true; expected a number"),
        ("3,5", "decimals with a point"),
        ("", "is empty"),
        (10**400, "finite"),
        ([1.0, 2.0], "is a list"),
    ],
)
def test_a_target_that_is_no_number_is_refused_with_its_row(value: Any, words: str, regress: Any) -> None:
    from hfstrat.run import preflight

    loaded = regress("bert")
    file = Path(loaded.recipe.data.train[0].path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[2]["score"] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="row 3: 'score' is") as error:
        preflight.check(loaded, network=False)
    assert words in str(error.value)


@pytest.mark.parametrize("values", [[1.0, None], [1.0], [1.0, 2.0, 3.0]])
def test_several_targets_have_to_be_complete(values: Any) -> None:
    from hfstrat.data.values import BadRow

    with pytest.raises(BadRow, match="expected"):
        read([{"text": "a", "scores": [1.0, 2.0]}]).example({"text": "a", "scores": values})


def test_rounded_predictions_are_refused_before_training(regress: Any) -> None:
    """Numbers near 2,000 in 16 bits are multiples of 8."""
    with pytest.raises(UserError, match=r"model.dtype: .*float32"):
        run(regress("bert", "model.dtype=bfloat16"))
    assert regress("bert").recipe.model.dtype == "float32"


def test_targets_that_do_not_vary_are_refused(regress: Any) -> None:
    loaded = regress("bert")
    file = Path(loaded.recipe.data.train[0].path)
    rows = [json.loads(line) | {"score": 3.5} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"'score' is 3\.5 in all training rows"):
        run(loaded)
    assert not Path(loaded.recipe.output_dir).exists()


def test_a_single_training_row_is_refused(regress: Any, tmp_path: Path) -> None:
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"text": "the cat", "score": 1.5}])
    loaded = regress("bert", f"data={{train: {alone}, eval: {tmp_path / 'measured.jsonl'}, max_length: 64}}")
    with pytest.raises(UserError, match="1 training row; expected several"):
        run(loaded)
    assert not Path(loaded.recipe.output_dir).exists()


@pytest.mark.slow
def test_a_decoder_warns_of_targets_far_from_zero(
    regress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its head has no bias; for targets near 0 there is nothing to warn of."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    for offset in (2000.0, -7.5):
        run(regress("llama", "training.max_steps=1", f"output_dir={tmp_path / str(offset)}", offset=offset))
        assert ("has no bias" in capsys.readouterr().out) == (offset > 0)


@pytest.mark.slow
def test_a_student_matches_its_teacher_and_a_random_model_is_trained(
    regress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distillation and random weights; the result is evaluated, continued and predicts."""
    from hfstrat.cli.inference import predict
    from hfstrat.tasks.artifact import task_of

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    teacher = run(regress("bert", f"output_dir={tmp_path / 'teacher'}"))
    final = str(tmp_path / "teacher" / "final")
    student = f"strategy={{name: distill, teacher: {final}, teacher_weight: 0.5, student: full}}"
    report = run(regress("bert", student, "training.max_steps=12"))
    assert teacher is not None
    assert report is not None
    assert math.isclose(
        json.loads((tmp_path / "run" / "report.json").read_text())["result"]["distillation"]["teacher"]["mae"],
        teacher.result.metrics_after["mae"],
        rel_tol=1e-3,
    )
    assert task_of(str(tmp_path / "run")).name == "regression"
    predict(str(tmp_path / "run"), ["the cat"], None, tmp_path / "out.jsonl")
    assert math.isclose(
        json.loads((tmp_path / "out.jsonl").read_text())["values"]["score"],
        2000 + 7.5,  # the mean; the targets are within 7.5 of it
        abs_tol=15,
    )
    further = run(
        regress(
            "bert", f"model={final}", "training.max_steps=1", "training.learning_rate=1e-9", f"output_dir={tmp_path / 'more'}"
        )
    )
    assert further is not None
    assert math.isclose(further.result.metrics_before["mae"], teacher.result.metrics_after["mae"], rel_tol=1e-3)
    scratch = "strategy={name: scratch, model_type: bert, parameters: 60k}"
    made = run(regress("bert", scratch, f"model={{tokenizer: {tmp_path / 'bert'}}}", f"output_dir={tmp_path / 'scratch'}"))
    assert made is not None
    assert made.result.metrics_after["mae"] < 15, "twice the largest distance of a target from the mean"
