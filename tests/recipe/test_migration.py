"""Configs of TRL, axolotl and LLaMA-Factory: their tables lead to real keys, no key is lost, and the recipe is valid."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.foreign_configs import CONFIGS
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from hfstrat.errors import UserError
from hfstrat.models.transformers_source import training_argument_names
from hfstrat.recipe import foreign, suggestions
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.migration.convert import NAMES, TOOLS, Migration, migrate
from hfstrat.recipe.migration.rules import UNSET
from hfstrat.run.preflight import DECIDED

Migrate = Callable[..., Migration]
ALL = [(name, key, rule) for name, tool in TOOLS.items() for key, rule in tool.rules.items()]


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Migrate:
    """`converted({...}, "trl")` migrates a config that has been written to a file."""
    monkeypatch.chdir(tmp_path)

    def get(config: dict[str, Any], name: str | None = None, *overrides: str, processes: int = 1) -> Migration:
        Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return migrate("config.yaml", name, processes, overrides)

    return get


# the tables


def test_every_target_is_a_key_of_a_recipe() -> None:
    for name, key, rule in ALL:
        for target in rule.targets:
            inner = target.removeprefix("training.extra.")
            if inner != target:
                assert inner in training_argument_names(), f"{name} {key}: {target}"
                assert inner not in DECIDED, f"{name} {key}: {target} is refused: {DECIDED[inner]}"
            else:
                assert suggestions.field_of(tuple(target.split(".")), {}) is not None, f"{name} {key}: {target}"


def test_every_key_without_a_target_has_a_reason() -> None:
    assert not [(name, key) for name, key, rule in ALL if not rule.targets and not rule.why]


def test_a_key_means_what_the_answer_to_it_in_a_recipe_says() -> None:
    """`foreign.py` answers a key of another tool in a recipe; both lead to the same place, where both know it."""
    for name, key, rule in ALL:
        if key in foreign.OURS and rule.convert is not None and rule.targets:
            assert rule.targets[0] == foreign.OURS[key], f"{name} {key}"


def fields_of(file: str) -> set[str]:
    """The fields of the dataclasses in a file of the installed TRL, which is not imported."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name != "DatasetConfig"]
    bodies = [statement for node in classes for statement in node.body]
    return {node.target.id for node in bodies if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}


@pytest.mark.parametrize(
    "file",
    [
        *(f"trainer/{name}_config.py" for name in ("base", "sft", "dpo", "kto", "grpo", "model")),
        *("experimental/orpo/orpo_config.py", "experimental/cpo/cpo_config.py", "scripts/utils.py"),
    ],
)
def test_every_field_of_the_installed_trl_has_a_rule(file: str) -> None:
    fields = fields_of(file)
    assert len(fields) > 3
    assert sorted(fields - set(TOOLS["trl"].rules)) == []


def test_every_field_of_the_installed_trainer_has_a_rule_for_llama_factory() -> None:
    assert not set(training_argument_names()) - set(TOOLS["llama-factory"].rules)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "dpo", "kto", "grpo"])
def test_defaults_that_are_written_are_those_of_the_installed_trl(converted: Migrate, trainer: str) -> None:
    import trl

    defaults = {
        field.name: field.default
        for field in dataclasses.fields(getattr(trl, f"{trainer.upper()}Config"))
        if field.default is not dataclasses.MISSING
    }
    config = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True, "reward_funcs": ["my.score"]}
    recipe = converted(config, f"trl-{trainer}").recipe
    assert recipe.training.learning_rate == defaults["learning_rate"]
    assert recipe.training.lr_scheduler_type == defaults["lr_scheduler_type"]
    assert recipe.training.warmup_steps == defaults["warmup_steps"]
    assert recipe.training.num_train_epochs == defaults["num_train_epochs"]
    model = {field.name: field.default for field in dataclasses.fields(trl.ModelConfig)}
    assert recipe.strategy.model_dump()["r"] == model["lora_r"]
    assert recipe.strategy.model_dump()["lora_alpha"] == model["lora_alpha"]
    dropout = model["lora_dropout"] if trainer == "sft" else 0.0  # the others are trained without, and refuse it
    assert recipe.strategy.model_dump()["lora_dropout"] == dropout
    if trainer == "grpo":
        per_step = defaults["per_device_train_batch_size"] * defaults["gradient_accumulation_steps"]
        assert recipe.training.global_batch_size == per_step // defaults["num_generations"]
        assert recipe.objective.model_dump()["max_completion_length"] == defaults["max_completion_length"]


AXOLOTL_SOURCE = """
class Lora(BaseModel):
    lora_r: int | None = None
    {lora}: int = 0
class AxolotlInputConfig(Lora, Other):
    base_model: str = Field(description="model")
    CONSTANT = 1
class TRLConfig(BaseModel):
    {trl}: float | None = None
class Inner(BaseModel):
    path: str
"""


@pytest.mark.parametrize(("lora", "trl", "lacking"), [("lora_alpha", "beta", ""), ("new_key", "newer", "new_key\ntrl.newer\n")])
def test_keys_of_a_release_are_compared_with_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lora: str, trl: str, lacking: str
) -> None:
    """The fields of the config, of its bases and of its sections; not those of classes that are values."""
    from scripts import foreign_keys

    file = tmp_path / "axolotl" / "utils" / "schemas" / "config.py"
    file.parent.mkdir(parents=True)
    file.write_text(AXOLOTL_SOURCE.format(lora=lora, trl=trl), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["foreign_keys.py", "axolotl", str(tmp_path)])
    assert foreign_keys.main() == bool(lacking)
    assert capsys.readouterr().out == lacking


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r".*\.(q_proj|v_proj)$", ["q_proj", "v_proj"]),
        (r"layers\.\d+\.self_attn\.(?:q|k)_proj", ["q_proj", "k_proj"]),
        (r".*self_attn.q_proj|.*mlp.up_proj", None),  # the end is that of one alternative
        (r"layers\.(self_attn\.q_proj|mlp\.up_proj)", None),
        (r".*", None),
    ],
)
def test_a_regular_expression_of_modules_gives_names_that_it_matches(
    converted: Migrate, pattern: str, names: list[str] | None
) -> None:
    done = converted(BASES["axolotl"] | {"adapter": "lora", "lora_target_modules": pattern}, "axolotl")
    assert done.recipe.strategy.model_dump()["target_modules"] == (names or "all-linear")
    for name in names or []:
        assert re.fullmatch(pattern, f"layers.0.self_attn.{name}")
    assert "lora_target_modules" in noted(done, "attention" if names else "missing")


@pytest.mark.parametrize("tool", ["trl", "axolotl"])
def test_a_step_of_grpo_counts_prompts(converted: Migrate, tool: str) -> None:
    """Their batches count answers, ours prompts."""
    keys = {"trl": "per_device_train_batch_size", "axolotl": "micro_batch_size"}
    config = BASES[tool] | {keys[tool]: 8, "gradient_accumulation_steps": 2}
    inner = {"num_generations": 4, "reward_funcs": ["rewards.f"]}
    done = converted(config | (inner if tool == "trl" else {"rl": "grpo", "trl": inner}), tool)
    assert done.recipe.training.global_batch_size == 8 * 2 // 4


# own samples


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_sample_becomes_this_recipe(converted: Migrate, name: str) -> None:
    """Each value that the sample is about arrives at its place; the text is the recipe, and no key is lost."""
    sample = CONFIGS[name]
    done = converted(sample.config, sample.tool)
    dumped = done.recipe.model_dump()
    for dotted, value in sample.expected.items():
        found: Any = dumped
        for part in dotted.split("."):
            found = found[part]
        assert found == value, dotted
    assert load_recipe("recipe.yaml", (), done.text).recipe == done.recipe
    for key, kind in sample.notes.items():
        assert kind in [note.kind for note in done.notes if note.key == key], (key, done.notes)


@pytest.mark.parametrize("name", [name for name, sample in CONFIGS.items() if sample.tool is None])
def test_the_tool_is_recognized(converted: Migrate, name: str) -> None:
    assert converted(CONFIGS[name].config).tool == CONFIGS[name].title


def test_a_number_of_processes_multiplies_the_batch(converted: Migrate) -> None:
    config = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "micro_batch_size": 2, "gradient_accumulation_steps": 3}
    assert converted(config, "axolotl").recipe.training.global_batch_size == 6
    done = converted(config, "axolotl", processes=8)
    assert done.recipe.training.global_batch_size == 48
    assert not [note for note in done.notes if note.key == "micro_batch_size" and note.kind == "attention"]


def test_data_sets_of_llama_factory_are_looked_up(converted: Migrate) -> None:
    """In dataset_info.json, with their files, columns and splits."""
    Path("data").mkdir()
    infos: dict[str, Any] = {
        "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "turns"}},
        "openai": {
            "hf_hub_url": "acme/openai",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog"},
            "split": "train_sft",
        },
        "tables": {"file_name": "t.jsonl", "columns": {"prompt": "q", "response": "a", "images": "i"}, "num_samples": 5},
    }
    infos["openai"] |= {"split": "train_sft", "tags": {"role_tag": "role", "content_tag": "content"}}
    Path("data/dataset_info.json").write_text(json.dumps(infos))
    done = converted(
        {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "dataset": "chats, openai,tables,x"}
    )
    assert done.recipe.model_dump()["data"]["train"] == [
        {"path": "data/chats.json", "columns": {"turns": "conversations"}},
        {"path": "acme/openai", "split": "train_sft", "columns": {"dialog": "messages"}},
        {"path": "data/t.jsonl", "columns": {"q": "instruction", "a": "output", "i": "images"}},
        "data/x.json",
    ]
    named = {note.key for note in done.notes}
    assert {"tables.num_samples", "dataset"} <= named
    assert (done.recipe.task, done.recipe.strategy.model_dump()["freeze"]) == ("image-text-to-text", ["vision", "projector"])
    infos = {"pairs": {"file_name": "p.json", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}}
    Path("data/dataset_info.json").write_text(json.dumps(infos))
    done = converted({"model_name_or_path": "m", "stage": "dpo", "finetuning_type": "lora", "dataset": "pairs"})
    assert done.recipe.data.train[0].columns == {"q": "prompt", "good": "chosen", "bad": "rejected"}


def test_a_schedule_that_is_not_offered_takes_its_options_along(converted: Migrate) -> None:
    config = {"model_name_or_path": "m", "dataset_name": "d", "lr_scheduler_type": "cosine_with_min_lr"}
    done = converted(config | {"lr_scheduler_kwargs": {"min_lr": 1e-6}}, "trl-sft")
    assert (done.recipe.training.lr_scheduler_type, done.recipe.training.extra) == ("cosine", {})
    assert {note.key for note in done.notes if note.kind == "missing"} == {"lr_scheduler_type", "lr_scheduler_kwargs"}


def test_overrides_win_and_fill_what_is_missing(converted: Migrate) -> None:
    with pytest.raises(UserError, match=r"does not name data.train; give it on the command line: hfstrat migrate .*rows.jsonl"):
        converted({"model_name_or_path": "m", "lora_r": 4}, "trl")
    done = converted({"model_name_or_path": "m", "lora_r": 4}, "trl", "data.train=mine.csv", "strategy.r=8", "seed=1")
    assert done.recipe.data.train[0].path == "mine.csv"
    assert (done.recipe.strategy.model_dump()["r"], done.recipe.seed) == (8, 1)
    with pytest.raises(UserError, match=r"command line: strategy\.r"):
        converted({"model_name_or_path": "m", "lora_r": 4}, "trl", "data.train=mine.csv", "strategy.r=-8")


def test_a_value_that_the_schema_refuses_is_left_out_and_named(converted: Migrate) -> None:
    done = converted({"model_name_or_path": "m", "dataset_name": "d", "weight_decay": -1, "seed": "x"}, "trl-sft")
    found = {note.key: note.text for note in done.notes if note.kind == "missing"}
    assert "left out: training.weight_decay = -1" in found["weight_decay"]
    assert "left out: seed" in found["seed"]
    assert done.recipe.training.weight_decay == 0.0


EXAMPLES = 400 if os.environ.get("HFSTRAT_FUZZ") else 25
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(-2, 2).map(lambda value: round(value, 6)),
    st.sampled_from(["", "auto", "no", "epoch", "steps", "none", "lora", "full", "a,b", "1e-4", "x: y", "a b\tc", "ü"]),
    st.lists(st.sampled_from(["q_proj", "a", 1]), max_size=2),
    st.dictionaries(st.sampled_from(["path", "stage", "a"]), st.integers(0, 3), max_size=2),
)


@pytest.mark.parametrize("name", list(TOOLS))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_becomes_a_valid_recipe_or_a_sentence(converted: Migrate, name: str, data: st.DataObject) -> None:
    """Of any keys with any values: never an exception of another kind, and each key arrives or is named."""
    model = {"trl": "model_name_or_path", "axolotl": "base_model", "llama-factory": "model_name_or_path"}[name]
    rows = {"trl": "dataset_name", "axolotl": "datasets", "llama-factory": "dataset"}[name]
    keys = st.sampled_from([*sorted(TOOLS[name].rules), "no_such_key"]).filter(lambda key: "." not in key)
    config = data.draw(st.dictionaries(keys, VALUES, max_size=12)) | {model: "m", rows: "d"}
    try:
        done = converted(config, name)
    except UserError as error:
        event(f"refused: {str(error)[:60]}")
        return
    assert load_recipe("recipe.yaml", (), done.text).recipe == done.recipe
    named = {note.key for note in done.notes}
    if config.get("no_such_key") is not None:
        assert "no_such_key" in named
    for key, value in config.items():
        rule = TOOLS[name].rules.get(key)
        if rule is not None and rule.convert is not None and value not in UNSET and key not in named:
            assert f"# {key}" in done.text or f"{key}:" in done.text, (key, value, done.text)


# files that are none


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("\n  \n", "the file is empty"),
        ("- a\n- b\n", "a config is a mapping of keys to values; this file holds a list"),
        ("just words", "a config is a mapping of keys to values"),
        ("a: [1, 2\nb: 3", "this is not valid YAML"),
        ("base_model: m\n\tmicro_batch_size: 1\n", "this is not valid YAML"),
        ("a: 1\na: 2\n", "given twice"),
        ("foo: 1\nbar: 2\n", "its keys (foo, bar) are of no format that is known"),
        ("strategy: lora\ndata: d\nmodel: m\n", "this is a recipe of hfstrat already"),
        ("base_model: m\nmicro_batch_size: 1\n", "does not name data.train"),
        ("x: " + "a" * 2**20, "characters; expected a config of at most"),
        ("stage: ppo\nfinetuning_type: lora\nmodel_name_or_path: m\n", "stage: ppo: not offered; expected one of sft, pt"),
        ("base_model: m\nadapter: llama-adapter\ndatasets: []\nmicro_batch_size: 1\n", "adapter: llama-adapter: not converted"),
        ("a: &a {b: *a}\n", "alias to itself"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as refused:
        migrate(str(file))
    assert says in str(refused.value)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00base", b"\x00\x01\x02"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError):
        migrate(str(file))


def test_a_folder_a_missing_file_and_an_unknown_tool_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match=str(path)):
            migrate(str(path))
    file = tmp_path / "a.yaml"
    file.write_text("a: 1")
    with pytest.raises(UserError, match="--from: unsloth: expected one of trl, axolotl, llama-factory"):
        migrate(str(file), "unsloth")


def test_json_is_read_too(tmp_path: Path) -> None:
    """The config that PEFT saves next to an adapter, with the rest on the command line."""
    file = tmp_path / "adapter_config.json"
    file.write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/base", "r": 4, "lora_alpha": 8, "bias": "none"})
    )
    done = migrate(str(file), None, 1, ("data.train=rows.jsonl",))
    assert (done.tool, done.recipe.model.name_or_path, done.recipe.strategy.model_dump()["r"]) == ("TRL", "acme/base", 4)


def test_the_names_of_tools_are_those_that_are_read(converted: Migrate) -> None:
    config = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["a.b"], "loss_type": "simpo", "cpo_alpha": 0.0}
    for name in NAMES:
        if name.startswith("trl-"):
            objective = converted(config, name).recipe.objective.name
            assert objective == {"cpo": "simpo"}.get(name.removeprefix("trl-"), name.removeprefix("trl-"))


# meanings that are easily lost


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"), [(0, 0.1, 0.1), (20, 0.1, 20), (None, 0.1, 0.1), (20, None, 20), (0, 0, 0)]
)
def test_warmup_steps_of_zero_leave_the_ratio(converted: Migrate, steps: Any, ratio: Any, expected: float) -> None:
    for name, base in BASES.items():
        done = converted(base | {"warmup_ratio": ratio, "warmup_steps": steps}, name)
        assert done.recipe.training.warmup_steps == expected, name


def test_max_steps_take_precedence_over_epochs(converted: Migrate) -> None:
    for name, base in BASES.items():
        for epochs in ("num_train_epochs", "num_epochs"):
            done = converted(base | {epochs: 1, "max_steps": 500}, name)
            assert (done.recipe.training.max_steps, done.recipe.training.num_train_epochs) == (500, None), name


def test_what_is_trained_on_is_named_where_it_differs(converted: Migrate) -> None:
    base = BASES["trl"]
    for more in ({}, {"assistant_only_loss": False}):
        assert "data.train_on: all" in noted(converted(base | more, "trl-sft"), "attention")["assistant_only_loss"]
    assert converted(base | {"assistant_only_loss": True}, "trl-sft").recipe.data.train_on == "assistant"
    assert converted(base | {"completion_only_loss": False}, "trl-sft").recipe.data.train_on == "all"
    odd = {"path": "d", "type": "chat_template", "shards": 10, "roles": {"user": ["visitor"]}}
    data = [
        odd,
        {"path": "e", "type": "alpaca"},
        {"path": "f", "message_property_mappings": {"role": "from", "content": "value"}},
    ]
    done = converted(BASES["axolotl"] | {"datasets": data}, "axolotl")
    missing = noted(done, "missing")
    assert set(missing) == {"datasets[0].shards", "datasets[0].roles"}
    assert "not in the words of Alpaca's prompt" in noted(done, "attention")["datasets[1].type"]


def test_columns_of_pairs_are_those_that_the_type_reads(converted: Migrate) -> None:
    base = {"base_model": "m", "adapter": "lora"}
    columns = {}
    for rl, kind in (("orpo", "chat_template.argilla"), ("kto", "llama3.argilla"), ("dpo", "llama3.argilla")):
        done = converted(base | {"rl": rl, "datasets": [{"path": "d", "type": kind}]}, "axolotl")
        columns[rl] = done.recipe.data.of(done.recipe.data.train[0], "columns")
    assert not columns["orpo"]
    assert columns["kto"] == {"instruction": "prompt"}
    assert columns["dpo"]["chosen_response"] == "chosen"
    empty = base | {"rl": "dpo", "dpo_loss_type": [], "datasets": [{"path": "d", "type": "chat_template.default"}]}
    assert "the default is used" in noted(converted(empty, "axolotl"), "default")["dpo_loss_type"]


def test_a_strategy_of_saving_that_is_unknown_is_named(converted: Migrate) -> None:
    done = converted(BASES["trl"] | {"save_strategy": "best", "save_steps": 50}, "trl")
    assert "best: training.save_steps is a number of steps" in noted(done, "missing")["save_strategy"]
    assert "not used with save_strategy: best" in noted(done, "default")["save_steps"]


def test_pretraining_of_llama_factory_is_packed_unless_switched_off(converted: Migrate) -> None:
    base = BASES["llama-factory"] | {"stage": "pt", "per_device_train_batch_size": 2, "cutoff_len": 512}
    assert converted(base, "llama-factory").recipe.training.global_batch_tokens == 1024
    assert converted(base | {"packing": False}, "llama-factory").recipe.training.packing == "auto"
    assert converted(base | {"stage": "sft"}, "llama-factory").recipe.training.packing == "auto"


def test_a_default_of_the_strategy_is_no_default_of_the_recipe(converted: Migrate) -> None:
    base = BASES["llama-factory"] | {"finetuning_type": "full", "train_from_scratch": True}
    for more in ({}, {"weight_decay": 0.0}):
        done = converted(base | more, "llama-factory")
        assert (done.recipe.training.weight_decay, done.recipe.training.extra) == (0.0, {"adam_beta2": 0.999})


@pytest.mark.parametrize(
    ("tool", "config"),
    [
        ("trl-dpo", {"use_peft": True}),
        ("trl-orpo", {"use_peft": True, "lora_dropout": 0.1, "packing": True}),
        ("trl-kto", {"use_peft": True}),
        ("trl-grpo", {"use_peft": True, "reward_funcs": ["f"], "completion_only_loss": True}),
        ("axolotl", {"rl": "dpo", "adapter": "lora", "lora_dropout": 0.05, "train_on_inputs": True, "sample_packing": True}),
        ("axolotl", {"rl": "kto", "roles_to_train": ["assistant"]}),
        ("llama-factory", {"stage": "dpo", "lora_dropout": 0.1, "mask_history": True, "packing": True}),
        ("llama-factory", {"stage": "kto", "train_on_prompt": True, "neat_packing": True}),
    ],
)
def test_what_an_objective_refuses_is_left_out_with_a_note(converted: Migrate, tool: str, config: dict[str, Any]) -> None:
    """A recipe that is called valid is trained."""
    from hfstrat import objectives

    done = converted(BASES[tool.partition("-")[0] if tool.startswith("trl") else tool] | config, tool)
    Path("rewards.py").write_text("def f(completions, **given):\n    return [0.0] * len(completions)\n")
    objectives.objective_of(done.recipe).check(done.recipe)
    missing = noted(done, "missing")
    for key in {"lora_dropout", "completion_only_loss", "train_on_inputs", "roles_to_train", "mask_history"} & set(config):
        assert key in missing


BASES: dict[str, dict[str, Any]] = {
    "trl": {"model_name_or_path": "m", "dataset_name": "d"},
    "axolotl": {"base_model": "m", "datasets": [{"path": "d"}]},
    "llama-factory": {"model_name_or_path": "m", "dataset": "d"},
}


def noted(done: Migration, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in done.notes if note.kind == kind}
