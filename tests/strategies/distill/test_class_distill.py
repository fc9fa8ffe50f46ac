"""Classifiers that are distilled from a classifier: the loss against a reference, cached outputs, labels in another order."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.classifiers import labeled, make_any, write_recipe
from helpers.distillation import DIVERGENCES, divergence_of
from helpers.runs import run
from torch.nn import functional
from transformers import PretrainedConfig

from hfstrat.errors import UserError
from hfstrat.recipe.distill import TeacherModel
from hfstrat.recipe.load import load_recipe
from hfstrat.strategies.distill.classification import ClassDistiller, class_distill_sum
from hfstrat.strategies.distill.loss import Mix
from hfstrat.tasks import TASKS

ROWS, LABELS = 6, 4


def inputs(many: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(5)
    logits, said = (torch.randn(ROWS, LABELS, generator=source, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, 2, (ROWS, LABELS), generator=source).double() if many else torch.randint(0, LABELS, (ROWS,))
    return logits.requires_grad_(), said, labels


def reference(logits: torch.Tensor, said: torch.Tensor, labels: torch.Tensor, mix: Mix) -> torch.Tensor:
    if labels.is_floating_point():
        p, q = (
            torch.stack([one.sigmoid(), (-one).sigmoid()], -1) for one in (said / mix.temperature, logits / mix.temperature)
        )
        plain = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    else:
        p, q = ((one / mix.temperature).softmax(-1) for one in (said, logits))
        plain = functional.cross_entropy(logits, labels, reduction="sum")
    apart = divergence_of(mix.divergence, p, q, mix.skew).sum()
    return mix.alpha * mix.temperature**2 * apart + (1 - mix.alpha) * plain


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("many", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_equal_the_reference(name: str, many: bool, temperature: float) -> None:
    logits, said, labels = inputs(many)
    for alpha in (1.0, 0.4):
        mix = Mix(name, alpha, temperature)
        found, expected = (loss(logits, said, labels, mix) for loss in (class_distill_sum, reference))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("many", [False, True], ids=["one label", "several"])
def test_any_split_has_the_same_loss_and_gradient(many: bool) -> None:
    logits, said, labels = inputs(many)
    distiller = ClassDistiller(Mix("forward_kl", 0.6, 2.0))
    whole = distiller.loss({"logits": logits, "teacher_logits": said}, labels)
    expected = torch.autograd.grad(whole, logits)[0]
    for size in (1, 2, 5):
        parts = [
            distiller.loss(
                {"logits": logits[start : start + size], "teacher_logits": said[start : start + size]},
                labels[start : start + size],
                labels.numel(),
            )
            for start in range(0, ROWS, size)
        ]
        torch.testing.assert_close(sum(parts), whole)
        torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], expected)


def test_the_teacher_s_labels_are_put_into_the_student_s_order() -> None:
    class Says(torch.nn.Module):
        def __init__(self, names: list[str]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = PretrainedConfig(id2label=dict(enumerate(names)), pad_token_id=len(names[0]))

        def forward(self, input_ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.arange(3.0).expand(len(input_ids), 3) + self.weight)

    student, teacher, distiller = Says(["a", "b", "c"]), Says(["c", "a", "b"]), ClassDistiller(Mix())
    distiller.set_teacher(teacher, SimpleNamespace(model=student), student)  # type: ignore[arg-type]
    assert distiller.teacher_outputs((), {"input_ids": torch.ones(2, 3)}).tolist() == [[1.0, 2.0, 0.0]] * 2
    with pytest.raises(ValueError, match="only one has c"):
        distiller.set_teacher(Says(["a", "b", "d"]), SimpleNamespace(model=student), student)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained a tiny BERT on three labels."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = write_recipe(folder, make_any(folder / "body", "bert"), labeled(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
        run(load_recipe(str(recipe), ["training.max_steps=20", "training.eval_steps=10"]))
    return folder


@pytest.fixture
def distil(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    recipe = write_recipe(tmp_path, trained / "run" / "final", trained / "labeled.jsonl")

    def start(strategy: str, name: str) -> Any:
        words = [f"strategy={strategy}", f"output_dir={tmp_path / name}", "model.dtype=float32"]
        report = run(load_recipe(str(recipe), [*words, "training.max_steps=20", "training.eval_steps=10"]))
        assert report is not None
        return report["result"]

    return start


def test_a_shrunk_classifier_learns_from_the_whole_one(distil: Any, trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    strategy = (
        "{name: distill, shrink: {layers: 2}, student: full, temperature: 2.0, baseline: false, teacher_cache: {form: FORM}}"
    )
    once, anew = (distil(strategy.replace("FORM", form), name) for form, name in (("auto", "once"), ("'off'", "anew")))
    assert [e["loss"] for e in once["losses"]] == pytest.approx([e["loss"] for e in anew["losses"]], rel=1e-4)
    assert once["metrics_after"] == pytest.approx(anew["metrics_after"], rel=1e-4)
    before = json.loads((trained / "run" / "report.json").read_text())["result"]["metrics_after"]
    assert once["distillation"]["teacher"]["loss"] == pytest.approx(before["loss"], rel=0.05)
    assert once["distillation"]["cache"]["form"] == "class_logits"
    assert any(line.startswith("distilled") for line in once["comparison"]["lines"])
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once" / "final")
    assert saved.config.num_hidden_layers == 2


def test_the_shipped_recipe_shrinks_what_the_one_before_it_made(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own settings, on a tiny classifier and few rows."""
    from hfstrat.recipe import library
    from hfstrat.strategies.distill import report as distill_report

    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    monkeypatch.setattr(distill_report, "_baseline", lambda *args: (None, "a test"))
    first, recipe = (str(library.find("recipes", f"{kind}/classifier")) for kind in ("full", "distill"))
    assert load_recipe(recipe).recipe.model.name_or_path == f"{load_recipe(first).recipe.output_dir}/final"
    rows = [f"data.{part}={trained / 'labeled.jsonl'}" for part in ("train", "eval")]
    words = [f"model={trained / 'run' / 'final'}", "strategy.shrink.layers=2", f"output_dir={tmp_path / 'run'}"]
    report = run(load_recipe(recipe, [*rows, *words]))
    assert report is not None
    assert report["result"]["distillation"]["cache"]["form"] == "class_logits"
    assert report["result"]["total_parameters"] < report["result"]["distillation"]["teacher"]["parameters"]


def test_what_a_classifier_cannot_have_is_refused(distil: Any) -> None:
    for strategy, said in (
        ("{name: distill, shrink: {layers: 2}, student: full, on_policy: true}", "text-classification generates no text"),
        ("{name: distill, student: lora, baseline: false}", "cannot be its own teacher"),
        (
            "{name: distill, shrink: {layers: 2}, student: full, teacher_cache: {form: top_k}}",
            "one output per text is cached exactly",
        ),
        ("{name: distill, shrink: {layers: 2}, student: full, hidden_states: {loss: mse}}", "causal-lm only"),
    ):
        with pytest.raises(UserError, match=said):
            distil(strategy, "bad")


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_a_teacher_hears_of_two_texts_as_it_learnt_them(tmp_path: Path, family: str) -> None:
    """With and without segment ids of the student, for all examples or one batch, in training or cached."""
    from helpers.classifiers import encoder_tokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from hfstrat.data.collate import ClassCollator, has_token_types
    from hfstrat.data.labeled import LabeledText, Texts

    teacher, student = (
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(make_any(tmp_path / name, name))).eval()
        for name in ("bert", family)
    )
    texts = Texts(encoder_tokenizer(types=family == "bert"), 64)
    pairs = [LabeledText("the cat", "a dog", []), LabeledText("a mat", "red", [])]
    rows = [row._asdict() | {"label": 0} for row in texts.encode(pairs)]
    distiller = ClassDistiller(Mix())
    assert distiller.bind(student) is None
    distiller.set_teacher(teacher, SimpleNamespace(model=student), student)  # type: ignore[arg-type]
    batch = ClassCollator(0, 8, has_token_types(student)).with_teacher(has_token_types(teacher))(rows)
    batch.pop("labels")
    with torch.no_grad():
        types = batch["teacher_types"]
        assert types.any()
        wanted = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], token_type_ids=types).logits
        assert torch.equal(distiller.teacher_outputs((), batch), wanted)
        assert torch.equal(student.train()(**batch).teacher_logits, wanted)


@pytest.mark.parametrize("task", ["image-classification", "audio-classification", "image-text-to-text"])
def test_the_processor_of_a_teacher_is_that_of_its_revision(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its code, where the recipe trusts it, as its weights are loaded."""
    asked: list[dict[str, Any]] = []

    def load(source: str, options: dict[str, Any], key: str, *more: Any) -> None:
        asked.append(options)
        raise UserError("enough")

    monkeypatch.setattr(f"hfstrat.tasks.{task.replace('-', '_')}.processor.from_source", load)
    section = TeacherModel(name_or_path="me/teacher", revision="v2", trust_remote_code=True)
    with pytest.raises(UserError, match="enough"):
        TASKS[task].model.check_teacher(None, section, SimpleNamespace(settings={}))
    assert asked == [{"trust_remote_code": True, "revision": "v2"}]
