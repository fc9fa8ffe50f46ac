"""Reports with every part that a page shows, built by hand: no model and no torch."""

from __future__ import annotations

from typing import Any

from helpers.hub_runs import report_of
from hfstrat.evaluation.intervals import CONTROL, ROWS
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks.report import Report, parse

LABELS = ("cat", "dog", "fish")
OF_CLASSES = ("classes", "head", "pictures", "sounds")
KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"objective": "dpo"},
    "kto": {"objective": "kto"},
    "grpo": {"objective": {"name": "grpo", "rewards": ["json_valid", "exact_match"]}},
    "distill": {"strategy": {"name": "distill", "teacher": "/opt/models/Teacher", "student": "full"}},
    "classes": {"task": "text-classification", "strategy": "full"},
    "head": {"task": "text-classification", "strategy": "head"},
    "partial": {"strategy": "partial"},
    "peft": {"strategy": {"name": "peft", "peft_type": "IA3"}},
    "boxes": {"task": "object-detection", "strategy": "full"},
    "numbers": {"task": "regression", "strategy": "full"},
    "pictures": {"task": "image-classification", "strategy": "full"},
    "sounds": {"task": "audio-classification", "strategy": "full"},
    "questions": {"task": "image-text-to-text", "strategy": "full"},
}


def estimate(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metrics_of(kind: str) -> dict[str, tuple[float, float]]:
    """Metrics before and after training."""
    rewards = {f"rewards/{name}": (0.0, value) for name, value in (("margins", 0.4321), ("chosen", 0.3), ("rejected", -0.1321))}
    preferences = {
        "rewards/accuracies": (0.5, 0.7342),
        **rewards,
        "logps/chosen": (-40.5, -44.25),
        "logps/rejected": (-41.0, -60.5),
    }
    classes = {"accuracy": (0.3312, 0.8123), "macro_f1": (0.2201, 0.7911)}
    ranked = classes | {"balanced_accuracy": (0.3, 0.8), "auroc": (0.51, 0.9312), "average_precision": (0.4, 0.8876)}
    parts = {"rewards/json_valid/mean": (0.1, 0.5), "rewards/exact_match/mean": (0.0, 0.125)}
    return {"loss": (3.5123, 2.4987)} | {
        "dpo": preferences,
        "kto": preferences,
        "grpo": {
            "reward": (0.1, 0.625),
            **parts,
            "completions/mean_length": (30.5, 20.25),
            "completions/clipped_ratio": (0.5, 0.25),
        },
        "classes": classes,
        "head": classes,
        "pictures": ranked,
        "sounds": ranked | {"eer": (0.5, 0.0931)},
        "boxes": {"map": (0.01, 0.4321)},
        "numbers": {"mae": (2.5432, 1.2345), "rmse": (3.1, 1.5678), "pearson": (0.01, 0.8765), "spearman": (0.0, 0.8432)},
    }.get(kind, {"perplexity": (33.5, 12.25), "token_accuracy": (0.41, 0.52)})


def details_of(kind: str) -> dict[str, Any]:
    if kind == "numbers":
        target = {"target": "score", "mae": 1.2345, "rmse": 1.5678, "pearson": 0.8765, "spearman": 0.8432}
        points = [[float(n), n + 0.5 * (-1) ** n] for n in range(20)]
        return {"targets": [target | {"points": points}], "baseline": {"mae": 2.4321, "rmse": 2.9876}}
    if kind not in OF_CLASSES:
        return {}
    labels = [
        {"label": name, "precision": 0.8 - n / 10, "recall": 0.7, "f1": 0.75 - n / 5, "support": 20 + n}
        for n, name in enumerate(LABELS)
    ]
    confusions = [{"true": "cat", "predicted": "dog", "count": 4}]
    return {"labels": labels, "confusion": {"counts": [[15, 4, 1], [2, 18, 1], [0, 3, 19]]}, "confusions": confusions}


def parts_of(kind: str) -> dict[str, Any]:
    """The parts of a result that only some runs have."""
    if kind in (*OF_CLASSES, "numbers"):
        one = {"row": 17, "place": 1, "text": "a text that is wrong", "expected": "cat", "predicted": "dog", "score": 0.0312}
        worse = {"name": "TF-IDF", "metric": "mae" if kind == "numbers" else "accuracy", "value": estimate(0.7)}
        better = worse | {"name": "most frequent label", "value": estimate(0.34), "difference": estimate(0.4723, 0.1)}
        found: dict[str, Any] = {"mistakes": [one, one | {"row": 18, "place": 2}]}
        found["simple_models"] = [better, worse | {"difference": estimate(0.1123, 0.2), "train_rows": 60, "seconds": 1.5}]
        if kind == "head":
            candidates = [{"layer": n, "pooling": "mean", "score": 0.5 + n / 10} for n in (1, 2, 3)]
            found["head"] = {"layer": 3, "pooling": "mean", "solved_exactly": True, "l2": 0.01, "candidates": candidates}
        return found
    if kind == "grpo":
        log = {"reward_std": 0.1, "frac_reward_zero_std": 0.9, "completions/mean_length": 20.0, "kl": 0.01}
        more = {"rewards/json_valid/mean": 0.5, "rewards/exact_match/mean": 0.1, "completions/clipped_ratio": 0.5}
        return {"rewards": [{"step": n, "reward": 0.1 * n, **log, **more} for n in range(1, 7)]}
    if kind == "distill":
        sides = {name: {"loss": 2.0 + n, "token_accuracy": 0.5} for n, name in enumerate(("teacher", "student", "before"))}
        sides["teacher"] |= {"parameters": 5e8, "bytes": 1e9, "tokens_per_second": 50.0}
        cache = {"form": "top-k", "bytes": 1000, "seconds": 2.0, "mass": 0.97, "built": []}
        return {
            "comparison": {**sides, "without_teacher": {"loss": 2.5, "token_accuracy": 0.4, "steps": 4}},
            "distillation": {"teacher": {"loss": 2.0, "parameters": 5}, "cache": cache},
        }
    if kind == "partial":
        return {"precomputed": {"blocks": [2, 4], "bytes": 1000, "seconds": 3.0, "built": ["train"]}}
    return {
        "baselines": {
            "uniform": 5.7,
            "unigram": 4.2,
            "parameters": 1000,
            "unique_tokens": 900,
            "epoch_tokens": 900,
            "epochs": 2,
        }
    }


def stored(kind: str = "sft") -> dict[str, Any]:
    """The content of a report.json with all that a run of this kind can have."""
    recipe = Recipe.model_validate(
        {
            "model": "/opt/models/Tiny-Base",
            "strategy": {"name": "lora", "r": 4},
            "data": {"train": "/home/somebody/mine/train.jsonl", "max_length": 128},
            "training": {"learning_rate": 1e-3, "max_steps": 4},
            "output_dir": "/home/somebody/runs/first",
            **KINDS[kind],
        }
    )
    found, metrics = report_of(recipe.model_dump()), metrics_of(kind)
    result, run = found["result"], found["run"]
    sides = {"before": 0, "after": 1}
    own: dict[str, Any] = {when: {name: estimate(both[n]) for name, both in metrics.items()} for when, n in sides.items()}
    own["difference"] = {name: estimate(after - before) for name, (before, after) in metrics.items()}
    result |= {
        "metrics_before": {name: before for name, (before, _) in metrics.items()},
        "metrics_after": {name: after for name, (_, after) in metrics.items()},
        "evaluation": details_of(kind),
        "measured": {ROWS: {"rows": 60, "tokens": 640.0, **own}},
        "interval": "95%: a bootstrap",
        "curve": [
            {"step": n, "seconds": 2.5 * n, "tokens": 90 * n, "eval_loss": 3.5 - n / 4}
            | {f"eval_{name}": before + (after - before) * n / 4 for name, (before, after) in metrics.items()}
            for n in range(5)
        ],
        "losses": [
            {"step": n, "loss": 3.6 - n / 5, "learning_rate": 1e-3 * (1 - n / 10), "grad_norm": 1.5 / n} for n in range(1, 5)
        ],
        "speeds": [{"step": n, "tokens_per_second": 70.0 + n} for n in range(1, 5)],
        "overfitting": [{"step": 3, "eval_loss": 2.9, "train_loss": 2.2}],
        "predicted": {
            "seconds": 10.0,
            "seconds_band": [7.0, 15.0],
            "memory_bytes": 2.0**30,
            "memory_band": [2.0**29, 2.0**31],
            "source": "shapes",
        },
        "quantization": {"name": "nf4", "parameters": 5, "quantized_parameters": 4, "share": 0.8, "weight_bytes": 9},
        **parts_of(kind),
    }
    if kind in ("sft", "distill", "partial"):
        result["measured"][CONTROL] = {"rows": 38, **own}
    question, left_out = {"text": "a question"}, {"text": "3 more tokens without loss", "omitted": True}
    spans = [question, left_out, {"text": "its answer", "supervised": True}]
    shown = {"title": "Example 1", "tokens": 25, "supervised": 4, "text": spans, "note": "a note"}
    has_labels = kind in (*OF_CLASSES, "numbers")
    run["data"] |= {
        "shown": [{"title": "Example 1", "text": spans[:1], "target": "label cat"} if has_labels else shown],
        "lengths": {"train": {"least": 3, "median": 9.0, "p95": 30.0, "most": 40, "counts": [5, 9, 2]}},
        "labels": {"training_rows": dict.fromkeys(LABELS, 20)} if has_labels else None,
    }
    return found


def report(kind: str = "sft") -> Report:
    return parse(stored(kind) | {"schema_version": 1})
