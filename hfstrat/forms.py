"""In which form a finished run is loaded: as it was trained (quantized or not), or in another one."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any, get_args

from hfstrat.errors import UserError
from hfstrat.strategies.quantization_section import Form, Quantization, is_quantized_already

FORMS = ("recorded", "none", *get_args(Form))
KEY = "--quantization"


def check(form: str, folder: str, recorded: dict[str, Any] | None) -> None:
    """Refuse a form that there is not, before torch. `recorded` is what the report holds of a quantized base."""
    from hfstrat.probing import sentence

    if form not in FORMS:
        raise UserError(f"{KEY}: {form}: expected one of {', '.join(FORMS)}")
    already = is_quantized_already(folder)
    needed = form not in ("recorded", "none") or already or (form == "recorded" and bool(recorded))
    if needed and importlib.util.find_spec("bitsandbytes") is None:
        cure = f", or {KEY} none" if recorded else ""
        raise UserError(f"{folder}: its quantized form needs bitsandbytes: pip install 'hfstrat[quantization]'{cure}")
    if form in ("recorded", "none"):
        return
    if sentence.is_one(folder):
        raise UserError(f"{KEY}: {form}: {folder} has the form of sentence-transformers, which is loaded as it is; remove it")
    if already:
        raise UserError(f"{KEY}: {form}: {folder} is saved quantized already; remove it, or give none to dequantize it")


def load(folder: str, dtype: Any, options: dict[str, Any], form: str = "recorded") -> Any:
    """A run's result.

    Args:
        folder: of the result, or a Hub id.
        dtype: of what is not quantized.
        options: as for `verify.load_artefact`.
        form: one of FORMS; recorded is that which it was trained in.
    """
    from hfstrat.verify import load_artefact

    if form == "recorded":
        return load_artefact(folder, dtype, options)
    plain = {key: value for key, value in options.items() if key not in ("quantization", "dtype")}
    if form == "none":
        model = load_artefact(folder, dtype, plain)
        if is_quantized_already(folder):
            from hfstrat.quantization import dequantize

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

    from hfstrat import quantization, quantizing
    from hfstrat.model import cast_weights
    from hfstrat.tasks import TASKS, CausalLM

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

        keep |= quantizing.wanted(options["section"], KEY, auto, config, remote, dtype, learns).options
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

    from hfstrat import quantizing
    from hfstrat.tasks import TASKS, CausalLM

    auto = getattr(transformers, TASKS[options.get("task", CausalLM.name)].auto_class)
    keep = {k: v for k, v in options.items() if k in ("attn_implementation", "trust_remote_code")}
    remote = bool(keep.get("trust_remote_code"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    how = quantizing.wanted(section, KEY, auto, config, remote, dtype)
    model = auto.from_pretrained(folder, **keep, **how.options)
    print(quantizing.settle(model, how, trains_itself=False)["line"])
    return model
