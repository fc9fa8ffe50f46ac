"""Features of a frozen vision tower, computed once and cached as a column: later epochs run without the tower.

The model stays complete. While it is trained, the tower is replaced on this instance by what returns the cached features of the
images of a batch; the projector behind it may be trained. What the model reads of the tower's output is observed once: one
tensor, or nothing is cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.data.splits import distinct
from hfstrat.errors import UserError, first_line
from hfstrat.models import vision_parts
from hfstrat.models.blocks import evaluating
from hfstrat.recipe.format import file_size, plural
from hfstrat.strategies.frozen.boundary import RAW, Batch, Refused
from hfstrat.strategies.frozen.precompute import TOLERANCE, States, write
from hfstrat.tasks.artifact import inner_of
from hfstrat.trainer import distributed
from hfstrat.trainer.cached_columns import CachedColumnCollator, WithColumn, cache_inputs, digest_of_rows, digest_of_weights
from hfstrat.trainer.train_data import TrainData

COLUMN = "vision_features"
KEY = "image.precompute"
CHECKED = 3  # rows on which the outputs with and without cached features are compared
OUTPUTS = ("last_hidden_state", "pooler_output")


class _Reached(Exception):
    """Stops a forward pass behind the tower."""


class _Observed:
    """The output of a tower, which notes what is read of it."""

    def __init__(self, output: Any, note: Callable[[str, int | None, torch.Tensor], None]) -> None:
        self._output, self._note = output, note

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._output, name)
        if name == "hidden_states" and isinstance(value, tuple | list):
            return _Layers(value, self._note)
        if name in OUTPUTS and isinstance(value, torch.Tensor):
            self._note(name, None, value)
        return value

    def __getitem__(self, place: Any) -> Any:
        raise Refused("its outputs are read by their place")


class _Layers:
    """Hidden states of a tower, by layer."""

    def __init__(self, layers: Any, note: Callable[[str, int | None, torch.Tensor], None]) -> None:
        self._layers, self._note = layers, note

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, int):
            raise Refused("several of its layers are read")
        self._note("hidden_states", place, self._layers[place])
        return self._layers[place]

    def __len__(self) -> int:
        return len(self._layers)


class _Given:
    """The output of a tower from cached features; what else is read of it is an error."""

    def __init__(self, name: str, features: torch.Tensor) -> None:
        value: Any = features if name != "hidden_states" else _Same(features)
        setattr(self, name, value)


class _Same:
    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.features


class Tower:
    """A vision tower whose features can be read and replaced.

    Args:
        model: as the Trainer gets it.
        tower: the module of it.
    """

    def __init__(self, model: nn.Module, tower: nn.Module) -> None:
        self.model, self.tower = model, tower
        self.read: list[tuple[str, int | None]] = []
        self.is_bound = False
        self._mode, self._features = "", None
        self._taken: torch.Tensor | None = None

    def bind(self) -> None:
        """Replace the tower's forward on this instance, so that the model takes `vision_features` as an input."""
        self._before, original = vars(self.tower).get("forward"), self.tower.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._features is not None:
                return _Given(self.read[0][0], self._features)
            output = original(*args, **kwargs)
            if self._mode == "observing":
                return _Observed(output, self._note)
            if self._mode == "taking":
                name, place = self.read[0]
                self._taken = getattr(output, name) if place is None else getattr(output, name)[place]
                raise _Reached
            return output

        self.tower.forward = forward  # type: ignore[method-assign]
        self._hooks = [
            self.model.register_forward_pre_hook(self._accept, with_kwargs=True),
            self.model.register_forward_hook(self._forget, always_call=True),
        ]
        self.is_bound = True

    def unbind(self) -> None:
        """Restore the tower; does nothing if it is not bound."""
        if not self.is_bound:
            return
        if self._before is None:
            del self.tower.forward
        else:
            self.tower.forward = self._before
        for hook in self._hooks:
            hook.remove()
        self.is_bound = False

    def _accept(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._features = kwargs.get(COLUMN)
        return args, {name: value for name, value in kwargs.items() if name != COLUMN}

    def _forget(self, *_: Any) -> None:
        self._features = None

    def _note(self, name: str, place: int | None, value: torch.Tensor) -> None:
        if (name, place) not in self.read:
            self.read.append((name, place))

    def observe(self, batch: Batch) -> None:
        """Note what the model reads of the tower. Raises Refused: not one tensor."""
        self._mode = "observing"
        try:
            self.model(**batch)
        finally:
            self._mode = ""
        if len(self.read) != 1:
            raise Refused(f"the model reads {plural(len(self.read), 'output')} of its vision tower")

    def take(self, batch: Batch) -> torch.Tensor:
        """The features of the images of a batch; nothing behind the tower is run."""
        self._mode = "taking"
        try:
            self.model(**batch)
        except _Reached:
            pass
        finally:
            self._mode = ""
        taken, self._taken = self._taken, None
        if taken is None:
            raise Refused("the vision tower is not called")
        return taken


class FeatureCollator(CachedColumnCollator):
    """Adds the features of the images of a batch, one after another, while the tower takes them.

    Args:
        shape: of the features of one image, without their number.
        pixels: the shape of the pixels of an image, where they are one tensor for each image: these are then not read at all.
    """

    column = COLUMN

    def __init__(self, collate: Any, tower: Tower, dtype: torch.dtype, shape: tuple[int, ...], pixels: Any) -> None:
        super().__init__(collate)
        self.tower, self.dtype, self.shape, self.pixels_of_one = tower, dtype, shape, pixels

    def __getattr__(self, name: str) -> Any:  # what the Trainer asks a collator
        if name in ("collate", "tower") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        collate: Any = self.collate
        if self.pixels_of_one is None or not self.tower.is_bound or not all(COLUMN in row for row in items):
            return super().__call__(items)
        batch = collate.texts(items)
        if count := sum(len(row["images"]) for row in items):
            batch["pixel_values"] = torch.zeros(1).expand(count, *self.pixels_of_one)
        return {**batch, **self.added([[row[COLUMN]] for row in items], batch)}

    def added(self, values: list[list[np.ndarray]], batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.tower.is_bound:
            return {}
        rows = [row for some in values for row in some if len(row)]
        if not rows:
            return {}
        joined = torch.from_numpy(np.concatenate(rows)).view(self.dtype)
        return {COLUMN: joined.reshape(-1, *self.shape)}


def cache_features(data: TrainData, model: nn.Module) -> TrainData:
    """The data with the features of the frozen vision tower as a column, if the collator is of images and this is possible.

    Raises:
        UserError: `image.precompute: true`, and it is not possible.
    """
    mode = getattr(getattr(data.collate, "processor", None), "precompute", False)
    if mode is False:
        return data
    tower = None
    try:
        tower = _tower_of(data, model, mode)
        return _with_features(data, tower)
    except Refused as refusal:
        if tower is not None:
            tower.unbind()
        if mode is True:
            raise UserError(f"{KEY}: true, but {refusal}; set auto or false") from None
        data.say(f"{'cache':<9} features of the vision tower are not cached: {refusal}")
        return data


def _tower_of(data: TrainData, model: nn.Module, mode: Any) -> Tower:
    """The tower to replace. Raises Refused."""
    inner = inner_of(model)
    found = vision_parts.module_of(inner, vision_parts.VISION)
    if distributed.is_sharded():
        raise Refused("no process has the full model on its device")
    if found is None:
        raise Refused(f"the vision tower of the family {inner.config.model_type} is not known")
    name, module = found
    if any(p.requires_grad for p in module.parameters()):
        inside = "the projector, which is inside of it, is trained" if name == "visual" else "it is trained"
        raise Refused(f"{inside} (strategy.freeze)")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules()):
        raise Refused("it has dropout")
    if mode == "auto" and (data.is_endless or data.epochs <= 1):
        raise Refused("each image is seen once" if not data.is_endless else "with max_time the number of epochs is unknown")
    return Tower(model, module)


def _with_features(data: TrainData, tower: Tower) -> TrainData:
    tower.model.to(data.device)
    started, built = time.monotonic(), list[str]()
    with data.autocast(), torch.no_grad(), evaluating(tower.model):
        sample = next((row for row in _rows(data.train) if row["images"]), None)
        if sample is None:
            raise Refused("no row has an image")
        tower.bind()
        batch = _single(data, sample)
        try:
            tower.observe(batch)
        except Refused:
            raise
        except Exception as error:  # the code of a family
            raise Refused(f"{type(error).__name__}: {first_line(error)}") from error
        example = tower.take(batch)
        shape, dtype = tuple(example.shape[1:]), example.dtype
        if dtype not in RAW:
            raise Refused(f"they are of type {dtype}")
        parts = {
            name: _fetch(data, tower, rows, shape, dtype, built) for name, rows in (("train", data.train), ("eval", data.eval))
        }
        alone = {name for name in batch if "pixel" in name or "image" in name} == {"pixel_values"}
        one_each = alone and len(sample["images"]) == batch["pixel_values"].shape[0] == example.shape[0]
        pixels = tuple(batch["pixel_values"].shape[1:]) if one_each else None
        single = FeatureCollator(data.collate.of_sequences(), tower, dtype, shape, pixels)
        collate = data.collate.with_sequences(single)
        found = data.with_rows(collate, parts["train"][0], parts["eval"][0])
        _check(found, tower)
    size, images = sum(part[1] for part in parts.values()), sum(part[2] for part in parts.values())
    seconds = time.monotonic() - started
    how = f"computed in {seconds:.1f} s" if built else "loaded from disk"
    data.say(
        f"{'cache':<9} features of the vision tower for {plural(images, 'row')}: {file_size(size)}, {how}; epochs do not run it"
    )
    facts = {COLUMN: {"rows": images, "bytes": size, "seconds": seconds, "built": built, "reads_pixels": pixels is None}}
    return replace(found, facts={**data.facts, **facts}).with_undo(tower.unbind)


def _rows(rows: Any) -> Any:
    return (rows[index] for index in range(len(rows)))


def _single(data: TrainData, row: dict[str, Any]) -> Batch:
    """A row as a batch of one sequence with its images, also where an example is two sequences."""
    return _on_device(data, [data.collate.sequence(row)], data.collate.of_sequences())


def _on_device(data: TrainData, rows: list[dict[str, Any]], collate: Any = None) -> Batch:
    batch = (collate or data.collate)(rows)
    return {name: value.to(data.device) for name, value in batch.items() if name != "labels"}


def _fetch(
    data: TrainData, tower: Tower, rows: Any, shape: tuple[int, ...], dtype: torch.dtype, built: list[str]
) -> tuple[WithColumn, int, int]:
    """The rows with their features, the bytes of these, and the number of distinct rows."""
    first, which = distinct(rows)
    inner = inner_of(tower.model)
    inputs = {
        "weights": digest_of_weights(tower.tower, trained=True),
        "rows": digest_of_rows(rows, first),
        "read": str(tower.read),
        **cache_inputs(data, inner, dtype),
    }

    def compute(index: int) -> torch.Tensor:
        row = rows[int(first[index])]
        if not row["images"]:
            return torch.empty(0, *shape, dtype=dtype)
        found = tower.take(_single(data, row)).cpu()
        if tuple(found.shape[1:]) != shape:
            raise Refused("images have features of different sizes")
        return found

    def build(target: Any) -> None:
        built.append("rows")
        with torch.no_grad():
            write(target, ([one] for one in data.each(list(range(len(first))), compute, "computing vision features")), dtype)

    text = f"features of the vision tower for {plural(len(first), 'row')}"
    entry = data.group.fetch("vision_features", cache.fingerprint(inputs), text, build, 0)
    states = States(entry.path, prod(shape))
    return WithColumn(rows, COLUMN, states.__getitem__, which), entry.size, len(first)


def _check(data: TrainData, tower: Tower) -> None:
    """Compare the outputs with and without cached features. Raises Refused: they differ."""
    places = [index for index in range(min(len(data.train), 200)) if data.train[index]["images"]][:CHECKED]
    rows = [data.train[place] for place in places]
    with_them = _on_device(data, rows)
    plain = _on_device(data, [{name: value for name, value in row.items() if name != COLUMN} for row in rows])
    try:
        stored, whole = tower.model(**with_them), tower.model(**plain)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {first_line(error)}") from error
    for name, value in whole.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            allowed = TOLERANCE[min(4, data.dtype.itemsize)] * max(1.0, float(value.abs().max()))
            if not float((stored[name].float() - value.float()).abs().max()) <= allowed:
                raise Refused(f"with them the outputs of {type(inner_of(tower.model)).__name__} change ({name})")
