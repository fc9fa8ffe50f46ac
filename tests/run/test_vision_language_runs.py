"""Complete runs of vision-language models: strategies, resumes, cached features, and what other commands make of a result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.runs import folder_of, run, stop_at, weights
from helpers.vision_language import conversations, picture
from safetensors.torch import load_file

from hfstrat.errors import UserError
from hfstrat.models import vision_parts
from hfstrat.recipe.load import load_recipe

STRATEGIES: dict[str, Any] = {
    "full": {"name": "full"},
    "all of it": {"name": "full", "freeze": []},
    "projector": {"name": "full", "freeze": ["vision", "language"]},
    "lora": {"name": "lora", "r": 2},
    "lora on the vision tower": {"name": "lora", "r": 2, "freeze": ["projector", "language"], "target_modules": ["q_proj"]},
    "partial": {"name": "partial", "last_n_layers": 1, "patterns": ["*projector*"]},
}
FAST = ("lora",)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("chats"), 20)


@pytest.fixture(scope="module")
def model_of(made: Callable[[str], Path]) -> Callable[..., Path]:
    return lambda family="llava": made(family)


def recipe(folder: Path, model: Path, rows: Path, strategy: Any, *overrides: str) -> Any:
    given = {
        "task": "image-text-to-text",
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "strategy": strategy,
        "data": {"train": str(rows), "eval_size": 4},
        "training": {"max_steps": 4, "global_batch_size": 8, "learning_rate": 3e-3, "eval_steps": 2},
        "evaluation": {"samples": 1, "max_new_tokens": 2, "control": "off"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(given))
    return load_recipe(str(folder / "recipe.yaml"), list(overrides))


def moved(loaded: Any, base: Path) -> set[str]:
    """The parts whose weights a complete result has changed."""
    from transformers import AutoModelForImageTextToText

    one, other = (AutoModelForImageTextToText.from_pretrained(p) for p in (folder_of(loaded) / "final", base))
    prefixes, theirs = vision_parts.prefixes_of(one), dict(other.named_parameters())
    return {vision_parts.role_of(n, prefixes) for n, p in one.named_parameters() if not torch.equal(p, theirs[n])}


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES])
def test_strategies_train_their_parts_and_results_reload(name: str, tmp_path: Path, model_of: Any, chats: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded = recipe(tmp_path, model_of(), chats, STRATEGIES[name])
    report = run(loaded)
    assert report["result"]["verified"]["max_difference"] < 1e-4
    final = folder_of(loaded) / "final"
    processor = AutoProcessor.from_pretrained(final)
    assert type(processor).__name__ == "LlavaProcessor"
    expected = {
        "full": {"projector", "language"},
        "all of it": {"vision", "projector", "language"},
        "projector": {"projector"},
        "partial": {"projector", "language"},
    }
    if name in expected:
        assert moved(loaded, model_of()) == expected[name]
        model: Any = AutoModelForImageTextToText.from_pretrained(final)
    else:
        names = {
            vision_parts.role_of(n.removeprefix("base_model.model."), vision_parts.LLAVA) for n in weights(folder_of(loaded))
        }
        assert names == ({"vision"} if "tower" in name else {"projector", "language"})
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(model_of()), final)
    from PIL import Image

    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.new("RGB", (30, 40))], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    assert "AutoModelForImageTextToText" in (final / "README.md").read_text()
    assert report["run"]["data"]["images"]["images"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["full", "lora"])
def test_resuming_is_bit_for_bit(
    strategy: str, tmp_path: Path, model_of: Any, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = recipe(tmp_path / "one", model_of(), chats, STRATEGIES[strategy])
    run(whole)
    parts = recipe(tmp_path / "two", model_of(), chats, STRATEGIES[strategy])
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run(parts)
    run(parts)
    one, other = weights(folder_of(whole)), weights(folder_of(parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "llava_onevision", "qwen2_5_vl"])
def test_cached_features_change_nothing(family: str, tmp_path: Path, model_of: Any, chats: Path) -> None:
    losses, strategy = [], {"name": "lora", "r": 2, "freeze": ["vision", "projector"]}
    for number, mode in enumerate(("false", "true")):
        folder = tmp_path / str(number)
        folder.mkdir()
        loaded = recipe(folder, model_of(family), chats, strategy, f"image.precompute={mode}", "training.logging_steps=1")
        found = run(loaded)["result"]
        assert ("vision_features" in found) == (mode == "true")
        losses.append([entry["loss"] for entry in found["losses"]] + [found["metrics_after"]["loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_the_tower_is_not_run_and_pixels_are_not_read(
    tmp_path: Path, model_of: Any, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfstrat.data import image_text_batches

    loaded = recipe(tmp_path, model_of(), chats, {"name": "lora", "r": 2}, "image.precompute=true", "evaluation.samples=0")
    reads: list[int] = []
    original = image_text_batches.images_of
    monkeypatch.setattr(image_text_batches, "images_of", lambda row: reads.append(1) or original(row))
    run(loaded)
    images = sum(len(json.loads(line)["images"]) for line in chats.read_text().splitlines())
    assert len(reads) < 3 * images + 10  # once for the features; at the end the result is evaluated without them


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, model_of: Any) -> Path:
    """Another model of the family, with the same processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("teacher")
    model = AutoModelForImageTextToText.from_pretrained(model_of())
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(model_of()).save_pretrained(folder)
    return folder


def distilled(teacher: Path, **more: Any) -> dict[str, Any]:
    return {"name": "distill", "teacher": str(teacher), "student": {"name": "full"}, "baseline": False, **more}


def logits_of(folder: Path, batch: dict[str, Any]) -> torch.Tensor:
    from transformers import AutoModelForImageTextToText

    logits: torch.Tensor = AutoModelForImageTextToText.from_pretrained(folder)(**batch).logits[:, :-1]
    return logits


@pytest.mark.slow
def test_a_student_is_given_the_outputs_of_its_teacher_for_images(
    tmp_path: Path, model_of: Any, teacher: Path, chats: Path
) -> None:
    """From the cache as in each batch; the divergence is that of all logits of both models."""
    from hfstrat import strategies
    from hfstrat.data.image_text_batches import ImageTextCollator

    losses = []
    for form in ("off", "hidden"):
        (tmp_path / form).mkdir()
        given = distilled(teacher, teacher_cache={"form": form})
        loaded = recipe(tmp_path / form, model_of(), chats, given, "training.logging_steps=1")
        found = run(loaded)["result"]
        assert found["metrics_after"]["teacher_kl"] < found["metrics_before"]["teacher_kl"]
        losses.append([entry["loss"] for entry in found["losses"]] + [found["metrics_after"]["teacher_kl"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    processor, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    rows = [data.eval[place] for place in range(len(data.eval))]
    batch = ImageTextCollator(processor, 1, False)(rows)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        ours, theirs = (logits_of(path, batch).log_softmax(-1) for path in (folder_of(loaded) / "final", teacher))
    apart = (theirs.exp() * (theirs - ours)).sum(-1)[labels >= 0]
    assert float(apart.mean()) == pytest.approx(losses[1][-1], rel=1e-3)


@pytest.mark.slow
def test_a_teacher_with_other_images_is_refused(tmp_path: Path, model_of: Any, teacher: Path, chats: Path) -> None:
    for file in teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"strategy\.teacher: .* has another processor of images \(image_mean"):
        run(recipe(tmp_path, model_of(), chats, distilled(tmp_path)))
    with pytest.raises(UserError, match=r"image\.precompute: true: the teacher"):
        run(recipe(tmp_path, model_of(), chats, distilled(teacher), "image.precompute=true"))
    with pytest.raises(UserError, match=r"strategy\.teacher"):
        run(recipe(tmp_path, model_of(), chats, distilled(model_of("idefics3"))))


@pytest.mark.slow
def test_merge_generate_evaluate_and_predict(
    tmp_path: Path, model_of: Any, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfstrat import load
    from hfstrat.cli import inference
    from hfstrat.publish.merge import merge
    from hfstrat.tasks.generation import How

    loaded = recipe(tmp_path, model_of("idefics3"), chats, {"name": "lora", "r": 2})
    run(loaded)
    target, image = str(folder_of(loaded)), str(tmp_path / picture(tmp_path, "x.png", "red"))
    how = How(max_new_tokens=3)
    inference.generate(target, ["what"], None, tmp_path / "out.jsonl", how, images=[image])
    one = json.loads((tmp_path / "out.jsonl").read_text())
    assert one["prompt"] == "[x.png] what"
    (merged,) = load(target).generate({"prompt": "what", "images": [image]}, max_new_tokens=3)
    assert merged == one["completion"]
    merge(target, tmp_path / "merged")
    assert "KL(adapter || merged)" in capsys.readouterr().out
    inference.generate(str(tmp_path / "merged"), ["what"], None, tmp_path / "more.jsonl", how, images=[image])
    assert json.loads((tmp_path / "more.jsonl").read_text())["completion"] == one["completion"]
    assert load_file(next((tmp_path / "merged").glob("*.safetensors")))
    with pytest.raises(UserError, match="use `hfstrat generate`"):
        inference.predict(target, ["what"], None, None)
    with pytest.raises(UserError, match="no such file"):
        inference.generate(target, ["what"], None, None, how, images=["gone.png"])
    with pytest.raises(UserError, match="--plain"):
        inference.generate(target, ["what"], None, None, replace(how, plain=True))
