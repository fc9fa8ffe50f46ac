"""The command line: fast without torch, values with their origins, and no existing file is overwritten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.recipes import SOUND
from pydantic import ValidationError

from hfstrat import __version__
from hfstrat.cli import main
from hfstrat.errors import UserError
from hfstrat.recipe import library
from hfstrat.recipe import yaml as recipe_yaml
from hfstrat.recipe.load import Loaded, load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.section import seconds

ROOT = Path(__file__).parents[2]
COMMANDS = [[], ["train"], ["check"], ["schema"], ["generate"], ["merge"], ["recipes"], ["recipes", "ls"], ["recipes", "cp"]]
Run = Callable[..., tuple[Any, str]]


@pytest.fixture
def hfstrat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """`hfstrat("recipes", "ls")` gives the exit code and the output, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["hfstrat", *words])
        with pytest.raises(SystemExit) as ended:
            main.main()
        printed = capfd.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loaded]:
    """`load("seed=1", text=...)` loads a recipe of that text with overrides."""

    def get(*overrides: str, text: str = SOUND) -> Loaded:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return load_recipe(str(file), overrides)

    return get


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(command) or "hfstrat" for command in COMMANDS])
def test_every_command_explains_itself(hfstrat: Run, command: list[str]) -> None:
    code, printed = hfstrat(*command, "--help")
    assert not code
    assert "Usage:" in printed
    assert "--help" in printed


def test_the_first_help_names_every_strategy(hfstrat: Run) -> None:
    from hfstrat.recipe.schema import STRATEGIES

    first = " ".join(hfstrat("--help")[1].split()).split("Commands")[0]
    assert len(STRATEGIES) > 5
    assert not [name for name in STRATEGIES if not re.search(rf"\b{name}\b", first)]


def test_evaluate_refuses_a_form_that_there_is_not(hfstrat: Run, tiny: Path) -> None:
    code, printed = hfstrat("evaluate", str(tiny), "--quantization", "nf5")
    assert code == 2
    assert "--quantization: nf5: expected one of recorded, none, int8, nf4, fp4" in printed


def test_help_recipes_and_schema_import_no_torch() -> None:
    """Commands that need no model import no heavy library."""
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'accelerate'} & set(sys.modules)"
    lines = ["import sys, hfstrat.cli.main"]
    for words in (
        ["--help"],
        ["train", "--help"],
        ["recipes", "ls"],
        ["cache", "ls"],
        ["schema"],
        ["--version"],
        ["train", "none.yaml"],
        ["compare", "none.yaml", "other.yaml"],
        ["tune", "none.yaml", "--time", "60s"],
    ):
        lines += [f"sys.argv = ['hfstrat', *{words}]", "try: hfstrat.cli.main.main()", "except SystemExit: pass"]
    done = python("-c", "\n".join([*lines, f"assert not {heavy}, {heavy}"]))
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    """`python -m hfstrat` and the installed `hfstrat` are one function."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hfstrat": "hfstrat.cli.main:main"}
    module = python("-m", "hfstrat", "recipes", "ls")
    command = python("-c", "import sys; from hfstrat.cli.main import main; sys.argv = ['hfstrat', 'recipes', 'ls']; main()")
    assert (module.returncode, module.stdout) == (command.returncode, command.stdout)
    assert module.returncode == 0


def test_the_version(hfstrat: Run) -> None:
    assert hfstrat("--version") == (0, f"{__version__}\n")


def test_an_unknown_command_is_named(hfstrat: Run) -> None:
    code, printed = hfstrat("trian")
    assert code == 2
    assert "train" in printed
    assert "Traceback" not in printed


def test_recipes_are_listed_with_what_they_are_for(hfstrat: Run) -> None:
    code, printed = hfstrat("recipes", "ls")
    assert not code
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in printed.splitlines()}
    assert sorted(listed) == library.names("recipes")
    assert all(listed.values())


def test_a_recipe_is_copied_once(hfstrat: Run, tmp_path: Path) -> None:
    """A copy equals the file, and never replaces another."""
    source = library.find("recipes", "quickstart").read_bytes()
    assert hfstrat("recipes", "cp", "quickstart") == (0, "quickstart.yaml\n")
    assert (tmp_path / "quickstart.yaml").read_bytes() == source
    (tmp_path / "quickstart.yaml").write_text("mine")
    code, printed = hfstrat("recipes", "cp", "quickstart")
    assert code == 2
    assert "quickstart.yaml exists already; name another file" in printed
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"


def test_a_recipe_is_copied_where_it_is_wanted(hfstrat: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert hfstrat("recipes", "cp", "quickstart", "mine") == (0, "mine/quickstart.yaml\n")
    assert hfstrat("recipes", "cp", "quickstart.yaml", "first.yaml") == (0, "first.yaml\n")
    assert (tmp_path / "first.yaml").read_bytes() == (tmp_path / "mine" / "quickstart.yaml").read_bytes()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["quikstart"], "did you mean 'quickstart'?"),
        (["zzz"], "expected one of"),
        (["quickstart", "none/here.yaml"], "none: no such folder"),
    ],
)
def test_what_cannot_be_copied_is_refused(hfstrat: Run, words: list[str], says: str) -> None:
    code, printed = hfstrat("recipes", "cp", *words)
    assert code == 2
    assert says in printed


# the JSON schema


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value fits a schema, by the keywords that pydantic writes."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if "oneOf" in schema:
        return sum(fits(value, one, root) for one in schema["oneOf"]) == 1
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    return _is_type(value, schema.get("type")) and _in_bounds(value, schema) and _parts_fit(value, schema, root)


def _is_type(value: Any, name: str | None) -> bool:
    types: dict[str | None, Any] = {
        "string": str,
        "object": dict,
        "array": list,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    if name == "null":
        return value is None
    return name is None or (isinstance(value, types[name]) and (name == "boolean" or not isinstance(value, bool)))


def _in_bounds(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, str):
        return len(value) >= schema.get("minLength", 0)
    if not isinstance(value, int | float):
        return True
    low, above = schema.get("minimum", value), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum", value), schema.get("exclusiveMaximum")
    return bool(low <= value <= high and (above is None or value > above) and (below is None or value < below))


def _parts_fit(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {}), root) for item in value)
    if not isinstance(value, dict):
        return True
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", [])) <= set(value) or (others is False and not set(value) <= set(known)):
        return False
    return all(fits(item, known.get(key, others if isinstance(others, dict) else {}), root) for key, item in value.items())


def test_the_schema_takes_what_the_loader_takes(hfstrat: Run) -> None:
    """An editor that follows the schema accepts every shipped recipe, the short forms too."""
    code, printed = hfstrat("schema")
    assert not code
    schema = json.loads(printed)
    assert set(schema["required"]) == {"strategy", "data", "output_dir"}  # a model is not needed from scratch
    assert schema["additionalProperties"] is False
    texts = [library.find("recipes", name).read_text() for name in library.names("recipes")]
    for text in (*texts, SOUND, "model: m\nstrategy: full\ndata: d\noutput_dir: o\n"):
        assert fits(recipe_yaml.parse(text, "recipe")[0], schema, schema), text


@pytest.mark.parametrize(
    "override",
    ["sede=1", "training.lr=1", "strategy=loar", "strategy.r=0", "strategy.r='4'", "training.optim=adam", "seed=-1", "hub=x"],
)
def test_the_schema_refuses_what_the_loader_refuses(load: Callable[..., Loaded], override: str) -> None:
    schema = Recipe.model_json_schema()
    data: dict[str, Any] = yaml.safe_load(SOUND)
    data["training"]["learning_rate"] = 1e-3  # PyYAML reads text there
    *sections, key = override.partition("=")[0].split(".")
    target = data[sections[0]] if sections else data
    target[key] = recipe_yaml.parse_value(override.partition("=")[2])
    assert not fits(data, schema, schema)
    with pytest.raises(UserError):
        load(override)


# how values are read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("10", 10),
        ("+3", 3),
        ("007", 7),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("10:30", "10:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("None", "None"),
        ("'1e-4'", "1e-4"),
        ("[a, 1, 1e-1]", ["a", 1, 0.1]),
        ("{a: no}", {"a": "no"}),
        ("*.mlp.*", "*.mlp.*"),
        ("@me/x", "@me/x"),
        ("a=b", "a=b"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_values_are_read_as_people_mean_them(text: str, value: Any) -> None:
    """YAML 1.2: numbers are numbers, only true and false are booleans; the same in a file and on the command line."""
    read = recipe_yaml.parse_value(text)
    assert read == value
    assert type(read) is type(value)
    if text[:1] not in ("*", "@"):
        assert recipe_yaml.parse(f"key: {text}", "recipe")[0]["key"] == value


def test_numbers_in_a_recipe_are_numbers(load: Callable[..., Loaded]) -> None:
    recipe = load("training.weight_decay=1e-2").recipe
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.weight_decay == 1e-2


def test_a_mark_at_the_start_of_the_file_is_no_text(tmp_path: Path) -> None:
    """Some editors begin UTF-8 files by a byte order mark."""
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + SOUND.encode())
    assert load_recipe(str(file)).recipe.output_dir == "run"


@pytest.mark.parametrize(("text", "wanted"), [("90s", 90), ("10min", 600), ("10m", 600), ("1.5h", 5400), (" 2 sec ", 2)])
def test_times(text: str, wanted: float) -> None:
    assert seconds(text) == wanted


# overrides and origins


def test_every_value_knows_where_it_came_from(load: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = load("training.max_steps=7", "hub.repo_id=me/x")
    file = tmp_path / "recipe.yaml"
    assert loaded.recipe.training.max_steps == 7
    assert loaded.origin(("training", "max_steps")) == "command line: training.max_steps=7"
    assert loaded.origin(("hub", "repo_id")) == "command line: hub.repo_id=me/x"
    assert loaded.origin(("training", "learning_rate")) == f"{file}:10"
    assert loaded.origin(("strategy", "r")) == f"{file}:4"
    assert loaded.origin(("seed",)) == "default"
    assert loaded.origin(("training", "optim")) == "default"


def test_defaults_of_the_strategy_name_their_source(load: Callable[..., Loaded]) -> None:
    rates = {}
    for strategy in ("full", "partial", "lora"):
        loaded = load(f"strategy={strategy}", "training={}")
        rates[strategy] = loaded.recipe.training.learning_rate
        assert loaded.origin(("training", "learning_rate")).startswith(f"default of {strategy}: ")
        assert loaded.recipe.training.num_train_epochs == 3
        assert loaded.origin(("training", "num_train_epochs")) == "default: no length was given"
    assert len(set(rates.values())) == 3


@pytest.mark.parametrize("length", ["training.max_steps=3", "training.max_time=1min", "training.num_train_epochs=1"])
def test_a_length_that_is_given_is_the_only_one(load: Callable[..., Loaded], length: str) -> None:
    training = load("training={}", length).recipe.training
    given = [training.max_steps, training.max_time, training.num_train_epochs]
    assert len([value for value in given if value is not None]) == 1


def test_short_forms_and_their_sections(load: Callable[..., Loaded], tmp_path: Path) -> None:
    """`model: x` is name_or_path, and the rest of the section can still be set."""
    file = tmp_path / "recipe.yaml"
    loaded = load("model.revision=main", "data.max_length=64", text="output_dir: o\nmodel: x\nstrategy: lora\ndata: y\n")
    assert (loaded.recipe.model.name_or_path, loaded.recipe.model.revision) == ("x", "main")
    assert (loaded.recipe.data.train[0].path, loaded.recipe.data.max_length) == ("y", 64)
    assert loaded.origin(("model", "name_or_path")) == f"{file}:2"
    assert loaded.origin(("model", "revision")) == "command line: model.revision=main"
    assert loaded.origin(("strategy", "name")) == f"{file}:3"
    assert loaded.origin(("data", "train")) == f"{file}:4"


def test_a_short_form_on_the_command_line_takes_the_whole_section(load: Callable[..., Loaded]) -> None:
    loaded = load("strategy=full")
    assert loaded.recipe.strategy.name == "full"
    assert loaded.origin(("strategy", "name")) == "command line: strategy=full"
    assert ("strategy", "r") not in loaded.origins


def test_overrides_are_read_in_order(load: Callable[..., Loaded]) -> None:
    loaded = load("strategy=lora", "strategy.r=2", "strategy.r=3")
    assert loaded.recipe.strategy.model_dump()["r"] == 3
    assert loaded.origin(("strategy", "r")) == "command line: strategy.r=3"
    assert loaded.origin(("strategy", "name")) == "command line: strategy=lora"


def test_an_override_creates_a_missing_or_empty_section(load: Callable[..., Loaded]) -> None:
    """`hub:` with nothing below it remains if the keys of a section are commented out."""
    text = SOUND + "hub:\n"
    assert load("hub.repo_id=me/x", "evaluation.samples=1", text=text).recipe.evaluation.samples == 1


def test_a_value_may_hold_equals_signs(load: Callable[..., Loaded]) -> None:
    assert load("output_dir=runs/lr=1").recipe.output_dir == "runs/lr=1"


def test_null_takes_a_value_back(load: Callable[..., Loaded]) -> None:
    loaded = load("training.learning_rate=null")
    assert loaded.recipe.training.learning_rate == 2e-4
    assert loaded.origin(("training", "learning_rate")).startswith("default of lora")


def test_merges_and_anchors(load: Callable[..., Loaded]) -> None:
    text = SOUND.replace("  max_steps: 4", "  max_steps: &few 4\n  logging_steps: *few")
    assert load(text=text).recipe.training.logging_steps == 4


def test_a_recipe_does_not_change(load: Callable[..., Loaded]) -> None:
    recipe = load().recipe
    for section, name in ((recipe, "seed"), (recipe.training, "max_steps"), (recipe.strategy, "r"), (recipe.model, "dtype")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)


def test_a_written_recipe_is_the_same_recipe(load: Callable[..., Loaded]) -> None:
    """`recipe.yaml` in a run's folder can be run again."""
    recipe = load("training.extra.adam_beta2=0.95", "data.columns={}").recipe
    again = load(text=yaml.safe_dump(recipe.model_dump(), sort_keys=False)).recipe
    assert again == recipe
