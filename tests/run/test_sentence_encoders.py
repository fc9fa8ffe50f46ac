"""Fine-tuning a sentence encoder uses the pooling that its own files name, and ends in a result of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from helpers.classifiers import labeled, make_any, write_recipe
from helpers.runs import run
from safetensors.torch import load_file

from hfstrat import strategies
from hfstrat.models import pooling
from hfstrat.models.load import load_tokenizer, read_shapes
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Model
from hfstrat.tasks import TASKS
from hfstrat.tasks.loading import load_base

ENCODERS = {
    "bert": "mean",
    "roberta": "cls",
    "distilbert": "lasttoken",
}  # families with a pooling that their class does not have
UNVERIFIED = {"bit_equal": True, "max_difference": 0.0, "max_logit": 1.0, "top1_agreement": 1.0, "loaded_with": "a test"}
LONGER = ("training.max_steps=6", "training.eval_steps=3", "training.learning_rate=3e-3")
FLOAT = "model.dtype=float32"


def as_sentence_encoder(folder: Path, mode: str, normalize: bool = True) -> Path:
    """Add the files by which sentence-transformers knows how a model pools."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
    flags = {f"pooling_mode_{name}": key == mode for key, name in names.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    return folder


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = make_any(tmp_path_factory.mktemp("sentence") / family, family)
            made[family] = as_sentence_encoder(folder, ENCODERS.get(family, "mean"), normalize=False)
        return made[family]

    return get


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


def base_of(folder: Path, **keys: Any) -> Any:
    model = Model.model_validate({"name_or_path": str(folder), "dtype": "float32", **keys})
    data: Any = type("Data", (), {"label_names": ("a", "b", "c"), "many": False})
    return load_base(model, load_tokenizer(model), TASKS["text-classification"], data)


@pytest.mark.parametrize("family", ENCODERS)
def test_logits_are_a_linear_layer_on_what_sentence_transformers_pools(encoders: Any, family: str) -> None:
    """Against the library itself, which reads the same files, for texts of different lengths in one batch."""
    from sentence_transformers import SentenceTransformer

    base, texts = base_of(encoders(family)), ["one two", "a longer text of seven or more words"]
    wanted = torch.tensor(SentenceTransformer(str(encoders(family)), device="cpu").encode(texts))
    batch = load_tokenizer(Model(name_or_path=str(encoders(family))))(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = base.model.eval()(**{k: v for k, v in batch.items() if k != "token_type_ids"}).logits
        torch.testing.assert_close(logits, base.model.classifier(wanted), rtol=1e-4, atol=1e-5)
    assert base.new_modules == ["classifier"]
    made = TASKS["text-classification"].model.shapes(
        read_shapes(encoders(family)), json.loads((encoders(family) / "config.json").read_text()), 3, pooled=True
    )
    assert made is not None
    assert {name: tuple(p.shape) for name, p in base.model.named_parameters()} == made[0]


def test_which_class_pools_as_the_encoder_does(encoders: Any, bodies: Any, tmp_path: Path) -> None:
    """ModernBERT's by its config, a decoder's by the last token; and a model without such files has its own class."""
    modern = base_of(encoders("modernbert"))
    assert modern.pooling is None
    assert modern.model.config.classifier_pooling == "mean"
    decoder = as_sentence_encoder(copytree(bodies("llama"), tmp_path / "llama"), "lasttoken")
    assert base_of(decoder).pooling is None
    assert base_of(bodies("bert")).pooling is None
    assert base_of(bodies("bert"), pooling="mean").pooling == pooling.Pooling("mean")
    assert base_of(encoders("bert"), pooling="class").pooling is None


RUNS = {
    "full": "full",
    "partial": "{name: partial, last_n_layers: 1, frozen_dropout: false, precompute: true}",
    "lora": "{name: lora, r: 4}",
    "then": "{name: head, then: lora}",
}


VERIFIED = ("full", "lora")


@pytest.mark.parametrize("name", [name if name == "lora" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS])
def test_a_run_ends_with_a_verified_sentence_transformer(
    encoders: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a fresh process; and another run continues from it with the same outputs."""
    if name not in VERIFIED:
        monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    recipe = str(write_recipe(tmp_path, encoders("bert"), labeled(tmp_path)))
    precision = "model.dtype=bfloat16" if name == "lora" else FLOAT
    result = run(load_recipe(recipe, [f"strategy={RUNS[name]}", precision, *LONGER]))["result"]
    if name in VERIFIED:
        assert result["verified"]["loaded_with"] == "SentenceTransformer"
        assert result["verified"]["max_difference"] < 1e-5
    assert result["metrics_after"]["accuracy"] >= result["metrics_before"]["accuracy"]
    final = tmp_path / "run" / "final"
    strategy = strategies.build(load_recipe(recipe, [f"strategy={RUNS[name]}"]).recipe.strategy)
    made = TASKS["text-classification"].model.shapes(
        read_shapes(encoders("bert")), json.loads((encoders("bert") / "config.json").read_text()), 3, pooled=True
    )
    assert made is not None
    assert strategy.describe(*made).footprint == (result["trainable_parameters"], result["total_parameters"])
    keys = [f"model.name_or_path={final}", "strategy=full", f"output_dir={tmp_path / 'again'}", precision]
    again = run(load_recipe(recipe, [*keys, *LONGER]))["result"]
    assert again["metrics_before"]["loss"] == pytest.approx(result["metrics_after"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(
    encoders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    from hfstrat.trainer.trainer import StrategyTrainer

    recipe = str(write_recipe(tmp_path, encoders("bert"), labeled(tmp_path)))
    keys = ["strategy={name: lora, r: 4, lora_dropout: 0.1}", FLOAT, *LONGER, "training.head_learning_rate=2e-2"]
    whole = run(load_recipe(recipe, [*keys, f"output_dir={tmp_path / 'whole'}"]))
    original = StrategyTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StrategyTrainer, "training_step", killed)
    with pytest.raises(RuntimeError):
        run(load_recipe(recipe, keys))
    monkeypatch.setattr(StrategyTrainer, "training_step", original)
    resumed = run(load_recipe(recipe, keys))
    assert resumed["result"]["resumed_from"]
    assert resumed["result"]["metrics_after"] == whole["result"]["metrics_after"]
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        one, two = (load_file(tmp_path / name / "final" / file) for name in ("run", "whole"))
        assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.mark.slow
def test_a_result_teaches_a_smaller_student(encoders: Any, tmp_path: Path, quick: None) -> None:
    """As a teacher by name, and as the model that a student with fewer layers is made of."""
    recipe = str(write_recipe(tmp_path, encoders("bert"), labeled(tmp_path)))
    run(load_recipe(recipe, ["strategy=full", FLOAT, *LONGER]))
    teacher, accuracy = tmp_path / "run" / "final", []
    for number, (model, strategy) in enumerate(
        (
            (encoders("bert"), f"{{name: distill, teacher: {teacher}, student: {{name: lora, r: 4}}, baseline: false}}"),
            (teacher, "{name: distill, shrink: {layers: 2}, student: full, baseline: false}"),
        )
    ):
        folder = tmp_path / f"student-{number}"
        report = run(
            load_recipe(recipe, [f"model.name_or_path={model}", f"strategy={strategy}", f"output_dir={folder}", FLOAT, *LONGER])
        )
        accuracy.append(report["result"]["distillation"]["teacher"]["accuracy"])
        assert (folder / "final" / "2_Dense" / "model.safetensors").is_file()
    assert accuracy[0] == accuracy[1]
