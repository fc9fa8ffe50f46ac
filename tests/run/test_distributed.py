"""Every strategy under every supported sharding: two processes train the weights that one trains."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import preferences
from helpers.classifiers import labeled, make_any, write_recipe
from helpers.distributed import in_world, same
from helpers.fsdp_on_cpu import FSDP2, ZERO
from helpers.runs import run
from helpers.vision_language import conversations, image_pairs, make_vision_language

from hfstrat.recipe.load import load_recipe

pytestmark = pytest.mark.slow
EXACT = ["model.dtype=float32", "data.eval_size=13", "training.per_device_train_batch_size=2"]
TEACHER = "teacher: {teacher}"
LM = {
    "lora": "{name: lora, r: 4}",
    "full": "full",
    "partial": "{name: partial, last_n_layers: 2, precompute: false, layer_decay: 0.5}",
    "scratch": "{name: scratch, config: {hidden_size: 32}}",
    "head": "{name: head}",
    "distill": "{name: distill, student: full, teacher: TEACHER, baseline: false, teacher_cache: {form: off}}",
    "distill_once": "{name: distill, student: full, teacher: TEACHER, baseline: false, teacher_cache: {form: hidden}}",
    "distill_own": "{name: distill, student: {name: lora, r: 4}, baseline: false, teacher_weight: 0.9, "
    "teacher_cache: {form: off}}",
    "precompute": "{name: partial, last_n_layers: 1, precompute: true}",
}
PREFERENCES = dict.fromkeys(("dpo", "orpo", "simpo", "kto"), "{name: lora, r: 4}")
PICTURES = {  # of a vision-language model, on rows of which some have no image
    "v_lora": "{name: lora, r: 2}",
    "v_dpo": "{name: full, freeze: []}",
}
CLASSES = {
    "c_full": "full",
    "c_lora": "{name: lora, r: 4}",
    "c_head": "{name: head, layer: 2, pooling: mean}",
    "c_head_auto": "{name: head, solver: trainer}",
    "c_then": "{name: head, layer: 2, then: partial}",
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, models: Callable[..., Path], rows: Path) -> Callable[..., Any]:
    """`make(name)` returns the recipe file and the overrides of a run, without its output_dir."""
    folder = tmp_path_factory.mktemp("recipes")
    lm, classes = folder / "lm.yaml", folder / "classes"
    lm.write_text(
        f"model: {models()}\nstrategy: {{name: lora, r: 4}}\ndata: {{train: {rows}, eval_size: 12, max_length: 128}}\n"
        "training: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2,\n"
        "  eval_steps: 2, logging_steps: 1}\nevaluation: {samples: 1, max_new_tokens: 4}\noutput_dir: out\n"
    )
    classes.mkdir()
    class_recipe = write_recipe(classes, make_any(folder / "body", "llama"), labeled(classes))

    chosen = {
        name: preferences.recipe_for(folder / name, models(), preferences.pairs(40), name, training={"eval_steps": 3})
        for name in ("dpo", "orpo", "simpo")
    }
    chosen["kto"] = preferences.recipe_for(folder / "kto", models(), preferences.labeled(40), "kto", training={"eval_steps": 3})

    seeing = make_vision_language(folder / "llava", "llava")
    task = {"task": "image-text-to-text", "training": {"eval_steps": 3}}
    pictures = preferences.recipe_for(folder / "pictures", seeing, [], "sft", **task)
    pairs = preferences.recipe_for(folder / "pairs", seeing, [], "dpo", **task)
    for made, write in ((pictures, conversations), (pairs, image_pairs)):
        shutil.copy(write(made.parent, 40), made.parent / "rows.jsonl")
    chosen |= dict.fromkeys(PICTURES, pictures) | {"v_dpo": pairs}

    def get(name: str, *more: str) -> tuple[str, list[str]]:
        section = {**LM, **CLASSES, **PREFERENCES, **PICTURES}[name].replace("TEACHER", str(models(tied=True)))
        cached = str(name == "v_lora").lower()
        own = ["data.max_length=256", f"image.precompute={cached}"] if name in PICTURES else []
        file = chosen.get(name, class_recipe if name in CLASSES else lm)
        return str(file), [f"strategy={section}", *EXACT, *own, *more]

    return get


@pytest.fixture(scope="module")
def alone(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """`alone(name)` returns the result and the folder of the run in one process, trained once per session."""
    from helpers.distributed_worker import leave, reload_here

    place, ended = tmp_path_factory.mktemp("alone"), {}

    def get(name: str) -> tuple[dict[str, Any], Path]:
        if name not in ended:
            file, overrides = make(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("hfstrat.tasks.verify.verify", reload_here)
                patch.setenv("HFSTRAT_CACHE", str(place / "cache"))
                report = run(load_recipe(file, [*overrides, f"output_dir={place / name}"]))
            leave()
            assert report is not None
            ended[name] = report["result"]
        return ended[name], place / name

    return get


def both(make: Any, alone: Any, names: list[str], tmp_path: Path, **environment: str) -> None:
    """Assert that runs in one process and in two are equal."""
    asked = []
    for name in names:
        file, overrides = make(name)
        asked.append({"name": name, "recipe": file, "overrides": [*overrides, f"output_dir={tmp_path / 'two' / name}"]})
    two = in_world(tmp_path, asked, HFSTRAT_CACHE=str(tmp_path / "cache"), **environment)
    differ = {}
    for name in names:
        one, folder = alone(name)
        try:
            assert one["best_step"] == two[name]["result"]["best_step"]  # c_lora's best is the one before training
            same(one, two[name]["result"], (folder, tmp_path / "two" / name))
        except AssertionError as error:
            differ[name] = str(error)
    assert not differ, "\n\n".join(f"{name}: {words}" for name, words in differ.items())
    for file in (tmp_path / "cache").glob("*.arrow"):
        if not file.name.startswith("rows-"):
            of_one = folder.parent / "cache" / file.name
            assert file.read_bytes() == of_one.read_bytes(), f"{file.name} is not as one made it"


def shares(folder: Path, name: str) -> list[int]:
    """The number of batches of cached work that each process computed."""
    return [int((folder / f"{name}.share{rank}").read_text()) for rank in (0, 1)]


def test_under_ddp_language_models(make: Any, alone: Any, tmp_path: Path) -> None:
    both(make, alone, list(LM), tmp_path)
    kinds = {file.name.split("-")[0] for file in (tmp_path / "cache").glob("*.arrow")}
    assert {"hidden_states", "teacher"} <= kinds
    for name in ("precompute", "distill_once"):
        mine, other = shares(tmp_path, name)
        assert 0 < other <= mine <= other + 3, "each computes its share"


def test_under_ddp_preferences_and_vision_language_models(make: Any, alone: Any, tmp_path: Path) -> None:
    """The latter from cached features; and with a trained tower and a reference, where a process may have no image."""
    both(make, alone, [*PREFERENCES, *PICTURES], tmp_path)
    kinds = {file.name.split("-")[0] for file in (tmp_path / "cache").glob("*.arrow")}
    assert {"vision_features", "reference"} <= kinds


def test_under_ddp_rewards(models: Any, tmp_path: Path) -> None:
    """Each process samples answers to its own prompts: all prompts of a step are answered, and evaluation is that of one."""
    rows = [{"prompt": row["prompt"]} for row in preferences.pairs(24)]
    objective = {"name": "grpo", "rewards": [{"name": "length", "max_length": 4}], "num_generations": 4}
    training = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 1}
    file = preferences.recipe_for(
        tmp_path / "rows", models(), rows, objective | {"max_completion_length": 8}, training=training, data={"eval_size": 5}
    )
    asked = [{"name": "grpo", "recipe": str(file), "overrides": [f"output_dir={tmp_path / 'two'}"]}]
    two = in_world(tmp_path, asked)["grpo"]["result"]
    one = run(load_recipe(str(file), [f"output_dir={tmp_path / 'one'}"]))
    assert one is not None
    assert two["metrics_before"] == pytest.approx(one["result"]["metrics_before"], abs=1e-6)
    # the same prompts, each answered four times; random weights seldom end an answer before its limit
    assert two["tokens"] == pytest.approx(one["result"]["tokens"], rel=0.05)
    sampled = [json.loads(line) for line in (tmp_path / "two" / "generations.jsonl").read_text().splitlines()]
    assert len({line["prompt"] for line in sampled if line["step"] == 1}) == 4


def test_under_ddp_classifiers(make: Any, alone: Any, tmp_path: Path) -> None:
    both(make, alone, list(CLASSES), tmp_path)
    assert list((tmp_path / "cache").glob("features-*.arrow"))
    assert shares(tmp_path, "c_head_auto")[0], "so few rows are one batch, which is the first process's"


SHARED = ["lora", "full", "partial", "scratch", "distill_once", "distill_own", "c_lora"]


def test_under_fsdp2(make: Any, alone: Any, tmp_path: Path) -> None:
    both(make, alone, SHARED, tmp_path, **FSDP2)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_under_deepspeed(make: Any, alone: Any, tmp_path: Path, stage: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed: DS_BUILD_OPS=0 pip install --no-build-isolation 'hfstrat[deepspeed]'")
    both(make, alone, SHARED, tmp_path, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage, **ZERO)


def test_sharded_checkpoints_resume_and_the_best_is_restored(make: Any, tmp_path: Path) -> None:
    """Stopped and resumed equals uninterrupted, and the result can be weights of an earlier step."""
    resumed(make, tmp_path, **FSDP2)


def test_zero3_checkpoints_resume(make: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    resumed(make, tmp_path, ACCELERATE_DEEPSPEED_ZERO_STAGE="3", **ZERO)


def resumed(make: Any, tmp_path: Path, **environment: str) -> None:
    runs = []
    for name in ("full", "lora"):
        file, overrides = make(
            name, "training.learning_rate=0.05", "training.max_steps=6"
        )  # a high learning rate, so that the best step is not the last
        for kind in ("whole", "broken", "broken_again"):
            folder = tmp_path / name / kind.removesuffix("_again")
            asked = {"name": f"{name}_{kind}", "recipe": file, "overrides": [*overrides, f"output_dir={folder}"]}
            runs.append(asked | ({"stop_at": 5, "ends": "interrupted"} if kind == "broken" else {}))
    ended = in_world(tmp_path, runs, **environment)
    for name in ("full", "lora"):
        whole, again = (ended[f"{name}_{kind}"]["result"] for kind in ("whole", "broken_again"))
        assert again["resumed_from"].endswith("checkpoint-4")
        assert whole["best_step"] == again["best_step"]
        same(
            {**whole, "losses": []},
            {**again, "losses": []},
            (tmp_path / name / "whole", tmp_path / name / "broken"),
            1e-6,
            1e-7,
        )
    shutil.rmtree(tmp_path / "full")


def test_what_cannot_be_sharded_is_refused(make: Any, tmp_path: Path) -> None:
    """Refused before training with the alternative; so is a wrapping that is not the requested one."""
    refused = {
        "head": ("{name: head}", "ddp, or strategy partial"),
        "hidden": (LM["distill"].replace("teacher_cache:", "hidden_states: {}, teacher_cache:"), "or remove hidden_states"),
        "on": ("{name: partial, last_n_layers: 1, precompute: true}", "set auto or false"),
    }
    file, overrides = make("lora", f"output_dir={tmp_path / 'run'}")
    teacher = make("distill")[1][0].split("teacher: ")[1].split(",")[0]
    runs = [
        {"name": n, "recipe": file, "overrides": [*overrides, f"strategy={s.replace('TEACHER', teacher)}"], "ends": "refused"}
        for n, (s, _) in refused.items()
    ]
    ended = in_world(tmp_path, runs, **FSDP2)
    for name, (_, words) in refused.items():
        assert words in ended[name]["sentence"]
    asked = {"name": "other", "recipe": file, "overrides": overrides, "ends": "refused"}
    ended = in_world(tmp_path, [asked], HFSTRAT_WRAPPING="fsdp", processes=2)
    assert "the model should be wrapped in FSDPModule, but it is a DistributedDataParallel" in ended["other"]["sentence"]
