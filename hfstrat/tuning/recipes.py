"""The recipes of a search: what a candidate trains, and the recipe that alone reproduces the winner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfstrat.engine.entries import Entry
from hfstrat.trainer.plan import ENDLESS
from hfstrat.tuning.options import WARMUP, Setting

SUMS = "measured.npz"  # in the folder of a rung: what it has measured of each row
DECAY = "1-sqrt"  # the best shape of a cooldown in arXiv 2405.18392
NOT_MEASURED = (  # in a rung, besides the evaluation examples
    *("eval_on_start=false", "samples=0", "baselines=false", "control=off", "metrics=[]", "regex=null", "temperature=0.0"),
    *("choices=[]", "lm_eval=[]", "include_path=null"),
)
ONCE = ("eval_on_start=false", "baselines=false")  # in the final run: the leaderboard has them


def decay(steps: int) -> dict[str, Any]:
    """The settings of a cooldown: `lr_scheduler_kwargs` of TrainingArguments."""
    return {"num_decay_steps": steps, "decay_type": DECAY}


def warmup(setting: Setting, entry: Entry) -> int:
    """Steps of the warmup; a share would depend on the length of the run."""
    given = entry.loaded.recipe.training.warmup_steps
    return int(given) if given >= 1 or given == 0 else setting.warmups.get(entry.label, WARMUP)


def measured_rows(setting: Setting, entry: Entry) -> list[str]:
    """The overrides that limit the held-out rows."""
    recipe, most = entry.loaded.recipe, setting.most_rows
    if most is None:
        return []
    most = min(most, recipe.evaluation.max_rows or most)
    return [f"evaluation.max_rows={most}", *([f"data.eval_size={most}"] if recipe.data.eval_size > max(1, most) else [])]


def common(setting: Setting, entry: Entry, settings: Sequence[str]) -> list[str]:
    """What all rungs of a trial and the final run share."""
    recipe, seed = entry.loaded.recipe, setting.options.seed
    return [
        *measured_rows(setting, entry),
        *entry.overrides,
        "data.eval=null",
        "data.eval_split=null",
        f"data.eval_seed={recipe.data.eval_seed if recipe.data.eval_seed is not None else seed}",
        f"seed={seed}",
        *settings,
    ]


def of_length(setting: Setting, entry: Entry, steps: int, cooldown: int) -> list[str]:
    """The schedule of a run of so many steps, the last ones a cooldown."""
    return [
        "training.num_train_epochs=null",
        "training.max_time=null",
        f"training.max_steps={steps}",
        "training.lr_scheduler_type=warmup_stable_decay",
        f"training.extra.lr_scheduler_kwargs={json.dumps(decay(cooldown))}",
        f"training.warmup_steps={warmup(setting, entry)}",
        f"training.eval_steps={steps}",
        f"training.save_steps={steps}",
        "training.load_best_model_at_end=false",
        "training.early_stopping_patience=null",
        "training.report_to=[]",
    ]


def fixed_length(overrides: Sequence[str], steps: int, cooldown: int) -> list[str]:
    """The overrides of a run of endless length with the length that its clock has given it."""
    length = {
        **dict.fromkeys(("training.max_steps", "training.eval_steps", "training.save_steps"), str(steps)),
        "training.extra.lr_scheduler_kwargs": json.dumps(decay(cooldown)),
    }
    return [f"{key}={length.get(key, value)}" for key, _, value in (each.partition("=") for each in overrides)]


def rung(setting: Setting, entry: Entry, settings: Sequence[str], folder: Path, start: Path | None) -> list[str]:
    """The overrides of a rung, which ends by the clock of its job; `start` is the checkpoint that it continues from."""
    resume = "auto" if start is None else str(start)
    return [
        *common(setting, entry, settings),
        *of_length(setting, entry, ENDLESS, 1),
        *(f"evaluation.{each}" for each in NOT_MEASURED),
        "training.save_total_limit=2",
        f"training.resume_from_checkpoint={json.dumps(resume)}",
        f"output_dir={json.dumps(str(folder))}",
    ]


def final(setting: Setting, entry: Entry, settings: Sequence[str], folder: Path, steps: tuple[int, int] | None) -> list[str]:
    """The overrides of the final run.

    Args:
        steps: before the cooldown, and of the cooldown; None: the strategy takes no steps.
    """
    length = [] if steps is None else of_length(setting, entry, sum(steps), steps[1])
    return [
        *common(setting, entry, settings),
        *length,
        *(f"evaluation.{each}" for each in ONCE),
        "training.resume_from_checkpoint=auto",
        f"output_dir={json.dumps(str(folder))}",
    ]
