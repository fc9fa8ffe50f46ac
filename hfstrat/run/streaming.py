"""What cannot be combined with data that are read while training, before torch is imported."""

from __future__ import annotations

from hfstrat.errors import UserError
from hfstrat.objectives import task_of
from hfstrat.recipe.schema import Recipe

WORKERS = "dataloader_num_workers"


def check(recipe: Recipe) -> None:
    """Refuse what needs all rows at once, or their number. Raises UserError that begins with the setting."""
    if not recipe.data.streaming:
        return
    training, strategy = recipe.training, recipe.strategy
    if training.max_steps is None:
        raise UserError(
            "training.max_steps: not given, and with data.streaming the number of rows is unknown; give the number of steps"
        )
    if training.num_train_epochs is not None:
        raise UserError(
            f"training.num_train_epochs: {training.num_train_epochs:g}: with data.streaming the number of rows, and so of "
            "epochs, is unknown; remove it, training.max_steps is the length of the run"
        )
    if not task_of(recipe).rows.streams:
        raise UserError(
            f"data.streaming: task {recipe.task} with objective {recipe.objective.name} reads all rows before training; "
            "expected task causal-lm with objective sft. Remove data.streaming"
        )
    if reason := strategy.unstreamable:
        raise UserError(f"{reason}; with data.streaming rows are read while training. Change it, or remove data.streaming")
    if training.must_pack:
        given = str(training.packing).lower()
        raise UserError(
            f"training.packing: {given}: with data.streaming the lengths of later rows are unknown, and rows are not packed; "
            "set auto or false"
        )
    if training.train_sampling_strategy != "auto":
        raise UserError(
            f"training.train_sampling_strategy: {training.train_sampling_strategy}: with data.streaming data.shuffle_buffer "
            "decides the order; remove it"
        )
    if training.extra.get(WORKERS):
        raise UserError(
            f"training.extra.{WORKERS}: {training.extra[WORKERS]}: with data.streaming each process reads its rows itself, "
            "since a position is that of one reader; remove it"
        )
