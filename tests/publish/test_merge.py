"""A merged or exported model that differs from the result by more than rounding is refused, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import UNVERIFIED, run
from transformers import AutoModelForCausalLM

from hfstrat import errors
from hfstrat.errors import RunError, UserError
from hfstrat.publish import export, merge
from hfstrat.publish.written import complete

SETTINGS = ("training.learning_rate=0.05", "evaluation.samples=0", "training.load_best_model_at_end=false")


@pytest.fixture
def adapter(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *given: UNVERIFIED)
    return Path(run(recipe(*SETTINGS))["result"]["artifact"]).parent


def scale_merged(patch: pytest.MonkeyPatch, factor: float) -> None:
    """The merged model's LM head is off by a factor."""
    from peft import PeftModel

    original = PeftModel.merge_and_unload if "merge_and_unload" in vars(PeftModel) else None
    from peft.tuners.lora import LoraModel

    inner = original or LoraModel.merge_and_unload

    def merged(self: Any, *given: Any, **named: Any) -> Any:
        model = inner(self, *given, **named)
        model.lm_head.weight.data *= factor
        return model

    patch.setattr(LoraModel, "merge_and_unload", merged)


def refused(call: Callable[[], None], place: Path, words: str) -> None:
    before = sorted(place.iterdir())
    with pytest.raises(RunError, match=words) as ended:
        call()
    assert ended.value.code == errors.ARTIFACT
    assert sorted(place.iterdir()) == before, "something was left behind"


def test_a_wrong_sum_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 0.1% is refused, although rounding to 16 bits is larger."""
    scale_merged(monkeypatch, 1.001)
    refused(lambda: merge.merge(str(adapter), tmp_path / "out"), tmp_path, "merged in float32, the outputs differ.*nothing was")
    refused(lambda: export.export(str(adapter), tmp_path / "out", "safetensors"), tmp_path, "merged in float32")


def test_an_overflow_is_refused(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.models import load

    original = load.cast_weights

    def cast(model: Any, dtype: Any) -> None:
        original(model, dtype)
        if dtype == torch.bfloat16:
            model.lm_head.weight.data *= float("inf")

    monkeypatch.setattr(load, "cast_weights", cast)
    into = tmp_path / "out"
    refused(lambda: merge.merge(str(adapter), into, "bfloat16"), tmp_path, "rounding the merged weights to bfloat16.*nan")


def test_a_merged_model_has_the_precision_of_the_base_unless_asked(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    def dtype_of(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype

    assert dtype_of(tiny) == torch.float32
    merge.merge(str(adapter), tmp_path / "as stored")
    assert dtype_of(tmp_path / "as stored") == torch.float32
    merge.merge(str(adapter), tmp_path / "asked", "bfloat16")
    assert dtype_of(tmp_path / "asked") == torch.bfloat16
    with pytest.raises(UserError, match="--dtype: int8: expected one of checkpoint, bfloat16"):
        merge.merge(str(adapter), tmp_path / "never", "int8")


@pytest.mark.parametrize("form", ["merge", "safetensors"])
@pytest.mark.slow
def test_a_file_that_loads_differently_is_refused(
    adapter: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    original = merge.save

    def save(model: Any, tokenizer: Any, output: Path) -> None:
        model.lm_head.weight.data *= 1.5
        original(model, tokenizer, output)

    monkeypatch.setattr(merge, "save", save)
    monkeypatch.setattr(export, "save", save)
    call = (
        (lambda: merge.merge(str(adapter), tmp_path / "out"))
        if form == "merge"
        else (lambda: export.export(str(tiny), tmp_path / "out", form))
    )
    refused(call, tmp_path, "loaded again, its outputs differ")


def test_a_gguf_that_loads_differently_is_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setitem(export.ALLOWED, "gguf", 1e-9)
    refused(lambda: export.export(str(tiny), tmp_path / "x.gguf", "gguf"), tmp_path, "its logits differ by")


def test_a_merge_is_complete_or_absent(tmp_path: Path) -> None:
    def interrupted() -> None:
        with complete(tmp_path / "out") as partial:
            partial.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()  # an empty folder may be written to
    with complete(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "file").touch()
    assert (tmp_path / "out" / "file").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
