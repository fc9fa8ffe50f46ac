"""TrainingArguments from the section `training` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.recipe.schema import Recipe
from hfstrat.trainer.plan import Plan

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


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

    from hfstrat.trainer.distributed import backend, on_cpu

    training = recipe.training
    settings = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "max_steps": plan.steps,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": plan.eval_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "warmup_steps": training.warmup_steps,
        "optim": training.optim,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": compute_dtype == torch.bfloat16,
        "fp16": compute_dtype == torch.float16,
        "use_cpu": on_cpu(),
        "ddp_backend": backend(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": training.logging_steps,
        "eval_strategy": "steps",
        "eval_steps": plan.eval_every,
        "eval_on_start": evaluate_first,
        "save_strategy": "steps",
        "save_steps": plan.save_every,
        "metric_for_best_model": metric,
        "greater_is_better": higher_is_better,
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
        "run_name": Path(recipe.output_dir).expanduser().resolve().name,  # for trackers
    }
    try:
        arguments = TrainingArguments(**{**settings, **training.extra})
    except (TypeError, ValueError) as error:
        raise UserError(f"training.extra: TrainingArguments does not accept it: {str(error).splitlines()[0]}") from error
    # given to the constructor, it would require save_steps to be a multiple of eval_steps; our Trainer saves a checkpoint
    # whenever an evaluation is the best so far, so any combination works
    arguments.load_best_model_at_end = training.load_best_model_at_end
    return arguments
