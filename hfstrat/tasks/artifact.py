"""Where a loaded model answers: on a GPU that has room for it, on several together, or on the CPU.

In which form a finished run is loaded: as it was trained (quantized or not), or in another one."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hfstrat import errors
from hfstrat.errors import OUT_OF_MEMORY, RunError, UserError, quiet_libraries
from hfstrat.models.quantized_size import is_quantized_already
from hfstrat.recipe.quantization import Form, Quantization
from hfstrat.tasks import of_artifact, sentence_transformers
from hfstrat.tasks.base import Task
from hfstrat.tasks.causal_lm import CausalLM
from hfstrat.tasks.report import Report, read

if TYPE_CHECKING:
    pass


SHARE = 0.9  # of the free memory that weights may take: a forward pass needs the rest


def choose(needed: int, free: int | None, spreads: bool) -> str:
    """One of cuda, spread (over the GPUs, and what is left on the CPU) and cpu.

    Args:
        needed: bytes of the weights.
        free: bytes of the GPU; None where there is none.
        spreads: whether the model may be in pieces.
    """
    if free is None:
        return "cpu"
    if needed <= SHARE * free:
        return "cuda"
    return "spread" if spreads else "cpu"


def placed(model: Any, spreads: bool = False, widened: bool = False) -> Any:
    """The model where there is room for it; says so where that is not one GPU, although there is one.

    Args:
        model: loaded, on the CPU; one that bitsandbytes quantized is on the GPU already, and stays there.
        spreads: whether forward passes are all that is wanted, which can be done in pieces.
        widened: whether it will be in float32, as for merging.
    """
    import torch

    from hfstrat.models.quantization import bytes_in_memory

    if not torch.cuda.is_available() or next(model.parameters()).device.type == "cuda":
        return model
    torch.cuda.empty_cache()  # of a model before this one
    needed = 4 * sum(p.numel() for p in model.parameters()) if widened else bytes_in_memory(model)
    free = torch.cuda.mem_get_info()[0]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    where = choose(needed, free, spreads and alone and bool(getattr(inner_of(model), "_no_split_modules", None)))
    if where == "cuda":
        return model.to("cuda")
    kind = "its layers are shared out" if where == "spread" else "it runs on the CPU, which is slow"
    print(f"the weights take {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB free: {kind}", file=sys.stderr, flush=True)
    return spread(model, needed) if where == "spread" else model


def spread(model: Any, needed: int) -> Any:
    """Layers on all GPUs, those that are left on the CPU, by accelerate; in place."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map

    inner = inner_of(model)
    room: dict[Any, Any] = {i: int(SHARE * torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count())}
    room["cpu"] = 2 * needed  # where it is now
    places = infer_auto_device_map(inner, max_memory=room, no_split_module_classes=list(inner._no_split_modules))
    dispatch_model(inner, places, skip_keys=getattr(inner, "_skip_keys_device_placement", None))
    return model


def inner_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def no_room(target: str) -> RunError:
    """What is said where a GPU's memory runs out although it seemed to be enough, or bitsandbytes had to put it there."""
    return RunError(
        f"{target}: the GPU has no room for it. What would work: --quantization nf4 (generate, chat, predict, evaluate), which "
        "takes a quarter of 16 bits; CUDA_VISIBLE_DEVICES= before the command, which runs it on the CPU",
        OUT_OF_MEMORY,
    )


FORMS = ("recorded", "none", *get_args(Form))


KEY = "--quantization"


def check(form: str, folder: str, recorded: dict[str, Any] | None) -> None:
    """Refuse a form that there is not, before torch. `recorded` is what the report holds of a quantized base."""
    from hfstrat.tasks import sentence_transformers

    if form not in FORMS:
        raise UserError(f"{KEY}: {form}: expected one of {', '.join(FORMS)}")
    already = is_quantized_already(folder)
    needed = form not in ("recorded", "none") or already or (form == "recorded" and bool(recorded))
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        cure = f", or {KEY} none" if recorded else ""
        raise UserError(f"{folder}: its quantized form needs bitsandbytes: pip install 'hfstrat[quantization]'{cure}")
    if form in ("recorded", "none"):
        return
    if sentence_transformers.is_one(folder):
        raise UserError(f"{KEY}: {form}: {folder} has the form of sentence-transformers, which is loaded as it is; remove it")
    if already:
        raise UserError(f"{KEY}: {form}: {folder} is saved quantized already; remove it, or give none to dequantize it")


def load_form(folder: str, dtype: Any, options: dict[str, Any], form: str = "recorded") -> Any:
    """A run's result.

    Args:
        folder: of the result, or a Hub id.
        dtype: of what is not quantized.
        options: as for `verify.load_artefact`.
        form: one of FORMS; recorded is that which it was trained in.
    """

    if form == "recorded":
        return load_artefact(folder, dtype, options)
    plain = {key: value for key, value in options.items() if key not in ("quantization", "dtype")}
    if form == "none":
        model = load_artefact(folder, dtype, plain)
        if is_quantized_already(folder):
            from hfstrat.models.quantization import dequantize

            dequantize(model, dtype)
        return model
    section = Quantization.model_validate({"name": form})
    if (Path(folder) / "adapter_config.json").is_file():
        return on_quantized(folder, dtype, plain | {"section": section})
    return _quantized(folder, section, dtype, plain)


def on_quantized(folder: str, dtype: Any, options: dict[str, Any]) -> Any:
    """An adapter on its base, which is quantized as it was in training (or as `options["section"]` says).

    Plain peft does the same with `AutoPeftModelForCausalLM.from_pretrained(folder, dtype=...,
    quantization_config=BitsAndBytesConfig(**report["result"]["reload"]["quantization"]))`.
    """
    import logging

    import torch
    import transformers
    from peft import PeftConfig, PeftModel

    from hfstrat.models import quantization
    from hfstrat.models.load import cast_weights
    from hfstrat.tasks import TASKS

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of its casts at every call
    task = TASKS[options.get("task", CausalLM.name)]
    auto = getattr(transformers, task.auto_class)
    adapter = PeftConfig.from_pretrained(folder)
    source, special = adapter.base_model_name_or_path, task.load_options(folder)
    keep = {k: v for k, v in options.items() if k in ("attn_implementation", "trust_remote_code")}
    remote = bool(keep.get("trust_remote_code"))
    if "section" in options:
        config = special.get("config") or transformers.AutoConfig.from_pretrained(
            source, revision=adapter.revision, trust_remote_code=remote
        )
        whole = set(getattr(adapter, "modules_to_save", None) or [])

        def learns(names: list[str], tied: bool) -> set[str]:
            return {name for name in names if whole & set(name.split("."))}

        keep |= quantization.wanted(options["section"], KEY, auto, config, remote, dtype, learns).options
    else:
        recorded = options["dtype"]
        keep["dtype"] = recorded if recorded == "auto" else getattr(torch, recorded)
        keep["quantization_config"] = transformers.BitsAndBytesConfig(**options["quantization"])
    base = auto.from_pretrained(source, revision=adapter.revision, **keep, **special)
    quantization.steady(base)
    cast_weights(base, dtype)
    words = len(transformers.AutoTokenizer.from_pretrained(folder))
    if words > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(words)
    with warnings.catch_warnings():  # the adapter has to bring all of a head that is made up
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, folder)


def _quantized(folder: str, section: Quantization, dtype: Any, options: dict[str, Any]) -> Any:
    """A whole model that was saved in 16 or 32 bits."""
    import transformers

    from hfstrat.models import quantization
    from hfstrat.tasks import TASKS

    auto = getattr(transformers, TASKS[options.get("task", CausalLM.name)].auto_class)
    keep = {k: v for k, v in options.items() if k in ("attn_implementation", "trust_remote_code")}
    remote = bool(keep.get("trust_remote_code"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    how = quantization.wanted(section, KEY, auto, config, remote, dtype)
    model = auto.from_pretrained(folder, **keep, **how.options)
    print(quantization.settle(model, how, trains_itself=False)["line"])
    return model


PROBE_TEXT = "Once upon a time a model learnt from text. def add(a, b):\n    return a + b\nThe capital of France is"


def resolve(target: str) -> tuple[str, Report | None]:
    """The folder or Hub id to load, and the run's report where `target` is a run.

    Raises:
        UserError: a run without a result, or a path where there is nothing.
    """
    folder = Path(target).expanduser()
    if (folder / "final").is_dir():
        return str(folder / "final"), read(folder)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{target}: this run has no result yet; `hfstrat train` with its recipe goes on")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{target}: this folder holds no model and no adapter (no config.json, no adapter_config.json)")
    if not folder.exists() and (target.startswith((".", "/", "~")) or target.count("/") != 1):
        raise UserError(f"{target}: no such folder; expected a run's folder, a model folder or a Hub id")
    return target, read(folder.parent) if folder.name == "final" else None


def load(
    target: str, form: str = "recorded", dtype: str | None = None, spreads: bool = False, widened: bool = False
) -> tuple[Any, Any, Report | None]:
    """Model, tokenizer and the report behind them, for inference on this machine's device.

    Args:
        form: recorded, as it was trained: on a quantized base, if it was; none, without quantization; int8, nf4 or fp4.
        dtype: as `model.dtype`, or checkpoint for that of the stored weights; None: as the run's recipe says, or auto.
        spreads, widened: as for `placing.placed`.

    Raises:
        UserError: it cannot be loaded (so).
        RunError: a GPU has no room for it.
    """
    folder, report = resolve(target)
    reload = report.reload if report else {}
    check(form, folder, reload.get("quantization"))
    quiet_libraries()
    import torch
    from transformers import AutoTokenizer

    from hfstrat.models.load import compute_dtype, source_of

    section = report.run.recipe.model if report else None
    wanted = dtype or (section.dtype if section else "auto")
    source, options = source_of(section) if section else (folder, {})
    try:
        given = {"source": source, "task": of_artifact(folder, report).name, **options, **reload}
        weights: Any = "auto" if dtype == "checkpoint" else compute_dtype(wanted)
        model = placed(load_form(folder, weights, given, form), spreads, widened)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise no_room(target) from error
    except Exception as error:
        here = "" if Path(folder).exists() else "no such folder here, and "
        raise UserError(
            f"{target}: {here}it cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    return model.eval(), tokenizer, report


def check_output(output: Path | None) -> None:
    """Raises UserError for a file that is there already, or that has no folder to be in."""
    if output and output.exists():
        raise UserError(f"{output} exists already; name another file")
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.parent}; make it, or name another file")


def check_task(target: str, wanted: Task, instead: str) -> None:
    """Raises UserError where a saved model is for another task."""
    folder, report = resolve(target)
    if of_artifact(folder, report).name != wanted.name:
        raise UserError(f"{target}: {instead}")


def load_artefact(folder: str, dtype: Any, options: dict[str, Any]) -> Any:
    """A run's result by plain peft (an adapter) or plain transformers (a whole model).

    Raises:
        RunError: it lacks weights, which would be made up.
    """
    from hfstrat.models.quantization import steady

    model = _load_artefact(folder, dtype, options)
    steady(model)
    return model


def _load_artefact(folder: str, dtype: Any, options: dict[str, Any]) -> Any:
    import transformers

    from hfstrat.tasks import TASKS

    task = TASKS[options.get("task", CausalLM.name)]
    auto = getattr(transformers, task.auto_class)
    keep = {k: v for k, v in options.items() if k in ("attn_implementation", "trust_remote_code")}
    if sentence_transformers.is_one(folder):
        return sentence_transformers.load(folder)  # in float32, as its config says: in 16 bits its head would be rounded
    if not (Path(folder) / "adapter_config.json").is_file():
        model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **keep)
        if made_up := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
            raise errors.RunError(f"{folder} lacks {made_up[0]} and {len(made_up) - 1} more weights", errors.ARTEFACT)
        return model
    if options.get("quantization"):
        return on_quantized(folder, dtype, options)
    if options.get("gguf_file"):
        return _on_gguf(folder, dtype, {k: v for k, v in options.items() if k != "task"})
    import peft
    from peft import PeftConfig, PeftModel

    if not (special := task.load_options(folder)):
        by_itself = getattr(peft, task.auto_class.replace("AutoModel", "AutoPeftModel"))
        return by_itself.from_pretrained(folder, dtype=dtype, **keep)
    config = PeftConfig.from_pretrained(folder)
    base = auto.from_pretrained(config.base_model_name_or_path, revision=config.revision, dtype=dtype, **keep, **special)
    words = len(transformers.AutoTokenizer.from_pretrained(folder))
    if words > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(words)
    with warnings.catch_warnings():  # the base's head is made up, and the adapter has to bring all of it
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, folder)


def _on_gguf(folder: str, dtype: Any, options: dict[str, Any]) -> Any:
    """An adapter on a GGUF base, which is nothing that peft finds by itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    rest = {k: v for k, v in options.items() if k != "source"}
    base = AutoModelForCausalLM.from_pretrained(
        options["source"], dtype=dtype, quantization_config=GgufConfig(dequantize=True), **rest
    )
    words = len(AutoTokenizer.from_pretrained(folder))
    if words > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(words)
    return PeftModel.from_pretrained(base, folder)
