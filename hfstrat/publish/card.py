"""The model card: metadata with a model-index for the Hub, and the text of `card.md.jinja` filled in from the report."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.objectives import task_of
from hfstrat.publish.scrub import Base, Scrubber, is_hub_data, license_of, published_report
from hfstrat.publish.snippets import Artifact, snippet
from hfstrat.recipe import format
from hfstrat.tasks.report import Report, Result, Run, parse
from hfstrat.tasks.report_parts import Estimate, Measured, Statistics

TEMPLATE = Path(__file__).with_name("card.md.jinja")
LABEL_COLUMNS = 5  # without the thresholds
LABELS = 30  # rows of the table of labels, at most
FEW = 500  # evaluation examples below which small differences are noise
CHOSEN = {"layer", "pooling", "solver", "l2"}  # of a head
SHOWN_ELSEWHERE = {"name", "student", "teacher"}  # keys of a strategy's section
KINDS = {"peft": "An adapter", "sentence-transformers": "A classifier on pooled hidden states"}


class Metric(NamedTuple):
    """How a metric of the report appears in the card."""

    name: str
    kind: str  # the Hub's name
    lower_is_better: bool


METRICS = {
    "reward": Metric("reward of greedy answers", "reward", False),
    "loss": Metric("loss ({unit})", "loss", True),
    "perplexity": Metric("perplexity", "perplexity", True),
    "bits_per_byte": Metric("bits per byte", "bits_per_byte", True),
    "token_accuracy": Metric("token accuracy", "accuracy", False),
    "accuracy": Metric("accuracy", "accuracy", False),
    "macro_f1": Metric("macro-F1", "f1", False),
    "micro_f1": Metric("micro-F1", "f1", False),
    "balanced_accuracy": Metric("balanced accuracy", "balanced_accuracy", False),
    "auroc": Metric("AUROC, mean over classes", "roc_auc", False),
    "average_precision": Metric("average precision, mean over classes", "average_precision", False),
    "recall_at_90_precision": Metric("recall of the rarest class at a precision of 90%", "recall", False),
    "eer": Metric("equal error rate", "eer", True),
    "map": Metric("mAP, IoU 0.50 to 0.95", "mAP", False),
    "map50": Metric("mAP50", "mAP50", False),
    "map75": Metric("mAP75", "mAP75", False),
    "mae": Metric("MAE", "mae", True),
    "rmse": Metric("RMSE", "rmse", True),
    "pearson": Metric("Pearson correlation", "pearsonr", False),
    "spearman": Metric("Spearman correlation", "spearmanr", False),
    "rewards/accuracies": Metric("reward accuracy", "accuracy", False),
    "rewards/margins": Metric("reward margin", "reward_margin", False),
    "nll_loss": Metric("cross-entropy of chosen answers (nats per token)", "nll_loss", True),
    "teacher_kl": Metric("KL divergence from the teacher (nats per token)", "kl_divergence", True),
}


def make(report: Report, final: Path, repo: str) -> str:
    """The card (README.md) of the result in `final`; `repo` is its Hub id, or "" where it has none yet."""
    from huggingface_hub import ModelCard

    scrubber = Scrubber(report.run.recipe.model_dump())
    public = parse(published_report(report, scrubber))
    artifact = Artifact(final, report, repo or "path/to/this/folder")
    title = (repo or public.run.recipe.output_dir).split("/")[-1]
    card = ModelCard.from_template(
        _metadata(report, public, artifact, title),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=title,
        **_content(report, public, artifact),
    )
    card.text = scrubber.text(card.text)
    return str(card.content).rstrip("\n") + "\n"


def _metadata(report: Report, public: Report, artifact: Artifact, title: str) -> Any:
    """The metadata with the model-index, as huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCardData

    base = artifact.base
    sets = [part.source for part in _sources(report.run, "train") if is_hub_data(part.source)]
    license = base.license if base else None
    objective = report.run.recipe.objective.name
    more = {"base_model_relation": "adapter" if artifact.is_adapter else "finetune"} if base and base.hub else {}
    return ModelCardData(
        base_model=base.hub or None if base else None,
        datasets=list(dict.fromkeys(sets)) or None,
        eval_results=_eval_results(public, artifact),
        library_name=artifact.library,
        license=license if license and re.fullmatch(r"[a-z0-9.+-]+", license) else None,
        model_name=title,
        pipeline_tag=artifact.task.text.pipeline,
        tags=["hfstrat", report.run.recipe.strategy.name, *([objective] if objective != "sft" else [])],
        **more,
    )


def _eval_results(public: Report, artifact: Artifact) -> list[Any]:
    from huggingface_hub import EvalResult

    name, origin = _evaluated(public.run)
    return [
        EvalResult(
            task_type=artifact.task.text.pipeline,
            dataset_type=origin if is_hub_data(origin) else "local",
            dataset_name=name,
            metric_type=METRICS[key].kind,
            metric_name=METRICS[key].name.format(unit=artifact.task.text.loss_unit),
            metric_value=round(value, 5),
        )
        for key, value in public.finished.metrics_after.items()
        if key in shown_metrics(public.finished.metrics_after)
    ]


def _content(report: Report, public: Report, artifact: Artifact) -> dict[str, Any]:
    """The variables of the template."""
    run, result, unit = public.run, public.finished, artifact.task.text.unit
    labels = result.evaluation.labels if result.evaluation else []
    supervised = result.metrics_after.get("tokens") or result.metrics_after.get("rows")
    kept = run.data.eval.rows_kept if run.data and run.data.eval else 0
    return {
        "run": run,
        "result": result,
        "environment": public.environment,
        "artifact": artifact,
        "base": artifact.base,
        "format": format,
        "quoted": quoted,
        "kind": KINDS.get(artifact.library, "A model"),
        "base_name": _base_name(artifact.base) if artifact.base else "",
        "teacher": getattr(getattr(run.recipe.strategy, "teacher", None), "name_or_path", ""),
        "snippet": snippet(artifact),
        "metrics": _metrics(result, artifact.task.text.loss_unit),
        "evaluated": _evaluated(run)[0],
        "supervised": f"{supervised:,.0f} {'supervised tokens' if unit == 'token' else f'{unit}s'}" if supervised else "",
        "chosen_on_them": run.recipe.training.load_best_model_at_end and bool(result.best_step),
        "measured": [_measured(name, one) for name, one in result.measured.items()],
        "labels": _labels(labels[:LABELS]) if labels else "",
        "more_labels": len(labels) if len(labels) > LABELS else 0,
        "sources": _data(report.run, run),
        "settings": _settings(public),
        "examples": min(kept, run.recipe.evaluation.max_rows or kept),
        "few": FEW,
    }


def table(head: list[str], rows: list[list[str]], numbers: Container[int] = ()) -> str:
    """A Markdown table; the columns `numbers` are aligned to the right."""
    line = ["---:" if column in numbers else "---" for column in range(len(head))]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, line, *cells))


def code(text: Any) -> str:
    return f"`{str(text).replace('`', chr(39))}`" if str(text) else ""


def quoted(text: str) -> str:
    """Text of a model as a block that no Markdown in it can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"\n{fence}text\n{text.strip()}\n{fence}"


def _base_name(base: Base) -> str:
    if not base.hub:
        return f"the local model `{base.name}`"
    at = f" at revision `{base.revision[:12]}`" if base.revision else ""
    return f"[{base.hub}](https://huggingface.co/{base.hub}){at}"


def _evaluated(run: Run) -> tuple[str, str]:
    """The evaluation data in words, and their source."""
    part, recipe = run.data and run.data.eval, run.recipe
    source = (part.source if part else "") or "the training data"
    own = recipe.data.eval or recipe.data.eval_split
    words, kept = source if own else f"held-out examples of {source}", part.rows_kept if part else 0
    used = min(kept, recipe.evaluation.max_rows or kept)
    count = f"{used:,} of {kept:,} examples" if used < kept else format.plural(kept, "example")
    return (f"{words}, {count}" if kept else words), source


def _sources(run: Run, part: str) -> list[Statistics]:
    """The statistics of each source of `train` or `eval`."""
    found: Statistics | None = getattr(run.data, part, None)
    return found.sources or [found] if found else []


def _metrics(result: Result, loss_unit: str) -> str:
    rows, before = [], result.metrics_before or {}
    for key, metric in METRICS.items():
        if key in shown_metrics(result.metrics_after):
            name = metric.name.format(unit=loss_unit) + (" ↓" if metric.lower_is_better else "")
            values = format.metric(key, before.get(key)), f"**{format.metric(key, result.metrics_after[key])}**"
            rows.append([name, *values])
    return table(["", "before training", "after"], rows, (1, 2))


def shown_metrics(metrics: dict[str, float]) -> list[str]:
    """The names of the metrics of a card."""
    return format.without_negative(name for name in METRICS if name in metrics)


def _measured(name: str, one: Measured) -> tuple[str, str, str]:
    """Name, number of examples, and a table of each metric before and after training with its interval."""
    before, change = one.before or {}, one.difference or {}
    rows = [
        [
            metric,
            _with_interval(metric, before.get(metric)),
            f"**{_with_interval(metric, entry)}**",
            _with_interval(metric, change.get(metric), is_difference=True),
        ]
        for metric, entry in ((name, one.after[name]) for name in format.without_negative(one.after))
    ]
    text = table(["", "before", "after", "difference"], rows, range(1, 4))
    title = name.replace("rows", "examples")
    return title[:1].upper() + title[1:], format.plural(one.rows, "example"), text


def _with_interval(metric: str, entry: Estimate | None, is_difference: bool = False) -> str:
    text = (format.difference if is_difference else format.metric)(metric, entry.value if entry else None)
    if entry is None or entry.value is None or entry.low is None or entry.high is None:
        return text
    half = (entry.high - entry.low) / 2
    points = is_difference and format.is_share(metric)
    return f"{text} ± {format.difference(metric, half).removeprefix('+') if points else format.metric(metric, half)}"


def _labels(labels: list[Any]) -> str:
    if any(each.ap50 is not None for each in labels):  # boxes
        numbers = [(each.label, (each.ap50, each.ap, each.recall50), each.support) for each in labels]
        rows = [[code(name), *map(format.percent, some), f"{count:,}"] for name, some, count in numbers]
        return table(["label", "AP50", "AP", "recall", "boxes"], rows, range(1, 5))
    cells = [
        [code(each.label), *(format.percent(value) for value in (each.precision, each.recall, each.f1)), f"{each.support:,}"]
        + ([] if each.threshold is None else [f"{each.threshold:.2f}"])
        for each in labels
    ]
    head = ["label", "precision", "recall", "F1", "examples", *(["threshold"] if len(cells[0]) > LABEL_COLUMNS else [])]
    return table(head, cells, range(1, len(head)))


def _data(run: Run, public: Run) -> str:
    """The sources of the data; `run` has their local paths, beside which their licenses are found."""
    rows = []
    for part, role in (("train", "training"), ("eval", "evaluation")):
        for local, shown in zip(_sources(run, part), _sources(public, part), strict=True):
            license = license_of(local.source, "dataset") or "unknown"
            counts = f"{shown.rows_kept:,}", f"{shown.tokens:,}"
            rows.append([code(shown.source), role, *counts, license, code(shown.sha256[:16])])
    return table(["source", "used for", "examples", "tokens", "license", "sha256 of token ids"], rows, (2, 3))


def _settings(public: Report) -> str:
    recipe, result, machine = public.run.recipe, public.finished, public.environment
    training, shown = recipe.training, recipe.strategy.model_dump(exclude=SHOWN_ELSEWHERE)
    chosen = CHOSEN if result.head else set[str]()  # auto: what was chosen is shown instead
    if shown.get("head") == "linear":
        chosen = chosen | {"hidden_size"}  # of an MLP
    strategy = _flat({name: value for name, value in shown.items() if name not in chosen})
    processor = f"{machine.processor or 'CPU'}, {format.plural(machine.threads or 1, 'thread')}"
    head = result.head
    how: dict[str, Any]
    noun = task_of(recipe).rows.noun
    if head is not None and head.solved_exactly and getattr(recipe.strategy, "then", None) is None:
        penalty = f", l2 penalty {head.l2:g}" if head.l2 is not None else ""
        how = {"length": f"solved exactly from the features of the training examples, in one step{penalty}"}
    else:
        plan = result.plan
        epochs = result.steps * (plan.rows_per_step or training.global_batch_size) / plan.rows if plan.rows else 0
        tokens = training.global_batch_tokens
        batch = f"at most {tokens:,} tokens" if tokens else format.plural(training.global_batch_size, noun)
        how = {
            "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}" if training.learning_rate else "",
            "optimizer": training.optim,
            "length": f"{format.plural(result.steps, 'step')} of {batch}" + (f", {epochs:.2f} epochs" if epochs else ""),
        }
    objective = recipe.objective.name
    minimized = [] if objective == "sft" else _flat(recipe.objective.model_dump(exclude={"name"}, exclude_unset=True))
    settings = {
        **({"objective": f"{code(objective)} ({', '.join(minimized)})"} if minimized else {}),
        "strategy": code(recipe.strategy.name) + (f" ({', '.join(strategy)})" if strategy else ""),
        **({"head": f"on layer {head.layer}, pooled by {head.pooling}"} if head else {}),
        **how,
        "tokens": f"{result.tokens:,} ({format.rate(result.tokens_per_second)})" if result.tokens else "",
        "max length": f"{recipe.data.max_length:,} tokens",
        "supervised": public.run.data.train.train_on if public.run.data else "",
        "seed": recipe.seed,
        "hardware": ", ".join(machine.gpus) or processor,
        "time": f"{format.duration(result.train_seconds)} of training, {format.duration(result.total_seconds)} in total",
        "peak memory": format.memory(result.peak_memory_bytes),
    }
    return table(["setting", "value"], [[name, str(value)] for name, value in settings.items() if value != ""])


def _flat(section: dict[str, Any], under: str = "") -> list[str]:
    """The settings of a section that are not empty, as `key value`."""
    found: list[str] = []
    for key, value in section.items():
        if isinstance(value, dict):
            found += _flat(value, f"{under}{key}.")
        elif value not in (None, [], {}, False, ""):
            items = [one["name"] if isinstance(one, dict) else str(one) for one in value] if isinstance(value, list) else []
            found.append(f"{under}{key} {'/'.join(items) if items else value}")
    return found
