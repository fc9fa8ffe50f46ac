"""A notebook as a user writes one, run by a kernel: own CSV file, training, evaluation, predictions, the result as a table."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS

CELLS = {
    "rows": "import pandas as pd\nrows = pd.read_csv('texts.csv')",
    "train": (
        "import hfstrat\nrun = hfstrat.train(task='text-classification', model={model!r}, train_dataset=rows,\n"
        "    strategy='lora', data={{'eval_size': 0.2}}, training={{'max_steps': 6, 'eval_steps': 3}}, output_dir='run')"
    ),
    "run": "run",
    "metrics": "run.metrics['accuracy']",
    "evaluate": "_ = run.evaluate('texts.csv')",
    "predict": "run.predict(['the cat sat, nice', 'a dog ran, awful'])",
    "mistake": (
        "hfstrat.train(model={model!r}, train_dataset=rows, strategy='lora', training={{'max_step': 3}}, output_dir='other')"
    ),
}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory, bodies: Callable[..., Path]) -> dict[str, Any]:
    """The outputs of each cell."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'hfstrat[dev]'")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: pip install 'hfstrat[dev]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'hfstrat[dev]'")
    folder, source = tmp_path_factory.mktemp("notebook"), random.Random(0)
    texts = [(" ".join(source.choices(WORDS, k=4)), source.choice([("nice", "good"), ("awful", "bad")])) for _ in range(50)]
    lines = [f"{text} {word},{label}" for text, (word, label) in texts]
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    model = str(bodies("bert"))
    written = [nbformat.v4.new_code_cell(text.format(model=model)) for text in CELLS.values()]
    notebook = nbformat.v4.new_notebook(cells=written)
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": paths})
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def kinds(outputs: Any) -> list[str]:
    return [output.output_type for output in outputs]


def text_of(outputs: Any, name: str) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == name)


@pytest.mark.slow
def test_every_cell_works_and_a_mistake_is_one_sentence(cells: dict[str, Any]) -> None:
    failed = {name: outputs[-1].evalue for name, outputs in cells.items() if "error" in kinds(outputs)}
    assert list(failed) == ["mistake"]
    assert "no such key in 'training'; did you mean 'max_steps'?" in failed["mistake"]


@pytest.mark.slow
def test_progress_is_one_output_that_is_replaced_and_not_a_widget(cells: dict[str, Any]) -> None:
    outputs = cells["train"]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert not any("widget" in kind for data in shown for kind in data)
    training = [data["text/plain"] for data in shown if data["text/plain"].startswith("training ")]
    assert len(training) == 1
    assert "step 6/6" in training[0]
    assert len(shown) <= 4  # lines are text, not an output each
    assert "evaluation at step 6" in text_of(outputs, "stdout")
    assert text_of(outputs, "stderr") == ""  # no warnings of libraries


@pytest.mark.slow
def test_the_run_shows_itself_as_a_table_and_predicts(cells: dict[str, Any]) -> None:
    table = cells["run"][0].data["text/html"]
    assert "<table>" in table
    assert "rows given in Python" in table
    assert "accuracy, evaluation rows" in table
    assert "'labels'" in cells["predict"][-1].data["text/plain"]
    assert text_of(cells["evaluate"], "stderr") == ""
