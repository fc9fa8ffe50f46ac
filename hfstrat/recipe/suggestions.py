"""Answers to a key or a value that a recipe cannot have: the name that hfstrat uses, and what to write.

`FOREIGN` renames: the value stays as it is. `EXPLAINED` is for keys whose value has to change too, or that have no
counterpart; `VALUES` for the values of another tool under a key that exists here.
"""

from __future__ import annotations

import json
import types
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hfstrat.recipe import renamed
from hfstrat.recipe.schema import STRATEGIES, Recipe

FOREIGN = {
    # the name here: names in other tools
    "strategy.r": "lora_rank lora_r rank adapter_rank",
    "strategy.lora_dropout": "adapter_dropout",
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
    "strategy.teacher_weight": "kd_alpha kd_ratio kd_weight",
    "strategy.divergence": "kd_loss distill_loss",
    "strategy.parameters": "num_parameters n_params model_size",
    "strategy.model_type": "arch",
    "strategy.config": "config_overrides model_config overrides_of_model_config",
    "strategy.name": "finetuning_type method",
    "model.name_or_path": "base_model model_name_or_path model_name pretrained_model_name_or_path model_id checkpoint_path",
    "model.dtype": "torch_dtype precision mixed_precision compute_dtype",
    "model.attn_implementation": "sdpa_attention",
    "model.quantization": "quantization_config quant_type bnb_config",
    "model.quantization.name": "bnb_4bit_quant_type quantization_type",
    "model.quantization.use_double_quant": "bnb_4bit_use_double_quant use_nested_quant use_bnb_nested_quant",
    "model.quantization.compute_dtype": "bnb_4bit_compute_dtype",
    "model.quantization.skip_modules": "llm_int8_skip_modules modules_to_not_convert",
    "model.revision": "model_revision revision_of_model",
    "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_config",
    "model.add_tokens": "added_tokens new_special_tokens special_tokens add_special_tokens",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_dataset data_path dataset_dir data_files",
    "data.config": "dataset_config",
    "data.split": "dataset_train_split",
    "data.eval_split": "dataset_test_split",
    "data.revision": "dataset_revision",
    "data.train.weight": "probability probabilities interleave_probs mixing_weights",
    "data.eval": "eval_dataset test_datasets validation_file val_file valid eval_file test_file",
    "data.eval_size": "val_size val_set_size test_size validation_split split_ratio",
    "data.max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_len seq_length context_length block_size",
    "data.format": "type dataset_format formatting prompt_style",
    "data.columns": "column_mapping",
    "data.template": "chat_template chat_template_path",
    "training.learning_rate": "lr max_lr peak_lr",
    "training.num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "training.max_steps": "steps num_steps total_steps num_train_steps max_iters",
    "training.max_time": "time_limit max_runtime timeout",
    "training.global_batch_size": "effective_batch_size total_batch_size",
    "training.per_device_train_batch_size": "micro_batch_size per_device_batch_size device_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "training.lr_scheduler_type": "lr_scheduler scheduler scheduler_type schedule",
    "training.warmup_steps": "lr_warmup_steps num_warmup_steps warmup",
    "training.optim": "optimizer optim_type",
    "training.max_grad_norm": "gradient_clipping grad_clip max_norm clip_grad_norm",
    "training.activation_checkpointing": "use_gradient_checkpointing",
    "training.eval_steps": "eval_interval val_interval",
    "training.save_steps": "save_interval checkpoint_interval",
    "training.logging_steps": "log_interval log_every_n_steps",
    "training.resume_from_checkpoint": "auto_resume_from_checkpoints resume_from",
    "hub.repo_id": "hub_model_id hub_repo",
    "hub.push_to_hub": "push_to_hub_model",
    "hub.private": "hub_private_repo",
    "hub.revision": "hub_revision",
    "output_dir": "out_dir save_dir output_path checkpoint_dir",
    "seed": "random_seed data_seed",
    "evaluation.max_new_tokens": "generation_max_new_tokens max_tokens",
}


OURS = {theirs: ours for ours, names in FOREIGN.items() for theirs in names.split()}


QLORA = "QLoRA is `strategy: lora` with `model.quantization: nf4`"
LORA = "write `strategy: lora`"
SFT = "supervised fine-tuning is the default, with `task: causal-lm`: remove the key"
PRETRAIN = "train on plain text (`data.format: text`) with any strategy, `scratch` for random weights: remove the key"
PREFERENCE = "preference and reinforcement learning are not supported in this version"
STAGES = {
    **dict.fromkeys(("sft", "supervised", "supervised-fine-tuning", "finetune", "fine-tuning"), SFT),
    **dict.fromkeys(("pt", "pretrain", "pretraining", "cpt"), PRETRAIN),
    **dict.fromkeys(("dpo", "kto", "orpo", "ppo", "grpo", "rm", "rlhf"), PREFERENCE),
    "kd": "write `strategy: distill`",
}
CAUSAL_LM, CLASSIFICATION = "write `task: causal-lm` (the default)", "write `task: text-classification`"
TASK_TYPES = {
    **dict.fromkeys(("causal_lm", "causallm", "clm", "text-generation", "lm"), CAUSAL_LM),
    **dict.fromkeys(("seq_cls", "sequence-classification", "sequence_classification", "classification"), CLASSIFICATION),
    **dict.fromkeys(("single_label_classification", "multi_label_classification", "sentiment-analysis"), CLASSIFICATION),
}
DISTRIBUTED = "distribution is not part of a recipe: `hfstrat train RECIPE --accelerate-config NAME`"
NUM_LABELS = "the labels are found in the training data: remove the key"
MASK = "data.train_on says which tokens contribute to the loss; "
NF4, INT8 = "write `model.quantization: nf4`", "write `model.quantization: int8`"
COLUMN = "data.columns maps their names to ours: write `data.columns: {{{value}: %s}}`"
STEPS = "{ours} is a number of optimizer steps, or below 1 a share of the run: "
BATCH = (
    "write `training.global_batch_size`, the sequences per optimizer step over all processes, or "
    "`training.per_device_train_batch_size`, those of one forward pass"
)
SCHEDULED = {
    "steps": "steps are the only unit: set {ours} and remove the key",
    "epoch": STEPS + "for once per epoch write `{ours}: {per_epoch}` ({epochs:g} epochs)",
    "no": STEPS + "for once at the end write `{ours}: 1.0`",
    "": STEPS + "write such a number as `{ours}`",
}

_EXPLAINED: dict[str, dict[str, str]] = {
    # names in other tools: their value in lower case ("" for any other): what to write. {value} is the value
    "adapter": {"qlora": f"{QLORA}; `strategy.adapter` is the folder of a trained adapter", "lora": LORA},
    "peft peft_type use_peft": {"qlora": QLORA, "lora": LORA, "true": LORA, "false": "remove the key"},
    "stage": {**STAGES, "": "hfstrat has no stages: set `task` and `strategy`"},
    "task_type problem_type": {**TASK_TYPES, "": "hfstrat calls it 'task'"},
    "model_type": {"": "the class comes from the model's config: remove the key (under strategy scratch: strategy.model_type)"},
    "lmbda": {"": "GKD's share of answers that the student writes; write `strategy.on_policy: true` for all of them"},
    "beta": {
        "0.0": "GKD's beta; write `strategy.divergence: forward_kl`",
        "1.0": "GKD's beta; write `strategy.divergence: reverse_kl`",
        "": "divergences have names here: write `strategy.divergence: forward_kl` (GKD's beta 0), jsd (0.5) or reverse_kl (1)",
    },
    "bf16": {"true": "write `model.dtype: bfloat16`", "": "write `model.dtype: auto` (the default) or float32"},
    "fp16": {"true": "write `model.dtype: float16`", "": "write `model.dtype: auto` (the default) or float32"},
    "tf32": {"": "write `training.extra.tf32: {value}`"},
    "flash_attention flash_attn use_flash_attention_2 flash_attention_2": {
        "": "write `model.attn_implementation: flash_attention_2`",
        "false": "remove the key",
    },
    "load_in_4bit": {"": NF4, "false": "remove the key"},
    "load_in_8bit": {"": INT8, "false": "remove the key"},
    "quantization_bit bits": {"4": NF4, "8": INT8, "": "write `model.quantization: nf4` or int8"},
    "dataset_text_field text_field text_column text_column_name": {
        "text": "a column called text is found: remove the key",
        "": COLUMN % "text",
    },
    "label_column label_column_name": {"": COLUMN % "label"},
    "field_messages": {"": COLUMN % "messages"},
    "train_on_inputs train_on_prompt": {
        "true": f"{MASK}write `data.train_on: all`",
        "": f"{MASK}write `data.train_on: completions`",
    },
    "mask_prompt completion_only_loss": {
        "false": f"{MASK}write `data.train_on: all`",
        "": f"{MASK}write `data.train_on: completions`",
    },
    "assistant_only_loss": {
        "true": f"{MASK}write `data.train_on: assistant`",
        "": f"{MASK}write `data.train_on: auto` (the default)",
    },
    "batch_size train_batch_size": {"": BATCH},
    "sample_packing neat_packing": {"false": "write `training.packing: false`", "": "write `training.packing: true`"},
    "packing_strategy": {"": "examples are packed whole: `training.packing` is auto, true or false; remove the key"},
    "group_by_length": {
        "true": "write `training.train_sampling_strategy: group_by_length`",
        "": "write `training.train_sampling_strategy: random`",
    },
    "gradient_checkpointing": {"": "`training.activation_checkpointing` is its name since transformers 5.23"},
    "warmup_ratio": {"": "write `training.warmup_steps: {value}`: below 1 it is a share of all steps"},
    "eval_strategy evaluation_strategy": SCHEDULED,
    "save_strategy": SCHEDULED,
    "logging_strategy": {"": "`training.logging_steps` is the number of optimizer steps between two logged losses"},
    "do_eval": {"": "every run is evaluated: remove the key; training.eval_steps says how often"},
    "hub_token": {"": "a token does not belong in a recipe: run `hf auth login`, or set HF_TOKEN"},
    "hub_strategy": {"": "the result is pushed once, after it was verified: remove the key"},
    "overwrite_output_dir": {"": "it is a flag: `hfstrat train RECIPE --overwrite`"},
    "deepspeed fsdp fsdp_config ddp": {"": DISTRIBUTED},
    "num_processes": {"": "distribution is not part of a recipe: `hfstrat train RECIPE --num-processes N`"},
    "num_labels num_classes id2label label2id": {"": NUM_LABELS},
    "wandb_project": {"": "trackers are named in `training.report_to`"},
}
EXPLAINED = {theirs: answers for names, answers in _EXPLAINED.items() for theirs in names.split()}
ACCUMULATION = ("gradient_accumulation_steps", "grad_accumulation_steps", "gradient_accumulation")
PER_EPOCH = {"evals_per_epoch": "training.eval_steps", "saves_per_epoch": "training.save_steps"}
PER_DEVICE_DEFAULT = 8  # of TrainingArguments
EPOCHS_DEFAULT = 3.0

VALUES: dict[str, dict[str, str]] = {  # a key of a recipe: its value in another tool, in lower case: what to write
    "task": {**STAGES, **TASK_TYPES},
    "strategy.name": {
        **dict.fromkeys(("qlora", "q-lora"), QLORA),
        **dict.fromkeys(("sft", "fft", "full_finetune", "full-finetune", "finetune"), "write `strategy: full` or lora"),
        **dict.fromkeys(("freeze", "frozen"), "write `strategy: partial` with `last_n_layers`"),
        **dict.fromkeys(("dpo", "kto", "orpo", "ppo", "grpo"), PREFERENCE),
        **dict.fromkeys(("pretrain", "pretraining"), "write `strategy: scratch` for random weights, else full"),
    },
    "model.quantization": {"4": NF4, "8": INT8, "true": NF4, "false": "remove the key"},
    "model.quantization.name": {
        **dict.fromkeys(("int4", "4bit", "4-bit", "q4", "bnb", "bitsandbytes"), NF4),
        **dict.fromkeys(("8bit", "8-bit", "q8"), INT8),
    },
    "data.format": {
        "sharegpt": "write `conversations`",
        **dict.fromkeys(("chatml", "openai", "chat", "chat_template"), "write `messages`"),
        **dict.fromkeys(("completion", "pretrain"), "write `text`"),
    },
    "training.report_to": {"none": "remove the key: no tracker is the default", "all": "name them, such as [wandb]"},
    "training.resume_from_checkpoint": {"true": "write auto", "false": "write never"},
    "strategy.init_lora_weights": {"default": "write true"},
    "training.optim": {"adamw_bnb_8bit": "write adamw_8bit", "adamw_hf": "write adamw_torch_fused"},
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
    """The field at a dotted path, if there is one."""
    for cls in sections_of(Recipe).get(path[:-1], []):
        if path[:-1] == ("strategy",) and strategy in STRATEGIES and cls is not STRATEGIES[strategy]:
            continue
        if path[-1] in cls.model_fields:
            return cls.model_fields[path[-1]]
    return None


def wanted(path: tuple[str, ...], strategy: str | None) -> str:
    """The value that is expected at a dotted path, in words."""
    if len(path) == 1 and path[0] in IN_SHORT:
        return IN_SHORT[path[0]]
    if field := field_of(path, strategy):
        return expected(field)
    mapping = field_of(path[:-1], strategy) if len(path) > 1 else None
    arguments = get_args(mapping.annotation) if mapping else ()
    return in_words(arguments[-1]) if arguments else "a mapping of keys"


# keys that do not exist


def place_and_keys(path: tuple[str, ...], strategy: str | None) -> tuple[str, list[str]]:
    """The section of a key in words, and the keys that it may have."""
    parent = tuple(part for part in path[:-1] if not part.isdigit())  # without places in a list
    if parent == ("strategy",) and strategy in STRATEGIES:
        return f"strategy {strategy}", sorted(STRATEGIES[strategy].model_fields)
    names = {name for cls in sections_of(Recipe).get(parent, []) for name in cls.model_fields}
    return f"'{'.'.join(parent)}'" if parent else "a recipe", sorted(names)


def unknown_key(path: tuple[str, ...], value: Any, strategy: str | None, recipe: dict[str, Any]) -> str:
    """The answer to a key that does not exist where it was given: what to write instead.

    Args:
        recipe: the whole recipe as it was given, for answers that depend on other keys.
    """
    place, allowed = place_and_keys(path, strategy)
    key, parent = path[-1], tuple(part for part in path[:-1] if not part.isdigit())
    hint = _renamed(path, value, recipe) or _explained(key, value, recipe) or _nearest(key, parent, strategy, allowed)
    return f"no such key in {place}; {hint}"


def _renamed(path: tuple[str, ...], value: Any, recipe: dict[str, Any]) -> str:
    """What to write for a key that had this name in an earlier version; empty for others."""
    section: Any = recipe
    for part in path[:-1]:
        section = section.get(part, {}) if isinstance(section, dict) else {}
    if len(path) < 2 or not isinstance(section, dict):
        return ""
    new = renamed.new_name(renamed.section_of(path[-2], section), path[-1], value)
    return (
        ""
        if new is None or new[0] == path[-1]
        else f"it is now `{'.'.join((*path[:-1], new[0]))}: {_plain(new[1], lower=False)}`"
    )


def _explained(key: str, value: Any, recipe: dict[str, Any]) -> str:
    """What to write for a key of another tool whose value has to change too; empty for others."""
    if key in ACCUMULATION:
        return _accumulation(value, recipe)
    epochs = _number_at(recipe, "num_train_epochs", "num_epochs", "epochs") or EPOCHS_DEFAULT
    if key in PER_EPOCH:
        times = value if isinstance(value, int | float) and value > 0 else 1
        ours = PER_EPOCH[key]
        return f"{ours} is below 1 a share of the run: write `{ours}: {1 / (times * epochs):.3g}` ({epochs:g} epochs)"
    answers = EXPLAINED.get(key, {})
    answer = answers.get(_plain(value), answers.get("", ""))
    ours = "training.save_steps" if key.startswith("save") else "training.eval_steps"
    return answer.format(value=_plain(value, lower=False), ours=ours, epochs=epochs, per_epoch=f"{1 / epochs:.3g}")


def _accumulation(value: Any, recipe: dict[str, Any]) -> str:
    """The global batch size of another tool's accumulation steps."""
    rule = "training.global_batch_size is the number of sequences per optimizer step over all processes, and hfstrat derives "
    rule += "the accumulation from it: "
    given = _number_at(recipe, "per_device_train_batch_size", "micro_batch_size", "per_device_batch_size")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return f"{rule}write per_device_train_batch_size x gradient_accumulation_steps x number of processes"
    micro = int(given or PER_DEVICE_DEFAULT)
    origin = "" if given else " (the default of TrainingArguments)"
    return (
        f"{rule}write `training.global_batch_size: {micro * value}` for one process, which is per_device_train_batch_size "
        f"{micro}{origin} x gradient_accumulation_steps {value}; multiply it by the number of processes"
    )


def _number_at(recipe: dict[str, Any], *names: str) -> float | None:
    """The first of these keys that is given as a number, in `training` or at the top."""
    training = recipe.get("training")
    for section in (training if isinstance(training, dict) else {}, recipe):
        for name in names:
            value = section.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _plain(value: Any, lower: bool = True) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.lower() if lower else text


def _nearest(key: str, parent: tuple[str, ...], strategy: str | None, allowed: list[str]) -> str:
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
    sections = reversed(sections_of(Recipe).items())  # an outer section's key takes precedence over an inner one's
    everywhere = {name: path for path, classes in sections for cls in classes for name in cls.model_fields}
    if near := get_close_matches(key, [*everywhere, *OURS], n=1, cutoff=0.75):
        return f"did you mean '{OURS.get(near[0]) or '.'.join((*everywhere[near[0]], near[0]))}'?"
    return "`hfstrat schema` lists every key; other TrainingArguments go under training.extra"


def _homes(key: str) -> list[tuple[str, ...]]:
    return [path for path, classes in sections_of(Recipe).items() if any(key in cls.model_fields for cls in classes)]


# values that do not fit

SWITCHES = {"true": "true", "on": "true", "yes": "true", "false": "false", "off": "false", "no": "false"}


def expected(field: FieldInfo) -> str:
    """The values that a field takes, in words."""
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


def instead(path: tuple[str, ...], value: Any, kinds: set[str], field: FieldInfo | None) -> str:
    """What to write in place of a value that pydantic refused for these reasons; empty where it is unknown."""
    if answer := VALUES.get(".".join(path), {}).get(_plain(value)):
        return answer
    if value is None:
        return "remove the key to get its default" if field is None or not field.is_required() else ""
    if value == -1 and field is not None and field.default is None:
        return "remove the key to set none"
    if field is not None and len(path) > 1 and not isinstance(value, list | dict) and (sections := _sections(field.annotation)):
        return _in_section(".".join(path), value, sections[0])
    if isinstance(value, str):
        return _for_text(value, kinds, field)
    if kinds & {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"write {value:.0f}"
    if "string_type" in kinds and isinstance(value, int | float):
        return f'put it in quotes: "{json.dumps(value)}"'
    return ""


def _in_section(dotted: str, value: Any, section: type[BaseModel]) -> str:
    """A value that was given for a whole section, under the first key that takes it."""
    for given in ({}, *({name: value} for name in section.model_fields)):
        if not given and value is not True:  # `true` switches a section on with its defaults
            continue
        try:
            section.model_validate(given)
        except ValidationError:
            continue
        inner = ", ".join(f"{name}: {_plain(one, lower=False)}" for name, one in given.items())
        return f"write `{dotted}: {{{inner}}}`"
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
    """The choice that was probably meant: one that begins like it, or is spelled much like it."""
    value = value.lower()
    longer = [choice for choice in choices if len(value) > 2 and choice.startswith(value)]
    return next(iter(longer or get_close_matches(value, choices, n=1, cutoff=0.5)), None)


def _choices(annotation: Any) -> list[str]:
    options = [annotation, *get_args(annotation)]
    return [str(arg) for option in options if get_origin(option) is Literal for arg in get_args(option)]


def _number(text: str) -> str:
    """What to write for a text that looks like a number."""
    bare = text.strip().replace("_", "").replace(",", "")
    try:
        number = float(bare.removesuffix("%"))
    except ValueError:
        return ""
    if bare.endswith("%"):
        return f"write {number / 100:g}"
    return "it is quoted: remove the quotes" if bare == text else f"write {bare}"


FEW = 8  # keys of a section that are listed where it is expected


def in_words(annotation: Any) -> str:
    """A type in words."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
    if annotation in plain:
        return plain[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(_plain(arg, lower=False) for arg in args)
    if origin in (Union, types.UnionType):
        kept = [arg for arg in args if arg is not type(None) and not (arg is int and float in args)]
        return " or ".join(in_words(arg) for arg in kept)
    if origin is list:
        return f"a list, each {in_words(args[0])}"
    if origin is dict:
        return "a mapping"
    names = list(annotation.model_fields) if _sections(annotation) else []
    return f"a mapping of keys ({', '.join(names)})" if 0 < len(names) <= FEW else "a mapping of keys"
