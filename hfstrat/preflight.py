"""What can be known to be wrong before torch is imported: files, folders, names, room on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hfstrat import checkpoints
from hfstrat.config import Data, Model, Recipe, Training
from hfstrat.data import formats, sources
from hfstrat.errors import UserError
from hfstrat.loading import Loaded
from hfstrat.model import read_config, read_shapes
from hfstrat.strategies import Footprint
from hfstrat.strategies.lora import check_adapter

HUB_TIMEOUT = 4  # seconds
NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
OURS = ("report.json", "recipe.yaml")  # files at the top of a run's folder
SPARE_BYTES = 64 * 2**20  # tokenizer, logs and the like
_DISTRIBUTED = "use `hfstrat train RECIPE --accelerate-config NAME`"
_ORDER = "the order of rows is a function of seed and step; set seed"
_PRECISION = "set model.dtype"
_LOSS = "the loss is the mean over the tokens that carry loss; remove it"
_EVALUATION = "evaluation is per token, by the lowest loss; remove it"
_HUB = "use the recipe's section hub"
_REMOVE = "remove it"
DECIDED = {  # TrainingArguments that would undo what hfstrat promises, or that its Trainer never reads
    "gradient_accumulation_steps": "set training.global_batch_size and training.per_device_train_batch_size",
    "auto_find_batch_size": "leave training.per_device_train_batch_size at auto",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _PRECISION),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config"), _DISTRIBUTED),
    **dict.fromkeys(("data_seed", "train_sampling_strategy", "length_column_name", "dataloader_drop_last"), _ORDER),
    **dict.fromkeys(("label_smoothing_factor", "average_tokens_across_devices"), _LOSS),
    **dict.fromkeys(("eval_strategy", "do_eval", "eval_delay"), "set training.eval_steps"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better", "prediction_loss_only", "label_names"), _EVALUATION),
    **dict.fromkeys(("batch_eval_metrics", "eval_do_concat_batches", "include_for_metrics"), _EVALUATION),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("remove_unused_columns", "logging_nan_inf_filter", "disable_tqdm", "do_train", "do_predict"), _REMOVE),
    **dict.fromkeys(("restore_callback_states_from_checkpoint", "save_only_model", "local_rank"), _REMOVE),
    **dict.fromkeys(("ignore_data_skip", "ddp_find_unused_parameters"), _REMOVE),
    "eval_on_start": "set evaluation.before",
    "save_strategy": "set training.save_steps",
    "resume_from_checkpoint": "set training.resume",
    "use_cpu": "set CUDA_VISIBLE_DEVICES to nothing to train on the CPU",
    "gradient_checkpointing": "set training.activation_checkpointing",
    "gradient_checkpointing_kwargs": "set training.activation_checkpointing",
    "activation_checkpointing_kwargs": "set training.activation_checkpointing",
}


def check(loaded: Loaded, overwrite: bool = False, network: bool = True) -> Footprint | None:
    """Refuse what cannot work, before anything is written; the footprint where it can be told without torch.

    Raises:
        UserError: one located sentence.
    """
    recipe = loaded.recipe
    try:
        _check_data(recipe)
        _check_training(recipe)
        footprint = _check_model(recipe, network)
        _check_tokenizer(recipe.model, network)
        _check_adapter(recipe)
        check_output(recipe, overwrite)
        _check_disk(recipe, footprint)
    except UserError as error:
        raise UserError(_located(str(error), loaded)) from error.__cause__
    return footprint


def _located(message: str, loaded: Loaded) -> str:
    """The message with the file and line of the recipe key that it begins with."""
    path = _key_of(message)
    return f"{loaded.place(path)}: {message}" if path else f"{loaded.source}: {message}"


def _key_of(message: str) -> tuple[str, ...] | None:
    """The recipe key that a message begins with, if it does."""
    match = re.match(r"(\w+(?:\.\w+)*): ", message)
    path = tuple(match.group(1).split(".")) if match else ()
    return path if path and path[0] in Recipe.model_fields else None


@contextmanager
def _about(key: str) -> Iterator[None]:
    """A message that names no key of the recipe is about this one."""
    try:
        yield
    except UserError as error:
        if _key_of(str(error)):
            raise
        raise UserError(f"{key}: {error}") from error.__cause__


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    for source, key in ((data.train, "data.train"), (data.eval, "data.eval")):
        if source is None or (path := sources.local_file(source, key)) is None:
            continue
        with _about(key):
            rows = sources.first_rows(path)
            if rows is not None:
                _check_rows(rows, data, source)
    held_out = data.eval is None and data.eval_split is None and data.eval_size >= 1
    if held_out and recipe.evaluation.max_rows and recipe.evaluation.max_rows < data.eval_size:
        raise UserError(
            f"evaluation.max_rows: {recipe.evaluation.max_rows} is less than data.eval_size = {data.eval_size:g}, "
            "so rows would be held out for nothing; give one of them"
        )


def _check_rows(rows: list[dict[str, Any]], data: Data, source: str) -> None:
    """Refuse columns that fit no format, and the first row that its format cannot read."""
    names = formats.rename(rows[0], data.columns, source)
    try:
        kind = formats.choose(data.format, names.values(), source)
    except UserError as error:
        if not (strange := [ours for ours in data.columns.values() if ours not in formats.OUR_COLUMNS]):
            raise
        near = get_close_matches(strange[0], formats.OUR_COLUMNS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(formats.OUR_COLUMNS)}"
        raise UserError(f"data.columns: no format has a column '{strange[0]}'; {hint} ({error})") from None
    for number, row in enumerate(rows, 1):
        try:
            formats.FORMATS[kind][1]({names[column]: value for column, value in row.items()})
        except formats.BadRow as error:
            raise UserError(f"{source}: row {number}: {error}") from None


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    if ("8bit" in training.optim or "paged" in training.optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"training.optim: {training.optim} needs bitsandbytes: pip install 'hfstrat[quantization]'")
    if training.max_time and training.warmup_steps >= 1:
        raise UserError("training.warmup_steps: with max_time nobody knows how many steps there will be; give a share below 1")
    _check_extra(training)
    if training.resume not in ("auto", "never"):
        with _about("training.resume"):
            checkpoints.find_resume(Path(recipe.output_dir), training.resume, recipe.model_dump())


def _check_extra(training: Training) -> None:
    known = training_argument_names()
    for key in training.extra:
        place = f"training.extra.{key}"
        if key in type(training).model_fields or key in ("seed", "output_dir"):
            home = key if key in Recipe.model_fields else f"training.{key}"
            raise UserError(f"{place}: this is a key of the recipe itself; set {home}")
        if key in DECIDED:
            raise UserError(f"{place}: hfstrat decides this itself, so that its promises hold; {DECIDED[key]}")
        if known and key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{place}: no field of this transformers' TrainingArguments{hint}")


def training_argument_names() -> set[str]:
    """The fields of TrainingArguments, read from its source: importing it takes seconds."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return set()
    source = Path(spec.submodule_search_locations[0]) / "training_args.py"
    return set(re.findall(r"^    (\w+): [^\n]*= field\($", source.read_text(encoding="utf-8"), re.MULTILINE)) | set(
        re.findall(r"^    (\w+): [^\n]*= field\(default", source.read_text(encoding="utf-8"), re.MULTILINE)
    )


def _check_model(recipe: Recipe, network: bool) -> Footprint | None:
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
        raise UserError(f"model.name_or_path: {model.name_or_path}: no such folder{_near(path)}")
    if network:
        _check_hub("model.name_or_path", model.name_or_path, model.revision, "config.json")
    return None


def _near(path: Path) -> str:
    near = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _no_model(path: Path) -> UserError:
    """The answer to a folder without a readable `config.json`."""
    if (path / "config.json").is_file():
        return UserError(f"model.name_or_path: {path / 'config.json'}: expected a JSON object, so this is no model folder")
    if (path / "adapter_config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        return UserError(
            f"model.name_or_path: {path} is an adapter, not a base model; give its base{f' ({base})' if base else ''} here"
            " and, to go on training it, `strategy: {name: lora, adapter: " + str(path) + "}`"
        )
    return UserError(f"model.name_or_path: {path} has no config.json, so it is no model folder")


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_folder(recipe: Recipe, path: Path) -> Footprint | None:
    model = recipe.model
    config = read_config(model)
    if config is None:
        raise _no_model(path)
    architectures = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder") or (architectures and architectures[0].endswith(NO_CAUSAL_LM)):
        raise UserError(
            f"model.name_or_path: {path} is a {architectures[0] if architectures else config.get('model_type')}, which is no "
            "causal LM; expected a decoder, whose architecture ends in ForCausalLM or LMHeadModel"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.name_or_path: {path} holds no weights (*.safetensors); the download may be incomplete")
    _check_weights(path)
    if recipe.model.add_tokens or not (shapes := read_shapes(path)):
        return None
    with _about("strategy"):
        return recipe.strategy.footprint(shapes, tied=bool(config.get("tie_word_embeddings", False)))


def _check_weights(folder: Path) -> None:
    """Refuse safetensors files that a download left out or cut short."""
    listed = _json(folder / "model.safetensors.index.json").get("weight_map", {})
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


def _check_tokenizer(model: Model, network: bool) -> None:
    if model.tokenizer is None:
        folder = Path(model.name_or_path).expanduser()
        if folder.is_dir() and not _has_tokenizer(folder):
            raise UserError(f"model.name_or_path: {folder} holds no tokenizer; name one by model.tokenizer")
        return
    path = Path(model.tokenizer).expanduser()
    name = f"model.tokenizer: {model.tokenizer}"
    if path.is_file():
        raise UserError(f"{name} is a file; expected a folder or a Hub id")
    if path.is_dir():
        if not _has_tokenizer(path):
            raise UserError(f"{name} holds no tokenizer, such as tokenizer.json")
    elif model.tokenizer.startswith(("/", ".", "~")) or model.tokenizer.count("/") > 1:
        raise UserError(f"{name}: no such folder{_near(path)}")
    elif network:
        _check_hub("model.tokenizer", model.tokenizer, None, "tokenizer_config.json")


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*token*", "vocab*", "*.model"))


def _check_adapter(recipe: Recipe) -> None:
    """An adapter to go on from that is named by a path has to be there."""
    adapter = getattr(recipe.strategy, "adapter", None)
    if adapter is None:
        return
    path = Path(adapter).expanduser()
    if not path.exists() and (adapter.startswith(("/", ".", "~")) or adapter.count("/") > 1):
        raise UserError(f"strategy.adapter: {adapter}: no such folder{_near(path)}")
    if (path / "adapter_config.json").is_file() and not _json(path / "adapter_config.json"):
        raise UserError(
            f"strategy.adapter: {path / 'adapter_config.json'} is no JSON object; give the folder of a PEFT adapter"
        )
    check_adapter(adapter)


def _check_hub(key: str, source: str, revision: str | None, file: str) -> None:
    """Ask the Hub, once and briefly, whether the model is there: retries would take a minute to say no."""
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    name, near = f"{key}: {source}", _near(Path(source))
    try:
        if isinstance(try_to_load_from_cache(source, file, revision=revision), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name}: no such folder here{near}, and not in the Hub cache, and HF_HUB_OFFLINE is set; "
                "give a local folder, or unset it to download"
            )
        info = HfApi().model_info(source, revision=revision, timeout=HUB_TIMEOUT)
        if info.gated and not info.siblings:
            raise UserError(f"{name}: gated; ask for access on its page and run `hf auth login`")
    except errors.GatedRepoError:
        raise UserError(f"{name}: gated; ask for access on its page and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: {source} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such folder here{near}, and no such model on the Hub (or it is private: run `hf auth login`)"
        ) from None
    except (errors.HFValidationError, ValueError) as error:
        raise UserError(f"{name}: no such folder here{near}, and no valid Hub id: {str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except Exception as error:  # the transport has many ways to fail
        raise UserError(
            f"{name}: no such folder here{near}, and the Hub cannot be reached ({type(error).__name__}); "
            "give a local folder, or set HF_HUB_OFFLINE=1 to use the cache"
        ) from None


def check_output(recipe: Recipe, overwrite: bool) -> None:
    """Refuse an output folder that is somebody else's, or holds a finished run.

    Raises:
        UserError: what is in the way, and how to go on.
    """
    folder = Path(recipe.output_dir).expanduser()
    if folder.is_file():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        if parent.is_file():
            raise UserError(f"output_dir: {folder}: {parent} is a file, so no folder can be made in it; name another folder")
        if not os.access(parent, os.W_OK):
            raise UserError(f"output_dir: {folder}: no permission to write in {parent}")
        return
    if not is_run(folder):
        raise UserError(f"output_dir: {folder} is in use by something that is no run of hfstrat; name another folder")
    if overwrite:
        return
    if (folder / "report.json").is_file():
        report = _json(folder / "report.json")
        if not report:
            raise UserError(
                f"output_dir: {folder / 'report.json'} is no valid JSON, so nobody knows whether this run came to its end; "
                "name another folder, or run with --overwrite to replace it"
            )
        if report.get("result", {}).get("status") == "done":
            raise UserError(
                f"output_dir: {folder} holds a finished run; name another folder, or run with --overwrite to replace it"
            )
    if recipe.training.resume == "never" and checkpoints.all_checkpoints(folder):
        raise UserError(
            f"output_dir: {folder} holds checkpoints of an earlier run; `training.resume=auto` goes on from them, "
            "--overwrite replaces them"
        )
    with _about("output_dir"):
        checkpoints.find_resume(folder, recipe.training.resume, recipe.model_dump())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of ours: only such a one is ever deleted."""
    return any((folder / name).is_file() for name in OURS)


def _check_disk(recipe: Recipe, footprint: Footprint | None) -> None:
    if footprint is None:
        return
    folder = Path(recipe.output_dir).expanduser().absolute()
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    need = recipe.strategy.checkpoint_bytes(footprint) + SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < need:
        raise UserError(
            f"output_dir: {folder}: one checkpoint needs {need / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; "
            "free some room or name a folder on another disk"
        )
