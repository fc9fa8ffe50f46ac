"""Writing on: the one place where a model generates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def continued(model: Any, prompts: list[list[int]], tokenizer: Any, most: int, **options: Any) -> torch.Tensor:
    """What a model writes after each prompt (token ids), greedily unless `options` of `generate` say otherwise.

    Prompts are padded on the left; without a tokenizer they have to be of one length. No process waits for another one: each
    that calls this has the whole model, and under ZeRO-3 transformers would else wait for all of them.

    Returns:
        Token ids, `[prompts, at most `most`]`, padded behind the end token.
    """
    import torch

    device, width = next(model.parameters()).device, max(map(len, prompts))
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_token_id}
    ids = torch.tensor([[pad] * (width - len(each)) + each for each in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=device)
    with torch.no_grad():
        out: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            pad_token_id=pad,
            use_cache=True,
            synced_gpus=False,
            **{**GREEDY, **ends, **options},
        )
    return out[:, width:]


def room(model: Any, length: int, wanted: int) -> int:
    """How many tokens fit after `length`, at most `wanted`: there are no positions beyond the context; GPT-2 crashes there."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(wanted, context - length) if isinstance(context, int) else wanted
