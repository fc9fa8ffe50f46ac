"""Generated answers and their comparison with references, one number per example and metric.

Prompts of similar length are answered in a batch, greedily or by sampling; an answer does not depend on its batch.
"""

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
from hfstrat.evaluation.intervals import Measurement, means
from hfstrat.tasks.generation import continued

if TYPE_CHECKING:
    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.schema import Evaluation


Compare = Callable[[str, str], float]

SHARES = ("exact_match", "regex", "json")  # each example is right or wrong
LENGTH = "answer_tokens"  # the metric `length`


def normalize(text: str) -> str:
    """The text in lower case, without punctuation and English articles: as in SQuAD's own script (1606.05250)."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, reference: str) -> float:
    return float(normalize(answer) == normalize(reference))


def f1(answer: str, reference: str) -> float:
    """F1 of the normalized words of answer and reference; 1 if neither has words."""
    given, expected = normalize(answer).split(), normalize(reference).split()
    if not given or not expected:
        return float(given == expected)
    common = sum((Counter(given) & Counter(expected)).values())
    return 2 * common / (len(given) + len(expected))


def is_json(answer: str, reference: str = "") -> float:
    """Whether the complete answer is a JSON object or list."""
    try:
        return float(isinstance(json.loads(answer), dict | list))
    except (ValueError, RecursionError):
        return 0.0


def matches(pattern: str) -> Compare:
    """Whether the pattern matches; a pattern with a group must capture the same in the answer as in the reference."""
    compiled = re.compile(pattern)

    def compare(answer: str, reference: str) -> float:
        found = compiled.search(answer)
        if found is None or not compiled.groups:
            return float(found is not None)
        other = compiled.search(reference)
        return float(found.group(1) == (other.group(1) if other else reference.strip()))

    return compare


def rouge() -> dict[str, Compare]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, W04-1013) by `rouge-score`, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorers = {name: RougeScorer([name]) for name in names}
    return {name: (lambda a, r, name=name: scorers[name].score(r, a)[name].fmeasure) for name in names}  # type: ignore[misc]


def chrf() -> Compare:
    """chrF2 of each answer (Popovic 2015, W15-3049) by `sacrebleu`, from 0 to 1; averaged over examples."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return lambda answer, reference: float(metric.sentence_score(answer, [reference]).score) / 100


def compare_answers(
    names: Sequence[str], answers: Sequence[str], references: Sequence[str], pattern: str | None = None
) -> dict[str, np.ndarray]:
    """Each metric of each example, `[examples]`."""
    single: dict[str, Callable[[], dict[str, Compare]]] = {
        "exact_match": lambda: {"exact_match": exact_match},
        "f1": lambda: {"f1": f1},
        "json": lambda: {"json": is_json},
        "regex": lambda: {"regex": matches(pattern or "")},
        "rouge": rouge,
        "chrf": lambda: {"chrf": chrf()},
    }
    compare = {name: each for metric in dict.fromkeys(names) if metric in single for name, each in single[metric]().items()}
    pairs = list(zip(answers, references, strict=True))
    return {name: np.array([each(a, r) for a, r in pairs]) for name, each in compare.items()}


MAX_REPORTED = 100  # answers that the report contains


class GumbelSampling(LogitsProcessor):  # type: ignore[misc]
    """Sampling at a temperature by greedy search: with Gumbel noise (Maddison et al. 2014, arXiv 1411.0030) added, the largest
    logit is a sample. Each row has its own generator, so that a sample depends on no other row.
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
    """The answers to prompts (token ids), in their order, on every process.

    Prompts are padded on the left. In float32, answers depend on batching only if rounding decides between tokens of equal
    probability; with 16 bits rounding is coarser, and a few answers may differ.
    """
    lengths = np.array([len(ids) for ids in prompts])
    batches = runner.share(runner.batches(lengths + most))
    mine: list[tuple[int, str]] = []
    with Progress(runner.screen, "answers", len(batches)) as progress, runner.computing():
        for batch, counts in batches:
            sampling = [GumbelSampling(temperature, [_seed(seed, prompts[place]) for place in batch])] if temperature else []
            texts = _generate_batch(subject, [prompts[place] for place in batch], most, sampling)
            mine += list(zip(batch, texts, strict=True)) if counts else []
            progress.advance(1)
    found = {place: text for part in runner.gather(mine) for place, text in part}
    return [found[place] for place in range(len(prompts))]


def _seed(seed: int, ids: list[int]) -> int:
    """The seed of an example, which does not depend on its position."""
    return int.from_bytes(hashlib.sha256(f"{seed} {ids}".encode()).digest()[:7], "little")


def _generate_batch(subject: Subject, prompts: list[list[int]], most: int, processors: list[Any]) -> list[str]:
    if subject.context is not None:  # the model has no positions beyond it
        most = max(1, min(most, subject.context - max(map(len, prompts))))
    out = continued(subject.model, prompts, subject.tokenizer, most, logits_processor=LogitsProcessorList(processors))
    return [_decode(subject.tokenizer, row.tolist()) for row in out]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def measure(subject: Subject, data: PreparedData, wanted: Evaluation, runner: Runner, seed: int) -> Measurement:
    """The metrics of the answers to the first evaluation examples."""
    samples = [each for each in data.samples[: wanted.metric_rows] if each["reference"]]
    room = max(1, (subject.context or 1 << 30) - wanted.max_new_tokens)
    prompts = [data.renderer.prompt_ids(each["prompt"])[-room:] for each in samples]
    answers = generate(subject, prompts, runner, wanted.max_new_tokens, wanted.temperature, seed)
    references = [each["reference"] for each in samples]
    columns = compare_answers(wanted.metrics, answers, references, wanted.regex)
    if "length" in wanted.metrics:
        ids = subject.tokenizer(answers, add_special_tokens=False)["input_ids"]
        columns[LENGTH] = np.array([float(len(each)) for each in ids])
    shares = tuple(name for name in columns if name in SHARES)
    order = hashlib.sha256(repr(references).encode()).hexdigest()
    texts = [subject.task.text.prompt(each["prompt"]) for each in samples[:MAX_REPORTED]]
    reported = [{"prompt": p, "answer": a, "reference": r} for p, a, r in zip(texts, answers, references, strict=False)]
    return Measurement(len(samples), means(columns), shares, details={"answers": reported}, order=order)
