"""The recipe's `evaluation:` section: what is measured in addition to the training loss."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.recipe.section import Section

Metric = Literal["exact_match", "f1", "rouge", "chrf", "regex", "json"]


class Evaluation(Section):
    """What is measured in addition to the training loss, before and after training; `hfstrat evaluate` measures the same."""

    eval_on_start: bool = Field(True, description="Also measure everything before training")
    max_rows: int | None = Field(None, ge=1, description="Maximum number of evaluation examples")
    prompts: list[str] = Field(
        [], description="Prompts to answer before and after training; default: those of evaluation examples"
    )
    samples: int = Field(3, ge=0, description="Number of evaluation examples to answer if no prompts are given")
    max_new_tokens: int = Field(48, ge=1, description="Maximum length of an answer in tokens")
    metrics: list[Metric] = Field(
        [],
        description="Metrics of generated answers against their references: exact_match, f1 (both as in SQuAD), rouge, chrf "
        "(pip install 'hfstrat[eval]'), regex (share that matches `regex`), json (share of valid JSON)",
    )
    metric_rows: int = Field(200, ge=1, description="Maximum number of evaluation examples to answer for `metrics`")
    regex: str | None = Field(
        None, description="Pattern of metrics: [regex]; with a group, its match has to equal that in the reference"
    )
    temperature: float = Field(
        0.0, ge=0, description="Temperature of the answers for `metrics`; 0: greedy, above: sampled with the recipe's seed"
    )
    choices: list[str] = Field(
        [],
        description="Files of multiple-choice examples, scored by likelihood: {query, choices, gold}, {context_options, "
        "continuation, gold}, or {context, continuation}",
    )
    lm_eval: list[str] = Field(
        [], description="Tasks of lm-evaluation-harness, by name or YAML file (pip install 'hfstrat[eval]')"
    )
    include_path: str | None = Field(None, description="Folder with more tasks for `lm_eval`")
    control: str = Field(
        "auto",
        min_length=1,
        description="Forgetting check: the loss on a text outside of the training data. auto: bundled passages, for causal LMs "
        "with pretrained weights; off; or a file with rows of text",
    )
    batch_tokens: int | Literal["auto"] = Field(
        "auto", description="Tokens per forward pass, padding included, of all measurements but the evaluation loss"
    )

    @property
    def rows_to_answer(self) -> int:
        """Number of evaluation examples whose text is kept."""
        return max(self.samples, self.metric_rows if self.metrics else 0)

    @field_validator("regex")
    @classmethod
    def _a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"expected a regular expression ({error})") from None
        return value

    @field_validator("batch_tokens")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected a whole number, at least 1, or auto")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Evaluation:
        if "regex" in self.metrics and self.regex is None:
            raise ValueError("metrics: regex needs a pattern; set evaluation.regex, such as '#### (-?[0-9]+)'")
        if self.regex is not None and "regex" not in self.metrics:
            raise ValueError("regex: only used by metrics: [regex]; add regex to evaluation.metrics, or remove the pattern")
        if self.temperature and not self.metrics:
            raise ValueError("temperature: only used by metrics; set evaluation.metrics, or remove it")
        if self.include_path and not self.lm_eval:
            raise ValueError("include_path: only used by lm_eval; set evaluation.lm_eval, or remove it")
        return self
