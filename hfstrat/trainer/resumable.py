"""Resuming: complete checkpoints, a stop after the current step, and the same state as in an uninterrupted run.

The private methods of Trainer that are overridden here are listed in `trainer.PRIVATE_OF_TRAINER`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import save_fsdp_model
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from hfstrat import errors
from hfstrat.recipe import stored
from hfstrat.trainer import checkpoints
from hfstrat.trainer.callbacks import Patience
from hfstrat.trainer.signals import Agreement, deferred

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class EvaluationInterrupted(Exception):
    """An evaluation was interrupted by a stop request."""


class Resumable(Base):  # type: ignore[misc]
    """The part of StrategyTrainer that saves, stops and resumes."""

    start_counts: ClassVar[bool] = True  # whether the untrained weights may be the best
    counts_tokens: ClassVar[bool] = False  # whether the trainer's state counts tokens, because it generates examples itself

    checkpoint: Path | None  # the one that this session resumes from
    ended_in: Path | None  # the checkpoint with the weights of the last step, once training has ended
    keep: int  # the number of complete checkpoints
    marker_state: dict[str, Any]  # the content of their markers, apart from sizes and hashes
    print_line: Callable[[str], None]
    control: Any
    lr_scheduler: Any
    sampler: Any

    def _init_resumable(self) -> None:
        self.checkpoint = self.ended_in = None
        self._agreement = Agreement(self.args.world_size)
        self._steps_before: int | None = None
        self._saved_step: int | None = None
        self._best_saved: tuple[Any, Any, Any] = (None, None, None)
        self._in_steps = self._evaluation_pending = False

    # resuming

    def _load_callback_state(self) -> None:
        """State and callbacks as stored, with the settings of the present recipe."""
        given = {type(callback): callback for callback in self.callback_handler.callbacks}
        super()._load_callback_state()  # creates the callbacks again, with their old settings
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "follow"):
                callback.follow(given[type(callback)])
            if hasattr(callback, "state"):  # a new one: Trainer saves only callbacks that it knows
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        self._steps_before = self.state.max_steps
        self._evaluation_pending = self.control.should_evaluate  # set in a checkpoint only if one was interrupted
        self.state.compute_steps(self.args, self.args.max_steps)
        self.sampler.begin(self.state.global_step)
        self._find_best()

    def _find_best(self) -> None:
        """Find the best checkpoint next to the resumed one, whose folder may have been moved; forget it if it is missing."""
        state, here = self.state, self.checkpoint
        if state.best_global_step is None or here is None:
            return
        if stored.evaluates_on_others(checkpoints.state_of(here)["recipe"], self.marker_state["recipe"]):
            self._forget_best("the evaluation data has changed")
            return
        places = [here.parent / f"checkpoint-{state.best_global_step}", Path(state.best_model_checkpoint or here)]
        found = [p for p in places if checkpoints.step_of(p) == state.best_global_step and checkpoints.fault(p) is None]
        if found:
            state.best_model_checkpoint = str(found[0])
        elif state.best_global_step and self.args.load_best_model_at_end:
            self._forget_best(f"the best checkpoint, {places[0]}, is missing or incomplete")
        self._best_saved = self._best()

    def _forget_best(self, reason: str) -> None:
        self.print_line(f"{reason}: tracking the best checkpoint restarts here")
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Patience):
                callback.early_stopping_patience_counter = 0

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """After a change of the number of steps the learning rate comes from the new schedule, not from the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is None or self._steps_before == self.state.max_steps or not hasattr(schedule, "lr_lambdas"):
            return
        rates = [base * shape(schedule.last_epoch) for base, shape in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    # evaluations

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation with the random state restored: training does not depend on the number of evaluations."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed for its workers
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """The evaluation before training counts: if training never improves on it, the untrained weights are the best."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        if skip_scheduler and self.start_counts:
            self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.load_best_model_at_end:
                self._save_checkpoint(self.model_wrapped, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_save = False
        return metrics

    def _repeat_evaluation(self) -> None:
        """Repeat an evaluation that was interrupted, before anything else."""
        if not self._evaluation_pending:
            return
        self._evaluation_pending = False
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        if self.state.best_global_step == self.state.global_step and self.checkpoint is not None:
            self.state.best_model_checkpoint = str(self.checkpoint)
            self._best_saved = self._best()
        self.control.should_save = False

    # stopping

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._repeat_evaluation()
        if self.control.should_training_stop:  # a callback had ended this run before it was interrupted
            return
        with deferred():
            self._in_steps = True
            try:
                super()._run_epoch(*args, **kwargs)
            finally:
                self._in_steps = False
        if self._agreement.close():
            raise KeyboardInterrupt

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.checkpoint is not None and checkpoints.step_of(self.checkpoint) == self.state.global_step:
            self.ended_in = self.checkpoint
        self._repeat_evaluation()
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        due, stops = self.control.should_evaluate, self._agreement.stop_requested()
        if stops:  # only log
            self.control.should_evaluate = self.control.should_save = False
        elif self.control.should_training_stop and (due or self.control.should_save):
            self._save_last_step(tr_loss, grad_norm, model, trial, *args, **kwargs)
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationInterrupted:
            stops = True
        if stops:
            self.control.should_evaluate = due
            self._stop(model, trial)

    def _save_last_step(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save the weights of the last step before they are evaluated: whatever fails from here on, they are on the disk.

        The checkpoint records that its evaluation is pending, so that a resumed run makes it.
        """
        due = self.control.should_evaluate
        self.control.should_evaluate = self.control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)  # only logs
        self.control.should_evaluate = due
        self._save_checkpoint(model, trial)
        self.control.should_save = self._saved_step == self.state.global_step  # once more, with the evaluation

    def interrupt_evaluation(self) -> None:
        """End an evaluation during training if a stop was requested."""
        if self._in_steps and self._agreement.stop_requested():
            raise EvaluationInterrupted

    def _stop(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, which records an evaluation that is still pending, and end the run."""
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
        raise KeyboardInterrupt

    # saving

    def _best(self) -> tuple[Any, Any, Any]:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's checkpoint with the marker as its last file; then our rotation."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        again = self._saved_step == self.state.global_step
        if self.args.should_save and not again:
            (folder / checkpoints.MARKER).unlink(missing_ok=True)  # an older checkpoint of that name is overwritten
        try:
            if again:
                self._update_state(folder)
            else:
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # the marker states that every process has written its part
            if self.args.should_save:
                checkpoints.mark_complete(folder, self.marker_state)
        except Exception as error:
            self._not_saved(folder, errors.named(error), error)
            return
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        self._saved_step, self._best_saved = self.state.global_step, self._best()
        if self.control.should_training_stop:
            self.ended_in = folder
        if self.args.should_save:
            checkpoints.rotate(folder.parent, self.keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # no process exits before rotation is done

    def _update_state(self, folder: Path) -> None:
        """Write the Trainer's state into a checkpoint that has the weights of this step already."""
        if not self.args.should_save:
            return
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        for each in [*self.callback_handler.callbacks, self.control]:
            kept = self.state.stateful_callbacks.get(type(each).__name__)
            if isinstance(each, ExportableState) and not isinstance(kept, list):
                self.state.stateful_callbacks[type(each).__name__] = each.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP only the model is saved before step 1: saving would create the state of an optimizer without steps."""
        if not self.is_fsdp_enabled or self.state.global_step:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())

    def _not_saved(self, folder: Path, end: errors.RunError, error: Exception) -> None:
        """Continue with the existing checkpoints if the disk is full; several processes cannot agree on that and end."""
        if end.code != errors.DISK_FULL:
            raise error
        checkpoints.remove(folder)
        completed = checkpoints.complete(folder.parent)
        kept = f"; the last complete checkpoint is {completed[-1]}" if completed else "; no complete checkpoint exists yet"
        if self.args.world_size > 1:
            full = f"the disk is full: checkpoint-{self.state.global_step} was not saved{kept}"
            raise errors.RunError(full, end.code, kept) from error
        if self.state.best_global_step == self.state.global_step:  # its weights will be lost
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best_saved
        self.print_line(
            f"the disk is full: checkpoint-{self.state.global_step} was not saved{kept}. Training continues; free some disk "
            "space, or the result cannot be saved"
        )
