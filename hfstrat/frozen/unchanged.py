"""What stored hidden states depend on, as hashes: a changed weight, row or option never gets old ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import nn

    from hfstrat.feed import Feed

OF_THE_LOSS = ("labels", "label", "row", "text_hash")  # columns that no hidden state depends on


def digest_of_weights(model: nn.Module) -> str:
    """Over the bytes of everything that does not learn (an adapter does), buffers included, in the precision it computes in."""
    from hfstrat.quantization import companions

    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, tensor in [*frozen, *model.named_buffers(), *companions(model)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_rows(rows: Any, chosen: np.ndarray) -> str:
    """Over the columns of numbers of a data set, and over which rows of it are meant, in which order."""
    digest = hashlib.sha256()
    table = rows.data
    for name in sorted(set(table.column_names) - set(OF_THE_LOSS)):
        digest.update(name.encode())
        for chunk in table.column(name).chunks:
            if hasattr(chunk, "value_lengths"):
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                chunk = chunk.flatten()
            values = chunk.to_numpy(zero_copy_only=False)
            if values.dtype != object:  # texts are not what the model sees
                digest.update(values.tobytes())
    indices = rows._indices
    numbers = chosen if indices is None else indices.column(0).to_numpy()[chosen]
    digest.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()


def surroundings(feed: Feed, model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Everything else: config, attention kernel, precision, shapes of batches, machine and libraries."""
    import transformers

    config = {key: str(value) for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "architectures")}
    plain = (int, float, str, bool, tuple, list, type(None))
    return {
        "model": type(model).__name__,
        "config": config,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "dtype": [str(dtype), str(feed.dtype)],
        "collator": {name: str(value) for name, value in vars(feed.collate).items() if isinstance(value, plain)},
        "device": torch.cuda.get_device_name() if feed.device.type == "cuda" else feed.device.type,
        "libraries": [torch.__version__, transformers.__version__],
    }
