"""Advice for vision-language models: parameters, tokens and positions are those of the run, and the tower stores what is
added up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.vision_language import FAMILIES, config_of, conversations, image_pairs, loaded, make_vision_language, tokenizer_of

from hfstrat import strategies
from hfstrat.advisor import architecture, decide, memory, pictures, recipes, towers
from hfstrat.advisor.data import Survey
from hfstrat.advisor.decide import Situation
from hfstrat.advisor.file_survey import survey_image_texts
from hfstrat.advisor.hardware import Device
from hfstrat.advisor.speed import ASSUMED, Rate, Work
from hfstrat.cli.advise import Request, advise
from hfstrat.errors import UserError
from hfstrat.models.blocks import evaluating
from hfstrat.models.vision_parts import VISION, module_of
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.tasks import TASKS

NAME = "image-text-to-text"
TASK = TASKS[NAME]
CPU = Device("a CPU", 16.0 * 2**30, is_cpu=True)
TRAINED: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "all": {"name": "full", "freeze": []},
    "projector": {"name": "full", "freeze": ["vision", "language"]},
    "lora": {"name": "lora"},
    "lora everywhere": {"name": "lora", "freeze": []},
    "partial": {"name": "partial", "last_n_layers": 1},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("vision-language")

    def model(family: str) -> Path:
        return root / family if (root / family).exists() else make_vision_language(root / family, family)

    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("rows"))


def recipe_of(model: Path, rows: Path, output: Path, strategy: dict[str, Any], **training: Any) -> Recipe:
    given = {"task": NAME, "model": str(model), "strategy": strategy, "data": {"train": str(rows)}, "training": training}
    return load_recipe("recipe.yaml", [], yaml.safe_dump({**given, "output_dir": str(output)})).recipe


def surveyed(model: Path, recipe: Recipe) -> tuple[architecture.Model, Survey]:
    found = towers.read(architecture.read(str(model)))
    return found, survey_image_texts(recipe.data, TASK, found, recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_of_each_strategy_are_those_of_the_model_that_is_trained(
    family: str, make: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    first = recipe_of(make(family), rows, tmp_path / "run", TRAINED["full"])
    strategy = strategies.build(first.strategy)
    processor, data = strategy.read(first)
    for section in TRAINED.values():
        recipe = recipe_of(make(family), rows, tmp_path / "run", section)
        strategy = strategies.build(recipe.strategy)
        built = strategy.build_model(strategy.load(recipe, processor, data))
        footprint = recipes.candidate_of(recipe)[0].footprint
        unique = {id(p): p for p in built.parameters()}.values()
        assert footprint.trainable == sum(p.numel() for p in unique if p.requires_grad), section
        assert footprint.total == sum(p.numel() for p in unique), section


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_positions_are_those_of_the_run(
    family: str, make: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(make(family), rows, tmp_path / "run", TRAINED["full"])
    found = surveyed(make(family), recipe)[1]
    strategy = strategies.build(recipe.strategy)
    processor, data = strategy.read(recipe)
    everything = np.concatenate([data.lengths, np.asarray(data.eval["length"][:])])
    assert sorted(found.lengths) == sorted(everything)
    assert found.max_length == -(-int(everything.max()) // 16) * 16
    assert found.pictures is not None
    assert found.pictures.tokens.sum() == sum(sum(rows["image_tokens"][:]) for rows in (data.train, data.eval))
    row = dict(data.train[int(data.counts["image_tokens"].argmax())])
    passed, base = list[int](), strategy.load(recipe, processor, data)
    tower = module_of(base.model, VISION)
    assert tower is not None

    def keep(module: Any, given: Any) -> None:
        passed.append(given[0].shape[:-1].numel() if given[0].dim() == 3 else given[0].shape[0])

    with evaluating(base.model), _first_block(tower[1]).register_forward_pre_hook(keep), torch.no_grad():
        base.model(**TASK.rows.inputs_of(data, row, 0))
    predicted = found.pictures.numbers.max() / found.pictures.patch
    tiles = 0.25 if family in ("llava_next", "llava_onevision") else 0  # those that pad a batch are not run
    assert 0.93 * sum(passed) <= predicted <= (1.01 + tiles) * sum(passed), "a class token for each image is not counted"


def _first_block(tower: Any) -> Any:
    stacks = [module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))[0]


DEEPER = {"qwen2_5_vl": "depth", "qwen3_vl": "depth"}  # others: num_hidden_layers


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_a_trained_tower_stores_what_is_added_up(family: str, make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    from test_advice_for_files import stored
    from transformers import AutoModelForImageTextToText

    recipe = recipe_of(make(family), rows, tmp_path / "run", TRAINED["all"])
    strategy = strategies.build(recipe.strategy)
    _, data = strategy.read(recipe)
    row = dict(data.train[int(data.counts["image_tokens"].argmax())])
    sizes = list[int]()
    for layers in (3, 4):
        config = config_of(family, tokenizer_of(family))
        setattr(config.vision_config, DEEPER.get(family, "num_hidden_layers"), layers)
        model = AutoModelForImageTextToText.from_config(config).train()
        sizes.append(stored(model, TASK.rows.inputs_of(data, row, 0)))
    seen, found = surveyed(make(family), recipe)
    assert found.pictures is not None
    assert seen.tower is not None
    description = recipes.candidate_of(recipe)[0].description
    one = replace(seen, tower=replace(seen.tower, layers=1))
    patches = found.pictures.numbers.max() / found.pictures.patch
    ours = towers.stored(one, description, 4, patches, 0)
    assert ours == pytest.approx(sizes[1] - sizes[0], rel=0.3)


def test_where_a_gradient_passes(make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    """A trained projector needs a backward pass through all blocks, and a frozen tower none through its own."""

    def of(name: str) -> tuple[architecture.Model, Any]:
        candidate = recipes.candidate_of(recipe_of(make("llava"), rows, tmp_path / "run", TRAINED[name]))[0]
        return candidate.model, candidate.description

    live = {name: len(architecture.live_blocks(*of(name))) for name in TRAINED}
    assert live == {**dict.fromkeys(TRAINED, 2), "partial": 1}
    passes = {name for name in TRAINED if towers.block_of(*of(name)) is not None}
    assert passes == {"all", "lora everywhere"}
    assert [towers.caches(*of(name), epochs=2) for name in ("full", "lora", "all")] == [True, True, False]
    assert not towers.caches(*of("full"), epochs=1)
    assert not architecture.trains_input(of("projector")[1])


def test_training_more_takes_more_memory_and_time(make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    def of(name: str, epochs: float) -> tuple[float, Work]:
        recipe = recipe_of(make("gemma3"), rows, tmp_path / "run", TRAINED[name], per_device_train_batch_size=4)
        candidate, survey = recipes.candidate_of(recipe)
        found = recipes.predict_one(recipe, Rate(ASSUMED, ""))[0]
        return float(found["memory_bytes"]), decide.work_of(candidate, survey, False, epochs)

    (frozen, once), (everything, whole) = of("full", 1), of("all", 1)
    assert frozen < everything
    assert once.training < whole.training
    _, cached = of("full", 3)
    assert cached.training < once.training, "the features of a frozen tower are computed once"
    assert cached.once == pytest.approx(once.training - cached.training)
    assert of("all", 3)[1] == whole


def test_a_tower_runs_in_each_step_where_nothing_is_computed_once(
    make: Callable[[str], Path], rows: Path, tmp_path: Path
) -> None:
    def work(section: dict[str, Any], *overrides: str) -> Work:
        given = {"task": NAME, "model": str(make("llava")), "strategy": section, "data": {"train": str(rows)}}
        recipe = load_recipe("r.yaml", list(overrides), yaml.safe_dump({**given, "output_dir": str(tmp_path / "run")})).recipe
        candidate, survey = recipes.candidate_of(recipe)
        return decide.work_of(candidate, survey, False, 6)

    cached, each = work(TRAINED["lora"]), work(TRAINED["lora"], "image.precompute=false")
    assert cached.once > 0 == each.once
    assert each.training > cached.training
    hidden = work(TRAINED["partial"])
    assert hidden.caches
    assert hidden.once > cached.once, "of the blocks below too"
    never = work({**TRAINED["partial"], "precompute": False})
    assert never.once == 0
    assert never.training > hidden.training


def test_configs_without_the_defaults_of_their_family_are_read(make: Callable[[str], Path], tmp_path: Path) -> None:
    """As those on the Hub are."""
    import shutil

    for family in ("llava", "gemma3", "idefics3"):
        folder = tmp_path / family
        shutil.copytree(make(family), folder)
        whole = json.loads((folder / "config.json").read_text())
        kept = {key: whole["text_config"][key] for key in ("model_type", "num_hidden_layers", "num_attention_heads")}
        (folder / "config.json").write_text(json.dumps({**whole, "text_config": kept}))
        found = towers.read(architecture.read(str(folder)))
        assert found.width > 1000, "the default of the family"
        assert found.vocabulary > 30_000
        assert found.layers == 2
        assert found.tower is not None


def test_the_longest_row_may_not_be_in_the_sample(
    make: Callable[[str], Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(make("llava"), rows, tmp_path / "run", TRAINED["full"])
    monkeypatch.setattr(pictures, "KEPT", 5)
    monkeypatch.setattr(pictures, "_seen", {})
    model, found = surveyed(make("llava"), recipe)
    assert len(found.lengths) == 5
    assert found.rows == 24
    assert found.max_length == model.context
    assert "tokens and images, from 5 of 24 rows" in found.estimated
    asked = survey_image_texts(recipe.data, TASK, model, recipe, proposes=False)
    assert asked.max_length == recipe.data.max_length, "a recipe is predicted as it is"


def test_pixels_and_patches_count(make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    candidate, survey = recipes.candidate_of(recipe_of(make("smolvlm"), rows, tmp_path / "run", TRAINED["all"]))
    shape = decide.shape_of(survey, (4, 4, 4), False, True, 4)
    assert shape.pixels == survey.pictures.numbers.max()  # type: ignore[union-attr]
    one = memory.Phases(candidate.model, candidate.description, shape, decide.ALONE)
    none = memory.Phases(candidate.model, candidate.description, replace(shape, pixels=0, image_tokens=0), decide.ALONE)
    assert one.base()["pixels"] == 4 * 4 * shape.pixels
    tower = candidate.model.tower
    assert tower is not None
    assert one.activations() - none.activations() > 4 * 4 * shape.pixels / survey.pictures.patch * tower.width  # type: ignore[union-attr]


def test_the_advice_writes_recipes_that_pass_the_checks(
    make: Callable[[str], Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = Request(str(make("qwen2_5_vl")), str(rows), device="cpu", measure="auto")
    advise(request, tmp_path / "out", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["task"] == NAME
    assert found["data"]["reading"] > 0
    able = {each["name"] for each in found["strategies"] if each["can"]}
    assert able == {"partial", "lora", "full"}
    assert all(each["time"]["seconds"] > 0 for each in found["strategies"] if each["can"])
    assert len(found["recipes"]) == 3
    written = [load_recipe(file).recipe for file in found["recipes"]]
    assert {each.task for each in written} == {NAME}
    advise(replace(request, overrides=("image.processor_kwargs={max_pixels: 256}",)), tmp_path / "small", as_json=True)
    smaller = json.loads(capsys.readouterr().out)
    assert smaller["data"]["tokens"] < found["data"]["tokens"]
    assert yaml.safe_load(Path(smaller["recipes"][0]).read_text())["image"] == {"processor_kwargs": {"max_pixels": 256}}


def test_nothing_is_claimed_about_quality(make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    model, found = surveyed(make("llava"), recipe_of(make("llava"), rows, tmp_path / "run", TRAINED["full"]))
    ranked = decide.decide(Situation(model, found, CPU, CPU.memory, rate=Rate(1e11, "a test")), ["full", "lora"]).ranked
    assert all(each.expected.value is None for each in ranked)
    assert "no runs of task image-text-to-text are known" in ranked[0].expected.basis


def test_what_cannot_be_predicted_is_refused_with_the_reason(make: Callable[[str], Path], rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(make("llava"), rows, tmp_path / "run", TRAINED["full"])
    model = architecture.read(str(make("llava")))
    with pytest.raises(UserError, match="the parts of the family mllama are not known"):
        towers.read(replace(model, whole={**model.whole, "model_type": "mllama"}))
    flat = {name: shape for name, shape in model.shapes.items() if "patch_embedding" not in name}
    with pytest.raises(UserError, match="no stack of equal blocks"):
        towers.read(replace(model, shapes=flat))
    pairs = image_pairs(tmp_path)
    preferences = load_recipe(
        "recipe.yaml",
        ["objective=dpo"],
        yaml.safe_dump(
            {
                "task": NAME,
                "model": str(make("llava")),
                "strategy": "lora",
                "data": {"train": str(pairs)},
                "output_dir": str(tmp_path / "run"),
            }
        ),
    ).recipe
    with pytest.raises(UserError, match="objective: dpo: memory and time of it with images are not predicted"):
        recipes.candidate_of(preferences)
    (rows.parent / "broken.png").write_bytes(b"no image")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "<image>What is it?", "completion": "a cat", "images": ["missing.png"]}\n')
    with pytest.raises(UserError, match=r"missing\.png"):
        survey_image_texts(
            recipe_of(make("llava"), bad, tmp_path / "run", TRAINED["full"]).data, TASK, towers.read(model), recipe
        )
    assert loaded(make("llava"), "llava") is not None
