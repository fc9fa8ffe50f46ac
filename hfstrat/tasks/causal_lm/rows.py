"""Texts, prompts with completions and conversations as examples of token ids with masked labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.data.formats import OUR_COLUMNS, RowFormat, check_train_on
from hfstrat.tasks.base import Rows

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data


class LanguageRows(Rows):
    """Examples whose labels are their own next tokens."""

    columns = OUR_COLUMNS
    framed = False

    @property
    def reader(self) -> Callable[..., Any]:
        return RowFormat.detect

    def read_format(self, head: list[dict[str, Any]], source: str, data: Data, wanted: str, columns: dict[str, str]) -> Any:
        reading = self.reader(head, source, wanted, columns)
        check_train_on(data, reading)
        return reading

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        from hfstrat.data.prepare import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.data.prepare import prepare_eval

        return prepare_eval(data, tokenizer, samples, max_rows)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import Collator
        from hfstrat.models.fused_loss import is_bound
        from hfstrat.models.load import takes_logits_mask

        selects = is_bound(base.model)
        return Collator(tokenizer.pad_token_id or 0, multiple, takes_logits_mask(base.model), selects_rows=selects)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "labels": [1] * length}  # loss on all of it

    def probe(self, data: PreparedData, collate: Any) -> dict[str, Any]:
        return {"input_ids": data.probe(), "use_cache": False}
