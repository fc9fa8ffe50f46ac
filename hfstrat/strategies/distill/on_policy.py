"""The student learns on its own answers (on-policy distillation, arXiv 2306.13649): TRL's DistillationTrainer minimises, our
rows, evaluation and checkpoints are around it.

Once a step the student answers the prompts of the step's rows, drawing tokens at `temperature`; on each token that it drew, the
teacher's whole distribution is compared with its own. Evaluation is on the answers of the data, as for every other run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer

from hfstrat.strategies.distill.tokenizer_mismatch import prompt_of
from hfstrat.trainer.trainer import StrategyTrainer

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hfstrat.recipe.distill import Distill

BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # TRL's names for them
REMARK = (
    "on-policy by TRL's DistillationTrainer: rows give only their prompts. The loss of a step is the divergence (without a "
    "factor T^2) on what the student writes, evaluation is on the answers of the data; tokens/s count prompts and what is "
    "written; each process draws answers of its own"
)


class Prompts(Dataset[dict[str, list[int]]]):
    """Of each row what stands before its last answer, as TRL asks for it."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        return {"prompt": prompt_of(self.rows[place], "on_policy: true")}


class Again(Sampler[int]):
    """Each `size` rows `times` over: TRL takes a whole step's rows for each part of it, and writes at the first."""

    def __init__(self, order: Any, size: int, times: int) -> None:
        self.order, self.size, self.times = order, size, times

    def begin(self, step: int) -> None:
        self.order.begin(step)

    def __len__(self) -> int:
        return len(self.order) * self.times

    def __iter__(self) -> Iterator[int]:
        numbers = iter(self.order)
        while step := list(islice(numbers, self.size)):
            for _ in range(self.times):
                yield from step


class _Trl(DistillationTrainer):  # type: ignore[misc]
    """TRL's trainer without what it has no use for."""

    def __init__(self, *, data_collator: Any, compute_loss_func: Any, compute_metrics: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compute_metrics, self.collate = compute_metrics, data_collator


class OnPolicyTrainer(StrategyTrainer, _Trl):
    """TRL's training step within ours: our order of rows, evaluation and checkpoints."""

    data_collator: Any
    start_counts = False  # the loss that is evaluated is of answers that the student does not learn from
    counts_tokens = True

    def __init__(
        self, *, distill: Distill, args: TrainingArguments, train_dataset: Any, sampler: Any, **arguments: Any
    ) -> None:
        given = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
        theirs_too = {
            "beta": BETA[distill.divergence],
            "temperature": distill.temperature,
            "max_completion_length": distill.max_new_tokens,
            "gradient_checkpointing": False,
        }
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        super().__init__(
            args=DistillationConfig(**{**given, **theirs_too}),
            train_dataset=Prompts(train_dataset),
            sampler=Again(sampler, size, args.gradient_accumulation_steps),
            **arguments,
        )

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return prompts, None, {}

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Rows of an evaluation are batches already; those of training are prompts that the student answers first."""
        return Trainer._prepare_inputs(self, inputs) if isinstance(inputs, dict) else super()._prepare_inputs(inputs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return Trainer._get_eval_sampler(self, eval_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        prompts_as_they_are: Any = self.data_collator
        self.data_collator = self.collate
        try:
            return Trainer.get_eval_dataloader(self, eval_dataset)
        finally:
            self.data_collator = prompts_as_they_are

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None beside the checkpoints: the result gets ours."""
