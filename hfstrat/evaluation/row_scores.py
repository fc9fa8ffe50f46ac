"""The scores of each evaluation example, stored next to a run's report, so that two runs can be compared example by example.

Numpy only: `compare` reads these files without importing torch.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData

FILE = "evaluation_rows.npz"  # in the run's folder

Columns = dict[str, np.ndarray]


def write(folder: Path, data: PreparedData, columns: Columns) -> None:
    """Write the columns (`[examples]` each) with the index of each example in its source.

    The file also holds the number of `bytes` behind the supervised tokens, if the tokenizer determines it exactly. Nothing is
    written if the columns belong to other examples, as after training with another library's trainer.
    """
    if len(columns["nll"]) != len(data.eval):
        return
    stored = {"row": np.asarray(data.eval["row"][:], dtype=np.int64), **columns}
    if (sizes := supervised_bytes(data)) is not None:
        stored["bytes"] = sizes
    np.savez_compressed(folder / FILE, **stored)  # type: ignore[arg-type]


def supervised_bytes(data: PreparedData) -> np.ndarray | None:
    """Bytes of text behind the supervised tokens of each evaluation example, `[examples]`.

    Returns:
        None if the examples have labels instead, or if the tokens of this tokenizer do not correspond to bytes.
    """
    from hfstrat.data.token_bytes import token_bytes
    from hfstrat.trainer.baselines import row_bytes

    sizes = None if data.label_names else token_bytes(data.renderer.tokenizer)
    return None if sizes is None else row_bytes(data.eval, sizes)


def read(folder: Path) -> Columns:
    """The stored columns and two derived ones (`rows`, `bits`), by ascending `row`; the pieces of a split example are summed.

    Returns:
        An empty dict if the file is missing or incomplete.
    """
    try:
        with np.load(folder / FILE) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    numbers, first, place = np.unique(stored.pop("row"), return_index=True, return_inverse=True)
    joined = {
        name: values[first] if values.dtype.kind == "i" else np.bincount(place, weights=values, minlength=len(numbers))
        for name, values in stored.items()
    }
    return {"row": numbers, "rows": np.ones(len(numbers)), "bits": joined["nll"] / math.log(2), **joined}
