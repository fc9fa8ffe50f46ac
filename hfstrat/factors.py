"""The factors of the choice, one text for each strategy: what advice and comparison are laid out by."""

from __future__ import annotations

from typing import NamedTuple


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
