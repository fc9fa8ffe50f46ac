"""The card's metadata: what the Hub reads of it, with the measured results as a model-index."""

from __future__ import annotations

import re
from typing import Any

from hfstrat import lineage
from hfstrat.usage import Artefact

METRICS = {  # of a report: what it is called, the Hub's name for its kind, how it is written, whether less is better
    "loss": ("loss (nats a {unit})", "loss", "{:.4f}", True),
    "perplexity": ("perplexity", "perplexity", "{:.2f}", True),
    "bits_per_byte": ("bits per byte", "bits_per_byte", "{:.3f}", True),
    "token_accuracy": ("token accuracy", "accuracy", "{:.1%}", False),
    "accuracy": ("accuracy", "accuracy", "{:.1%}", False),
    "macro_f1": ("macro-F1", "f1", "{:.1%}", False),
    "micro_f1": ("micro-F1", "f1", "{:.1%}", False),
    "teacher_kl": ("KL from the teacher (nats a token)", "kl_divergence", "{:.4f}", True),
}


def metadata(report: dict[str, Any], public: dict[str, Any], artefact: Artefact, title: str) -> Any:
    """The card's metadata with its model-index, as huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCardData

    recipe, base = report["run"]["recipe"], artefact.base
    strategy = recipe["strategy"]["name"]
    sets = [each["source"] for each in accounts(report, "train") if lineage.is_hub_data(each["source"])]
    licence = base.licence if base else None
    more = {"base_model_relation": "adapter" if artefact.is_adapter else "finetune"} if base and base.hub else {}
    return ModelCardData(
        base_model=base.hub or None if base else None,
        datasets=list(dict.fromkeys(sets)) or None,
        eval_results=_eval_results(public, artefact),
        library_name=artefact.library,
        license=licence if licence and re.fullmatch(r"[a-z0-9.+-]+", licence) else None,
        model_name=title,
        pipeline_tag=artefact.task.pipeline,
        tags=["hfstrat", strategy],
        **more,
    )


def _eval_results(public: dict[str, Any], artefact: Artefact) -> list[Any]:
    from huggingface_hub import EvalResult

    after, (name, origin) = public["result"].get("metrics_after") or {}, evaluated(public)
    hub = lineage.is_hub_data(origin)
    return [
        EvalResult(
            task_type=artefact.task.pipeline,
            dataset_type=origin if hub else "local",
            dataset_name=name,
            metric_type=METRICS[key][1],
            metric_name=METRICS[key][0].format(unit=artefact.task.unit),
            metric_value=round(float(value), 5),
        )
        for key, value in after.items()
        if key in METRICS
    ]


def evaluated(public: dict[str, Any]) -> tuple[str, str]:
    """The evaluation data in words, and their source."""
    recipe, account = public["run"]["recipe"], (public["run"].get("data") or {}).get("eval") or {}
    source = str(account.get("source") or "the training data")
    own = recipe["data"].get("eval") or recipe["data"].get("eval_split")
    words, kept = source if own else f"rows held out from {source}", account.get("rows_kept") or 0
    used = min(kept, recipe["evaluation"].get("max_rows") or kept)
    said = f"{used:,} of {kept:,} rows" if used < kept else f"{kept:,} rows"
    return (f"{words}, {said}" if kept else words), source


def accounts(report: dict[str, Any], part: str) -> list[dict[str, Any]]:
    account = report["run"].get("data", {}).get(part) or {}
    return account.get("sources") or ([account] if account else [])
