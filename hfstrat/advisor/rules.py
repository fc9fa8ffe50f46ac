"""The rules of the ranking: each names its strategies, its points, the reason and the source.

A point is about a percentage point of accuracy, or a hundredth of the loss. The points of a strategy are the sum over all
rules; its reason is the sentence of the rule with most points. Apart from what fits into memory and time, this file is the
complete ranking.

More data never lowers the rank of `scratch` (a test checks it): whatever more data adds to another strategy, it adds at least
as much to `scratch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hfstrat.recipe.schema import STRATEGIES

OPTIMAL = 20.0  # tokens per parameter: arXiv 2203.15556
WORTHWHILE = 4.0  # epochs for which a repeated token is worth about as much as a new one: arXiv 2305.16264
FEW, SOME, MANY = 16.0, 100.0, 1000.0  # examples per class; of a language model, a sixteenth of the examples
ALL = ("head", "partial", "lora", "full", "distill", "scratch")
ENOUGH = {False: 100.0, True: 300.0}  # steps of 16 examples, for fine-tuning and from scratch
ADAPTED = {"lora": 1.0, "head": 2.0}  # a head is above everything that it cannot change
NOTABLE = 0.5  # points
LATE = 6.0  # points for each doubling of the time limit
LEVEL_FROM, WORST_FEW = 64.0, 20.0  # examples per class where fine-tuning draws level; points behind at 8


@dataclass(frozen=True)
class Facts:
    """What the rules depend on.

    steps: optimizer steps within the time, if all of it were training; infinite without a limit.
    late: how many times the time limit the shortest run takes, where it is longer than that.
    domain_gap: bits per byte of the base on these texts, divided by the bits it expects, minus 1; None: not measured.
    probe_gain: accuracy of a probe on the base's features, minus that of the better of majority and TF-IDF; None: not measured.
    """

    goal: str
    rows: float
    classes: int
    tokens: float
    scratch_parameters: float
    adapter_parameters: float
    domain_gap: float | None = None
    probe_gain: float | None = None
    steps: float = math.inf
    late: float = 1.0
    seconds: dict[str, float] | None = None
    artifact_bytes: dict[str, float] | None = None

    @property
    def classifies(self) -> bool:
        return self.classes > 1

    @property
    def per_class(self) -> float:
        """Examples per class; of a language model, a sixteenth of the examples."""
        return self.rows / (self.classes if self.classifies else 16.0)

    @property
    def tokens_per_parameter(self) -> float:
        """Of a model from scratch, repetitions included as far as they help."""
        return WORTHWHILE * self.tokens / max(1.0, self.scratch_parameters)


def seen_tokens(facts: Facts) -> float:
    """Different tokens that occur in the steps of training."""
    return facts.tokens * min(1.0, 16.0 * facts.steps / max(1.0, facts.rows))


class Rule(NamedTuple):
    """`points` are for one strategy; 0 if the rule does not apply."""

    name: str
    strategies: tuple[str, ...]
    points: Callable[[Facts, str], float]
    reason: str
    source: str


def scarcity(facts: Facts) -> float:
    """From 0 with many examples to 1 with few: linear in the logarithm of the examples per class."""
    return min(1.0, max(0.0, math.log(MANY / max(1.0, facts.per_class)) / math.log(MANY / FEW)))


def abundance(facts: Facts) -> float:
    """From 0 with few examples to 1 with enough."""
    return 1.0 - min(1.0, max(0.0, math.log(SOME / max(1.0, facts.per_class)) / math.log(SOME / 4.0)))


def few_examples(facts: Facts) -> float:
    """Points that fine-tuning is behind a head on frozen features: 20 with 8 examples per class, none with 64."""
    if not facts.classifies:
        return 7.0 * (1.0 - abundance(facts))
    return min(WORST_FEW, max(0.0, WORST_FEW / 3.0 * math.log2(LEVEL_FROM / max(1.0, facts.per_class))))


def little_time(facts: Facts, strategy: str) -> float:
    """Points lost: some per halving of the necessary steps; a classifier needs about a hundred examples of each class."""
    enough = ENOUGH[STRATEGIES[strategy].random_weights]
    if facts.classifies:
        enough = max(enough, SOME * facts.classes / 16.0)
    return (6.0 if facts.classifies else 3.0) * math.log2(max(1.0, enough / max(1.0, facts.steps)))


def starvation(facts: Facts) -> float:
    """0 at 20 tokens per parameter, and 1 more for each factor of ten below."""
    return max(0.0, math.log10(OPTIMAL / max(1e-9, facts.tokens_per_parameter)))


def wide_gap(facts: Facts) -> float:
    """The domain gap above 0.15, at most 1; 0 if it was not measured."""
    return max(0.0, min(1.0, (facts.domain_gap or 0.0) - 0.15))


def _speed(facts: Facts, strategy: str) -> float:
    seconds = facts.seconds or {}
    return -6.0 * math.log2(seconds[strategy] / min(seconds.values())) if strategy in seconds else 0.0


def _size(facts: Facts, strategy: str) -> float:
    sizes = facts.artifact_bytes or {}
    return -8.0 * math.log2(sizes[strategy] / min(sizes.values())) if strategy in sizes else 0.0


RULES = [
    Rule(
        "all weights",
        ("full",),
        lambda f, s: 80.0,
        "all pretrained weights adapt, at the price of optimizer states for each of them",
        "Howard and Ruder 2018, arXiv 1801.06146; benchmarks/results/classification.md",
    ),
    Rule(
        "adapters",
        ("lora",),
        lambda f, s: 81.0,
        "adapters match full fine-tuning on small and medium data, forget less, and need the least memory",
        "arXiv 2405.09673; benchmarks/results/classification.md (trec6: lora .968, partial .962)",
    ),
    Rule(
        "last layers",
        ("partial",),
        lambda f, s: 80.4 if f.classifies else 79.0,
        "the last layers are trained; the others only run forward, or are cached",
        "benchmarks/results/classification.md (trec6 .962, sst2 .873, head .809); language models: rates.md "
        "(2% behind LoRA); Hu et al., arXiv 2106.09685, table 3 (GPT-2's last two blocks 68.1 BLEU, LoRA 70.4)",
    ),
    Rule(
        "frozen features",
        ("head",),
        lambda f, s: 75.5 if f.classifies else 62.0,
        "the body runs once and only the head is solved: fastest, forgets nothing, limited by the pretrained features",
        "benchmarks/results/classification.md (banking77 .930; sst2 .809, partial .873); head_epochs.md",
    ),
    Rule(
        "few examples, many weights",
        ("full", "distill", "scratch"),
        lambda f, s: -6.0 * scarcity(f),
        "training all weights overfits at this size",
        "arXiv 1811.01088 and 2006.05987 (fine-tuning BERT on small sets is unstable); 2405.09673",
    ),
    Rule(
        "few examples",
        ("full", "partial", "lora", "distill", "scratch"),
        lambda f, s: -few_examples(f),
        "with so few examples fine-tuning distorts pretrained features; a head alone is better, also on other texts",
        "Kumar et al. 2022, arXiv 2202.10054; Tunstall et al. 2022, arXiv 2209.11055 (8 to 64 examples per class)",
    ),
    Rule(
        "a medium number of examples",
        ("partial", "scratch"),
        lambda f, s: -1.0 * scarcity(f),
        "too few examples to train the last layers well",
        "benchmarks/results/classification.md",
    ),
    Rule(
        "capacity of adapters",
        ("lora", "head"),
        lambda f, s: (
            0.0
            if f.classifies
            else -3.0 * max(0.0, math.log10(max(1.0, 2.0 * seen_tokens(f) / max(1.0, f.adapter_parameters)))) * ADAPTED[s]
        ),
        "the training tokens hold more information than the trainable parameters can store (about two bits each)",
        "Schulman 2025, 'LoRA Without Regret'; arXiv 2404.05405 (two bits per parameter)",
    ),
    Rule(
        "domain gap",
        ("head", "partial"),
        lambda f, s: -10.0 * {"partial": 1.0, "head": 2.0}[s] * wide_gap(f),
        "the texts differ from the pretraining data, so many weights have to change, also below the last layers",
        "arXiv 2004.10964 (Don't Stop Pretraining); measured as in arXiv 1906.05664; regret.md (shakespeare)",
    ),
    Rule(
        "probe",
        ("head",),
        lambda f, s: 40.0 * max(-0.25, min(0.12, f.probe_gain - 0.03)) if f.probe_gain is not None else 0.0,
        "a probe on the pretrained features was compared with TF-IDF on these examples",
        "measured on this machine; benchmarks/results/classification.md (sst2: probe .811, TF-IDF .813, partial .873)",
    ),
    Rule(
        "little time",
        ("partial", "lora", "full", "distill", "scratch"),
        lambda f, s: -little_time(f, s),
        "the time allows only a few steps, which favors a solved head and strategies that converge fast",
        "benchmarks/results/quickstart.md (most of the gain in 120 steps), scratch_recipes.md; arXiv 2003.04807 and regret.md "
        "(77 classes)",
    ),
    Rule(
        "late",
        ALL,
        lambda f, s: -LATE * math.log2(max(1.0, f.late)),
        "it is expected to end after the time limit",
        "--time",
    ),
    Rule(
        "from scratch",
        ("scratch",),
        lambda f, s: 78.0 - 16.0 * starvation(f) + 6.0 * wide_gap(f),
        "architecture and tokenizer are free, but everything has to be learned: about 20 tokens per parameter",
        "Hoffmann et al. 2022, arXiv 2203.15556; Muennighoff et al. 2023, arXiv 2305.16264 (4 epochs); Hernandez et al. 2021, "
        "arXiv 2102.01293 (pretraining helps less on other texts, and hardly ever harms); scratch_recipes.md",
    ),
    Rule(
        "a smaller model",
        ("distill",),
        lambda f, s: 74.0 - 2.0 * f.classifies,
        "a student with half the layers imitates the full model: smaller and faster, at some loss of quality",
        "arXiv 1910.01108 (DistilBERT retains 97%); benchmarks/results/distill.md (0.047 to 0.063 nats better than no teacher)",
    ),
    Rule(
        "goal: speed",
        ALL,
        lambda f, s: _speed(f, s) if f.goal == "speed" else 0.0,
        "each doubling of the training time costs 6 points",
        "--goal",
    ),
    Rule(
        "goal: size",
        ALL,
        lambda f, s: _size(f, s) if f.goal == "size" else 0.0,
        "each doubling of the size of the result costs 8 points",
        "--goal",
    ),
]


class Score(NamedTuple):
    """The sum of points, and the rules behind it, those with most points first."""

    points: float
    parts: list[tuple[Rule, float]]

    def reasons(self) -> list[tuple[str, str]]:
        """The sentence of the rule with most points and of the next notable one, each with its source."""
        other = next(((rule, points) for rule, points in self.parts[1:] if abs(points) >= NOTABLE), None)
        first = [(rule.reason, rule.source) for rule, _ in self.parts[:1]]
        return first + ([(f"{other[0].reason} ({other[1]:+.1f})", other[0].source)] if other else [])


def score(facts: Facts, strategy: str) -> Score:
    """Apply the rules to a strategy; the points equal the sum of the parts."""
    parts = [(rule, rule.points(facts, strategy)) for rule in RULES if strategy in rule.strategies]
    parts = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))
    return Score(sum(points for _, points in parts), parts)
