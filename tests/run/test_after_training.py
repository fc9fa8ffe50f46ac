"""Whatever fails once training has ended, the trained weights are on the disk, and the message names their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.classifiers import labeled
from helpers.matrix import weights_of
from helpers.runs import UNVERIFIED, run

from hfstrat import errors
from hfstrat.errors import RunError, UserError
from hfstrat.run import output_dir
from hfstrat.trainer import checkpoints
from hfstrat.trainer.trainer import StrategyTrainer

STAGES = {  # what fails: the function
    "the best weights": "hfstrat.trainer.trainer.StrategyTrainer._load_best_model",
    "the last evaluation": "hfstrat.run.measure._measure",
    "the probe": "hfstrat.tasks.verify.probe_logits",
    "the measurements": "hfstrat.run.measure.after",
    "saving": "hfstrat.strategies.base.Strategy.save",
    "verification": "hfstrat.tasks.verify.verify",
    "publishing": "hfstrat.run.output_dir.publish",
    "the report": "hfstrat.run.report.build",
}
TRAIN = ("strategy=full", "training.max_steps=2", "training.eval_steps=1", "evaluation.samples=0")


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *given: UNVERIFIED)


def fail(*given: Any, **named: Any) -> Any:
    raise OSError("this stage fails")


@pytest.mark.parametrize("stage", STAGES)
def test_a_later_stage_fails(recipe: Any, unverified: None, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """The message names the checkpoint of the last step, which is complete."""
    loaded = recipe(*TRAIN)
    folder = Path(loaded.recipe.output_dir)
    with monkeypatch.context() as patch:
        if stage == "the probe":
            patch.setattr("hfstrat.run.measure.verify.probe_logits", after_first_call(fail, patch))
        else:
            patch.setattr(STAGES[stage], fail)
        with pytest.raises(
            RunError, match=r"this stage fails.*its weights are in .*checkpoint-2, and the same command"
        ) as ended:
            run(loaded)
    assert ended.value.code == errors.CRASH
    assert "checkpoint-2" in str((folder / "report.json").read_text())
    assert checkpoints.fault(folder / "checkpoint-2") is None
    assert weights_of(folder / "checkpoint-2")


def after_first_call(function: Any, patch: pytest.MonkeyPatch) -> Any:
    """The probe is run before training too, where it has to work."""
    from hfstrat.tasks import verify

    original, calls = verify.probe_logits, list[int]()

    def probe(*given: Any) -> Any:
        calls.append(1)
        return original(*given) if len(calls) == 1 else function(*given)

    return probe


@pytest.mark.parametrize("settings", [(), ("training.save_steps=100",), ("training.load_best_model_at_end=false",)])
@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_the_weights_of_the_last_step_are_saved_before_their_evaluation(
    recipe: Any, unverified: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: tuple[str, ...], task: str
) -> None:
    more = () if task == "causal-lm" else (f"task={task}", f"data.train={labeled(tmp_path, 40)}")
    loaded = recipe(*TRAIN, *settings, *more)
    folder, evaluate = Path(loaded.recipe.output_dir), StrategyTrainer.evaluate

    def fails_at_the_end(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            fail()
        return evaluate(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StrategyTrainer, "evaluate", fails_at_the_end)
        with pytest.raises(RunError, match=r"its weights are in .*checkpoint-2"):
            run(loaded)
    assert checkpoints.fault(folder / "checkpoint-2") is None
    report = run(loaded)
    assert report["result"]["steps"] == 2
    assert report["result"]["metrics_after"]["loss"] > 0


@pytest.mark.parametrize("stage", ["hfstrat.run.setup.build_trainer", "hfstrat.run.train.fit", "yaml.safe_dump"])
def test_a_failed_stage_leaves_the_folder_unlocked(recipe: Any, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Also for this process, which keeps the exception and with it everything that its traceback refers to."""
    loaded = recipe(*TRAIN)
    with monkeypatch.context() as patch:
        patch.setattr(stage, fail)
        with pytest.raises((RunError, OSError), match="this stage fails") as kept:
            run(loaded)
    with output_dir.claim(loaded.recipe, overwrite=False), pytest.raises(UserError, match="in use by another run"):
        output_dir.claim(loaded.recipe, overwrite=False)
    assert kept.value


def test_a_run_that_may_not_resume_names_the_setting(recipe: Any, unverified: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfstrat.run.measure.conclude", fail)
    with pytest.raises(RunError, match=r"with training.resume_from_checkpoint=auto continues from there"):
        run(recipe(*TRAIN, "training.resume_from_checkpoint=never"))


@pytest.mark.parametrize("stage", ["hfstrat.publish.card.make", "hfstrat.strategies.base.Strategy.after"])
def test_what_is_only_shown_ends_no_run(recipe: Any, unverified: None, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(stage, fail)
    assert run(recipe(*TRAIN))["result"]["status"] == "done"
