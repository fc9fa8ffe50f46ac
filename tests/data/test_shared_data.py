"""Every text file of ../shared/data can be trained on, or is refused with the name of its format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, make_tokenizer

from hfstrat.data.classes import prepare as prepare_classes
from hfstrat.data.prepare import prepare
from hfstrat.errors import UserError
from hfstrat.objectives.preference.task import PreferenceTask
from hfstrat.recipe.data import Data
from hfstrat.recipe.schema import OBJECTIVES

TOKENIZER = make_tokenizer()
MAPS = {  # `columns:`
    "gsm8k": {"question": "prompt", "answer": "completion"},
    "eval_dev/lambada_openai.jsonl.gz": {"context": "prompt", "continuation": "completion"},
    "eval_dev/svamp.jsonl": {"context": "prompt", "answer": "completion"},
}
OTHERS = {  # data that are no examples of a causal LM: what they are
    "eval_dev": "multiple choice",
    "llamafactory_demos/dpo_en_demo.jsonl.gz": "preference pairs",
    "llamafactory_demos/v1_dpo_demo.jsonl": "preference pairs",
    "llamafactory_demos/kto_en_demo.jsonl": "answers with labels",
    "llms_from_scratch/preference.jsonl": "preference pairs",
}
LABELED = {  # folder -> number of labels
    "ag_news7k": 4,
    "banking77": 77,
    "imdb_counterfactual": 2,
    "sst2": 2,
    "trec6": 6,
    "nli_counterfactual": 3,
}
NO_DATA = ("gpt2_tokenizer", "cifar10_10k")
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".txt")


def files() -> list[str]:
    found = sorted((SHARED / "data").rglob("*")) if SHARED.is_dir() else []
    return [str(p.relative_to(SHARED / "data")) for p in found if p.name.endswith(SUFFIXES) and p.parent.name not in NO_DATA]


def of(table: dict[str, Any], name: str) -> Any:
    """The entry of a file, or else of its folder."""
    return table.get(name, table.get(name.split("/")[0]))


def check_preferences(data: Data, objective: str) -> None:
    """The preference objective reads every row, or names what it leaves out."""
    section = OBJECTIVES[objective].model_validate({"name": objective})
    made = PreferenceTask(section).rows.prepare(
        data.model_copy(update={"overflow": "truncate", "max_length": 40_000}), TOKENIZER, seed=0
    )
    stats = made.statistics["train"]
    assert stats.rows_kept + sum(stats.unusable.values()) == stats.rows_read > 0
    assert sum(stats.unusable.values()) <= 0.05 * stats.rows_read


LARGE = 150_000  # bytes of a file that is read by a slow test


def by_size(names: list[str]) -> list[Any]:
    """Files as parameters; the large ones are slow tests."""
    slow = [name for name in names if (SHARED / "data" / name).stat().st_size > LARGE]
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", by_size(files()) or ["needs ../shared"])
def test_every_file_loads_or_its_format_is_named(shared: Path, name: str) -> None:
    mapped = of(MAPS, name)
    data = Data(train=str(shared / "data" / name), columns=mapped or {}, max_length=4096, overflow="split", eval_size=2)
    if labels := of(LABELED, name):
        with pytest.raises(UserError, match="task: text-classification"):
            prepare(data, TOKENIZER, seed=0)
        classes = prepare_classes(data.model_copy(update={"overflow": "truncate", "eval_size": 100}), TOKENIZER, seed=0)
        assert len(classes.label_names) == labels
        assert classes.statistics["train"].rows_kept == classes.statistics["train"].rows_read
        assert classes.duplicates["eval_rows_in_train"] == 0
        return
    other = None if mapped else of(OTHERS, name)
    if other:
        with pytest.raises(UserError, match=f"are {other}"):
            prepare(data, TOKENIZER, seed=0)
        if other != "multiple choice":
            check_preferences(data, "kto" if "labels" in other else "dpo")
        return
    made = prepare(data, TOKENIZER, seed=0)
    stats = made.statistics["train"]
    assert stats.rows_kept == stats.rows_read > 0
    assert stats.supervised_lost == stats.tokens_lost == 0 or stats.rows_split
    assert len(made.train) + len(made.eval) >= stats.rows_read


@pytest.mark.parametrize("name", ["ag_news7k/test.csv", "llms_from_scratch/preference.jsonl"])
def test_unsupported_formats_can_be_read_as_another_format(shared: Path, name: str) -> None:
    kind = "text" if name.endswith(".csv") else "alpaca"
    made = prepare(Data(train=str(shared / "data" / name), format=kind, overflow="split"), TOKENIZER, seed=0)
    assert made.statistics["train"].format == kind


def test_tools_are_rendered_and_calls_are_trained(shared: Path) -> None:
    """This template does not support tools, so they are rendered as text; calls have loss, tool results do not."""
    file = shared / "data/llamafactory_demos/glaive_toolcall_en_demo.jsonl"
    made = prepare(Data(train=str(file), max_length=32_768), TOKENIZER, seed=0)
    assert made.statistics["train"].rows_with_tools == 191
    row = next(r for r in made.train if r["row"] == 0)
    trained = TOKENIZER.decode([label for label in row["labels"] if label >= 0])
    whole = TOKENIZER.decode(row["input_ids"])
    assert "<tools>" in whole
    assert "<tool_response>" in whole
    assert '<tool_call>\n{"name": "search_recipes"' in trained
    assert "<tools>" not in trained
    assert "<tool_response>" not in trained
