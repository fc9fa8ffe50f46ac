"""The measurements as lines of at most 80 columns: value, interval and difference of each metric."""

from __future__ import annotations

from typing import Any

from hfstrat.objectives.preference.objective import DIVERGENCE
from hfstrat.recipe.format import difference, metric, percent, plural, without_negative

WIDTH = 80
FIRST, COLUMN = 17, 18
MAX_LABELS, MAX_MATRIX = 40, 9  # labels up to which each gets a line, and the confusion matrix is shown
CONTROL = "control text: general text outside of the training data, a check for forgetting"
LEGEND = "± half of a 95% interval over examples; ~ the difference may be due to chance"


def lines(measured: dict[str, Any], first: str = "before", second: str = "after") -> list[str]:
    """One block for each set of examples; `first` and `second` are the names of the two models."""
    blocks = [line for name, one in measured.items() for line in block(name, one, first, second)]
    explained = [CONTROL] if "control text" in measured else []
    return [*blocks, *forgetting(measured), *longer(measured), *explained, LEGEND] if blocks else []


def forgetting(measured: dict[str, Any]) -> list[str]:
    """The gain on the evaluation examples next to the loss on the control text; empty if one of them was not measured."""
    changes = [measured.get(name, {}).get("difference", {}) for name in ("evaluation rows", "control text")]
    own_name = "reward" if "reward" in changes[0] else "loss"
    gain, cost = changes[0].get(own_name), changes[1].get("loss")
    if gain is None or cost is None:
        return []
    verdict = "no forgetting: the loss on the control text fell"
    if cost["low"] is None or cost["high"] is None:
        verdict = "no interval (fewer than 10 examples, or the scores before training are gone), so forgetting is not judged"
    elif cost["low"] > 0:
        verdict = "forgetting: the loss on the control text rose"
    elif cost["high"] >= 0:
        verdict = "no forgetting measured: the change on the control text is within its interval"
    own, other = (with_interval("loss", entry, signed=True) for entry in (gain, cost))
    further = "" if own_name == "loss" else "loss "
    return [f"gain and cost: {own_name} {own}; {further}on the control text {other}:", f"{'':<15}{verdict}"]


def longer(measured: dict[str, Any]) -> list[str]:
    """What training on preferences did to the length of answers; empty where it was not measured before and after."""
    if "rewards/margins" not in measured.get("evaluation rows", {}).get("after", {}):
        return []
    change = measured.get("answers", {}).get("difference", {}).get("answer_tokens")
    if change is None or change["low"] is None:
        return []
    size = with_interval("answer_tokens", change, signed=True)
    if change["low"] <= 0 <= change["high"]:
        return [f"answers: their length did not change measurably ({size} tokens)"]
    how = "longer: rewards may count length, so compare answers of equal length" if change["value"] > 0 else "shorter"
    return [f"answers: {size} tokens, they became {how}"]


COLUMNS = (  # of the table, by what the details of a task have
    {"precision": "precision", "recall": "recall", "f1": "F1"},
    {"ap50": "AP50", "ap": "AP", "recall50": "recall"},
)


def label_table(details: dict[str, Any]) -> list[str]:
    """Precision, recall and F1 of each label, and the confusion matrix, if there are few labels; of boxes AP and recall."""
    labels = details.get("labels", [])
    if not labels or len(labels) > MAX_LABELS:
        return []
    columns = next(columns for columns in COLUMNS if columns.keys() <= labels[0].keys())
    table = [f"  {'label':<24}{''.join(f'{head:>11}' for head in columns.values())}{'examples':>10}"]
    for label in labels:
        cells = "".join(f"{percent(label[name]):>11}" for name in columns)
        table.append(f"  {shorten(label['label'], 23):<24}{cells}{label['support']:>10,}")
    counts = details.get("confusion", {}).get("counts", [])
    if 0 < len(counts) <= MAX_MATRIX:
        table.append(f"  {'true / predicted':<18}" + "".join(f"{shorten(label['label'], 6):>7}" for label in labels))
        for label, line in zip(labels, counts, strict=True):
            table.append(f"  {shorten(label['label'], 17):<18}" + "".join(f"{count:>7,}" for count in line))
    return table


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def block(name: str, one: dict[str, Any], first: str, second: str) -> list[str]:
    """The metrics of one set of examples."""
    size = plural(one["rows"], "example") + (f", {one['tokens']:,.0f} tokens" if "tokens" in one else "")
    first_width = max(FIRST, *(len(metric_name) + 3 for metric_name in one["after"]))
    head = f"{'':<{first_width}}{shorten_name(first):>{COLUMN}}{shorten_name(second):>{COLUMN}}{'difference':>{COLUMN}}"
    title = f"{name.replace('evaluation rows', 'evaluation examples')} ({size})"
    lines = [_line(metric_name, one, first_width) for metric_name in without_negative(one["after"])]
    if name == DIVERGENCE:
        title += ": KL(reference || model) in nats, on answers that the reference sampled"
    return [title, *([head] if "before" in one else []), *lines]


def _line(name: str, one: dict[str, Any], first_width: int) -> str:
    after = one["after"][name]
    if "before" not in one or name not in one["before"]:
        return f"  {name:<{first_width - 2}}{with_interval(name, after):>{COLUMN}}".rstrip()
    before, change = one["before"][name], one["difference"][name]
    cells = [metric(name, before["value"]), with_interval(name, after), with_interval(name, change, signed=True)]
    low, high = change["low"], change["high"]
    chance = " ~" if low is not None and high is not None and low <= 0 <= high else ""
    return f"  {name:<{first_width - 2}}" + "".join(f"{cell:>{COLUMN}}" for cell in cells) + chance


def with_interval(name: str, entry: dict[str, Any], signed: bool = False) -> str:
    """A value (a difference, if `signed`) and half of the width of its interval."""
    show, low, high = difference if signed else metric, entry["low"], entry["high"]
    text = show(name, entry["value"])
    return text if low is None or high is None else f"{text} ±{show(name, (high - low) / 2).lstrip('+')}"


def shorten_name(name: str) -> str:
    """The end of a model's name, which fits a column."""
    return name if len(name) < COLUMN else "…" + name[-(COLUMN - 2) :]
