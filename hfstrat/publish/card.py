"""Markdown that comes out as it is meant, whatever stands in the texts.

The card's tables of what was measured beside the loss, with intervals.

The card's metadata: what the Hub reads of it, with the measured results as a model-index.

The model card, from the report: what a stranger has to know to trust and to load a result."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from hfstrat.publish import provenance
from hfstrat.publish.scrub import Scrubber, published_report
from hfstrat.publish.snippets import Artifact, snippet
from hfstrat.tasks.report import Report


def table(head: list[str], rows: list[list[str]], numbers: Container[int] = ()) -> str:
    """A Markdown table; `numbers` are the columns that stand to the right."""
    line = ["---:" if column in numbers else "---" for column in range(len(head))]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, line, *cells))


def code(text: Any) -> str:
    return f"`{str(text).replace('`', chr(39))}`" if str(text) else ""


def quoted(text: str) -> str:
    """A text of a model as a block that no Markdown in it can leave."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"\n{fence}text\n{text.strip()}\n{fence}"


SHARES = ("acc", "f1", "match", "share", "rouge", "chrf", "json", "regex")  # in the names of metrics that are shares


def measured(sets: dict[str, Any]) -> list[str]:
    """A table for each set of rows: value with half its 95 % interval, before, after and the difference."""
    blocks: list[str] = []
    for name, one in sets.items():
        before, change = one.get("before") or {}, one.get("difference") or {}
        rows = [
            [metric, _said(metric, before.get(metric)), f"**{_said(metric, entry)}**", _said(metric, change.get(metric), "+")]
            for metric, entry in one["after"].items()
        ]
        blocks.append(f"**{name[:1].upper()}{name[1:]}** ({one['rows']:,} rows)")
        blocks.append(table(["", "before", "after", "difference"], rows, range(1, 4)))
    return [*blocks, "± is half of a 95 % interval over rows."] if blocks else []


def _said(metric: str, entry: dict[str, float | None] | None, sign: str = "") -> str:
    if entry is None or entry["value"] is None:
        return "-"
    value, low, high = entry["value"], entry.get("low"), entry.get("high")
    style = ".1%" if any(word in metric for word in SHARES) else ".4f"
    text = f"{value:{sign}{style}}"
    return text if low is None or high is None else f"{text} ± {(high - low) / 2:{style}}"


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


def metadata(report: dict[str, Any], public: dict[str, Any], artifact: Artifact, title: str) -> Any:
    """The card's metadata with its model-index, as huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCardData

    recipe, base = report["run"]["recipe"], artifact.base
    strategy = recipe["strategy"]["name"]
    sets = [each["source"] for each in accounts(report, "train") if provenance.is_hub_data(each["source"])]
    licence = base.licence if base else None
    more = {"base_model_relation": "adapter" if artifact.is_adapter else "finetune"} if base and base.hub else {}
    return ModelCardData(
        base_model=base.hub or None if base else None,
        datasets=list(dict.fromkeys(sets)) or None,
        eval_results=_eval_results(public, artifact),
        library_name=artifact.library,
        license=licence if licence and re.fullmatch(r"[a-z0-9.+-]+", licence) else None,
        model_name=title,
        pipeline_tag=artifact.task.text.pipeline,
        tags=["hfstrat", strategy],
        **more,
    )


def _eval_results(public: dict[str, Any], artifact: Artifact) -> list[Any]:
    from huggingface_hub import EvalResult

    after, (name, origin) = public["result"].get("metrics_after") or {}, evaluated(public)
    hub = provenance.is_hub_data(origin)
    return [
        EvalResult(
            task_type=artifact.task.text.pipeline,
            dataset_type=origin if hub else "local",
            dataset_name=name,
            metric_type=METRICS[key][1],
            metric_name=METRICS[key][0].format(unit=artifact.task.text.unit),
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


LABELS = 30  # that a table by label has, at most


HIDDEN = ("name", "student", "teacher")  # of a strategy's section: said in words


def make(report: Report, final: Path, repo: str) -> str:
    """The whole card (README.md) of the result in `final`, as `repo` (a Hub id, or "" where there is none yet)."""
    scrubber = Scrubber(report.run.recipe.model_dump())
    public, full = published_report(report, scrubber), report.model_dump(mode="json")
    artifact = Artifact(final, report, repo or "path/to/this/folder")
    title = (repo or public["run"]["recipe"]["output_dir"]).split("/")[-1]
    blocks = [
        f"# {title}",
        *_opening(public, artifact),
        "## Use",
        *_use(artifact),
        "## Results",
        *_results(public, artifact),
        "## Data",
        *_data(public, full),
        "## Training",
        *_training(public),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(public, artifact)),
        _closing(public),
    ]
    head = "---\n" + metadata(full, public, artifact, title).to_yaml() + "\n---\n\n"
    return head + scrubber.text("\n\n".join(block for block in blocks if block)) + "\n"


def _opening(public: dict[str, Any], artifact: Artifact) -> list[str]:
    recipe, result, base = public["run"]["recipe"], public["result"], artifact.base
    strategy = recipe["strategy"]["name"]
    kind = {"peft": "An adapter", "sentence-transformers": "A classifier on pooled hidden states"}.get(
        artifact.library, "A model"
    )
    origin = f" of {_base_words(base)}" if base and artifact.is_adapter else (f", from {_base_words(base)}" if base else "")
    learnt, total = result["trainable_parameters"], result["total_parameters"]
    lines = [
        f"{kind}{origin}, trained by the strategy `{strategy}` for {artifact.task.name} with hfstrat. "
        f"{learnt:,} of {total:,} parameters learnt ({learnt / total:.2%})."
    ]
    if base and not base.hub:
        known = f" Its weights have the sha256 `{base.sha256}` (over all weight files)." if base.sha256 else ""
        lines.append(f"> The base is a local model called `{base.name}`, which is not named by a Hub id.{known}")
    teacher = recipe["strategy"].get("teacher")
    if isinstance(teacher, dict) and teacher.get("name_or_path"):
        lines.append(f"It learnt from the teacher `{teacher['name_or_path']}`.")
    return lines


def _base_words(base: provenance.Base) -> str:
    if not base.hub:
        return f"the local model `{base.name}`"
    at = f" at revision `{base.revision[:12]}`" if base.revision else ""
    return f"[{base.hub}](https://huggingface.co/{base.hub}){at}"


def _use(artifact: Artifact) -> list[str]:
    lines = [f"```python\n{snippet(artifact)}\n```"]
    if artifact.is_adapter and artifact.own_base:
        lines.append("The adapter says nothing sensible on any other weights than those it was trained on.")
    return lines


def _results(public: dict[str, Any], artifact: Artifact) -> list[str]:
    result = public["result"]
    before, after = result.get("metrics_before") or {}, result.get("metrics_after") or {}
    rows = []
    for key, (name, _, style, less) in METRICS.items():
        if key in after:
            mark = " ↓" if less else ""
            earlier = style.format(before[key]) if key in before else "-"
            rows.append([name.format(unit=artifact.task.text.unit) + mark, earlier, f"**{style.format(after[key])}**"])
    lines = [table(["", "before training", "after"], rows, (1, 2)), _how_measured(public, artifact)]
    lines += measured(result.get("measured") or {})
    labels = result.get("evaluation", {}).get("labels") or []
    if labels:
        cells = [
            [code(row["label"]), f"{row['precision']:.1%}", f"{row['recall']:.1%}", f"{row['f1']:.1%}", f"{row['support']:,}"]
            for row in labels[:LABELS]
        ]
        lines.append(table(["label", "precision", "recall", "F1", "rows"], cells, range(1, 5)))
        if len(labels) > LABELS:
            lines.append(f"The first {LABELS} of {len(labels)} labels; the others stand in `report.json`.")
    for answer in result.get("answers", []):
        lines.append(
            f"**Prompt.** {quoted(answer['prompt'])}\n\n**Before.** {quoted(answer['before'])}\n\n"
            f"**After.** {quoted(answer['after'])}"
        )
    return lines


def _how_measured(public: dict[str, Any], artifact: Artifact) -> str:
    result, training = public["result"], public["run"]["recipe"]["training"]
    after, (name, _) = result.get("metrics_after") or {}, evaluated(public)
    count = after.get("tokens") or after.get("rows")
    items = f" ({count:,.0f} {artifact.task.text.unit}s that count)" if count else ""
    text = f"Measured by hfstrat on {name}{items}, the same rows before and after, without sampling. "
    text += "↓: less is better."
    if training.get("load_best_model_at_end") and result.get("best_step"):
        text += " These rows also chose the best checkpoint, so the figures are slightly hopeful."
    return text


def _data(public: dict[str, Any], report: dict[str, Any]) -> list[str]:
    rows = []
    for part, role in (("train", "training"), ("eval", "evaluation")):
        for said, real in zip(accounts(public, part), accounts(report, part), strict=True):
            rows.append(
                [
                    code(said["source"]),
                    role,
                    f"{said.get('rows_kept', 0):,}",
                    f"{said.get('tokens', 0):,}",
                    provenance.data_licence(real["source"]) or "not known",
                    code(str(said.get("sha256", ""))[:16]),
                ]
            )
    kept = table(["source", "for", "rows", "tokens", "licence", "sha256 of the ids"], rows, (2, 3))
    files = public.get("environment", {}).get("data_sha256") or {}
    lines = [kept]
    if files:
        lines.append("Files: " + "; ".join(f"`{name}` sha256 `{digest[:16]}`" for name, digest in files.items()) + ".")
    return [*lines, "The rows themselves are not in this repository."]


def _training(public: dict[str, Any]) -> list[str]:
    recipe, result = public["run"]["recipe"], public["result"]
    environment, plan = public.get("environment", {}), result.get("plan", {})
    strategy = _flat({key: value for key, value in recipe["strategy"].items() if key not in HIDDEN})
    account = public["run"].get("data", {}).get("train") or {}
    settings = {
        "strategy": code(recipe["strategy"]["name"]) + (f" ({', '.join(strategy)})" if strategy else ""),
        "learning rate": f"{recipe['training']['learning_rate']:g}, {recipe['training']['lr_scheduler_type']}"
        if recipe["training"].get("learning_rate")
        else "",
        "optimiser": recipe["training"].get("optim", ""),
        "length": f"{result.get('steps', 0):,} steps of {recipe['training']['global_batch_size']} sequences"
        + (f", {plan['epochs']:.2f} epochs" if plan.get("epochs") else ""),
        "tokens": f"{result.get('tokens', 0):,} ({result.get('tokens_per_second', 0):,.0f} a second)"
        if result.get("tokens")
        else "",
        "longest row": f"{recipe['data'].get('max_length', 0):,} tokens",
        "loss on": account.get("train_on", ""),
        "seed": str(recipe.get("seed", "")),
        "hardware": ", ".join(environment.get("gpus") or [])
        or f"{environment.get('processor', 'CPU')}, {environment.get('threads', '?')} threads",
        "time": f"{result.get('train_seconds', 0):,.0f} s of training, {result.get('total_seconds', 0):,.0f} s in all",
        "peak memory": f"{result.get('peak_memory_bytes', 0) / 2**30:.2f} GiB",
    }
    rows = [[name, value] for name, value in settings.items() if value]
    versions = ", ".join(f"{name} {version}" for name, version in (environment.get("libraries") or {}).items())
    return [
        table(["setting", "value"], rows),
        f"Python {environment.get('python', '?')}; {versions}." if versions else "",
        "`recipe.yaml` holds every setting and `report.json` everything that was measured, without the folders of the machine "
        "that it ran on.",
    ]


def _flat(section: dict[str, Any], under: str = "") -> list[str]:
    """The settings of a section that say something, as `key value`."""
    found: list[str] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _flat(value, f"{under}{key}.")
        elif value not in (None, [], {}, False, ""):
            found.append(f"{under}{key} {value if not isinstance(value, list) else '/'.join(map(str, value))}")
    return found


def _limits(public: dict[str, Any], artifact: Artifact) -> list[str]:
    result, data = public["result"], public["run"].get("data", {})
    recipe, base = public["run"]["recipe"], artifact.base
    lines = []
    if base:
        lines.append(
            "What its base cannot do or does wrong is not repaired by this training, and its licence holds for this too."
        )
    if not recipe["data"].get("eval"):
        lines.append(
            "The evaluation rows come from the same source as the training rows: how it does elsewhere was not measured."
        )
    elif "control text" not in result.get("measured", {}):
        lines.append("Only the rows named above were measured, not what it may have forgotten.")
    again = (data.get("overlap") or {}).get("eval_rows_in_train", 0)
    if again:
        lines.append(f"{again:,} evaluation rows stand in the training data too.")
    epochs = result.get("plan", {}).get("epochs")
    if epochs and epochs < 1:
        lines.append(f"It saw {epochs:.0%} of its training rows.")
    lost = (data.get("train") or {}).get("tokens_lost", 0)
    if lost:
        lines.append(f"{lost:,} tokens of training rows that were too long were cut off.")
    count = (data.get("eval") or {}).get("rows_kept", 0)
    if 0 < min(count, recipe["evaluation"].get("max_rows") or count) < 500:
        lines.append("There were fewer than 500 evaluation rows: small differences are noise.")
    lines.append("No safety evaluation was made.")
    return lines


def _closing(public: dict[str, Any]) -> str:
    check = public["result"].get("verified")
    if not check:
        return ""
    same = "bit for bit" if check["bit_equal"] else f"within {check['max_difference']:.2g}"
    return (
        f"After training, the saved files were loaded by `{check['loaded_with']}` in a fresh process: the same logits {same}. "
        "This card was made from the report of the run."
    )
