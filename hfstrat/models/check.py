"""Checks of a model, a tokenizer or an adapter before torch is imported."""

from __future__ import annotations

import importlib.util
import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.models.load import read_json

if TYPE_CHECKING:
    from hfstrat.recipe.schema import Model
    from hfstrat.recipe.section import Quantization

HUB_TIMEOUT = 4  # seconds


def near(path: Path) -> str:
    found = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def no_model(path: Path) -> UserError:
    """The error for a folder without a readable `config.json`."""
    if (path / "config.json").is_file():
        return UserError(f"model.name_or_path: {path / 'config.json'}: expected a JSON object, so this is not a model folder")
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return UserError(
            f"model.name_or_path: {path} is an adapter, not a base model; set its base model{f' ({base})' if base else ''}"
            " here and, to continue training the adapter, `strategy: {name: lora, adapter: " + str(path) + "}`"
        )
    return UserError(f"model.name_or_path: {path} has no config.json, so it is not a model folder")


def check_weights(folder: Path) -> None:
    """Refuse missing or truncated safetensors files."""
    listed = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    files = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(set(listed.values()) - files):
        raise UserError(f"model.name_or_path: {folder}: {missing[0]} of its index is missing; download the model again")
    for name in sorted(files):
        if not _is_complete(folder / name):
            raise UserError(
                f"model.name_or_path: {folder / name} is truncated or not a safetensors file (perhaps a Git LFS "
                "pointer); download the model again"
            )


def _is_complete(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def local_folder(key: str, source: str, revision: str | None, file: str, expected: str, network: bool) -> Path | None:
    """The local folder of a model or tokenizer; None if it is on the Hub, which is queried for `file`.

    Raises UserError: it is a file instead of what is `expected`, or does not exist.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise UserError(f"{key}: {source} is a file; expected {expected}")
    if path.is_dir():
        return path
    if is_path(source):
        raise UserError(f"{key}: {source}: no such folder{near(path)}")
    check_hub(key, source, revision, file, "model", network)
    return None


def is_path(source: str) -> bool:
    """Whether a name cannot be a Hub id."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def check_has_weights(key: str, source: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{key}: {source} contains no weights (*.safetensors); the download may be incomplete")


def check_tokenizer(model: Model, network: bool) -> None:
    if model.tokenizer is None:
        folder = Path(model.name_or_path).expanduser()
        if folder.is_dir() and not has_tokenizer(folder):
            raise UserError(f"model.name_or_path: {folder} has no tokenizer; set model.tokenizer")
        return
    expected = "a folder or a Hub id"
    found = local_folder("model.tokenizer", model.tokenizer, None, "tokenizer_config.json", expected, network)
    if found and not has_tokenizer(found):
        raise UserError(f"model.tokenizer: {model.tokenizer} has no tokenizer file such as tokenizer.json")


def read_vocabulary(folder: Path) -> dict[str, int] | None:
    """The vocabulary in a folder's tokenizer.json, without transformers; None if it cannot be read."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words = content["model"]["vocab"]
        listed = words if isinstance(words, dict) else {word[0]: number for number, word in enumerate(words)}
        return {**listed, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*token*", "vocab*", "*.model"))


def check_hub(key: str, source: str, revision: str | None, file: str, kind: str, network: bool) -> None:
    """Query the Hub for a repository, once and with a short timeout: with retries an error would take a minute.

    Args:
        file: sufficient if it is in the cache; "" to query in any case.
        kind: `model` or `dataset`.

    Raises UserError: the repository does not exist, is gated, or the Hub cannot be reached.
    """
    if not network:
        return
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    name, hint = f"{key}: {source}", near(Path(source))
    here = f"no such {'folder' if kind == 'model' else 'file'} here{hint}, and"
    try:
        if file and isinstance(try_to_load_from_cache(source, file, revision=revision), str):
            return
        if constants.HF_HUB_OFFLINE:
            if kind == "dataset":
                return  # `datasets` has its own cache, and fails at once if the data set is not there
            raise UserError(f"{name}: {here} not in the Hub cache, and HF_HUB_OFFLINE is set; use a local one, or unset it")
        query = HfApi().model_info if kind == "model" else HfApi().dataset_info
        query(source, revision=revision, timeout=HUB_TIMEOUT)
    except errors.GatedRepoError:
        raise UserError(f"{name}: gated; request access on its page and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{key.split('.')[0]}.revision: {source} has no revision {revision}; see its page for branches and tags"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: {here} no such {kind} on the Hub (or it is private: run `hf auth login`)") from None
    except (errors.HFValidationError, ValueError) as error:
        raise UserError(f"{name}: {here} not a valid Hub id: {str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except Exception as error:  # the network can fail in many ways
        raise UserError(
            f"{name}: {here} the Hub cannot be reached ({type(error).__name__}); "
            "use a local one, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from None


def check_adapter(path: str, key: str = "strategy.adapter") -> None:
    """Refuse a local folder without a PEFT LoRA adapter."""
    folder = Path(path).expanduser()
    config = folder / "adapter_config.json"
    if folder.exists() and not config.exists():
        raise UserError(f"{key}: {path} has no adapter_config.json; expected the folder of a PEFT adapter")
    if config.exists() and json.loads(config.read_text()).get("peft_type") != "LORA":
        raise UserError(f"{key}: {path} is not a LoRA adapter; expected the folder of one")


def check_quantizable(key: str, section: Quantization | None, source: str) -> None:
    if section is None:
        return
    if is_quantized_already(source):
        raise UserError(
            f"{key}: {section.name}: {source} is already quantized (quantization_config in its config.json); remove this, or "
            "use the unquantized model"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: {section.name} needs bitsandbytes: pip install 'hfstrat[quantization]'")


def is_quantized_already(source: str) -> bool:
    """Whether a local model's config has a quantization_config."""
    return bool(source) and bool(read_json(Path(source).expanduser() / "config.json").get("quantization_config"))


def check_trainable(name: str, family: str) -> None:
    """Refuse a family whose code in transformers cannot be trained. Raises UserError."""
    if family == "xlstm" and importlib.util.find_spec("xlstm") is None:
        raise UserError(
            f"model.name_or_path: {name} is an xlstm model, and the code for it in transformers 5.23 computes no gradients (it "
            "changes tensors in place); pip install xlstm, or choose another model"
        )
