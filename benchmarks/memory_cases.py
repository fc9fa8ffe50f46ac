"""The runs that memory predictions are fitted on, and the other runs that check them: see memory_prediction.py."""

from __future__ import annotations

from typing import Any

UNNAMED = ("name", "teacher", "config", "tokenizer", "teacher_cache", "baseline", "model_type")
SMOL, STORIES, MINILM = "SmolLM2-135M", "stories260K", "MiniLM"


def _case(
    model: str, task: str, strategy: Any, length: int, micro: int, passes: int = 1, recompute: bool = False
) -> dict[str, Any]:
    """Describe one run: examples of `length` tokens, micro-batches of `micro`, `passes` micro-batches per optimizer step."""
    section = {"name": strategy} if isinstance(strategy, str) else strategy
    name = f"{model} {task} {section['name']} {micro}x{length}x{passes}{' recomputed' if recompute else ''}"
    extra = [f"{k}={v}" for k, v in section.items() if k not in UNNAMED]
    return {
        "name": " ".join([name, *extra]).replace("text-classification", "classes").replace("causal-lm", "lm"),
        "model": model,
        "task": task,
        "strategy": section,
        "length": length,
        "micro": micro,
        "passes": passes,
        "recompute": recompute,
    }


LM, CLASSES = "causal-lm", "text-classification"
HALF = {"name": "distill", "student": "full", "baseline": False, "teacher_cache": {"form": "hidden"}}
RANDOM = {"name": "scratch", "model_type": "llama", "parameters": "8M", "tokenizer": {"vocab_size": 1024}}
SMALL = {**RANDOM, "parameters": "3M"}

FITTED_ON = [
    _case(SMOL, LM, "lora", 256, 1),
    _case(SMOL, LM, "full", 96, 2, 2, True),
    _case(SMOL, LM, {"name": "partial", "last_n_layers": 6}, 192, 2),
    _case(SMOL, LM, {"name": "head", "untie": True}, 128, 2),
    _case(SMOL, CLASSES, {"name": "partial", "last_n_layers": 4}, 96, 2, 2),
    _case(STORIES, LM, "full", 512, 16),
    _case(STORIES, LM, "lora", 256, 32, 2, True),
    _case(STORIES, LM, {**HALF, "shrink": {"layers": 3}}, 256, 16),
    _case(MINILM, CLASSES, "full", 96, 16),
    _case(MINILM, CLASSES, "lora", 160, 8, 2),
    _case(MINILM, CLASSES, "full", 256, 16, 1, True),
    _case(MINILM, CLASSES, "head", 96, 8),
    _case(SMOL, LM, SMALL, 256, 4, 2),
    _case(SMOL, LM, "full", 128, 2),
    _case(SMOL, LM, "full", 256, 1, 2),
    _case(SMOL, LM, "full", 384, 1, 1, True),
    _case(SMOL, LM, "lora", 128, 4, 2),
    _case(SMOL, LM, {"name": "lora", "r": 64}, 384, 1, 1, True),
    _case(SMOL, LM, {"name": "partial", "last_n_layers": 12}, 128, 2, 2),
    _case(SMOL, LM, {"name": "head", "untie": True}, 256, 1, 2),
    _case(SMOL, LM, {**HALF, "shrink": {"layers": 15}}, 128, 1, 2),
    _case(SMOL, CLASSES, "full", 64, 4),
    _case(SMOL, CLASSES, "lora", 128, 4, 1, True),
    _case(SMOL, CLASSES, "head", 96, 4),
    _case(STORIES, LM, "full", 256, 64, 1),
    _case(STORIES, LM, "lora", 384, 32),
    _case(STORIES, LM, {"name": "partial", "last_n_layers": 2}, 512, 32, 2),
    _case(STORIES, LM, {**HALF, "student": "lora"}, 512, 16),
    _case(STORIES, CLASSES, "full", 256, 64, 1, True),
    _case(MINILM, CLASSES, "full", 192, 16, 2),
    _case(MINILM, CLASSES, "lora", 96, 32),
    _case(MINILM, CLASSES, {"name": "partial", "last_n_layers": 3}, 128, 32, 2),
    _case(MINILM, CLASSES, "head", 256, 16),
    _case(SMOL, LM, RANDOM, 256, 8, 1),
    _case(SMOL, LM, RANDOM, 512, 4, 2, True),
    _case(SMOL, LM, "full", 96, 3),
    _case(SMOL, LM, "lora", 256, 2),
    _case(SMOL, LM, {"name": "lora", "r": 32}, 192, 2, 2, True),
    _case(SMOL, LM, {"name": "partial", "last_n_layers": 3}, 96, 4),
    _case(SMOL, LM, {"name": "head", "untie": True}, 384, 1),
    _case(SMOL, LM, {**HALF, "shrink": {"layers": 10}}, 96, 2),
    _case(SMOL, CLASSES, "full", 160, 2, 2, True),
    _case(SMOL, CLASSES, "lora", 64, 6),
    _case(SMOL, CLASSES, {"name": "partial", "last_n_layers": 8}, 48, 8),
    _case(SMOL, CLASSES, "head", 64, 8),
    _case(STORIES, LM, "full", 320, 48, 1, True),
    _case(STORIES, LM, "lora", 512, 24),
    _case(STORIES, LM, {"name": "partial", "last_n_layers": 3}, 256, 48),
    _case(STORIES, LM, {**HALF, "shrink": {"layers": 2}}, 384, 32),
    _case(STORIES, CLASSES, "lora", 192, 32),
    _case(MINILM, CLASSES, "full", 128, 24),
    _case(MINILM, CLASSES, "lora", 224, 16, 1, True),
    _case(MINILM, CLASSES, {"name": "partial", "last_n_layers": 2}, 256, 16),
    _case(MINILM, CLASSES, "head", 128, 32),
    _case(SMOL, LM, {**RANDOM, "parameters": "5M"}, 384, 6),
    _case(SMOL, LM, {**RANDOM, "parameters": "12M"}, 512, 2, 2, True),
    # steps of many micro-batches, as a run has them by default: batches of many widths
    _case(SMOL, LM, "lora", 128, 2, 4),
    _case(SMOL, LM, "full", 160, 1, 8),
    _case(SMOL, LM, {"name": "partial", "last_n_layers": 5}, 192, 2, 4),
    _case(SMOL, LM, {"name": "lora", "r": 8}, 320, 1, 4, True),
    _case(SMOL, LM, {**HALF, "shrink": {"layers": 12}}, 128, 1, 8),
    _case(SMOL, CLASSES, "lora", 80, 4, 4),
    _case(SMOL, CLASSES, {"name": "partial", "last_n_layers": 6}, 112, 2, 4),
    _case(SMOL, CLASSES, "head", 160, 4, 4),
    _case(STORIES, LM, "full", 512, 1, 16),
    _case(STORIES, LM, "lora", 512, 1, 16),
    _case(STORIES, LM, {"name": "partial", "last_n_layers": 2}, 384, 2, 8),
    _case(STORIES, LM, {**HALF, "shrink": {"layers": 3}}, 448, 1, 16),
    _case(STORIES, LM, "full", 256, 4, 4, True),
    _case(STORIES, CLASSES, "lora", 320, 2, 8),
    _case(MINILM, CLASSES, "full", 128, 4, 4),
    _case(MINILM, CLASSES, "lora", 192, 2, 8),
    _case(MINILM, CLASSES, {"name": "partial", "last_n_layers": 3}, 160, 4, 4),
    _case(MINILM, CLASSES, "full", 256, 2, 8, True),
    _case(MINILM, CLASSES, "head", 192, 4, 4),
    _case(SMOL, LM, {**RANDOM, "parameters": "6M"}, 256, 2, 8),
    _case(SMOL, LM, {**RANDOM, "parameters": "4M"}, 512, 1, 16, True),
]

CHECKED_WITH = [
    _case(SMOL, LM, "lora", 96, 4, 2),
    _case(SMOL, LM, "full", 192, 2, 2),
    _case(SMOL, LM, {"name": "partial", "last_n_layers": 10}, 128, 1, 8),
    _case(SMOL, LM, {**HALF, "shrink": {"layers": 8}}, 160, 1, 4),
    _case(SMOL, CLASSES, "lora", 112, 2, 4, True),
    _case(SMOL, CLASSES, "head", 96, 8, 2),
    _case(STORIES, LM, "full", 384, 1, 16),
    _case(STORIES, LM, "lora", 256, 2, 8),
    _case(STORIES, LM, {"name": "partial", "last_n_layers": 3}, 512, 1, 16),
    _case(STORIES, LM, {**HALF, "shrink": {"layers": 2}}, 320, 4, 4),
    _case(STORIES, LM, "lora", 512, 2, 8, True),
    _case(STORIES, CLASSES, "full", 192, 4, 4),
    _case(MINILM, CLASSES, "lora", 160, 4, 4),
    _case(MINILM, CLASSES, "full", 192, 1, 16),
    _case(MINILM, CLASSES, {"name": "partial", "last_n_layers": 1}, 224, 2, 8),
    _case(MINILM, CLASSES, "head", 256, 8, 2),
    _case(MINILM, CLASSES, "full", 128, 8, 2, True),
    _case(SMOL, LM, {**RANDOM, "parameters": "10M"}, 192, 4, 4),
    _case(SMOL, LM, {**RANDOM, "parameters": "3M"}, 384, 2, 8),
]
