"""`data.chat_template_kwargs` from the recipe to the result: the same in training, generation, printed code and the card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, write_jsonl
from helpers.runs import run
from helpers.trl_templates import NAMES, tokenizer_named, tokenizer_of
from transformers import AutoTokenizer

from hfstrat.data.chat_template import options_of, with_options
from hfstrat.errors import UserError
from hfstrat.recipe.load import load_recipe
from hfstrat.tasks import generation
from hfstrat.tasks.artifact import load, resolve
from hfstrat.tasks.generation import How

OPTION = "{% if brief is defined and brief %}Be brief. {% endif %}" + TEMPLATE


@pytest.mark.slow
def test_options_are_kept_with_the_result(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hfstrat.cli import inference
    from hfstrat.publish import export, merge, snippets

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
    if find_spec("gguf"):
        file = tmp_path / "x.gguf"
        export.export(str(tmp_path / "run"), file, "gguf")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "who sat"}], tokenize=False)
        assert rendered.startswith("Be brief. <|im_start|>user\nwho sat"), "Ollama passes no arguments"
    merge.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert "pass them to apply_chat_template: brief=True" in capsys.readouterr().out
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": [{"role": "user", "content": "who"}], "tools": "{"}])
    with pytest.raises(UserError, match=r"prompts.jsonl: row 1: 'tools' is not valid JSON"):
        inference.generate(str(tmp_path / "run"), [], prompts, None, How(1))


@pytest.mark.parametrize("name", sorted(name for name in NAMES if options_of(tokenizer_named(name).chat_template)))
def test_defaults_in_a_template_are_arguments(name: str) -> None:
    """A template with arguments as defaults renders as if it were given them, and can still be given others."""
    tokenizer = tokenizer_named(name)
    template, talk = tokenizer.chat_template, [{"role": "user", "content": "who sat"}]

    def rendered(template: str, **given: Any) -> str:
        given |= {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        try:
            return str(tokenizer.apply_chat_template(talk, **given))
        except Exception as error:  # the template's own refusal of a value
            return f"refused: {error}"

    for option, value in itertools.product(options_of(template), (True, False, "low")):
        assert rendered(with_options(template, {option: value})) == rendered(template, **{option: value})
        for other in (False, "medium"):
            assert rendered(with_options(template, {option: value}), **{option: other}) == rendered(template, **{option: other})


def test_defaults_of_a_template_are_values_of_json() -> None:
    value = {"a": [1, -2.5, None, True, 'it\'s "x"\n{{ 1 }} é'], "b": {}}
    shown = "{{ given | tojson }}"
    tokenizer = tokenizer_of(with_options(shown, {"given": value}))
    assert json.loads(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)) == value


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
