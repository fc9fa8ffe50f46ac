"""Answers to prompts: what a model says before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hfstrat.data.render import Renderer


@torch.no_grad()
def answer(model: Any, renderer: Renderer, prompt: Any, max_new_tokens: int, compute_dtype: torch.dtype) -> str:
    """The model's greedy answer to one prompt (see `Renderer.prompt_ids`), from the ids it was trained on.

    One prompt at a time: no padding, so the answer depends on nothing else.
    """
    tokenizer = renderer.tokenizer
    device = next(model.parameters()).device
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ids = torch.tensor([renderer.prompt_ids(prompt)], device=device)
    if isinstance(context, int):  # there are no positions beyond, and GPT-2 would crash there
        max_new_tokens = max(1, min(max_new_tokens, context - ids.shape[1]))
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                eos_token_id=tokenizer.eos_token_id,
                use_cache=True,
            )
    finally:
        model.train(was_training)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def prompt_text(prompt: Any) -> str:
    """A prompt in words, as it is shown."""
    prompt = prompt["messages"] if isinstance(prompt, dict) else prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
