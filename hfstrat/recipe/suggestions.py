"""What to answer to a key or a value that a recipe cannot have.

What a value of a recipe is expected to be, in words, and what to write instead of one that it cannot have."""

from __future__ import annotations

import json
import types
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hfstrat.recipe.schema import STRATEGIES, Recipe

FOREIGN = {
    # other tools' names -> ours
    "strategy.r": "lora_rank lora_r rank adapter_rank",
    "strategy.dropout": "lora_dropout",
    "strategy.target_modules": "lora_target lora_target_modules lora_target_linear lora_modules target_linear",
    "strategy.modules_to_save": "lora_modules_to_save additional_target",
    "strategy.use_dora": "dora peft_use_dora",
    "strategy.use_rslora": "rslora peft_use_rslora",
    "strategy.init_lora_weights": "pissa_init peft_init_lora_weights init_weights",
    "strategy.adapter": "adapter_name_or_path lora_model_dir adapter_path",
    "strategy.last_n_layers": "freeze_trainable_layers num_layers_to_train last_n_blocks last_n",
    "strategy.patterns": "unfrozen_parameters freeze_trainable_modules trainable_params",
    "strategy.teacher": "teacher_model teacher_model_name_or_path teacher_name_or_path teacher_model_path",
    "strategy.temperature": "kd_temperature distill_temperature",
    "strategy.alpha": "lora_alpha kd_alpha kd_ratio lmbda",
    "strategy.loss": "beta kd_loss divergence distill_loss",
    "task": "task_type problem_type stage",
    "strategy.parameters": "num_parameters n_params model_size",
    "strategy.architecture": "model_type arch",
    "strategy.config": "config_overrides model_config overrides_of_model_config",
    "strategy.name": "finetuning_type method peft_type peft use_peft",
    "model.name_or_path": "base_model model_name_or_path model_name pretrained_model_name_or_path model_id checkpoint_path",
    "model.dtype": "torch_dtype bf16 fp16 tf32 precision mixed_precision compute_dtype",
    "model.attn_implementation": "flash_attention flash_attn use_flash_attention_2 flash_attention_2 sdpa_attention",
    "model.quantization": "quantization_config quantization_bit bits quant_type bnb_config",
    "model.quantization.name": "bnb_4bit_quant_type quantization_type",
    "model.quantization.double_quant": "bnb_4bit_use_double_quant double_quantization use_nested_quant",
    "model.quantization.compute_dtype": "bnb_4bit_compute_dtype",
    "model.quantization.skip_modules": "llm_int8_skip_modules modules_to_not_convert",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.add_tokens": "added_tokens new_special_tokens special_tokens add_special_tokens",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_dataset data_path dataset_dir data_files",
    "data.revision": "dataset_revision",
    "data.train.weight": "probability probabilities interleave_probs mixing_weights",
    "data.eval": "eval_dataset test_datasets validation_file val_file valid eval_file test_file",
    "data.eval_size": "val_size val_set_size test_size validation_split split_ratio",
    "data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_len seq_length context_length block_size",
    "data.format": "type dataset_format formatting prompt_style",
    "data.columns": "text_column label_column text_column_name label_column_name "
    "dataset_text_field text_field field_messages column_mapping",
    "data.template": "chat_template chat_template_path",
    "data.train_on": "train_on_inputs train_on_prompt mask_prompt completion_only_loss assistant_only_loss",
    "training.learning_rate": "lr max_lr peak_lr",
    "training.num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "training.max_steps": "steps num_steps total_steps num_train_steps max_iters",
    "training.max_time": "time_limit max_runtime timeout",
    "training.global_batch_size": "batch_size effective_batch_size total_batch_size train_batch_size "
    "gradient_accumulation_steps grad_accumulation_steps",
    "training.packing": "sample_packing packing_strategy neat_packing",
    "training.train_sampling_strategy": "group_by_length sampling_strategy",
    "training.per_device_train_batch_size": "micro_batch_size per_device_batch_size device_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "training.lr_scheduler_type": "lr_scheduler scheduler scheduler_type schedule",
    "training.warmup_steps": "warmup_ratio lr_warmup_steps num_warmup_steps warmup",
    "training.optim": "optimizer optim_type",
    "training.max_grad_norm": "gradient_clipping grad_clip max_norm clip_grad_norm",
    "training.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "training.eval_steps": "evals_per_epoch eval_strategy evaluation_strategy eval_interval val_interval do_eval",
    "training.save_steps": "saves_per_epoch save_strategy save_interval checkpoint_interval",
    "training.logging_steps": "log_interval logging_strategy log_every_n_steps",
    "training.resume": "resume_from_checkpoint auto_resume_from_checkpoints resume_from",
    "hub.repo": "hub_model_id hub_repo repo_id",
    "hub.push": "push_to_hub push_to_hub_model",
    "hub.private": "hub_private_repo",
    "output_dir": "out_dir save_dir output_path checkpoint_dir",
    "seed": "random_seed data_seed",
    "evaluation.max_new_tokens": "generation_max_new_tokens max_tokens",
}


OURS = {theirs: ours for ours, names in FOREIGN.items() for theirs in names.split()}


ELSEWHERE = {
    "overwrite_output_dir": "it is a flag: `hfstrat train RECIPE --overwrite`",
    "deepspeed": "how to distribute is not in the recipe: `hfstrat train RECIPE --accelerate-config NAME`",
    "fsdp": "how to distribute is not in the recipe: `hfstrat train RECIPE --accelerate-config NAME`",
    "num_processes": "how to distribute is not in the recipe: `hfstrat train RECIPE --num-processes N`",
    "load_in_4bit": "write `model: {name_or_path: ..., quantization: nf4}`",
    "load_in_8bit": "write `model: {name_or_path: ..., quantization: int8}`",
    **dict.fromkeys(("num_labels", "num_classes", "id2label", "label2id"), "labels are found in the training rows: remove it"),
    "wandb_project": "trackers are named in `training.report_to`",
}


IN_SHORT = {  # sections that may be given as one text
    "model": "a Hub id or a model folder, or a mapping with name_or_path",
    "strategy": f"one of {', '.join(STRATEGIES)}, or a mapping with name",
    "data": "a file, a folder or a Hub id, or a mapping with train",
}


def sections_of(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[type[BaseModel]]]:
    """Every section of the recipe by its path; `strategy` has several classes."""
    found: dict[tuple[str, ...], list[type[BaseModel]]] = {prefix: [model]}
    for name, field in model.model_fields.items():
        for cls in STRATEGIES.values() if name == "strategy" else _sections(field.annotation):
            for path, inner in sections_of(cls, (*prefix, name)).items():
                found.setdefault(path, []).extend(inner)
    return found


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may be, or that it is a list of."""
    if get_origin(annotation) is not None:
        return [section for one in get_args(annotation) for section in _sections(one)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def field_of(path: tuple[str, ...], strategy: str | None) -> FieldInfo | None:
    """The field that a dotted path means, if there is one."""
    for cls in sections_of(Recipe).get(path[:-1], []):
        if path[:-1] == ("strategy",) and strategy in STRATEGIES and cls is not STRATEGIES[strategy]:
            continue
        if path[-1] in cls.model_fields:
            return cls.model_fields[path[-1]]
    return None


def wanted(path: tuple[str, ...], strategy: str | None) -> str:
    """What the value at a dotted path is expected to be, in words."""
    if len(path) == 1 and path[0] in IN_SHORT:
        return IN_SHORT[path[0]]
    if field := field_of(path, strategy):
        return expected(field)
    mapping = field_of(path[:-1], strategy) if len(path) > 1 else None
    arguments = get_args(mapping.annotation) if mapping else ()
    return in_words(arguments[-1]) if arguments else "a mapping of keys"


def unknown_key(path: tuple[str, ...], strategy: str | None) -> str:
    """The answer to a key that does not exist where it stands: the nearest right name, and what is allowed."""
    key, parent = path[-1], tuple(part for part in path[:-1] if not part.isdigit())  # without places in a list
    classes = sections_of(Recipe).get(parent, [])
    if parent == ("strategy",) and strategy in STRATEGIES:
        classes = [STRATEGIES[strategy]]
    allowed = sorted({name for cls in classes for name in cls.model_fields})
    place = f"'{'.'.join(parent)}'" if parent else "a recipe"
    if parent == ("strategy",) and strategy in STRATEGIES:
        place = f"strategy {strategy}"
    return f"no such key in {place}; {_nearest(key, parent, strategy, allowed)} (allowed: {', '.join(allowed)})"


def _nearest(key: str, parent: tuple[str, ...], strategy: str | None, allowed: list[str]) -> str:
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    if near := get_close_matches(key, allowed, n=1, cutoff=0.8):
        return f"did you mean '{near[0]}'?"
    owners = [name for name, cls in STRATEGIES.items() if key in cls.model_fields and name != strategy]
    if parent == ("strategy",) and owners:
        return f"it belongs to strategy {' and '.join(owners)}"
    if (homes := _homes(key)) and parent not in homes:
        return f"did you mean '{'.'.join((*homes[0], key))}'?"
    if key in OURS:
        return f"hfstrat calls it '{OURS[key]}'"
    if near := get_close_matches(key, allowed, n=1, cutoff=0.6):
        return f"did you mean '{near[0]}'?"
    sections = reversed(sections_of(Recipe).items())  # an outer section's key comes before an inner one's
    everywhere = {name: path for path, classes in sections for cls in classes for name in cls.model_fields}
    if near := get_close_matches(key, [*everywhere, *OURS], n=1, cutoff=0.75):
        return f"did you mean '{OURS.get(near[0]) or '.'.join((*everywhere[near[0]], near[0]))}'?"
    return "`hfstrat schema` lists every key; other TrainingArguments go under training.extra"


def _homes(key: str) -> list[tuple[str, ...]]:
    return [path for path, classes in sections_of(Recipe).items() if any(key in cls.model_fields for cls in classes)]


SWITCHES = {"true": "true", "on": "true", "yes": "true", "false": "false", "off": "false", "no": "false"}


def expected(field: FieldInfo) -> str:
    """What a field takes, in words."""
    limits = {type(item).__name__: item for item in field.metadata}
    text = in_words(field.annotation)
    if "MinLen" in limits:
        text += " that is not empty"
    for kind, attribute, words in (
        ("Ge", "ge", "at least"),
        ("Gt", "gt", "more than"),
        ("Le", "le", "at most"),
        ("Lt", "lt", "less than"),
    ):
        if kind in limits:
            text += f", {words} {getattr(limits[kind], attribute)}"
    return text


def instead(value: Any, kinds: set[str], field: FieldInfo | None) -> str:
    """What to write in place of a value that pydantic did not accept for these reasons; empty where nobody knows."""
    if value is None:
        return "remove the key to get its default" if field is None or not field.is_required() else ""
    if value == -1 and field is not None and field.default is None:
        return "remove the key to set none"
    if isinstance(value, str):
        return _for_text(value, kinds, field)
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if "string_type" in kinds and isinstance(value, int | float):
        return f'put it in quotes: "{json.dumps(value)}"'
    return ""


def _for_text(value: str, kinds: set[str], field: FieldInfo | None) -> str:
    if "bool_type" in kinds and value.lower() in SWITCHES:
        return f"write {SWITCHES[value.lower()]}, without quotes"
    if kinds & {"int_type", "float_type"} and (number := _number(value)):
        return number
    if "literal_error" in kinds and field is not None and (near := nearest(value, _choices(field.annotation))):
        return f"did you mean '{near}'?"
    return f"write a list: [{value}]" if "list_type" in kinds else ""


def nearest(value: str, choices: list[str]) -> str | None:
    """The choice that was meant: one that begins like it, or is spelt much like it."""
    value = value.lower()
    longer = [choice for choice in choices if len(value) > 2 and choice.startswith(value)]
    return next(iter(longer or get_close_matches(value, choices, n=1, cutoff=0.5)), None)


def _choices(annotation: Any) -> list[str]:
    options = [annotation, *get_args(annotation)]
    return [str(arg) for option in options if get_origin(option) is Literal for arg in get_args(option)]


def _number(text: str) -> str:
    """How a text that looks like a number is written as one."""
    bare = text.strip().replace("_", "").replace(",", "")
    try:
        number = float(bare.removesuffix("%"))
    except ValueError:
        return ""
    if bare.endswith("%"):
        return f"write {number / 100:g}"
    return "it is quoted: remove the quotes" if bare == text else f"write {bare}"


def in_words(annotation: Any) -> str:
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        kept = [arg for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return " or ".join(in_words(arg) for arg in kept)
    if origin is list:
        return f"a list, each {in_words(args[0])}"
    if origin is dict:
        return "a mapping"
    return "a mapping of keys"
