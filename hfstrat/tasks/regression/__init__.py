"""Predicting one or several numbers for a text or a pair of texts, by encoders and decoders.

Targets are standardized on the training examples while a head is trained, and this is folded into its last linear layer
before the result is saved: plain transformers predicts in the original units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hfstrat.errors import UserError
from hfstrat.tasks.base import Metrics, Pictures, Quality, Score, Task, Values, Wrong
from hfstrat.tasks.heads import (
    HeadModel,
    HeadRows,
    HeadText,
    adapter_config,
    check_texts,
    continued,
    has_numbers,
    logits_of,
    names_of,
    shortened,
)
from hfstrat.tasks.regression.targets import COLUMNS, TargetFormat

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hfstrat.data.labeled import Texts
    from hfstrat.data.prepare import PreparedData
    from hfstrat.models.load import Base
    from hfstrat.models.output_scale import Units
    from hfstrat.pages.blocks import Section
    from hfstrat.recipe.data import Data
    from hfstrat.recipe.schema import Recipe
    from hfstrat.tasks.report import Result

LARGEST_ERROR = 0.5  # standard deviations that predictions of a decoder may begin off without a warning
SAMPLE = 64  # training examples that determine the direction that stands for a missing bias

LARGEST_16_BIT = 20  # how many standard deviations a target may be from 0, where outputs have 8 bits of precision


class TargetRows(HeadRows):
    """Examples with targets."""

    columns = COLUMNS

    @property
    def reader(self) -> Callable[..., Any]:
        return TargetFormat.detect

    def prepare(
        self,
        data: Data,
        tokenizer: Any,
        seed: int,
        samples: int = 0,
        max_eval_rows: int | None = None,
        held_out: np.ndarray | None = None,
    ) -> PreparedData:
        from hfstrat.tasks.regression.prepare import prepare

        return prepare(data, tokenizer, seed, samples, max_eval_rows, held_out)

    def prepare_eval(self, data: Data, tokenizer: Any, config: Any, samples: int, max_rows: int | None) -> PreparedData:
        from hfstrat.tasks.regression.prepare import prepare_eval

        return prepare_eval(data, tokenizer, config, samples, max_rows)

    def collator(self, base: Base, data: Any, tokenizer: Any, multiple: int) -> Any:
        from hfstrat.data.collate import has_token_types
        from hfstrat.models.load import pad_token_of
        from hfstrat.tasks.regression.prepare import TargetCollator

        return TargetCollator(pad_token_of(base.model.config, tokenizer), multiple, has_token_types(base.model), data.units)

    def worst_row(self, data: Any, length: int) -> dict[str, Any]:
        return {"input_ids": [1] * length, "token_type_ids": [], "label": data.units.mean.tolist()}


class Regressor(HeadModel):
    """Outputs are numbers in the units of the targets."""

    config_keys = (*HeadModel.config_keys, "target_mean", "target_std")

    def fits(self, config: dict[str, Any]) -> bool:
        return has_numbers(config)

    def sources(self, config: Any, names: list[str], whose: str) -> tuple[list[int | None], list[str]]:
        """By name; without common names by position where the number of targets is the same, since a column has any name.

        All of them or none: trained outputs are in original units, and new ones in standardized units.
        """
        known, fresh = names_of(config), list[int | None]([None] * len(names))
        if not has_numbers(config.to_dict()):
            return fresh, [f"the head of {whose} predicts labels ({shortened(known)}): it is re-initialized"]
        sources, lines = continued(known, names, whose)
        if None not in sources:
            return sources, lines
        if len(known) != len(names) or sources != fresh:
            return fresh, [
                f"the head of {whose} predicts {shortened(known)}, the data have {shortened(names)}: it is re-initialized"
            ]
        return list(range(len(names))), [f"the output of {whose} for {shortened(known)} continues as {shortened(names)}"]

    def problem_type(self, data: Any) -> str:
        return "regression"

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None]:
        """Let the last linear layer of the head be trained on standardized targets; folded away before the result is saved."""
        from hfstrat.models import output_scale
        from hfstrat.models.blocks import final_linear

        self._check_precision(base, data)
        # for the loss of a later evaluation; predictions do not need them
        base.model.config.target_mean, base.model.config.target_std = (each.tolist() for each in data.units)
        layer = final_linear(base.model)
        constant = None if layer.bias is not None else self._constant(base, data, collate, layer)
        output_scale.scale(layer, data.units, constant, keep=not base.new_head)
        return lambda: output_scale.fold(base.model)

    def fit_adapter(self, base: Base, source: str) -> Callable[[Any], None]:
        """The adapter's head predicts in original units, and the one that is trained in standardized ones."""
        from hfstrat.models import output_scale

        names, config = names_of(base.model.config), adapter_config(base, source)
        order: list[Any] = list(range(len(names)))
        if config is not None:
            order, lines = self.sources(config, names, "the adapter")
            if None in order or len(names_of(config)) != len(names):
                raise UserError(
                    f"strategy.adapter: {source} predicts {shortened(names_of(config))}, and the data have {shortened(names)}; "
                    "expected an adapter for the same numbers; remove it"
                )
            for line in lines:
                base.say(line)

        def fit(model: Any) -> None:
            saved = [m for name, m in model.named_modules() if name.endswith("modules_to_save.default")]
            for module in saved:
                output_scale.standardize(module, order)

        return fit

    def _constant(self, base: Base, data: Any, collate: Any, layer: Any) -> torch.Tensor:
        """The direction of hidden states that stands for the bias that a decoder's head lacks."""
        from hfstrat.models.output_scale import constant_direction, constant_error

        features = self._features(base, data.train, collate, layer)
        far = float((data.units.mean / data.units.std).abs().max())
        if (error := far * constant_error(features)) > LARGEST_ERROR:
            base.say(
                f"{'warning':<9} the head of {type(base.model).__name__} has no bias, and the mean of the targets is "
                f"{far:,.0f} standard deviations away from 0: predictions begin {error:.2g} standard deviations off. Subtract "
                "the mean from the targets, or use an encoder"
            )
        return constant_direction(features)

    def _features(self, base: Base, rows: Any, collate: Any, layer: Any) -> torch.Tensor:
        """What the last layer reads, `[n, H]`, for the first training examples."""
        import torch

        taken: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
        was_training = base.model.training
        base.model.eval()
        found = []
        try:
            for start in range(0, min(SAMPLE, len(rows)), 8):
                batch = collate([rows[place] for place in range(start, min(start + 8, len(rows)))])
                mask = batch["attention_mask"]
                with torch.no_grad():
                    base.model(input_ids=batch["input_ids"], attention_mask=mask)
                hidden = taken.pop().float()
                found.append(hidden if hidden.dim() == 2 else hidden[torch.arange(len(mask)), mask.sum(1) - 1])
        finally:
            hook.remove()
            base.model.train(was_training)
        return torch.cat(found)

    def _check_precision(self, base: Base, data: Any) -> None:
        """Raises UserError where 16 bits round predictions by more than a hundredth of the spread of the targets."""
        if base.compute_dtype.itemsize >= 4 and base.own_dtype.itemsize >= 4:
            return
        far = ((data.units.mean.abs() + 3 * data.units.std) / data.units.std).max().item()
        if far > LARGEST_16_BIT:
            raise UserError(
                f"model.dtype: bfloat16 has 8 bits of precision, and the targets are up to {far:.0f} standard deviations away "
                "from 0, so that predictions would be rounded too much; set model.dtype: float32"
            )


@dataclass(frozen=True)
class TargetMetrics(Metrics):
    """Loss (mean squared error of standardized targets), MAE, RMSE, Pearson and Spearman correlation.

    With several targets the last four are means over targets, and the details hold those of each.
    """

    units: Units | None = None

    of_distributions: ClassVar[bool] = False
    names: ClassVar[tuple[str, ...]] = ("loss", "mae", "rmse", "pearson", "spearman", "rows")

    @property
    def quality(self) -> Quality:
        return Quality("loss", False, "nll", "items")

    def for_data(self, data: Any) -> Self:
        return replace(self, labels=data.label_names, units=data.units)

    def loss(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Squared errors summed over this micro-batch and divided by the numbers to predict of the whole optimizer step.

        Args:
            outputs: `logits` `[B, targets]` in original units.
            labels: standardized targets, float `[B, targets]`.
        """
        import torch

        total = (self._standardized(outputs["logits"]) - labels).square().sum()
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)

    def _standardized(self, logits: torch.Tensor) -> torch.Tensor:
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        return wide if self.units is None else self.units.standardize(wide)

    def sums(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Summed squared error and items `[B, 2]`; standardized targets and predictions `[B, targets, 2]`; in float64."""
        import torch

        labels = inputs.pop("labels")
        predicted = self._standardized(model(**inputs)["logits"])
        wide = torch.float32 if predicted.is_mps else torch.float64
        pairs = torch.stack([labels.to(wide), predicted.to(wide)], dim=2)
        squared = (pairs[:, :, 0] - pairs[:, :, 1]).square().sum(1)
        return torch.stack([squared, torch.full_like(squared, labels.shape[1])], dim=1), pairs

    def measure(self, sums: tuple[np.ndarray, ...]) -> tuple[Values, dict[str, Any]]:
        import numpy as np

        from hfstrat.tasks.regression.scores import by_target

        values = self.score(sums, {})(np.ones(len(sums[0])))
        true, predicted = self._original(sums[1])
        details = by_target(true, predicted, self.labels, self._mean())
        return {**values, "rows": float(len(sums[0]))}, details

    def score(self, sums: tuple[np.ndarray, ...], extra: dict[str, np.ndarray]) -> Score:
        from hfstrat.tasks.regression.scores import score_of

        return score_of(sums[0], *self._original(sums[1]))

    def mistakes(self, sums: tuple[np.ndarray, ...], most: int) -> list[Wrong]:
        import numpy as np

        true, predicted = self._original(sums[1])
        order = np.argsort(-sums[0][:, 0], kind="stable")[:most].tolist()

        def words(values: np.ndarray) -> str:
            return ", ".join(f"{name} {value:.6g}" for name, value in zip(self.labels, values.tolist(), strict=True))

        error = np.abs(true - predicted).mean(1)
        return [Wrong(at, words(true[at]), words(predicted[at]), float(error[at])) for at in order if error[at] > 0]

    def columns(self, sums: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        """`nll` (squared error of standardized targets) over `items`, and the absolute error, mean over targets."""
        import numpy as np

        true, predicted = self._original(sums[1])
        squared, items = sums[0].astype(np.float64).T
        return {"nll": squared, "items": items, "absolute_error": np.abs(true - predicted).mean(1)}

    def _original(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets and predictions `[examples, targets]` in original units."""
        import numpy as np

        wide = pairs.astype(np.float64)
        if self.units is not None:
            wide = wide * self.units.std.numpy()[:, None] + self.units.mean.numpy()[:, None]
        return wide[:, :, 0], wide[:, :, 1]

    def _mean(self) -> np.ndarray | None:
        return None if self.units is None else self.units.mean.numpy()


class NumberText(HeadText):
    """Predictions are numbers in the units of the targets; the Hub has no name of its own for this task."""

    @property
    def loss_unit(self) -> str:
        return "MSE of standardized targets"

    def outputs(self, model: Any, texts: Texts, prompt: Any, dtype: torch.dtype) -> list[tuple[str, float]]:
        names = model.config.id2label
        return [(names[index], value) for index, value in enumerate(logits_of(model, texts, prompt, dtype).tolist())]

    def line(self, outputs: list[tuple[str, float]]) -> str:
        return ", ".join(f"{name} {value:.6g}" for name, value in outputs)

    def record(self, outputs: list[tuple[str, float]]) -> dict[str, Any]:
        return {"values": dict(outputs)}

    def metrics(self, metrics: Values) -> str:
        errors = f"MAE {metrics['mae']:.4g}, RMSE {metrics['rmse']:.4g}"
        return f"loss {metrics['loss']:.4f}, {errors}, Pearson {metrics['pearson']:.3f}, Spearman {metrics['spearman']:.3f}"

    def change(self, before: Values, after: Values) -> str:
        return (
            f"MAE {before['mae']:.4g} -> {after['mae']:.4g}, RMSE {before['rmse']:.4g} -> {after['rmse']:.4g}, "
            f"Pearson {before['pearson']:.3f} -> {after['pearson']:.3f}"
        )

    def target(self, value: Any, names: tuple[str, ...]) -> str:
        return self.line(list(zip(names, value, strict=True)))

    def agreement(self, name: str, one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
        largest = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
        return f"predictions of {name} and merged model differ by at most {largest:.3g}"

    def details(self, details: dict[str, Any]) -> list[str]:
        from hfstrat.tasks.regression.scores import lines_of

        return lines_of(details)

    def sections(self, result: Result, pictures: Pictures) -> list[Section]:
        from hfstrat.tasks.regression import page

        return page.sections(result, pictures)

    def example(self, chats: bool, sentence: bool, options: dict[str, Any], config: dict[str, Any]) -> list[str]:
        if sentence:
            return [
                'values = model.encode(["a text"], convert_to_tensor=True)[0].tolist()',
                "names = model[0].auto_model.config.id2label",
                "print({names[i]: value for i, value in enumerate(values)})",
            ]
        return [
            'inputs = tokenizer("a text", return_tensors="pt")',
            "values = model(**inputs).logits[0].tolist()",
            "print({model.config.id2label[i]: value for i, value in enumerate(values)})",
        ]


class Regression(Task):
    """The task `regression`."""

    name = "regression"
    rows = TargetRows()
    model = Regressor()
    metrics = TargetMetrics()
    text = NumberText()

    def check(self, recipe: Recipe) -> None:
        check_texts(recipe)
        if recipe.model.dtype == "float16":
            raise UserError(
                "model.dtype: float16: predictions in original units may overflow; for regression expected float32 or bfloat16"
            )
