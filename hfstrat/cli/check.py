"""`hfstrat check`: the resolved recipe, what learns, and the first rows as the model will see them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hfstrat import strategies
from hfstrat.data.render import IGNORED
from hfstrat.errors import quiet_libraries
from hfstrat.recipe.load import Loaded
from hfstrat.strategies import checks

SHOWN_TOKENS = 200
LEAST = 8  # tokens of a stretch that are shown


def show(loaded: Loaded, rows: int) -> None:
    """Print everything; what needs no torch comes first."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)
    show_recipe(console, loaded)
    quiet_libraries()
    from hfstrat.models import load
    from hfstrat.run import setup

    recipe = loaded.recipe
    strategy = strategies.build(recipe.strategy)
    tokenizer, data = strategy.read(recipe)
    if description := strategies.describe(recipe, len(data.label_names)):
        footprint = description.footprint
        console.print(f"known without loading: {footprint.trainable:,} of {footprint.total:,} parameters learn\n")
        if (held := checks.quantized_bytes(recipe, description)) is not None:
            console.print(f"known without loading: the quantized base takes {held / 1e6:,.1f} MB of memory\n")
    base = strategy.load(recipe, tokenizer, data)
    trained = strategy.build_model(base)
    load.set_precision(trained, load.compute_dtype(recipe.model.dtype))
    show_model(console, trained)
    from hfstrat.trainer.plan import make_plan

    lengths, eval_lengths = data.lengths, data.eval_lengths
    load.check_context(base.model, int(max(lengths.max(), eval_lengths.max())))
    plan = make_plan(recipe.training, lengths, eval_lengths, processes=1)
    baselines = setup.baselines_of(recipe, data, plan, base.model)
    length = f"{plan.steps:,} steps of {plan.global_batch_size} sequences"
    for line in (*base.remarks, *data.lines(), length, *(baselines.lines() if baselines else [])):
        console.print(line)
    for index in range(min(rows, len(data.train))):
        row = data.train[index]
        if data.label_names:
            show_labelled(console, tokenizer, row, index, data.label_names)
        else:
            show_row(console, tokenizer, row, index)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every value of a resolved recipe by its path."""
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += leaves(value, (*path, key))
        else:
            found.append(((*path, key), value))
    return found


def show_recipe(console: Console, loaded: Loaded) -> None:
    table = Table("key", "value", "from", title=str(Path(loaded.source)), title_justify="left")
    for path, value in leaves(loaded.recipe.model_dump()):
        table.add_row(".".join(path), escape(json.dumps(value, ensure_ascii=False)), escape(loaded.origin(path)))
    console.print(table)


def show_model(console: Console, trained: Any) -> None:
    """Module, parameters, how many learn and in which precision; blocks of the same shape stand together."""
    from hfstrat.models.quantization import elements

    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trained.named_parameters():
        parts = name.split(".")
        key = ".".join("*" if part.isdigit() else part for part in parts[:-1])
        group = groups.setdefault(key, {"count": set(), "all": 0, "learn": 0, "dtype": set()})
        group["count"].add(".".join(parts[:-1]))
        group["all"] += elements(parameter)
        group["learn"] += elements(parameter) * parameter.requires_grad
        group["dtype"].add(str(parameter.dtype).removeprefix("torch."))
    table = Table("module", "x", "parameters", "learn", "precision", title="what learns", title_justify="left")
    for key, group in groups.items():
        learn = f"{group['learn']:,}" if group["learn"] else "-"
        table.add_row(escape(key), str(len(group["count"])), f"{group['all']:,}", learn, ", ".join(sorted(group["dtype"])))
    total, learning = (sum(group[key] for group in groups.values()) for key in ("all", "learn"))
    table.add_section()
    table.add_row("all", "", f"{total:,}", f"{learning:,}", f"{learning / total:.2%}")
    console.print(table)


def show_row(console: Console, tokenizer: Any, row: dict[str, Any], index: int) -> None:
    """One row as the model sees it; what carries loss is coloured, and stands in [[ ]] where there is no terminal."""
    trained = sum(label != IGNORED for label in row["labels"])
    console.print(f"\nrow {index}: {row['length']} tokens, {trained} carry loss")
    text = Text()
    for ids, learnt, left_out in elided(row["input_ids"], row["labels"]):
        if left_out:
            text.append(f" ... {left_out} ... ", style="dim italic")
        else:
            _append(text, tokenizer.decode(ids), learnt, console.is_terminal)
    console.print(text)


def elided(ids: list[int], labels: list[int]) -> list[tuple[list[int], bool, str]]:
    """A row in stretches with and without loss, `SHOWN_TOKENS` in all, so that it is seen where loss begins and ends.

    Long stretches lose their middle, and a row of very many stretches those in the middle.

    Returns:
        Token ids and whether they carry loss; or none, and in words what is left out.
    """
    begins = [0, *(i for i in range(1, len(ids)) if (labels[i] != IGNORED) != (labels[i - 1] != IGNORED)), len(ids)]
    stretches = [(begin, end, labels[begin] != IGNORED) for begin, end in itertools.pairwise(begins) if begin < end]
    most = SHOWN_TOKENS // LEAST
    middle = range(most // 2, len(stretches) - most // 2) if len(stretches) > most and len(ids) > SHOWN_TOKENS else range(0)
    each = _share([end - begin for place, (begin, end, _) in enumerate(stretches) if place not in middle])
    shown: list[tuple[list[int], bool, str]] = []
    for place, (begin, end, learnt) in enumerate(stretches):
        if middle and place == middle[0]:
            left, right = begin, stretches[middle[-1]][1]
            carry = sum(label != IGNORED for label in labels[left:right])
            shown.append(([], False, f"{_more(right - left)}, {carry:,} with loss"))
        elif place in middle:
            continue
        elif end - begin <= each:
            shown.append((ids[begin:end], learnt, ""))
        else:
            head, tail = begin + each // 2, end - (each - each // 2)
            left_out = f"{_more(tail - head)} {'with' if learnt else 'without'} loss"
            shown += [(ids[begin:head], learnt, ""), ([], learnt, left_out), (ids[tail:end], learnt, "")]
    return shown


def _share(lengths: list[int]) -> int:
    """Tokens that are shown of each stretch at most: short ones leave their room to the longer ones."""
    room = SHOWN_TOKENS
    for place, length in enumerate(sorted(lengths)):
        each = room // (len(lengths) - place)
        if length > each:
            return each
        room -= length
    return SHOWN_TOKENS


def _more(count: int) -> str:
    return f"{count:,} more token{'s' * (count != 1)}"


def show_labelled(console: Console, tokenizer: Any, row: dict[str, Any], index: int, names: tuple[str, ...]) -> None:
    """One row of a classification, special tokens included, and what it is to be told as."""
    labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
    said = ", ".join(names[label] for label in labels) or "(none)"
    console.print(f"\nrow {index}: {row['length']} tokens, label {escape(said)}")
    words = tokenizer.decode(row["input_ids"][:SHOWN_TOKENS])
    more = len(row["input_ids"]) - SHOWN_TOKENS
    console.print(Text(words + (f" ... {more} more tokens" if more > 0 else ""), style="dim"))


def _append(text: Text, words: str, trained: bool, colour: bool) -> None:
    if not trained:
        text.append(words, style="dim")
    elif colour:
        text.append(words, style="bold green")
    else:
        text.append(f"[[{words}]]")
