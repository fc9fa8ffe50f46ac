"""Answers to many prompts at once: batches of like length, greedy or drawn, the same for any batch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hfstrat.evaluation import text_metrics
from hfstrat.evaluation.intervals import Found, means
from hfstrat.evaluation.loop import Runner
from hfstrat.evaluation.progress import Progress
from hfstrat.evaluation.subject import Subject
from hfstrat.generation import continued

if TYPE_CHECKING:
    from hfstrat.config import Evaluation
    from hfstrat.data import Prepared

SHOWN = 100  # answers that the report keeps


class Drawn(LogitsProcessor):  # type: ignore[misc]
    """Makes the largest logit a draw from the softmax at a temperature: Gumbel noise is added (Maddison et al. 2014,
    arXiv 1411.0030), of a generator that each row has for itself, so that a draw depends on no other row.
    """

    def __init__(self, temperature: float, seeds: list[int]) -> None:
        self.temperature = temperature
        self.sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=source) for source in self.sources])
        return scores.float() / self.temperature - noise.log().to(scores.device)


def generate(
    subject: Subject, prompts: list[list[int]], runner: Runner, most: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """The answers to prompts as token ids, in their order, on every process.

    Prompts are padded on the left. In float32 the answers do not depend on how they are batched but for rounding, which decides
    between tokens of equal chance; in 16 bits rounding is coarser, and a few answers may differ.
    """
    lengths = np.array([len(ids) for ids in prompts])
    batches = runner.share(runner.batches(lengths + most))
    mine: list[tuple[int, str]] = []
    with Progress(runner.screen, "answers", len(batches)) as progress, runner.computing():
        for batch, counts in batches:
            drawn = [Drawn(temperature, [_seed(seed, prompts[place]) for place in batch])] if temperature else []
            texts = _batch(subject, [prompts[place] for place in batch], most, drawn)
            mine += list(zip(batch, texts, strict=True)) if counts else []
            progress.advance(1)
    found = {place: text for part in runner.gather(mine) for place, text in part}
    return [found[place] for place in range(len(prompts))]


def _seed(seed: int, ids: list[int]) -> int:
    """A row's own, wherever it stands."""
    return int.from_bytes(hashlib.sha256(f"{seed} {ids}".encode()).digest()[:7], "little")


def _batch(subject: Subject, prompts: list[list[int]], most: int, processors: list[Any]) -> list[str]:
    if subject.context is not None:  # there are no positions beyond
        most = max(1, min(most, subject.context - max(map(len, prompts))))
    out = continued(subject.model, prompts, subject.tokenizer, most, logits_processor=LogitsProcessorList(processors))
    return [_decoded(subject.tokenizer, row.tolist()) for row in out]


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def measure(subject: Subject, data: Prepared, wanted: Evaluation, runner: Runner, seed: int) -> Found:
    """The answers to the first evaluation rows beside their references."""
    samples = [each for each in data.samples[: wanted.metric_rows] if each["reference"]]
    room = max(1, (subject.context or 1 << 30) - wanted.max_new_tokens)
    prompts = [data.renderer.prompt_ids(each["prompt"])[-room:] for each in samples]
    said = generate(subject, prompts, runner, wanted.max_new_tokens, wanted.temperature, seed)
    references = [each["reference"] for each in samples]
    columns = text_metrics.compared(wanted.metrics, said, references, wanted.regex)
    shares = tuple(name for name in columns if name in text_metrics.SHARES)
    order = hashlib.sha256(repr(references).encode()).hexdigest()
    texts = [subject.task.prompt_text(each["prompt"]) for each in samples[:SHOWN]]
    kept = [{"prompt": p, "answer": a, "reference": r} for p, a, r in zip(texts, said, references, strict=False)]
    return Found(len(samples), means(columns), shares, details={"answers": kept}, order=order)
