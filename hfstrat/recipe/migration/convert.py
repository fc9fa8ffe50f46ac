"""From a config of another tool to a recipe that the schema accepts, with a note about each key that needs one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe import foreign, suggestions, yaml
from hfstrat.recipe.load import apply_override, load_recipe
from hfstrat.recipe.migration import axolotl, llama_factory, trl, write
from hfstrat.recipe.migration.rules import Draft, Entry, Note, Rules
from hfstrat.recipe.schema import UNIONS, Recipe

LARGEST = 2**20  # bytes of a config
NO_SUCH_KEY = "it is not a key that this version knows"


@dataclass(frozen=True)
class Tool:
    """A tool whose configs are read. `release`: the one whose keys the table was compared with (`scripts/foreign_keys.py`)."""

    title: str
    release: str
    rules: Rules
    convert: Callable[[Draft, int, str | None], None]


TOOLS = {
    "trl": Tool("TRL", "1.16.0", trl.RULES, trl.convert),
    "axolotl": Tool("axolotl", "0.19.0", axolotl.RULES, axolotl.convert),
    "llama-factory": Tool("LLaMA-Factory", "0.9.5", llama_factory.RULES, llama_factory.convert),
}
TRAINERS = ("sft", "dpo", "kto", "orpo", "cpo", "grpo", "reward", "rloo")
NAMES = (*TOOLS, *(f"trl-{trainer}" for trainer in TRAINERS if trainer not in trl.REFUSED or trainer == "cpo"))


@dataclass(frozen=True)
class Migration:
    """A recipe as text, and the notes."""

    tool: str
    text: str
    recipe: Recipe
    notes: list[Note]


def migrate(source: str, name: str | None = None, processes: int = 1, overrides: tuple[str, ...] = ()) -> Migration:
    """Convert a config file.

    Args:
        name: one of `NAMES`; default: by the keys.
        processes: on which the config ran; the global batch size is that of all.
        overrides: `key=value` of the recipe, which win.

    Raises:
        UserError: the file cannot be read, is of no known tool, or a required key is missing.
    """
    given = _read(source)
    if name is not None and name not in NAMES:
        raise UserError(f"--from: {name}: expected one of {', '.join(NAMES)}")
    tool = name or detect(given, source)
    trainer = tool.removeprefix("trl-") if tool.startswith("trl-") else ""
    tool = "trl" if trainer else tool
    draft = Draft(dict(given))
    try:
        TOOLS[tool].convert(draft, processes, trainer or None)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    _unknown(draft, TOOLS[tool])
    changed: dict[str, Any] = {}
    for override in overrides:
        apply_override(override, changed, {})
    _override(draft, changed)
    _of_the_objective(draft)
    _plain(draft)
    return _checked(draft, TOOLS[tool], source)


def _read(source: str) -> dict[str, Any]:
    text = yaml.read(source)
    if len(text) > LARGEST:
        raise UserError(f"{source}: {len(text):,} characters; expected a config of at most {LARGEST:,}")
    if not text.strip():
        raise UserError(f"{source}: the file is empty; expected a config of TRL, axolotl or LLaMA-Factory")
    try:
        return yaml.parse(text, source)[0]
    except UserError as error:
        kind = "a recipe is a mapping with keys such as model, strategy, data"
        raise UserError(str(error).replace(kind, "a config is a mapping of keys to values")) from None


def detect(given: dict[str, Any], source: str) -> str:
    """The tool whose keys these are.

    Raises:
        UserError: of none, or of several alike.
    """
    if "strategy" in given and "data" in given:
        raise UserError(f"{source}: this is a recipe of hfstrat already: `hfstrat check {source}`")
    if tool := foreign.tool_of(given):
        return tool
    keys = ", ".join(list(given)[:5]) or "none"
    raise UserError(
        f"{source}: its keys ({keys}) are of no format that is known; expected a config of TRL, axolotl or LLaMA-Factory: "
        f"name it by --from {', '.join(TOOLS)}"
    )


def _unknown(draft: Draft, tool: Tool) -> None:
    """A note about each key that no rule has read."""
    for key, value in draft.given.items():
        if key in draft.read:
            continue
        if key in tool.rules:
            draft.same(key, "it has no value" if value is None else "it is not used with the other settings")
        elif value is None:
            draft.same(key, "it has no value")
        else:
            advice = foreign.instead_of(key, value, draft.given)
            name = f"hfstrat calls it {foreign.OURS[key]}" if key in foreign.OURS else ""
            draft.miss(key, advice or name or NO_SUCH_KEY)


def _override(draft: Draft, changed: dict[str, Any]) -> None:
    """Put the overrides in place of what was converted."""
    for section, value in changed.items():
        inner = value if isinstance(value, dict) else {"": value}
        for key, one in inner.items():
            target = f"{section}.{key}" if key else section
            short = {"model": "name_or_path", "strategy": "name", "objective": "name", "data": "train"}.get(section)
            target = f"{section}.{short}" if not key and short else target
            draft.entries = {name: entry for name, entry in draft.entries.items() if not f"{name}.".startswith(f"{target}.")}
            draft.entries[target] = Entry(one, "command line")


UNUSED = {  # keys that a run with another objective than sft refuses, and why
    "strategy.lora_dropout": "preferences and rewards are trained without dropout: all answers see the same model",
    "data.train_on": "only used by supervised training: the answers have the loss",
}


def _of_the_objective(draft: Draft) -> None:
    """Leave out what an objective other than sft would refuse."""
    if draft.value("objective.name") in (None, "sft"):
        return
    for target, why in UNUSED.items():
        entry = draft.entries.get(target)
        if entry is not None and entry.value and entry.key != "command line":
            del draft.entries[target]
            draft.miss(entry.key or f"{target.rpartition('.')[2]} (a default)", why)


def _plain(draft: Draft) -> None:
    """Leave out what is the default of hfstrat anyway, and what belongs to another strategy or objective."""
    names = {union: draft.value(f"{union}.name") for union in UNIONS}
    names["strategy.peft_type"] = draft.value("strategy.peft_type")
    own = getattr(UNIONS["strategy"].get(str(names["strategy"])), "defaults", {})
    for target, entry in list(draft.entries.items()):
        section, _, key = target.partition(".")
        cls = UNIONS.get(section, {}).get(str(names.get(section)))
        if cls is not None and key and key not in cls.fields_of(draft.value(f"{section}.{cls.variants}")):
            del draft.entries[target]
            if entry.key:
                draft.miss(entry.key, f"{section} {names[section]} has no {key}")
            continue
        field = suggestions.field_of(tuple(target.split(".")), {k: v for k, v in names.items() if v})
        if field is None or field.is_required() or entry.key == "command line":
            continue
        if section == "training" and key.partition(".")[0] in own:  # unset, it would have another value
            continue
        if entry.value == field.default and type(entry.value) is type(field.default):
            del draft.entries[target]
            if entry.key:
                draft.same(entry.key, f"{entry.value!r} is the default of {target}")


def _checked(draft: Draft, tool: Tool, source: str) -> Migration:
    """The recipe, without values that the schema refuses; each of these has a note.

    Raises:
        UserError: a required key is missing, or an override is wrong.
    """
    _required(draft, source)
    for _ in range(len(draft.entries) + 1):
        text = write.text(draft, tool.title, source)
        try:
            loaded = load_recipe(source, (), text)
        except UserError as error:
            _take_back(draft, str(error), source)
        else:
            return Migration(tool.title, text, loaded.recipe, _ordered(draft))
    raise UserError(f"{source}: no recipe could be made of this config")


def _required(draft: Draft, source: str) -> None:
    if draft.value("output_dir") is None:
        draft.put(
            "output_dir",
            "runs/" + re.sub(r"\W+", "-", source.rpartition("/")[2].partition(".")[0]).strip("-").lower(),
            "not in the config",
        )
    missing = {"model.name_or_path": "some/model", "data.train": "rows.jsonl"}
    lacking = [f"{target}={example}" for target, example in missing.items() if not draft.value(target)]
    if draft.value("objective.name") == "grpo" and not draft.value("objective.rewards"):
        lacking.append("objective.rewards=rewards.py:my_reward")
    if lacking:
        raise UserError(
            f"{source}: the config does not name {' and '.join(each.partition('=')[0] for each in lacking)}; give it on "
            f"the command line: hfstrat migrate {source} {' '.join(lacking)}"
        )


def _take_back(draft: Draft, message: str, source: str) -> None:
    """Remove the value that a message of the schema is about.

    Raises:
        UserError: the message is about no value of the config.
    """
    for line in message.splitlines():
        text = re.sub(rf"^{re.escape(source)}(:\d+)?: ", "", line)
        key = re.match(r"[a-z_]+(\.[a-z_0-9]+)*", text)
        parts = key.group().split(".") if key else []
        around = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
        named = [name for place in around for name in draft.entries if name == place or name.startswith(f"{place}.")]
        if found := next((name for name in named if name not in KEPT), None):
            entry = draft.entries.pop(found)
            if entry.key == "command line":
                raise UserError(f"command line: {text}")
            draft.miss(entry.key or found, f"left out: {text}")
            return
    raise UserError(message)


KEPT = ("model.name_or_path", "strategy.name", "objective.name", "data.train", "output_dir")


def _ordered(draft: Draft) -> list[Note]:
    order = {"missing": 0, "attention": 1, "default": 2}
    unique = list(dict.fromkeys(draft.notes))
    return sorted(unique, key=lambda note: order[note.kind])
