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
COLUMNS = {  # types whose rows have other columns than their format: those columns by our names
    "alpaca_chat.load_qa": {"question": "instruction", "answer": "output"},
    "alpaca_chat.load_camel_ai": {"message_1": "instruction", "message_2": "output"},
    "alpaca_w_system.load_open_orca": {"question": "instruction", "response": "output", "system_prompt": "system"},
    "alpaca_w_system.load_open_orca_chatml": {"question": "instruction", "response": "output", "system_prompt": "system"},
    "gpteacher": {"response": "output"},
    "oasst": {"INSTRUCTION": "instruction", "RESPONSE": "output"},
    "summarizetldr": {"article": "instruction", "summary": "output"},
}
PAIRED = {  # the same of preferences, by the name behind the last dot
    "argilla": {"instruction": "prompt", "chosen_response": "chosen", "rejected_response": "rejected"},
    "intel": {"question": "prompt"},
    "icr": {"input": "prompt"},
}
IGNORED = (
    *("ds_type", "trust_remote_code", "preprocess_shards", "conversation", "train_on_eos", "roles_to_train", "input_format"),
    *("field", "field_messages", "field_chosen", "field_rejected", "field_tools", "text_column", "data_files", "type"),
)
MESSAGES = "messages have role and content (or from and value), of user, assistant, system and tool: rename them in the rows"
NAMES = ("message_property_mappings", "roles", "message_field_role", "message_field_content")
OUR_NAMES = {"role", "content", "from", "value", "user", "human", "assistant", "gpt", "system", "tool", "tools", "tool_calls"}
PART = "all rows are read; of a Hub data set a part is a slice of its split, such as split: train[:10%]"
TEMPLATE = "one template holds for all sources: data.template"
THOUGHTS = "a message has its reasoning as reasoning_content, as the template reads it: rename it in the rows"
WHY = {
    **dict.fromkeys(NAMES, MESSAGES),
    **dict.fromkeys(("shards", "shards_idx", "skip"), PART),
    **dict.fromkeys(("chat_template", "chat_template_jinja", "drop_system_message"), TEMPLATE),
    **dict.fromkeys(("field_thinking", "template_thinking_key", "split_thinking"), THOUGHTS),
    "message_field_training": "a turn with weight: 0 has no loss: rename the key in the rows",
    "message_field_training_detail": "loss is given to whole turns: weight",
    "train_on_eot": "the end of each trained turn is trained",
    "field_human": "rename the columns, or map them by columns",
    "field_model": "rename the columns, or map them by columns",
    "logprobs_field": "a teacher computes them: strategy: distill",
    "temperature": "a teacher's is strategy.temperature",
    "input_transform": "rows are read as they are: change them in the file",
}
OTHERWISE = "a source has path, config, split, revision, format, columns and weight"
PAIRS = ("dpo", "ipo", "orpo", "simpo")


def sources(draft: Draft) -> None:
    """Set `data.train`, `data.eval` and what the data sets say about masks and streaming."""
    train = draft.take("datasets") or draft.take("pretraining_dataset")
    preference = str(draft.given.get("rl") or "")
    if isinstance(train, dict | str):
        train = [train] if isinstance(train, dict) else [{"path": train}]
    key = "datasets" if draft.given.get("datasets") else "pretraining_dataset"
    if isinstance(train, list) and train:
        draft.put("data.train", _all(draft, key, train, preference), key)
    if key == "pretraining_dataset" and train:
        draft.put("data.streaming", True, key)
        draft.put("data.format", "text", key)
    test = draft.take("test_datasets")
    if isinstance(test, list) and test:
        draft.put("data.eval", _all(draft, "test_datasets", test, preference), "test_datasets")
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


def _all(draft: Draft, key: str, given: list[Any], preference: str) -> list[dict[str, Any]]:
    """The sources of a list of data sets; one of several files becomes one for each."""
    found = []
    for n, each in enumerate(given):
        source = _source(draft, f"{key}[{n}]", each, preference)
        files = as_list(each.get("data_files") or []) if isinstance(each, dict) else []
        found += [source | {"path": str(file)} for file in files] or [source]
    return found


def _source(draft: Draft, place: str, given: Any, preference: str) -> dict[str, Any]:
    """One source, from one data set of the config."""
    if not isinstance(given, dict):
        return {"path": str(given)}
    source: dict[str, Any] = {ours: str(given[theirs]) for theirs, ours in DIRECT.items() if given.get(theirs)}
    columns, form = _columns(draft, place, given, preference)
    named = {"field_tools": "tools", "text_column": "text"}
    columns |= {str(given[key]): ours for key, ours in named.items() if given.get(key) not in (None, ours)}
    if columns:
        source["columns"] = columns
    if form:
        source["format"] = form
    for key in sorted(set(given) - {*DIRECT, *IGNORED}):
        ours = key in NAMES and _are_ours(given[key])
        default = key == "chat_template" and given[key] == "tokenizer_default"
        if given[key] not in (None, False, "", {}, []) and not ours and not default:
            draft.miss(f"{place}.{key}", WHY.get(key, OTHERWISE))
    if "path" not in source and not given.get("data_files"):
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
        return _preferences(draft, place, given, text), None
    if text in COLUMNS:
        return dict(COLUMNS[text]), "alpaca"
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


def _preferences(draft: Draft, place: str, given: dict[str, Any], kind: str) -> dict[str, str]:
    """The columns of pairs, of answers with a label, or of prompts for rewards."""
    fields = {"field_messages": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
    columns = {str(given[theirs]): ours for theirs, ours in fields.items() if given.get(theirs) not in (None, ours)}
    if kind.startswith("chat_template") and kind.endswith("default") and not given.get("field_messages"):
        columns["messages"] = "prompt"
    paired = {} if kind.startswith("chat_template") else PAIRED.get(kind.rpartition(".")[2], {})
    if str(draft.given.get("rl")) == "kto":  # whose types read a completion
        paired = {theirs: ours for theirs, ours in paired.items() if ours == "prompt"}
    columns |= paired
    if kind and not columns and not kind.endswith("argilla_chat"):
        wanted = "the columns have to be prompt, chosen and rejected (kto: completion and label), or mapped"
        draft.look(f"{place}.type", f"{given['type']}: {wanted}")
    return columns


CUSTOM = {"field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system"}
CUSTOM |= {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "field_completion": "completion"}
CUSTOM |= {"field_label": "label"}
WORDING = (
    *("format", "no_input_format", "system_prompt", "system_format", "prompt_format", "chosen_format", "rejected_format"),
    "completion_format",
)


def _custom(draft: Draft, place: str, kind: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The columns of a custom prompt, whose wording has no counterpart."""
    columns = {str(kind[theirs]): ours for theirs, ours in CUSTOM.items() if kind.get(theirs) not in (None, ours)}
    plain = (
        "{instruction}",
        "{instruction} {input}",
        "{input}",
        "{prompt}",
        "{chosen}",
        "{rejected}",
        "{completion}",
        "{system}",
    )
    for key in WORDING:
        if kind.get(key) and str(kind[key]) not in plain:
            draft.miss(f"{place}.type.{key}", "prompts are rendered by the chat template; write other words into the rows")
    for key in sorted(set(kind) - {*CUSTOM, *WORDING}):
        draft.miss(f"{place}.type.{key}", "it is not a key that this version knows")
    return columns, "alpaca" if kind.get("field_instruction") or kind.get("field_output") else None
