"""Answers by likelihood: equal to lm-evaluation-harness on the same examples, whatever shares a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sentences, write_jsonl
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfstrat.errors import UserError
from hfstrat.evaluation import choices
from hfstrat.evaluation.forward import Runner, Subject
from hfstrat.evaluation.likelihood import Likelihood
from hfstrat.recipe.schema import Evaluation
from hfstrat.tasks.causal_lm import CausalLM

TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""


def subject_of(folder: Path, **options: Any) -> Subject:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return Subject.from_model(model, AutoTokenizer.from_pretrained(folder), CausalLM())


def runner(tokens: int = 400) -> Runner:
    return Runner(torch.device("cpu"), torch.float32, Console(quiet=True), tokens)


def asked(folder: Path, count: int = 40) -> Path:
    """Questions with two to five choices of one to many tokens, some of them with bytes beyond ASCII."""
    source = np.random.default_rng(5)
    lines = sentences(6 * count, seed=7)
    rows = []
    for number in range(count):
        texts = [f"{lines[6 * number + k]}{' été' * (k == 1)}" for k in range(source.integers(2, 6))]
        rows.append({"query": f"{number} {lines[6 * number + 5]}", "choices": texts, "gold": int(source.integers(len(texts)))})
    rows[3]["query"] = rows[3]["query"] + "  "  # white space that belongs to the choices
    return write_jsonl(folder / "asked.jsonl", rows)


def slow(subject: Subject, context: list[int], rest: list[int]) -> float:
    """The likelihood of one continuation from all logits of its row, in float64."""
    logits = subject.model(input_ids=torch.tensor([context + rest])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[len(context) + place - 1, token]) for place, token in enumerate(rest))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_context_changes_nothing(models: Callable[..., Path], family: str, attention: str) -> None:
    subject = subject_of(models(family=family), attn_implementation=attention)
    source = np.random.default_rng(3)
    draw = lambda most: source.integers(3, 300, source.integers(1, most)).tolist()  # noqa: E731
    contexts = [draw(30) for _ in range(6)]
    pairs = [(contexts[number % 6], draw(8)) for number in range(40)]
    with subject.measured():
        scored = Likelihood(subject, runner())
        assert scored.shared, "this family keeps continuations apart"
        found = scored.score(pairs, "")
        alone = Likelihood(subject, runner(64), shared=False).score(pairs, "")
        with torch.no_grad():
            expected = [slow(subject, context, rest) for context, rest in pairs]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(alone[:, 0], expected, rtol=1e-5)
    assert (found[:, 1] == [len(rest) for _, rest in pairs]).all()
    assert (found[:, 2] == alone[:, 2]).all()
    assert sum(unit.length for unit in scored.units(pairs)) < sum(len(c) + len(r) - 1 for c, r in pairs)


def test_a_model_that_mixes_them_up_is_noticed(tiny: Path) -> None:
    """A model that ignores the given mask gets a row for each continuation."""
    subject = subject_of(tiny)
    original = subject.model.model.forward
    subject.model.model.forward = lambda *args, attention_mask=None, **kwargs: original(*args, **kwargs)
    with subject.measured():
        assert not Likelihood(subject, runner()).shared


@pytest.mark.slow
def test_results_equal_those_of_the_harness(tiny: Path, tmp_path: Path) -> None:
    """The harness's own model and task, compared with our examples, and with our forward passes in its task."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (pip install 'hfstrat[eval]')")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from hfstrat.evaluation import lm_eval

    file, task = asked(tmp_path), tmp_path / "local_choice.yaml"
    task.write_text(TASK.replace("FILE", str(file)))
    subject = subject_of(tiny)
    theirs = simple_evaluate(
        HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=4),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    expected = {name: theirs["results"]["local_choice"][f"{name},none"] for name in choices.NAMES}
    lls = [response[0][0] for sample in theirs["samples"]["local_choice"] for response in sample["resps"]]
    wanted = Evaluation(lm_eval=["local_choice"], include_path=str(tmp_path))
    with subject.measured():
        ours = choices.measure(subject, str(file), runner())
        under = lm_eval.measure(subject, wanted, runner(), seed=1)["local_choice"]
        by_file = lm_eval.measure(subject, Evaluation(lm_eval=[str(task)]), runner(), seed=1)
        encoder = choices.Encoder(subject)
        pairs = encoder.encode([pair for each in choices.read(file) for pair in each.pairs])
        scores = Likelihood(subject, runner()).score(pairs, "")
    np.testing.assert_allclose(-scores[:, 0], [float(ll) for ll in lls], rtol=1e-5)
    assert ours.values() == pytest.approx(expected)
    assert under.values() == pytest.approx(expected)
    assert by_file.keys() == {"local_choice"}
    assert set(under.shares) == set(choices.NAMES)
    with pytest.raises(UserError, match="did you mean local_choice"):
        lm_eval.task_manager(Evaluation(lm_eval=["local_choise"], include_path=str(tmp_path)))


def test_other_shapes(tiny: Path, tmp_path: Path) -> None:
    """Choices between contexts, and single continuations, compared with the sums."""
    subject, lines = subject_of(tiny), sentences(60, seed=9)
    schema = [{"context_options": lines[n : n + 2], "continuation": "ran.", "gold": n % 2} for n in range(10)]
    going_on = [{"context": lines[n], "continuation": lines[n + 20]} for n in range(10)]
    one, two = write_jsonl(tmp_path / "schema.jsonl", schema), write_jsonl(tmp_path / "on.jsonl", going_on)
    with subject.measured(), torch.no_grad():
        first, second = (choices.measure(subject, str(file), runner()) for file in (one, two))
        ids = choices.Encoder(subject)
        by = [[slow(subject, *ids.encode([(c, " ran.")])[0]) for c in row["context_options"]] for row in schema]
        on = [slow(subject, *ids.encode([(row["context"], f" {row['continuation']}")])[0]) for row in going_on]
    right = np.mean([int(np.argmin(each)) == row["gold"] for each, row in zip(by, schema, strict=True)])
    assert first.values()["acc"] == pytest.approx(right)
    assert second.values()["perplexity"] == pytest.approx(np.exp(np.mean(on)), rel=1e-5)


def test_long_contexts_lose_their_beginning(tiny: Path) -> None:
    subject = subject_of(tiny)
    (front, back), *_ = choices.Encoder(subject).encode([("cat " * 400, " red hat")])
    assert len(front) + len(back) - 1 == 256
    with subject.measured():
        assert np.isfinite(Likelihood(subject, runner()).score([(front, back), (front, back[:1])], "")).all()


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        ({"query": "q", "choices": ["x", "y"], "answer": "B"}, 1),
        ({"query": "q", "choices": ["x", "y"], "answer": "y"}, 1),
        ({"query": "q", "choices": ["1", "0"], "gold": 0}, 0),
    ],
)
def test_the_right_choice_is_found_however_it_is_written(row: Any, gold: int) -> None:
    assert choices.parse_question(row).gold == gold


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "choices": ["x", "y"], "gold": 2}, "none of the 2 choices"),
        ({"query": "q", "choices": ["x", "y"]}, "no correct answer"),
        ({"choices": ["x", "y"], "gold": 0}, "no question"),
        ({"text": "x"}, "it has text"),
    ],
)
def test_rows_that_fit_no_shape(row: Any, message: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "odd.jsonl", [row])
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        list(choices.read(file))


def test_all_of_the_shared_files_are_read(shared: Path) -> None:
    for name in ("arc_easy.jsonl", "boolq.jsonl.gz", "copa.jsonl", "lambada_openai.jsonl.gz", "winograd_wsc.jsonl"):
        assert next(choices.read(shared / "data" / "eval_dev" / name)).pairs
