"""Predicting the next token: plain texts, prompts with completions, and conversations, by models with an LM head."""

from __future__ import annotations

from hfstrat.tasks.base import Task
from hfstrat.tasks.causal_lm.metrics import TokenMetrics
from hfstrat.tasks.causal_lm.model import LanguageModel
from hfstrat.tasks.causal_lm.rows import LanguageRows
from hfstrat.tasks.causal_lm.text import LanguageText


class CausalLM(Task):
    """The task `causal-lm`; every setting of a recipe applies to it."""

    name = "causal-lm"
    rows = LanguageRows()
    model = LanguageModel()
    metrics = TokenMetrics()
    text = LanguageText()
