"""Answers compared with their references, one number a row.

Answers to many prompts at once: batches of like length, greedy or drawn, the same for any batch."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hfstrat.evaluation.forward import Progress, Runner, Subject
from hfstrat.evaluation.intervals import Found, means
from hfstrat.tasks.generation import continued

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.evaluation import Evaluation


Compare = Callable[[str, str], float]


SHARES = ("exact_match", "regex", "json")  # each row is right or wrong


def normalised(text: str) -> str:
    """Lower case, without punctuation and English articles, single spaces: as SQuAD's own script has it (1606.05250)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, reference: str) -> float:
    return float(normalised(answer) == normalised(reference))


def f1(answer: str, reference: str) -> float:
    """Of the words that both have, after normalising; two answers without words are the same."""
    said, wanted = normalised(answer).split(), normalised(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))


def is_json(answer: str, reference: str = "") -> float:
    """Whether the whole answer is a JSON object or list."""
    try:
        return float(isinstance(json.loads(answer), dict | list))
    except (ValueError, RecursionError):
        return 0.0


def matches(pattern: str) -> Compare:
    """Whether the pattern is found; one with a group has to find in the answer what it finds in the reference."""
    wanted = re.compile(pattern)

    def compare(answer: str, reference: str) -> float:
        found = wanted.search(answer)
        if found is None or not wanted.groups:
            return float(found is not None)
        other = wanted.search(reference)
        return float(found.group(1) == (other.group(1) if other else reference.strip()))

    return compare


def rouge() -> dict[str, Compare]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, W04-1013) by `rouge-score`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorers = {name: RougeScorer([name]) for name in names}
    return {name: (lambda a, r, name=name: scorers[name].score(r, a)[name].fmeasure) for name in names}  # type: ignore[misc]


def chrf() -> Compare:
    """chrF2 of each answer (Popovic 2015, W15-3049) by `sacrebleu`, from 0 to 1; it is averaged over rows."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return lambda answer, reference: float(metric.sentence_score(answer, [reference]).score) / 100


def compared(
    names: Sequence[str], answers: Sequence[str], references: Sequence[str], pattern: str | None = None
) -> dict[str, np.ndarray]:
    """Each metric of each row, `[rows]`."""
    single: dict[str, Callable[[], dict[str, Compare]]] = {
        "exact_match": lambda: {"exact_match": exact_match},
        "f1": lambda: {"f1": f1},
        "json": lambda: {"json": is_json},
        "regex": lambda: {"regex": matches(pattern or "")},
        "rouge": rouge,
        "chrf": lambda: {"chrf": chrf()},
    }
    compare = {name: each for asked in dict.fromkeys(names) for name, each in single[asked]().items()}
    pairs = list(zip(answers, references, strict=True))
    return {name: np.array([each(a, r) for a, r in pairs]) for name, each in compare.items()}


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


def measure(subject: Subject, data: PreparedData, wanted: Evaluation, runner: Runner, seed: int) -> Found:
    """The answers to the first evaluation rows beside their references."""
    samples = [each for each in data.samples[: wanted.metric_rows] if each["reference"]]
    room = max(1, (subject.context or 1 << 30) - wanted.max_new_tokens)
    prompts = [data.renderer.prompt_ids(each["prompt"])[-room:] for each in samples]
    said = generate(subject, prompts, runner, wanted.max_new_tokens, wanted.temperature, seed)
    references = [each["reference"] for each in samples]
    columns = compared(wanted.metrics, said, references, wanted.regex)
    shares = tuple(name for name in columns if name in SHARES)
    order = hashlib.sha256(repr(references).encode()).hexdigest()
    texts = [subject.task.prompt_text(each["prompt"]) for each in samples[:SHOWN]]
    kept = [{"prompt": p, "answer": a, "reference": r} for p, a, r in zip(texts, said, references, strict=False)]
    return Found(len(samples), means(columns), shares, details={"answers": kept}, order=order)
