"""What the page of a run shows of hidden states that were computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfstrat.pages.blocks import Block, Fact, Facts, Prose, Section
from hfstrat.recipe import format

if TYPE_CHECKING:
    from hfstrat.tasks.report import Result


def sections(result: Result) -> list[Section]:
    """What was computed once and what it took, or why nothing was."""
    blocks: list[Block] = []
    if found := result.precomputed:
        blocks.append(
            Facts(
                [
                    Fact("Frozen blocks", " of ".join(map(str, found.blocks))),
                    Fact("Hidden states on disk", format.file_size(found.bytes)),
                    Fact("computed in", format.duration(found.seconds), "" if found.built else "loaded from the cache"),
                ]
            )
        )
    elif result.not_precomputed:
        blocks.append(Prose([f"Hidden states of the frozen blocks were not computed once: {result.not_precomputed}."]))
    return [Section("Frozen blocks", blocks)] if blocks else []
