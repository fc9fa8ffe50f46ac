"""What to try next, from the report of a run: sentences, each with a setting or a command, or "" without one."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from hfstrat import strategies
from hfstrat.data.prepare import FEW_ROWS
from hfstrat.evaluation.intervals import CONTROL, ROWS
from hfstrat.objectives import task_of
from hfstrat.recipe import format
from hfstrat.run import simple_models, verdict
from hfstrat.tasks.report import Report, Result

Advice = tuple[str, str]
STILL_FALLING = 0.005  # relative fall of the evaluation loss between the last two evaluations
SPIKE = 10.0  # a norm of the gradient as a multiple of the median
LOST = 0.01  # share of the tokens that are left out


def advice(report: Report, result: Result) -> list[Advice]:
    """Advice on a finished run; what is most certain comes first."""
    task, strategy = task_of(report.run.recipe), strategies.build(report.run.recipe.strategy)
    found = [*_training(report, result), *_data(report, result), *task.text.advice(result), *strategy.advice(result)]
    return [*found, *_commands(report)]


def _training(report: Report, result: Result) -> Iterator[Advice]:
    for one in result.simple_models:
        if verdict.is_worse(report, one):
            words = simple_models.advice_on(one.name)
            yield f"The baseline {one.name} is better: {words}.", ""
    if result.best_step == 0:
        yield (
            "No evaluation was better than the untrained model: lower the learning rate, or look at the data.",
            (f"training.learning_rate={(report.run.recipe.training.learning_rate or 1e-4) / 4:.1e}"),
        )
    elif result.overfitting:
        yield (
            "Training went on after the best evaluation: fewer epochs, or let it stop by itself.",
            "training.early_stopping_patience=2"
            if report.run.recipe.training.load_best_model_at_end
            else "training.load_best_model_at_end=true",
        )
    elif _still_falling(result):
        yield "The evaluation loss was still falling at the end: train longer.", _limit(report, result)
    norms = [one.grad_norm for one in result.losses if one.grad_norm is not None]
    if len(norms) >= 8 and max(norms[len(norms) // 4 :]) > SPIKE * statistics.median(norms) > 0:
        yield (
            "The norm of the gradient has spikes after the warmup: lower the learning rate, or clip earlier.",
            ("training.max_grad_norm=0.5"),
        )
    control = result.measured.get(CONTROL)
    change = (control.difference or {}).get("loss") if control else None
    if change and change.low is not None and change.low > 0:
        yield "The model forgets general text: train fewer parameters (lora), fewer steps, or at a lower learning rate.", ""


def _limit(report: Report, result: Result) -> str:
    """The setting that ended the run."""
    training = report.run.recipe.training
    if training.max_steps is not None and result.steps >= training.max_steps:
        return f"training.max_steps={2 * training.max_steps}"
    epochs, seen = training.num_train_epochs, result.plan.epochs
    if training.max_time is not None and not (epochs and seen and seen >= epochs):
        return "training.max_time"
    return f"training.num_train_epochs={2 * epochs:g}" if epochs else "training.num_train_epochs"


def _still_falling(result: Result) -> bool:
    losses = [point.eval_loss for point in result.curve]
    if len(losses) < 3 or not all(loss > 0 for loss in losses):
        return False
    return losses[-1] == min(losses) and losses[-2] - losses[-1] > STILL_FALLING * losses[-2]


def _data(report: Report, result: Result) -> Iterator[Advice]:
    data, measured = report.run.data, result.measured.get(ROWS)
    if measured and measured.rows < FEW_ROWS:
        yield "Measure on more examples: with so few, one run cannot be told from another.", "data.eval_size"
    if data is None:
        return
    lost, tokens = data.train.tokens_lost, data.train.tokens
    if lost > LOST * (lost + tokens):
        yield f"{format.count(lost)} training tokens are left out, since examples are too long: raise", "data.max_length"
    if data.overlap.eval_rows_in_train:
        yield "Remove the evaluation examples that are in the training data too, and measure again.", ""
    if data.overlap.train_duplicates:
        yield f"{format.plural(data.overlap.train_duplicates, 'training example')} occur more than once: remove duplicates.", ""


def _commands(report: Report) -> Iterator[Advice]:
    task = task_of(report.run.recipe)
    yield "Try the result.", "hfstrat chat RUN" if task.text.generates else "hfstrat predict RUN"
    yield "Measure it on other examples, or against another run.", "hfstrat evaluate RUN --data FILE --against OTHER_RUN"
    yield (
        "See whether another strategy is better on the same examples.",
        "hfstrat compare --model MODEL --data DATA --budget 10min",
    )
    if task.model.has_predicted_costs:
        yield "Let settings be searched until a deadline.", "hfstrat tune --model MODEL --data DATA --time 30min"
