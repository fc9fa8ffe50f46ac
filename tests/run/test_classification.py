"""Complete runs of a classifier: a finished run fulfills its guarantees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import write_jsonl
from helpers.classifiers import LABELS, labeled, write_recipe
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat import strategies
from hfstrat.cli import inference
from hfstrat.data.splits import open_corpus
from hfstrat.errors import UserError
from hfstrat.publish import merge
from hfstrat.recipe import library
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import TASKS
from hfstrat.tasks.generation import How

UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without verification in a fresh process."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


@pytest.fixture
def classify(tmp_path: Path, bodies: Any) -> Callable[..., Any]:
    """`classify("bert", "strategy=full", many=True)` loads a small recipe."""

    def load(family: str, *overrides: str, **rows: Any) -> Any:
        return load_recipe(str(write_recipe(tmp_path, bodies(family), labeled(tmp_path, **rows))), list(overrides))

    return load


@pytest.mark.parametrize(
    ("family", "strategy", "rows"),
    [
        ("bert", "{name: lora, r: 4}", {"pairs": True}),
        ("llama", "full", {"many": True}),
        ("modernbert", "{name: partial, last_n_layers: 1}", {}),
    ],
    ids=["bert-lora-pairs", "llama-full-several", "modernbert-partial"],
)
def test_a_run_ends_with_a_verified_classifier(
    classify: Any, family: str, strategy: str, rows: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("training.max_steps=12", "training.eval_steps=4", "training.learning_rate=3e-3")
    report = run(classify(family, f"strategy={strategy}", *longer, **rows))
    result = report["result"]
    assert result["verified"]["bit_equal"]
    assert result["verified"]["loaded_with"].endswith("ForSequenceClassification")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert {"accuracy", "macro_f1", "rows"} <= result["metrics_after"].keys()
    assert [row["label"] for row in result["evaluation"]["labels"]] == list(LABELS)
    assert report["run"]["data"]["labels"]["training_rows"].keys() == set(LABELS)
    assert all(answer["after"] and answer["reference"] is not None for answer in result["answers"])
    printed = capsys.readouterr().out
    for words in ("labels    3 (cat, dog, fish)", "accuracy", "macro-F1", "lowest F1", "verified"):
        assert words in printed
    assert json.loads((tmp_path / "run" / "report.json").read_text())["result"]["status"] == "done"


def test_a_result_below_a_baseline_is_an_alarm(
    classify: Any, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """One word of each example tells its label, which TF-IDF finds; a classifier after one step has learned nothing."""
    report = run(classify("bert", "strategy=full", "training.max_steps=1", "training.learning_rate=1e-9", count=240))
    found = {one["name"]: one for one in report["result"]["simple_models"]}
    assert list(found) == ["most frequent label", "TF-IDF", "head on frozen features"]
    for one in found.values():
        assert one["value"]["low"] <= one["value"]["value"] <= one["value"]["high"]
        difference = report["result"]["metrics_after"]["accuracy"] - one["value"]["value"]
        assert one["difference"]["value"] == pytest.approx(difference)
    largest = report["result"]["evaluation"]["largest_label"]["accuracy"]
    assert found["most frequent label"]["value"]["value"] == pytest.approx(largest)
    assert found["TF-IDF"]["value"]["value"] > 0.9
    printed = capsys.readouterr().out
    assert "worse than the baseline TF-IDF" in printed
    with np.load(tmp_path / "run" / "evaluation_rows.npz") as columns:
        assert columns["baseline TF-IDF"].mean() == pytest.approx(found["TF-IDF"]["value"]["value"])


@pytest.mark.slow
def test_the_head_on_frozen_features_is_that_of_the_strategy(classify: Any, quick: None) -> None:
    """As good as strategy head on the last layer with the pooling that the baseline chose; and not measured beside it."""
    body = run(classify("bert", "strategy=full", "training.max_steps=1", count=240))["result"]["simple_models"][2]
    accuracies = []
    for pooling in ("mean", "last", "first"):
        report = run(classify("bert", f"strategy={{name: head, layer: 3, pooling: {pooling}}}", count=240), overwrite=True)
        assert [one["name"] for one in report["result"]["simple_models"]] == ["most frequent label", "TF-IDF"]
        accuracies.append(report["result"]["metrics_after"]["accuracy"])
    assert body["value"]["value"] == pytest.approx(max(accuracies), abs=0.05)


def test_baselines_can_be_left_out(classify: Any, quick: None) -> None:
    report = run(classify("bert", "strategy=full", "training.max_steps=1", "evaluation.baselines=false"))
    assert report["result"]["simple_models"] == []


def test_the_best_classifier_has_the_highest_accuracy(classify: Any, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Not the lowest loss, which rises when a small dataset is memorized; ties go to the lower loss."""
    from hfstrat.trainer.trainer import StrategyTrainer

    told = {0: (0.4, 0.7), 1: (0.6, 0.6), 2: (0.8, 0.9), 3: (0.8, 0.8), 4: (0.7, 0.3), 5: (0.8, 0.85), 6: (0.5, 2.0)}

    def measure(self: Any, prediction: Any) -> dict[str, float]:
        accuracy, loss = told[self.state.global_step]
        return original(self, prediction) | {"accuracy": accuracy, "loss": loss}

    original = StrategyTrainer._measure
    monkeypatch.setattr(StrategyTrainer, "_measure", measure)
    report = run(classify("bert", "strategy=full", "training.max_steps=6", "training.eval_steps=1"))
    assert report["result"]["best_step"] == 3


def test_evaluation_does_not_depend_on_the_batch_size(classify: Any, tmp_path: Path, quick: None) -> None:
    """Metrics are equal for batches of 1 and of 7."""
    found = []
    for size in (1, 7):
        folder = f"output_dir={tmp_path / str(size)}"
        report = run(classify("bert", f"training.per_device_eval_batch_size={size}", folder, "model.dtype=float32"))
        found.append(report["result"])
    assert found[0]["metrics_after"] == pytest.approx(found[1]["metrics_after"], rel=1e-5)
    assert found[0]["evaluation"]["confusion"] == found[1]["evaluation"]["confusion"]


@pytest.mark.parametrize(
    "strategy", ["full", pytest.param("{name: lora, r: 4, lora_dropout: 0.1}", marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    classify: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, strategy: str
) -> None:
    from hfstrat.trainer.trainer import StrategyTrainer

    original = StrategyTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    settings = (f"strategy={strategy}",)
    run(classify("bert", *settings, f"output_dir={tmp_path / 'whole'}"))
    with monkeypatch.context() as patch:
        patch.setattr(StrategyTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(classify("bert", *settings))
    again = run(classify("bert", *settings))
    assert again["result"]["resumed_from"].endswith("checkpoint-2")
    assert again["result"]["evaluation"]["labels"]
    assert again["result"]["answers"][0]["before"]
    for file in (tmp_path / "whole" / "final").glob("*.safetensors"):
        expected = load_file(file)
        for name, tensor in load_file(tmp_path / "run" / "final" / file.name).items():
            assert torch.equal(tensor, expected[name]), name


def test_check_shows_rows_with_their_labels(classify: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from hfstrat import strategies
    from hfstrat.cli import check
    from hfstrat.recipe import format
    from hfstrat.run import preflight

    loaded = classify("bert")
    preflight.check(loaded)
    check.show(loaded, rows=3)
    printed = capsys.readouterr().out
    assert "[CLS]" in printed
    assert sum(f"label {label}" in line for line in printed.splitlines() for label in LABELS) == 3
    described = strategies.describe(loaded.recipe, len(LABELS))  # without torch
    assert described is not None
    assert format.trainable(described.footprint.trainable, described.footprint.total) in printed


@pytest.mark.slow
def test_predict_prints_labels_and_generate_names_the_right_command(
    classify: Any, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(classify("bert", "strategy={name: lora, r: 4}"))
    capsys.readouterr()
    target = str(tmp_path / "run")
    inference.predict(target, ["the cat"], None, None)
    assert capsys.readouterr().out.split()[0] in LABELS
    output = tmp_path / "printed.jsonl"
    inference.predict(target, [], tmp_path / "labeled.jsonl", output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 90
    assert all(row["labels"][0] in LABELS and 0 < row["scores"][0] <= 1 for row in rows)
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(UserError, match="row 2: 'text' is null, expected text"):
        inference.predict(target, [], broken, tmp_path / "never.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(TASKS["text-classification"].text, "record", lambda found: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            inference.predict(target, ["a"], None, tmp_path / "never.jsonl")
    assert not list(tmp_path.glob("*never*")), "a file gets its name when it is complete"
    with pytest.raises(UserError, match="hfstrat predict"):
        inference.generate(target, ["a"], None, None, How(4))
    with pytest.raises(UserError, match="hfstrat generate"):
        inference.predict(str(tiny), ["a"], None, None)
    merge.merge(target, tmp_path / "merged")
    assert "nats per text" in capsys.readouterr().out
    inference.predict(str(tmp_path / "merged"), ["the cat"], None, None)


def test_predict_truncates_texts_as_the_run_did(classify: Any, tmp_path: Path, quick: None) -> None:
    run(classify("bert", "strategy=full", "data.max_length=8"))
    scores = []
    for count in (10, 25):  # both are longer
        file, output = tmp_path / f"{count}.txt", tmp_path / f"{count}.jsonl"
        file.write_text("cat the " * count)
        inference.predict(str(tmp_path / "run"), [], file, output)
        scores.append(json.loads(output.read_text())["scores"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "name",
    [name for name in library.names("recipes") if name.endswith("classifier") and not name.startswith("distill")],
)
def test_the_bundled_recipes_run(name: str, tmp_path: Path, bodies: Any, quick: None) -> None:
    data = labeled(tmp_path)
    model = "{}" if name.startswith("scratch") else str(bodies("llama"))
    small = [f"model={model}", f"data.train={data}", f"data.eval={data}", f"output_dir={tmp_path / 'run'}"]
    small += ["strategy.parameters=60k", "strategy.tokenizer.vocab_size=300"] if model == "{}" else []
    report = run(load_recipe(str(library.find("recipes", name)), [*small, "training.max_steps=2"]))
    assert report["result"]["status"] == "done"


@pytest.mark.slow
def test_two_processes_equal_one_process(classify: Any, tmp_path: Path, bodies: Any) -> None:
    """8 examples in one process equal 2 x 4 in two: equal weights after three steps, and equal metrics."""
    recipe = write_recipe(tmp_path, bodies("llama"), labeled(tmp_path))
    found = []
    for count in (1, 2):
        folder = tmp_path / f"by{count}"
        words = [str(recipe), "model.dtype=float32", "training.max_steps=3", f"output_dir={folder}"]
        command = [sys.executable, "-m", "hfstrat", "train", *words]
        if count == 2:
            command += ["--accelerate-config", "cpu_ddp", "--num-processes", "2"]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads((folder / "report.json").read_text())
        found.append((load_file(folder / "final" / "model.safetensors"), report["result"]["metrics_after"]))
    for name, tensor in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], tensor, rtol=1e-4, atol=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


SHAPED = [
    ("bert", {"pairs": True}),
    pytest.param("llama", {}, marks=pytest.mark.slow),
    pytest.param("gpt2", {"many": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "rows"), SHAPED)
@pytest.mark.slow
def test_a_classifier_from_scratch(family: str, rows: dict[str, Any], classify: Any, quick: None) -> None:
    """The tokenizer is trained on the training data, and the trained model predicts labels from the words that mark them."""
    new = f"{{name: scratch, model_type: {family}, parameters: 60k, tokenizer: {{vocab_size: 300}}}}"
    words = (
        f"strategy={new}",
        "training.max_steps=120",
        "training.learning_rate=3e-3",
        "training.load_best_model_at_end=false",
    )
    loaded = classify("bert", "model={}", *words, **rows)
    report = run(loaded)
    assert report is not None
    before, after = (report["result"][f"metrics_{when}"] for when in ("before", "after"))
    assert after["loss"] < 0.85 * before["loss"]
    finished = Path(report["result"]["artifact"])
    tokenizer = tf.AutoTokenizer.from_pretrained(finished)
    made = tf.AutoModelForSequenceClassification.from_pretrained(finished)
    assert set(made.config.label2id) == {*LABELS}
    ids = tokenizer("cat", "dog")["input_ids"]
    assert (ids[0], ids[-1], ids.count(tokenizer.sep_token_id)) == (tokenizer.cls_token_id, tokenizer.sep_token_id, 2)
    assert made(**tokenizer("cat", return_tensors="pt")).logits.shape == (1, 3)


def test_held_out_texts_do_not_train_the_tokenizer(classify: Any) -> None:
    """The texts that the tokenizer was not trained on are the evaluation examples."""
    new = "{name: scratch, model_type: bert, parameters: 60k, tokenizer: {vocab_size: 300}}"
    recipe = classify("bert", f"strategy={new}", "model={}").recipe
    corpus = open_corpus(recipe, TASKS[recipe.task].rows.reader)
    tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
    data = TASKS[recipe.task].rows.prepare(recipe.data, tokenizer, recipe.seed, 0, recipe.evaluation.max_rows, corpus.held_out)
    rows = [json.loads(line) for line in Path(recipe.data.train[0].path).read_text().splitlines()]
    held = {row for row in range(len(rows)) if row in set(data.eval["row"][:])}
    assert held
    assert {rows[row]["text"] for row in held}.isdisjoint(corpus.texts())
    assert len(list(corpus.texts())) + len(held) == len(rows)
