"""Virtual tokens before a text: positions in the arguments and the outputs of a PEFT model count the text's own tokens only.

Prompt tuning and P-tuning put trained embeddings before those of the text, so the base model sees, and returns logits for, more
positions than the text has. PEFT moves `labels`, but no other positions. Two hooks on the PEFT model do the rest: whoever calls
it need not know. The classes of PEFT are left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ENCODER = "prompt_encoder.safetensors"  # of a checkpoint
ROWS = "loss_rows"  # flat positions with loss, of the bound forward (`hfstrat.models.fused_loss`)
KEPT = "logits_to_keep"  # positions that go through the LM head, flat or as a mask


def count(model: Any) -> int:
    """Virtual tokens that a model puts before each text, which take places in its context."""
    config = getattr(model, "active_peft_config", None)
    return int(getattr(config, "num_virtual_tokens", None) or 0)


def align(model: Any) -> Any:
    """The PEFT model, with these hooks where its adapter has embeddings before the text."""
    config = model.active_peft_config
    if getattr(config, "is_prompt_learning", False) and config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        model.register_forward_pre_hook(_moved_by(count(model)), with_kwargs=True)
        model.register_forward_hook(_without_first(count(model)), with_kwargs=True)
    return model


def _moved_by(front: int) -> Any:
    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        rows = kwargs.get(ROWS)
        if rows is not None:
            kwargs = {**kwargs, ROWS: rows + front * (1 + rows // ids.shape[1])}
        kept = kwargs.get(KEPT)
        if isinstance(kept, torch.Tensor) and kept.dtype == torch.bool:
            none = torch.zeros(*kept.shape[:-1], front, dtype=torch.bool, device=kept.device)
            kwargs = {**kwargs, KEPT: torch.cat((none, kept), dim=-1)}
        return args, kwargs

    return move


def _without_first(front: int) -> Any:
    def strip(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        logits = getattr(output, "logits", None)
        if logits is not None and kwargs.get(KEPT) is None:
            output.logits = logits[:, front:]
        return output

    return strip


def encoder_of(model: Any) -> Any:
    """The module that computes the embeddings of P-tuning (arXiv 2103.10385); None where they are trained directly."""
    encoders, name = getattr(model, "prompt_encoder", None), getattr(model, "active_adapter", None)
    found = encoders[name] if encoders is not None and name in encoders else None
    return found if found is not None and any(not key.startswith("embedding.") for key in found.state_dict()) else None


def save_encoder(model: Any, folder: Path) -> None:
    """Add the encoder to a checkpoint, since PEFT saves only the embeddings that it computes."""
    from safetensors.torch import save_file

    if (encoder := encoder_of(model)) is not None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}, folder / ENCODER)


def load_encoder(model: Any, folder: Path) -> None:
    """Load the encoder of a checkpoint; PEFT has put the embeddings that it computed in the place of its input."""
    from safetensors.torch import load_file

    if (encoder := encoder_of(model)) is not None:
        encoder.load_state_dict(load_file(folder / ENCODER))
