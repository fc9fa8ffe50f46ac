"""What can be known to be wrong with a model, a tokenizer or an adapter before torch is imported."""

from __future__ import annotations

import importlib.util
import json
from difflib import get_close_matches
from pathlib import Path

from hfstrat.config import Model, Recipe
from hfstrat.errors import UserError
from hfstrat.located import about
from hfstrat.model import read_config, read_json, read_shapes
from hfstrat.strategies import STRATEGIES, Footprint, quantization_section
from hfstrat.strategies.lora import check_adapter
from hfstrat.tasks import TASKS

HUB_TIMEOUT = 4  # seconds


def check_model(recipe: Recipe, network: bool) -> Footprint | None:
    """Refuse a model, a tokenizer or an adapter that cannot be; the footprint where the weights' headers are at hand.

    Raises:
        UserError: one sentence that begins with the key.
    """
    footprint = recipe.strategy.check_model(recipe, network)
    _check_adapter(recipe)
    return footprint


def check_pretrained(recipe: Recipe, network: bool) -> Footprint | None:
    """The same for pretrained weights with a tokenizer."""
    footprint = _check_base(recipe, network)
    check_tokenizer(recipe.model, network)
    return footprint


def _check_base(recipe: Recipe, network: bool) -> Footprint | None:
    model = recipe.model
    path = Path(model.name_or_path).expanduser()
    if model.gguf_file:
        if not path.is_file():
            raise UserError(f"model.name_or_path: {model.name_or_path}: no such GGUF file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"model.name_or_path: {model.name_or_path}: this is no GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise UserError("model.name_or_path: reading a GGUF file needs gguf: pip install 'hfstrat[gguf]'")
        return None
    if path.is_file():
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a file; expected a model folder, a Hub id or a .gguf file"
        )
    if path.is_dir():
        return _check_folder(recipe, path)
    if model.name_or_path.startswith(("/", ".", "~")) or model.name_or_path.count("/") > 1:
        raise UserError(f"model.name_or_path: {model.name_or_path}: no such folder{near(path)}")
    check_hub("model.name_or_path", model.name_or_path, model.revision, "config.json", "model", network)
    return None


def near(path: Path) -> str:
    found = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1)
    return f"; did you mean {path.parent / found[0]}?" if found else ""


def _no_model(path: Path) -> UserError:
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


def _check_folder(recipe: Recipe, path: Path) -> Footprint | None:
    model = recipe.model
    config = read_config(model)
    if config is None or (path / "adapter_config.json").is_file():  # an adapter of a classifier has a config.json too
        raise _no_model(path)
    task = TASKS[recipe.task]
    task.check_architecture(str(path), config)
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.name_or_path: {path} holds no weights (*.safetensors); the download may be incomplete")
    _check_weights(path)
    return footprint_of(recipe, labels=2)  # how many there are is known when the data are read


def footprint_of(recipe: Recipe, labels: int) -> Footprint | None:
    """How many parameters learn and how many there are, from the weights' headers; None where they do not tell.

    Args:
        labels: how many the data have, which makes the head of a classifier.
    """
    made = _shapes_of(recipe, labels)
    if made is None or recipe.model.add_tokens:
        return None
    with about("strategy"):
        return recipe.strategy.footprint(*made)


def _shapes_of(recipe: Recipe, labels: int) -> tuple[dict[str, tuple[int, ...]], bool] | None:
    config = read_config(recipe.model)
    if config is None or not (shapes := read_shapes(Path(recipe.model.name_or_path).expanduser())):
        return None
    return TASKS[recipe.task].shapes(shapes, config, labels)


def quantized_bytes(recipe: Recipe, labels: int) -> int | None:
    """Bytes that the recipe's quantized base takes, where it is one and the weights' headers tell."""
    if recipe.model.quantization is None or (made := _shapes_of(recipe, labels)) is None:
        return None
    return quantization_section.bytes_of(recipe, *made)


def on_disk(recipe: Recipe, footprint: Footprint | None) -> Footprint | None:
    """The footprint with as many parameters in all as would take, in 16 bits, the room that a quantized base takes."""
    held = quantized_bytes(recipe, labels=2) if footprint else None
    return footprint if footprint is None or held is None else footprint._replace(total=held // 2)


def check_task(recipe: Recipe) -> None:
    """Refuse a strategy that cannot do the task, and settings that the task cannot have."""
    strategy = recipe.strategy
    if recipe.task not in strategy.tasks:
        can = [name for name, cls in STRATEGIES.items() if recipe.task in cls.tasks]
        raise UserError(f"strategy.name: {strategy.name} is not for task: {recipe.task}; expected one of {', '.join(can)}")
    TASKS[recipe.task].check(recipe)


def _check_weights(folder: Path) -> None:
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


def _check_adapter(recipe: Recipe) -> None:
    """An adapter to go on from that is named by a path has to be there; also that of a student."""
    student = getattr(recipe.strategy, "student", None)
    for key, strategy in (("strategy.adapter", recipe.strategy), ("strategy.student.adapter", student)):
        if adapter := getattr(strategy, "adapter", None):
            _check_adapter_folder(key, adapter, recipe)


def _check_adapter_folder(key: str, adapter: str, recipe: Recipe) -> None:
    path = Path(adapter).expanduser()
    if not path.exists() and (adapter.startswith(("/", ".", "~")) or adapter.count("/") > 1):
        raise UserError(f"{key}: {adapter}: no such folder{near(path)}")
    if (path / "adapter_config.json").is_file() and not read_json(path / "adapter_config.json"):
        raise UserError(f"{key}: {path / 'adapter_config.json'} is no JSON object; give the folder of a PEFT adapter")
    check_adapter(adapter, key)
    kind, task = read_json(path / "adapter_config.json").get("task_type"), TASKS[recipe.task]
    if kind != task.peft_type and any(kind == other.peft_type for other in TASKS.values()):
        raise UserError(f"{key}: {adapter} is an adapter for {kind}; task: {task.name} goes on from {task.peft_type}")


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
