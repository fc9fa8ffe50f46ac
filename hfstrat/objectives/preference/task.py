"""Causal language modeling on preferences: the rows, the loss and the metrics; the models are those of the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.data.preferences import LabeledFormat, PreferenceFormat
from hfstrat.objectives.preference.metrics import LabeledMetrics, PreferenceMetrics
from hfstrat.tasks.base import Pictures, Values
from hfstrat.tasks.causal_lm import CausalLM, LanguageModel, LanguageRows, LanguageText

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.objectives import ObjectiveSection
    from hfstrat.tasks.report import Result

COLUMNS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "instruction", "input", "system"]

NOUN = {False: "pair", True: "labeled answer"}


class PreferenceRows(LanguageRows):
    """Prompts with a chosen and a rejected answer."""

    columns = COLUMNS
    streams = False

    def __init__(self, section: ObjectiveSection) -> None:
        self.section = section
        self.unpaired = section.name == "kto"
        self.noun = NOUN[self.unpaired]

    @property
    def reader(self) -> Callable[..., Any]:
        return LabeledFormat.detect if self.unpaired else PreferenceFormat.detect

    def read_format(
        self,
        head: list[dict[str, Any]],
        source: str,
        data: Data,
        wanted: str = "auto",
        columns: dict[str, str] | None = None,
        class_names: dict[str, list[str]] | None = None,
    ) -> Any:
        return self.reader(head, source, wanted, columns or {}, class_names)

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        from hfstrat.data.prepare import PreparedData, divide

        encoder = self._encoder(data, tokenizer, data.template)
        return PreparedData(**divide(encoder, data, seed, max_eval_rows, held_out).fields(data, seed, samples))

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.data.prepare import PreparedData, evaluation_fields
        from hfstrat.data.render import TEMPLATES

        template = (
            data.template if data.template in TEMPLATES else "chat"
        )  # the template of a file is the tokenizer's own by now
        return PreparedData(**evaluation_fields(self._encoder(data, tokenizer, template), data, samples, max_rows))

    def _encoder(self, data: Data, tokenizer: Any, template: str) -> Any:
        from hfstrat.data.preference_rows import PreferenceEncoder
        from hfstrat.data.render import Renderer

        return PreferenceEncoder(Renderer(tokenizer, template, "completions", data.chat_template_kwargs), self.unpaired)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import Collator
        from hfstrat.objectives.preference.collate import PreferenceCollator

        plain = Collator(tokenizer.pad_token_id or 0, multiple, masks_logits=False, selects_rows=True)
        return PreferenceCollator(plain, self.section.name == "orpo", self.unpaired)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        longest = self.longest(data)  # one long answer pads all sequences of its batch
        return {"input_ids": [1] * 2 * longest, "labels": [1] * 2 * longest, "split": longest, "desirable": 1}

    def longest(self, data: PreparedData) -> int:
        from hfstrat.data.preference_rows import longest_sequence

        return max(longest_sequence(rows) for rows in (data.train, data.eval))

    def parts(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        from hfstrat.data.preference_rows import two

        first, second = two(row)
        if self.unpaired:
            return [("desirable" if row["desirable"] else "undesirable", first)]
        return [("chosen", first), ("rejected", second)]


class PreferenceModel(LanguageModel):
    """A causal LM with the loss of the objective bound to it."""

    def __init__(self, section: ObjectiveSection) -> None:
        self.section = section

    def bind_loss(self, base: Base) -> None:
        from hfstrat.errors import UserError
        from hfstrat.models import fused_loss, router_loss
        from hfstrat.objectives.preference.loss import PreferenceLoss

        if reason := fused_loss.bind_head_loss(base.model, PreferenceLoss(self.section)):  # type: ignore[arg-type]
            raise UserError(f"objective: {self.section.name} cannot be computed for this model: {reason}; use objective: sft")
        if factor := router_loss.coefficient(base.model):
            base.say(f"the load-balancing loss of the routers is added in training, times {factor:g} (router_aux_loss_coef)")


class PreferenceText(LanguageText):
    """Predictions are greedy answers."""

    def __init__(self, section: ObjectiveSection) -> None:
        self.section = section
        self.unit = NOUN[section.name == "kto"]

    def metrics(self, metrics: Values) -> str:
        margin = metrics["rewards/margins"]
        return f"loss {metrics['loss']:.4f}, reward accuracy {metrics['rewards/accuracies']:.1%}, margin {margin:.3f}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"reward accuracy {before['rewards/accuracies']:.1%} -> {after['rewards/accuracies']:.1%}, "
            f"margin {before['rewards/margins']:.3f} -> {after['rewards/margins']:.3f}, log-probability of chosen answers "
            f"{before['logps/chosen']:.1f} -> {after['logps/chosen']:.1f}, of rejected ones "
            f"{before['logps/rejected']:.1f} -> {after['logps/rejected']:.1f} nats"
        )

    def sections(self, result: Result, pictures: Pictures) -> list[Section]:
        from hfstrat.objectives.preference import page

        return page.sections(result, ("desirable", "undesirable") if self.section.name == "kto" else ("chosen", "rejected"))

    def advice(self, result: Result) -> list[tuple[str, str]]:
        from hfstrat.objectives.preference import page

        return page.advice(result)


class PreferenceTask(CausalLM):
    """The task `causal-lm` with a preference objective."""

    def __init__(self, section: ObjectiveSection) -> None:
        self.rows = PreferenceRows(section)
        self.model = PreferenceModel(section)
        self.metrics = LabeledMetrics(section=section) if section.name == "kto" else PreferenceMetrics()  # type: ignore[assignment]
        self.text = PreferenceText(section)
