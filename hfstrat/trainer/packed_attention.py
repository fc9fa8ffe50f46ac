"""Which attention computes packed rows: the first that the model in use accepts, and whose results are those of unpacked rows.

A kernel for variable lengths takes all bins of a pass as one row without padding between them. Whether a model, its data types
and this device can use one is not looked up: each candidate runs forward and backward on the model, and has to give every
example the hidden states and the gradients that it has alone under the attention that the model was loaded with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_torch_flex_attn_available,
)

from hfstrat.data.collate import Collator
from hfstrat.data.packing import TOLERANCE, Bin, PackingCollator, find_leak
from hfstrat.errors import UserError, first_line
from hfstrat.models.attention import MAX_HEAD, VARLEN

HALF = (torch.float16, torch.bfloat16)


class Attention(NamedTuple):
    """The attention implementation of a run, why it was chosen, and whether the bins of a pass form one row."""

    name: str
    because: str
    flatten: bool


class Refused(Exception):
    """No candidate computes packed rows of the models as unpacked ones."""


def is_flat(name: str) -> bool:
    """Whether an attention implementation computes rows of any length at the cost of their examples."""
    return name in (VARLEN, "flex_attention") or "flash" in name or "/" in name


def choose(
    wanted: str,
    models: Sequence[Any],
    device: torch.device,
    dtype: torch.dtype,
    longest: int,
    before: str | None = None,
    must_pack: bool = False,
) -> Attention:
    """The attention of packed rows; the models use it from then on.

    Args:
        wanted: `model.attn_implementation`.
        models: the model to train, and others that are given its batches, such as a teacher.
        dtype: of the forward pass.
        longest: tokens of the longest example.
        before: the implementation of an interrupted run, which is kept.
        must_pack: whether the mask of SDPA, whose cost is the square of a row's length, is accepted on a GPU too.

    Raises:
        Refused: no candidate is right; the models are as they were.
        UserError: the implementation of the interrupted run is not available here.
    """
    own = str(models[0].config._attn_implementation)
    if before is not None and before != own:
        names, why = [before], "as when the run was started"
    elif wanted != "auto" or before is not None:
        names, why = [own], "as when the run was started" if before else "as model.attn_implementation says"
    else:
        names, why = candidates(own, device, must_pack), ""
    refused = dict[str, str]()
    for name in names:
        reason = unusable(name, models, device, dtype) or _try(name, models, dtype, longest)
        if reason is None:
            passed_over = [f"not {one}: {text}" for one, text in refused.items()]
            return Attention(name, why or "; ".join([in_words(name, device), *passed_over]), is_flat(name))
        refused[name] = reason
    if before is not None and before != own:
        raise UserError(
            f"training.resume_from_checkpoint: the run was started with attention {before}, which cannot be used here: "
            f"{refused[before]}; resume it where it was started, or start again with --overwrite"
        )
    reasons = dict.fromkeys(refused.values())
    raise Refused(next(iter(reasons)) if len(reasons) == 1 else "; ".join(f"{one}: {text}" for one, text in refused.items()))


def in_words(name: str, device: torch.device) -> str:
    """What an attention implementation does with packed rows."""
    if name == VARLEN:
        on_cpu = "a loop over the packed examples, since torch's kernel for variable lengths needs a GPU"
        return "torch's kernel for variable lengths" if device.type == "cuda" else on_cpu
    return "a kernel for variable lengths" if is_flat(name) else "with a block mask"


def candidates(own: str, device: torch.device, must_pack: bool) -> list[str]:
    """Implementations to try, best first. On a CPU, the loop over examples and the mask of SDPA."""
    if device.type != "cuda":
        return [VARLEN, own]
    installed = {
        "flash_attention_4": is_flash_attn_4_available,
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
        "flex_attention": lambda: is_torch_flex_attn_available() and torch.cuda.is_available(),
    }
    return [VARLEN, *(name for name, found in installed.items() if found()), *([own] if must_pack else [])]


def unusable(name: str, models: Sequence[Any], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's kernel is known not to be used, without trying it: the implementation would take the mask of SDPA instead."""
    if name != VARLEN:
        return None
    if device.type == "cuda" and dtype not in HALF:
        return f"it computes in 16 bits, the forward pass is in {str(dtype).removeprefix('torch.')}"
    for config in (model.config.get_text_config() for model in models):
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if device.type == "cuda" and head > MAX_HEAD:
            return f"its heads have at most {MAX_HEAD} numbers, the model's {head}"
        if rate := max((getattr(config, key, 0) or 0) for key in ("attention_dropout", "attn_pdrop")):
            return f"it has no dropout, the model's attention {rate:g}"
    return None


def _try(name: str, models: Sequence[Any], dtype: torch.dtype, longest: int) -> str | None:
    """Set the implementation; reset, with the reason, if it is not that of unpacked rows."""
    before = [str(model.config._attn_implementation) for model in models]
    for number, model in enumerate(models):
        reason = _set(model, name) or find_leak(model, is_flat(name), dtype)
        if reason is None and name != before[number]:
            reason = difference(model, before[number], dtype, longest)
        if reason is not None:
            for one, own in zip(models, before, strict=True):
                _set(one, own)
            return reason if number == 0 else f"the teacher: {reason}"
    return None


def _set(model: Any, name: str) -> str | None:
    if model.config._attn_implementation == name:
        return None
    try:
        model.set_attn_implementation(name)
    except Exception as error:  # an unforeseen architecture or installation can fail in any way
        return first_line(error)
    return None if model.config._attn_implementation == name else f"{type(model).__name__} does not take it"


def difference(model: Any, own: str, dtype: torch.dtype, longest: int) -> str | None:
    """What differs between packed rows under the implementation that is set and unpacked ones under `own`; None: nothing.

    Hidden states and gradients of the embeddings are compared on random examples, one of them longer than the model's sliding
    window, if the data have such.
    """
    name = str(model.config._attn_implementation)
    config, lengths = model.config.get_text_config(), [5, 7, 4]
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and window < longest:
        lengths.append(min(longest, window + 8))
    weight, generator = model.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    examples = [torch.randint(0, weight.shape[0], (n,), generator=generator).tolist() for n in lengths]
    was_training = model.training
    try:
        with _evaluated(model, dtype):
            packed = _states(model, examples, is_flat(name))
            _set(model, own)
            alone = [torch.cat(parts) for parts in zip(*(_states(model, [ids], False) for ids in examples), strict=True)]
    except Exception as error:  # a kernel can fail in any way
        return f"it fails ({type(error).__name__}: {first_line(error)})"
    finally:
        model.train(was_training)
        _set(model, name)
    allowed = TOLERANCE[min(4, dtype.itemsize, packed[0].dtype.itemsize)]
    for what, here, there in zip(("hidden states", "gradients"), packed, alone, strict=True):
        if not float((here - there).abs().max()) <= allowed * float(there.abs().max()):
            return f"packed examples do not have the {what} that they have unpacked under {own}"
    return None


@contextmanager
def _evaluated(model: Any, dtype: torch.dtype) -> Iterator[None]:
    model.eval()
    device = model.get_input_embeddings().weight.device.type
    with torch.enable_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        yield


def _states(model: Any, examples: list[list[int]], flatten: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of some packed examples, and the gradients of their embeddings: `[tokens, H]` each."""
    embeddings, total = model.get_input_embeddings(), sum(map(len, examples))
    rows = [{"input_ids": ids, "labels": ids} for ids in examples]
    batch = PackingCollator(Collator(0, 1, masks_logits=False), flatten)([Bin(rows, total)])
    ids, positions = (batch[name].to(embeddings.weight.device) for name in ("input_ids", "position_ids"))
    given = embeddings(ids).detach().requires_grad_()
    states = model.base_model(inputs_embeds=given, position_ids=positions, use_cache=False).last_hidden_state[0, :total]
    weights = torch.linspace(-1, 1, states.shape[-1], device=states.device).roll(1)
    (grad,) = torch.autograd.grad((states.float() * weights).sum(), given)
    return states.detach().float() if states.dtype != torch.float64 else states.detach(), grad[0, :total].to(states.dtype)
