"""Predicted labels and the metrics of a classifier as they are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.tasks.base import Text, Values

if TYPE_CHECKING:
    import torch

    from hfstrat.data.labeled import Texts
    from hfstrat.data.prepare import PreparedData


class LabelText(Text):
    """Predictions are labels with their probabilities."""

    pipeline = "text-classification"
    unit = "text"

    def predict(self, model: Any, data: PreparedData, prompt: Any, max_new_tokens: int, dtype: torch.dtype) -> str:
        return self.line(self.outputs(model, data.renderer, prompt, dtype))

    def outputs(self, model: Any, texts: Texts, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        """The predictions for one text or pair: names with numbers."""
        return labels_of(model, texts, prompt, dtype)

    def line(self, outputs: list[tuple[str, float]]) -> str:
        """The predictions of `outputs` in a line."""
        return in_words(outputs)

    def record(self, outputs: list[tuple[str, float]]) -> dict[str, Any]:
        """The predictions of `outputs` as keys of a JSON object."""
        return {"labels": [label for label, _ in outputs], "scores": [chance for _, chance in outputs]}

    def prompt(self, prompt: Any) -> str:
        return text_of_prompt(prompt)

    def metrics(self, metrics: Values) -> str:
        micro = f", micro-F1 {metrics['micro_f1']:.1%}" if "micro_f1" in metrics else ""
        return f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, macro-F1 {metrics['macro_f1']:.1%}{micro}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"accuracy {before['accuracy']:.1%} -> {after['accuracy']:.1%}, "
            f"macro-F1 {before['macro_f1']:.1%} -> {after['macro_f1']:.1%}"
        )

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.text_classification.scores import lines_of

        return lines_of(details)

    def example(self, chats: bool, sentence: bool) -> list[str]:
        if sentence:
            return [
                'logits = model.encode(["a text to label"], convert_to_tensor=True)',
                "labels = model[0].auto_model.config.id2label",
                "print(labels[int(logits[0].argmax())])",
            ]
        return [
            'inputs = tokenizer("a text to label", return_tensors="pt")',
            "logits = model(**inputs).logits",
            "print(model.config.id2label[int(logits[0].argmax())])",
        ]


def text_of_prompt(prompt: Any) -> str:
    """A text, or both texts of a pair with a blank line between them."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join([prompt["text"], prompt["text_pair"]] if "text_pair" in prompt else [prompt["text"]])


def logits_of(model: Any, texts: Texts, prompt: Any, compute_dtype: torch.dtype) -> torch.Tensor:
    """The model's outputs for one text or pair, `[outputs]` in float32.

    Args:
        prompt: a text, or `{"text": ..., "text_pair": ...}`.
        compute_dtype: of the forward pass: autocast unless it is float32.
    """
    import torch

    from hfstrat.data.collate import has_token_types
    from hfstrat.data.labeled import LabeledText

    row = prompt if isinstance(prompt, dict) else {"text": prompt}
    encoded = texts.encode([LabeledText(row["text"], row.get("text_pair"), [])])[0]
    device, was_training = next(model.parameters()).device, model.training
    inputs = {"input_ids": torch.tensor([encoded.input_ids], device=device)}
    if encoded.token_type_ids and has_token_types(model):
        inputs["token_type_ids"] = torch.tensor([encoded.token_type_ids], device=device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            found: torch.Tensor = model(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs).logits[0].float()
    finally:
        model.train(was_training)
    return found


def labels_of(model: Any, texts: Texts, prompt: Any, compute_dtype: torch.dtype) -> list[tuple[str, float]]:
    """The labels that a classifier predicts for one text or pair, with probabilities; see `logits_of`.

    Returns:
        The most probable label; of a model for several labels those above one half, which may be none.
    """
    config, logits = model.config, logits_of(model, texts, prompt, compute_dtype)
    if config.problem_type == "multi_label_classification":
        chances = logits.sigmoid()
        chosen = [index for index in chances.argsort(descending=True).tolist() if chances[index] > 0.5]
    else:
        chances = logits.softmax(-1)
        chosen = [int(chances.argmax())]
    return [(config.id2label[index], float(chances[index])) for index in chosen]


def in_words(labels: list[tuple[str, float]]) -> str:
    """Labels with their probabilities, as they are shown."""
    return ", ".join(f"{label} ({chance:.0%})" for label, chance in labels) or "(none)"
