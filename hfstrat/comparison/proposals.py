"""Recipes for a model and data that were only named: a sensible one for each strategy, as text that can be kept and changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.data import readers, sources
from hfstrat.data.classification.labels import LabelReading
from hfstrat.errors import UserError
from hfstrat.models.load import read_json, read_shapes
from hfstrat.models.parameter_names import BLOCK
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.strategies import defaults
from hfstrat.tasks import TASKS
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.text_classification import TextClassification

HELD_OUT = 0.2  # of the rows (at most 1000): a comparison wants more of them than a run that is only watched
LONGEST = 1024
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH = ("hidden_size", "n_embd", "dim", "d_model")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length")


def strategies(names: str | None) -> tuple[list[str], bool]:
    """The strategies to compare, and whether they were asked for by name.

    Raises:
        UserError: a name that is none, or stands there twice.
    """
    if names is None:
        return [name for name in defaults.ORDER if name in STRATEGIES], False
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
    architecture, width = str((config.get("architectures") or [""])[0]), _first(config, WIDTH)
    section = defaults.section(name, defaults.ModelFacts(task, model, _depth(model, config), width, architecture))
    known = 0 if STRATEGIES[name].random_weights else width  # how wide a new model will be, nobody knows yet
    rate = defaults.learning_rate(name, known)
    context = _first(config, CONTEXT) or LONGEST
    room = context - 2 if "roberta" in str(config.get("model_type")) else context  # its first two positions are no token's
    lines = [
        f"# {name}, as `hfstrat compare` proposes it: change what you know better.",
        f"task: {task}",
        f"model: {_said(model)}",
    ]
    lines += [f"strategy: {_said({'name': name, **section})}", "data:", f"  train: {_said(data)}", f"  eval_size: {HELD_OUT}"]
    lines += [f"  max_length: {max(8, min(LONGEST, room))}"]
    if rate is not None:
        lines += ["training:", f"  learning_rate: {_said(rate)}"]
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


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The number that the config has under one of these names; 0: none."""
    return next((int(config[key]) for key in names if isinstance(config.get(key), int)), 0)


def _depth(model: str, config: dict[str, Any]) -> int:
    if said := _first(config, DEPTH):
        return said
    folder = Path(model).expanduser()
    names = read_shapes(folder) if folder.is_dir() else {}
    return max((int(found[1]) + 1 for name in names if (found := BLOCK.search(name))), default=6)
