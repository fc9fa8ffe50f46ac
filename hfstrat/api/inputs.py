"""What is given as a Python object becomes what a recipe names: rows become a file, models and tokenizers folders.

They are stored in the cache folder under a hash of their content, so that the same objects give the same recipe: it can be
resumed, compared, and run from the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import cache
from hfstrat.errors import UserError, first_line
from hfstrat.recipe.format import plural

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = "objects"  # of models and tokenizers, in the cache folder
BATCH_ROWS = 1000
CHANGED_BY_SAVING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # keys of a config
EVALUATION_SPLITS = ("validation", "valid", "dev", "test")  # of a DatasetDict, in this order
KINDS = "a path or Hub id, a datasets.Dataset, a pandas.DataFrame, or a list of dicts"


def data_sources(train: Any, evaluation: Any) -> tuple[str | None, str | None]:
    """Paths of training and evaluation data.

    Args:
        train: a path or Hub id, a Dataset, a DatasetDict (its split train), a DataFrame, a list of dicts, or None.
        evaluation: the same, or None: the first of EVALUATION_SPLITS of a DatasetDict, else none.

    Raises:
        UserError: another type, a DatasetDict without a split train, or rows that have no common columns.
    """
    if type(train).__name__ in ("DatasetDict", "IterableDatasetDict"):
        if "train" not in train:
            raise UserError(f"train_dataset: this DatasetDict has the splits {', '.join(train)}; expected one named train")
        if evaluation is None:
            evaluation = next((train[name] for name in EVALUATION_SPLITS if name in train), None)
        train = train["train"]
    return data_source(train, "train_dataset"), data_source(evaluation, "eval_dataset")


def data_source(rows: Any, name: str) -> str | None:
    """The path of rows in any of the KINDS; a path or Hub id is returned as it is. Raises UserError."""
    if rows is None or isinstance(rows, str):
        return rows
    if isinstance(rows, os.PathLike):
        return str(Path(rows))
    found = as_dataset(rows, name)
    if not len(found):
        raise UserError(f"{name}: it has no rows; expected at least one")
    return str(stored_rows(found))


def as_dataset(rows: Any, name: str) -> Dataset:
    """A `datasets.Dataset`. Raises UserError for another type, or rows that make no table."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        if (rows.format or {}).get("type") == "custom":
            raise UserError(f"{name}: it has a transform (set_transform), which no file can hold; apply it with map(...)")
        return rows
    try:
        if type(rows).__name__ == "DataFrame":
            return Dataset.from_pandas(rows, preserve_index=False)
        if isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows):
            names = dict.fromkeys(name for row in rows for name in row)  # from_list would take those of the first row
            return Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
    except Exception as error:  # of pyarrow: a column with values of different types
        raise UserError(
            f"{name}: these rows make no table: {first_line(error)}; give each column values of one type"
        ) from error
    if type(rows).__name__ in ("DatasetDict", "IterableDatasetDict"):
        raise UserError(
            f"{name}: a DatasetDict; expected one of its splits, such as {name}=splits[{next(iter(rows), 'train')!r}]"
        )
    given = f"a list of {type(rows[0]).__name__}" if isinstance(rows, list) and rows else f"a {type(rows).__name__}"
    raise UserError(f"{name}: {given}; expected {KINDS}")


class _Hash:
    """A file that hashes what is written."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return int(self.file.write(content))

    def flush(self) -> None: ...


def stored_rows(rows: Dataset) -> Path:
    """The rows as an Arrow file with their features, in the cache, under a hash of its bytes."""
    import pyarrow as pa

    with tempfile.TemporaryDirectory(prefix=".rows-", dir=cache.folder()) as scratch:
        file = Path(scratch) / "rows.arrow"
        with file.open("wb") as stream:
            hashed = _Hash(stream)
            with pa.ipc.new_stream(hashed, rows.features.arrow_schema) as writer:
                for table in rows.with_format("arrow").iter(BATCH_ROWS):
                    writer.write_table(table.cast(rows.features.arrow_schema))
        text = f"{plural(len(rows), 'row')} given in Python"
        return cache.fetch("given", hashed.digest.hexdigest()[:32], text, lambda target: _move(file, target)).path


def _move(source: Path, target: Path) -> None:
    shutil.move(source, target)


def model_source(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Keys of the section `model` for a model and a tokenizer, each a path or Hub id, an object, or None.

    Raises:
        UserError: an adapter, or an object that is none of transformers.
    """
    named, has_name = isinstance(model, str | os.PathLike), isinstance(tokenizer, str | os.PathLike)
    if model is not None and not named:
        return {"name_or_path": str(stored_model(model, tokenizer_of(model, tokenizer)))}
    found = {"name_or_path": str(model)} if named else {}
    if tokenizer is not None:
        found["tokenizer"] = str(tokenizer) if has_name else str(stored_tokenizer(tokenizer))
    return found


def tokenizer_of(model: Any, given: Any) -> Any:
    """The tokenizer of a model object: the given one (or the one at this path), else that of where the model was loaded from.

    Raises:
        UserError: it cannot be loaded.
    """
    if given is not None and not isinstance(given, str | os.PathLike):
        return checked_tokenizer(given)
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

    source = str(given) if given is not None else str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not source:
        return None
    try:
        processors = {
            "pixel_values": AutoImageProcessor,
            "input_values": AutoFeatureExtractor,
            "input_features": AutoFeatureExtractor,
        }
        return processors.get(getattr(model, "main_input_name", ""), AutoTokenizer).from_pretrained(source)
    except Exception as error:
        raise UserError(f"tokenizer: there is none at {source}: {first_line(error)}; give one with tokenizer=...") from error


def stored_model(model: Any, tokenizer: Any) -> Path:
    """The folder of a model's weights and config as they are now, and its tokenizer.

    Raises:
        UserError: what is no PreTrainedModel, or no tokenizer.
    """
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config"):
        raise UserError(
            "model: it has an adapter; give the base model, and continue the adapter with strategy: "
            "{name: lora, adapter: FOLDER}, or merge it first (model.merge_and_unload())"
        )
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"model: a {type(model).__name__}; expected a path, a Hub id or a transformers.PreTrainedModel")
    from hfstrat.trainer.cached_columns import digest_of_weights

    if tokenizer is None:
        raise UserError(
            "tokenizer: missing; this model was not loaded from a folder or Hub id that has one. Give a tokenizer, or for a "
            "model of images or recordings its processor"
        )
    config = {key: str(value) for key, value in model.config.to_dict().items() if key not in CHANGED_BY_SAVING}
    digests = [digest_of_weights(model, trained=True), cache.tokenizer_digest(tokenizer)]
    text = json.dumps([type(model).__name__, config, *digests], sort_keys=True)

    def save(folder: str) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _stored("model", hashlib.sha256(text.encode()).hexdigest()[:32], save)


def stored_tokenizer(tokenizer: Any) -> Path:
    """The folder of a tokenizer. Raises UserError for what is none."""
    checked_tokenizer(tokenizer)
    return _stored("tokenizer", cache.tokenizer_digest(tokenizer)[:32], tokenizer.save_pretrained)


def checked_tokenizer(tokenizer: Any) -> Any:
    from transformers import FeatureExtractionMixin, ImageProcessingMixin, PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase | ImageProcessingMixin | FeatureExtractionMixin):
        raise UserError(
            f"tokenizer: a {type(tokenizer).__name__}; expected a path, a Hub id or a tokenizer of transformers "
            "(PreTrainedTokenizerFast wraps one of tokenizers)"
        )
    return tokenizer


def _stored(kind: str, digest: str, save: Callable[[str], Any]) -> Path:
    """A folder in the cache folder, written once."""
    folder = cache.folder() / FOLDER / f"{kind}-{digest}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=folder.parent))
        try:
            save(str(partial))
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def merged(recipe: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a dict with changes: nested dicts are merged, other values replaced; `a.b` is the key b of the section a."""
    found = json.loads(json.dumps(recipe, default=plain)) if recipe else {}
    for name, value in changes.items():
        path, target = name.split("."), found
        for key in path[:-1]:
            target[key] = _section(target.get(key), key)
            target = target[key]
        known, last = target.get(path[-1]), path[-1]
        is_section = isinstance(value, Mapping) and known is not None and isinstance(_section(known, last), dict)
        target[last] = merged(_section(known, last), value) if is_section else json.loads(json.dumps(value, default=plain))
    return found


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of NumPy as numbers, paths as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _section(value: Any, key: str) -> Any:
    """A section as a dict: `lora` of `strategy: lora` is its name."""
    from hfstrat.recipe.load import SHORT_FORMS

    if isinstance(value, str) and key in SHORT_FORMS:
        return {SHORT_FORMS[key]: value}
    return {} if value is None else value
