"""Encoders and decoders whose head predicts numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.tasks.text_classification.model import SequenceModel

if TYPE_CHECKING:
    import torch

    from hfstrat.models.load import Base

SAMPLE = 64  # training examples that determine the direction that stands for a missing bias
LARGEST_16_BIT = 20  # how many standard deviations a target may be from 0, where outputs have 8 bits of precision


class Regressor(SequenceModel):
    """Outputs are numbers in the units of the targets."""

    config_keys = (*SequenceModel.config_keys, "target_mean", "target_std")

    def config_options(self, data: Any, tokenizer: Any) -> dict[str, Any]:
        names = dict(enumerate(data.label_names))
        return {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "regression",
            "ignore_mismatched_sizes": True,
        }

    def fit_output(self, base: Base, data: Any, collate: Any) -> Callable[[], None]:
        """Let the last linear layer of the head be trained on standardized targets; folded away before the result is saved."""
        from hfstrat.models import output_scale
        from hfstrat.models.blocks import final_linear

        self._check_precision(base, data)
        # for the loss of a later evaluation; predictions do not need them
        base.model.config.target_mean, base.model.config.target_std = (each.tolist() for each in data.units)
        layer = final_linear(base.model)
        constant = None if layer.bias is not None else self._constant(base, data.train, collate, layer)
        output_scale.scale(layer, data.units, constant, keep=not base.new_head)
        return lambda: output_scale.fold(base.model)

    def _constant(self, base: Base, rows: Any, collate: Any, layer: Any) -> torch.Tensor:
        """The direction of hidden states that stands for the bias that a decoder's head lacks."""
        import torch

        from hfstrat.models.output_scale import constant_direction

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
        return constant_direction(torch.cat(found))

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
