"""Loading a finished model for inference: one loader for whoever uses, measures, verifies or merges it.

A result is a complete model, a PEFT adapter or a pooled classifier of sentence-transformers. It is loaded as it was trained
(quantized or not) or in another form, and placed on one GPU, on several, or on the CPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, get_args

from hfstrat.errors import ARTIFACT, OUT_OF_MEMORY, RunError, UserError, first_line, quiet_libraries
from hfstrat.models.check import is_quantized_already
from hfstrat.recipe.section import Form, Quantization, Shapes
from hfstrat.tasks import TASKS, sentence_transformers, task_of_files
from hfstrat.tasks.base import Task
from hfstrat.tasks.report import Report, read

PROBE_TEXT = "Once upon a time a model learned from text. def add(a, b):\n    return a + b\nThe capital of France is"
FORMS = ("recorded", "none", *get_args(Form))
KEY = "--quantization"
SHARE = 0.9  # of the free memory that weights may take: a forward pass needs the rest

# checks of a command's arguments, before torch


def resolve(target: str) -> tuple[str, Report | None]:
    """The folder or Hub id to load, and the run's report where `target` is a run.

    Raises:
        UserError: the run has no result yet, or there is no model at this path.
    """
    folder = Path(target).expanduser()
    if (folder / "final").is_dir():
        return str(folder / "final"), read(folder)
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{target}: this run has no result yet; `hfstrat train` with its recipe resumes it")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{target}: this folder holds no model and no adapter (no config.json, no adapter_config.json)")
    if not folder.exists() and (target.startswith((".", "/", "~")) or target.count("/") != 1):
        raise UserError(f"{target}: no such folder; expected a run's folder, a model folder or a Hub id")
    return target, read(folder.parent) if folder.name == "final" else None


def task_of(target: str) -> Task:
    """The task of a finished model: that of its run, else the one that its own files name."""
    folder, report = resolve(target)
    return TASKS[report.run.recipe.task] if report else task_of_files(folder)


def check_task(target: str, names: tuple[str, ...], instead: str) -> None:
    """Raises UserError, with the command to use instead, where a finished model is for another task than these."""
    if task_of(target).name not in names:
        raise UserError(f"{target}: {instead}")


def check_output(output: Path | None) -> None:
    """Raises UserError for a file that exists already, or whose folder does not exist."""
    if output and output.exists():
        raise UserError(f"{output} exists already; name another file")
    if output and not output.absolute().parent.is_dir():
        raise UserError(f"{output}: the folder {output.parent} does not exist; create it, or name another file")


@contextmanager
def written(output: Path) -> Iterator[IO[str]]:
    """A new text file, which gets its name when it is complete: if writing fails, nothing is left behind."""
    partial = output.with_name(f".{output.name}.partial{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def check(form: str, folder: str, recorded: dict[str, Any] | None) -> None:
    """Refuse a form in which this model cannot be loaded, before torch.

    Args:
        recorded: bitsandbytes' settings of the base in training, None where it was not quantized.
    """
    if form not in FORMS:
        raise UserError(f"{KEY}: {form}: expected one of {', '.join(FORMS)}")
    already = is_quantized_already(folder)
    needed = form not in ("recorded", "none") or already or (form == "recorded" and bool(recorded))
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        instead = f", or {KEY} none" if recorded else ""
        raise UserError(f"{folder}: its quantized form needs bitsandbytes: pip install 'hfstrat[quantization]'{instead}")
    if form in ("recorded", "none"):
        return
    if sentence_transformers.is_one(folder):
        raise UserError(
            f"{KEY}: {form}: {folder} has the format of sentence-transformers, which cannot be quantized; remove it"
        )
    if already:
        raise UserError(f"{KEY}: {form}: {folder} is already saved quantized; remove it, or give none to dequantize it")


# loading


def load(
    target: str, form: str = "recorded", dtype: str | None = None, spreads: bool = False, widened: bool = False
) -> tuple[Any, Any, Report | None]:
    """Model, tokenizer and the report of the run, for inference on this machine's device.

    Args:
        form: recorded, as it was trained: on a quantized base, if it was; none, without quantization; int8, nf4 or fp4.
        dtype: as `model.dtype`, or checkpoint for that of the stored weights; None: that of the run's recipe; without a run
            auto, or checkpoint for a regression.
        spreads, widened: as for `placed`.

    Raises:
        UserError: it cannot be loaded (in this form).
        RunError: a GPU has too little memory for it.
    """
    folder, report = resolve(target)
    reload = report.reload if report else {}
    check(form, folder, reload.get("quantization"))
    quiet_libraries()
    import torch

    from hfstrat.models.load import compute_dtype, source_of

    section, task = report.run.recipe.model if report else None, task_of(target)
    if section is None and not task.metrics.of_distributions:
        dtype = dtype or "checkpoint"  # 16 bits would round numbers
    wanted = dtype or (section.dtype if section else "auto")
    source, options = source_of(section) if section else (folder, {})
    if section and section.attn_implementation != "auto":
        options["attn_implementation"] = section.attn_implementation
    options |= {"source": source, "task": task.name, **reload}
    try:
        weights: Any = "auto" if wanted == "checkpoint" else compute_dtype(wanted)
        model = placed(load_artifact(folder, weights, options, form), spreads, widened)
        task.model.ready(inner_of(model))
        tokenizer = task.rows.load_trained(folder, report.run.recipe if report else None)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise no_room(target) from error
    except Exception as error:
        here = "" if Path(folder).exists() else "no such folder here, and "
        raise UserError(f"{target}: {here}it cannot be loaded: {first_line(error)}") from error
    return model.eval(), tokenizer, report


def load_artifact(folder: str, dtype: Any, options: dict[str, Any], form: str = "recorded") -> Any:
    """A run's result, loaded by plain transformers (a complete model), peft (an adapter) or sentence-transformers.

    An adapter on a quantized base is what `AutoPeftModelForCausalLM.from_pretrained(folder, dtype=...,
    quantization_config=BitsAndBytesConfig(**report["result"]["reload"]["quantization"]))` loads.

    Args:
        folder: of the result, or a Hub id.
        dtype: of what is not quantized.
        options: the `task`; `source` and `gguf_file` of an adapter's base; `quantization` (keywords of BitsAndBytesConfig) with
            `dtype`, as they were in training; `attn_implementation` and `trust_remote_code`.
        form: one of FORMS.

    Raises:
        RunError: it lacks weights, which transformers would initialize at random.
    """
    from hfstrat.models.quantization import dequantize, prevent_repacking

    if sentence_transformers.is_one(folder):
        return sentence_transformers.load(folder)  # in float32, as its config says: in 16 bits its head would be rounded
    is_adapter = (Path(folder) / "adapter_config.json").is_file()
    model = (_load_adapter if is_adapter else _load_complete)(folder, dtype, options, form)
    if form == "none" and is_quantized_already(folder):
        dequantize(model, dtype)
    prevent_repacking(model)
    return model


def _load_complete(folder: str, dtype: Any, options: dict[str, Any], form: str) -> Any:
    from hfstrat.models import quantization

    auto, keep = _auto_class(options), _kept(options)
    settings, how = keep | {"dtype": dtype}, None
    if form not in ("recorded", "none"):
        how = _quantization(form, auto, folder, keep, dtype)
        settings = keep | how.options
    model, info = auto.from_pretrained(folder, output_loading_info=True, **settings)
    if missing := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise RunError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more weights", ARTIFACT)
    if how is not None:
        print(quantization.finalize(model, how, trains_itself=False)["line"])
    return model


def _load_adapter(folder: str, dtype: Any, options: dict[str, Any], form: str) -> Any:
    """An adapter on its base, which gets as many embeddings as the adapter's tokenizer has tokens."""
    import transformers
    from peft import PeftConfig, PeftModel

    from hfstrat.models.load import cast_weights
    from hfstrat.models.virtual_tokens import align

    auto, adapter, keep = _auto_class(options), PeftConfig.from_pretrained(folder), _kept(options)
    source, special = adapter.base_model_name_or_path, _task(options).model.load_options(folder)
    settings, is_quantized = keep | {"dtype": dtype}, True
    if form == "recorded" and options.get("quantization"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports its casts at every call
        settings |= {"dtype": _dtype_named(options["dtype"])}
        settings["quantization_config"] = transformers.BitsAndBytesConfig(**options["quantization"])
    elif form not in ("recorded", "none"):
        whole = set(getattr(adapter, "modules_to_save", None) or [])
        config = special.get("config")
        settings = keep | _quantization(form, auto, source, keep, dtype, config, adapter.revision, whole).options
    else:
        is_quantized = False
        if options.get("gguf_file"):  # peft finds an adapter's base only as a folder
            source, settings["gguf_file"] = options["source"], options["gguf_file"]
            settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    base = auto.from_pretrained(source, revision=adapter.revision, **settings, **special)
    if is_quantized:
        cast_weights(base, dtype)
    if (Path(folder) / "tokenizer_config.json").is_file():
        tokens = len(transformers.AutoTokenizer.from_pretrained(folder))
        if tokens > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(tokens)
    with warnings.catch_warnings():  # a head that the base lacks is random: the adapter has to hold all of it
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return align(PeftModel.from_pretrained(base, folder))


def _quantization(
    form: str,
    auto: Any,
    source: str,
    keep: dict[str, Any],
    dtype: Any,
    config: Any = None,
    revision: str | None = None,
    whole: set[str] | None = None,
) -> Any:
    """How a model is quantized while it is read; modules in `whole` stay as they are, since an adapter replaces them."""
    import transformers

    from hfstrat.models import quantization

    remote = bool(keep.get("trust_remote_code"))
    config = config or transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=remote)

    def replaced(shapes: Shapes, tied: bool) -> frozenset[str]:
        return frozenset(name for name in shapes if whole and whole & set(name.split(".")))

    section = Quantization.model_validate({"name": form})
    return quantization.loading_options(section, KEY, auto, config, remote, dtype, replaced)


def _task(options: dict[str, Any]) -> Task:
    return TASKS[options.get("task", "causal-lm")]


def _auto_class(options: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, _task(options).model.auto_class)


def _kept(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("attn_implementation", "trust_remote_code")}


def _dtype_named(name: str) -> Any:
    import torch

    return name if name == "auto" else getattr(torch, name)


# placement


def choose(needed: int, free: int | None, spreads: bool) -> str:
    """One of cuda, spread (over the GPUs, and what is left on the CPU) and cpu.

    Args:
        needed: bytes of the weights.
        free: bytes of the GPU; None without a GPU.
        spreads: whether the layers may be on different devices.
    """
    if free is None:
        return "cpu"
    if needed <= SHARE * free:
        return "cuda"
    return "spread" if spreads else "cpu"


def placed(model: Any, spreads: bool = False, widened: bool = False) -> Any:
    """The model on a device with enough memory; prints a line to stderr if there is a GPU, but not this one alone is used.

    Args:
        model: loaded, on the CPU; one that bitsandbytes quantized is on the GPU already, and stays there.
        spreads: whether only forward passes are needed, for which layers may be on different devices.
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
    placement = "its layers are distributed" if where == "spread" else "it runs on the CPU, which is slow"
    print(
        f"the weights take {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB free: {placement}",
        file=sys.stderr,
        flush=True,
    )
    return spread(model, needed) if where == "spread" else model


def spread(model: Any, needed: int) -> Any:
    """Distribute the layers over all GPUs, the rest on the CPU, by accelerate; in place."""
    import torch
    from accelerate import dispatch_model, infer_auto_device_map

    inner = inner_of(model)
    room: dict[Any, Any] = {i: int(SHARE * torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count())}
    room["cpu"] = 2 * needed  # where it is now
    places = infer_auto_device_map(inner, max_memory=room, no_split_module_classes=list(inner._no_split_modules))
    dispatch_model(inner, places, skip_keys=getattr(inner, "_skip_keys_device_placement", None))
    return model


def inner_of(model: Any) -> Any:
    """The transformers model in a PEFT model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def no_room(target: str) -> RunError:
    """The error where a GPU's memory runs out although it seemed enough, or bitsandbytes had to use the GPU."""
    return RunError(
        f"{target}: the GPU has too little memory for it. Try --quantization nf4 (generate, chat, predict, evaluate), which "
        "needs a quarter of 16 bits, or CUDA_VISIBLE_DEVICES= before the command, which runs it on the CPU",
        OUT_OF_MEMORY,
    )
