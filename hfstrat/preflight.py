"""What can be known to be wrong before torch is imported: files, folders, names, room on the disk."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from difflib import get_close_matches
from pathlib import Path

from hfstrat import checkpoints
from hfstrat.config import Model, Recipe
from hfstrat.data import formats, sources
from hfstrat.errors import UserError
from hfstrat.loading import Loaded
from hfstrat.model import read_config, read_shapes
from hfstrat.strategies import Footprint

HUB_TIMEOUT = 4  # seconds
NO_CAUSAL_LM = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
OURS = ("report.json", "recipe.yaml")  # files at the top of a run's folder
SPARE_BYTES = 64 * 2**20  # tokenizer, logs and the like


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
        check_output(recipe, overwrite)
        _check_disk(recipe, footprint)
    except UserError as error:
        raise UserError(_located(str(error), loaded)) from error.__cause__
    return footprint


def _located(message: str, loaded: Loaded) -> str:
    """The message with the file and line of the recipe key that it begins with."""
    match = re.match(r"([a-z_]+(?:\.[a-z_]+)*):", message)
    if not match:
        return message
    return f"{loaded.place(tuple(match.group(1).split('.')))}: {message}"


def _check_data(recipe: Recipe) -> None:
    data = recipe.data
    for source, key in ((data.train, "data.train"), (data.eval, "data.eval")):
        if source is None or (path := sources.local_file(source, key)) is None:
            continue
        columns = sources.columns_of(path)
        if columns is not None:
            renamed = formats.rename(columns, data.columns, source)
            formats.choose(data.format, renamed.values(), source)
    if recipe.evaluation.max_rows and data.eval is None and data.eval_split is None and data.eval_size >= 1:
        if recipe.evaluation.max_rows < data.eval_size:
            raise UserError(
                f"evaluation.max_rows: {recipe.evaluation.max_rows} is less than data.eval_size = {data.eval_size:g}, "
                "so rows would be held out for nothing; give one of them"
            )


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    if "8bit" in training.optim or "paged" in training.optim:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"training.optim: {training.optim} needs bitsandbytes: pip install 'hfstrat[quantization]'")
    if training.max_time and training.warmup_steps >= 1:
        raise UserError(
            "training.warmup_steps: with max_time nobody knows how many steps there will be; give a share below 1"
        )
    known = training_argument_names()
    for key in training.extra:
        if key in type(training).model_fields or key in ("seed", "output_dir"):
            raise UserError(f"training.extra: {key} is a key of the recipe itself; set it there")
        if known and key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"training.extra: {key} is no field of this transformers' TrainingArguments{hint}")
    if training.resume not in ("auto", "never"):
        checkpoints.find_resume(Path(recipe.output_dir), training.resume, recipe.model_dump())


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
        _check_hub(model)
    return None


def _near(path: Path) -> str:
    near = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _check_folder(recipe: Recipe, path: Path) -> Footprint | None:
    model = recipe.model
    config = read_config(model)
    if config is None:
        if (path / "adapter_config.json").is_file():
            base = json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
            raise UserError(
                f"model.name_or_path: {path} is an adapter, not a base model; give its base ({base}) here"
                " and, to go on training it, `strategy: {name: lora, adapter: " + str(path) + "}`"
            )
        raise UserError(f"model.name_or_path: {path} has no config.json, so it is no model folder")
    architectures = [str(name) for name in config.get("architectures") or []]
    if config.get("is_encoder_decoder") or (architectures and architectures[0].endswith(NO_CAUSAL_LM)):
        raise UserError(
            f"model.name_or_path: {path} is a {architectures[0] if architectures else config.get('model_type')}, which is no "
            "causal LM; expected a decoder, whose architecture ends in ForCausalLM or LMHeadModel"
        )
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise UserError(f"model.name_or_path: {path} holds no weights (*.safetensors); the download may be incomplete")
    if recipe.model.add_tokens or not (shapes := read_shapes(path)):
        return None
    return recipe.strategy.footprint(shapes, tied=bool(config.get("tie_word_embeddings", False)))


def _check_hub(model: Model) -> None:
    """Ask the Hub, once and briefly, whether the model is there: retries would take a minute to say no."""
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    name = f"model.name_or_path: {model.name_or_path}"
    if isinstance(try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision), str):
        return
    near = _near(Path(model.name_or_path))
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: no such folder here{near}, and not in the Hub cache, and HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(model.name_or_path, revision=model.revision, timeout=HUB_TIMEOUT)
        if info.gated and not info.siblings:
            raise UserError(f"{name}: gated; ask for access on its page and run `hf auth login`")
    except errors.GatedRepoError:
        raise UserError(f"{name}: gated; ask for access on its page and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: {model.name_or_path} has no revision {model.revision}") from None
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
        if not os.access(parent, os.W_OK):
            raise UserError(f"output_dir: {folder}: no permission to write in {parent}")
        return
    if not is_run(folder):
        raise UserError(f"output_dir: {folder} is in use by something that is no run of hfstrat; name another folder")
    if overwrite:
        return
    if (folder / "report.json").is_file():
        status = json.loads((folder / "report.json").read_text()).get("result", {}).get("status")
        if status == "done":
            raise UserError(
                f"output_dir: {folder} holds a finished run; name another folder, or run with --overwrite to replace it"
            )
    if recipe.training.resume == "never" and checkpoints.all_checkpoints(folder):
        raise UserError(
            f"output_dir: {folder} holds checkpoints of an earlier run; `training.resume=auto` goes on from them, "
            "--overwrite replaces them"
        )
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
