"""The tasks that are trained on preferences: their rows, the loss and the metrics; the models are those of the task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.data.image_places import COLUMNS as IMAGE_COLUMNS
from hfstrat.data.preference_rows import two
from hfstrat.data.preferences import LabeledFormat, PreferenceFormat
from hfstrat.objectives.preference.metrics import LabeledMetrics, PreferenceMetrics
from hfstrat.tasks.base import Pictures, Rows, Task, Values
from hfstrat.tasks.causal_lm import CausalLM, LanguageModel, LanguageRows, LanguageText
from hfstrat.tasks.image_text_to_text import ImageTextModel, ImageTextRows, ImageTextText, ImageTextToText, lengthened

if TYPE_CHECKING:
    import numpy as np

    from hfstrat.data.prepare import PreparedData, RowEncoder
    from hfstrat.models.load import Base
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.objectives import ObjectiveSection
    from hfstrat.tasks.report import Result

COLUMNS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "instruction", "input", "system"]

NOUN = {False: "pair", True: "labeled answer"}


class PairRows(Rows):
    """Prompts with a chosen and a rejected answer, or answers with labels; what the tasks have in common."""

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
        from hfstrat.data.prepare import divide

        encoder = self.encoder(data, tokenizer, data.template)
        return self.prepared(divide(encoder, data, seed, max_eval_rows, held_out).fields(data, seed, samples))

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.data.prepare import evaluation_fields
        from hfstrat.data.render import TEMPLATES

        template = (
            data.template if data.template in TEMPLATES else "chat"
        )  # the template of a file is the tokenizer's own by now
        return self.prepared(evaluation_fields(self.encoder(data, tokenizer, template), data, samples, max_rows))

    @abstractmethod
    def encoder(self, data: Data, tokenizer: Any, template: str) -> RowEncoder:
        """How rows become token ids."""

    def prepared(self, fields: dict[str, Any]) -> PreparedData:
        """The prepared data of these fields."""
        from hfstrat.data.prepare import PreparedData

        return PreparedData(**fields)

    def collator(self, base: Base, data: PreparedData, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.objectives.preference.collate import PreferenceCollator

        return PreferenceCollator(self.plain_collator(tokenizer, multiple), self.section.name == "orpo", self.unpaired)

    def plain_collator(self, tokenizer: Any, multiple: int) -> Any:
        """The collator of single sequences."""
        from hfstrat.data.collate import Collator

        return Collator(tokenizer.pad_token_id or 0, multiple, masks_logits=False, selects_rows=True)

    def longest(self, data: PreparedData) -> int:
        from hfstrat.data.preference_rows import longest_sequence

        return max(longest_sequence(rows) for rows in (data.train, data.eval))

    def parts(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        first, second = two(row)
        if self.unpaired:
            return [("desirable" if row["desirable"] else "undesirable", first)]
        return [("chosen", first), ("rejected", second)]


class PreferenceRows(PairRows, LanguageRows):
    """Preferences between texts."""

    columns = COLUMNS

    def encoder(self, data: Data, tokenizer: Any, template: str) -> RowEncoder:
        from hfstrat.data.preference_rows import PreferenceEncoder
        from hfstrat.data.render import Renderer

        return PreferenceEncoder(Renderer(tokenizer, template, "completions", data.chat_template_kwargs), self.unpaired)

    def worst_row(self, data: PreparedData, length: int) -> dict[str, Any]:
        longest = self.longest(data)  # one long answer pads all sequences of its batch
        return {"input_ids": [1] * 2 * longest, "labels": [1] * 2 * longest, "split": longest, "desirable": 1}


class ImagePreferenceRows(PairRows, ImageTextRows):  # type: ignore[misc]  # prepares other data than the task alone
    """Preferences between answers to prompts with images."""

    columns = [*COLUMNS, *IMAGE_COLUMNS]

    @property
    def reader(self) -> Callable[..., Any]:
        from hfstrat.data import image_preferences

        return image_preferences.reader(self.unpaired)

    def encoder(self, data: Data, tokenizer: Any, template: str) -> RowEncoder:
        from hfstrat.data.image_preferences import ImagePreferenceEncoder
        from hfstrat.data.image_render import ImageRenderer

        renderer: Any = ImageRenderer(tokenizer, template, "completions", data.chat_template_kwargs)
        return ImagePreferenceEncoder(renderer, self.unpaired)

    def prepared(self, fields: dict[str, Any]) -> PreparedData:
        from hfstrat.data.image_chats import ImageTexts

        return ImageTexts.of(fields)

    def plain_collator(self, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.image_text_batches import ImageTextCollator

        return ImageTextCollator(tokenizer, multiple, masks_logits=False, selects_rows=True)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        """The training row with the most image tokens, whose answers are made as long as the longest, with loss on all."""
        longest, row = self.longest(data), dict(data.train[int(data.counts["image_tokens"].argmax())])
        both = [lengthened(part["input_ids"], longest, data.renderer.processor) for part in two(row)]
        return {**row, "input_ids": both[0] + both[1], "labels": both[0] + both[1], "split": longest}


class PreferenceModel(LanguageModel):
    """A model with the loss of the objective bound to it."""

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


class ImagePreferenceModel(PreferenceModel, ImageTextModel):
    """A vision-language model with the loss of the objective bound to it."""


class ImagePreferenceText(PreferenceText, ImageTextText):
    """Predictions are greedy answers to prompts with images."""


class PreferenceTask(CausalLM):
    """The task `causal-lm` with a preference objective."""

    def __init__(self, section: ObjectiveSection) -> None:
        self.rows = PreferenceRows(section)
        self.model = PreferenceModel(section)
        self.metrics = LabeledMetrics(section=section) if section.name == "kto" else PreferenceMetrics()  # type: ignore[assignment]
        self.text = PreferenceText(section)


class ImagePreferenceTask(ImageTextToText):
    """The task `image-text-to-text` with a preference objective."""

    def __init__(self, section: ObjectiveSection) -> None:
        self.rows = ImagePreferenceRows(section)  # type: ignore[assignment]
        self.model = ImagePreferenceModel(section)
        self.metrics = PreferenceTask(section).metrics  # type: ignore[assignment]
        self.text = ImagePreferenceText(section)


BY_TASK: dict[str, Callable[[ObjectiveSection], Task]] = {
    CausalLM.name: PreferenceTask,
    ImageTextToText.name: ImagePreferenceTask,
}
"""The tasks that are trained on preferences, by name."""
