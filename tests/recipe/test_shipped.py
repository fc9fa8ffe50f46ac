"""What comes with hfstrat works: every recipe loads and builds its arguments, from one copy, also out of the wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from hfstrat.recipe import library, stored, suggestions
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import STRATEGIES, Recipe
from hfstrat.trainer.plan import make_plan, training_arguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", library.names("recipes"))
def test_recipes_load_and_build_their_arguments(name: str, tmp_path: Path) -> None:
    file = library.find("recipes", name)
    assert library.title(file), "the first line says what it is for"
    assert len(file.read_text().splitlines()) <= 40
    recipe = load_recipe(str(file), [f"output_dir={tmp_path}"]).recipe
    plan = make_plan(recipe.training, [100] * 2000, [100] * 50, processes=1)
    args = training_arguments(recipe, plan, torch.bfloat16, evaluate_first=True, metric="loss", higher_is_better=False)
    assert args.learning_rate == recipe.training.learning_rate
    assert args.max_steps == plan.steps


@pytest.mark.parametrize("name", library.names("accelerate_configs"))
def test_accelerate_reads_the_configs(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = library.find("accelerate_configs", name)
    assert library.title(file), "the first line says when to pick it"
    load_config_from_file(str(file))
    assert "distributed_type" in yaml.safe_load(file.read_text())


@pytest.mark.slow
def test_the_wheel_holds_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for kind in ("recipes", "accelerate_configs"):
        for name in library.names(kind):
            assert f"hfstrat/_shipped/{kind}/{name}.yaml" in names
    for file in (ROOT / "hfstrat").rglob("*.py"):
        assert str(file.relative_to(ROOT)) in names


def test_no_strategy_is_asked_for_its_name_outside_strategies() -> None:
    for file in sorted((ROOT / "hfstrat").rglob("*.py")):
        if "strategies" not in file.parts:
            assert not re.search(r"strategy\.name\s*[!=]=|isinstance\([^)]*strategy", file.read_text()), file


def test_make_bench_runs_every_benchmark() -> None:
    """But those that need a GPU."""
    root = Path(__file__).parents[2]
    scripts = {file.stem for file in (root / "benchmarks").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")}
    target = (root / "Makefile").read_text(encoding="utf-8").partition("\nbench:")[2].partition("\n\n")[0]
    assert set(re.findall(r"-m benchmarks\.(\w+)", target)) == scripts - {"gpu", "gpu_cells"}


def test_stored_recipes_get_todays_names() -> None:
    """Reports and checkpoints of earlier versions; what is renamed exists under its new name, and not under the old one."""
    student = {"name": "lora", "alpha": 8, "dropout": 0.1, "init_lora_weights": "default"}
    old = {
        "strategy": {"name": "distill", "student": student, "level": "sequence", "cache": {"form": "hidden"}},
        "model": {"name_or_path": "a", "quantization": {"name": "nf4", "double_quant": False}},
        "data": {"train": "b", "columns": {"alpha": "prompt"}},
        "training": {"resume": "never", "packing": "on", "extra": {"resume": 1}},
        "hub": {"push": True, "repo": "me/x"},
        "evaluation": {"before": False},
        "output_dir": "o",
    }
    new = stored.upgraded(old)
    assert new["strategy"] == {
        "name": "distill",
        "student": {"name": "lora", "lora_alpha": 8, "lora_dropout": 0.1, "init_lora_weights": True},
        "seq_kd": True,
        "teacher_cache": {"form": "hidden"},
    }
    assert new["data"] == old["data"]
    assert new["training"] == {"resume_from_checkpoint": "never", "packing": True, "extra": {"resume": 1}}
    assert stored.upgraded(new) == new
    sections = suggestions.sections_of(Recipe)
    for name, names in stored.RENAMED.items():
        found = [cls for path, classes in sections.items() if path[-1:] == (name,) for cls in classes]
        for cls in [STRATEGIES[name]] if name in STRATEGIES else found:
            assert set(names.values()) <= set(cls.model_fields)
            assert not set(names) & set(cls.model_fields)
