"""The documentation is valid: links, commands, recipe keys and YAML blocks; its figures are those of the benchmark results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

import hfstrat
from hfstrat.cli.main import command
from hfstrat.data.audio_rows import AudioFormat
from hfstrat.data.box_format import BoxFormat
from hfstrat.data.formats import RowFormat
from hfstrat.data.image_rows import ImageFormat
from hfstrat.data.labeled import LabelFormat
from hfstrat.data.preferences import LabeledFormat, PreferenceFormat
from hfstrat.errors import NAMES
from hfstrat.recipe.data import Format
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.schema import Recipe
from hfstrat.recipe.strategies import StrategySection
from hfstrat.tasks.regression.targets import TargetFormat
from scripts import docs_reference

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "hfstrat" / "assistants" / "SKILL.md",
    ROOT / "hfstrat" / "assistants" / "llms.txt",
]
NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?")
COMMAND: Any = command()
PLACEHOLDERS = {"task": "causal-lm", "model": "m", "strategy": "lora", "data": "d.jsonl", "output_dir": "r"}


def pages() -> Any:
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page, in these languages or in any."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [text for language, text in fenced if not languages or language in languages]


def code(text: str) -> list[str]:
    """Inline code of a Markdown text."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [match.replace("\n", " ") for match in re.findall(r"`([^`]+)`", prose)]


@pages()
def test_links_and_paths_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT if page.suffix == ".txt" else page.parent) / target).exists(), target
    for path in re.findall(r"(?<![\w./])(?:hfstrat|tests|scripts)/[\w/.]+\b/?", " ".join(code(text))):
        assert (ROOT / path).exists(), path


@pages()
def test_commands_exist_with_these_options(page: Path) -> None:
    lines = "\n".join(blocks(page, "", "bash", "sh")).replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0] for line in lines if line.startswith("hfstrat ")]
    commands += [
        line.partition(" | ")[0] for line in code(page.read_text(encoding="utf-8")) if re.match(r"hfstrat [a-z-]", line)
    ]
    for line in commands:
        words = [word.strip("[],") for word in shlex.split(line)[1:]]
        command = COMMAND
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert not hasattr(command, "commands") or words[:1] == ["--help"] or "|" in "".join(words), f"{line}: no such command"
        for word in words:
            for option in word.split("|") if word.startswith("-") and not re.match(r"-\d", word) else []:
                assert option.split("=")[0] in options, f"{line}: {option}"


@pages()
def test_yaml_blocks_are_parts_of_recipes(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**PLACEHOLDERS, **yaml.safe_load(block)}), encoding="utf-8")
        load_recipe(str(file))


def keys_of(node: dict[str, Any], defined: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and JSON schema of the keys of a section; all keys of all its variants."""
    if "$ref" in node:
        yield from keys_of(defined[node["$ref"].rpartition("/")[2]], defined)
    for variant in (*node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from keys_of(variant, defined)
    yield from node.get("properties", {}).items()


SCHEMA = Recipe.model_json_schema()


@cache
def exists(path: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of a recipe."""
    schema = SCHEMA
    nodes = [schema]
    for name in path:
        nodes = [child for node in nodes for key, child in keys_of(node, schema["$defs"]) if key == name]
        if any(node.get("additionalProperties") is True for node in nodes):
            return True
    return bool(nodes)


@pages()
def test_keys_exist(page: Path) -> None:
    sections = "|".join(name for name in Recipe.model_fields if name not in ("seed", "task", "output_dir"))
    lines = "\n".join([*code(page.read_text(encoding="utf-8")), *blocks(page)]).splitlines()
    text = "\n".join(line for line in lines if "did you mean" not in line)  # messages about keys that do not exist
    for key in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?![\w(/])", text):
        assert exists(tuple(key.split("."))) or key.rpartition(".")[2] in ("yaml", "jsonl", "csv", "md", "py", "gguf"), key


@pytest.mark.parametrize("section", StrategySection.__subclasses__(), ids=lambda section: section.__name__)
def test_every_key_of_a_strategy_is_documented(section: type[StrategySection]) -> None:
    """In docs/strategies.md; and the first cells of its tables are keys."""
    keys = section.model_fields.keys() - {"name"}
    (name,) = get_args(section.model_fields["name"].annotation)
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8").partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert keys <= set(
        re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))))
    )
    for row in re.findall(r"^\| (`.*?) \|", text, re.M):
        assert set(re.findall(r"`(\w+)`", row)) <= keys, row


# what the pages show is parsed, and read as hfstrat reads it


@pages()
def test_command_lines_are_parsed_by_the_commands(page: Path) -> None:
    """The parser takes each line of a block, with its arguments and the values of its options."""
    lines = "\n".join(blocks(page, "", "bash", "sh")).replace("\\\n", " ").splitlines()
    for line in (re.split(r" #| > ", line)[0] for line in lines if line.startswith("hfstrat ")):
        words = shlex.split(line)[1:]
        command = COMMAND
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        command.make_context("hfstrat", words).close()


@pages()
def test_python_blocks_compile_and_name_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hfstrat":
                assert node.attr in hfstrat.__all__, node.attr


READERS: dict[str, Any] = {
    "text-classification": LabelFormat,
    "regression": TargetFormat,
    "image-classification": ImageFormat,
    "object-detection": BoxFormat,
    "audio-classification": AudioFormat,
    "preference": PreferenceFormat,
    "unpaired-preference": LabeledFormat,
}
"""What reads the rows of a format that needs a task or an objective."""


def test_there_are_rows_of_each_format_and_they_are_recognized() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^### ([\w-]+)\n(?:(?!^###).)*?^```json\n(.*?)^```", text, re.M | re.S))
    assert set(shown) == set(get_args(Format)) - {"auto"}
    for name, lines in shown.items():
        rows = [json.loads(line) for line in lines.splitlines()]
        reader = READERS.get(name, RowFormat).detect(rows, "rows.jsonl", "auto", {})
        if not isinstance(reader, LabelFormat | TargetFormat | BoxFormat):  # their kind is the columns
            assert reader.kind == name
            assert reader.example(rows[0])


def test_each_exit_code_is_explained() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^## (\d+): ", text, re.M)} == set(NAMES)
    table = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)} == set(NAMES)


# pages that are generated


def test_each_key_has_a_meaning_and_an_example_that_is_valid() -> None:
    wrong = []
    for key in docs_reference.every_key():
        example = docs_reference.example_of(key)
        try:
            TypeAdapter(Annotated[(key.field.annotation, None, *key.field.metadata)]).validate_python(example)
        except ValidationError as error:
            wrong.append(f"{key.path}: {example}: {error}")
        if not docs_reference.meaning_of(key) or yaml.safe_load(docs_reference.example_text(key).strip("`")) is None:
            wrong.append(f"{key.path}: no meaning, or no example")
    assert not wrong, "\n".join(wrong)


def test_the_reference_has_every_key_and_every_command() -> None:
    keys, commands = docs_reference.keys_page(), docs_reference.commands_page()
    for key in docs_reference.every_key():
        assert f"| `{key.path.rpartition('.')[2]}` |" in keys
    for name, described in docs_reference.commands():
        assert f"## {name}\n" in commands
        assert all(option in commands for parameter in described.params for option in parameter.opts if option.startswith("-"))


# figures


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


def is_among(figure: str, known: set[float]) -> bool:
    """Whether a figure is one of these numbers, rounded or in percent."""
    digits = len(figure.partition(".")[2])
    return any(f"{scale * value:.{digits}f}" == figure for value in known for scale in (1, 100))


@pages()
def test_figures_in_tables_are_those_of_the_results_that_they_link_to(page: Path) -> None:
    """Or ratios of such figures in the same row. The first cell names the task."""
    for line in page.read_text(encoding="utf-8").splitlines():
        names = re.findall(r"\]\([^)]*results/(\w+)\.md\)", line) if line.startswith("|") else []
        known = {value for name in names for value in numbers((RESULTS / f"{name}.md").read_text(encoding="utf-8"))}
        cells = "|".join(re.sub(r"\[[^]]*\]\([^)]*\)", "", line).split("|")[2:])
        figures = [text.replace(",", "") for text in NUMBER.findall(cells)] if names else []
        measured = [float(figure) for figure in figures if is_among(figure, known)]
        ratios = {one / other for one in measured for other in measured if one != other and other}
        for figure in figures:
            assert is_among(figure, known) or is_among(figure, ratios), f"{line}: {figure}"


@pytest.mark.parametrize("name", sorted(file.stem for file in RESULTS.glob("*.json")))
def test_tables_of_results_are_made_from_their_json(name: str) -> None:
    from benchmarks.measure import page

    benchmark = importlib.import_module(f"benchmarks.{name}")
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == page(name, benchmark.lines_of(result))
