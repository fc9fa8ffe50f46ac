"""Complete runs on images: every strategy on every family, resumes, cached states, and what other commands make of a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.images import CLASSES, FAMILIES, SIZE, folder_of_classes, image_recipe, make_image_model, picture, processor_of
from helpers.runs import folder_of, run, stop_at, weights

from hfstrat.errors import RunError, UserError
from hfstrat.models import random_init
from hfstrat.recipe.load import load_recipe

SCRATCH: dict[str, Any] = {
    "name": "scratch",
    "model_type": "vit",
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 8},
}
STRATEGIES: dict[str, Any] = {
    "full": "full",
    "head": "head",
    "head then full": {"name": "head", "then": "full"},
    "partial": {"name": "partial", "last_n_layers": 1},
    "lora": {"name": "lora", "r": 2},
}
ROWS = "evaluation rows"
LONG: dict[str, Any] = {"training": {"max_steps": 9}}  # more than an epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_classes(tmp_path_factory.mktemp("images") / "data", 14)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def get(family: str = "vit", classes: int = 0) -> Path:
        if (family, classes) not in made:
            made[family, classes] = make_image_model(tmp_path_factory.mktemp(family) / "model", family, classes)
        return made[family, classes]

    return get


def trained(folder: Path, model: Path | None, images: Path, *overrides: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and its report."""
    loaded = load_recipe(str(image_recipe(folder, model, images, **more)), list(overrides))
    return folder_of(loaded), run(loaded)


def after(report: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in report["result"]["measured"][ROWS]["after"].items()}


OFTEN = ("vit",)  # the other families are tested with the slow tests


def families(*names: str) -> list[Any]:
    """Families as parameters, of which one is a fast test."""
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", families(*FAMILIES))
def test_every_strategy_trains_every_family(
    family: str, strategy: str, model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """The result learns, loads with plain transformers or PEFT, and is the trained model bit for bit."""
    _, report = trained(tmp_path, model_of(family), images, strategy=STRATEGIES[strategy])
    verified = report["result"]["verified"]
    assert verified["bit_equal"], verified
    losses = [report["result"]["measured"][ROWS][when]["loss"]["value"] for when in ("before", "after")]
    assert losses[1] < losses[0] or (strategy == "head then full" and losses[1] == losses[0]), "then the solved head is kept"
    assert report["run"]["data"]["labels"]["training_rows"].keys() == set(CLASSES)


@pytest.mark.parametrize("strategy", ["full", "head", "scratch"])
def test_a_pipeline_gives_the_same_scores(strategy: str, model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    from hfstrat.cli import inference

    section, model = (SCRATCH, None) if strategy == "scratch" else (strategy, model_of("dinov2"))
    folder, _ = trained(tmp_path, model, images, "model.dtype=float32", strategy=section, image={"image_size": SIZE})
    output = tmp_path / "labels.jsonl"
    inference.predict(str(folder), [], None, output, media={"image": [str(images / "red"), str(images / "blue" / "000.png")]})
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 15
    pipe = pipeline("image-classification", model=str(folder / "final"), device="cpu", dtype=torch.float32)
    for row in rows[::5]:
        best = pipe(row["image"])[0]
        assert best["label"] == row["labels"][0]
        assert best["score"] == pytest.approx(row["scores"][0], rel=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The augmentation of a step depends on its position alone; two epochs, stopped within the second."""
    steps = ("training.max_steps=9", "training.save_steps=3", "training.load_best_model_at_end=false")
    whole, _ = trained(tmp_path / "whole", model_of(), images, *steps)
    loaded = load_recipe(str(image_recipe(tmp_path / "parts", model_of(), images)), list(steps))
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises((KeyboardInterrupt, RunError)):
            run(loaded)
    report = run(loaded)
    assert report["result"]["resumed_from"].endswith("checkpoint-6")
    one, other = weights(whole), weights(folder_of(loaded))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("augmentation", ["auto", "off"])
@pytest.mark.slow
def test_micro_batches_have_the_same_gradient(
    augmentation: str, model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """One step of SGD from a step's images at once, or in parts: the weights are the same but for rounding."""
    options = ("training.max_steps=1", "training.optim=sgd", "model.dtype=float32", f"image.augmentation={augmentation}")
    made = [
        weights(trained(tmp_path / str(size), model_of(), images, *options, f"training.per_device_train_batch_size={size}")[0])
        for size in (8, 2)
    ]
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-6) for name in made[0])


@pytest.mark.slow
def test_augmentation_changes_the_run_and_off_does_not(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    one, other, third = (
        weights(trained(tmp_path / name, model_of(), images, f"image.augmentation={value}")[0])
        for name, value in (("a", "auto"), ("b", "off"), ("c", "auto"))
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(one[name], third[name]) for name in one)


def test_features_are_computed_once(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        _, report = trained(tmp_path / name, model_of("dinov2"), images, "seed=7", strategy="head")
        head = report["result"]["head"]
        assert (head["pooling"], head["solved_exactly"]) == ("class", True)
    assert "features from the cache" in capsys.readouterr().out


def test_the_features_of_a_layer_are_those_of_the_cut_model(model_of: Callable[..., Path]) -> None:
    """What follows the last block, run on the states after an earlier one, equals the model without the blocks in between."""
    from transformers import AutoModelForImageClassification

    from hfstrat.strategies.head.features import cut
    from hfstrat.strategies.head.own_pooling import own_pooling

    pixels = {"pixel_values": torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))}
    for family, layers in (("vit", 3), ("dinov2", 3), ("swin", 1), ("convnext", 1), ("resnet", 1)):
        model = AutoModelForImageClassification.from_pretrained(model_of(family)).eval()
        body = own_pooling(model, lambda: pixels)
        assert body.depth == layers, family
        with torch.no_grad():
            found = body.features(pixels, list(range(1, layers + 1)), body.poolings)[:, :, 0]
            for layer in range(layers, 0, -1):
                assert torch.equal(cut(body, layer).pooled(pixels), found[:, layer - 1]), (family, layer)


def test_cached_states_change_nothing(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    made = {}
    for cached in (True, False):
        section = {"name": "partial", "last_n_layers": 1, "precompute": cached}
        folder, report = trained(tmp_path / str(cached), model_of(), images, "model.dtype=float32", strategy=section)
        made[cached] = weights(folder)
        assert (report["result"].get("precomputed") is not None) == cached
    assert all(torch.allclose(made[True][name], made[False][name], atol=1e-5) for name in made[True])


def test_a_cache_of_augmented_images_is_refused(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    section = {"name": "partial", "last_n_layers": 1, "precompute": True}
    with pytest.raises(UserError, match=r"strategy.precompute: true, but training examples are augmented in each epoch"):
        trained(tmp_path, model_of(), images, strategy=section, image={"augmentation": "on", "crop": 0.4})
    with pytest.raises(UserError, match=r"image.augmentation: strategy head computes the features of each image once"):
        trained(tmp_path, model_of(), images, strategy="head", image={"augmentation": "on", "crop": 0.4})


def test_a_run_on_mixed_images_learns_and_is_measured_on_whole_ones(
    model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    mixing = {"mixup": 0.3, "crop": 0.9}
    _, report = trained(tmp_path / "whole", model_of(), images, "model.dtype=float32", image=mixing)
    assert after(report)["accuracy"] > 0.8, "the classes are colors"
    options = ("training.max_steps=1", "training.optim=sgd", "model.dtype=float32", "training.load_best_model_at_end=false")
    one, two = (
        weights(trained(tmp_path / str(size), model_of(), images, *options, image=mixing, training=split)[0])
        for size, split in ((8, {}), (2, {"per_device_train_batch_size": 2}))
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one), "however the batch is split"


@pytest.mark.parametrize("strategy", ["full", "head"])
def test_a_rare_class_has_a_threshold(strategy: str, model_of: Callable[..., Path], tmp_path: Path) -> None:
    data = folder_of_classes(tmp_path / "data", 110)
    for file in sorted((data / "red").iterdir())[45:]:
        file.unlink()
    options = ("training.max_steps=40", "evaluation.rare_class_precision=0.8", "image.augmentation=off")
    folder, report = trained(tmp_path / "a", model_of(), data, *options, strategy=strategy)
    config = json.loads((folder / "final" / "config.json").read_text())
    row = next(row for row in report["result"]["evaluation"]["labels"] if row["label"] == "red")
    assert config["label_thresholds"] == {"red": row["threshold"]}
    assert report["result"]["verified"]["bit_equal"]
    assert row["recall"] > 0.5


def test_views_are_rows_of_the_head_and_are_computed_once(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    section = {"name": "head", "layer": 2}
    plain, _ = trained(tmp_path / "plain", model_of(), images, strategy=section)
    changes = {"views": 3, "crop": 0.4}
    folder, report = trained(tmp_path / "views", model_of(), images, strategy=section, image=changes)
    assert "features of 3 views of each training image computed once" in capfd.readouterr().out
    assert report["result"]["head"]["views"] == 3
    assert report["result"]["verified"]["bit_equal"]
    again, _ = trained(tmp_path / "again", model_of(), images, strategy=section, image=changes)
    assert "features of 3 views of each training image from the cache" in capfd.readouterr().out
    one, two, three = (weights(each) for each in (plain, folder, again))
    assert all(torch.equal(two[name], three[name]) for name in two)
    assert any(not torch.equal(one[name], two[name]) for name in one)
    other, _ = trained(tmp_path / "other", model_of(), images, strategy=section, image=changes | {"crop": 0.9})
    assert "computed once" in capfd.readouterr().out, "other views are other features"
    assert any(not torch.equal(two[name], value) for name, value in weights(other).items())


def test_running_statistics_of_a_frozen_body_stay(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    """An adapter does not hold them, so training must not change them."""
    from safetensors.torch import load_file

    folder, _ = trained(tmp_path, model_of("resnet"), images, strategy={"name": "partial", "last_n_layers": 1})
    before = load_file(model_of("resnet") / "model.safetensors")
    result = weights(folder)
    first, last = "embedder.embedder.normalization.running_mean", "encoder.stages.1.layers.0.layer.0.normalization.running_mean"
    assert torch.allclose(result[f"resnet.{first}"].float(), before[first], atol=1e-2)
    assert not torch.allclose(result[f"resnet.{last}"].float(), before[last], atol=1e-2)


def test_a_size_is_met(images: Path, tmp_path: Path) -> None:
    """The shapes without torch are those of the model that transformers builds."""
    section = {"name": "scratch", "model_type": "vit", "parameters": "200k", "config": {"patch_size": 8}}
    _, report = trained(tmp_path, None, images, strategy=section, image={"image_size": 32})
    assert report["result"]["total_parameters"] == pytest.approx(200_000, rel=0.05)


@pytest.mark.parametrize("augmentation", [pytest.param("off", marks=pytest.mark.slow), "on"])
def test_a_small_student_of_a_trained_teacher(
    augmentation: str, model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    teacher, _ = trained(tmp_path / "teacher", model_of(), images, "training.max_steps=12")
    section = {"name": "distill", "teacher": {"name_or_path": str(teacher / "final")}, "student": SCRATCH, "baseline": False}
    folder, report = trained(tmp_path / "student", None, images, strategy=section, **LONG, image={"augmentation": augmentation})
    assert report["result"]["verified"]["bit_equal"]
    cache = report["result"]["distillation"].get("cache")
    assert (cache is not None) == (augmentation == "off"), "logits of augmented images are computed on the fly"
    assert report["result"]["distillation"]["teacher"]["accuracy"] > 0.9
    assert (folder / "final" / "preprocessor_config.json").is_file(), "the teacher's"


def test_a_teacher_with_other_colors_is_refused(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    teacher = make_image_model(tmp_path / "teacher", "vit", classes=3)
    processor = processor_of("vit")
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(teacher)
    section = {"name": "distill", "teacher": {"name_or_path": str(teacher)}, "student": "full"}
    with pytest.raises(UserError, match="its image processor has image_mean"):
        trained(tmp_path, model_of(), images, strategy=section)


@pytest.mark.parametrize("family", families("vit", "dinov2", "swin", "resnet"))
def test_the_image_size_can_change(family: str, model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    folder, report = trained(tmp_path, model_of(family), images, image={"image_size": 48})
    assert report["result"]["verified"]["bit_equal"]
    pipe = pipeline("image-classification", model=str(folder / "final"), device="cpu")
    assert pipe.image_processor(picture(0, 0), return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)
    assert len(pipe(picture(0, 0))) == 3


def test_a_size_that_cuts_patches_is_refused(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image.image_size: 50 is not a multiple of the model's patches of 8 pixels.*set 48"):
        trained(tmp_path, model_of(), images, image={"image_size": 50})


@pytest.fixture(scope="module")
def adapter(
    model_of: Callable[..., Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    return trained(tmp_path_factory.mktemp("adapter"), model_of("dinov2"), images, strategy={"name": "lora", "r": 2})


def test_evaluate_reports_the_same_as_the_run(adapter: tuple[Path, dict[str, Any]], images: Path) -> None:
    from hfstrat.evaluation.evaluate import Request, evaluate

    folder, report = adapter
    found = evaluate(Request(str(folder)))
    assert found is not None
    measured = found["measured"][ROWS]["after"]
    assert {name: measured[name]["value"] for name in measured} == pytest.approx(after(report))
    other = evaluate(Request(str(folder), data=str(images)))
    assert other is not None
    assert other["measured"][ROWS]["rows"] == 42


def test_a_merged_adapter_is_a_complete_model(adapter: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    from hfstrat.publish.merge import merge

    merge(str(adapter[0]), tmp_path / "merged")
    pipe = pipeline("image-classification", model=str(tmp_path / "merged"), device="cpu")
    assert {one["label"] for one in pipe(str(images / "red" / "001.png"))} == set(CLASSES)


def test_an_adapter_can_be_continued(adapter: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path) -> None:
    base = adapter[1]["run"]["recipe"]["model"]["name_or_path"]
    section = {"name": "lora", "adapter": str(adapter[0] / "final")}
    _, report = trained(tmp_path, Path(base), images, strategy=section)
    assert report["result"]["verified"]["bit_equal"]


def test_what_is_pushed(adapter: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from hfstrat.publish.staging import stage
    from hfstrat.tasks.report import read

    report = read(adapter[0])
    assert report is not None
    names = stage(adapter[0], report, tmp_path, "someone/flowers")
    assert {"adapter_model.safetensors", "preprocessor_config.json", "config.json", "README.md"} <= set(names)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "AutoImageProcessor" in card


def test_check_draws_what_the_model_sees(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from hfstrat.cli import check

    loaded = load_recipe(str(image_recipe(tmp_path, model_of(), images)))
    check.show(loaded, 2)
    said = capsys.readouterr().out
    sheet = Image.open(tmp_path / "run-examples.png")
    assert sheet.size[0] > 5 * 64, "the image, and four augmented views"
    assert "8 training images" in said
    assert "24 x 20 pixels, label" in said
    check.show_json(loaded, 1)
    assert json.loads(capsys.readouterr().out)["rows"][0]["target"].startswith("label")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given", [pytest.param("balanced", marks=pytest.mark.slow), "focal", {"blue": 1.0, "green": 1.0, "red": 9.0}]
)
def test_class_weights_change_the_training_loss_only(
    given: Any, model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    for name in CLASSES:
        (few / name).mkdir(parents=True)
        for path in sorted((images / name).iterdir())[: 4 if name == "red" else 14]:
            (few / name / path.name).write_bytes(path.read_bytes())
    plain, one = trained(tmp_path / "plain", model_of(), few)
    changed, other = trained(tmp_path / "changed", model_of(), few, training={"class_weights": given})
    assert one["result"]["metrics_before"] == other["result"]["metrics_before"]
    a, b = weights(plain), weights(changed)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_commands_for_text_are_refused(adapter: tuple[Path, dict[str, Any]]) -> None:
    from hfstrat.cli import inference

    with pytest.raises(UserError, match="this is a classifier of images; give --image PATH"):
        inference.predict(str(adapter[0]), ["a text"], None, None)
    with pytest.raises(UserError, match="no such file or folder"):
        inference.predict(str(adapter[0]), [], None, None, media={"image": ["nowhere.png"]})


def test_runs_on_images_are_not_among_those_that_predict_texts(adapter: tuple[Path, dict[str, Any]]) -> None:
    from hfstrat.advisor import measured_runs
    from hfstrat.tasks import report as reports

    assert len(list(reports.find(adapter[0]))) == 1
    assert measured_runs.of_reports(adapter[0]) == []


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("data.max_length", {"data": {"max_length": 64}}, "data.max_length: it is for texts"),
    ("data.template", {"data": {"template": "plain"}}, "data.template: it is for texts"),
    ("model.pooling", {"model": {"pooling": "mean"}}, "model.pooling: it is for models of text"),
    ("evaluation.metrics", {"evaluation": {"metrics": ["f1"]}}, "evaluation.metrics: it is for models that generate text"),
    ("packing", {"training": {"packing": True}}, "training.packing: true"),
    (
        "dense packing",
        {"training": {"packing": "dense", "global_batch_tokens": 4096, "global_batch_size": 16}},
        "training.packing: dense: examples of image-classification are not packed",
    ),
    (
        "grouping",
        {"training": {"train_sampling_strategy": "group_by_length"}},
        "group_by_length: images have no length",
    ),
    ("class numbers", {"training": {"class_weights": {0: 1.0, 1: 5.0}}}, "'0' is no class of the data"),
    ("contrast", {"strategy": {"name": "head", "contrastive": True}}, "it compares texts, and image-classification has none"),
    (
        "muon for a head",
        {"strategy": {"name": "head", "solver": "trainer"}, "training": {"optim": "muon"}},
        "muon updates matrices of hidden layers",
    ),
    ("head.pooling", {"strategy": {"name": "head", "pooling": "mean"}}, "strategy.pooling: mean: a model for image-class"),
    ("head.mlp", {"strategy": {"name": "head", "head": "mlp"}}, "strategy.head: mlp: a model for image-classification"),
    ("head.layer", {"strategy": {"name": "head", "layer": 7}}, "strategy.layer: given 7, but this model has 3 layers"),
    ("class_weights", {"training": {"class_weights": [1.0, 2.0]}}, "2 weights, but the data have 3 classes"),
    ("class name", {"training": {"class_weights": {"blue": 1.0}}}, "'green' has no weight"),
    ("focal", {"strategy": "head", "training": {"class_weights": "focal"}}, "the focal loss has no exact solution; set"),
    ("image_size", {"image": {"image_size": 4}}, "image.image_size = 4: expected a whole number, at least 8"),
    ("crop", {"image": {"crop": 0.0}}, "image.crop = 0.0: expected"),
    ("crop of none", {"strategy": "head", "image": {"crop": 0.3}}, "image.crop: augmentation is off for strategy head; remove"),
    (
        "mixup of none",
        {"strategy": {"name": "partial", "last_n_layers": 1}, "image": {"mixup": 0.3}},
        "image.mixup: augmentation is off for strategy partial; set image.augmentation: on",
    ),
    ("views of full", {"image": {"views": 4}}, "image.views: 4: they are for strategy head, and not for full; remove it"),
    (
        "views then full",
        {"strategy": {"name": "head", "then": "full"}, "image": {"views": 4}},
        "image.views: 4: strategy.then trains on other changes in each epoch",
    ),
    (
        "views in steps",
        {"strategy": {"name": "head", "solver": "trainer"}, "image": {"views": 4}},
        "image.views: 4: they are for a linear head that is solved",
    ),
    ("views of none", {"strategy": "head", "image": {"views": 4, "augmentation": "off"}}, "views are changes of the images"),
    (
        "equal views",
        {"strategy": "head", "image": {"views": 4, "crop": 1, "flip": False, "color": 0}},
        "without crop, flip and color all views of an image are the same",
    ),
    ("mixed views", {"strategy": "head", "image": {"views": 4, "mixup": 0.2}}, "image.mixup: 0.2: views are of one image"),
    (
        "mixup of focal",
        {"image": {"mixup": 0.3}, "training": {"class_weights": "focal"}},
        "image.mixup: 0.3: the focal loss is for one class per image",
    ),
    (
        "mixup of a student",
        {"strategy": {"name": "distill", "teacher": ".", "student": "full"}, "image": {"mixup": 0.3, "augmentation": "on"}},
        "image.mixup: 0.3: a student learns the classes of whole images",
    ),
    ("changes of none", {"image": {"augmentation": "off", "flip": False}}, "augmentation is off; set augmentation: on"),
    ("other task", {"task": "text-classification", "image": {"image_size": 64}}, "image: it is for task: image-classification"),
]


@pytest.mark.parametrize("case", WRONG, ids=[case[0] for case in WRONG])
def test_wrong_settings_are_answered(
    case: tuple[str, dict[str, Any], str], model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    more = dict(case[1])
    overrides = [f"model.{key}={value}" for key, value in more.pop("model", {}).items()]
    with pytest.raises(UserError) as refused:
        trained(tmp_path, model_of(), images, *overrides, **more)
    assert case[2] in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_number_of_parameters_that_no_shape_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"strategy\.parameters: 200 are too few for any shape of vit"):
        random_init.pick("vit", 200, None, 0, {})


def test_a_model_of_text_is_refused(images: Path, tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match="is a llama model, for which transformers has no image classification"):
        trained(tmp_path, tiny, images)


def test_a_model_without_an_image_processor_is_refused(images: Path, tmp_path: Path) -> None:
    model = make_image_model(tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no image processor"):
        trained(tmp_path, model, images)
