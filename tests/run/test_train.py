"""Complete runs: a finished run fulfills its guarantees."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import UNVERIFIED, folder_of, log_history, run, stop_at, weights
from safetensors.torch import load_file

from hfstrat import errors
from hfstrat.errors import RunError, UserError
from hfstrat.run import train
from hfstrat.trainer import checkpoints


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without verification in a fresh process, which has its own tests."""
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: UNVERIFIED)


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy={name: lora, r: 4}",),
        ("strategy=full",),
        pytest.param(("strategy={name: partial, last_n_layers: 1}",), marks=pytest.mark.slow),
        pytest.param(("strategy={name: lora, r: 4, init_lora_weights: pissa}", "model.dtype=float32"), marks=pytest.mark.slow),
        ("strategy={name: lora, r: 4, use_dora: true}", "model.add_tokens=['<think>']"),
        ("strategy={name: lora, r: 4, modules_to_save: [lm_head]}", "model.dtype=bfloat16"),
    ],
    ids=["lora", "full", "partial", "pissa", "dora-and-new-tokens", "lora-and-head"],
)
def test_a_run_ends_with_a_verified_artifact_and_a_report(recipe: Any, overrides: tuple[str, ...]) -> None:
    loaded = recipe(*overrides)
    report = run(loaded)
    assert report is not None
    result, folder = report["result"], folder_of(loaded)
    assert result["status"] == "done"
    assert result["verified"]["bit_equal"] or "pissa" in overrides[0]
    assert result["metrics_after"]["loss"] < result["metrics_before"]["loss"]
    assert result["steps"] == 4
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report, default=str))
    assert not (folder / "final.partial").exists()
    names = {path.name for path in (folder / "final").iterdir()}
    assert "training_args.bin" not in names
    assert {"tokenizer.json", "chat_template.jinja"} <= names


@pytest.mark.parametrize("every", [1, 2])
def test_a_progress_line_shows_the_loss_of_its_step(
    recipe: Any, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: int
) -> None:
    """The step's own loss where it is logged, else the last logged one."""
    monkeypatch.setattr("hfstrat.trainer.progress.LINE_EVERY", -1.0)
    report = run(recipe(f"training.logging_steps={every}"))
    assert report is not None
    known = {entry["step"]: f"{entry['loss']:.3f}" for entry in report["result"]["losses"]}
    printed = re.findall(r"^step (\d)/4  (?:loss (\S+)  )?\S+ tokens/s", capsys.readouterr().out, re.MULTILINE)
    assert printed == [(str(step), known.get(step, known.get(step - 1, ""))) for step in (1, 2, 3, 4)]


def test_rows_beyond_the_models_context_are_refused(recipe: Any, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text('{"prompt": "a", "completion": "' + "cat " * 400 + '"}\n{"prompt": "b", "completion": "c"}\n')
    with pytest.raises(UserError, match=r"data.max_length: .* this model's context is 256"):
        run(recipe(f"data.train={long}", "data.eval_size=1", "data.max_length=4096"))
    assert not folder_of(recipe()).exists()


def test_an_interruption_names_what_it_leaves(recipe: Any, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    stops = [
        ("false", 1, "before the first checkpoint"),
        ("true", 1, "resumes from .*checkpoint-0"),
        ("true", 3, "resumes from .*checkpoint-2"),
    ]
    for before, step, words in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt, match=words):
                run(recipe(f"evaluation.eval_on_start={before}"))


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_weights(recipe: Any, tmp_path: Path, quick: None) -> None:
    first, second = (recipe(f"output_dir={tmp_path / name}") for name in ("a", "b"))
    run(first)
    run(second)
    for name, tensor in weights(folder_of(first)).items():
        assert torch.equal(tensor, weights(folder_of(second))[name])
    other = recipe(f"output_dir={tmp_path / 'c'}", "seed=7")
    run(other)
    assert any(not torch.equal(t, weights(folder_of(other))[n]) for n, t in weights(folder_of(first)).items())


@pytest.mark.parametrize(
    ("strategy", "packing"),
    [
        ("{name: lora, r: 4, lora_dropout: 0.1}", "false"),
        pytest.param("full", "true", marks=pytest.mark.slow),
        pytest.param("{name: partial, last_n_layers: 1}", "false", marks=pytest.mark.slow),
        pytest.param("{name: lora, init_lora_weights: pissa}", "false", marks=pytest.mark.slow),
    ],
    ids=["lora", "full", "partial", "pissa"],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, strategy: str, packing: str
) -> None:
    settings = (
        f"strategy={strategy}",
        *(["model.dtype=float32"] if "pissa" in strategy else []),
        f"training.packing={packing}",
        "training.max_steps=6",
        "training.early_stopping_patience=3",
    )
    whole = recipe(*settings, f"output_dir={tmp_path / 'whole'}")
    whole_report = run(whole)
    broken = recipe(*settings, f"output_dir={tmp_path / 'broken'}")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    report = json.loads((folder_of(broken) / "report.json").read_text())
    assert report["result"]["status"] == "interrupted"
    (folder_of(broken) / "checkpoint-5").mkdir()  # an incomplete one is skipped
    again = run(broken)
    assert again is not None
    assert again["result"]["resumed_from"].endswith("checkpoint-4")
    assert again["result"]["metrics_before"] is not None
    assert again["result"]["measured"] == whole_report["result"]["measured"], "also the intervals of the differences"
    assert again["result"]["answers"][0]["before"]
    expected = weights(folder_of(whole))
    for name, tensor in weights(folder_of(broken)).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_is_completed_by_the_next(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    whole = recipe(f"output_dir={tmp_path / 'whole'}")
    run(whole)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hfstrat.tasks.verify.verify", killed)
        with pytest.raises(KeyboardInterrupt):
            run(recipe())
    again = run(recipe())
    assert again is not None
    assert again["result"]["status"] == "done"
    assert again["result"]["session_steps"] == 0
    for name, tensor in weights(folder_of(whole)).items():
        assert torch.equal(tensor, weights(folder_of(recipe()))[name])


def test_a_changed_recipe_does_not_resume(recipe: Any, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(recipe())
    with pytest.raises(UserError, match=r"learning_rate was 0.01, is 0.02"):
        run(recipe("training.learning_rate=0.02"))
    run(recipe("training.logging_steps=3"))


def test_a_finished_run_is_not_overwritten_without_overwrite(recipe: Any, quick: None) -> None:
    run(recipe())
    before = weights(folder_of(recipe()))
    with pytest.raises(UserError, match="--overwrite"):
        run(recipe())
    report = run(recipe("strategy.r=2"), overwrite=True)
    assert report is not None
    assert weights(folder_of(recipe())).keys() == before.keys()


def test_two_runs_do_not_share_a_folder(recipe: Any) -> None:
    from hfstrat.run import output_dir

    lock = output_dir.claim(recipe().recipe, overwrite=False)
    with pytest.raises(UserError, match="another run"):
        output_dir.claim(recipe().recipe, overwrite=False)
    lock.close()


def test_a_non_finite_gradient_ends_the_run_and_keeps_the_last_checkpoint(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.trainer.trainer import StrategyTrainer

    original = StrategyTrainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 3 else loss

    monkeypatch.setattr(StrategyTrainer, "compute_loss", compute_loss)
    loaded = recipe("training.max_steps=6")
    with pytest.raises(RunError, match=r"not finite at step 4; the last complete checkpoint is .*checkpoint-2") as info:
        run(loaded)
    assert info.value.code == errors.NON_FINITE
    assert "checkpoint" not in str(info.value).replace(info.value.checkpoints, "")
    folder = folder_of(loaded)
    assert [p.name for p in checkpoints.all_checkpoints(folder)] == ["checkpoint-0", "checkpoint-2"]
    assert all(t.isfinite().all() for t in load_file(folder / "checkpoint-2" / "adapter_model.safetensors").values())
    assert json.loads((folder / "report.json").read_text())["result"]["status"] == "non-finite"


def test_a_learning_rate_that_explodes_is_caught(recipe: Any) -> None:
    with pytest.raises(RunError, match="not finite") as info:
        run(recipe("strategy=full", "training.learning_rate=1e30", "training.warmup_steps=0", "model.dtype=float32"))
    assert info.value.code == errors.NON_FINITE


def test_max_time_ends_the_run_and_the_schedule_with_it(recipe: Any, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """With a fake clock: one second per reading, two per step."""
    ticks = itertools.count()
    monkeypatch.setattr("hfstrat.trainer.callbacks.time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    report = run(recipe("training={max_time: 40s, eval_steps: 0.5, logging_steps: 1, global_batch_size: 8}"))
    assert report is not None
    steps = report["result"]["steps"]
    assert 19 <= steps <= 21
    history = log_history(report)
    evaluated = [e["step"] for e in history if "eval_loss" in e]
    assert evaluated == [0, pytest.approx(steps / 2, abs=1), steps]
    rates = [e["learning_rate"] for e in history if "learning_rate" in e]
    assert rates[-1] < 0.02 * max(rates)
    after_warmup = rates[rates.index(max(rates)) :]
    assert after_warmup == sorted(after_warmup, reverse=True)


def test_the_best_weights_are_the_result(recipe: Any, quick: None) -> None:
    report = run(recipe("strategy=full", "training.learning_rate=0.3", "training.max_steps=8", "training.eval_steps=1"))
    assert report is not None
    losses = {e["step"]: e["eval_loss"] for e in log_history(report) if "eval_loss" in e and e["step"] > 0}
    best = min(losses, key=lambda step: losses[step])
    assert report["result"]["best_step"] == best
    assert report["result"]["metrics_after"]["loss"] == pytest.approx(losses[best], rel=2e-2)


def test_the_best_is_kept_between_checkpoints(recipe: Any, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """The third step is best and the only regular checkpoint is the eighth: the result has the third step's weights."""
    from hfstrat.trainer.trainer import StrategyTrainer

    evaluate, kept = StrategyTrainer.evaluate, {}

    def told(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        step = self.state.global_step
        kept.setdefault(step, self.model.lm_head.weight.detach().clone())
        return evaluate(self, *args, **kwargs) | {"eval_loss": 1.0 + abs(step - 3)}

    monkeypatch.setattr(StrategyTrainer, "evaluate", told)
    settings = ("strategy=full", "training.learning_rate=0.3", "training.max_steps=8", "training.eval_steps=1")
    loaded = recipe(*settings, "training.save_steps=8", "training.save_total_limit=1")
    report = run(loaded)
    assert report is not None
    assert report["result"]["best_step"] == 3
    assert torch.equal(weights(folder_of(loaded))["lm_head.weight"], kept[3])


@pytest.mark.parametrize("best", [3, 6])
@pytest.mark.parametrize("killed", [None, 5, 7])
def test_save_steps_need_not_be_a_multiple_of_eval_steps(
    recipe: Any, best: int, killed: int | None, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Evaluations at steps 3, 6 and 9, checkpoints at 4 and 8: the best weights are restored, also after a resume."""
    from hfstrat.trainer.trainer import StrategyTrainer

    evaluate, evaluated = StrategyTrainer.evaluate, {}

    def reported(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        step = self.state.global_step
        evaluated[step] = self.model.lm_head.weight.detach().clone()
        return evaluate(self, *args, **kwargs) | {"eval_loss": 1.0 + abs(step - best)}

    monkeypatch.setattr(StrategyTrainer, "evaluate", reported)
    settings = ("strategy=full", "training.learning_rate=0.3", "training.max_steps=9", "training.save_total_limit=1")
    loaded = recipe(*settings, "training.eval_steps=3", "training.save_steps=4")
    if killed is not None:
        with monkeypatch.context() as patch:
            stop_at(patch, killed)
            with pytest.raises(KeyboardInterrupt):
                run(loaded)
    report = run(loaded)
    assert report is not None
    if killed is not None:
        assert report["result"]["resumed_from"].endswith(f"checkpoint-{6 if killed > 6 == best else 4}")
    assert set(evaluated) >= {0, 3, 6, 9}
    assert report["result"]["best_step"] == best
    assert torch.equal(weights(folder_of(loaded))["lm_head.weight"], evaluated[best])


def test_changed_data_do_not_resume(
    recipe: Any, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(rows.read_text())
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(recipe(f"data.train={mine}"))
    mine.write_text(rows.read_text().replace("cat", "dog"))
    with pytest.raises(UserError, match=r"differ from those of .*checkpoint-2"):
        run(recipe(f"data.train={mine}"))


def test_overwrite_does_not_delete_inputs_of_the_run(recipe: Any, quick: None) -> None:
    first = run(recipe())
    assert first is not None
    adapter = first["result"]["artifact"]
    with pytest.raises(UserError, match="is in output_dir"):
        run(recipe(f"strategy={{name: lora, adapter: {adapter}}}"), overwrite=True)
    (folder_of(recipe()) / "notes.txt").write_text("mine")
    run(recipe(), overwrite=True)
    assert (folder_of(recipe()) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), errors.DISK_FULL),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"), errors.DISK_FULL),
        (MemoryError(), errors.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), errors.OUT_OF_MEMORY),
        (KeyboardInterrupt(), errors.INTERRUPTED),
        (ZeroDivisionError("x"), errors.CRASH),
    ],
)
def test_errors_have_named_exit_codes(error: BaseException, code: int) -> None:
    assert errors.named(error).code == code


def test_early_stopping_stops(recipe: Any, quick: None) -> None:
    settings = ("strategy=full", "training.learning_rate=0.5", "training.max_steps=20", "training.eval_steps=1")
    report = run(recipe(*settings, "training.early_stopping_patience=1"))
    assert report is not None
    assert report["result"]["steps"] < 20


def test_training_continues_from_an_adapter(recipe: Any, tmp_path: Path, quick: None) -> None:
    first = run(recipe())
    assert first is not None
    adapter = first["result"]["artifact"]
    second = run(recipe(f"strategy={{name: lora, adapter: {adapter}}}", f"output_dir={tmp_path / 'second'}"))
    assert second is not None
    before, after = first["result"]["metrics_after"]["loss"], second["result"]["metrics_before"]["loss"]
    assert before == pytest.approx(after, rel=1e-3)


def test_a_differing_artifact_is_detected(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A saved adapter that differs from the trained one: the run does not end as done."""
    from hfstrat.strategies.base import Strategy

    original = Strategy.save

    def save(self: Any, trainer: Any, folder: Path, base: Any) -> None:
        original(self, trainer, folder, base)
        from safetensors.torch import save_file

        file = folder / "adapter_model.safetensors"
        save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})

    monkeypatch.setattr(Strategy, "save", save)
    with pytest.raises(RunError, match="does not match the trained model") as info:
        run(recipe("training.learning_rate=0.1", "training.load_best_model_at_end=false"))
    assert info.value.code == errors.ARTIFACT
    assert not (folder_of(recipe()) / "final").exists()


def test_out_of_memory_names_three_remedies(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfstrat.trainer.trainer import StrategyTrainer

    def training_step(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(StrategyTrainer, "training_step", training_step)
    loaded = recipe()
    with pytest.raises(torch.OutOfMemoryError):
        run(loaded)
    told = json.loads((folder_of(loaded) / "report.json").read_text())["result"]
    assert told["status"] == "out-of-memory"
    for way in ("per_device_train_batch_size", "activation_checkpointing", "max_length"):
        assert way in told["message"]


def test_main_ends_with_one_sentence_and_the_code(
    recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = recipe().source
    with pytest.raises(SystemExit) as info:
        train.main([source, "training.learning_rat=1"])
    assert info.value.code == errors.USER
    told = capsys.readouterr().err
    assert "did you mean 'learning_rate'" in told
    assert "Traceback" not in told


def test_checkpoints_rotate_and_the_best_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        checkpoints.mark_complete(folder, {"recipe": {}})
    (tmp_path / "checkpoint-7").mkdir()  # incomplete
    checkpoints.rotate(tmp_path, 1, str(tmp_path / "checkpoint-4"))
    assert [p.name for p in checkpoints.all_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        checkpoints.mark_complete(folder, {"recipe": {"seed": 1}})
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"wei")  # truncated
    found, remarks = checkpoints.find_resume(tmp_path, "auto", {"seed": 1})
    assert found == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is incomplete" in remarks[0]
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert checkpoints.find_resume(tmp_path, "auto", {"seed": 1})[0] is None
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.find_resume(tmp_path, str(tmp_path / "checkpoint-4"), {"seed": 1})
