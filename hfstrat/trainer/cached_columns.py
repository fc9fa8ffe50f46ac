"""Columns of a dataset that are computed once and cached: the digests they depend on, and how they become batches.

Each example carries its value, so no order of examples can mix them up."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.utils.data import Dataset

from hfstrat.data.packing import Bin
from hfstrat.models.attention import of_unpacked_rows
from hfstrat.trainer.collective import exhaust
from hfstrat.trainer.train_data import TrainData

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class WithColumn(Dataset[dict[str, Any]]):
    """Tokenized examples with a further column: `values` returns a value by its index, `places` has those of the examples.

    As of a data set, `[index]` is an example, `[[indices]]` has lists by column, and `["name"]` is a column.
    """

    def __init__(self, rows: Any, name: str, values: Callable[[int], Any], places: np.ndarray) -> None:
        self.rows, self.name, self.values, self.places = rows, name, values, places

    @property
    def data(self) -> Any:
        """The table of the examples without the column, as of a Dataset."""
        return self.rows.data

    @property
    def _indices(self) -> Any:
        return self.rows._indices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return [self.values(int(place)) for place in self.places] if index == self.name else self.rows[index]
        if isinstance(index, list):
            return {**self.rows[index], self.name: [self.values(int(self.places[one])) for one in index]}
        return {**self.rows[index], self.name: self.values(int(self.places[index]))}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class CachedColumnCollator(ABC):
    """A collator that adds tensors made of a cached column; examples without the column are collated as before.

    With packing each item is a bin of examples.
    """

    column: str

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        bins = [item.rows if isinstance(item, Bin) else [item] for item in items]
        batch = self.collate(items)
        if not all(self.column in row for rows in bins for row in rows):
            return batch
        return batch | self.added([[row[self.column] for row in rows] for rows in bins], batch)

    @abstractmethod
    def added(self, values: list[list[Any]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a batch; `values` are those of each of its rows, left to right."""


OF_THE_LOSS = ("labels", "label", "row", "text_hash")  # columns that hidden states do not depend on


def digest_of_weights(model: nn.Module, trained: bool = False) -> str:
    """A hash over the bytes of all frozen weights and buffers, in the precision they compute in.

    Args:
        trained: whether trainable weights count too.
    """
    from hfstrat.models.quantization import scale_tensors

    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if trained or not p.requires_grad]
    for name, tensor in [*frozen, *model.named_buffers(), *scale_tensors(model)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_rows(rows: Any, chosen: np.ndarray, without: tuple[str, ...] = OF_THE_LOSS) -> str:
    """A hash over the numeric columns of a dataset, and over the selected examples and their order.

    Args:
        without: columns that what is cached does not depend on.
    """
    digest = hashlib.sha256()
    table = rows.data
    for name in sorted(set(table.column_names) - set(without)):
        digest.update(name.encode())
        for chunk in table.column(name).chunks:
            if hasattr(chunk, "value_lengths"):
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                chunk = chunk.flatten()
            if pa.types.is_binary(chunk.type) or pa.types.is_large_binary(chunk.type) or pa.types.is_string(chunk.type):
                continue  # the model does not see texts and paths; images have a column `content`
            values = chunk.to_numpy(zero_copy_only=False)
            if values.dtype != object:
                digest.update(values.tobytes())
    indices = rows._indices
    numbers = chosen if indices is None else indices.column(0).to_numpy()[chosen]
    digest.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()


def cache_inputs(data: TrainData, model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What else cached outputs depend on: config, attention kernel, precision, shapes of batches, device and libraries."""
    import transformers

    config = {key: str(value) for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "architectures")}
    plain = (int, float, str, bool, tuple, list, type(None))
    return {
        "model": type(model).__name__,
        "config": config,
        "attention": of_unpacked_rows(getattr(model.config, "_attn_implementation", None)),
        "dtype": [str(dtype), str(data.dtype)],
        "collator": {name: str(value) for name, value in vars(data.collate).items() if isinstance(value, plain)},
        "device": torch.cuda.get_device_name() if data.device.type == "cuda" else data.device.type,
        "libraries": [torch.__version__, transformers.__version__],
    }


def sample_batch(data: TrainData) -> dict[str, torch.Tensor]:
    """The first and the last evaluation example as a batch, in another order than in an evaluation."""
    return data.batch([len(data.eval) - 1, 0] if len(data.eval) > 1 else [0])


def groups_of(order: np.ndarray, size: int) -> list[list[int]]:
    """Indices in this order, `size` at a time."""
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def write_column(target: Path | None, name: str, kind: pa.DataType, arrays: Iterable[pa.Array]) -> None:
    """Write a column batch by batch; without a target it is only computed, since another process writes it."""
    if target is None:
        exhaust(arrays)
        return
    schema = pa.schema([(name, kind)])
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for array in arrays:
            stream.write_batch(pa.record_batch([array], schema=schema))


def read_column(file: Path, name: str) -> pa.ChunkedArray:
    """The column that `write_column` wrote, memory-mapped."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all().column(name)
