"""A short run of each kind, whose page is looked at: each task, objective and strategy with sections of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import make_model, write_pairs

from helpers import classifiers, images, preferences, rewarded
from helpers.runs import run
from hfstrat.recipe.load import load_recipe

LONGER = ["training.max_steps=12", "training.eval_steps=3"]


def sft(folder: Path) -> list[str]:
    file = folder / "recipe.yaml"
    rows = write_pairs(folder, 80)
    file.write_text(
        f"model: {make_model(folder / 'model')}\nstrategy: {{name: lora, r: 4}}\n"
        f"data: {{train: {rows}, eval_size: 24, max_length: 128}}\n"
        "training: {max_steps: 12, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
        "  eval_steps: 3, logging_steps: 1}\n"
        f"evaluation: {{samples: 2, max_new_tokens: 12}}\noutput_dir: {folder / 'run'}\n"
    )
    return [str(file)]


def classes(folder: Path) -> list[str]:
    model = classifiers.make_encoder(folder / "model", "bert")
    return [str(classifiers.write_recipe(folder, model, classifiers.labeled(folder, 120))), *LONGER]


def head(folder: Path) -> list[str]:
    return [*classes(folder)[:1], "strategy=head", "training.max_steps=1"]


def numbers(folder: Path) -> list[str]:
    model = classifiers.make_encoder(folder / "model", "bert")
    return [str(classifiers.write_recipe(folder, model, classifiers.measured(folder), "regression")), *LONGER]


def pictures(folder: Path) -> list[str]:
    model, data = images.make_image_model(folder / "model"), images.folder_of_classes(folder / "data")
    return [str(images.image_recipe(folder, model, data)), *LONGER]


def dpo(folder: Path) -> list[str]:
    model = make_model(folder / "model")
    file = preferences.recipe_for(folder, model, preferences.pairs(60), {"name": "dpo"}, training={"eval_steps": 2})
    return [str(file)]


def kto(folder: Path) -> list[str]:
    model = make_model(folder / "model")
    file = preferences.recipe_for(folder, model, preferences.labeled(60), {"name": "kto"}, training={"eval_steps": 2})
    return [str(file)]


def grpo(folder: Path) -> list[str]:
    return [str(rewarded.recipe(folder, make_model(folder / "model")))]


def distill(folder: Path) -> list[str]:
    teacher = make_model(folder / "teacher")
    given = f"{{name: distill, teacher: {teacher}, student: full}}"
    return [*sft(folder), f"strategy={given}", "training.max_steps=6"]


KINDS: dict[str, Callable[[Path], list[str]]] = {
    each.__name__: each for each in (sft, classes, head, numbers, pictures, dpo, kto, grpo, distill)
}


def make(kind: str, folder: Path) -> Path:
    """Train; returns the folder of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    loaded = load_recipe(*_split(KINDS[kind](folder)))
    run(loaded)
    return Path(loaded.recipe.output_dir)


def _split(words: list[str]) -> tuple[str, list[str]]:
    return words[0], words[1:]
