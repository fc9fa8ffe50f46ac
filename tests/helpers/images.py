"""Tiny image classifiers and images of three colors, created for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

SIZE = 32
CLASSES = ("blue", "green", "red")
FAMILIES = ("vit", "dinov2", "swin", "convnext", "resnet")


def picture(label: int, number: int, size: tuple[int, int] = (24, 20)) -> Any:
    """A noisy image whose dominant channel is its class."""
    from PIL import Image

    source = np.random.default_rng((label, number))
    pixels = source.integers(0, 140, (size[1], size[0], 3))
    pixels[:, :, 2 - label] += 90
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folder_of_classes(root: Path, count: int = 12, start: int = 0) -> Path:
    """A folder for each class with `count` images."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            picture(label, number).save(root / name / f"{number:03}.png")
    return root


def config_of(family: str, **more: Any) -> Any:
    import transformers as tf

    kinds: dict[str, Any] = {
        "vit": lambda: tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=SIZE,
            patch_size=8,
            **more,
        ),
        "dinov2": lambda: tf.Dinov2Config(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=SIZE, patch_size=8, **more
        ),
        "swin": lambda: tf.SwinConfig(
            embed_dim=12,
            depths=[1, 1],
            num_heads=[2, 2],
            image_size=SIZE,
            patch_size=4,
            window_size=4,
            drop_path_rate=0.0,
            **more,
        ),
        "convnext": lambda: tf.ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=SIZE, **more),
        "resnet": lambda: tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **more),
    }
    return kinds[family]()


def make_image_model(folder: Path, family: str = "vit", classes: int = 0, seed: int = 0) -> Path:
    """A random model with its image processor: its body, or with `classes` a trained-looking classifier."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    names = dict(enumerate(CLASSES[:classes])) if classes else {}
    more: dict[str, Any] = {"id2label": names, "label2id": {name: id for id, name in names.items()}} if classes else {}
    auto = tf.AutoModelForImageClassification if classes else tf.AutoModel
    auto.from_config(config_of(family, **more)).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    return folder


def processor_of(family: str) -> Any:
    import transformers as tf

    square = {"height": SIZE, "width": SIZE}
    if family in ("vit", "swin"):
        return tf.ViTImageProcessorPil(size=square)
    if family == "dinov2":
        return tf.BitImageProcessorPil(size={"shortest_edge": SIZE + 4}, crop_size=square)
    return tf.ConvNextImageProcessorPil(size={"shortest_edge": SIZE})


def image_recipe(folder: Path, model: Path | None, train: Path, **more: Any) -> Path:
    """A recipe of four steps; `more` are sections, which are merged with it."""
    return four_steps("image-classification", 1e-2, folder, model, train, more)


def four_steps(task: str, rate: float, folder: Path, model: Path | None, train: Path, more: dict[str, Any]) -> Path:
    """A recipe of a task on files with classes; `more` are sections, which are merged with it."""
    recipe: dict[str, Any] = {
        "task": task,
        "strategy": "full",
        "data": {"train": str(train), "eval_size": 9},
        "training": {
            "max_steps": 4,
            "global_batch_size": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": rate,
            "eval_steps": 2,
            "logging_steps": 1,
        },
        "evaluation": {"samples": 2},
        "output_dir": str(folder / "run"),
    }
    if model is not None:
        recipe["model"] = str(model)
    for key, value in more.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and isinstance(recipe.get(key), dict) else value
    file = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    return file
