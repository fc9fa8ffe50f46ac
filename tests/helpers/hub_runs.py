"""A finished run as `hfstrat train` writes it, built by hand: pushing needs no model and no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ACCOUNT = {
    "source": "data/mine/train.jsonl",
    "format": "prompt-completion",
    "template": "chat",
    "rows_read": 60,
    "rows_kept": 60,
    "tokens": 900,
    "supervised": 400,
    "tokens_lost": 0,
    "sha256": "13bb97131dd3ba0b0794893990dc181233de8ccaf89fb5bbba99f0095ddd6a3c",
    "sources": [],
}
METRICS = {"loss": 3.5, "perplexity": 33.1, "token_accuracy": 0.41, "tokens": 1453.0}


def recipe_of(**sections: Any) -> dict[str, Any]:
    """A complete resolved recipe with some sections replaced."""
    from hfstrat.recipe.schema import Recipe

    given = {
        "model": "/opt/models/Tiny-Base",
        "strategy": {"name": "lora", "r": 4},
        "data": {"train": "data/mine/train.jsonl", "max_length": 128},
        "training": {"learning_rate": 1e-3, "max_steps": 4},
        "output_dir": "runs/first",
    }
    return Recipe.model_validate(given | sections).model_dump()


def report_of(recipe: dict[str, Any]) -> dict[str, Any]:
    rows = {"prompt": "a row of the evaluation data", "before": "x", "after": "y", "reference": "its answer"}
    result = {
        "metrics_before": METRICS,
        "metrics_after": METRICS | {"loss": 2.5, "perplexity": 12.2, "token_accuracy": 0.52},
        "steps": 4,
        "best_step": 4,
        "resumed_from": None,
        "train_seconds": 12.0,
        "total_seconds": 14.0,
        "tokens": 900,
        "tokens_per_second": 75.0,
        "peak_memory_bytes": 2**30,
        "trainable_parameters": 1000,
        "total_parameters": 50_000,
        "plan": {"epochs": 0.53},
        "verified": {"bit_equal": True, "max_difference": 0.0, "loaded_with": "PeftModelForCausalLM"},
        "answers": [rows],
        "artefact": "/home/somebody/runs/first/final",
        "status": "done",
    }
    environment = {
        "python": "3.11.7",
        "processor": "a processor",
        "threads": 2,
        "gpus": [],
        "libraries": {"hfstrat": "0.1.0"},
        "model_sha256": "fe" * 32 if recipe["model"]["name_or_path"].startswith("/") else "01" * 20,
        "data_sha256": {str(recipe["data"]["train"]): "45" * 32},
    }
    data = {"train": ACCOUNT, "eval": ACCOUNT | {"rows_kept": 12}, "overlap": {"train_duplicate_examples": ["a row"]}}
    run = {"recipe": recipe, "source": "/home/somebody/recipe.yaml", "origins": {"seed": "/home/somebody/recipe.yaml:3"}}
    return {"run": run | {"data": data}, "result": result, "environment": environment}


def finished_run(folder: Path, weights: int = 2, **sections: Any) -> Path:
    """`folder` with report.json, a checkpoint, and final/ with an adapter in `weights` files of weights."""
    from safetensors.numpy import save_file

    recipe = recipe_of(**sections)
    final = folder / "final"
    final.mkdir(parents=True)
    save_file({"a": np.arange(3000, dtype="float32")}, final / "adapter_model.safetensors", metadata={"format": "pt"})
    for number in range(1, weights):
        save_file({"a": np.full(2000, number, "float32")}, final / f"more-{number}.safetensors")
    files: dict[str, Any] = {
        "adapter_config.json": {
            "base_model_name_or_path": "/opt/models/Tiny-Base",
            "peft_type": "LORA",
            "r": 4,
            "revision": None,
        },
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "is_local": True, "name_or_path": "/opt/models/Tiny-Base"},
        "tokenizer.json": {"model": {"vocab": {"/usr/bin/": 1}}},
        "generation_config.json": {"max_new_tokens": 5},
    }
    for name, content in files.items():
        (final / name).write_text(json.dumps(content))
    (final / "chat_template.jinja").write_text("{{ messages }}")
    (final / "optimizer.pt").write_bytes(b"not to go up")
    (final / "training_args.bin").write_bytes(b"not to go up")
    (final / "rows.jsonl").write_text('{"prompt": "a row of the data"}\n')
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"not to go up")
    (folder / "report.json").write_text(json.dumps(report_of(recipe)))
    return folder
