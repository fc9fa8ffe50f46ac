"""Small data of preferences, and runs on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "hat", "red", "blue", "one", "two", "three"]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations whose chosen answer repeats words of the prompt, in TRL's form; no two prompts are equal."""
    source, found, seen = random.Random(seed), [], set[str]()
    while len(found) < count:
        words = source.choices(WORDS, k=source.randint(3, 9))
        if (text := " ".join(words)) in seen:
            continue
        seen.add(text)
        others = source.choices(WORDS, k=source.randint(1, 12))
        found.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "chosen": [{"role": "assistant", "content": " ".join(words[: source.randint(1, len(words))])}],
                "rejected": [{"role": "assistant", "content": " ".join([*others, "not"])}],
            }
        )
    return found


def labeled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Single answers with labels, in TRL's form."""
    source, found = random.Random(seed), []
    for row in pairs(count, seed):
        label = source.random() < 0.6
        found.append({"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label})
    return found


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe_for(folder: Path, model: Path, rows: list[dict[str, Any]], objective: Any, **sections: Any) -> Path:
    """A recipe of a short run in float32 on these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_rows(folder / "rows.jsonl", rows)
    training = {"max_steps": 6, "learning_rate": 1e-3, "global_batch_size": 4, "logging_steps": 1, "warmup_steps": 0}
    training |= {"lr_scheduler_type": "constant", "train_sampling_strategy": "random", "load_best_model_at_end": False}
    given = {
        "model": {"name_or_path": str(model), "dtype": "float32"} | sections.pop("form", {}),
        "strategy": sections.pop("strategy", "full"),
        "objective": objective,
        "data": {"train": str(data), "max_length": 64} | sections.pop("data", {}),
        "training": training | sections.pop("training", {}),
        "evaluation": {"samples": 1, "max_new_tokens": 4, "control": "off"} | sections.pop("evaluation", {}),
        "output_dir": str(folder / "out"),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(given | sections), encoding="utf-8")
    return file
