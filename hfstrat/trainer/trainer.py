"""The subclass of Trainer: reproducible order of examples, per-example evaluation, complete checkpoints, checks for NaN.

`PRIVATE_OF_TRAINER` lists all private members of Trainer that hfstrat overrides or uses: the whole coupling to one version of
transformers. Nothing is patched, but a private method may change with any release; `tests/trainer/test_overrides.py` compares
the list with the installed library and with our code, and names the version if they differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import EvalPrediction, Trainer
from transformers.optimization import get_scheduler
from transformers.trainer_callback import PrinterCallback

from hfstrat import errors
from hfstrat.models import converted, virtual_tokens
from hfstrat.trainer import checkpoints, distributed, sharded
from hfstrat.trainer.callbacks import Clock
from hfstrat.trainer.resumable import Resumable

Sums = tuple[np.ndarray, ...]
"""What an evaluation keeps of each example: arrays whose first dimension is the examples."""

VIRTUAL_STEPS = 10_000  # resolution of a schedule that follows a time limit


class StrategyTrainer(Resumable, Trainer):
    """Trainer with the guarantees of hfstrat.

    Args:
        sampler: the examples (or packed rows) of all steps, in order.
        clock: the time limit, which the learning rate follows; None: no limit.
        keep: the number of complete checkpoints to keep.
        state: the content of a checkpoint's marker, apart from sizes and hashes (the recipe, the chosen micro-batch).
        rate_of: the factor of a parameter's learning rate, by its name; by default 1 for all.
        metrics: the `Metrics` of the task for the data of the run: what is minimized and measured.
        print_line: prints a line.

    After an evaluation, `details` has its details and `sums` the sums of each example; the evaluation before training passes
    its sums to `at_first`.
    """

    def __init__(
        self,
        *,
        sampler: Sampler[int],
        clock: Clock | None = None,
        keep: int = 2,
        state: dict[str, Any] | None = None,
        rate_of: Callable[[str], float] | None = None,
        metrics: Any,
        print_line: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> None:
        self.metrics, self.loss = metrics, metrics.loss
        self.details: dict[str, Any] | None = None
        self.sums: Sums | None = None
        self.at_first: Callable[[Sums], None] | None = None
        self.products: AbstractContextManager[Any] = nullcontext()  # how the products of a training step are computed
        kwargs.setdefault("compute_loss_func", metrics.loss)
        kwargs.setdefault("compute_metrics", self._measure)
        super().__init__(**kwargs)
        sharded.reduce_in_float32(self)
        self.remove_callback(PrinterCallback)
        self.lr_scheduler: Any
        self.sampler, self.clock, self.keep, self.marker_state = sampler, clock, keep, state or {}
        self.rate_of, self.print_line = rate_of, print_line
        self._init_resumable()
        self._bad_steps: torch.Tensor | None = None
        if clock is not None:
            self.add_callback(clock)

    @property
    def eval_collator(self) -> Any:
        """The collator of evaluations."""
        return self.data_collator

    @property
    def evaluates_its_loss(self) -> bool:
        """Whether evaluations measure what training minimizes, and nothing that is bound for training alone."""
        return bool(self.compute_loss_func == self.loss)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self.sampler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Trainer's choice without vectors: it detects norms by their names, and custom models may have other names."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if len(shapes.get(name, (1, 1))) > 1]

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's optimizer, with its groups split by learning rate if `rate_of` is given."""
        created, optimizer = self.optimizer is None, super().create_optimizer(model)
        if not created or self.rate_of is None:
            return optimizer
        share = {id(p): self.rate_of(name) for name, p in (model or self.model).named_parameters()}
        optimizer.param_groups[:] = [
            {**group, "params": [p for p in group["params"] if share[id(p)] == rate], "lr": group["lr"] * rate}
            for rate in sorted(
                {share[id(p)] for group in optimizer.param_groups for p in group["params"]}, key=lambda one: (one != 1, -one)
            )
            for group in optimizer.param_groups
            if any(share[id(p)] == rate for p in group["params"])
        ]  # there is no optimizer state yet; learning_rate itself comes first, since Trainer logs the first
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's schedule; with a time limit, its position is the share of time or of steps used, whichever is larger."""
        if self.clock is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        warmup, clock = self.args.get_warmup_steps(VIRTUAL_STEPS), self.clock
        extra = {"scheduler_specific_kwargs": self.args.lr_scheduler_kwargs}
        shape = get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, VIRTUAL_STEPS, **extra).lr_lambdas[0]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: shape(round(VIRTUAL_STEPS * max(clock.share, step / num_training_steps)))
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Also check that the model is wrapped as requested."""
        model, batches = super()._prepare_for_training(*args, **kwargs)
        distributed.check_wrapped(model, self.args.world_size)
        return model, batches

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self.clock = next((cb for cb in self.callback_handler.callbacks if isinstance(cb, Clock)), None)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.products:
            return super().training_step(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Any, torch.Tensor]:
        """Sums per example instead of means per batch: metrics do not depend on batch size or number of processes."""
        self.interrupt_evaluation()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.metrics.sums(model, inputs)
        return None, sums if len(sums) > 1 else sums[0], sums[0]

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        sums, before = prediction.predictions, self.sums
        self.sums = sums if isinstance(sums, tuple) else (sums,)
        if before is not None and before[0].shape == self.sums[0].shape:
            margins = self.marker_state.setdefault("margins", {})
            margins[str(self.state.global_step)] = change_margin(before[0], self.sums[0])
        if self.state.global_step == 0 and self.at_first is not None:
            self.at_first(self.sums)
            self.at_first = None
        metrics, self.details = self.metrics.measure(self.sums)
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if not math.isfinite(metrics[f"{prefix}_loss"]):
            self._stop_non_finite("evaluation loss", self.state.global_step)
        return metrics

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is not None:
            return norm  # float16 finds its scale by overflowing; losses are checked when logged
        if norm is None:
            return None  # DeepSpeed has none before its first step
        bad = ~torch.isfinite(torch.as_tensor(norm))
        self._bad_steps = bad if self._bad_steps is None else self._bad_steps | bad
        if bad.device.type == "cpu":
            self._check_finite()  # on other devices at each log and save, since it waits for the device
        return norm

    def _check_finite(self) -> None:
        if self._bad_steps is not None and bool(self._bad_steps):
            self._stop_non_finite("gradient", self.state.global_step + 1)

    def _stop_non_finite(self, what: str, step: int) -> None:
        good = checkpoints.complete(Path(str(self.args.output_dir)))
        kept = f"; the last complete checkpoint is {good[-1]}" if good else "; no checkpoint exists yet"
        cure = "Halve training.learning_rate, increase training.warmup_steps, or look for broken examples with `hfstrat check`"
        if step == 0:
            cure = "Nothing was trained yet: the model's weights are not finite, or it needs model.dtype: float32 or bfloat16"
        raise errors.RunError(f"the {what} is not finite at step {step}{kept}. {cure}", errors.NON_FINITE, kept)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_finite()
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop_non_finite("loss", self.state.global_step)
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_finite()
        super()._save_checkpoint(model, trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the best weights whenever they appear, also between regular checkpoints; compare equal metrics by loss."""
        if self._equals_with_less_loss(metrics):
            self.state.best_metric = None  # so that this one counts as better
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _equals_with_less_loss(self, metrics: dict[str, float]) -> bool:
        state = self.state
        if metrics[f"eval_{self.args.metric_for_best_model}"] != state.best_metric:
            return False
        best = (entry for entry in state.log_history if entry["step"] == state.best_global_step)
        return bool(
            metrics["eval_loss"] < max((entry["eval_loss"] for entry in best if "eval_loss" in entry), default=-math.inf)
        )

    def best_step(self) -> int | None:
        """The step whose weights were loaded at the end; None if the last weights were kept."""
        best = self.state.best_model_checkpoint
        return checkpoints.step_of(Path(best)) if best and self.args.load_best_model_at_end else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a checkpoint also gets what computes the virtual tokens."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and output_dir is not None:
            virtual_tokens.save_encoder(self.accelerator.unwrap_model(self.model), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_converted(resume_from_checkpoint, model or self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            virtual_tokens.load_encoder(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if not self._load_converted(best, self.model):
            sharded.reshard(self.model)
            super()._load_best_model()
            virtual_tokens.load_encoder(self.accelerator.unwrap_model(self.model), Path(best))

    def _load_converted(self, folder: str, model: Any) -> bool:
        """Load weights that transformers converted on saving; False if Trainer reads this checkpoint as it is."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not converted.is_converted(model):
            return False  # sharded checkpoints have the model's own names
        self._issue_warnings_after_load(converted.load_converted(model, Path(folder)))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise an error if a checkpoint does not match the model; transformers would only log it."""
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {}))
        unmatched = sorted(set(load_result.missing_keys) - tied) or sorted(load_result.unexpected_keys)
        if unmatched:
            raise errors.RunError(
                f"the checkpoint does not match the model: {unmatched[0]} and {len(unmatched) - 1} more keys", errors.CRASH
            )
        super()._issue_warnings_after_load(load_result)


def change_margin(before: np.ndarray, after: np.ndarray) -> float:
    """Half of the 95 % interval of the change of the loss between two evaluations of the same examples.

    Args:
        before, after: summed loss and items of each example, `[examples, 2]`.
    """
    nll, items = (after[:, 0] - before[:, 0]).astype(np.float64), after[:, 1].astype(np.float64)
    total = max(float(items.sum()), 1.0)
    return 1.96 * float(np.sqrt(np.square(nll - nll.sum() / total * items).sum())) / total


TESTED = {"transformers": "5.23.0", "trl": "1.16.0"}


class Member(NamedTuple):
    """A private method, its parameters after `self`, and why it is overridden or called."""

    name: str
    parameters: str
    why: str


PRIVATE_OF_TRAINER = (
    Member("_get_train_sampler", "train_dataset", "examples come in our own reproducible order"),
    Member("_get_eval_sampler", "eval_dataset", "on-policy distillation evaluates in Trainer's order, not in TRL's"),
    Member("_prepare_inputs", "inputs", "moves a batch to the device; TRL's override generates answers, except in evaluations"),
    Member("_prepare_for_training", "max_steps, train_dataloader, resume_from_checkpoint", "checks how the model was wrapped"),
    Member(
        "_run_epoch",
        "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, ignore_keys_for_eval, start_time, "
        "resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
        "signals are deferred to the end of a step while steps are running",
    ),
    Member("_finalize_training", "trial, num_train_samples, start_time", "an interrupted evaluation is repeated first"),
    Member(
        "_maybe_log_save_evaluate",
        "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate",
        "a stop request saves a checkpoint after the step",
    ),
    Member("_evaluate", "trial, ignore_keys_for_eval, skip_scheduler", "the untrained weights count as the best so far"),
    Member("_get_grad_norm", "model, grad_norm", "a gradient that is not finite ends the run"),
    Member("_determine_best_metric", "metrics, trial", "the best weights are always saved; the loss decides between equals"),
    Member("_save_checkpoint", "model, trial", "a marker completes a checkpoint; rotation never deletes the last complete one"),
    Member("_save_optimizer_and_scheduler", "output_dir", "FSDP fails to save an optimizer that has not made a step"),
    Member("_load_optimizer_and_scheduler", "checkpoint", "a changed number of steps changes the next learning rate"),
    Member("_load_callback_state", "", "resumed callbacks take the recipe's present settings"),
    Member("_load_from_checkpoint", "resume_from_checkpoint, model", "weights that were converted on saving are read back"),
    Member("_load_best_model", "", "the same"),
    Member("_issue_warnings_after_load", "load_result", "a checkpoint that does not fit the model is an error"),
)
PRIVATE_OF_DISTILLATION_TRAINER = (
    Member("_tokenize_prompts", "prompts", "prompts are token ids already"),
    Member("_prepare_inputs", "generation_batch", "evaluation batches are not prompts to generate from"),
    Member("_get_eval_sampler", "eval_dataset", "as in Trainer"),
)
PRIVATE_OF_GRPO_TRAINER = (
    *PRIVATE_OF_DISTILLATION_TRAINER,
    Member(
        "_generate_single_turn",
        "prompt_ids, images, multimodal_fields, num_generations, has_tool_images",
        "answers are sampled in the precision of the forward pass",
    ),
    Member("_generate_and_score_completions", "inputs", "activation checkpointing is off, and restored block by block"),
)
PRIVATE_ATTRIBUTES = ("_created_lr_scheduler",)  # set by Trainer.create_scheduler, and by ours
