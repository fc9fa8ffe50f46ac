"""`hfstrat check`: the model and what is trained, the data, the first examples as the model sees them, and the settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hfstrat import strategies
from hfstrat.data.render import IGNORED
from hfstrat.data.shown import SHOWN_TOKENS, elided, pieces
from hfstrat.errors import quiet_libraries
from hfstrat.objectives import task_of
from hfstrat.recipe import format
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.schema import Recipe
from hfstrat.strategies import checks
from hfstrat.tasks.base import Task

LORA = re.compile(r"\.lora_\w+\.default(?=\.|$)")  # of PEFT's names; both matrices of an adapter are one row


def show(loaded: Loaded, rows: int, every: bool = False) -> None:
    """Print the model and what is trained, the data, the first `rows` examples, and the settings.

    Args:
        every: show frozen modules and settings with default values too.
    """
    quiet_libraries()
    from hfstrat.models import load
    from hfstrat.run import setup
    from hfstrat.trainer.progress import make_console

    console = make_console(main=True)

    recipe = loaded.recipe
    strategy = strategies.build(recipe.strategy)
    tokenizer, data = strategy.read(recipe)
    base = strategy.load(recipe, tokenizer, data)
    trained = strategy.build_model(base)
    load.set_precision(trained, load.compute_dtype(recipe.model.dtype))
    task = task_of(recipe)
    load.check_context(base.model, task.rows.longest(data))
    plan = setup.plan_of(recipe, data, processes=1)
    baselines = setup.baselines_of(recipe, data, plan, base.model)

    show_model(console, recipe, trained, every)
    description = strategies.describe(recipe, len(data.label_names))
    quantized = description and checks.quantized_bytes(recipe, description)
    if quantized is not None:
        console.print(f"quantized base model: {format.memory(quantized)}")
    console.print()
    length = f"{'length':<9} {plan.length}, {'about ' if plan.dense else ''}{plan.global_batch_size} {task.rows.noun}s per step"
    for line in (*base.remarks, *data.lines(), length, *(baselines.lines() if baselines else [])):
        console.print(line)
    show_examples(console, tokenizer, data, rows, task)
    if rows and (line := task.rows.draw(data, Path(f"{Path(recipe.output_dir).expanduser()}-examples.png"))):
        console.print(f"\n{line}")
    console.print()
    show_settings(console, loaded, every)


def show_json(loaded: Loaded, rows: int) -> None:
    """Print the statistics of the data, what is unusual about them, and the first `rows` examples, as JSON."""
    quiet_libraries()
    tokenizer, data = strategies.build(loaded.recipe.strategy).read(loaded.recipe)
    names, task = data.label_names, task_of(loaded.recipe)
    shown: list[Any] = []
    for index in range(min(rows, len(data.train))):
        row = data.train[index]
        if names:
            shown.append({"text": task.rows.as_text(row, tokenizer), "target": task.text.target(row["label"], names)})
            continue
        seen = [(name, task.rows.shown(part, tokenizer)) for name, part in task.rows.parts(row)]
        parts = {name: pieces(tokenizer, part["input_ids"], part["labels"]) for name, part in seen}
        shown.append(parts.get("", parts))
    found = {"data": data.report(), "lines": data.lines(), "rows": shown}
    print(json.dumps(found, ensure_ascii=False, indent=2, default=str))


def show_settings(console: Console, loaded: Loaded, every: bool) -> None:
    """The settings that differ from their defaults, or all, each with its origin."""
    title = f"{'all settings' if every else 'settings that differ from their defaults (--all shows every setting)'}"
    table = Table("key", "value", "from", title=f"{Path(loaded.source)}: {title}", title_justify="left")
    for path, value in leaves(loaded.recipe.model_dump()):
        if every or loaded.origin(path) != "default":
            table.add_row(".".join(path), escape(json.dumps(value, ensure_ascii=False)), escape(loaded.origin(path)))
    console.print(table)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of a resolved recipe by its path."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def show_model(console: Console, recipe: Recipe, trained: Any, every: bool) -> None:
    """The number of trainable parameters, and the modules that have some, or all; blocks of the same shape are one row."""
    from hfstrat.models.quantization import elements

    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.named_parameters():
        module = LORA.sub(": LoRA", name.removeprefix("base_model.model."))
        module = module.removesuffix(".weight").removesuffix(".bias")
        key = ".".join("*" if part.isdigit() else part for part in module.split("."))
        group = groups.setdefault(key, {"modules": set(), "all": 0, "trainable": 0, "dtypes": set()})
        group["modules"].add(module)
        group["all"] += elements(parameter)
        group["trainable"] += elements(parameter) * parameter.requires_grad
        group["dtypes"].add(str(parameter.dtype).removeprefix("torch."))
    total, trainable = (sum(group[key] for group in groups.values()) for key in ("all", "trainable"))
    console.print(f"{recipe.model.name_or_path or 'a new model'}, strategy {recipe.strategy.title}")
    console.print(format.trainable(trainable, total))
    table = Table("module", "count", "parameters", "trainable", "dtype", title_justify="left")
    table.title = "all modules" if every else "trainable modules (--all shows frozen ones too)"
    for key, group in groups.items():
        if every or group["trainable"]:
            count, dtypes = str(len(group["modules"])), ", ".join(sorted(group["dtypes"]))
            table.add_row(escape(key), count, f"{group['all']:,}", f"{group['trainable']:,}", dtypes)
    console.print(table)


def show_examples(console: Console, tokenizer: Any, data: Any, count: int, task: Task) -> None:
    """The first training examples as the model sees them, with a legend."""
    marked = "tokens in green" if console.is_terminal else "tokens between [[ and ]]"
    legend = (
        ("with special tokens" if task.model.reads_tokens else "in the picture")
        if data.label_names
        else f"{marked} contribute to the loss, the others are context"
    )
    legend = "which it answers itself" if task.rows.answered_at_once else legend
    if count:
        console.print(f"\nfirst training examples as the model sees them ({legend}):")
    for index in range(min(count, len(data.train))):
        row = data.train[index]
        if data.label_names:
            console.print(
                f"\nexample {index}: {task.rows.size_of(row)}, {escape(task.text.target(row['label'], data.label_names))}"
            )
            console.print(Text(task.rows.as_text(row, tokenizer, SHOWN_TOKENS), style="dim"))
            continue
        for name, part in task.rows.parts(row):
            title, seen = f"example {index}{f', {name}' if name else ''}", task.rows.shown(part, tokenizer)
            show_row(console, tokenizer, seen, title, is_prompt=bool(task.rows.answered_at_once))
        if note := task.rows.note(row):
            console.print(note, style="dim", markup=False)


def show_row(console: Console, tokenizer: Any, row: dict[str, Any], title: str, is_prompt: bool = False) -> None:
    """One example as the model sees it; supervised tokens are in color, or between [[ and ]] where there is no terminal."""
    supervised = sum(label != IGNORED for label in row["labels"])
    length = row.get("length", len(row["input_ids"]))
    console.print(f"\n{title}: {length} tokens{'' if is_prompt else f', {supervised} supervised'}")
    text = Text()
    for ids, is_supervised, omitted in elided(row["input_ids"], row["labels"]):
        if omitted:
            text.append(f" ... {omitted} ... ", style="dim italic")
        elif not is_supervised:
            text.append(tokenizer.decode(ids), style="dim")
        elif console.is_terminal:
            text.append(tokenizer.decode(ids), style="bold green")
        else:
            text.append(f"[[{tokenizer.decode(ids)}]]")
    console.print(text)
