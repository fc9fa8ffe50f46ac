"""What hfstrat proposes for a strategy that is only named, and what it tells users about each strategy. No torch.

`hfstrat advise` and `hfstrat compare` share this module, so what is advised is what is measured: the parser of
`--strategies`, the strategy's section, its learning rate for the width of the model, the recipe as YAML, the factors by which
strategies are compared, and the type of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import yaml

from hfstrat.errors import UserError
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.tasks import TASKS

ORDER = ("head", "partial", "lora", "full", "distill", "scratch")
RATE, WIDTH, POWER = 5e-5, 2000, 0.78  # learning rate of full fine-tuning at a width: Schulman 2025, 'LoRA Without Regret'
TIMES = {"full": 1, "partial": 5, "lora": 10}  # multiples of that rate: the same source; partial: benchmarks/results/rates.md
MEASURED = {"scratch": (1e-3, 512), "distill": (6e-4, 576)}  # rate at a width; a shrunk student needs more: distill/half_depth
WIDEST = 4096  # from this width on, the defaults of the strategies apply


class ModelFacts(NamedTuple):
    """What a proposal depends on; `width` and `layers` of the model are 0 if they are unknown."""

    task: str
    model: str
    layers: int
    width: int
    architecture: str = ""


def parse_names(text: str) -> list[str]:
    """The strategies in `--strategies head,lora`. Raises UserError for an unknown name, a duplicate, or none at all."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name in STRATEGIES and name not in ORDER:
            raise UserError(
                f"--strategies: {name}: nothing is proposed for it, since it stands for many methods without measured runs; "
                f"write a recipe and measure it: hfstrat compare a.yaml b.yaml. Expected some of {', '.join(ORDER)}"
            )
        if name not in STRATEGIES:
            raise UserError(f"--strategies: {name}: no such strategy; expected some of {', '.join(ORDER)}")
    if not names or len(set(names)) < len(names):
        raise UserError(f"--strategies: {text}: expected some of {', '.join(ORDER)}, each once")
    return names


def section(name: str, about: ModelFacts) -> dict[str, Any]:
    """The keys of `strategy:` besides the name.

    Raises UserError: the strategy is impossible with this model; the message begins with the strategy.
    """
    return SECTIONS[name](about) if name in SECTIONS else {}


def learning_rate(name: str, width: int) -> float | None:
    """The learning rate for a model of this width: narrower models need larger steps. None: use the strategy's default."""
    if name in TIMES:
        return round_rate(TIMES[name] * RATE * (WIDTH / width) ** POWER) if 0 < width < WIDEST else None
    if name not in MEASURED:
        return None
    rate, measured = MEASURED[name]
    return round_rate(rate * (measured / width) ** POWER) if 0 < width < measured else rate


def round_rate(rate: float) -> float:
    return float(f"{rate:.1e}")


def recipe_text(comment: str, recipe: dict[str, Any]) -> str:
    """A proposed recipe as YAML, with a comment in its first line."""
    return f"# {comment}\n" + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def _partial(about: ModelFacts) -> dict[str, Any]:
    """A third of the blocks: upper blocks are specific to the task, lower ones to the language (ULMFiT, arXiv 1801.06146)."""
    return {"last_n_layers": max(1, round(about.layers / 3))}


def _head(about: ModelFacts) -> dict[str, Any]:
    """A head tied to the embeddings cannot be trained alone; for an untied head, `untie` changes nothing."""
    return {"untie": True} if TASKS[about.task].text.generates else {}


def _distill(about: ModelFacts) -> dict[str, Any]:
    """A student of half the depth, taught by the full model, which must already know the task.

    recipes/distill/half_depth.yaml also has `hidden_states`, which lowers the loss faster but needs the teacher while training.
    """
    task = TASKS[about.task]
    if not task.text.generates and not about.architecture.endswith(task.model.architecture):
        raise UserError(
            f"distill: {about.model} has no head trained for task {about.task}, so it cannot be a teacher; train one first and "
            "give it as --model, or write a recipe with strategy.teacher"
        )
    if about.layers < 2:
        raise UserError(f"distill: {about.model} has one layer, which cannot be halved; write a recipe with strategy.teacher")
    return {"shrink": {"layers": about.layers // 2}, "student": "full", "teacher_weight": 0.9, "baseline": False}


SECTIONS: dict[str, Callable[[ModelFacts], dict[str, Any]]] = {"partial": _partial, "head": _head, "distill": _distill}
"""The strategies that need more than their name; the others have defaults for everything."""


class Factors(NamedTuple):
    """In a few words each: the model that is used, the data that is needed, what can be changed, what can go wrong."""

    model: str
    data: str
    flexibility: str
    risks: str


FACTOR_NAMES = Factors("model used", "data needed", "flexibility", "risks")
FACTORS = {
    "scratch": Factors(
        "new: random weights from a config",
        "a lot: of text about 20 tokens per parameter (arXiv 2203.15556)",
        "everything: architecture, size, tokenizer",
        "with too little data it memorizes, or learns only how frequent words or classes are",
    ),
    "head": Factors(
        "pretrained, frozen; new head",
        "little: several examples per class",
        "the head and the layer it reads",
        "far from the pretraining domain, the features may not separate the classes",
    ),
    "partial": Factors(
        "pretrained; last blocks trained",
        "hundreds of examples",
        "which blocks and embeddings are trained",
        "some forgetting; a distant domain also needs the lower blocks",
    ),
    "lora": Factors(
        "pretrained, frozen; adapters trained",
        "hundreds of examples",
        "rank and layers; fixed architecture and tokenizer",
        "the rank may be too small for much new knowledge; forgets less than full (arXiv 2405.09673)",
    ),
    "full": Factors(
        "pretrained; all weights trained",
        "thousands of examples",
        "all weights, new tokens; fixed architecture",
        "overfitting on few examples, forgetting, highest memory use",
    ),
    "distill": Factors(
        "smaller student, frozen teacher",
        "many examples; labels are optional",
        "size and depth of the student",
        "inherits the mistakes of the teacher; the student may be too small to imitate it",
    ),
}


def factors(strategy: str) -> Factors:
    """The factors of a strategy; empty texts if it has none."""
    return FACTORS.get(strategy, Factors("", "", "", ""))


class Prediction(TypedDict, total=False):
    """What is expected of a run before it starts; any key may be missing.

    memory_bytes, memory_band: peak memory of the process as report.json has it, and (low, high).
    seconds, seconds_band: from the start to trained weights (setup_seconds + train_seconds of report.json), and (low, high).
    quality, quality_band: accuracy, or loss as a share of the base's, and (low, high) of its 80 % interval.
    rank: place among the recipes compared, from 1; missing where no quality is predicted.
    verdict, source: what is expected, and from which measured runs.
    """

    memory_bytes: float
    memory_band: tuple[float, float]
    seconds: float
    seconds_band: tuple[float, float]
    quality: float
    quality_band: tuple[float, float]
    rank: int
    verdict: str
    source: str
