"""The numbers of a run (steps, batch sizes, intervals) from recipe, data and number of processes; the TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfstrat.errors import UserError, first_line
from hfstrat.recipe import format
from hfstrat.recipe.format import plural
from hfstrat.recipe.schema import Recipe, Training
from hfstrat.recipe.section import seconds

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from hfstrat.data.dense import DenseOrder

CPU_TOKENS = 512  # per forward pass: with more, activations exceed the caches (benchmarks/micro_batch.py)
CPU_MULTIPLE = 16  # of the widths of batches: kernels are compiled for each width
MAX_TOKENS = 16_384  # of the longest examples in one forward pass, if memory is not measured
HEADROOM = 0.92  # share of the device's memory that a step may use
ENDLESS = 10**7  # steps, if only a time limit ends the run


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. `rows_at_once` x `accumulation` x `processes` = `per_step`."""

    steps: int
    global_batch_size: int
    processes: int
    micro_batch: int
    eval_batch: int
    eval_every: int
    save_every: int
    rows: int  # 0: unknown, since they are read while training
    time_limit: float | None = None
    eval_share: float | None = None  # of the time limit between evaluations, if a time limit is set
    checkpointing: bool = False  # activations are recomputed
    packed: bool | None = None  # the choice of an interrupted run
    dense: tuple[int, int] | None = None  # dense packing: packed rows per step, and the tokens that each holds at most
    rows_per_step: float | None = None  # on average, where they vary
    bins: int | None = None  # packed rows per step; None: not packed
    bins_at_once: int = 1  # packed rows per forward pass
    attention: str | None = None  # the attention implementation in training; None: not decided
    attention_because: str = ""  # why, in words

    @property
    def accumulation(self) -> int:
        return self.per_step // (self.processes * self.rows_at_once)

    @property
    def per_step(self) -> int:
        """Rows of an optimizer step over all processes: sequences, or packed bins."""
        return self.bins or (self.dense[0] if self.dense else self.global_batch_size)

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward pass: sequences, or packed bins."""
        return self.bins_at_once if self.bins or self.dense else self.micro_batch

    @property
    def epochs(self) -> float:
        return self.epochs_at(self.steps)

    def epochs_at(self, step: int) -> float:
        """Times that each example is seen by a step; 0 where the number of examples is unknown."""
        return step * (self.rows_per_step or self.global_batch_size) / self.rows if self.rows else 0.0

    def with_rows_at_once(self, count: int, longest: int) -> Plan:
        """The plan with this number of rows per forward pass; `longest`: tokens of the longest example."""
        if self.dense is None:
            return replace(self, micro_batch=count)
        return replace(self, bins_at_once=count, micro_batch=self.examples_of(count, longest))

    def examples_of(self, count: int, longest: int) -> int:
        """The longest examples that have as many tokens as this number of rows."""
        return count if self.dense is None else -(-count * self.dense[1] // longest)

    @property
    def times(self) -> str:
        """The epochs in words, after the number of steps."""
        return f" ({self.epochs:.2f} epochs)" if self.rows else ""

    @property
    def length(self) -> str:
        """The length of the run in words: '120 steps (3.00 epochs)', 'at most 10m 00s', or both."""
        parts = [f"{plural(self.steps, 'step')}{self.times}"] if self.steps < ENDLESS else []
        parts += [f"at most {format.duration(self.time_limit)}"] if self.time_limit else []
        return ", ".join(parts)


def make_plan(
    training: Training,
    lengths: Sequence[int] | np.ndarray,
    eval_lengths: Sequence[int] | np.ndarray,
    processes: int,
    stored: dict[str, Any] | None = None,
    seed: int = 0,
) -> Plan:
    """The plan for the section `training` of a recipe.

    Args:
        lengths: tokens of each training example.
        eval_lengths: tokens of each evaluation example, longest first.
        processes: the number of processes that share a global batch.
        stored: the choices of an interrupted run, from its checkpoint's marker; they are kept, so that the resumed run equals
            an uninterrupted one.
        seed: of the order of the examples.

    Raises:
        UserError: a global batch size that is not divisible by processes and micro-batch, or step counts that do not match.
    """
    stored, recompute = stored or {}, training.activation_checkpointing
    dense = dense_order(training, lengths, processes, seed, stored.get("dense"))
    steps = number_of_steps(training, len(lengths), dense)
    by_clock = training.max_time is not None and isinstance(training.eval_steps, float)
    eval_every = steps if by_clock else _every(training.eval_steps, steps)
    save_every = eval_every if training.save_steps is None else _every(training.save_steps, steps)
    if by_clock and isinstance(training.save_steps, float):
        raise UserError(
            f"training.save_steps: {training.save_steps:g} is a share of all steps, and with training.max_time the number of "
            "steps is unknown; give a whole number of steps, or remove it: a checkpoint is saved at each evaluation"
        )
    rows_per_step = len(lengths) / dense.steps_of(0) if dense else None
    plan = Plan(
        steps=steps,
        global_batch_size=round(rows_per_step) if rows_per_step else training.global_batch_size,
        processes=processes,
        micro_batch=1,
        eval_batch=1,
        eval_every=eval_every,
        save_every=save_every,
        rows=len(lengths),
        dense=(dense.shape.bins, dense.shape.capacity) if dense else None,
        rows_per_step=rows_per_step,
        time_limit=seconds(training.max_time) if training.max_time else None,
        checkpointing=bool(stored.get("checkpointing")) if recompute == "auto" else bool(recompute),
        packed=stored.get("packed"),
        attention=stored.get("attention"),
        eval_share=float(training.eval_steps) if by_clock else None,
    )
    plan = plan.with_rows_at_once(_rows_at_once(training, lengths, plan, stored), int(np.max(lengths)))
    eval_batch = training.per_device_eval_batch_size
    if eval_batch == "auto":
        eval_batch = stored.get("eval_batch") or modest_eval_batch(plan.micro_batch, int(np.max(eval_lengths, initial=1)))
    return replace(plan, eval_batch=eval_batch)


def dense_order(
    training: Training, lengths: Sequence[int] | np.ndarray, processes: int, seed: int, stored: Sequence[int] | None = None
) -> DenseOrder | None:
    """The steps of dense packing; None without it. A resumed run keeps its packed rows (`stored`)."""
    if training.packing != "dense" or training.global_batch_tokens is None:
        return None
    from hfstrat.data.dense import DenseOrder, Shape, shape_of

    shape = Shape(*stored) if stored else shape_of(training.global_batch_tokens, int(np.max(lengths)), processes)
    if shape.bins % processes:
        raise UserError(
            f"training.resume_from_checkpoint: the run was started with {shape.bins} packed rows per step, which {processes} "
            "processes cannot share equally; resume it with as many processes as it was started with"
        )
    return DenseOrder(lengths, shape, ENDLESS, seed)


def _rows_at_once(training: Training, lengths: Sequence[int] | np.ndarray, plan: Plan, stored: dict[str, Any]) -> int:
    """Rows of a forward pass: sequences, or packed rows of dense packing."""
    processes, micro = plan.processes, training.per_device_train_batch_size
    share = plan.dense[0] // processes if plan.dense else sequences_per_process(training.global_batch_size, processes)
    if micro == "auto":
        kept = stored.get("bins_at_once" if plan.dense else "micro_batch")
        sizes = [plan.dense[1]] if plan.dense else lengths
        return kept if kept and share % kept == 0 else modest_micro_batch(share, sizes)
    if plan.dense and share % micro:
        raise UserError(
            f"training.per_device_train_batch_size: {micro} does not divide the {share} packed rows per process of "
            f"{training.global_batch_tokens:,} tokens on {processes} process(es); expected one of "
            f"{', '.join(map(str, divisors(share)))}"
        )
    if share % micro:
        raise UserError(
            f"training.per_device_train_batch_size: {micro} does not divide the {share} sequences per process of a "
            f"global batch of {training.global_batch_size} on {processes} process(es); expected one of "
            f"{', '.join(map(str, divisors(share)))}"
        )
    return micro


def sequences_per_process(global_batch_size: int, processes: int) -> int:
    """Sequences of a global batch on one process. Raises UserError, with the nearest valid sizes, if it is not divisible."""
    if global_batch_size % processes:
        below = global_batch_size // processes * processes
        near = [str(size) for size in (below, below + processes) if size]
        raise UserError(
            f"training.global_batch_size: {global_batch_size} sequences cannot be split over {processes} processes; "
            f"the nearest sizes are {' and '.join(near)}"
        )
    return global_batch_size // processes


def number_of_steps(training: Training, rows: int, dense: DenseOrder | None = None) -> int:
    """The maximum number of optimizer steps; `ENDLESS` if only a time limit ends the run."""
    limits = [ENDLESS] if training.max_time else []
    if training.max_steps is not None:
        limits.append(training.max_steps)
    if training.num_train_epochs is not None and dense is not None:
        limits.append(dense.steps_in(training.num_train_epochs))
    elif training.num_train_epochs is not None:
        limits.append(max(1, math.ceil(training.num_train_epochs * rows / training.global_batch_size)))
    return min(limits)


def several_epochs(training: Training, rows: int) -> bool:
    """Whether a run may see an example twice."""
    if training.global_batch_tokens is not None:  # the rows of a step are not known yet
        return training.num_train_epochs is None or training.num_train_epochs > 1
    return number_of_steps(training, rows) * training.global_batch_size > rows


def _every(interval: int | float, steps: int) -> int:
    """An interval in steps, given in steps or as a share of all steps."""
    return max(1, min(steps, round(interval * steps) if isinstance(interval, float) and interval <= 1 else int(interval)))


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def modest_micro_batch(share: int, lengths: Sequence[int] | np.ndarray) -> int:
    """A divisor of `share` with about CPU_TOKENS in a typical forward pass and at most MAX_TOKENS in the longest."""
    wanted = min(CPU_TOKENS / float(np.mean(lengths)), MAX_TOKENS / float(np.max(lengths)))
    return max(d for d in divisors(share) if d <= max(1.0, wanted))


def modest_eval_batch(micro: int, longest: int) -> int:
    """Twice the micro-batch, limited to MAX_TOKENS of the longest examples."""
    return max(1, min(2 * micro, MAX_TOKENS // longest))


def largest_that_fits(share: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `share` whose worst-case step fits into memory. Raises UserError if a single sequence does not."""
    for micro in reversed(divisors(share)):
        if fits(micro):
            return micro
    raise UserError(
        "training.per_device_train_batch_size: a single sequence of the maximum length does not fit into memory; "
        "set training.activation_checkpointing: true, lower data.max_length, or use strategy lora"
    )


FIXED = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    # we enable activation checkpointing ourselves, only for the blocks that need a backward pass
    "activation_checkpointing": False,
    "remove_unused_columns": False,  # the collator takes what it needs
    "logging_nan_inf_filter": False,  # its default replaces NaN by the average
    "restore_callback_states_from_checkpoint": True,
    "ddp_find_unused_parameters": False,  # all trainable parameters are used in every step
    "label_names": ["labels"],
    "log_level": "error",  # Trainer would set it to warning on the other processes
    "log_level_replica": "error",
    "disable_tqdm": True,  # progress has a callback of its own
    "report_to": "none",  # trackers are callbacks.Tracker, which cannot end a run
}
COPIED = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "logging_steps")


def training_arguments(
    recipe: Recipe, plan: Plan, compute_dtype: torch.dtype, evaluate_first: bool, metric: str, higher_is_better: bool
) -> TrainingArguments:
    """The arguments of a run. Building them starts the process group, so they come before the model.

    Args:
        metric: chooses the best weights; an overfit classifier's loss rises while its accuracy may still improve.
        higher_is_better: whether a higher value of that metric is better.

    Raises:
        UserError: TrainingArguments refuses a value of `training.extra`.
    """
    import torch
    from transformers import TrainingArguments

    from hfstrat.trainer import muon
    from hfstrat.trainer.distributed import backend, is_sharded, on_cpu

    training = recipe.training
    settings = FIXED | {name: getattr(training, name) for name in COPIED}
    settings |= {
        "output_dir": recipe.output_dir,
        "run_name": Path(recipe.output_dir).expanduser().resolve().name,  # for trackers
        "seed": recipe.seed,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": plan.eval_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "optim": "adamw_torch_fused" if training.optim == muon.NAME else training.optim,  # transformers has no name for muon
        "bf16": compute_dtype == torch.bfloat16,
        "fp16": compute_dtype == torch.float16,
        "use_cpu": on_cpu(),
        "ddp_backend": backend(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_steps": plan.eval_every,
        "eval_on_start": evaluate_first,
        "save_steps": plan.save_every,
        "metric_for_best_model": metric,
        "greater_is_better": higher_is_better,
    }
    try:
        arguments = TrainingArguments(**{**settings, **training.extra})
    except (TypeError, ValueError) as error:
        raise UserError(f"training.extra: TrainingArguments does not accept it: {first_line(error)}") from error
    if training.optim == muon.NAME and is_sharded():
        raise UserError("training.optim: muon needs complete matrices, but the model is sharded; set adamw_torch_fused")
    # given to the constructor, it would require save_steps to be a multiple of eval_steps; our Trainer saves a checkpoint
    # whenever an evaluation is the best so far, so any combination works
    arguments.load_best_model_at_end = training.load_best_model_at_end
    return arguments
