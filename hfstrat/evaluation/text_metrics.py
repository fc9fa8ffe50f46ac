"""Answers compared with their references, one number a row."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

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
