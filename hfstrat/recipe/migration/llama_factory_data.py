"""The data sets of a LLaMA-Factory config, which are names of entries in `dataset_info.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfstrat.recipe.migration.rules import Draft, as_list

INFO = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools"}
PREFERENCE = {"prompt": "prompt", "query": "input", "chosen": "chosen", "rejected": "rejected"}
TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
    "observation_tag": ("observation", "tool", "function_response", "tool_response"),
    "function_tag": ("function_call", "tool_call"),
}
UNREAD = ("videos", "audios")


def sources(draft: Draft, stage: str) -> bool:
    """Set `data.train` and `data.eval` from the names of data sets; returns whether their rows have images."""
    folder = str(draft.take("dataset_dir", "data"))
    if folder == "ONLINE":
        _online(draft)
        return False
    infos = _infos(folder)
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        names = draft.take(key)
        if names is None:
            continue
        found = [_source(draft, key, name, folder, infos, stage) for name in _names(names)]
        draft.put(target, found, key)
        if target == "data.eval":
            draft.drop("data.eval_size", "eval_dataset evaluates")
        if not infos:
            draft.look(
                key,
                f"names of data sets are looked up in {folder}/{INFO}, which is not there: {target} has guessed file names; "
                "run this command in the folder of LLaMA-Factory, or set their paths",
            )
    listed = [infos.get(name) for key in ("dataset", "eval_dataset") for name in _names(draft.given.get(key) or [])]
    columns = [info["columns"] for info in listed if isinstance(info, dict) and isinstance(info.get("columns"), dict)]
    return any(each.get("images") for each in columns)


def _online(draft: Draft) -> None:
    """With `dataset_dir: ONLINE` the names are those of data sets on the Hub."""
    for key, target in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if (names := draft.take(key)) is not None:
            draft.put(target, [{"path": name} for name in _names(names)], key)


def _names(value: Any) -> list[str]:
    return [str(each).strip() for each in (value.split(",") if isinstance(value, str) else as_list(value))]


def _infos(folder: str) -> dict[str, Any]:
    """The content of `dataset_info.json`; empty if it is not there or cannot be read."""
    file = Path(folder).expanduser() / INFO
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _source(draft: Draft, key: str, name: str, folder: str, infos: dict[str, Any], stage: str) -> dict[str, Any]:
    info = infos.get(name)
    if not isinstance(info, dict):
        if infos:
            draft.look(key, f"{name}: not in {folder}/{INFO}; its file name is guessed")
        return {"path": f"{folder}/{name}.json"}
    source = _place(draft, key, name, folder, info)
    columns = {str(theirs): ours for theirs, ours in _columns(info, stage) if theirs and theirs != ours}
    if columns:
        source["columns"] = columns
    _tags(draft, name, info.get("tags"))
    given = info.get("columns")
    for column in UNREAD:
        if isinstance(given, dict) and given.get(column):
            draft.miss(f"{name}.{column}", "videos and sound of language models are not read")
    if info.get("num_samples"):
        draft.miss(f"{name}.num_samples", "a part of the rows is a slice of a split: data.split: train[:1000]")
    return source


def _tags(draft: Draft, name: str, tags: Any) -> None:
    """A note about names of keys and roles that rows of conversations cannot have here."""
    for tag, value in tags.items() if isinstance(tags, dict) else ():
        if value not in TAGS.get(tag, (value,)):
            draft.miss(f"{name}.tags.{tag}", f"{value}: expected one of {', '.join(TAGS[tag])}; rename it in the rows")


def _place(draft: Draft, key: str, name: str, folder: str, info: dict[str, Any]) -> dict[str, Any]:
    if repository := info.get("hf_hub_url"):
        more = {"config": info.get("subset"), "split": info.get("split")}
        return {"path": str(repository)} | {ours: str(value) for ours, value in more.items() if value}
    if info.get("file_name"):
        return {"path": f"{folder}/{info['file_name']}"}
    draft.look(key, f"{name}: it is neither a file nor on the Hub; its file name is guessed")
    return {"path": f"{folder}/{name}.json"}


def _columns(info: dict[str, Any], stage: str) -> list[tuple[Any, str]]:
    """The columns of a data set and their names here."""
    columns, tags = info.get("columns"), info.get("tags")
    given: dict[str, Any] = columns if isinstance(columns, dict) else {}
    if info.get("formatting") in ("sharegpt", "openai"):
        openai = info["formatting"] == "openai" or (isinstance(tags, dict) and tags.get("role_tag") == "role")
        names = SHAREGPT | ({"messages": "messages"} if openai else {})
    elif stage == "pt":
        names = {"prompt": "text"}
    elif stage == "kto":
        names = ALPACA | {"prompt": "prompt", "response": "completion"}
    else:
        names = PREFERENCE if info.get("ranking") is True else ALPACA
    more = {"chosen": "chosen", "rejected": "rejected", "images": "images"} | ({"kto_tag": "label"} if stage == "kto" else {})
    return [(given[theirs], ours) for theirs, ours in (names | more).items() if given.get(theirs)]
