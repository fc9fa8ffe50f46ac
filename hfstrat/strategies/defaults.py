"""What hfstrat proposes of a strategy where only its name was given: its section, and a learning rate for the model's size.

`hfstrat advise` and `hfstrat compare` both have it from here, so that what is advised is what is measured. No torch.


The factors of the choice, one text for each strategy: what advice and comparison are laid out by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

from hfstrat.errors import UserError
from hfstrat.tasks import TASKS

ORDER = ("head", "partial", "lora", "full", "distill", "scratch")


RATE, WIDTH, POWER = 5e-5, 2000, 0.78  # of all weights in a model so wide, and by width: Schulman 2025, 'LoRA Without Regret'


TIMES = {"full": 1, "partial": 5, "lora": 10}  # that rate: the same source; partial: benchmarks/results/rates.md


KNOWN = {"scratch": (1e-3, 512), "distill": (6e-4, 576)}  # what has lost layers wants more than fine-tuning: distill/half_depth


WIDEST = 4096  # from here on the strategies' defaults hold


class About(NamedTuple):
    """What a proposal depends on; `width` and `layers` of the model, 0 where they are not known."""

    task: str
    model: str
    layers: int
    width: int
    architecture: str = ""


def section(name: str, about: About) -> dict[str, Any]:
    """Keys of `strategy:` beside the name.

    Raises:
        UserError: the strategy cannot be had with this model; begins with the strategy.
    """
    return SECTIONS[name](about) if name in SECTIONS else {}


def learning_rate(name: str, width: int) -> float | None:
    """Narrower models want larger steps than those that the defaults are from; None: the default is right, or nothing steps."""
    if name in TIMES:
        return round_rate(TIMES[name] * RATE * (WIDTH / width) ** POWER) if 0 < width < WIDEST else None
    if name not in KNOWN:
        return None
    rate, known = KNOWN[name]
    return round_rate(rate * (known / width) ** POWER) if 0 < width < known else rate


def round_rate(rate: float) -> float:
    return float(f"{rate:.1e}")


def _partial(about: About) -> dict[str, Any]:
    """A third of the blocks: the upper ones are the task's, the lower ones the language's (ULMFiT, arXiv 1801.06146)."""
    return {"last_n_layers": max(1, round(about.layers / 3))}


def _head(about: About) -> dict[str, Any]:
    """A head that is the embeddings cannot learn alone; of one that is not, `untie` changes nothing."""
    return {"untie": True} if TASKS[about.task].unit == "token" else {}


def _distill(about: About) -> dict[str, Any]:
    """Half the depth, taught by the whole, which has to know the task; recipes/distill/half_depth.yaml has `hidden` too, by
    which more is learnt in few steps, and the teacher has to stay."""
    task = TASKS[about.task]
    if task.unit != "token" and not about.architecture.endswith(task.architecture):
        raise UserError(
            f"distill: {about.model} has no head that was trained for task: {about.task}, so it has nothing to teach; train "
            "one first and name it as --model, or give a recipe with strategy.teacher"
        )
    if about.layers < 2:
        raise UserError(f"distill: {about.model} has one layer, so there is no half of it; give a recipe with strategy.teacher")
    return {"shrink": {"layers": about.layers // 2}, "student": "full", "alpha": 0.9, "baseline": False}


SECTIONS: dict[str, Callable[[About], dict[str, Any]]] = {"partial": _partial, "head": _head, "distill": _distill}
"""What a strategy needs beside its name; the others have defaults for all of it."""


class Factors(NamedTuple):
    """In a few words each: which model is used, what data it wants, what may change, what can go wrong."""

    model: str
    data: str
    flexibility: str
    risks: str


WORDS = Factors("model used", "data needed", "flexibility", "risks")


FACTORS = {
    "scratch": Factors(
        "new: random weights, from a config",
        "much: about 20 tokens a parameter (arXiv 2203.15556)",
        "all: architecture, size, tokenizer",
        "too little data: it learns by heart, or only how often words come",
    ),
    "head": Factors(
        "pretrained, frozen; a new head",
        "little: some rows a class",
        "the head, and which layer it reads",
        "a domain unlike the pretraining: the features do not tell it",
    ),
    "partial": Factors(
        "pretrained; its last blocks learn",
        "some hundred rows",
        "which blocks and embeddings learn",
        "some forgetting; a far domain needs the lower blocks too",
    ),
    "lora": Factors(
        "pretrained, frozen; adapters beside it",
        "some hundred rows",
        "rank and layers; architecture and tokenizer stay",
        "a rank too small for much new knowledge; it forgets less than full (arXiv 2405.09673)",
    ),
    "full": Factors(
        "pretrained; all of it learns",
        "thousands of rows",
        "every weight; new tokens; architecture stays",
        "overfitting on few rows, forgetting what it knew, most memory",
    ),
    "distill": Factors(
        "a smaller student, a frozen teacher",
        "many rows; they need no labels of their own",
        "the student's size and depth",
        "it inherits the teacher's mistakes; the student is too small for what the teacher says",
    ),
}


def of(strategy: str) -> Factors:
    """The factors of a strategy; empty texts of one that is not described yet."""
    return FACTORS.get(strategy, Factors("", "", "", ""))


class Prediction(TypedDict, total=False):
    """What is expected of a run before it starts; any key may be missing.

    memory_bytes, memory_band: peak memory of the process as report.json has it, and (low, high).
    seconds, seconds_band: from the start to trained weights (setup_seconds + train_seconds of report.json), and (low, high).
    rank: place among the recipes compared, from 1.
    verdict, source: the reasons, and the sources of the reasons.
    """

    memory_bytes: float
    memory_band: tuple[float, float]
    seconds: float
    seconds_band: tuple[float, float]
    rank: int
    verdict: str
    source: str
