"""Contrastive training of a classifier's body, before its head is solved: for a few labeled rows per class.

As in SetFit (Tunstall et al. 2022, arXiv 2209.11055), the cosine similarity of two pooled texts is trained towards 1 where
their labels are equal and towards 0 where they differ, by the loss of sentence-transformers. SetFit encodes two texts for each
pair; here the rows of a batch are encoded once, and all their pairs with equal labels, and as many with different ones, are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.errors import RunError, UserError
from hfstrat.models import pooling
from hfstrat.models.families import ENCODERS
from hfstrat.models.load import Base, cast_weights
from hfstrat.recipe.format import plural
from hfstrat.recipe.strategies import Head
from hfstrat.strategies.defaults import learning_rate
from hfstrat.strategies.head.features import INPUTS, Body
from hfstrat.trainer.cached_columns import cache_inputs, digest_of_rows, digest_of_weights
from hfstrat.trainer.train_data import TrainData

KIND = "contrastive"  # of cache entries
ROWS, MOST_CLASSES = 32, 16  # rows and classes of a batch, at most
SHARE_OF_RATE = 0.5  # of the learning rate of full fine-tuning at the width of the model
WIDE_RATE = 2e-5  # that of models as wide as those that learning_rate leaves to the strategies
WARMUP, WEIGHT_DECAY, MOST_NORM = 0.1, 0.01, 1.0


class Embeddings(nn.Module):
    """The model of sentence-transformers' losses, where the embeddings are computed already."""

    def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return given


def train_body(section: Head, body: Body, mode: str, data: TrainData, seed: int) -> dict[str, Any]:
    """Train all weights of the body on the training rows, in place; the same result is loaded from the cache.

    Args:
        mode: of pooling: mean, last or first.
        seed: of batches and dropout.

    Returns:
        What the report shows: steps, seconds, the mean loss of the first and the last steps.

    Raises:
        UserError: rows with several labels or with numbers, or no two rows of one label.
        RunError: a loss that is not finite.
    """
    labels = data.collate.encode_labels(data.train["label"][:])
    check(labels, data)
    rate = rate_of(section, body)
    inputs = {
        "weights": digest_of_weights(body.model, trained=True),
        "rows": digest_of_rows(data.train, np.arange(len(data.train))),
        "labels": labels.tolist(),
        **cache_inputs(data, body.model, data.dtype),
        "spec": [mode, section.contrastive_steps, rate, ROWS, MOST_CLASSES, WARMUP, WEIGHT_DECAY, MOST_NORM, seed],
    }

    def build(target: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        with torch.random.fork_rng(enabled=True):  # what follows is the same if this comes from the cache
            torch.manual_seed(seed)
            facts = _train(section, body, mode, data, labels, rate, seed)
        save_file({name: value.contiguous() for name, value in weights(body).items()}, target)
        return facts

    name, group = cache.fingerprint(inputs), data.group
    if group.rank == 0:
        text = f"contrastive training of {type(body.model).__name__} on {plural(len(data.train), 'row')}"
        size = sum(p.numel() * p.element_size() for p in body.model.parameters())
        cache.fetch(KIND, name, text, build, needed=size)
    group.wait()
    entry = cache.find(KIND, name)
    if all(group.gather(entry is not None)) and entry is not None:
        found, state = entry.value, read(entry.path)
    else:  # machines with other cache folders get the weights of the first process
        mine = (entry.value, read(entry.path)) if group.rank == 0 and entry is not None else ({}, {})
        found, state = group.gather(mine)[0]
    body.model.load_state_dict(state, strict=False)
    body.model.requires_grad_(False).eval()
    return found


def pooling_of(section: Head, base: Base) -> str:
    """The pooling that is set, else that of a sentence encoder's own files, else the last token of decoders and the mean."""
    if section.pooling != "auto":
        return section.pooling
    own = pooling.read(base.name_or_path, base.revision) if base.name_or_path else None
    return own.mode if own is not None else "last" if reads_left(base) else "mean"


def reads_left(base: Base) -> bool:
    """Whether a token attends only to those before it."""
    return str(base.model.config.get_text_config().model_type) not in ENCODERS


def line(facts: dict[str, Any]) -> str:
    """What was trained, for the terminal."""
    return (
        f"contrastive: the body was trained for {facts['steps']} steps in {facts['seconds']:.0f} s (learning rate "
        f"{facts['learning_rate']:.1e}), its loss from {facts['first_loss']:.3f} to {facts['last_loss']:.3f}"
    )


def check(labels: torch.Tensor, data: TrainData) -> None:
    """Refuse labels that make no pairs. Raises UserError."""
    if data.collate.units is not None or labels.dim() != 1:
        what = "numbers" if data.collate.units is not None else "several labels per row"
        raise UserError(
            f"strategy.contrastive: true: the rows have {what}, but pairs of rows with equal and with different labels are "
            "compared; remove contrastive"
        )
    counts = torch.bincount(labels)
    if int(counts.max()) < 2 or int((counts > 0).sum()) < 2:
        raise UserError(
            "strategy.contrastive: true: it needs at least two labels and two rows of one label; the training rows have "
            f"{int((counts > 0).sum())} of {len(counts)} labels, and at most {int(counts.max())} rows of one"
        )


def rate_of(section: Head, body: Body) -> float:
    """The peak learning rate: a share of that of full fine-tuning, which grows as models get narrower."""
    if section.contrastive_learning_rate != "auto":
        return float(section.contrastive_learning_rate)
    return SHARE_OF_RATE * (learning_rate("full", body.width) or WIDE_RATE)


def weights(body: Body) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once."""
    return {name: p.detach().cpu() for name, p in body.model.named_parameters()}


def read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def batches(labels: np.ndarray, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of rows: about equally many of each class drawn, at least two where a class has two."""
    source = np.random.default_rng((seed, 3))
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    at_once = min(len(classes), MOST_CLASSES)
    each = max(2, ROWS // at_once)
    for _ in range(steps):
        chosen = source.choice(len(classes), size=at_once, replace=False)
        yield np.concatenate([source.permutation(classes[number])[:each] for number in chosen])


def pairs(labels: torch.Tensor, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs of rows with equal labels, and as many with different ones: both places, and 1 or 0."""
    left, right = torch.triu_indices(len(labels), len(labels), 1)
    equal = labels[left] == labels[right]
    same, other = equal.nonzero()[:, 0], (~equal).nonzero()[:, 0]
    other = other[torch.randperm(len(other), generator=source)[: max(1, len(same))]]
    kept = torch.cat([same, other])
    return left[kept], right[kept], equal[kept].float()


def _train(
    section: Head, body: Body, mode: str, data: TrainData, labels: torch.Tensor, rate: float, seed: int
) -> dict[str, Any]:
    """AdamW in float32 on all weights of the body, with a linear warmup and decay; the weights end in their own precision."""
    from sentence_transformers.losses import CosineSimilarityLoss
    from transformers import get_linear_schedule_with_warmup

    model, steps = body.model, section.contrastive_steps
    kept = next(model.parameters()).dtype
    model.to(data.device)
    cast_weights(model, torch.float32)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    measure, source = CosineSimilarityLoss(Embeddings()), torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
    losses, started = list[float](), time.monotonic()
    for places in batches(labels.numpy(), steps, seed):
        given = {name: value for name, value in data.batch(places.tolist(), data.train).items() if name in INPUTS}
        with data.autocast():
            hidden = model(**given).last_hidden_state
        embedded = pooling.pool(hidden.float(), given["attention_mask"], mode)
        left, right, targets = (each.to(data.device) for each in pairs(labels[places], source))
        loss = measure([{"sentence_embedding": embedded[left]}, {"sentence_embedding": embedded[right]}], targets)
        if not torch.isfinite(loss):
            step = len(losses) + 1
            raise RunError(
                f"strategy.contrastive: the loss is {float(loss)} at step {step}; lower strategy.contrastive_learning_rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MOST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    cast_weights(model, kept)
    part = max(1, steps // 10)
    first, last = (float(np.mean(each)) for each in (losses[:part], losses[-part:]))
    return {
        "steps": steps,
        "learning_rate": rate,
        "seconds": time.monotonic() - started,
        "first_loss": first,
        "last_loss": last,
    }
