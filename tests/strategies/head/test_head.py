"""Head-only transfer: features against plain transformers, what is selected, what is published, what continues from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.classifiers import FAMILIES, labeled, write_recipe
from helpers.runs import run

from hfstrat import errors, strategies
from hfstrat.cli import check
from hfstrat.data.splits import column
from hfstrat.errors import UserError
from hfstrat.models.load import Base, count_parameters, read_shapes
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.strategies import Head
from hfstrat.run import setup
from hfstrat.strategies.head import pooled
from hfstrat.strategies.head.features import POOLINGS, cut, extract, split_body
from hfstrat.strategies.head.heads import is_exact, language_head
from hfstrat.tasks import TASKS, artifact, sentence_transformers, verify
from hfstrat.tasks.text_classification import labels_of

FLOAT = "model.dtype=float32"


@pytest.fixture
def recipe_of(tmp_path: Path, bodies: Any) -> Callable[..., Any]:
    """`recipe_of("bert", "strategy=head", many=True)` loads a small recipe."""

    def load(family: str, *overrides: str, **rows: Any) -> Any:
        file = write_recipe(tmp_path, bodies(family), labeled(tmp_path, **rows))
        return load_recipe(str(file), [FLOAT, "evaluation.samples=1", *overrides])

    return load


def job_of(loaded: Any) -> Any:
    world = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    job = setup.set_up(loaded, world, overwrite=True)
    assert job.lock is not None
    job.lock.close()
    return job


def loaded_body(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_the_cut_model_for_one_text(bodies: Any, family: str, recipe_of: Any) -> None:
    """Every layer and pooling, in padded batches, against the shortened model on each text alone."""
    job = job_of(recipe_of(family))
    rows = job.data.train.select(range(9))
    body = split_body(loaded_body(bodies(family)))
    layers = list(range(1, body.depth + 1))
    found = extract(body, rows, range(9), job.train_data.collate, layers, POOLINGS, torch.float32)
    for layer in reversed(layers):
        short = cut(split_body(loaded_body(bodies(family))), layer).model
        assert short.config.num_hidden_layers == layer
        for index, row in enumerate(rows):
            with torch.no_grad():
                said = short(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
            for number, wanted in enumerate((said.mean(0), said[-1], said[0])):
                torch.testing.assert_close(found[index, layer - 1, number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2"])
def test_a_cut_body_reloads_as_it_is(bodies: Any, family: str, tmp_path: Path) -> None:
    short = cut(split_body(loaded_body(bodies(family))), 2).model
    short.save_pretrained(tmp_path)
    again = loaded_body(tmp_path)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).last_hidden_state, short(input_ids=ids).last_hidden_state)
    assert len(split_body(again).blocks) == 2


RUNS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("bert", "head", {}, "SentenceTransformer"),
    "bert-layer-pairs": ("bert", "{name: head, layer: 2, pooling: mean}", {"pairs": True}, "SentenceTransformer"),
    "several": ("distilbert", "head", {"many": True}, "SentenceTransformer"),
    "llama-last": ("llama", "{name: head, layer: 3, pooling: last}", {}, "LlamaForSequenceClassification"),
    "llama-mean-pairs": ("llama", "{name: head, layer: 2, pooling: mean}", {"pairs": True}, "SentenceTransformer"),
    "mlp": ("modernbert", "{name: head, head: mlp, hidden_size: 8, layer: 2, pooling: mean}", {}, "SentenceTransformer"),
    "mlp-several": (
        "gpt2",
        "{name: head, head: mlp, hidden_size: 8, layer: 2, pooling: mean}",
        {"many": True},
        "SentenceTransformer",
    ),
    "trainer-last": ("gpt2", "{name: head, solver: trainer, pooling: last, layer: 1}", {}, "GPT2ForSequenceClassification"),
}


FAST = ("bert", "llama-last", "mlp-several")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS])
def test_a_run_ends_with_a_shorter_verified_classifier(recipe_of: Any, bodies: Any, name: str) -> None:
    family, strategy, rows, form = RUNS[name]
    loaded = recipe_of(family, f"strategy={strategy}", "training.load_best_model_at_end=false", **rows)
    report = run(loaded)
    result = report["result"]
    assert result["verified"]["loaded_with"] == form
    assert result["verified"]["max_difference"] <= 1e-4 * result["verified"]["max_logit"]
    assert (
        result["head"]["published"]["max_difference"] <= 1e-3 * result["verified"]["max_logit"]
    )  # the cached features are those of the saved model
    assert result["metrics_after"]["loss"] != result["metrics_before"]["loss"]
    folder = Path(result["artifact"])
    config = json.loads((folder / "config.json").read_text())
    depth = config.get("num_hidden_layers") or config.get("n_layer") or config.get("n_layers")
    assert depth == result["head"]["layer"]
    assert sorted(config["id2label"].values()) == ["cat", "dog", "fish"]
    if isinstance(loaded.recipe.strategy.layer, int):  # with auto the depth is unknown before the run
        made = TASKS["text-classification"].model.shapes(read_shapes(bodies(family)), read_config(bodies(family)), labels=3)
        assert made is not None
        footprint = strategies.build(loaded.recipe.strategy).describe(*made).footprint
        assert footprint == (result["trainable_parameters"], result["total_parameters"])


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.usefixtures("fresh_process")
def test_plain_sentence_transformers_says_the_same_of_texts(recipe_of: Any, family: str, tiny: Path) -> None:
    """`SentenceTransformer(folder).encode(texts)` gives the logits that the head was solved for; a changed head does not.

    The Llama has a chat template, which must not be put around the texts.
    """
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    other = [f"model.name_or_path={tiny}"] if family == "llama" else []
    loaded = recipe_of(family, "strategy={name: head, layer: 2, pooling: mean, l2: 0.1}", *other)
    folder = Path(run(loaded)["result"]["artifact"])
    job = job_of(recipe_of(family, "strategy={name: head, layer: 2, pooling: mean, l2: 0.1}", *other, f"output_dir={folder}-2"))
    job.trainer.train()
    rows = [json.loads(line) for line in Path(loaded.recipe.data.train[0].path).read_text().splitlines()]
    places = column(job.data.train, "row")[:5]
    wanted = job.trainer.model(features=job.train_data.train.features[:5]).logits.detach()
    texts = [rows[place]["text"] for place in places]
    said = torch.tensor(SentenceTransformer(str(folder), device="cpu").encode(texts))
    torch.testing.assert_close(said, wanted, rtol=1e-3, atol=1e-3)
    used, _, _ = artifact.load(str(folder))  # as hfstrat predict does
    label, chance = labels_of(used, job.data.renderer, texts[0], torch.float32)[0]
    assert label == job.data.label_names[int(wanted[0].argmax())]
    assert chance == pytest.approx(float(wanted[0].softmax(-1).max()), abs=1e-3)
    dense = folder / "2_Dense" / "model.safetensors"
    save_file({name: tensor + 0.05 for name, tensor in load_file(dense).items()}, dense)
    inputs = job.probe
    logits = verify.probe_logits(job.trainer.model, inputs)
    facts = {"inputs": inputs, "logits": logits, "dtype": "float32", "device": "cpu", "untrained": torch.zeros_like(logits)}
    changed = verify.probe_logits(sentence_transformers.load(str(folder)), inputs)
    assert (changed - logits).abs().max() > 1e-3 * logits.abs().max()
    if family == "bert":  # once, in a fresh process
        with pytest.raises(errors.RunError, match="does not match the trained model"):
            verify.verify(folder, facts, {"task": "text-classification"})


def test_features_are_kept_and_belong_to_what_they_were_made_of(recipe_of: Any, bodies: Any, tmp_path: Path) -> None:
    strategy = "strategy={name: head, pooling: mean}"

    def cached(*more: str, family: str = "bert") -> bool:
        facts = job_of(recipe_of(family, strategy, *more)).train_data.facts
        return bool(facts["head"]["features_from_cache"])

    assert not cached("data.max_length=40")
    assert cached("data.max_length=40")
    assert not cached("data.max_length=40", "strategy.layer=1")
    assert not cached("data.max_length=8")
    other = loaded_body(bodies("bert"))
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    for file in bodies("bert").glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    assert not cached("data.max_length=40", f"model.name_or_path={tmp_path / 'other'}")


def test_the_probe_finds_the_layer_that_knows() -> None:
    """Labels that can only be read at one layer, by one pooling."""
    from hfstrat.strategies.head import linear

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    noise = torch.randn(200, 8, generator=generator)
    knowing = noise + 4 * labels[:, None]
    targets = linear.targets_of(labels, 2)
    assert pooled.score(linear.leave_one_out(knowing, targets), targets) > 0.95
    assert pooled.score(linear.leave_one_out(noise, targets), targets) < 0.65
    assert pooled.candidate_layers(30, "auto")[-1] == 30
    assert len(pooled.candidate_layers(30, "auto")) == pooled.MOST_LAYERS
    assert pooled.candidate_layers(4, "auto") == [1, 2, 3, 4]
    assert pooled.candidate_layers(30, 7) == [7]
    table = [
        pooled.Candidate(2, "mean", 0.9),
        pooled.Candidate(1, "mean", 0.9),
        pooled.Candidate(3, "mean", 0.8),
    ]
    assert max(table, key=lambda each: (each.score, -each.layer)).layer == 1


def test_the_probe_finds_the_layer_that_knows_a_rare_class() -> None:
    """Where nearly all examples have one class, accuracy is about the same of a layer that knows the other and of noise."""
    from hfstrat.strategies.head import linear

    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(1000) % 50 == 0).long()
    noise = torch.randn(1000, 8, generator=generator)
    knowing = noise + 1.5 * labels[:, None] * torch.tensor([1.0, 1.0, *[0.0] * 6])
    targets = linear.targets_of(labels, 2)
    predicted = [linear.leave_one_out(features, targets) for features in (knowing, noise)]
    assert pooled.metric_of(targets, numbers=False) == "AUROC"
    assert pooled.score(predicted[0], targets) == pytest.approx(pooled.score(predicted[1], targets), abs=0.01)
    assert pooled.ranking_score(predicted[0], targets) > 0.85
    assert pooled.ranking_score(predicted[1], targets) < 0.65
    even = linear.targets_of(torch.arange(1000) % 3, 3)
    assert pooled.metric_of(even, numbers=False) == "accuracy"
    assert pooled.metric_of((torch.rand(100, 3) > 0.95).float(), numbers=False) == "accuracy"  # several labels: micro-F1


@pytest.mark.parametrize(
    ("family", "further"),
    [
        ("llama", "full"),
        ("llama", "{name: lora, r: 2}"),
        ("bert", "{name: partial, last_n_layers: 1}"),
        ("roberta", "full"),
    ],
)
def test_training_goes_on_from_the_solved_head(recipe_of: Any, family: str, further: str) -> None:
    """At step 0 the loss is that of the solved head, and the trainable parameters are those of the other strategy."""
    loaded = recipe_of(family, f"strategy={{name: head, layer: 2, l2: 0.1, then: {further}}}")
    job = job_of(loaded)
    before = job.trainer.evaluate()["eval_loss"]
    if family == "llama":
        alone = job_of(
            recipe_of(family, "strategy={name: head, layer: 2, l2: 0.1, pooling: last}", f"output_dir={job.folder}-2")
        )
        alone.trainer.train()
        solved = alone.trainer.evaluate()["eval_loss"]
        assert before == pytest.approx(solved, abs=1e-4)
    assert before != pytest.approx(1.0986, abs=1e-3)  # of a head that knows nothing
    learning, total = count_parameters(job.trainer.model)
    assert 0 < learning <= total
    assert job.base.model.config.num_hidden_layers == 2


@pytest.mark.slow
def test_a_whole_run_goes_on_from_the_solved_head(recipe_of: Any) -> None:
    result = run(recipe_of("llama", "strategy={name: head, layer: 2, then: {name: lora, r: 2}}"))["result"]
    assert result["verified"]["max_difference"] <= 1e-4 * result["verified"]["max_logit"]


def test_a_head_that_was_killed_goes_on_as_if_it_had_not_been(recipe_of: Any, tmp_path: Path) -> None:
    """Checkpoints hold the head alone, and a resumed run is the uninterrupted one, bit for bit."""
    from safetensors.torch import load_file

    given = [
        "strategy={name: head, head: mlp, hidden_size: 8, layer: 2, pooling: mean}",
        "training.load_best_model_at_end=false",
    ]
    whole = job_of(recipe_of("bert", *given))
    whole.trainer.train()
    checkpoint = whole.folder / "checkpoint-2"
    assert all(name.startswith("head.") for name in load_file(checkpoint / "model.safetensors"))
    resumed = job_of(recipe_of("bert", *given, f"output_dir={tmp_path / 'again'}"))
    resumed.trainer.train(resume_from_checkpoint=str(checkpoint))
    ours, theirs = resumed.trainer.model.state_dict(), whole.trainer.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("strategy", ["head", "{name: head, layer: 2, then: full}"])
def test_a_recipe_can_be_looked_at(recipe_of: Any, strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`hfstrat check` shows the trainable parameters without running the body."""
    check.show(recipe_of("llama", f"strategy={strategy}"), rows=1)
    assert "score" in capsys.readouterr().out


def test_ten_thousand_classes_are_not_solved_in_float64() -> None:
    assert not is_exact(Head(name="head"), 10_000 * 576, 10)
    assert is_exact(Head(name="head"), 77 * 576, 10)
    assert not is_exact(Head(name="head"), 77 * 576, 10**6)
    assert is_exact(Head(name="head", solver="exact"), 10_000 * 576, 10)


def test_an_lm_head_of_its_own(recipe: Any, models: Any, tmp_path: Path) -> None:
    """A tied model's head is untied: it alone changes, and plain transformers loads the result."""
    from transformers import AutoModelForCausalLM

    loaded = recipe(f"model={models(tied=True)}", FLOAT, "strategy={name: head, untie: true}")
    job, folder = job_of(loaded), tmp_path / "saved"
    first = job.trainer.evaluate()["eval_loss"]
    job.trainer.train()
    assert job.trainer.evaluate()["eval_loss"] < first
    job.strategy.finish(job.trainer.model, job.base)
    job.strategy.save(job.trainer, folder, job.base)
    counts = count_parameters(job.trainer.model)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    before = AutoModelForCausalLM.from_pretrained(models(tied=True))
    assert model.config.tie_word_embeddings is False
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    shapes = read_shapes(models(tied=True))
    assert strategies.build(loaded.recipe.strategy).describe(shapes, True).footprint == counts
    with pytest.raises(UserError, match="untie: true gives it a matrix of its own"):
        strategies.build(Head(name="head")).describe(shapes, True)


def test_an_untied_lm_head_learns_alone(recipe: Any, tiny: Path) -> None:
    job = job_of(recipe("strategy=head", FLOAT))
    assert [name for name, p in job.trainer.model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    assert isinstance(job.base, Base)
    assert language_head(job.base) is job.base.model


def test_several_linear_layers_become_several_modules() -> None:
    head = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU(), torch.nn.Linear(3, 2))
    assert [type(after).__name__ for _, after in sentence_transformers.layers_of(head)] == ["GELU", "Identity"]
