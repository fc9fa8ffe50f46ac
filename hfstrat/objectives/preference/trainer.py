"""The Trainer of preference objectives: what is logged of the pairs, and what a loss needs to know of the complete step."""

from __future__ import annotations

from typing import Any

import torch

from hfstrat.objectives.preference.collate import REFERENCE, split_others
from hfstrat.objectives.preference.metrics import in_float64
from hfstrat.trainer.trainer import StrategyTrainer


class PreferenceTrainer(StrategyTrainer):
    """Logs rewards and log-probabilities by TRL's names, as means over the pairs since the last log."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._seen: torch.Tensor | None = None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Also gives each batch what its loss needs of the complete step: for the two means of ORPO the pairs per chosen token,
        for KTO the divergence from the reference."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and (parts := [split_others(batch) for batch in batches])[0][1]:
            divergence = self._divergence(parts, device)
            return [batch | {"pair_divergence": divergence} for batch, _ in parts], items
        if batches and "pair_answer" in batches[0]:
            tokens = torch.stack([(batch["pair_sequence"] % 2 == 0).sum() for batch in batches]).sum().to(device)
            if self.args.world_size > 1:
                tokens = self.accelerator.gather(tokens).sum()
            for batch in batches:
                batch["pair_share"] = items / tokens
        return batches, items

    def _divergence(self, parts: list[tuple[dict[str, Any], dict[str, Any]]], device: torch.device) -> torch.Tensor:
        """The mean log-ratio of answers to other prompts, at least 0, over all processes (nats)."""
        sums = torch.zeros(2, device=device)
        for batch, others in parts:
            inputs = {name: tensor.to(device) for name, tensor in others.items()}
            with torch.no_grad(), self.compute_loss_context_manager():
                logps = self.model(**inputs)["logps"].float()
            ratios = logps - batch[REFERENCE].to(device)[:, 1]
            sums += torch.stack([ratios.sum(), torch.tensor(float(len(ratios)), device=device)])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums)
        return (sums[0] / sums[1]).clamp(min=0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            sums = in_float64(outputs["pairs"]).sum(0)
            self._seen = sums if self._seen is None else self._seen + sums
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._seen is not None:
            sums = self._seen if self.args.world_size == 1 else self.accelerator.reduce(self._seen)
            found = self.metrics.means(sums.cpu().numpy())
            logs = {**{name: value for name, value in found.items() if name != "loss"}, **logs}
            self._seen = None
        super().log(logs, start_time)
