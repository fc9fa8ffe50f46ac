"""`data.chat_template_kwargs` from the recipe to the result: the same in training, generation, printed code and the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TEMPLATE, write_jsonl
from helpers.runs import run

from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import generation
from hfstrat.tasks.artifact import load, resolve
from hfstrat.tasks.generation import How

OPTION = "{% if brief is defined and brief %}Be brief. {% endif %}" + TEMPLATE


def test_options_are_kept_with_the_result(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfstrat.cli import inference
    from hfstrat.publish import snippets

    template, recipe = tmp_path / "t.jinja", tmp_path / "recipe.yaml"
    template.write_text(OPTION)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"who sat {n}", "completion": "the cat"} for n in range(24)])
    recipe.write_text(
        f"model: {models()}\nstrategy: {{name: lora, r: 2}}\n"
        f"data: {{train: {rows}, template: {template}, chat_template_kwargs: {{brief: true}}}}\n"
        "training: {max_steps: 2, global_batch_size: 4}\nevaluation: {samples: 1, max_new_tokens: 2}\n"
        f"output_dir: {tmp_path / 'run'}\n"
    )
    run(load_recipe(str(recipe)))
    model, tokenizer, report = load(str(tmp_path / "run"), "recorded", spreads=True)
    assert report
    assert report.run.recipe.data.chat_template_kwargs == {"brief": True}
    renderer = generation.renderer_of(tokenizer, report, plain=False)
    assert tokenizer.decode(renderer.prompt_ids("who sat")).startswith("Be brief. <|im_start|>user\nwho sat")
    assert list(generation.in_batches(model, renderer, ["who"], How(1)))
    source, report = resolve(str(tmp_path / "run"))
    shown = "\n".join(snippets.show(str(tmp_path / "run")))
    assert 'return_tensors="pt", return_dict=True, brief=True,' in shown
    assert '"chat_template_kwargs": {"brief": true}' in shown
    assert "brief=True" in (Path(source) / "README.md").read_text()
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": [{"role": "user", "content": "who"}], "tools": "{"}])
    with pytest.raises(UserError, match=r"prompts.jsonl: row 1: 'tools' is not valid JSON"):
        inference.generate(str(tmp_path / "run"), [], prompts, None, How(1))


def test_options_are_checked_before_training(models: Callable[..., Path], tmp_path: Path) -> None:
    from hfstrat.run import preflight

    template, recipe = tmp_path / "t.jinja", tmp_path / "recipe.yaml"
    template.write_text(OPTION)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "who", "completion": "the cat"}] * 8)
    data = {"train": str(rows), "template": str(template), "chat_template_kwargs": {"breif": True}}
    recipe.write_text(
        json.dumps({"model": str(models()), "strategy": "lora", "data": data, "output_dir": str(tmp_path / "out")})
    )
    with pytest.raises(UserError, match=r"does not read 'breif'; did you mean brief\?"):
        preflight.check(load_recipe(str(recipe)), False)


def test_an_option_that_is_false_is_a_changed_recipe() -> None:
    from hfstrat.recipe.stored import compare

    before, now = {"data": {"chat_template_kwargs": {}}}, {"data": {"chat_template_kwargs": {"enable_thinking": False}}}
    assert compare(before, now) == ([], ["data.chat_template_kwargs.enable_thinking was None, is False"])
    assert compare({"data": {}}, before) == ([], [])
