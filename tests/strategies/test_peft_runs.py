"""Complete runs with types of PEFT: the result loads again, and what comes after training works or is refused.

`HFSTRAT_EVERY_TYPE=1` runs every type, not only those that differ in what is saved and merged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.peft_types import TRAINED, strategy_of
from helpers.runs import UNVERIFIED, folder_of, run, stop_at, weights

from hfstrat.errors import UserError
from hfstrat.publish.merge import merge
from hfstrat.recipe.peft import UNMERGED
from hfstrat.run import preflight
from hfstrat.strategies.peft import ONLY_FLOAT32

EVERY = os.environ.get("HFSTRAT_EVERY_TYPE")  # ten minutes
MERGED = TRAINED if EVERY else ["PROMPT_TUNING", "P_TUNING", "IA3", "LN_TUNING", "VERA", "BEFT", "OSF"]
RESUMED = TRAINED if EVERY else ["P_TUNING", "VERA", "SHIRA", "OSF"]
SHORT = ("training.max_steps=3", "training.eval_steps=1", "evaluation.eval_on_start=false", "data.eval_size=4")


def loaded_for(recipe: Callable[..., Any], peft_type: str, *overrides: str) -> Any:
    dtype = ["model.dtype=float32"] if peft_type in ONLY_FLOAT32 else []
    return recipe(f"strategy={json.dumps(strategy_of(peft_type))}", *SHORT, *dtype, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", MERGED)
def test_the_result_of_a_run_loads_again_and_merges_where_peft_merges(
    recipe: Callable[..., Any], tmp_path: Path, peft_type: str
) -> None:
    """`run` compares the saved adapter, loaded by plain PEFT, with the trained model; `merge` the merged model with both."""
    loaded = loaded_for(recipe, peft_type)
    preflight.check(loaded)
    result = run(loaded)["result"]
    final = folder_of(loaded) / "final"
    assert json.loads((final / "adapter_config.json").read_text())["peft_type"] == peft_type
    assert result["verified"]["moved_by_training"] > 0
    if peft_type in UNMERGED or peft_type == "BEFT":  # Llama's layers have no bias
        with pytest.raises(UserError, match="PEFT does not merge"):
            merge(str(folder_of(loaded)), tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    else:
        merge(str(folder_of(loaded)), tmp_path / "merged")
        assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("peft_type", RESUMED)
def test_a_stopped_run_resumes_as_if_it_had_not_stopped(
    recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, peft_type: str
) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)
    loaded = loaded_for(recipe, peft_type)
    run(loaded)
    whole = weights(folder_of(loaded))
    shutil.rmtree(folder_of(loaded))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(loaded)
    assert list(folder_of(loaded).glob("checkpoint-*"))
    run(loaded)
    again = weights(folder_of(loaded))
    assert all(whole[name].equal(again[name]) for name in whole)
