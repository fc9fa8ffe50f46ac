"""The private members of Trainer that hfstrat overrides or uses, and why: the whole coupling to one version of transformers.

Nothing is patched, but a private method may change with any release. `tests/trainer/test_overrides.py` compares this table with
the installed library and with our code, and names the version if they differ.
"""

from __future__ import annotations

from typing import NamedTuple

TESTED = {"transformers": "5.23.0", "trl": "1.16.0"}


class Member(NamedTuple):
    """A private method, its parameters after `self`, and why it is overridden or called."""

    name: str
    parameters: str
    why: str


TRAINER = (
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
DISTILLATION_TRAINER = (
    Member("_tokenize_prompts", "prompts", "prompts are token ids already"),
    Member("_prepare_inputs", "generation_batch", "evaluation batches are not prompts to generate from"),
    Member("_get_eval_sampler", "eval_dataset", "as in TRAINER"),
)
ATTRIBUTES = ("_created_lr_scheduler",)  # set by Trainer.create_scheduler, and by ours
