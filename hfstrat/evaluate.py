"""Answers to prompts: what a model says before and after, in words or as a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfstrat.data.labels import Labelled
from hfstrat.generation import continued, room

if TYPE_CHECKING:
    from hfstrat.data.render import Renderer
    from hfstrat.data.texts import Texts


def answer(model: Any, renderer: Renderer, prompt: Any, max_new_tokens: int, compute_dtype: torch.dtype) -> str:
    """The model's greedy answer to one prompt (see `Renderer.prompt_ids`), from the ids it was trained on.

    One prompt at a time: no padding, so the answer depends on nothing else.
    """
    device, ids = next(model.parameters()).device, renderer.prompt_ids(prompt)
    most = max(1, room(model, len(ids), max_new_tokens))
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            out = continued(model, [ids], renderer.tokenizer, most)
    finally:
        model.train(was_training)
    return str(renderer.tokenizer.decode(out[0], skip_special_tokens=True)).strip()


@torch.no_grad()
def labels_of(model: Any, texts: Texts, prompt: Any, compute_dtype: torch.dtype) -> list[tuple[str, float]]:
    """What a classifier says of one text or pair, with probabilities.

    Args:
        prompt: a text, or `{"text": ..., "text_pair": ...}`.

    Returns:
        The most probable label; of a model for several labels those above one half, which may be none.
    """
    row = prompt if isinstance(prompt, dict) else {"text": prompt}
    encoded = texts.encode([Labelled(row["text"], row.get("text_pair"), [])])[0]
    device, config = next(model.parameters()).device, model.config
    inputs = {"input_ids": torch.tensor([encoded.input_ids], device=device)}
    if encoded.token_type_ids and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.tensor([encoded.token_type_ids], device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            logits = model(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs).logits[0].float()
    finally:
        model.train(was_training)
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


def prompt_text(prompt: Any) -> str:
    """A prompt in words, as it is shown."""
    prompt = prompt["messages"] if isinstance(prompt, dict) else prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
