"""The data sets of an axolotl config, as sources of a recipe."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.migration.rules import Draft, as_list

DIRECT = {"path": "path", "name": "config", "split": "split", "revision": "revision"}
KNOWN_TYPES = {  # the beginning of a type: the format of its rows
    "alpaca": "alpaca",
    "completion": "text",
    "pretrain": "text",
    "chat_template": "messages",
    "sharegpt": "conversations",
}
IGNORED = [
    "ds_type",
    "trust_remote_code",
    "preprocess_shards",
    "conversation",
    "train_on_eos",
    "roles_to_train",
    "input_format",
]
NAMES = ("message_property_mappings", "roles", "message_field_role", "message_field_content")
OUR_NAMES = {"role", "content", "from", "value", "user", "human", "assistant", "gpt", "system", "tool", "tools", "tool_calls"}
PART = "all rows are read; of a Hub data set a part is a slice of its split, such as split: train[:10%]"
WHY = {"shards": PART, "shards_idx": PART} | dict.fromkeys(
    NAMES, "messages have role and content (or from and value), of user, assistant, system and tool: rename them in the rows"
)
PAIRS = ("dpo", "ipo", "orpo", "simpo")


def sources(draft: Draft) -> None:
    """Set `data.train`, `data.eval` and what the data sets say about masks and streaming."""
    train = draft.take("datasets") or draft.take("pretraining_dataset")
    preference = str(draft.given.get("rl") or "")
    if isinstance(train, dict | str):
        train = [train] if isinstance(train, dict) else [{"path": train}]
    key = "datasets" if draft.given.get("datasets") else "pretraining_dataset"
    if isinstance(train, list) and train:
        draft.put("data.train", [_source(draft, f"{key}[{n}]", each, preference) for n, each in enumerate(train)], key)
    if key == "pretraining_dataset" and train:
        draft.put("data.streaming", True, key)
        draft.put("data.format", "text", key)
    test = draft.take("test_datasets")
    if isinstance(test, list) and test:
        draft.put(
            "data.eval", [_source(draft, f"test_datasets[{n}]", one, preference) for n, one in enumerate(test)], "test_datasets"
        )
        draft.drop("data.eval_size", "test_datasets evaluate")
    _masks(draft, [each for each in train or [] if isinstance(each, dict)])


def _masks(draft: Draft, given: list[dict[str, Any]]) -> None:
    roles = [role for each in given for role in as_list(each.get("roles_to_train") or [])]
    roles += as_list(draft.take("roles_to_train") or [])
    if roles and draft.value("data.train_on") is None:
        if set(roles) <= {"assistant", "gpt", "model"}:
            draft.put("data.train_on", "assistant", "roles_to_train")
        else:
            draft.miss("roles_to_train", "data.train_on is completions, assistant or all; turns with weight: 0 have no loss")
    ends = {str(each["train_on_eos"]) for each in given if each.get("train_on_eos")} | {str(draft.take("train_on_eos", "turn"))}
    if ends - {"turn"}:
        draft.miss("train_on_eos", "the end of each trained turn is trained")


def _source(draft: Draft, place: str, given: Any, preference: str) -> dict[str, Any]:
    """One source, from one data set of the config."""
    if not isinstance(given, dict):
        return {"path": str(given)}
    source: dict[str, Any] = {ours: str(given[theirs]) for theirs, ours in DIRECT.items() if given.get(theirs)}
    if files := given.get("data_files"):
        source["path"] = str(as_list(files)[0])
        if len(as_list(files)) > 1:
            draft.look(f"{place}.data_files", "a source is one file, folder or glob: name the others, or write a glob")
    columns, form = _columns(draft, place, given, preference)
    if columns:
        source["columns"] = columns
    if form:
        source["format"] = form
    known = {*DIRECT, *IGNORED, "data_files", "type"} | {key for key in given if key.startswith("field")}
    for key in sorted(set(given) - known):
        if given[key] not in (None, False) and not (key in NAMES and _are_ours(given[key])):
            draft.miss(f"{place}.{key}", WHY.get(key, "a source has path, config, split, revision, format, columns and weight"))
    if "path" not in source:
        draft.miss(place, "it has no path")
        source["path"] = "MISSING"
    return source


def _are_ours(names: Any) -> bool:
    """Whether all names of keys and roles are those that rows have here."""
    if isinstance(names, dict):
        return all(_are_ours(each) for pair in names.items() for each in pair)
    return set(map(str, names)) <= OUR_NAMES if isinstance(names, list) else str(names) in OUR_NAMES


def _columns(draft: Draft, place: str, given: dict[str, Any], preference: str) -> tuple[dict[str, str], str | None]:
    """The columns of a data set by our names, and its format where the columns alone do not show it."""
    kind = given.get("type")
    if isinstance(kind, dict):
        return _custom(draft, place, kind)
    text = str(kind or "").lower()
    if preference in PAIRS or preference in ("kto", "grpo"):
        if kind:
            draft.look(
                f"{place}.type",
                f"{kind}: the columns have to be prompt, chosen and rejected (kto: completion and label), or mapped",
            )
        return {}, None
    form = next((ours for theirs, ours in KNOWN_TYPES.items() if text.startswith(theirs)), None)
    if text and form is None:
        draft.look(f"{place}.type", f"{kind}: the format is found in the columns; map them by columns where it is not")
        return {}, None
    if form == "messages":
        column = str(given.get("field_messages") or "messages")
        if column == "conversations":
            return {}, "conversations"
        return ({} if column == "messages" else {column: "messages"}), None
    if form == "text" and given.get("field") not in (None, "text"):
        return {str(given["field"]): "text"}, "text"
    if form == "alpaca":
        draft.look(f"{place}.type", f"{kind}: rendered by the tokenizer's chat template, not in the words of Alpaca's prompt")
    return {}, form


CUSTOM = {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system"}
CUSTOM |= {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "field_completion": "completion"}


def _custom(draft: Draft, place: str, kind: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The columns of a custom prompt, whose wording has no counterpart."""
    columns = {str(kind[theirs]): ours for theirs, ours in CUSTOM.items() if kind.get(theirs) not in (None, ours)}
    for key in ("format", "no_input_format", "system_prompt", "system_format", "prompt_format", "chosen_format"):
        if kind.get(key) and str(kind[key]) not in ("{instruction}", "{instruction} {input}", "{input}"):
            draft.miss(f"{place}.type.{key}", "prompts are rendered by the chat template; write other words into the rows")
    return columns, "alpaca" if kind.get("field_instruction") or kind.get("field_output") else None
