"""Tiny detectors and images with colored boxes, created for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

SIDE = 32
CLASSES = ("blue", "green", "red")
FAMILIES = (
    *("yolos", "detr", "conditional_detr", "deformable_detr", "dab-detr"),
    *("rt_detr", "rt_detr_v2", "d_fine", "lw_detr", "rf_detr"),
)
FEW: dict[str, Any] = {"num_queries": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
HEADS: dict[str, Any] = {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def scene(number: int, size: tuple[int, int] = (40, 30)) -> tuple[Any, list[list[int]], list[int]]:
    """An image with up to three bright rectangles: left, top, width and height of each, and their classes."""
    from PIL import Image

    source = np.random.default_rng(number)
    pixels = source.integers(0, 60, (size[1], size[0], 3))
    boxes, labels = [], []
    for _ in range(int(source.integers(1, 4)) if number % 7 else 0):
        label = int(source.integers(0, 3))
        wide, high = (int(each) for each in source.integers(8, 14, 2))
        left, top = int(source.integers(0, size[0] - wide)), int(source.integers(0, size[1] - high))
        pixels[top : top + high, left : left + wide, 2 - label] = 230
        boxes.append([left, top, wide, high])
        labels.append(label)
    return Image.fromarray(pixels.astype(np.uint8)), boxes, labels


def folder_of_boxes(root: Path, count: int = 16, start: int = 0) -> Path:
    """A folder with images and metadata.jsonl, as `imagefolder` reads it."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(start, start + count):
        image, boxes, labels = scene(number)
        image.save(root / f"{number:03}.png")
        objects = {"bbox": boxes, "categories": [CLASSES[label] for label in labels]}
        lines.append(json.dumps({"file_name": f"{number:03}.png", "objects": objects}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def resnet() -> dict[str, Any]:
    import transformers as tf

    stages: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
    return tf.ResNetConfig(**stages, layer_type="basic", out_features=["stage2", "stage3", "stage4"]).to_dict()


def config_of(family: str, **more: Any) -> Any:
    """The config of a tiny detector."""
    import transformers as tf

    one = {**resnet(), "out_features": ["stage4"], "out_indices": [4]}
    two = {**resnet(), "out_features": ["stage2", "stage3"], "out_indices": [2, 3]}
    rt = {
        "num_queries": 8,
        "d_model": 16,
        "encoder_hidden_dim": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "decoder_layers": 2,
        "hidden_expansion": 0.5,
        "num_denoising": 0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
    }
    rt_resnet = tf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[2, 3, 4]
    )
    kinds: dict[str, Any] = {
        "yolos": lambda: tf.YolosConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=[SIDE, SIDE],
            patch_size=8,
            num_detection_tokens=8,
            **more,
        ),
        "detr": lambda: tf.DetrConfig(backbone_config=one, use_timm_backbone=False, **FEW, **HEADS, **more),
        "conditional_detr": lambda: tf.ConditionalDetrConfig(
            backbone_config=one, use_timm_backbone=False, **FEW, **HEADS, **more
        ),
        "dab-detr": lambda: tf.DabDetrConfig(
            backbone_config=one,
            use_timm_backbone=False,
            num_queries=8,
            hidden_size=16,
            dropout=0.0,
            **{"encoder_layers": 1, "decoder_layers": 2, **HEADS, **more},
        ),
        "deformable_detr": lambda: tf.DeformableDetrConfig(
            **{"backbone_config": two, "use_timm_backbone": False, "num_feature_levels": 2, **FEW, **HEADS, "d_model": 32},
            **more,
        ),
        "rt_detr": lambda: tf.RTDetrConfig(
            backbone_config=rt_resnet, encoder_in_channels=[8, 12, 16], decoder_in_channels=[16, 16, 16], **{**rt, **more}
        ),
        "rt_detr_v2": lambda: tf.RTDetrV2Config(
            backbone_config=rt_resnet, encoder_in_channels=[8, 12, 16], decoder_in_channels=[16, 16, 16], **{**rt, **more}
        ),
        "d_fine": lambda: tf.DFineConfig(
            backbone_config=rt_resnet, encoder_in_channels=[8, 12, 16], decoder_in_channels=[16, 16, 16], **{**rt, **more}
        ),
        "rf_detr": lambda: tf.RfDetrConfig(
            backbone_config={
                "model_type": "rf_detr_dinov2",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "mlp_ratio": 2,
                "image_size": SIDE,
                "patch_size": 8,
                "out_features": ["stage1", "stage2"],
                "num_windows": 1,
            },
            **grouped(),
            **more,
        ),
        "lw_detr": lambda: tf.LwDetrConfig(
            backbone_config={
                "model_type": "lw_detr_vit",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "pretrain_image_size": SIDE,
                "patch_size": 8,
                "out_indices": [0, 1],
                "window_block_indices": [0],
                "num_windows": 4,
            },
            projector_scale_factors=[1.0],
            **grouped(),
            **more,
        ),
    }
    return kinds[family]()


def grouped() -> dict[str, Any]:
    return {
        "num_queries": 8,
        "group_detr": 2,
        "decoder_layers": 2,
        "d_model": 16,
        "decoder_ffn_dim": 16,
        "dropout": 0.0,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
    }


def processor_of(family: str) -> Any:
    import transformers as tf

    square = {"height": SIDE, "width": SIDE}
    if family in ("rt_detr", "rt_detr_v2", "d_fine"):
        return tf.RTDetrImageProcessorPil(size=square)
    if family in ("deformable_detr", "lw_detr", "rf_detr"):
        return tf.DeformableDetrImageProcessorPil(size=square)
    kinds = {"yolos": tf.YolosImageProcessorPil, "conditional_detr": tf.ConditionalDetrImageProcessorPil}
    if family == "dab-detr":
        return tf.ConditionalDetrImageProcessorPil(size=square)
    return kinds.get(family, tf.DetrImageProcessorPil)(size=square)


def make_detector(folder: Path, family: str = "yolos", classes: tuple[str, ...] = CLASSES, seed: int = 0, **more: Any) -> Path:
    """A random detector with its image processor."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: index for index, name in enumerate(classes)}}
    tf.AutoModelForObjectDetection.from_config(config_of(family, **names, **more)).save_pretrained(folder)
    processor_of(family).save_pretrained(folder)
    return folder


def box_recipe(folder: Path, model: Path | None, train: Path | str, **more: Any) -> Path:
    """A recipe of four steps; `more` are sections, which are merged with it."""
    recipe: dict[str, Any] = {
        "task": "object-detection",
        "strategy": "full",
        "data": {"train": str(train), "eval_size": 4},
        "training": {
            "max_steps": 4,
            "global_batch_size": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "eval_steps": 4,
            "logging_steps": 1,
        },
        "evaluation": {"samples": 1},
        "output_dir": str(folder / "run"),
    }
    if model is not None:
        recipe["model"] = str(model)
    for key, value in more.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and isinstance(recipe.get(key), dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
