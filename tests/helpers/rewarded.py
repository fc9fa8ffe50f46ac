"""Small prompts with rewards, and runs on them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from helpers.preferences import WORDS, recipe_for

STEPS, PROMPTS, ANSWERS = 4, 2, 4
LETTERS = "def letters(completions, **columns):\n    return [float(text.count('a')) for text in texts(completions)]\n"
TEXTS = "def texts(completions):\n    return [each if isinstance(each, str) else each[0]['content'] for each in completions]\n"
MINE = LETTERS + TEXTS


def prompts(count: int) -> list[dict[str, Any]]:
    """Conversations of one turn with an answer to compare with; no two are equal."""
    source, found = random.Random(0), dict[str, dict[str, Any]]()
    while len(found) < count:
        text = " ".join(source.choices(WORDS, k=source.randint(3, 9)))
        found[text] = {"prompt": [{"role": "user", "content": text}], "answer": text.split()[0]}
    return list(found.values())


def recipe(folder: Path, model: Path, rewards: Any = None, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    """A short run in float32 that rewards the letter a, so that answers of random weights differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    given = {"name": "grpo", "rewards": rewards or [f"{folder}/mine.py:letters"], "num_generations": ANSWERS}
    objective = given | {"max_completion_length": 12} | sections.pop("objective", {})
    training = {"max_steps": STEPS, "global_batch_size": PROMPTS, "per_device_train_batch_size": 1, "eval_steps": STEPS}
    sections["training"] = training | sections.pop("training", {})
    return recipe_for(folder, model, rows or prompts(24), objective, **sections)
