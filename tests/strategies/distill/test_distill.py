"""A student and its teacher: what is minimized, what is cached of the outputs, what is saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from helpers.distillation import divergence_of, gradients, taught
from helpers.losses import assert_same, count, load, some_rows
from helpers.runs import run
from torch.nn import functional

from hfstrat.data.collate import Collator, shift
from hfstrat.errors import UserError
from hfstrat.models import fused_loss
from hfstrat.strategies.distill.loss import Mix
from hfstrat.strategies.distill.objective import Distiller, FrozenTeacher
from hfstrat.strategies.distill.teacher import check_room, first_difference
from hfstrat.strategies.distill.teacher_cache import Form, Rows, TeacherCollator, WithTeacher, write
from hfstrat.tasks.causal_lm.losses import causal_lm_loss


def reference(model: Any, teacher: Any, rows: list[dict[str, Any]], mix: Mix) -> tuple[float, dict[str, torch.Tensor]]:
    """By autograd through the logits of all positions of both models."""
    batch = Collator(0, 8, masks_logits=False)(rows)
    labels = batch.pop("labels")
    keep = shift(labels) != -100
    ours = model(**batch).logits[keep]
    with torch.no_grad():
        theirs = teacher(**batch).logits[keep]
    width = min(ours.shape[-1], theirs.shape[-1])
    p, q = ((one[:, :width] / mix.temperature).softmax(-1) for one in (theirs, ours))
    apart = divergence_of(mix.divergence, p, q, mix.skew).sum() * mix.temperature**2
    loss = mix.alpha * apart + (1 - mix.alpha) * functional.cross_entropy(ours, shift(labels)[keep], reduction="sum")
    loss = loss / count(rows)
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mix", [Mix("forward_kl", 0.7, 2.0), Mix("jsd", 1.0)], ids=["forward_kl", "jsd"])
def test_a_student_has_the_reference_loss_however_the_batch_is_split(models: Callable[..., Path], mix: Mix) -> None:
    rows, teacher = some_rows(), load(models(tied=True))
    expected = reference(load(models()), teacher, rows, mix)
    model = taught(load(models()), teacher, mix)
    for micro in (8, 1, 3):
        assert_same(gradients(model, rows, micro), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any("teacher" in name for name, _ in model.named_parameters())


def test_evaluation_is_the_plain_loss_and_the_divergence_beside_it(models: Callable[..., Path]) -> None:
    teacher, plain = load(models(tied=True)), load(models()).eval()
    model = taught(load(models()), teacher, Mix("reverse_kl", 0.9, 2.0)).eval()
    batch = Collator(0, 8, masks_logits=False, selects_rows=True)(some_rows())
    labels = batch.pop("labels")
    keep = shift(labels) != -100
    stock = {name: tensor for name, tensor in batch.items() if name not in ("loss_rows", "targets")}
    with torch.no_grad():
        output = model(**batch)
        ours, theirs = (one(**stock).logits[keep] for one in (plain, teacher))
    nll = functional.cross_entropy(ours, shift(labels)[keep], reduction="none")
    torch.testing.assert_close(output.nll, nll)
    torch.testing.assert_close(output.total, nll.sum())
    p, q = ((one / 2.0).softmax(-1) for one in (theirs, ours))
    torch.testing.assert_close(output.kl, divergence_of("forward_kl", p, q, 0.0))


def test_padded_rows_of_all_masked_labels_are_a_zero(models: Callable[..., Path]) -> None:
    model = taught(load(models()), load(models(tied=True)), Mix())
    rows = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    loss, found = gradients(model, rows, 1)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in found.values())


def test_only_the_shared_words_have_to_be_the_same() -> None:
    ours = {"a": 0, "b": 1, "c": 2}
    assert first_difference(ours, dict(ours), 3) is None
    assert first_difference(ours, {**ours, "<pad>": 3}, 3) is None
    assert first_difference(ours, {"a": 0, "b": 1}, 3) is None
    assert "2 is 'c'" in (first_difference(ours, {"a": 0, "b": 1, "d": 2}, 3) or "")


def test_a_teacher_that_does_not_fit_is_refused_with_what_would() -> None:
    from hfstrat.strategies.description import Footprint

    sizes, student = (2e9, 6e8), Footprint(10**9, 10**9)  # beside it: 4 GB, and 16 GB while it learns
    fits = {
        (7, False): None,
        (5, False): ["quantized", "at most 1.0 GB"],
        (4.5, False): ["at most 0.5 GB"],
        (3, False): ["smaller student"],
        (18, True): None,
        (17, True): ["cache.form: hidden", "quantized", "at most 1.0 GB"],
        (7, True): ["cache.form: hidden", "smaller student"],
        (5, True): ["quantized one (teacher: {quantization: nf4}) with cached outputs", "smaller student"],
    }
    check_room("t", sizes, student, None, True)
    check_room("t", (0.0, 0.0), student, 1, True)
    for (free, stays), cures in fits.items():
        if cures is None:
            check_room("t", sizes, student, int(free * 1e9), stays)
            continue
        with pytest.raises(UserError, match=r"strategy\.teacher: t takes 2\.0 GB") as said:
            check_room("t", sizes, student, int(free * 1e9), stays)
        found = str(said.value).partition("possible: ")[2].split(", or ")
        assert len(found) == len(cures)
        assert all(part in one for part, one in zip(cures, found, strict=True)), found
    with pytest.raises(UserError, match="possible: a smaller student"):
        check_room("t", sizes, student, int(7e9), stays=True, keepable=False)


# What the rows bring along


def kept(rows: list[dict[str, Any]], form: Form, teacher: FrozenTeacher, folder: Path) -> WithTeacher:
    """The teacher's outputs for each row, computed one at a time."""
    from hfstrat.models.chunked_loss import blocks

    collate, blobs = Collator(0, 8, masks_logits=False, selects_rows=True), []
    for row in rows:
        batch = collate([row])
        states = teacher.hidden((), {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["loss_rows"])
        logits = lambda hidden: blocks(hidden, teacher.head)  # noqa: E731
        blobs.append(form.bytes_of(states, logits, torch.Generator().manual_seed(len(blobs)))[0])
    write(folder / "said", [blobs])
    return WithTeacher(rows, folder / "said", torch.arange(len(rows)).numpy())


@pytest.mark.parametrize("mix", [Mix("forward_kl", 0.7, 2.0), Mix("skew_kl", 1.0)], ids=["forward_kl", "skew_kl"])
def test_kept_answers_are_the_teacher_s_in_any_order(models: Callable[..., Path], tmp_path: Path, mix: Mix) -> None:
    from transformers import AutoModelForCausalLM

    model, teacher = (AutoModelForCausalLM.from_pretrained(models(tied=tied), dtype=torch.float32) for tied in (False, True))
    rows = some_rows()
    taught(model, teacher, mix)
    online = gradients(model, rows, 8)
    distiller = fused_loss.objective_of(model)
    assert isinstance(distiller, Distiller)
    assert distiller.teacher is not None
    form = Form("hidden", 32, "float32")
    said = kept(rows, form, distiller.teacher, tmp_path)
    distiller.head, distiller.teacher = distiller.teacher.head, None
    collate = TeacherCollator(Collator(0, 8, masks_logits=False, selects_rows=True), form)
    for seed in range(3):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        model.zero_grad()
        loss = 0.0
        for start in range(0, len(rows), 3):
            batch = collate(said.__getitems__(order[start : start + 3]))
            labels = batch.pop("labels")
            part = causal_lm_loss(model(**batch), labels, count(rows))
            part.backward()
            loss += float(part.detach())
        assert loss == pytest.approx(online[0], rel=1e-5)
        for name, gradient in online[1].items():
            found = dict(model.named_parameters())[name].grad
            assert float((found - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-9, name


def test_the_first_token_of_an_answer_counts(models: Callable[..., Path], tmp_path: Path) -> None:
    """A row with an answer of one token has one position, the prompt's last, with the output there."""
    teacher = FrozenTeacher(load(models(tied=True)).float())
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}, {"input_ids": [5, 9], "labels": [-100, 9]}]
    assert Rows.of(rows).supervised.tolist() == [1, 1]
    form = Form("hidden", 32, "float32")
    collate = TeacherCollator(Collator(0, 8, masks_logits=False, selects_rows=True), form)
    found = collate(kept(rows, form, teacher, tmp_path).__getitems__([1, 0]))["teacher_hidden"]
    with torch.no_grad():
        for row, ids in ((0, [5]), (1, [5, 6, 7])):
            wanted = teacher.model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_draws_and_likeliest_tokens_are_those_of_the_distribution(models: Callable[..., Path], tmp_path: Path) -> None:
    teacher = FrozenTeacher(load(models(tied=True)).float())
    rows, collate = some_rows((9, 14)), Collator(0, 8, masks_logits=False, selects_rows=True)
    batch = collate(rows)
    states = teacher.hidden((), {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["loss_rows"])
    head = teacher.head
    logprobs = (functional.linear(states, head.weight) / 2.0).log_softmax(-1)
    for form in (Form("sampled", 4000, temperature=2.0), Form("top_k", 5, temperature=2.0)):
        found = TeacherCollator(collate, form)(kept(rows, form, teacher, tmp_path).__getitems__([0, 1]))
        if form.kind == "top_k":
            values = logprobs.topk(5).values
            torch.testing.assert_close(found["teacher_logprobs"], values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found["teacher_logprobs"], logprobs.gather(1, found["teacher_ids"]), rtol=1e-4, atol=1e-5
            )
            continue
        shares = torch.zeros_like(logprobs).scatter_add_(1, found["teacher_ids"], found["teacher_weights"])
        assert float((shares - logprobs.exp()).abs().max()) < 5 * (0.25 / 4000) ** 0.5
        torch.testing.assert_close(found["teacher_entropy"], -(logprobs.exp() * logprobs).sum(-1), rtol=1e-4, atol=1e-4)


# Runs


@pytest.fixture
def distil(recipe: Any, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`distil("{...}", "a=b", name=...)` runs a small recipe in float32 and returns the report's result and the trainer."""
    import hfstrat.run.train as page

    seen: dict[str, Any] = {}
    save = page.save

    def watched(job: Any) -> Path:
        seen["job"] = job
        seen["optimised"] = sum(p.numel() for group in job.trainer.optimizer.param_groups for p in group["params"])
        seen["learning"] = sum(p.numel() for p in job.trainer.model.parameters() if p.requires_grad)
        return save(job)

    monkeypatch.setattr(page, "save", watched)
    monkeypatch.setattr("hfstrat.tasks.verify.verify", lambda *args: {"bit_equal": True, "loaded_with": "a test"})
    monkeypatch.setattr("hfstrat.strategies.distill.report.speed_of", lambda *args: 1.0)

    def start(strategy: str, *settings: str, name: str = "run") -> dict[str, Any]:
        text = strategy.replace("TEACHER", str(models(tied=True)))
        words = [f"strategy={text}", "model.dtype=float32", "strategy.baseline=false", f"output_dir={tmp_path / name}"]
        report = run(recipe(*words, *settings))
        assert report is not None
        return {**report["result"], **seen, "recipe": report["run"]["recipe"]}

    return start


def losses(result: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in result["losses"]]


TWO_EPOCHS = "training={num_train_epochs: 2, global_batch_size: 16, learning_rate: 1e-3, logging_steps: 1}"


@pytest.mark.slow
def test_a_run_with_kept_answers_is_the_run_that_asks_each_time(distil: Any, capsys: pytest.CaptureFixture[str]) -> None:
    strategy = "{name: distill, teacher: TEACHER, student: full, temperature: 2.0, teacher_cache: {form: FORM}}"
    once = distil(strategy.replace("FORM", "auto"), TWO_EPOCHS, name="once")
    anew = distil(strategy.replace("FORM", '"off"'), TWO_EPOCHS, name="anew")
    said = capsys.readouterr().out
    assert "outputs computed in" in said
    assert "outputs are computed on the fly: teacher_cache" in said
    assert losses(once) == pytest.approx(losses(anew), rel=1e-4)
    assert once["metrics_after"] == pytest.approx(anew["metrics_after"], rel=1e-4)
    assert once["metrics_after"]["teacher_kl"] > 0
    facts = once["distillation"]
    assert facts["cache"]["form"] == "hidden"
    assert facts["teacher"]["loss"] == pytest.approx(anew["distillation"]["teacher"]["loss"], rel=1e-4)
    again = distil(strategy.replace("FORM", "auto"), TWO_EPOCHS, name="again")
    assert again["distillation"]["cache"]["built"] == []
    assert losses(again) == losses(once)


def test_answers_of_another_teacher_are_not_taken(
    distil: Any, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither if the teacher's folder has other weights now, nor if another one's outputs have its name."""
    import shutil

    from safetensors.torch import load_file, save_file

    from hfstrat.data import cache

    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))  # else what tests beside this one keep is counted
    shutil.copytree(models(tied=True), tmp_path / "teacher")
    strategy = f"{{name: distill, teacher: {tmp_path / 'teacher'}, student: full}}"
    seen, built, made = {entry.path for entry in cache.entries()}, [], []
    for turn in ("first", "second"):
        weights = load_file(tmp_path / "teacher" / "model.safetensors")
        weights["model.norm.weight"] *= 1.5
        save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
        built.append(distil(strategy, TWO_EPOCHS, name=turn)["distillation"]["cache"]["built"])
        made.append({entry.path for entry in cache.entries() if entry.kind == "teacher"} - seen)
        seen |= made[-1]
    assert built == [["eval", "train"]] * 2
    by_size = [sorted(paths, key=lambda path: path.stat().st_size) for paths in made]
    for ours, theirs in zip(*by_size, strict=True):
        for old, new in ((ours, theirs), (cache.note_path(ours), cache.note_path(theirs))):
            shutil.copyfile(old, new)
    with pytest.raises(
        UserError, match=r"strategy\.teacher_cache: .* not those of this teacher; remove them \(hfstrat cache rm teacher-"
    ):
        distil(strategy, TWO_EPOCHS, name="third")
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_packed_runs_are_the_run_that_is_not_packed(distil: Any) -> None:
    """With cached outputs, which are those of unpacked runs, and computed for each packed batch."""
    found = {}
    for form, packing in (("hidden", "false"), ("hidden", "true"), ("off", "true")):
        strategy = f"{{name: distill, teacher: TEACHER, student: full, teacher_cache: {{form: '{form}'}}}}"
        words = (TWO_EPOCHS, f"training.packing={packing}", "training.train_sampling_strategy=random", "data.max_length=64")
        found[form, packing] = distil(strategy, *words, name=f"{form}-{packing}")
        assert (found[form, packing]["plan"]["bins"] is not None) == (packing == "true")
    for way in (("hidden", "true"), ("off", "true")):
        assert losses(found[way]) == pytest.approx(losses(found["hidden", "false"]), rel=1e-5)
        assert found[way]["metrics_after"] == pytest.approx(found["hidden", "false"]["metrics_after"], rel=1e-5)
    assert found["hidden", "true"]["distillation"]["cache"]["built"] == []


def test_a_teacher_that_was_asked_once_is_gone_before_training(distil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from hfstrat.run import train
    from hfstrat.strategies.distill import teacher as distill_teacher

    load, fit, found = distill_teacher.load_teacher, train.fit, list[Any]()

    def watched(*args: Any) -> Any:
        made = load(*args)
        found.append(weakref.ref(made))
        return made

    monkeypatch.setattr(distill_teacher, "load_teacher", watched)
    monkeypatch.setattr(train, "fit", lambda job, before: (found.append(found[0]()), fit(job, before))[1])
    distil("{name: distill, teacher: TEACHER, student: full}", TWO_EPOCHS)
    assert found[1:] == [None]


def test_the_teacher_is_nowhere_but_beside(distil: Any, models: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    result = distil("{name: distill, teacher: TEACHER, student: full, teacher_cache: {form: 'off'}}")
    stock = set(load_file(models() / "model.safetensors"))
    for folder in [tmp_path / "run" / "final", *(tmp_path / "run").glob("checkpoint-*")]:
        assert set(load_file(folder / "model.safetensors")) == stock
    assert result["optimised"] == result["learning"] == result["total_parameters"]
    summary = result["comparison"]
    assert summary["teacher"]["parameters"] < summary["student"]["parameters"]
    assert any(line.startswith("distilled") for line in summary["lines"])


def test_an_adapter_learns_from_its_own_base(distil: Any) -> None:
    """At the start both have the same outputs; afterwards those of the adapter differ from those of the base."""
    result = distil("{name: distill, student: {name: lora, r: 4}, teacher_weight: 0.3, teacher_cache: {form: 'off'}}")
    assert result["metrics_before"]["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    assert result["metrics_after"]["teacher_kl"] > 1e-4
    assert result["distillation"]["teacher"]["loss"] == pytest.approx(result["metrics_before"]["loss"], rel=1e-5)


def test_layers_are_brought_together_through_projections_that_are_not_saved(distil: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    wide = LlamaConfig(
        vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    pairs = "hidden_states: {loss: mse, layers: [[1, 2], [3, 5]]}"
    done = distil(f"{{name: distill, teacher: {tmp_path / 'wide'}, student: full, {pairs}}}")
    assert done["optimised"] == done["learning"] + 2 * 32 * 48
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    assert any("distill_projections" in name for name in load_file(checkpoint / "model.safetensors"))
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert not any("distill" in name for name in saved)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


@pytest.mark.parametrize(
    "more", ["hidden_states: {loss: cosine}", "teacher_cache: {form: sampled, tokens: 8}"], ids=["layers", "draws"]
)
def test_resumed_is_uninterrupted(distil: Any, tmp_path: Path, more: str) -> None:
    import shutil

    from safetensors.torch import load_file

    strategy = f"{{name: distill, teacher: TEACHER, shrink: {{layers: 3}}, student: full, {more}}}"
    distil(strategy, "training.save_total_limit=5", name="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(tmp_path / "half" / name)
    (tmp_path / "half" / "report.json").unlink()
    again = distil(strategy, "training.save_total_limit=5", name="half")
    assert again["resumed_from"].endswith("checkpoint-2")
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("half", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_vocabulary_is_refused(recipe: Any, tmp_path: Path, models: Callable[..., Path]) -> None:
    import shutil

    shutil.copytree(models(tied=True), tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    first, second = sorted(words, key=words.get)[10:12]
    words[first], words[second] = words[second], words[first]
    file.write_text(json.dumps(content))
    loaded = recipe(f"strategy={{name: distill, teacher: {tmp_path / 'other'}, student: full}}")
    with pytest.raises(UserError, match=r"another vocabulary .*seq_kd.*GOLD"):
        run(loaded)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_equal_one(recipe: Any, models: Callable[..., Path], tmp_path: Path) -> None:
    from helpers.commands import hfstrat
    from helpers.commands import losses as logged

    strategy = f"strategy={{name: distill, teacher: {models(tied=True)}, student: full, temperature: 2.0, baseline: false}}"
    for form in ("hidden", "'off'"):
        settings = [
            strategy,
            f"strategy.teacher_cache.form={form}",
            "model.dtype=float32",
            "training.per_device_train_batch_size=2",
        ]
        settings += ["training.learning_rate=1e-3", "data.eval_size=13"]
        one = recipe(*settings, f"output_dir={tmp_path / 'one'}")
        run(one, overwrite=True)
        words = ["train", one.source, *settings, f"output_dir={tmp_path / 'two'}", "--num-processes", "2", "--overwrite"]
        done = hfstrat(*words)
        assert done.returncode == 0, done.stderr
        assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)
        reports = [json.loads((tmp_path / name / "report.json").read_text())["result"] for name in ("one", "two")]
        assert reports[0]["metrics_after"] == pytest.approx(reports[1]["metrics_after"], rel=1e-4)


@pytest.mark.slow
def test_the_same_student_without_the_teacher_is_run_and_compared(recipe: Any, tmp_path: Path) -> None:
    """With the same start and rows: with `teacher_weight: 0` the run is the baseline, so both have the same result."""
    strategy = "strategy={name: distill, shrink: {layers: 2}, student: full, teacher_weight: 1e-12}"
    report = run(recipe(strategy, "model.dtype=float32"))
    assert report is not None
    found = report["result"]["comparison"]
    assert found["without_teacher"]["loss"] == pytest.approx(found["student"]["loss"], rel=1e-5)
    assert found["without_teacher"]["steps"] == report["result"]["steps"]
    assert any("without teacher  loss" in line for line in found["lines"])
