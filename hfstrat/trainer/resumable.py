"""What makes a run one run, however often it is cut off: complete checkpoints, a stop after the step, the same state again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import save_fsdp_model
from transformers.distributed.fsdp import get_fsdp_ckpt_kwargs

from hfstrat import errors
from hfstrat.recipe import changes
from hfstrat.trainer import checkpoints
from hfstrat.trainer.callbacks import Patience
from hfstrat.trainer.signals import Agreement, after_the_step

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class Cut(Exception):
    """An evaluation ends here, since the run was asked to stop."""


class Resumable(Base):  # type: ignore[misc]
    """The part of StrategyTrainer that saves, stops and goes on.

    `checkpoint` is what this session goes on from, `keep` how many complete checkpoints stay, `marker_state` what their
    markers hold beside sizes and hashes, `say` shows a line to the user. `start_counts` is whether the weights before
    training may be the best, `counts_tokens` whether the trainer's state counts them, since it makes rows itself.
    """

    start_counts: ClassVar[bool] = True
    counts_tokens: ClassVar[bool] = False

    checkpoint: Path | None
    keep: int
    marker_state: dict[str, Any]
    say: Callable[[str], None]
    control: Any
    lr_scheduler: Any
    sampler: Any

    def _be_resumable(self) -> None:
        self.checkpoint = None
        self._agreement = Agreement(self.args.world_size)
        self._steps_before: int | None = None
        self._saved_step: int | None = None
        self._best_saved: tuple[Any, Any, Any] = (None, None, None)
        self._in_steps = self._owes_evaluation = False

    # going on

    def _load_callback_state(self) -> None:
        """State and callbacks as they were; what the recipe may change since is as it says now."""
        given = {type(callback): callback for callback in self.callback_handler.callbacks}
        super()._load_callback_state()  # makes the callbacks anew, with their old settings
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "follow"):
                callback.follow(given[type(callback)])
            if hasattr(callback, "state"):  # one that is new here: Trainer saves only those it knows
                self.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
        self._steps_before = self.state.max_steps
        self._owes_evaluation = self.control.should_evaluate  # it is on in a checkpoint only where one was cut short
        self.state.compute_steps(self.args, self.args.max_steps)
        self.sampler.begin(self.state.global_step)
        self._find_best()

    def _find_best(self) -> None:
        """The best checkpoint beside the one we go on from, which may have been moved; forgotten where it is gone."""
        state, here = self.state, self.checkpoint
        if state.best_global_step is None or here is None:
            return
        if changes.evaluates_on_others(checkpoints.state_of(here)["recipe"], self.marker_state["recipe"]):
            self._forget_best("evaluations are on other rows from now on")
            return
        places = [here.parent / f"checkpoint-{state.best_global_step}", Path(state.best_model_checkpoint or here)]
        found = [p for p in places if checkpoints.step_of(p) == state.best_global_step and checkpoints.fault(p) is None]
        if found:
            state.best_model_checkpoint = str(found[0])
        elif state.best_global_step and self.args.load_best_model_at_end:
            self._forget_best(f"the best weights so far, {places[0]}, are gone or broken")
        self._best_saved = self._best()

    def _forget_best(self, reason: str) -> None:
        self.say(f"{reason}: the best is looked for from here on")
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Patience):
                callback.early_stopping_patience_counter = 0

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A schedule over another number of steps has its own rate for the next one; the stored rate is the old one's."""
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
        """As Trainer's; random numbers are left as they were, so that training is the same however often it is evaluated."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws one for its workers
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """The loss before training is one that training has to beat: if it never does, those weights are the best."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        if skip_scheduler and self.start_counts:
            self._determine_best_metric(metrics=metrics, trial=trial)
            if self.args.load_best_model_at_end:
                self._save_checkpoint(self.model_wrapped, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_save = False
        return metrics

    def _make_up_for_evaluation(self) -> None:
        """The evaluation that an interruption cut short comes before anything else."""
        if not self._owes_evaluation:
            return
        self._owes_evaluation = False
        self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
        if self.state.best_global_step == self.state.global_step and self.checkpoint is not None:
            self.state.best_model_checkpoint = str(self.checkpoint)
            self._best_saved = self._best()
        self.control.should_save = False

    # stopping

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_for_evaluation()
        if self.control.should_training_stop:  # a callback had ended this run before it was cut off
            return
        with after_the_step():
            self._in_steps = True
            try:
                super()._run_epoch(*args, **kwargs)
            finally:
                self._in_steps = False
        if self._agreement.close():
            raise KeyboardInterrupt

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._make_up_for_evaluation()
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        due, stops = self.control.should_evaluate, self._agreement.asked()
        if stops:  # only log
            self.control.should_evaluate = self.control.should_save = False
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Cut:
            stops = True
        if stops:
            self.control.should_evaluate = due
            self._stop(model, trial)

    def stop_evaluating_if_asked(self) -> None:
        if self._in_steps and self._agreement.asked():
            raise Cut

    def _stop(self, model: Any, trial: Any) -> None:
        """Save and go; an evaluation that is due is kept in the checkpoint as due."""
        if self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
        raise KeyboardInterrupt

    # saving

    def _best(self) -> tuple[Any, Any, Any]:
        return self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, with the marker as its last file; rotation is ours."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / checkpoints.MARKER).unlink(missing_ok=True)  # an older one of that name is being overwritten
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # the marker says that every process has written its part
            if self.args.should_save:
                checkpoints.mark_complete(folder, self.marker_state)
        except Exception as error:
            self._not_saved(folder, errors.named(error), error)
            return
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        self._saved_step, self._best_saved = self.state.global_step, self._best()
        if self.args.should_save:
            checkpoints.rotate(folder.parent, self.keep, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()  # nobody leaves while the first process is at it

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP, saving the state of an optimiser that has not stepped would make one: before step 1 there is none."""
        if not self.is_fsdp_enabled or self.state.global_step:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, self.accelerator, self.model, output_dir, **get_fsdp_ckpt_kwargs())

    def _not_saved(self, folder: Path, end: errors.RunError, error: Exception) -> None:
        """Without room for a checkpoint training goes on, with those there are; several processes cannot agree on that now."""
        if end.code != errors.DISK_FULL:
            raise error
        checkpoints.remove(folder)
        whole = checkpoints.complete(folder.parent)
        kept = f"the last complete one is {whole[-1]}" if whole else "there is none yet"
        if self.args.world_size > 1:
            raise errors.RunError(f"the disk is full: no checkpoint-{self.state.global_step}; {kept}", end.code) from error
        if self.state.best_global_step == self.state.global_step:  # its weights will be gone
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._best_saved
        self.say(
            f"the disk is full: no checkpoint-{self.state.global_step}; {kept}. Training goes on; free some room, or it will "
            "end without a result"
        )
