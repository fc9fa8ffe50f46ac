"""What can be known to be wrong with a model, a tokenizer or an adapter before torch is imported."""

from __future__ import annotations

import importlib.util
import json
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from hfstrat.errors import UserError
from hfstrat.models.load import read_json

if TYPE_CHECKING:
    from hfstrat.recipe.quantization import Quantization
    from hfstrat.recipe.schema import Model

HUB_TIMEOUT = 4  # seconds


def near(path: Path) -> str:
    found = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def no_model(path: Path) -> UserError:
    """The answer to a folder without a readable `config.json`."""
    if (path / "config.json").is_file():
        return UserError(f"model.name_or_path: {path / 'config.json'}: expected a JSON object, so this is no model folder")
    if (path / "adapter_config.json").is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        return UserError(
            f"model.name_or_path: {path} is an adapter, not a base model; give its base{f' ({base})' if base else ''} here"
            " and, to go on training it, `strategy: {name: lora, adapter: " + str(path) + "}`"
        )
    return UserError(f"model.name_or_path: {path} has no config.json, so it is no model folder")


def check_weights(folder: Path) -> None:
    """Refuse safetensors files that a download left out or cut short."""
    listed = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    there = {file.name for file in folder.glob("*.safetensors")}
    if missing := sorted(set(listed.values()) - there):
        raise UserError(f"model.name_or_path: {folder} lacks {missing[0]}, which its index names; download the model again")
    for name in sorted(there):
        if not _is_whole(folder / name):
            raise UserError(
                f"model.name_or_path: {folder / name} is no whole safetensors file (cut short, or a Git LFS pointer?); "
                "download the model again"
            )


def _is_whole(file: Path) -> bool:
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


def check_tokenizer(model: Model, network: bool) -> None:
    if model.tokenizer is None:
        folder = Path(model.name_or_path).expanduser()
        if folder.is_dir() and not has_tokenizer(folder):
            raise UserError(f"model.name_or_path: {folder} holds no tokenizer; name one by model.tokenizer")
        return
    path = Path(model.tokenizer).expanduser()
    name = f"model.tokenizer: {model.tokenizer}"
    if path.is_file():
        raise UserError(f"{name} is a file; expected a folder or a Hub id")
    if path.is_dir():
        if not has_tokenizer(path):
            raise UserError(f"{name} holds no tokenizer, such as tokenizer.json")
    elif model.tokenizer.startswith(("/", ".", "~")) or model.tokenizer.count("/") > 1:
        raise UserError(f"{name}: no such folder{near(path)}")
    else:
        check_hub("model.tokenizer", model.tokenizer, None, "tokenizer_config.json", "model", network)


def has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*token*", "vocab*", "*.model"))


def check_hub(key: str, source: str, revision: str | None, file: str, kind: str, network: bool) -> None:
    """Ask the Hub, once and briefly, whether a repository is there: retries would take a minute to say no.

    Args:
        file: the file whose presence in the cache is enough; "" to ask in any case.
        kind: `model` or `dataset`.
        network: whether the Hub may be asked at all.

    Raises:
        UserError: it is not there, gated, or out of reach.
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
                return  # `datasets` has a cache of its own, and says so at once if it is not in there
            raise UserError(f"{name}: {here} not in the Hub cache, and HF_HUB_OFFLINE is set; give a local one, or unset it")
        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        ask(source, revision=revision, timeout=HUB_TIMEOUT)
    except errors.GatedRepoError:
        raise UserError(f"{name}: gated; ask for access on its page and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{key.split('.')[0]}.revision: {source} has no revision {revision}; see its page for branches and tags"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: {here} no such {kind} on the Hub (or it is private: run `hf auth login`)") from None
    except (errors.HFValidationError, ValueError) as error:
        raise UserError(f"{name}: {here} no valid Hub id: {str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except Exception as error:  # the transport has many ways to fail
        raise UserError(
            f"{name}: {here} the Hub cannot be reached ({type(error).__name__}); "
            "give a local one, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from None


def check_adapter(path: str, key: str = "strategy.adapter") -> None:
    """Refuse a local folder that holds no PEFT adapter."""
    folder = Path(path).expanduser()
    config = folder / "adapter_config.json"
    if folder.exists() and not config.exists():
        raise UserError(f"{key}: {path} holds no adapter_config.json; give the folder of a PEFT adapter")
    if config.exists() and json.loads(config.read_text()).get("peft_type") != "LORA":
        raise UserError(f"{key}: {path} is no LoRA adapter; give the folder of one")


def check_quantizable(key: str, section: Quantization | None, source: str) -> None:
    if section is None:
        return
    if is_quantized_already(source):
        raise UserError(
            f"{key}: {section.name}: {source} is quantized already (quantization_config in its config.json); remove this, or "
            "name the model that it was made from"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{key}: {section.name} needs bitsandbytes: pip install 'hfstrat[quantization]'")


def is_quantized_already(source: str) -> bool:
    """Whether a local model's config says so."""
    return bool(source) and bool(read_json(Path(source).expanduser() / "config.json").get("quantization_config"))
