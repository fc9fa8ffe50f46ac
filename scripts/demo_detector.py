"""Save a detector with the backbone of an image model: RF-DETR around a model of the shape of DINOv2, its decoder random.

No package on PyPI ships a pretrained detector. RF-DETR (arXiv 2511.09554) has DINOv2 as its backbone, so that the weights of
`scripts/demo_image_model.py` fit into it. The classes are set when it is trained.

    python scripts/demo_detector.py BACKBONE_DIR OUTPUT_DIR [--layers 8] [--queries 40] [--width 128] [--seed 0] [--random]

--random leaves the backbone's weights random: the same model from scratch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PATCH = 14  # pixels
GROUPS = 3  # of queries in training


def config_of(source: Any, layers: int, queries: int, width: int) -> Any:
    """The config of RF-DETR around the first layers of a DINOv2 model."""
    import transformers

    backbone = {
        "model_type": "rf_detr_dinov2",
        "hidden_size": source.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": source.num_attention_heads,
        "mlp_ratio": source.mlp_ratio,
        "image_size": source.image_size,
        "patch_size": source.patch_size,
        "out_features": [f"stage{layers // 2}", f"stage{layers}"],
        "num_windows": 1,
    }
    return transformers.RfDetrConfig(
        backbone_config=backbone,
        num_queries=queries,
        group_detr=GROUPS,
        decoder_layers=2,
        d_model=width,
        decoder_ffn_dim=4 * width,
        decoder_self_attention_heads=8,
        decoder_cross_attention_heads=8,
        dropout=0.0,
        id2label={0: "object"},
        label2id={"object": 0},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true")
    given = parser.parse_args()

    import torch
    import transformers

    torch.manual_seed(given.seed)
    source = transformers.Dinov2Model.from_pretrained(given.backbone)
    model = transformers.RfDetrForObjectDetection(config_of(source.config, given.layers, given.queries, given.width))
    if not given.random:
        loaded = model.model.backbone.backbone.load_state_dict(source.state_dict(), strict=False)
        beyond = tuple(f"encoder.layer.{layer}." for layer in range(given.layers, source.config.num_hidden_layers))
        assert not loaded.missing_keys, loaded.missing_keys
        assert all(name.startswith(beyond) for name in loaded.unexpected_keys), loaded.unexpected_keys
    model.save_pretrained(given.output)
    processor = transformers.DeformableDetrImageProcessorPil(size={"height": 16 * PATCH, "width": 16 * PATCH})
    processor.save_pretrained(given.output)
    print(f"{given.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
