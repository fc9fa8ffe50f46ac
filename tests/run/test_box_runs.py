"""Complete runs of detectors: strategies, resumes, and what other commands and a pipeline make of a result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.detectors import CLASSES, SIDE, box_recipe, folder_of_boxes, make_detector
from helpers.runs import folder_of, run, stop_at, weights

from hfstrat.errors import RunError, UserError
from hfstrat.recipe.load import load_recipe

ROWS = "evaluation rows"
SCRATCH: dict[str, Any] = {
    "name": "scratch",
    "model_type": "yolos",
    "config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 8,
        "num_detection_tokens": 8,
    },
}
CASES = [
    ("yolos", "full"),
    ("rt_detr", "full"),
    ("rt_detr", {"name": "lora", "r": 2}),
    ("detr", {"name": "partial", "last_n_layers": 1}),
    ("rf_detr", {"name": "partial", "last_n_layers": 1}),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_boxes(tmp_path_factory.mktemp("boxes") / "data", 16)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[Any, Path] = {}

    def get(family: str = "yolos", classes: tuple[str, ...] = CLASSES) -> Path:
        if (family, classes) not in made:
            made[family, classes] = make_detector(tmp_path_factory.mktemp(family) / "model", family, classes)
        return made[family, classes]

    return get


def trained(folder: Path, model: Path | None, images: Path, *overrides: str, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and its report."""
    loaded = load_recipe(str(box_recipe(folder, model, images, **more)), list(overrides))
    return folder_of(loaded), run(loaded)


@pytest.fixture(scope="module")
def result(
    model_of: Callable[..., Path], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A result whose scores are above the threshold of a pipeline now and then."""
    return trained(tmp_path_factory.mktemp("result"), model_of(), images, "model.dtype=float32", "training.max_steps=12")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "strategy"), CASES, ids=str)
def test_strategies_train_detectors(
    family: str, strategy: Any, model_of: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """The saved result is the trained model bit for bit, boxes included, and only what the strategy names has moved."""
    from safetensors.torch import load_file

    model = model_of(family)
    folder, report = trained(tmp_path, model, images, "training.load_best_model_at_end=false", strategy=strategy)
    assert report["result"]["verified"]["bit_equal"], report["result"]["verified"]
    assert report["result"]["measured"][ROWS]["after"].keys() >= {"loss", "map", "map50", "map75", "ap50_red"}
    if not isinstance(strategy, dict) or strategy["name"] != "partial":
        return
    before, after = load_file(model / "model.safetensors"), weights(folder)
    # frozen weights are held, and saved, in the precision of forward passes: 16 bits where the machine computes in them
    still = [name for name in before if torch.equal(before[name].bfloat16(), after[name].bfloat16())]
    inner = [name for name in before if "backbone" in name]
    first = {"detr": "stages.0.", "rf_detr": "encoder.layer.0."}[family]
    assert {name for name in inner if first in name and "running" not in name} <= set(still)
    last = {"detr": "stages.3.layers.0.layer.0.convolution.weight", "rf_detr": "encoder.layer.1.mlp.fc1.weight"}[family]
    assert any(name.endswith(last) for name in set(inner) - set(still))
    assert any("decoder" in name for name in set(before) - set(still))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With augmentation and denoising queries, which draw random numbers; stopped within the second epoch."""
    model = make_detector(tmp_path / "model", "rt_detr", num_denoising=4)
    steps = ("training.max_steps=5", "training.save_steps=2", "training.load_best_model_at_end=false")
    whole, _ = trained(tmp_path / "whole", model, images, *steps)
    loaded = load_recipe(str(box_recipe(tmp_path / "parts", model, images)), list(steps))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises((KeyboardInterrupt, RunError)):
            run(loaded)
    report = run(loaded)
    assert report["result"]["resumed_from"]
    one, other = weights(whole), weights(folder_of(loaded))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_micro_batches_have_the_same_gradient(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    """One step of SGD from the images of a step at once, or one by one: the weights are the same but for rounding."""
    options = ("training.max_steps=1", "training.optim=sgd", "model.dtype=float32", "training.load_best_model_at_end=false")
    made = [
        weights(trained(tmp_path / str(size), model_of(), images, *options, f"training.per_device_train_batch_size={size}")[0])
        for size in (4, 1)
    ]
    assert all(torch.allclose(made[0][name], made[1][name], atol=1e-6) for name in made[0])


@pytest.mark.slow
def test_a_pipeline_gives_the_same_boxes(result: tuple[Path, dict[str, Any]], images: Path, tmp_path: Path) -> None:
    """In a fresh process, bit for bit; and every box is drawn."""
    from PIL import Image

    from hfstrat.cli import inference

    folder, output, drawn = result[0], tmp_path / "boxes.jsonl", tmp_path / "drawn"
    boxes = inference.Boxes(drawn, 0.05)
    inference.predict(str(folder), [], None, output, media={"image": [str(images)]}, boxes=boxes)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == len(list(drawn.iterdir())) == 16
    assert any(row["objects"] for row in rows)
    assert Image.open(next(iter(sorted(drawn.iterdir())))).size == (40, 30)
    code = (
        "import json, sys, torch; from transformers import pipeline; "
        "pipe = pipeline('object-detection', model=sys.argv[1], device='cpu', dtype=torch.float32); "
        "print(json.dumps([pipe(file, threshold=0.05) for file in sys.argv[2:]]))"
    )
    words = [sys.executable, "-c", code, str(folder / "final"), *[row["image"] for row in rows]]
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    key: Callable[[dict[str, Any]], Any] = lambda one: (-one["score"], one["label"])  # noqa: E731
    for row, theirs in zip(rows, found, strict=True):
        assert sorted(row["objects"], key=key) == sorted(theirs, key=key)


@pytest.mark.slow
def test_evaluate_reports_the_same_as_the_run(result: tuple[Path, dict[str, Any]]) -> None:
    from hfstrat.evaluation.evaluate import Request, evaluate

    found = evaluate(Request(str(result[0])))
    assert found is not None
    before, again = (each["measured"][ROWS]["after"] for each in (result[1]["result"], found))
    assert {name: one["value"] for name, one in again.items()} == pytest.approx(
        {name: one["value"] for name, one in before.items()}
    )


@pytest.mark.slow
def test_a_checkpoint_with_other_classes_continues(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    model = model_of("rt_detr", ("person", "red", "car", "blue", "dog"))
    folder, report = trained(tmp_path, model, images, "training.load_best_model_at_end=false")
    assert report["result"]["verified"]["bit_equal"]
    config = json.loads((folder / "final" / "config.json").read_text())
    assert list(config["id2label"].values()) == list(CLASSES)


@pytest.mark.slow
def test_scratch_trains_a_shape_of_its_own(images: Path, tmp_path: Path) -> None:
    folder, report = trained(tmp_path, None, images, strategy=SCRATCH, image={"image_size": SIDE})
    assert report["result"]["verified"]["bit_equal"]
    assert json.loads((folder / "final" / "config.json").read_text())["image_size"] == [SIDE, SIDE]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"strategy": "head"}, "strategy.name: head is not for task: object-detection: a head is fitted on one vector"),
    "distill": (
        {"strategy": {"name": "distill", "teacher": "x", "student": "full"}},
        "distill is not for task: object-detection: the queries of a student",
    ),
    "class_weights": ({"training": {"class_weights": "balanced"}}, "training.class_weights: it is for classifiers"),
    "layer_decay": ({"strategy": {"name": "partial", "layer_decay": 0.5}}, "strategy.layer_decay: it counts the blocks of one"),
    "max_length": ({"data": {"max_length": 64}}, "data.max_length: it is for texts"),
    "packing": ({"training": {"packing": True}}, "training.packing: true: examples of object-detection are not packed"),
    "patches": ({"image": {"image_size": 36}}, "image.image_size: 36 is not a multiple of 8, the patches"),
    "pooling": ({"model": {"pooling": "mean"}}, "model.pooling: it is for models of text"),
    "patterns": ({"strategy": {"name": "partial", "patterns": ["nothing"]}}, "'nothing' matches no parameter"),
    "layers": ({"strategy": {"name": "partial", "last_n_layers": 9}}, "given 9, but this model has 2 layers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_answered(case: str, model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    more = dict(WRONG[case][0])
    overrides = [f"model.{key}={value}" for key, value in more.pop("model", {}).items()]
    with pytest.raises(UserError) as refused:
        trained(tmp_path, model_of(), images, *overrides, **more)
    assert WRONG[case][1] in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_other_models_are_refused(images: Path, tmp_path: Path, tiny: Path) -> None:
    from helpers.images import make_image_model

    with pytest.raises(UserError, match="which is no detector whose loss is known here; expected one of detr, yolos"):
        trained(tmp_path, tiny, images)
    with pytest.raises(UserError, match="is a vit, which is no detector"):
        trained(tmp_path, make_image_model(tmp_path / "vit"), images)


def test_a_processor_of_classifiers_is_refused(model_of: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    from helpers.images import make_image_model

    other = make_image_model(tmp_path / "vit")
    with pytest.raises(UserError, match=r"model.tokenizer: .* is none of a detector"):
        trained(tmp_path, model_of(), images, f"model.tokenizer={other}")


def test_more_boxes_than_queries_are_refused(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = folder_of_boxes(tmp_path / "data", 12)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1]["objects"] = {"bbox": [[1 + place, 1, 9, 9] for place in range(12)], "categories": ["red"] * 12}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="an image of the data has 12 boxes, but this model has 8 queries"):
        trained(tmp_path, model_of(), folder)


def test_check_draws_boxes(
    model_of: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from hfstrat.cli import check

    loaded = load_recipe(str(box_recipe(tmp_path, model_of(), images)), [])
    check.show(loaded, 2)
    assert "training images, each as it is in the data and as the model is given it, with boxes" in capsys.readouterr().out
    assert Image.open(tmp_path / "run-examples.png").size == (4 * 164 + 4, 6 * 164 + 4)
