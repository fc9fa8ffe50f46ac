"""The recipe's `evaluation:` section: what is measured and shown beside the training loss."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.recipe.section import Section

Metric = Literal["exact_match", "f1", "rouge", "chrf", "regex", "json"]


class Evaluation(Section):
    """What is measured and shown beside the training loss, before and after. `hfstrat evaluate` measures the same later."""

    before: bool = Field(True, description="Measure everything before training too")
    max_rows: int | None = Field(None, ge=1, description="Evaluate on so many rows at most")
    prompts: list[str] = Field([], description="Prompts to answer before and after; default: from the evaluation rows")
    samples: int = Field(3, ge=0, description="How many evaluation rows to answer if no prompts are given")
    max_new_tokens: int = Field(48, ge=1, description="Length of an answer, at most")
    metrics: list[Metric] = Field(
        [],
        description="Compare answers to evaluation rows with their references: exact_match, f1 (both as SQuAD has them), "
        "rouge, chrf (pip install 'hfstrat[eval]'), regex (how many hold `regex`), json (how many are valid)",
    )
    metric_rows: int = Field(200, ge=1, description="Evaluation rows that are answered for `metrics`, at most")
    regex: str | None = Field(
        None, description="Pattern of metrics: [regex]; with a group, what it finds must be what it finds in the reference"
    )
    temperature: float = Field(
        0.0, ge=0, description="Of the answers for `metrics`; 0: greedy, else drawn by the recipe's seed"
    )
    choices: list[str] = Field(
        [],
        description="Files of multiple-choice rows, answered by likelihood: {query, choices, gold}, {context_options, "
        "continuation, gold}, or {context, continuation}",
    )
    lm_eval: list[str] = Field(
        [], description="Tasks of lm-evaluation-harness by name or YAML file (pip install 'hfstrat[eval]')"
    )
    include_path: str | None = Field(None, description="Folder with further tasks for `lm_eval`")
    control: str = Field(
        "auto",
        min_length=1,
        description="Forgetting check: the loss on a text that is not trained on. auto: passages that come "
        "with hfstrat, for causal LMs that were trained already; off; or a file with rows of text",
    )
    batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Tokens of a forward pass of everything but the evaluation loss, padding included"
    )

    @property
    def rows_to_answer(self) -> int:
        """Evaluation rows that are kept in words."""
        return max(self.samples, self.metric_rows if self.metrics else 0)

    @field_validator("regex")
    @classmethod
    def _a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"a regular expression is expected ({error})") from None
        return value

    @field_validator("batch_tokens")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a whole number of at least 1, or auto, is expected")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Evaluation:
        if "regex" in self.metrics and self.regex is None:
            raise ValueError("metrics: regex needs a pattern: give regex, such as '#### (-?[0-9]+)'")
        if self.regex is not None and "regex" not in self.metrics:
            raise ValueError("regex: it is used by metrics: [regex] alone; add it there")
        if self.temperature and not self.metrics:
            raise ValueError("temperature: it is used by metrics alone; name some, or remove it")
        if self.include_path and not self.lm_eval:
            raise ValueError("include_path: it is used by lm_eval alone; name its tasks there")
        return self
