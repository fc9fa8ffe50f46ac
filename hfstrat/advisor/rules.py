"""The rules of the verdict: each says for which strategies it holds, what it is worth, why, and where that is from.

Points are about those of accuracy (of 100), or hundredths of the loss. A strategy's standing is the sum over the rules; its
reason is the sentence of the weightiest. Read from the top: this file is all there is to the ranking, beside what fits.

What more data change, they change for `scratch` by at least as much as for any other strategy, so that more data never lower
its standing (held by a test): what small data cost the others, they cost scratch too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from hfstrat.recipe.schema import STRATEGIES

OPTIMAL = 20.0  # tokens a parameter: arXiv 2203.15556
WORTHWHILE = 4.0  # epochs up to which a repeated token is worth about a new one: arXiv 2305.16264
FEW, SOME, MANY = 16.0, 100.0, 1000.0  # rows a class, or a sixteenth of the rows of a language model's data
ALL = ("head", "partial", "lora", "full", "distill", "scratch")
ENOUGH = {False: 100.0, True: 300.0}  # steps of 16 rows, of fine-tuning and from scratch
ADAPTED = {"lora": 1.0, "head": 2.0}  # a head stands above all that it cannot change
WORTH_SAYING = 0.5  # points
LEVEL_FROM, WORST_FEW = 64.0, 20.0  # rows a class from which fine-tuning is level; points that it is behind at 8


@dataclass(frozen=True)
class Facts:
    """What the rules look at. `steps`: how many there are in the time, were all of it training; none were asked for: infinite.

    `unlike`: bits that the base needs for these texts over those that it expected to need, minus 1. `probe_gain`: accuracy of a
    probe on the base's features over that of the best of majority and TF-IDF; None where they were not measured.
    """

    task: str
    goal: str
    rows: float
    classes: int
    tokens: float
    parameters: float
    scratch_parameters: float
    adapter_parameters: float
    unlike: float | None = None
    probe_gain: float | None = None
    steps: float = math.inf
    seconds: dict[str, float] | None = None
    artefact: dict[str, float] | None = None

    @property
    def classifies(self) -> bool:
        return self.task == "text-classification"

    @property
    def each(self) -> float:
        """Rows a class; of a language model's data a sixteenth of the rows."""
        return self.rows / (self.classes if self.classifies else 16.0)

    @property
    def tokens_per_parameter(self) -> float:
        """Of a model from scratch, with repetition as far as it is worth something."""
        return WORTHWHILE * self.tokens / max(1.0, self.scratch_parameters)


def seen(facts: Facts) -> float:
    """Different tokens that training gets to see in its steps."""
    return facts.tokens * min(1.0, 16.0 * facts.steps / max(1.0, facts.rows))


class Rule(NamedTuple):
    """`points` is for one strategy; 0 where the rule does not hold."""

    name: str
    strategies: tuple[str, ...]
    points: Callable[[Facts, str], float]
    says: str
    source: str


def scarce(facts: Facts) -> float:
    """0 where there are many rows, 1 where there are few: falls with the logarithm of the rows a class."""
    return min(1.0, max(0.0, math.log(MANY / max(1.0, facts.each)) / math.log(MANY / FEW)))


def plenty(facts: Facts) -> float:
    return 1.0 - min(1.0, max(0.0, math.log(SOME / max(1.0, facts.each)) / math.log(SOME / 4.0)))


def few(facts: Facts) -> float:
    """Points that fine-tuning is behind features and a head: 20 with 8 rows a class, none with 64."""
    if not facts.classifies:
        return 7.0 * (1.0 - plenty(facts))
    return min(WORST_FEW, max(0.0, WORST_FEW / 3.0 * math.log2(LEVEL_FROM / max(1.0, facts.each))))


def cut_short(facts: Facts, strategy: str) -> float:
    """Points for each halving of the steps that are enough; a classifier wants to have seen a hundred rows of each class."""
    enough = ENOUGH[STRATEGIES[strategy].random_weights]
    if facts.classifies:
        enough = max(enough, SOME * facts.classes / 16.0)
    return (6.0 if facts.classifies else 3.0) * math.log2(max(1.0, enough / max(1.0, facts.steps)))


def starved(facts: Facts) -> float:
    """0 at 20 tokens a parameter, 1 for each factor of ten less."""
    return max(0.0, math.log10(OPTIMAL / max(1e-9, facts.tokens_per_parameter)))


def _speed(facts: Facts, strategy: str) -> float:
    seconds = facts.seconds or {}
    return -6.0 * math.log2(seconds[strategy] / min(seconds.values())) if strategy in seconds else 0.0


def _size(facts: Facts, strategy: str) -> float:
    sizes = facts.artefact or {}
    return -8.0 * math.log2(sizes[strategy] / min(sizes.values())) if strategy in sizes else 0.0


RULES = [
    Rule(
        "all of it learns",
        ("full",),
        lambda f, s: 80.0,
        "the whole body adapts from pretrained weights, at the price of moments for each of them",
        "Howard and Ruder 2018, arXiv 1801.06146; benchmarks/results/classification.md",
    ),
    Rule(
        "adapters",
        ("lora",),
        lambda f, s: 81.0,
        "adapters reach what full fine-tuning does on small and middling data, forget less, and cost least memory",
        "arXiv 2405.09673; benchmarks/results/classification.md (trec6: lora .968, partial .962)",
    ),
    Rule(
        "part of the body",
        ("partial",),
        lambda f, s: 80.4 if f.classifies else 79.0,
        "the last layers learn, the rest runs forward only, or once",
        "benchmarks/results/classification.md (trec6 .962, sst2 .873 against .809 of the head); of language models rates.md "
        "(2 % behind LoRA); Hu et al., arXiv 2106.09685, table 3 (GPT-2's last two blocks 68.1 BLEU, LoRA 70.4)",
    ),
    Rule(
        "features as they are",
        ("head",),
        lambda f, s: 75.5 if f.classifies else 62.0,
        "the body runs once and only the head is solved, so it is quickest and cannot forget; what the features lack it lacks",
        "benchmarks/results/classification.md (banking77 .930; sst2 .809 against .873 of partial); head_epochs.md",
    ),
    Rule(
        "few rows, many weights",
        ("full", "distill", "scratch"),
        lambda f, s: -6.0 * scarce(f),
        "with so few rows all weights would learn the noise",
        "arXiv 1811.01088 and 2006.05987 (fine-tuning BERT on small sets is unstable); 2405.09673",
    ),
    Rule(
        "few rows",
        ("full", "partial", "lora", "distill", "scratch"),
        lambda f, s: -few(f),
        "with so few rows fine-tuning distorts what the features know; the head alone does better, also on other texts",
        "Kumar et al. 2022, arXiv 2202.10054; Tunstall et al. 2022, arXiv 2209.11055 (8 to 64 rows a class)",
    ),
    Rule(
        "a middling number of rows",
        ("partial", "scratch"),
        lambda f, s: -1.0 * scarce(f),
        "fewer rows than the last layers need to be shaped well",
        "benchmarks/results/classification.md",
    ),
    Rule(
        "more to learn than adapters hold",
        ("lora", "head"),
        lambda f, s: (
            0.0
            if f.classifies
            else -3.0 * max(0.0, math.log10(max(1.0, 2.0 * seen(f) / max(1.0, f.adapter_parameters)))) * ADAPTED[s]
        ),
        "the tokens that are seen hold more bits than the adapters have room for (about two a parameter and pass)",
        "Schulman 2025, 'LoRA Without Regret'; arXiv 2404.05405 (two bits a parameter)",
    ),
    Rule(
        "a dissimilar domain",
        ("head", "partial"),
        lambda f, s: -10.0 * max(0.0, min(1.0, f.unlike - 0.15)) * {"partial": 1.0, "head": 2.0}[s] if f.unlike else 0.0,
        "the texts are unlike what the base was trained on: much has to move, and below the last layers too",
        "arXiv 2004.10964 (Don't Stop Pretraining); measured as in 1906.05664; regret.md (shakespeare)",
    ),
    Rule(
        "features measured",
        ("head",),
        lambda f, s: 40.0 * max(-0.25, min(0.12, f.probe_gain - 0.03)) if f.probe_gain is not None else 0.0,
        "a probe on the base's features was compared with TF-IDF on these very rows",
        "measured here; benchmarks/results/classification.md (sst2: probe .811, TF-IDF .813, partial .873)",
    ),
    Rule(
        "cut short",
        ("partial", "lora", "full", "distill", "scratch"),
        lambda f, s: -cut_short(f, s),
        "the time is over after few steps, and what is solved or learns quickly is further by then",
        "benchmarks/results/quickstart.md (most of the gain in 120 steps), scratch_recipes.md; arXiv 2003.04807 and regret.md "
        "(77 classes)",
    ),
    Rule(
        "learnt anew",
        ("scratch",),
        lambda f, s: 78.0 - 16.0 * starved(f) + 6.0 * max(0.0, min(1.0, (f.unlike or 0.0) - 0.15)),
        "everything, also the tokenizer, is free, and everything has to be learnt: it wants 20 tokens a parameter",
        "Hoffmann et al. 2022, arXiv 2203.15556; Muennighoff et al. 2023, arXiv 2305.16264 (4 epochs); Hernandez et al. 2021, "
        "arXiv 2102.01293 (what was learnt before helps less on other texts, and hardly ever harms); scratch_recipes.md",
    ),
    Rule(
        "a smaller model",
        ("distill",),
        lambda f, s: 74.0 - 2.0 * f.classifies,
        "half the layers learn what the whole model says: a smaller and faster model at some loss of quality",
        "arXiv 1910.01108 (DistilBERT keeps 97 %); benchmarks/results/distill.md (0.047 to 0.063 nats over no teacher)",
    ),
    Rule(
        "the goal: speed",
        ALL,
        lambda f, s: _speed(f, s) if f.goal == "speed" else 0.0,
        "each doubling of the time counts as much as 6 points",
        "the goal that was given",
    ),
    Rule(
        "the goal: size",
        ALL,
        lambda f, s: _size(f, s) if f.goal == "size" else 0.0,
        "each doubling of what has to be loaded counts as much as 8 points",
        "the goal that was given",
    ),
]


class Score(NamedTuple):
    """The sum, and the rules that made it, the weightiest first."""

    points: float
    parts: list[tuple[Rule, float]]

    def reasons(self) -> list[tuple[str, str]]:
        """What it stands for most and the weightiest beside that, as words with points, and their sources."""
        beside = next(((rule, points) for rule, points in self.parts[1:] if abs(points) >= WORTH_SAYING), None)
        first = [(rule.says, rule.source) for rule, _ in self.parts[:1]]
        return first + ([(f"{beside[0].says} ({beside[1]:+.1f})", beside[0].source)] if beside else [])


def score(facts: Facts, strategy: str) -> Score:
    """What the rules say of a strategy; the sum equals its parts."""
    parts = [(rule, rule.points(facts, strategy)) for rule in RULES if strategy in rule.strategies]
    parts = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))
    return Score(sum(points for _, points in parts), parts)
