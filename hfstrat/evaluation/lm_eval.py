"""Tasks of lm-evaluation-harness on a loaded model: its prompts and metrics, our forward passes.

Likelihoods (multiple choice, LAMBADA and similar tasks) are computed by `likelihood`, everything else by the harness itself.
"""

from __future__ import annotations

import hashlib
import logging
from difflib import get_close_matches
from typing import Any

import numpy as np

from hfstrat.errors import UserError, first_line
from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.intervals import Measurement, Z, means
from hfstrat.evaluation.likelihood import Likelihood
from hfstrat.recipe.schema import Evaluation

TOKENS_PER_ROW = 256  # assumed for the harness's own passes, whose batch size counts rows


def measure(subject: Subject, wanted: Evaluation, runner: Runner, seed: int) -> dict[str, Measurement]:
    """The metrics of each task, by its name. Raises UserError: a task that does not exist, or whose data is not available."""
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, limit = task_manager(wanted), wanted.max_rows
    seeds = {f"{name}_seed": seed for name in ("random", "numpy_random", "torch_random", "fewshot_random")}
    try:
        with runner.computing():
            lm = wrap_model(subject, runner)
            output = simple_evaluate(lm, tasks=wanted.lm_eval, task_manager=manager, limit=limit, bootstrap_iters=100, **seeds)
    except UserError:
        raise
    except Exception as error:  # tasks are third-party code and data
        raise UserError(f"evaluation.lm_eval: {', '.join(wanted.lm_eval)}: {first_line(error)}") from error
    samples = output["samples"]
    return {name: measurement_of(each, samples[name]) for name, each in output["results"].items() if name in samples}


def task_manager(wanted: Evaluation) -> Any:
    """The index of tasks: `include_path` alone if it has all of them, since indexing the harness's own takes seconds."""
    from lm_eval.tasks import TaskManager

    files = {name for name in wanted.lm_eval if name.endswith((".yaml", ".yml"))}
    names = set(wanted.lm_eval) - files
    for defaults in (False, True):
        manager = TaskManager(include_path=wanted.include_path, include_defaults=defaults)
        unknown = sorted(names - set(manager.all_tasks))
        if not unknown:
            return manager
    near = get_close_matches(unknown[0], manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    raise UserError(f"evaluation.lm_eval: {unknown[0]}: lm-evaluation-harness has no such task; {hint}")


def wrap_model(subject: Subject, runner: Runner) -> Any:
    """The loaded model with the interface of the harness."""
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):  # type: ignore[misc]
        """Answers the harness's requests for likelihoods, which are tokenized already, by `Likelihood`."""

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
            limit = self.max_length
            pairs = [(front[max(0, len(front) + len(back) - 1 - limit) :], back) for _, front, back in requests]
            sums = likelihood.score(pairs, "lm-eval")
            return [(-nll, right == tokens) for nll, tokens, right in sums.tolist()]

    likelihood = Likelihood(subject, runner)
    return Loaded(pretrained=subject.inner, tokenizer=subject.tokenizer, batch_size=max(1, runner.budget // TOKENS_PER_ROW))


def measurement_of(entries: dict[str, Any], samples: list[dict[str, Any]]) -> Measurement:
    """A task's metrics; means over examples keep the values of the examples, so that two models can be paired."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    columns, given = dict[str, np.ndarray](), dict[str, tuple[float, float, float]]()
    for key, value in entries.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filtered == filters[0] else f"{metric} ({filtered})"
        rows: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
        if all(isinstance(row, bool | int | float) for row in rows) and abs(float(np.mean(rows)) - value) < 1e-9:
            columns[name] = np.array(rows, dtype=np.float64)
        else:
            error = entries.get(f"{metric}_stderr,{filtered}")
            half = Z * error if isinstance(error, int | float) else float("nan")
            given[name] = (float(value), value - half, value + half)
    count = len([sample for sample in samples if sample["filter"] == filters[0]])
    columns = {name: column for name, column in columns.items() if len(column) == count}
    shares = tuple(name for name, column in columns.items() if set(np.unique(column)) <= {0.0, 1.0})
    order = hashlib.sha256(repr([sample["doc_hash"] for sample in samples]).encode()).hexdigest()
    return Measurement(count, means(columns), shares, given=given, order=order)
