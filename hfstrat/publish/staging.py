"""The files of a result that are uploaded: links to the weights and cleaned copies of the others, all of them listed here."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from hfstrat.errors import UserError
from hfstrat.publish import card
from hfstrat.publish.scrub import Base, Scrubber, base_of, published_report
from hfstrat.tasks.report import Report

WEIGHTS = ("*.safetensors",)
TOKENIZERS = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "spiece.*", "*.jinja")
CONFIGS = (  # cleaned: they contain local paths
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "*.safetensors.index.json"),
    *("preprocessor_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
LOCAL_KEYS = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "cache_dir", "tokenizer_file", "vocab_file"}
STALE = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "modules.json")  # of an earlier push, deleted


def stage(run: Path, report: Report, folder: Path, repo: str) -> list[str]:
    """Fill the empty `folder` with the files to upload; returns their names, sorted.

    Raises:
        UserError: a file would reveal a path or a secret, so nothing may be uploaded.
    """
    final = run / "final"
    scrubber = Scrubber(report.run.recipe.model_dump())
    base = base_of(report)
    for file in sorted(path for path in final.rglob("*") if path.is_file()):
        target = folder / file.relative_to(final)
        target.parent.mkdir(parents=True, exist_ok=True)
        if any(fnmatch(file.name, pattern) for pattern in CONFIGS):
            _write_json(target, _cleaned(json.loads(file.read_text(encoding="utf-8")), file.name, base, scrubber))
        elif any(fnmatch(file.name, pattern) for pattern in (*WEIGHTS, *TOKENIZERS)):
            target.symlink_to(file.absolute())
    public = published_report(report, scrubber)
    if base and base.hub:
        public["run"]["recipe"]["model"] |= {"name_or_path": base.hub, "revision": base.revision}
    _write_json(folder / "report.json", public)
    recipe = yaml.safe_dump(public["run"]["recipe"], sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "README.md").write_text(card.make(report, final, repo), encoding="utf-8")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{final}: no weights (*.safetensors) to push")
    check_clean(folder, names, scrubber)
    return names


def check_clean(folder: Path, names: list[str], scrubber: Scrubber) -> None:
    """Check the texts to upload and the header of each file of weights.

    Raises:
        UserError: a path, a token or a password of this machine is in one of them.
    """
    for name in names:
        if name.endswith((".jinja", "tokenizer.json", ".txt", ".model")):  # content of the model, not of the run
            continue
        found = scrubber.leaks(_header(folder / name) if name.endswith(".safetensors") else (folder / name).read_text("utf-8"))
        if found:
            raise UserError(f"{name} would reveal {found[0]}, so nothing was pushed; remove it from the recipe and the result")


def _header(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little")).decode("utf-8", "replace")


def _cleaned(value: Any, name: str, base: Base | None, scrubber: Scrubber) -> Any:
    """A config without local keys and paths; that of an adapter names its base. A chat template in it is kept as is."""
    if not isinstance(value, dict):
        return value if name == "modules.json" else scrubber.value(value)
    kept = {key: each for key, each in value.items() if key not in LOCAL_KEYS}
    if name == "adapter_config.json" and base:
        kept |= {"base_model_name_or_path": base.reference, "revision": base.revision}
    unchanged = {key: kept[key] for key in ("chat_template", "base_model_name_or_path") if key in kept}
    if name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        return {key: each if not _is_path(each) else scrubber.text(each) for key, each in kept.items()} | unchanged
    cleaned: dict[str, Any] = {**scrubber.value(kept), **unchanged}
    return cleaned


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~/")) and value.count("/") > 1


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
