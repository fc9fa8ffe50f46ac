"""Ready recipes for the first strategies; each is loaded and checked before it is promised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from hfstrat import preflight
from hfstrat.advisor import speed
from hfstrat.advisor.verdict import Advice, Situation
from hfstrat.errors import UserError
from hfstrat.loading import load_recipe

MOST = 3


def write(advices: list[Advice], situation: Situation, folder: Path) -> list[Path]:
    """The recipes of the first three that can be had in the time; none, and no folder, where there are none.

    Raises:
        UserError: sizes given by hand, a file in the place of the folder, or a recipe there already.
    """
    if situation.model.by_hand or situation.data.by_hand:
        raise UserError("--write: a recipe needs a model and data; give --model and --data instead of sizes")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--write: {folder} is a file; name a folder")
    if there := sorted(folder.glob("*.yaml")):
        raise UserError(f"--write: {there[0]} is there already; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for advice in advices:
        if len(files) < MOST and advice.can and advice.in_time and advice.fit and advice.fit.kind != "does not fit":
            file = folder / f"{len(files) + 1}-{advice.name}.yaml"
            file.write_text(text_of(advice, situation), encoding="utf-8")
            try:
                preflight.check(load_recipe(str(file)), network=False)
            except UserError as error:  # such as too little text for a new tokenizer: the next one takes its place
                file.unlink()
                advice.refused = str(error)
            else:
                files.append(file)
    if not files:
        folder.rmdir()
    return files


def text_of(advice: Advice, situation: Situation) -> str:
    """The recipe with its reason in the first line."""
    assert advice.score is not None
    reason = advice.score.parts[0][0].says if advice.score.parts else ""
    body = yaml.safe_dump(recipe_of(advice, situation), sort_keys=False, width=120)
    return f"# {advice.name}, choice {advice.rank} of `hfstrat advise`: {reason}.\n{body}"


def recipe_of(advice: Advice, situation: Situation) -> dict[str, Any]:
    """What is not said is as hfstrat's defaults have it."""
    data, candidate = situation.data, advice.candidate
    assert candidate.strategy is not None
    assert advice.fit is not None
    found: dict[str, Any] = {"task": data.task}
    if candidate.strategy.needs_weights:
        name = full_path(situation.model.name)
        found["model"] = name if advice.fit.shape.frozen is None else {"name_or_path": name, "quantization": "nf4"}
    found["strategy"] = candidate.section
    found["data"] = {"train": full_path(data.source), "max_length": data.max_length}
    if not data.labels and data.cut_share:
        found["data"]["overflow"] = "split"
    cut_short = situation.time is not None and advice.time_words
    length: dict[str, Any] = {"num_train_epochs": candidate.epochs}
    if cut_short and situation.time is not None:  # what is not training comes on top of it
        length = {"max_time": f"{max(1.0, situation.time - speed.START_SECONDS):.0f}s"}
    training = {**length, **candidate.training, **advice.fit.settings}
    return {**found, "training": training, "output_dir": f"runs/advised-{advice.name}"}


def full_path(name: str) -> str:
    """A local path in full, so that the recipe works from anywhere; links stay what they are called."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else name
