"""What the page of a run shows of a head on frozen features: which layer and pooling were chosen, and among which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.pages.blocks import Block, Cell, Fact, Facts, Prose, Row, Section, Table
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.report import Result

ABOUT = "The score of a layer is that of a linear head on its features, on a part of the training examples that did not fit it."


def sections(result: Result) -> list[Section]:
    """The chosen features, and the scores of all candidates."""
    head = result.head
    if head is None:
        return []
    facts = [Fact("Layer", str(head.layer)), Fact("Pooling", head.pooling)]
    facts.append(Fact("Head", "solved exactly" if head.solved_exactly else "trained step by step"))
    if head.l2 is not None:
        facts.append(Fact("L2 penalty", f"{head.l2:.3g}"))
    blocks: list[Block] = [Facts(facts)]
    candidates: list[dict[str, Any]] = getattr(head, "candidates", None) or []
    if len(candidates) > 1:
        blocks += [_candidates(candidates, head.layer, head.pooling), Prose([ABOUT], "faint")]
    return [Section("Frozen features", blocks)]


def _candidates(candidates: list[dict[str, Any]], layer: int, pooling: str) -> Table:
    layers = sorted({one["layer"] for one in candidates})
    scores = {(one["pooling"], one["layer"]): one["score"] for one in candidates}
    rows = []
    for name in dict.fromkeys(one["pooling"] for one in candidates):
        cells = [Cell(format.percent(scores.get((name, each))), best=(name, each) == (pooling, layer)) for each in layers]
        rows.append(Row([name, *cells]))
    return Table("Score of each layer and pooling", ["pooling", *(f"layer {each}" for each in layers)], rows)
