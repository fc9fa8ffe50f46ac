"""Examples with one or several numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.tasks.base import FramedRows
from hfstrat.tasks.regression.targets import COLUMNS, TargetFormat

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data


class TargetRows(FramedRows):
    """Examples with targets."""

    columns = COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        return TargetFormat.detect

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        from hfstrat.tasks.regression.prepare import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.tasks.regression.prepare import prepare_eval

        return prepare_eval(data, tokenizer, config, samples, max_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import has_token_types
        from hfstrat.models.load import pad_token_of
        from hfstrat.tasks.regression.prepare import TargetCollator

        return TargetCollator(pad_token_of(base.model.config, tokenizer), multiple, has_token_types(base.model), data.units)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "token_type_ids": [], "label": data.units.mean.tolist()}
