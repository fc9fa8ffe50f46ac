"""Keys and values of other training tools, and what to write in their place.

`FOREIGN` renames: the value stays as it is. `EXPLAINED` is for keys whose value has to change too, or that have no
counterpart; `VALUES` for the values of another tool under a key that exists here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

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
    "objective.name": "rl rlhf trl_trainer preference",
    "objective.beta": "pref_beta dpo_beta rl_beta orpo_alpha kto_beta",
    "objective.loss_type": "pref_loss dpo_loss_type rpo_loss",
    "objective.desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "objective.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "objective.label_smoothing": "dpo_label_smoothing",
    "objective.simpo_gamma": "simpo_gamma_ratio",
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
    "data.chat_template_kwargs": "enable_thinking template_kwargs chat_template_args",
    "training.learning_rate": "lr max_lr peak_lr",
    "training.num_train_epochs": "epochs num_epochs n_epochs max_epochs",
    "training.max_steps": "steps num_steps total_steps num_train_steps max_iters",
    "training.max_time": "time_limit max_runtime timeout",
    "training.global_batch_tokens": "total_batch_tokens tokens_per_step batch_tokens max_tokens_per_batch",
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
NO_OBJECTIVE = "it is not supported in this version; there are dpo, kto, orpo and simpo for preferences, and grpo for rewards"
PREFERENCE = {name: f"write `objective: {name}`, with a strategy such as lora" for name in ("dpo", "kto", "orpo", "simpo")}
PREFERENCE["grpo"] = "write `objective:` with `name: grpo` and `rewards`, and a strategy such as lora"
PREFERENCE |= dict.fromkeys(("ppo", "rm", "rlhf", "reward", "rloo"), NO_OBJECTIVE)
STAGES = {
    **dict.fromkeys(("sft", "supervised", "supervised-fine-tuning", "finetune", "fine-tuning"), SFT),
    **dict.fromkeys(("pt", "pretrain", "pretraining", "cpt"), PRETRAIN),
    **PREFERENCE,
    "kd": "write `strategy: distill`",
}
CAUSAL_LM, CLASSIFICATION = "write `task: causal-lm` (the default)", "write `task: text-classification`"
TASK_TYPES = {
    **dict.fromkeys(("causal_lm", "causallm", "clm", "text-generation", "lm"), CAUSAL_LM),
    **dict.fromkeys(("seq_cls", "sequence-classification", "sequence_classification", "classification"), CLASSIFICATION),
    "regression": "write `task: regression`",
    **dict.fromkeys(("single_label_classification", "multi_label_classification", "sentiment-analysis"), CLASSIFICATION),
}
DISTRIBUTED = "distribution is not part of a recipe: `hfstrat train RECIPE --accelerate-config NAME`"
NUM_LABELS = "the labels are found in the training data: remove the key"
MASK = "data.train_on selects the tokens that contribute to the loss; "
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
        "": "DPO's is `objective.beta`; for GKD's write `strategy.divergence: forward_kl` (0), jsd (0.5) or reverse_kl (1)",
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
    "packing_strategy": {"": "examples are packed whole: write `training.packing: dense` with `global_batch_tokens`, or true"},
    "group_by_length": {
        "true": "write `training.train_sampling_strategy: group_by_length`",
        "": "write `training.train_sampling_strategy: random`",
    },
    "gradient_checkpointing": {"": "`training.activation_checkpointing` is its name since transformers 5.23"},
    "warmup_ratio": {"": "write `training.warmup_steps: {value}`: below 1 it is a share of all steps"},
    "eval_strategy evaluation_strategy": SCHEDULED,
    "save_strategy": SCHEDULED,
    "logging_strategy": {"": "`training.logging_steps` is the number of optimizer steps between two logged losses"},
    "do_eval": {"": "every run is evaluated: remove the key; training.eval_steps sets how often"},
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

# optimizers of transformers that are not offered
OTHER_DEVICES = ("adamw_torch_xla", "adamw_torch_npu_fused")
PROJECTED = (
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *("galore_adafactor_layerwise", "apollo_adamw", "apollo_adamw_layerwise"),
)
IN_BACKWARD = ("lomo", "adalomo")
SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")


VALUES: dict[str, dict[str, str]] = {  # a key of a recipe: its value in another tool, in lower case: what to write
    "task": {**STAGES, **TASK_TYPES},
    "strategy.name": {
        **dict.fromkeys(("qlora", "q-lora"), QLORA),
        **dict.fromkeys(("sft", "fft", "full_finetune", "full-finetune", "finetune"), "write `strategy: full` or lora"),
        **dict.fromkeys(("freeze", "frozen"), "write `strategy: partial` with `last_n_layers`"),
        **PREFERENCE,
        **dict.fromkeys(("pretrain", "pretraining"), "write `strategy: scratch` for random weights, else full"),
    },
    "objective.name": {
        **dict.fromkeys(("ppo", "rm", "rlhf", "reward", "rloo"), NO_OBJECTIVE),
        **dict.fromkeys(("ipo", "hinge", "slic"), "write `objective: {name: dpo, loss_type: ...}`"),
        **dict.fromkeys(("cpo",), "write `objective: simpo`, or orpo"),
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
    "training.optim": {
        "adamw_hf": "write adamw_torch_fused",
        **dict.fromkeys(OTHER_DEVICES, "it is for another kind of device; write adamw_torch_fused"),
        **dict.fromkeys(PROJECTED, "it projects gradients to low rank; write `strategy: lora`, or adamw_8bit for less memory"),
        **dict.fromkeys(IN_BACKWARD, "it steps inside the backward pass, without accumulation; write adamw_8bit or adafactor"),
        **dict.fromkeys(SCHEDULE_FREE, "its weights of evaluation are not those of training; set lr_scheduler_type: constant"),
        "adamw_anyprecision": "torchdistx is not maintained; write adamw_torch_fused",
    },
}


MARKS = {  # keys by which a config of another tool is recognized
    "trl": frozenset(
        [
            "assistant_only_loss",
            "base_model_name_or_path",
            "chat_template_path",
            "completion_only_loss",
            "dataset_mixer",
            "dataset_name",
            "dataset_test_split",
            "dataset_text_field",
            "dataset_train_split",
            "desirable_weight",
            "load_in_4bit",
            "load_in_8bit",
            "lora_target_modules",
            "max_length",
            "max_seq_length",
            "model_name_or_path",
            "num_generations",
            "num_train_epochs",
            "peft_type",
            "per_device_train_batch_size",
            "precompute_ref_log_probs",
            "reward_funcs",
            "use_bnb_nested_quant",
            "use_peft",
        ]
    ),
    "axolotl": frozenset(
        [
            "adapter",
            "base_model",
            "dataset_prepared_path",
            "datasets",
            "evals_per_epoch",
            "flash_attention",
            "lora_model_dir",
            "lora_target_linear",
            "lr_scheduler",
            "micro_batch_size",
            "num_epochs",
            "optimizer",
            "pad_to_sequence_len",
            "sample_packing",
            "saves_per_epoch",
            "sequence_len",
            "special_tokens",
            "strict",
            "val_set_size",
            "wandb_project",
        ]
    ),
    "llama-factory": frozenset(
        [
            "cutoff_len",
            "dataset",
            "dataset_dir",
            "do_train",
            "finetuning_type",
            "freeze_trainable_layers",
            "lora_rank",
            "lora_target",
            "max_samples",
            "neat_packing",
            "overwrite_cache",
            "plot_loss",
            "pref_beta",
            "pref_loss",
            "preprocessing_num_workers",
            "quantization_bit",
            "stage",
            "template",
            "val_size",
        ]
    ),
}
FEWEST_MARKS = 2


def tool_of(keys: Iterable[str]) -> str:
    """The tool whose config has these keys; empty for none, and for several alike."""
    found = {name: len(marks & set(keys)) for name, marks in MARKS.items()}
    best = max(found, key=lambda name: found[name])
    alike = [name for name, count in found.items() if count == found[best]]
    return best if found[best] >= FEWEST_MARKS and len(alike) == 1 else ""


def instead_of(key: str, value: Any, recipe: dict[str, Any]) -> str:
    """What to write for a key of another tool whose value has to change too; empty for others."""
    if key in ACCUMULATION:
        return _accumulation(value, recipe)
    epochs = _number_at(recipe, "num_train_epochs", "num_epochs", "epochs") or EPOCHS_DEFAULT
    if key in PER_EPOCH:
        times = value if isinstance(value, int | float) and value > 0 else 1
        ours = PER_EPOCH[key]
        return f"{ours} is below 1 a share of the run: write `{ours}: {1 / (times * epochs):.3g}` ({epochs:g} epochs)"
    answers = EXPLAINED.get(key, {})
    answer = answers.get(as_text(value), answers.get("", ""))
    ours = "training.save_steps" if key.startswith("save") else "training.eval_steps"
    return answer.format(value=as_text(value, lower=False), ours=ours, epochs=epochs, per_epoch=f"{1 / epochs:.3g}")


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


def as_text(value: Any, lower: bool = True) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.lower() if lower else text
