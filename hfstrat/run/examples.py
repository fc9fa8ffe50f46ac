"""What the report keeps of the data so that a page can show it: the first examples with their masks, lengths, pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hfstrat.data.render import IGNORED
from hfstrat.data.shown import SHOWN_TOKENS, elided
from hfstrat.errors import first_line
from hfstrat.tasks.base import Pictures, Task

if TYPE_CHECKING:
    from hfstrat.run.setup import Job
    from hfstrat.tasks.report import Result

ROWS = 3  # training examples that are kept
INTERVALS = 24  # of lengths
FILE = "pictures.json"
Found = TypeVar("Found")


def statistics(job: Job) -> dict[str, Any]:
    """The statistics of the data of a run, for the report."""
    found, task = job.data.report(), job.task
    found["shown"] = _or_nothing(job, "examples", lambda: shown(task, job.data, ROWS)) or []
    if task.model.reads_tokens:
        parts = {"train": job.data.lengths, "eval": job.data.eval_lengths}
        found["lengths"] = _or_nothing(job, "lengths", lambda: {name: lengths(each) for name, each in parts.items()})
    return found


def lengths(tokens: np.ndarray) -> dict[str, Any]:
    """Quantiles and a histogram of lengths."""
    least, most = int(tokens.min()), int(tokens.max())
    counts = np.histogram(tokens, bins=min(INTERVALS, most - least + 1), range=(least, max(most, least + 1)))[0]
    median, high = np.quantile(tokens, [0.5, 0.95]).tolist()
    return {"least": least, "median": median, "p95": high, "most": most, "counts": counts.tolist()}


def shown(task: Task, data: Any, count: int) -> list[dict[str, Any]]:
    """The first training examples as the model sees them."""
    found: list[dict[str, Any]] = []
    for index in range(min(count, len(data.train))):
        row, title = data.train[index], f"Example {index + 1}"
        if data.label_names:
            target = task.text.target(row["label"], data.label_names)
            text = [{"text": task.rows.as_text(row, data.renderer.tokenizer, SHOWN_TOKENS)}]
            tokens = {"tokens": int(row["length"])} if task.model.reads_tokens else {}
            found.append({"title": title, **tokens, "text": text, "target": target})
            continue
        note = task.rows.note(row)
        for name, part in task.rows.parts(row):
            about = {"title": f"{title}, {name}" if name else title, "note": note}
            seen = task.rows.shown(part, data.renderer.tokenizer)
            found.append(about | spans(data.renderer.tokenizer, seen, is_prompt=bool(task.rows.answered_at_once)))
    return found


def spans(tokenizer: Any, row: dict[str, Any], is_prompt: bool) -> dict[str, Any]:
    """The text of a sequence in spans with and without loss; a prompt that the model answers has none."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    text = [
        {"text": words, "omitted": True} if words else {"text": tokenizer.decode(some), "supervised": is_supervised}
        for some, is_supervised, words in elided(ids, labels)
    ]
    counted = {} if is_prompt else {"supervised": sum(label != IGNORED for label in labels)}
    return {"tokens": int(row.get("length", len(ids))), **counted, "text": text}


def pictures(job: Job, result: Result) -> Pictures:
    """Small pictures of the examples that the report names, where text does not show them."""
    rows, data = job.task.rows, job.data
    mistakes = (data.eval[one.place] for one in result.mistakes or [])
    sheet = _uri(rows.sheet, data)
    examples = [] if sheet or data.label_names else [data.train[place] for place in range(min(ROWS, len(data.train)))]
    several = [row if part == 0 else None for row in examples for part in range(len(rows.parts(row)))]  # as in `shown`
    beside = _uris(lambda row: b"" if row is None else rows.picture(row), several)
    return Pictures(sheet, _uris(rows.picture, job.prompts), _uris(rows.picture, mistakes), beside)


def _uris(draw: Callable[[Any], bytes], examples: Iterable[Any]) -> tuple[str, ...]:
    found = tuple(_uri(draw, each) for each in examples)
    return found if any(found) else ()


def _uri(draw: Callable[[Any], bytes], given: Any) -> str:
    """A picture as a data URI; "" where there is none, or its file is gone."""
    try:
        drawn = draw(given)
    except Exception:  # a picture is decoration: an unreadable file or another library's mistake ends no run
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(drawn).decode()}" if drawn else ""


def keep_safely(job: Job, result: Result) -> None:
    """Keep the pictures of a run beside its report, which is complete without them."""
    _or_nothing(job, "pictures", lambda: keep_pictures(pictures(job, result), job.folder))


def _or_nothing(job: Job, name: str, get: Callable[[], Found]) -> Found | None:
    """What only a page shows: a full disk, an unreadable file or a mistake of this code is a warning after training."""
    try:
        return get()
    except Exception as error:
        job.screen.print(f"{'warning':<16} no {name} in the report: {type(error).__name__}: {first_line(error)}", markup=False)
        return None


def keep_pictures(found: Pictures, folder: Path) -> None:
    """Write the pictures beside the report, so that its page can be made again; nothing where there are none."""
    file = folder / FILE
    file.unlink(missing_ok=True)
    if any(found):
        file.write_text(json.dumps(found._asdict()), encoding="utf-8")


def kept_pictures(folder: Path) -> Pictures:
    """What `keep_pictures` wrote; none where it is missing or broken."""
    try:
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        found = Pictures(stored["sheet"], *(tuple(stored.get(name, ())) for name in Pictures._fields[1:]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Pictures()
    each = (found.sheet, *(one for several in found[1:] for one in several))
    safe = all(isinstance(one, str) and one[:23] in ("", "data:image/jpeg;base64,") for one in each)
    return found if safe else Pictures()
