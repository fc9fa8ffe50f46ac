"""What the page of a run shows of a distillation: teacher, student, and the student without the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages.blocks import Block, Fact, Facts, Prose, Row, Section, Table
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.report import Result
    from hfstrat.tasks.report_parts import Comparison

WHO = {
    "teacher": "teacher",
    "before": "student before training",
    "student": "student",
    "without_teacher": "student trained without the teacher",
}
METRICS = {"loss": "loss", "token_accuracy": "token accuracy", "accuracy": "accuracy", "teacher_kl": "KL from the teacher"}


def sections(result: Result) -> list[Section]:
    """Quality, size and speed side by side, and what the cache of the teacher's outputs took."""
    blocks: list[Block] = []
    if found := result.comparison:
        blocks.append(_side_by_side(found))
        if found.no_baseline and not found.without_teacher:
            blocks.append(Prose([f"The student without the teacher was not run: {found.no_baseline}."], "faint"))
    cache = result.distillation.cache if result.distillation else None
    if cache:
        facts = [
            Fact("Teacher's outputs", cache.form),
            Fact("on disk", format.file_size(cache.bytes)),
            Fact("computed in", format.duration(cache.seconds), "" if cache.built else "loaded from the cache"),
            Fact("probability mass stored", format.percent(cache.mass)),
        ]
        blocks.append(Facts(facts))
    return [Section("Teacher and student", blocks)] if blocks else []


def _side_by_side(found: Comparison) -> Table:
    models = [(who, getattr(found, key)) for key, who in WHO.items() if getattr(found, key)]
    metrics = [key for key in METRICS if any(one.get(key) is not None for _, one in models)]
    rows = []
    for who, one in models:
        cells = [format.metric(key, one.get(key)) for key in metrics]
        cells += [format.count(one.get("parameters")), format.file_size(one.get("bytes"))]
        rows.append(Row([who, *cells, format.count(one.get("tokens_per_second")), format.count(one.get("steps"))]))
    head = ["model", *(METRICS[key] for key in metrics), "parameters", "size", "generated tokens/s", "steps"]
    return Table("Teacher and student on the evaluation examples", head, rows)


def advice(result: Result) -> list[tuple[str, str]]:
    """Where the teacher did not help."""
    found = result.comparison
    if not found or not found.without_teacher or not found.student:
        return []
    alone, taught = found.without_teacher.get("loss"), found.student.get("loss")
    if alone is None or taught is None or taught < alone:
        return []
    text = "The student is not better than the one trained without the teacher: train longer, use a better teacher, or lower"
    return [(text, "strategy.teacher_weight")]
