"""The Python functions do what the commands do, with the objects of the libraries; a mistake is an exception."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers.classifiers import labeled
from helpers.runs import weights
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hfstrat
from hfstrat.api import inputs
from hfstrat.data import readers
from hfstrat.recipe.load import load_recipe
from hfstrat.run.train import run as run_recipe

SHORT: dict[str, Any] = {
    "training": {"max_steps": 3, "eval_steps": 3, "global_batch_size": 4},
    "evaluation": {"samples": 0, "control": "off"},
    "seed": 1,
}


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_objects_of_the_libraries_give_the_weights_of_the_command(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """A model object, a tokenizer object and a Dataset against their files; the callback is called; the run can be used."""
    seen: list[int] = []

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    given = Dataset.from_list(read_rows(rows))
    call = {"model": model, "tokenizer": tokenizer, "train_dataset": given, "strategy": "full", **SHORT}
    found = hfstrat.train(output_dir=str(tmp_path / "objects"), callbacks=[Steps()], **call)
    assert seen == [1, 2, 3]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"model": str(tiny), "strategy": "full", "data": str(rows), "output_dir": str(tmp_path / "files")} | SHORT)
    )
    run_recipe(load_recipe(str(recipe)))
    one, other = weights(tmp_path / "objects"), weights(tmp_path / "files")
    assert all(torch.equal(one[name], other[name]) for name in other)

    assert found.metrics["loss"] < found.metrics_before["loss"]
    assert found.report.finished.steps == 3
    assert found.metrics == hfstrat.load(tmp_path / "files").metrics
    assert isinstance(found.generate("a cat", max_new_tokens=3)[0], str)
    assert len(found.generate(["a cat", "the dog"], max_new_tokens=3)) == 2
    page = found._repr_html_()
    assert "<table>" in page
    assert "95%" not in page or "to" in page
    measured = hfstrat.evaluate(found, given.select(range(12)), evaluation={"control": "off", "samples": 0})
    assert next(iter(measured["measured"].values()))["rows"] > 0
    again = hfstrat.train(output_dir=str(tmp_path / "objects"), **call)
    assert again.metrics == found.metrics, "the same objects are the same recipe: nothing is trained again"


def test_rows_in_every_form_are_the_same_rows(tmp_path: Path) -> None:
    import pandas

    rows: list[dict[str, Any]] = [{"text": f"row {i}", "label": i % 3, "more": None if i % 2 else [i]} for i in range(20)]
    listed = inputs.data_source(rows, "train_dataset")
    assert listed is not None
    table = Dataset.from_list(rows)
    shuffled = table.shuffle(seed=0)
    assert inputs.data_source(table, "train_dataset") == listed, "the same content is stored once"
    assert inputs.data_source(shuffled, "train_dataset") != listed
    order = [int(row["text"].split()[1]) for row in readers.read(Path(str(inputs.data_source(shuffled, "train_dataset"))))]
    assert order == [int(text.split()[1]) for text in shuffled["text"]]
    frame = inputs.data_source(
        pandas.DataFrame([{"text": row["text"], "label": row["label"]} for row in rows]), "train_dataset"
    )
    assert [row["text"] for row in readers.read(Path(str(frame)))] == [row["text"] for row in rows]
    splits = DatasetDict({"train": table, "test": table.select(range(5))})
    assert inputs.data_sources(splits, None) == (listed, inputs.data_source(table.select(range(5)), "eval_dataset"))
    assert inputs.data_sources(tmp_path / "rows.jsonl", "some/id") == (str(tmp_path / "rows.jsonl"), "some/id")


def test_no_column_of_a_list_is_lost_and_a_model_is_stored_once(tiny: Path) -> None:
    """A column that the first row lacks; a model whose config changes when it is saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    stored = inputs.data_source([{"text": "a"}, {"text": "b", "label": "x"}], "train_dataset")
    assert [row.get("label") for row in readers.read(Path(str(stored)))] == [None, "x"]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer)))
    assert inputs.model_source(model, tokenizer) == inputs.model_source(model, tokenizer)


def test_class_names_of_a_dataset_are_kept_and_a_classifier_predicts(bodies: Callable[[str], Path], tmp_path: Path) -> None:
    names = ["cat", "dog", "fish"]
    rows = read_rows(labeled(tmp_path))
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    given = Dataset.from_list([{"text": row["text"], "label": names.index(row["label"])} for row in rows], features=features)
    model = AutoModel.from_pretrained(bodies("bert"))
    tokenizer = AutoTokenizer.from_pretrained(bodies("bert"))
    call = {"model": model, "tokenizer": tokenizer, "train_dataset": given, "task": "text-classification", "strategy": "head"}
    found = hfstrat.train(output_dir=str(tmp_path / "run"), evaluation={"samples": 0}, **call)
    answers = found.predict(["a cat", "a dog"])
    assert {answer["labels"][0] if isinstance(answer["labels"], list) else answer["labels"] for answer in answers} <= set(names)
    assert found.predict("a cat") == answers[:1]
    with pytest.raises(hfstrat.UserError, match="text 1 is empty"):
        found.predict(["a cat", " "])
    with pytest.raises(hfstrat.UserError, match="classifier"):
        found.generate("a cat")


class Mistake(dict[str, Any]):
    """Arguments of `train` that are refused."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Mistake(train_dataset=3), r"train_dataset: a int; expected a path or Hub id, a datasets.Dataset"),
        (Mistake(train_dataset=["a", "b"]), "train_dataset: a list of str"),
        (Mistake(train_dataset=[]), "it has no rows"),
        (Mistake(train_dataset=[{"text": "a"}, {"text": [1]}]), "these rows make no table"),
        (Mistake(train_dataset=DatasetDict({"test": Dataset.from_list([{"text": "a"}])})), "expected one named train"),
        (Mistake(train_dataset=Dataset.from_list([{"text": "a"}]).with_transform(lambda rows: rows)), "with map"),
        (Mistake(eval_dataset=DatasetDict({"test": Dataset.from_list([{"text": "a"}])})), r"eval_dataset=splits\['test'\]"),
        (Mistake(callbacks=[TrainerCallback]), "expected objects of subclasses of transformers.TrainerCallback"),
        (Mistake(model=3), "model: a int; expected a path, a Hub id or a transformers.PreTrainedModel"),
        (Mistake(tokenizer=3), "tokenizer: a int"),
        (Mistake(recipe=3), "recipe: a int; expected a path, the name of a bundled recipe, or a dict"),
        (Mistake(recipe="quickstrat"), "did you mean 'quickstart'"),
        (Mistake(output_dir=None), "output_dir"),
        (Mistake(strategie="lora"), "did you mean 'strategy'"),
        (Mistake(training={"learning_rat": 1e-4}), "learning_rat"),
    ],
)
def test_a_mistake_is_a_user_error_and_nothing_is_written(tiny: Path, tmp_path: Path, given: Mistake, words: str) -> None:
    call = {
        "model": str(tiny),
        "strategy": "full",
        "train_dataset": [{"text": "a b c"}] * 20,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(hfstrat.UserError, match=words):
        hfstrat.train(**{**call, **given})
    assert not (tmp_path / "run").exists()


def test_overrides_merge_into_a_recipe() -> None:
    recipe = {"model": "some/id", "strategy": "lora", "training": {"max_steps": 3, "seed": 1}}
    found = inputs.merged(recipe, {"strategy": {"r": 4}, "training": {"max_steps": 5}, "model.tokenizer": "other"})
    assert found == {
        "model": {"name_or_path": "some/id", "tokenizer": "other"},
        "strategy": {"name": "lora", "r": 4},
        "training": {"max_steps": 5, "seed": 1},
    }
    assert recipe["strategy"] == "lora"
    assert inputs.merged(recipe, {"strategy": "full"})["strategy"] == "full"


def test_public_names_need_no_torch_until_they_are_used() -> None:
    program = (
        "import sys, hfstrat\n"
        "assert set(dir(hfstrat)) == set(hfstrat.__all__)\n"
        "assert all(getattr(hfstrat, name) for name in hfstrat.__all__)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "import hfstrat.train\n"
        "try: hfstrat.train(model=3, output_dir='x')\n"
        "except hfstrat.UserError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "expected a path, a Hub id" in ended.stdout
    with pytest.raises(AttributeError, match="it has Run"):
        hfstrat.tarin  # noqa: B018


def test_advise_returns_what_the_command_prints(tiny: Path, rows: Path) -> None:
    found = hfstrat.advise(str(tiny), read_rows(rows), measure=None, time="10min")
    assert {each["name"] for each in found["strategies"]} >= {"lora", "full"}
    with pytest.raises(hfstrat.UserError, match="tmie: no such option; did you mean time"):
        hfstrat.advise(str(tiny), str(rows), tmie="2h")


SCRIPT = """
import json, sys
import hfstrat
run = hfstrat.train(json.loads(sys.argv[1]))
print("loss", run.metrics["loss"])
"""


@pytest.mark.slow
def test_a_script_of_two_processes_ends_in_one_result(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """The second process waits until the first has verified the result."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    recipe = {"model": str(tiny), "strategy": "full", "data": str(rows), "output_dir": str(tmp_path / "run")} | SHORT
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    ended = subprocess.run(
        [sys.executable, *words, str(script), json.dumps(recipe)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(hfstrat.__file__).parents[1])},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses = {line for line in ended.stdout.splitlines() if line.startswith("loss")}
    assert len(losses) == 1
    assert hfstrat.load(tmp_path / "run").report.finished.verified


def test_an_interruption_from_python_saves_the_step(tiny: Path, rows: Path, tmp_path: Path) -> None:
    """As with the command; afterwards the handlers of signals are those from before."""

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    call: dict[str, Any] = {"model": str(tiny), "strategy": "full", "train_dataset": str(rows), **SHORT}
    with pytest.raises(KeyboardInterrupt, match=r"resumes from .*checkpoint-2"):
        hfstrat.train(output_dir=str(tmp_path / "run"), callbacks=[Stop()], **call)
    assert signal.getsignal(signal.SIGINT) is before
    assert hfstrat.train(output_dir=str(tmp_path / "run"), **call).report.finished.resumed_from
