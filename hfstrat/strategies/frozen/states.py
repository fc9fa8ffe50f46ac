"""Cached columns of a dataset, and hidden states as such a column: the digests they depend on, and their files on disk.

Each example carries its value, so no order of examples can mix them up."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from hfstrat.data.packing import Bin
from hfstrat.strategies.frozen.boundary import COLUMN, Boundary
from hfstrat.trainer.collective import exhaust

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from hfstrat.trainer.train_data import TrainData


Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class WithColumn(Dataset[dict[str, Any]]):
    """A dataset with an additional column.

    Args:
        rows: the tokenized examples.
        name: of the column.
        values: returns a value by its index.
        places: the index of the value of each example, `[len(rows)]`.
    """

    def __init__(self, rows: Any, name: str, values: Callable[[int], Any], places: np.ndarray) -> None:
        self.rows, self.name, self.values, self.places = rows, name, values, places

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
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


def digest_of_weights(model: nn.Module) -> str:
    """A hash over the bytes of all frozen weights and buffers, in the precision they compute in."""
    from hfstrat.models.quantization import companions

    digest = hashlib.sha256()
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    for name, tensor in [*frozen, *model.named_buffers(), *companions(model)]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_rows(rows: Any, chosen: np.ndarray) -> str:
    """A hash over the numeric columns of a dataset, and over the selected examples and their order."""
    digest = hashlib.sha256()
    table = rows.data
    for name in sorted(set(table.column_names) - set(OF_THE_LOSS)):
        digest.update(name.encode())
        for chunk in table.column(name).chunks:
            if hasattr(chunk, "value_lengths"):
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                chunk = chunk.flatten()
            values = chunk.to_numpy(zero_copy_only=False)
            if values.dtype != object:  # the model does not see texts
                digest.update(values.tobytes())
    indices = rows._indices
    numbers = chosen if indices is None else indices.column(0).to_numpy()[chosen]
    digest.update(np.ascontiguousarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()


def cache_inputs(feed: TrainData, model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What else cached outputs depend on: config, attention kernel, precision, shapes of batches, device and libraries."""
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


RAW: dict[torch.dtype, Any] = {
    torch.float32: np.dtype("float32"),
    torch.bfloat16: np.dtype("int16"),
    torch.float16: np.dtype("int16"),
}


def write(target: Path | None, batches: Iterable[list[torch.Tensor]], dtype: torch.dtype) -> None:
    """Write hidden states `[T, H]` as lists of `T * H` numbers; 16-bit floats are stored as the integers of their bits.

    Without a target the batches are only computed, since another process writes them.
    """
    if target is None:
        exhaust(batches)
        return
    kind = pa.from_numpy_dtype(RAW[dtype])
    schema = pa.schema([(COLUMN, pa.large_list(kind))])
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            ends = np.cumsum([0, *(row.numel() for row in batch)])
            flat = torch.cat([row.flatten() for row in batch])
            values = flat.view(torch.int16) if dtype != torch.float32 else flat
            column = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(values.numpy(), kind))
            stream.write_batch(pa.record_batch([column], schema=schema))


class States:
    """The file of `write`, memory-mapped: `states[i]` is `[T, H]`, of the type in `RAW`."""

    def __init__(self, file: Path, width: int) -> None:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        chunks = table.column(COLUMN).chunks
        self.width = width
        self.parts = [(chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=True)) for chunk in chunks]
        self.starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        offsets, values = self.parts[part]
        place = index - int(self.starts[part])
        return values[offsets[place] : offsets[place + 1]].reshape(-1, self.width)


class WithStates(WithColumn):
    """Examples with their hidden states.

    Args:
        rows: the tokenized examples.
        places: the index in `states` for each example, `[len(rows)]`.
    """

    def __init__(self, rows: Any, states: States, places: np.ndarray) -> None:
        super().__init__(rows, COLUMN, states.__getitem__, places)


class StatesCollator(CachedColumnCollator):
    """Adds the hidden states of each token, and zeros for padding, while the boundary takes them.

    Padded positions reach no other position: attention masks them, or with packing they are an example of their own; they
    carry no loss.
    """

    column = COLUMN

    def __init__(self, collate: Collate, boundary: Boundary, dtype: torch.dtype) -> None:
        super().__init__(collate)
        self.boundary, self.dtype = boundary, dtype

    def added(self, values: list[list[np.ndarray]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.boundary.is_bound:
            return {}
        ids, width = batch["input_ids"], int(values[0][0].shape[1])
        padded: np.ndarray = np.zeros((len(values), ids.numel() // len(values), width), dtype=RAW[self.dtype])
        for index, rows in enumerate(values):
            start = 0
            for row in rows:
                padded[index, start : start + len(row)] = row
                start += len(row)
        return {COLUMN: torch.from_numpy(padded).view(self.dtype).view(*ids.shape, width)}  # bins may be flattened into one row


def batches_of(places: Sequence[int] | np.ndarray, size: int) -> Iterator[list[int]]:
    """Groups of `size` indices."""
    for start in range(0, len(places), size):
        yield [int(place) for place in places[start : start + size]]
