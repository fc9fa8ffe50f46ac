"""Texts and pairs of texts with their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.data.labeled import OUR_COLUMNS, LabelFormat
from hfstrat.tasks.base import FramedRows

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.classes import Classes
    from hfstrat.models.load import Base
    from hfstrat.recipe.data import Data


class LabeledRows(FramedRows):
    """Examples with one label, or any number of them."""

    columns = OUR_COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        return LabelFormat.detect

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> Classes:
        from hfstrat.data.classes import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> Classes:
        from hfstrat.data.classes import prepare_eval

        names = [config.id2label[index] for index in sorted(config.id2label)]
        many = config.problem_type == "multi_label_classification"
        return prepare_eval(data, tokenizer, names, many, samples, max_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import ClassCollator, has_token_types
        from hfstrat.models.load import pad_token_of

        several = len(data.label_names) if data.many else None
        return ClassCollator(pad_token_of(base.model.config, tokenizer), multiple, has_token_types(base.model), several)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "token_type_ids": [], "label": [0] if data.many else 0}
