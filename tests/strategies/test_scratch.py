"""Training from scratch: predicted counts are true, held-out text is never seen, and the saved model is the trained one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, sentences, write_jsonl
from helpers.recipes import OWN
from helpers.runs import run
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from hfstrat import strategies
from hfstrat.data.formats import hash_text
from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED
from hfstrat.data.splits import held_out
from hfstrat.data.token_bytes import token_bytes
from hfstrat.errors import UserError
from hfstrat.models import families, random_init, transformers_source
from hfstrat.models.load import count_parameters, load_tokenizer
from hfstrat.recipe import section
from hfstrat.recipe.data import Data
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Model, Recipe
from hfstrat.recipe.strategies import Scratch
from hfstrat.tasks import TASKS
from hfstrat.trainer import baselines, callbacks

SIZES = [("150k", 320), ("1M", 2048), ("10M", 8192), ("10M", 50_257), ("160M", 50_304), ("7B", 32_000)]


def footprint_of(recipe: Recipe) -> Any:
    """The parameter counts of a recipe that passes the checks, as they are known without torch."""
    strategies.build(recipe.strategy).check(recipe, network=False)
    description = strategies.describe(recipe)
    return description and description.footprint


def meta(family: str, settings: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


@pytest.mark.parametrize("family", families.SHAPES)
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize(("wanted", "vocabulary"), SIZES)
def test_a_picked_size_is_counted_right_and_near(family: str, more: dict[str, Any], wanted: str, vocabulary: int) -> None:
    settings = random_init.pick(family, section.parse(wanted), vocabulary, 128, more)
    count = random_init.count_parameters(family, settings)
    assert abs(count / section.parse(wanted) - 1) <= 0.05
    width, depth = (settings[families.common_name(family, key)] for key in ("hidden_size", "num_hidden_layers"))
    assert 6 <= width / depth <= 300
    shapes = families.shapes_of(family, settings)
    assert shapes is not None
    assert sum(map(math.prod, shapes.values())) == count
    if section.parse(wanted) <= 10**7:
        made = meta(family, settings)
        assert {name: tuple(p.shape) for name, p in made.named_parameters()} == shapes
        assert count_parameters(made) == (count, count)


@pytest.mark.parametrize(
    "given",
    [
        {"num_hidden_layers": 8},
        {"num_attention_heads": 3},
        {"hidden_size": 192, "num_key_value_heads": 2},
        {"intermediate_size": 999},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_is_given_stays(given: dict[str, int]) -> None:
    settings = random_init.pick("llama", 3_000_000, 4096, 128, given)
    assert given.items() <= settings.items()
    assert abs(random_init.count_parameters("llama", settings) / 3e6 - 1) <= 0.05
    assert settings["hidden_size"] % settings["num_attention_heads"] == 0


ODD: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    "mistral": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"attention_bias": True, "num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {"n_inner": 48},
}


@pytest.mark.parametrize("family", families.SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_of_transformers(family: str, tied: bool) -> None:
    common = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99, "intermediate_size": 80}
    given = {**{k: v for k, v in common.items() if k != "intermediate_size" or family != "gpt2"}, **ODD[family]}
    settings = families.canonical(family, given | {"tie_word_embeddings": tied})
    made = meta(family, settings)
    assert families.shapes_of(family, settings) == {name: tuple(p.shape) for name, p in made.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_picked_classifier_has_its_shapes(family: str) -> None:
    settings = random_init.pick(family, 200_000, 400, 64, {})
    shapes = families.shapes_of(family, settings)
    assert shapes is not None
    config = {**transformers_source.config_keys(family), **settings, "model_type": family}
    config["architectures"] = [] if family == "bert" else ["ForCausalLM"]
    found = TASKS["text-classification"].model.shapes(shapes, config, 5)
    with torch.device("meta"):
        made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **settings, num_labels=5))
    assert found == ({name: tuple(p.shape) for name, p in made.named_parameters()}, False)


TEXT = "".join(f"{line.capitalize()}.\n" + ("\n" if n % 7 == 0 else "") for n, line in enumerate(sentences(900, seed=3)))


@pytest.fixture
def scratch(tmp_path: Path) -> Callable[..., Any]:
    """`scratch("a.b=c")` loads a small recipe for plain text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "strategy: {name: scratch, parameters: 60k, tokenizer: {vocab_size: 300}}\n"
        f"data: {{train: {tmp_path / 'text.txt'}, documents: files, overflow: split, max_length: 48, eval_size: 0.1}}\n"
        "training: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 8, eval_steps: 2, logging_steps: 1}\n"
        f"model: {{dtype: float32}}\nevaluation: {{samples: 1, max_new_tokens: 4}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    return lambda *overrides: load_recipe(str(file), list(overrides))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
def test_a_run_from_nothing(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """The artifact is an ordinary model; the report has the baselines; a resumed run is the same run, bit for bit."""
    report = run(scratch())
    assert report is not None
    result = report["result"]
    assert result["verified"]["bit_equal"]
    assert result["verified"]["loaded_with"] == "LlamaForCausalLM"
    assert abs(result["metrics_before"]["loss"] - math.log(300)) < 0.2
    assert result["baselines"]["uniform"] == math.log(300)
    assert 0 < result["baselines"]["unigram"] < math.log(300)
    assert 0 < result["metrics_after"]["bits_per_byte"] < result["metrics_before"]["bits_per_byte"]
    assert report["environment"]["model_sha256"] is None
    final = tmp_path / "run" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    footprint = footprint_of(scratch().recipe)
    assert footprint == (result["trainable_parameters"], result["total_parameters"])

    run(
        scratch(
            "training.max_steps=4",
            f"output_dir={tmp_path / 'again'}",
            f"training.resume_from_checkpoint={tmp_path / 'run/checkpoint-2'}",
        )
    )
    first, again = weights(final), weights(tmp_path / "again" / "final")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_text_in_files_is_read_without_loss(scratch: Callable[..., Any]) -> None:
    """Every character is in train or in eval, once, in order."""
    recipe = scratch().recipe
    tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
    data = prepare(recipe.data, tokenizer, 1, 1, held_out=held_out(recipe, TASKS[recipe.task].rows.reader))

    def whole(rows: Any) -> str:
        ordered = sorted(range(len(rows)), key=lambda n: rows["row"][n])
        ids = [rows[n]["input_ids"][min(i, 1) :] for i, n in enumerate(ordered)]
        return str(tokenizer.decode([token for piece in ids for token in piece], skip_special_tokens=True))

    train = whole(data.train)
    assert TEXT.startswith(train)
    assert TEXT[len(train)] != "\n" or TEXT[len(train) - 1] == "\n"
    held = sorted(data.eval["input_ids"], key=len)
    assert abs(len(train) / len(TEXT) - 0.9) < 0.01
    assert held[-1]
    assert data.statistics["train"].supervised + data.statistics["eval"].supervised == len(tokenizer(train)["input_ids"]) + len(
        tokenizer(TEXT[len(train) :])["input_ids"]
    )  # all but the first token of each part, and an end token each
    assert data.samples[0]["prompt"] + data.samples[0]["reference"] in TEXT[len(train) :]
    assert data.renderer.prompt_ids("the cat") == tokenizer("the cat")["input_ids"]


def rows_of(tmp_path: Path, **data: Any) -> Recipe:
    said = sentences(400, seed=5)
    rows = [{"text": f"{text} word{n}zq" * (1 + n % 3)} for n, text in enumerate(said)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    return Recipe.model_validate(
        {
            "strategy": {"name": "scratch", "parameters": "60k", "tokenizer": {"vocab_size": 320}},
            "data": {"train": str(file), "max_length": 16, "overflow": "split", "eval_size": 0.2, **data},
            "output_dir": str(tmp_path / "run"),
        }
    )


def test_a_tokenizer_sees_no_row_that_is_held_out(tmp_path: Path) -> None:
    """Other words in the held-out rows change nothing, other words in the training rows do."""
    from hfstrat.data.splits import open_corpus
    from hfstrat.tasks import TASKS

    recipe = rows_of(tmp_path)
    corpus = open_corpus(recipe, TASKS[recipe.task].rows.reader)
    assert corpus.held_out is not None
    texts = list(corpus.texts())
    assert not {hash_text(text) for text in texts} & set(corpus.held_out.tolist())
    data = prepare(
        recipe.data,
        strategies.build(recipe.strategy).load_tokenizer(recipe),
        recipe.seed,
        held_out=held_out(recipe, TASKS[recipe.task].rows.reader),
    )
    total = 400
    assert len(set(data.train["row"])) + len(set(data.eval["row"])) == total
    assert len(set(data.train["row"])) == len(texts)
    assert not set(data.train["row"]) & set(data.eval["row"])


ODD_TEXTS = ["", " ", "\n\n\t x  y ", "naïve café — 你好 🙂‍↔️ \x00\x7f", "a<|endoftext|>b", "'s 'T 1234567", "\u200b\ufeff"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
def test_a_tokenizer_comes_back_byte_for_byte(tmp_path: Path, family: str) -> None:
    """Also after it was saved next to a model of a family that has a tokenizer class of its own."""
    recipe = rows_of(tmp_path)
    tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
    AutoConfig.for_model(family).save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in [*ODD_TEXTS, TEXT]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == text
    assert (again.eos_token, again.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_a_tokenizer_is_the_same_each_time_and_another_for_other_bytes_or_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vocabulary(recipe: Recipe) -> dict[str, int]:
        return strategies.build(recipe.strategy).load_tokenizer(recipe).get_vocab()

    recipe = rows_of(tmp_path)
    first = vocabulary(recipe)
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path / "cache"))  # trained anew
    assert vocabulary(recipe) == first
    assert vocabulary(recipe) == first  # out of the cache
    options = {"vocab_size": 310, "special_tokens": ["<a>"]}
    other = Scratch.model_validate({"name": "scratch", "parameters": "60k", "tokenizer": options})
    special = recipe.model_copy(update={"strategy": other})
    assert vocabulary(special)["<a>"] == 2
    file = Path(recipe.data.train[0].path)
    file.write_text(file.read_text().replace("cat", "qat"))
    assert vocabulary(recipe) != first


def test_turns_get_a_chat_template(rows: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "strategy": {"name": "scratch", "parameters": "60k", "tokenizer": {"vocab_size": 300}},
            "data": {"train": str(rows), "eval_size": 12},
            "output_dir": str(tmp_path),
        }
    )
    tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
    assert tokenizer.eos_token == "<|im_end|>"
    data = prepare(recipe.data, tokenizer, recipe.seed, held_out=held_out(recipe, TASKS[recipe.task].rows.reader))
    assert data.statistics["train"].template == "chat"
    row = data.train[0]
    learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert "<|im_end|>" in tokenizer.decode(learnt)


def test_too_large_a_vocabulary_is_refused_with_what_there_is(tmp_path: Path) -> None:
    recipe = rows_of(tmp_path)
    large = recipe.model_copy(
        update={"strategy": Scratch.model_validate({"name": "scratch", "tokenizer": {"vocab_size": 9000}})}
    )
    with pytest.raises(UserError, match=r"yield at most [\d,]+ tokens"):
        strategies.build(large.strategy).load_tokenizer(large)


def test_the_unigram_bar_and_bits_per_byte_against_a_slow_count(tmp_path: Path) -> None:
    recipe = rows_of(tmp_path)
    tokenizer = strategies.build(recipe.strategy).load_tokenizer(recipe)
    data = prepare(recipe.data, tokenizer, recipe.seed, held_out=held_out(recipe, TASKS[recipe.task].rows.reader))
    size = len(tokenizer)
    counts = [1.0] * size
    for labels in data.train["labels"]:
        for token in labels:
            if token != IGNORED:
                counts[token] += 1
    nats, tokens, text = 0.0, 0, 0
    for labels in data.eval["labels"]:
        kept = [token for token in labels if token != IGNORED]
        nats -= sum(math.log(counts[token] / sum(counts)) for token in kept)
        tokens += len(kept)
        text += len(tokenizer.decode(kept, skip_special_tokens=True).encode())
    train, held = baselines.token_counts(data.train, size), baselines.token_counts(data.eval, size)
    assert baselines.unigram(train, held) == pytest.approx(nats / tokens, rel=1e-12)
    found = token_bytes(tokenizer)
    assert found is not None
    size = baselines.row_bytes(data.eval, found).sum()
    assert baselines.bits_per_byte(nats / tokens, int(held.sum()), size) == pytest.approx(nats / math.log(2) / text, rel=1e-12)


def test_bytes_of_tokens_are_those_of_their_text(tiny: Path) -> None:
    for tokenizer in (load_tokenizer(Model(name_or_path=str(tiny))),):
        found = token_bytes(tokenizer)
        assert found is not None
        for text in (*ODD_TEXTS[:4], TEXT[:2000]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert found.sizes[np.asarray(ids, dtype=int)].sum() == len(text.encode())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_decay_is_for_matrices_only(tmp_path: Path, family: str) -> None:
    settings = random_init.pick(family, 60_000, 320, 32, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed - {"lm_head.weight"} == {name for name, p in model.named_parameters() if p.dim() == 2}


def test_the_defaults_are_said_and_give_way(scratch: Callable[..., Any]) -> None:
    loaded = scratch()
    training = loaded.recipe.training
    assert (training.learning_rate, training.weight_decay, training.extra) == (1e-3, 0.1, {"adam_beta2": 0.95})
    assert "GPT-3" in loaded.origin(("training", "weight_decay"))
    given = scratch("training.weight_decay=0.0", "training.extra={adam_beta2: 0.9, adam_beta1: 0.8}").recipe.training
    assert (given.weight_decay, given.extra) == (0.0, {"adam_beta2": 0.9, "adam_beta1": 0.8})


def test_overfitting_is_when_evaluation_rises_while_training_falls() -> None:
    def log(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        entries: list[dict[str, float]] = [{"step": 0, "eval_loss": 9.0}]
        for step, (train, held) in enumerate(pairs, 1):
            entries += [
                {"step": step, "loss": train + 0.1},
                {"step": step, "loss": train - 0.1},
                {"step": step, "eval_loss": held},
            ]
        return entries

    assert callbacks.overfitting(log((3, 3), (2, 2.5), (1, 2.4))) == []
    assert [found["step"] for found in callbacks.overfitting(log((3, 3), (2, 2.5), (1, 2.6), (0.5, 2.7)))] == [3, 4]
    rising = log((3, 3), (2, 2.5), (1, 2.6), (0.5, 2.7))
    assert [found["step"] for found in callbacks.overfitting(rising, {"3": 0.2, "4": 0.05})] == [4]  # 3: within its interval
    assert callbacks.overfitting(log((2, 2), (2.5, 2.5))) == []  # both rise: diverging, not overfitting


@pytest.mark.parametrize(
    ("tokens", "epochs", "alarms"), [(30_000_000, 2, 0), (1_000_000, 2, 1), (1_000_000, 30, 1), (10, 9, 2)]
)
def test_alarms(tokens: int, epochs: float, alarms: int) -> None:
    found = baselines.Baselines(8.0, 5.0, 2.0, 1_000_000, tokens, tokens, epochs).lines()
    assert sum(line.startswith("warning") for line in found) == alarms
    assert all("arXiv" in line for line in found if line.startswith("warning"))


def base_of(recipe: dict[str, Any], **strategy: Any) -> Any:
    made = Recipe.model_validate({"data": "x", "output_dir": "x", **recipe, "strategy": {"name": "scratch", **strategy}})
    tokenizer = strategies.build(made.strategy).load_tokenizer(made)
    torch.manual_seed(0)
    return made, strategies.build(made.strategy).load(made, tokenizer, None)


def test_the_config_of_a_model_without_its_weights(tiny: Path) -> None:
    recipe, base = base_of({"model": str(tiny)}, config={"num_hidden_layers": 1})
    real = AutoModelForCausalLM.from_pretrained(tiny)
    assert base.model.config.num_hidden_layers == 1
    assert base.model.config.hidden_size == real.config.hidden_size
    assert not torch.equal(base.model.get_input_embeddings().weight, real.get_input_embeddings().weight)
    assert footprint_of(recipe) == count_parameters(base.model)
    recipe, base = base_of({"model": {"name_or_path": str(tiny / "config.json"), "tokenizer": str(tiny)}})
    assert footprint_of(recipe) == count_parameters(base.model)
    assert footprint_of(recipe) == count_parameters(real)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_family_with_a_tokenizer_of_another_model(tiny: Path, family: str) -> None:
    sized = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe, base = base_of({"model": {"tokenizer": str(tiny)}}, model_type=family, config=sized)
    assert base.model.config.vocab_size == len(load_tokenizer(recipe.model))
    assert base.model.get_input_embeddings().padding_idx is None  # the end token is its padding token, and has to learn
    footprint = footprint_of(recipe)
    assert footprint == (count_parameters(base.model) if family in families.SHAPES else None)


def test_a_class_of_ones_own(scratch: Callable[..., Any], tmp_path: Path) -> None:
    """It trains, and its result is checked too, with the code that is saved next to it."""
    (tmp_path / "bag_of_words.py").write_text(OWN)
    own = f"model_class: '{tmp_path / 'bag_of_words.py'}:Bag', config: {{width: 16}}, tokenizer: {{vocab_size: 300}}"
    report = run(scratch(f"strategy={{name: scratch, {own}}}"))
    assert report is not None
    assert report["result"]["reload"] == {"trust_remote_code": True}
    assert report["result"]["verified"]["bit_equal"]
    assert report["result"]["total_parameters"] == 300 * 16 * 2 + 300
    assert (tmp_path / "run" / "final" / "bag_of_words.py").is_file()
    from hfstrat.tasks import artifact

    model, _, _ = artifact.load(str(tmp_path / "run"))
    assert type(model).__name__ == "Bag"


def test_files_as_documents_need_text(tiny: Path, rows: Path) -> None:
    with pytest.raises(UserError, match=r"data.documents: .*needs .txt files"):
        prepare(
            Data.model_validate({"train": str(rows), "documents": "files"}), load_tokenizer(Model(name_or_path=str(tiny))), 1
        )


def test_a_norm_by_any_name_is_not_decayed() -> None:
    from hfstrat.trainer.trainer import StrategyTrainer

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4,), (4, 4)))

    trainer = StrategyTrainer.__new__(StrategyTrainer)
    assert trainer.get_decay_parameter_names(Own()) == ["matrix"]


def test_tokens_of_repeated_rows_are_counted_once_and_seen_as_often() -> None:
    from types import SimpleNamespace

    from datasets import Dataset

    rows = [{"input_ids": [1, 3, 4], "labels": [-100, 3, 4]}, {"input_ids": [1, 5, 2], "labels": [-100, 5, -100]}]
    table = Dataset.from_list(rows)
    train = table.select([0, 1, 0, 0])
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(8, 2), parameters=lambda: [torch.zeros(7)])
    plan = SimpleNamespace(steps=4, epochs=2.0, rows=3)
    data = SimpleNamespace(stream=None, train=train, eval=table, renderer=SimpleNamespace(tokenizer=make_tokenizer()))
    found = baselines.measure(data, plan, model)  # type: ignore[arg-type]
    assert (found.unique_tokens, found.epoch_tokens) == (3, 7)
    assert "0.43 unique training tokens per parameter (3 tokens, 7 parameters), 4.7 epochs" in found.supply()[0]
