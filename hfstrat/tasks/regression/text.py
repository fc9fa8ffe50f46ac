"""Predicted numbers and their errors as they are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.tasks.base import Values
from hfstrat.tasks.text_classification.text import LabelText, logits_of

if TYPE_CHECKING:
    import torch

    from hfstrat.data.labeled import Texts


class NumberText(LabelText):
    """Predictions are numbers in the units of the targets; the Hub has no name of its own for this task."""

    def outputs(self, model: Any, texts: Texts, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        names = model.config.id2label
        return [(names[index], value) for index, value in enumerate(logits_of(model, texts, prompt, dtype).tolist())]

    def line(self, outputs: list[tuple[str, float]]) -> str:
        return ", ".join(f"{name} {value:.6g}" for name, value in outputs)

    def record(self, outputs: list[tuple[str, float]]) -> dict[str, Any]:
        return {"values": dict(outputs)}

    def metrics(self, metrics: Values) -> str:
        errors = f"MAE {metrics['mae']:.4g}, RMSE {metrics['rmse']:.4g}"
        return f"loss {metrics['loss']:.4f}, {errors}, Pearson {metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"MAE {before['mae']:.4g} -> {after['mae']:.4g}, RMSE {before['rmse']:.4g} -> {after['rmse']:.4g}, "
            f"Pearson {before['pearson']:.3f} -> {after['pearson']:.3f}"
        )

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.regression.scores import lines_of

        return lines_of(details)

    def example(self, chats: bool, sentence: bool) -> list[str]:
        if sentence:
            return [
                'values = model.encode(["a text"], convert_to_tensor=True)[0].tolist()',
                "names = model[0].auto_model.config.id2label",
                "print({names[i]: value for i, value in enumerate(values)})",
            ]
        return [
            'inputs = tokenizer("a text", return_tensors="pt")',
            "values = model(**inputs).logits[0].tolist()",
            "print({model.config.id2label[i]: value for i, value in enumerate(values)})",
        ]
