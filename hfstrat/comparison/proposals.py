"""Recipes for a model and data that were only named: a sensible one for each strategy, as text that can be kept and changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat.data import readers, sources
from hfstrat.data.labels import LabelReading
from hfstrat.depth import BLOCK
from hfstrat.errors import UserError
from hfstrat.model import read_json, read_shapes
from hfstrat.strategies import STRATEGIES
from hfstrat.tasks import TASKS, CausalLM, TextClassification

HELD_OUT = 0.2  # of the rows (at most 1000): a comparison wants more of them than a run that is only watched
LONGEST = 1024
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length")
Made = tuple[dict[str, Any], dict[str, Any]]  # keys of `strategy:` and of `training:`
ORDER = ("head", "partial", "lora", "full", "distill", "scratch")


def strategies(names: str | None) -> tuple[list[str], bool]:
    """The strategies to compare, and whether they were asked for by name.

    Raises:
        UserError: a name that is none, or stands there twice.
    """
    if names is None:
        return [name for name in ORDER if name in STRATEGIES], False
    given = [name.strip() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in STRATEGIES:
            raise UserError(f"--strategies: {name}: no such strategy; expected some of {','.join(STRATEGIES)}")
    if not given or len(set(given)) < len(given):
        raise UserError(f"--strategies: {names}: expected some of {','.join(STRATEGIES)}, each once")
    return given, True


def task_of(data: str, asked: str | None) -> tuple[str, str]:
    """The task, and in words how it was told.

    Raises:
        UserError: no such task, or rows that cannot be read.
    """
    if asked is not None:
        if asked not in TASKS:
            raise UserError(f"--task: {asked}: no such task; expected one of {', '.join(TASKS)}")
        return asked, "as --task says"
    files = sources.local_files(data, "--data")
    if not files:
        return CausalLM.name, "not told by a data set of the Hub; --task says another"
    try:
        LabelReading.of(readers.first_rows(files[0]), data, "auto", {})
    except UserError:
        return CausalLM.name, "its rows have no text with a label; --task says another"
    return TextClassification.name, "its rows have a text and a label; --task says another"


def recipe(name: str, task: str, model: str, data: str) -> str:
    """The recipe of a strategy as YAML.

    Raises:
        UserError: this strategy cannot do it with this model, in a sentence that begins with the strategy.
    """
    config = _config(model)
    made = PROPOSALS.get(name)
    section, training = made(task, model, config) if made else ({}, {})
    context = next((config[key] for key in CONTEXT if isinstance(config.get(key), int)), LONGEST)
    room = context - 2 if "roberta" in str(config.get("model_type")) else context  # its first two positions are no token's
    lines = [
        f"# {name}, as `hfstrat compare` proposes it: change what you know better.",
        f"task: {task}",
        f"model: {_said(model)}",
    ]
    lines += [f"strategy: {_said({'name': name, **section})}", "data:", f"  train: {_said(data)}", f"  eval_size: {HELD_OUT}"]
    lines += [f"  max_length: {max(8, min(LONGEST, room))}"]
    if training:
        lines += ["training:", *(f"  {key}: {_said(value)}" for key, value in training.items())]
    return "\n".join([*lines, f"output_dir: runs/{name}", ""])


def _said(value: Any) -> str:
    """JSON is YAML."""
    return json.dumps(value, ensure_ascii=False)


def _config(model: str) -> dict[str, Any]:
    """The model's config.json, local or in the Hub's cache; empty where it is not at hand (the preflight then says why)."""
    folder = Path(model).expanduser()
    if folder.exists():
        return read_json(folder / "config.json")
    try:
        from huggingface_hub import hf_hub_download

        return read_json(Path(hf_hub_download(model, "config.json")))
    except Exception:  # the transport has many ways to fail
        return {}


def _partial(task: str, model: str, config: dict[str, Any]) -> Made:
    """A third of the blocks: the upper ones are the task's, the lower ones the language's (ULMFiT, arXiv 1801.06146)."""
    return {"last_n_layers": max(1, round(_depth(model, config) / 3))}, {}


def _head(task: str, model: str, config: dict[str, Any]) -> Made:
    """A head that is the embeddings cannot learn alone; of one that is not, `untie` changes nothing."""
    return ({"untie": True} if TASKS[task].unit == "token" else {}), {}


def _distill(task: str, model: str, config: dict[str, Any]) -> Made:
    """Half the depth, taught by the whole, as recipes/distill/half_depth.yaml: the model has to know the task."""
    depth, architecture = _depth(model, config), str((config.get("architectures") or [""])[0])
    if TASKS[task].unit != "token" and not architecture.endswith(TASKS[task].architecture):
        raise UserError(
            f"distill: {model} has no head that was trained for task: {task}, so it has nothing to teach; train one first and "
            "name it as --model, or give a recipe with strategy.teacher"
        )
    if depth < 2:
        raise UserError(f"distill: {model} has one layer, so there is no half of it; give a recipe with strategy.teacher")
    section = {"shrink": {"layers": depth // 2}, "student": "full", "alpha": 0.9, "baseline": False}
    return section, {"learning_rate": 2e-4}


def _depth(model: str, config: dict[str, Any]) -> int:
    said = next((config[key] for key in DEPTH if isinstance(config.get(key), int)), 0)
    if said:
        return int(said)
    folder = Path(model).expanduser()
    names = read_shapes(folder) if folder.is_dir() else {}
    return max((int(found[1]) + 1 for name in names if (found := BLOCK.search(name))), default=6)


PROPOSALS: dict[str, Callable[[str, str, dict[str, Any]], Made]] = {"partial": _partial, "head": _head, "distill": _distill}
"""What a strategy needs beside its name; the others have defaults for all of it."""
