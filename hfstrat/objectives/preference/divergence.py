"""How far training has moved a model from its reference, on answers that the reference has sampled before training.

For answers y that are sampled from the reference, the mean of log p_ref(y) - log p(y) is an estimate without bias of the
divergence KL(reference || model) of whole answers (nats per answer), up to `max_new_tokens`. It needs no second model after
training: the answers and their log-probabilities are cached.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from hfstrat.data import cache
from hfstrat.data.image_chats import stored
from hfstrat.data.prepare import PreparedData
from hfstrat.data.render import IGNORED
from hfstrat.models.blocks import evaluating
from hfstrat.recipe.format import plural
from hfstrat.tasks.artifact import inner_of
from hfstrat.tasks.generation import continued, end_tokens, room
from hfstrat.trainer.cached_columns import cache_inputs, digest_of_weights, groups_of, read_column, write_column
from hfstrat.trainer.train_data import TrainData

COLUMN = "sampled_logps"
BATCH = 8  # answers of a pass
SEED = 0
VERSION = 3  # of the cached answers: increase it where they change


class Sampled(NamedTuple):
    """Answers of the reference with their prompts (and the images of these), as token rows, and their summed log-probabilities
    `[n]` (nats)."""

    rows: list[dict[str, Any]]
    logps: np.ndarray


def sampled(model: nn.Module, data: TrainData, prepared: PreparedData, most: int) -> Sampled | None:
    """Answers that this model samples to the prompts of evaluation examples, of at most `most` tokens; None without prompts."""
    prompts = [prepared.renderer.prompt_ids(each["prompt"]) for each in prepared.samples]
    if not prompts:
        return None
    tokenizer, inner = prepared.renderer.tokenizer, inner_of(model)
    images = [each["prompt"].get("images", []) if isinstance(each["prompt"], dict) else [] for each in prepared.samples]
    inputs = {
        "weights": digest_of_weights(model, trained=True),
        "prompts": prompts,
        "images": [[hashlib.sha256(ref.read()).hexdigest() for ref in some] for some in images],
        "most": most,
        "seed": SEED,
        "version": VERSION,
    }

    def build(target: Path | None) -> Any:
        rows = _answered(model, prompts, tokenizer, most, data)
        logps = logps_of(model, _with_images(rows, images), data)
        write_column(target, COLUMN, pa.float64(), [pa.array(logps)])
        return {"rows": json.dumps(rows)}

    name = cache.fingerprint({**inputs, **cache_inputs(data.unpacked, inner, data.dtype)})
    entry = data.group.fetch("reference_answers", name, f"{plural(len(prompts), 'answer')} of a reference", build)
    rows = _with_images(json.loads(entry.value["rows"]), images)
    return Sampled(rows, read_column(entry.path, COLUMN).to_numpy())


def _with_images(rows: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
    """The rows with the images of their prompts, as prepared rows have them."""
    return [row | ({"images": stored(some)} if some else {}) for row, some in zip(rows, images, strict=True)]


def _answered(model: Any, prompts: list[list[int]], tokenizer: Any, most: int, data: TrainData) -> list[dict[str, Any]]:
    """Prompts with sampled answers, in their order; the end of an answer, which is a choice of the model too, has loss."""
    rows, ends = dict[int, dict[str, Any]](), set(end_tokens(model, tokenizer) or ())
    never = getattr(tokenizer, "image_ids", None)  # a sampled token of an image would need an image
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **({"suppress_tokens": never} if never else {})}
    model.to(data.device)
    with evaluating(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())), data.autocast():
        torch.manual_seed(SEED)
        for group in groups_of(np.argsort([-len(prompt) for prompt in prompts], kind="stable"), BATCH):
            given = [prompts[place] for place in group]
            fits = max(1, room(model, max(map(len, given)), most))
            out = continued(model, given, tokenizer, fits, **options)
            for place, prompt, answer in zip(group, given, out.tolist(), strict=True):
                end = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
                labels = [IGNORED] * len(prompt) + answer[:end]
                rows[place] = {"input_ids": [*prompt, *answer[:end]], "labels": labels}
    return [rows[place] for place in range(len(prompts))]


def logps_of(model: Any, rows: list[dict[str, Any]], data: TrainData) -> np.ndarray:
    """The summed log-probabilities of the answers in token rows, `[n]` (nats)."""
    found, collate = np.zeros(len(rows)), data.unpacked.collate.plain
    with evaluating(model), torch.no_grad(), data.autocast():
        for group in groups_of(np.arange(len(rows)), BATCH):
            batch = collate([rows[place] for place in group])
            width = batch["input_ids"].shape[1]
            given = {name: tensor.to(data.device) for name, tensor in batch.items() if name != "labels"}
            nll = model(**given)["nll"].double().cpu().numpy()
            np.add.at(found, np.asarray(group)[batch["loss_rows"].numpy() // width], -nll)
    return found


def divergence(model: Any, answers: Sampled, data: TrainData) -> dict[str, np.ndarray]:
    """Of each answer: log-ratio of the reference to this model (nats), and the same per token."""
    ratios = answers.logps - logps_of(model, answers.rows, data)
    tokens = np.array([sum(label != IGNORED for label in row["labels"]) for row in answers.rows], dtype=np.float64)
    return {"kl_per_answer": ratios, "kl_per_token": ratios / np.maximum(tokens, 1)}
