"""Attention of packed rows without a block mask: `torch.nn.attention.varlen` as an attention implementation of transformers.

SDPA needs a mask `[B, 1, T, T]` to keep packed examples apart, and no flash kernel takes one. This implementation is SDPA,
except where the mask would be that of packed rows: there, models get a `Segments` in its place, from which the kernel for
variable lengths knows the examples. It is derived from the mask that transformers would compute, and verified against it
position by position, so that a mask of another form (tokens of an image that see each other) stays the mask that it was. On
devices without the kernel a loop over the examples computes the same.

FlashAttention: Dao et al. 2022, arXiv 2205.14135; its form for variable lengths: Dao 2023, arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VARLEN = "sdpa_varlen"  # transformers treats names with "sdpa" as a form of SDPA, which a model has to support
MAX_HEAD = 256  # numbers per head that the kernel takes
UNSUPPORTED = ("softcap", "position_bias", "s_aux")  # arguments of attention that the kernel does not have

Visible = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class Segments(NamedTuple):
    """What packed rows attend to: each token to those before it in its own example, and to itself.

    Args:
        ends: int32 `[examples + 1]`, where each example starts in the flattened rows, and the end of the last one.
        longest: tokens of the longest example.
        window: tokens that a token attends to, itself included; 0: no limit.
    """

    ends: torch.Tensor
    longest: int
    window: int

    def as_mask(self, rows: int) -> torch.Tensor:
        """The mask of SDPA: bool `[rows, 1, T, T]`."""
        starts, total = self.ends[1:-1].long(), int(self.ends[-1])
        jumps = torch.zeros(total, dtype=torch.long, device=self.ends.device).index_fill_(0, starts, 1)
        example, place = jumps.cumsum(0).view(rows, -1), torch.arange(total // rows, device=self.ends.device)
        distance = place[:, None] - place
        near = (distance >= 0) & (distance < (self.window or total))
        return ((example[:, :, None] == example[:, None, :]) & near)[:, None]


def takes_sdpa_masks(implementation: str | None) -> bool:
    """Whether an attention implementation takes boolean masks `[B, 1, T, T]`."""
    return implementation in ("sdpa", VARLEN)


def of_unpacked_rows(implementation: str | None) -> str:
    """The attention implementation that computes rows which are not packed."""
    return "sdpa" if implementation == VARLEN else str(implementation)


def find_segments(visible: Visible, rows: int, length: int, device: torch.device | str) -> Segments | None:
    """The examples of packed rows from a mask function of transformers; None if it is not the mask of packed rows.

    Every position is compared with the mask: it has to see the first token that its segment allows, not the one before, and not
    the next position.
    """
    row, place = torch.arange(rows, device=device)[:, None], torch.arange(length, device=device)[None]

    def sees(key: torch.Tensor) -> torch.Tensor:
        return visible(row, 0, place.expand(rows, -1), key.expand(rows, -1)).expand(rows, length)

    starts = ~sees((place - 1).clamp(min=0))
    starts[:, 0] = True
    first = torch.where(starts, place, 0).cummax(dim=1).values
    last = int((place - first).argmax())
    longest = last % length - int(first.flatten()[last]) + 1
    keys = torch.arange(length, device=device)
    seen = int(visible(torch.tensor(last // length, device=device), 0, torch.tensor(last % length, device=device), keys).sum())
    window = seen if seen < longest else 0
    lowest = torch.maximum(first, place - window + 1) if window else first.expand(rows, -1)
    right = sees(place) & sees(lowest)
    right &= (lowest == 0) | ~sees((lowest - 1).clamp(min=0))
    right &= (place == length - 1) | ~sees((place + 1).clamp(max=length - 1))
    if not bool(right.all()):
        return None
    ends = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([rows * length], device=device)])
    return Segments(ends.to(torch.int32), longest, window) if len(ends) > rows + 1 else None


def varlen_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Visible,
    q_offset: Any = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Segments | torch.Tensor | None:
    """`Segments` where rows are packed (restarting position ids, no attention mask, no cache), else the mask of SDPA.

    The arguments are those of transformers' `sdpa_mask`.
    """
    may_be_packed = attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length > 1
    if may_be_packed and isinstance(q_offset, int) and q_offset == 0:
        found = find_segments(mask_function, batch_size, q_length, device)
        if found is not None:
            return found
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap,
        device=device,
        **others,
    )
    return mask


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Segments | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows by the kernel for variable lengths; of other rows, and with dropout, by SDPA.

    Args:
        query: `[B, H, T, D]`; `key` and `value` may have fewer heads, `value` another size of a head.
        attention_mask: of `varlen_mask`.

    Returns:
        `[B, T, H, Dv]`, and None for the attention weights.
    """
    if isinstance(attention_mask, Segments) and (dropout or any(others.get(name) is not None for name in UNSUPPORTED)):
        attention_mask = attention_mask.as_mask(query.shape[0])
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    rows, heads, length, size = query.shape
    device, width = query.device.type, value.shape[-1]
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else value.dtype
    padded = max(size, width) + -max(size, width) % 8  # heads have one size, a multiple of 8
    flat = [
        functional.pad(one.transpose(1, 2).reshape(rows * length, one.shape[1], -1), (0, padded - one.shape[-1])).to(dtype)
        for one in (query, key, value)
    ]
    found = _kernel(device)(
        *flat,
        attention_mask.ends,
        attention_mask.ends,
        attention_mask.longest,
        attention_mask.longest,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(attention_mask.window - 1, 0),  # (-1, 0) is causal without a window
        enable_gqa=heads != key.shape[1],
    )
    return found.view(rows, length, heads, padded)[..., :width], None


def _kernel(device: str) -> Callable[..., torch.Tensor]:
    if device != "cuda":
        return varlen_reference
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[return-value]


def varlen_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.attention.varlen.varlen_attn` for causal attention, as a loop of SDPA over the examples, on any device.

    Args:
        query: `[T, H, D]`; `key` and `value` `[T, Hkv, D]`.
        window_size: tokens before each one that it attends to (-1: all), and 0.

    Raises:
        ValueError: attention that is not causal, or keys of other examples than the queries.
    """
    if window_size[1] != 0 or cu_seq_k is not cu_seq_q or max_k != max_q:
        raise ValueError(f"window_size: {window_size} over separate keys; expected (left, 0), and the keys of the queries")
    parts = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (one[start:end].transpose(0, 1)[None] for one in (query, key, value))
        mask = _window(end - start, window_size[0], query.device) if 0 <= window_size[0] < end - start - 1 else None
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _window(length: int, left: int, device: torch.device) -> torch.Tensor:
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril() & everything.triu(-left)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
