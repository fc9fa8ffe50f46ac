"""The keys of axolotl."""

from __future__ import annotations

from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe.migration import trainer_arguments as shared
from hfstrat.recipe.migration import trl
from hfstrat.recipe.migration.axolotl_data import sources
from hfstrat.recipe.migration.rewards import rewards
from hfstrat.recipe.migration.rules import (
    UNSET,
    Draft,
    Gone,
    Look,
    Off,
    Rules,
    apply,
    as_list,
    chosen,
    extra,
    gone,
    keys,
    number,
    read_with,
    same,
    turned,
    useless,
    whole,
)

OBJECTIVES = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo"}
ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
IN_SHORT = {"flash": "flash_attention_2", "sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}
FROM_CONFIG = "the class comes from the model's config"
KERNELS = "the loss is computed in chunks, and no other kernels are replaced"
CACHED = "rows are prepared once, and cached"
TRACKED = "training.report_to names the trackers; their settings are environment variables"
QUANTIZED = "of adapter: qlora, load_in_4bit and load_in_8bit"
ALGORITHM = "it is not offered"


def _patterns(value: Any) -> Any:
    """Regular expressions of parameter names as shell patterns."""
    found = []
    for pattern in as_list(value):
        text = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
        found.append(text if text.endswith("*") or str(pattern).endswith("$") else f"{text}*")
    return Look(found, "strategy.patterns are shell patterns of whole names, these were regular expressions: compare them")


def _template(value: Any) -> Any:
    if value == "tokenizer_default":
        return Off("the tokenizer's own chat template is the default")
    if value == "jinja":
        return Off("chat_template_jinja has it")
    return Gone(
        "the tokenizer's own chat template is used; if that is another one, save yours as a file: data.template: my.jinja"
    )


def _special(value: Any) -> Any:
    """The tokens of `special_tokens` that are new ones."""
    tokens = value.get("additional_special_tokens") if isinstance(value, dict) else None
    if tokens:
        return Look(as_list(tokens), "the other tokens of special_tokens are those of the tokenizer")
    return Gone("the tokenizer's own are used; new ones are given as model.add_tokens")


def _jinja(value: Any) -> Any:
    if str(value).endswith((".jinja", ".j2")):
        return value
    return Gone("save the template as a file, and set data.template to it")


def _held_out(value: Any) -> Any:
    value = number(value)
    if value == 0:
        return Gone("every run is evaluated, so some rows are held out: data.eval_size, 0.05 by default, or data.eval")
    return whole(value)


RULES: Rules = {
    **{
        key: rule
        for key, rule in shared.RULES.items()
        if key not in ("output_dir", "dtype", "torch_dtype", "per_device_train_batch_size", "lr_scheduler_type", "optim")
        and not key.startswith(("per_device", "push_to", "hub_model"))
    },
    "base_model": same("model.name_or_path"),
    "revision_of_model": same("model.revision"),
    "tokenizer_config": same("model.tokenizer"),
    "trust_remote_code": same("model.trust_remote_code"),
    "attn_implementation": same("model.attn_implementation"),
    "attention": chosen("model.attn_implementation", IN_SHORT, other=Gone("it is not offered")),
    **{
        key: chosen("model.attn_implementation", {True: name, False: Off("it is switched off")})
        for key, name in ATTENTION.items()
    },
    **keys("adapter load_in_4bit load_in_8bit", read_with(QUANTIZED, "model.quantization.name", "strategy.name")),
    "lora_r": turned("strategy.r", whole),
    "lora_alpha": turned("strategy.lora_alpha", whole),
    "lora_dropout": turned("strategy.lora_dropout", number),
    "lora_target_modules": turned("strategy.target_modules", trl.target_modules),
    "lora_target_linear": chosen(
        "strategy.target_modules", {True: Off("all linear layers are the default"), False: Off("it is switched off")}
    ),
    "lora_target_parameters": turned("strategy.target_parameters", as_list),
    "lora_modules_to_save": turned("strategy.modules_to_save", as_list),
    "lora_model_dir": same("strategy.adapter"),
    "peft_use_dora": same("strategy.use_dora"),
    "peft_use_rslora": same("strategy.use_rslora"),
    "peft_init_lora_weights": chosen("strategy.init_lora_weights", trl.INITS, other=Gone("it is not offered")),
    "unfrozen_parameters": turned("strategy.patterns", _patterns),
    "rl": read_with("dpo, ipo, kto, orpo, simpo or grpo", "objective.name"),
    **keys("rl_beta orpo_alpha dpo_beta trl.beta", turned("objective.beta", number)),
    "kto_desirable_weight": turned("objective.desirable_weight", number),
    "kto_undesirable_weight": turned("objective.undesirable_weight", number),
    "simpo_gamma": turned("objective.simpo_gamma", number),
    "dpo_label_smoothing": turned("objective.label_smoothing", number),
    **keys(
        "rpo_alpha cpo_alpha dpo_use_weighting dpo_norm_loss", gone("a sum of losses is not offered", (None, False, 0, 0.0))
    ),
    "dpo_use_logits_to_keep": useless("only supervised positions go through the head"),
    **{f"trl.{key}": rule for key, rule in trl.OF_GRPO.items()},
    "trl.max_completion_length": turned("objective.max_completion_length", whole),
    "trl.loss_type": same("objective.loss_type"),
    **keys("trl.sync_ref_model trl.ref_model_mixup_alpha trl.ref_model_sync_steps", gone(trl.REFERENCE, (None, False))),
    **keys("vllm trl.vllm_dtype trl.use_data_producer", gone(trl.VLLM)),
    **keys("datasets pretraining_dataset", read_with("path, name, split, revision, type and field names", "data.train")),
    "test_datasets": read_with("the same", "data.eval"),
    "val_set_size": turned("data.eval_size", _held_out),
    "sequence_len": turned("data.max_length", whole),
    "excess_length_strategy": chosen("data.overflow", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    "sample_packing": read_with("micro_batch_size x sequence_len", "training.packing", "training.global_batch_tokens"),
    "train_on_inputs": chosen("data.train_on", {True: "all", False: Off("data.train_on: auto is the default")}),
    "chat_template": turned("data.template", _template),
    "chat_template_jinja": turned("data.template", _jinja),
    "chat_template_kwargs": same("data.chat_template_kwargs"),
    **keys("roles_to_train train_on_eos", read_with("of each data set", "data.train_on")),
    "tokens": turned("model.add_tokens", as_list),
    "special_tokens": turned("model.add_tokens", _special),
    "num_epochs": turned("training.num_train_epochs", number),
    "optimizer": chosen("training.optim", shared.OPTIMIZERS, other=shared.OTHER_OPTIMIZER),
    "lr_scheduler": chosen("training.lr_scheduler_type", shared.SCHEDULES, other=shared.OTHER_SCHEDULE),
    **keys(
        "micro_batch_size gradient_accumulation_steps batch_size",
        read_with("micro_batch_size x gradient_accumulation_steps x processes", "training.global_batch_size"),
    ),
    "eval_batch_size": turned("training.per_device_eval_batch_size", whole),
    "evals_per_epoch": read_with("a share of the run", "training.eval_steps"),
    "saves_per_epoch": read_with("a share of the run", "training.save_steps"),
    "early_stopping_patience": turned("training.early_stopping_patience", whole),
    "eval_max_new_tokens": turned("evaluation.max_new_tokens", whole),
    "output_dir": same("output_dir"),
    "hub_model_id": read_with("with hub.push_to_hub", "hub.repo_id", "hub.push_to_hub"),
    **keys("use_wandb use_mlflow use_tensorboard use_trackio wandb_project", read_with("their names", "training.report_to")),
    **keys("wandb_name wandb_run_name mlflow_run_name", extra("run_name")),
    **keys(
        "wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode mlflow_tracking_uri mlflow_experiment_name "
        "hf_mlflow_log_artifacts",
        gone(TRACKED),
    ),
    **keys("use_comet comet_project_name comet_api_key comet_workspace use_swanlab swanlab_project", gone(TRACKED)),
    **keys(
        "xformers_attention s2_attention", gone("the implementations are sdpa, flash_attention_2, flex_attention and eager")
    ),
    **keys("bfloat16 float16", read_with("of bf16 and fp16", "model.dtype")),
    "float32": chosen("model.dtype", {True: "float32", False: Off("it is switched off")}),
    **keys("fp8 fp8_enable_fsdp_float8_all_gather qat quantization", gone("training in 8 or 4 bits per weight is not offered")),
    **keys("gptq gptq_bits bnb_config_kwargs peft loftq_config", gone("model.quantization: int8, nf4 or fp4")),
    **keys("peft_layers_to_transform peft_layers_pattern peft_layer_replication", gone("all layers get an adapter")),
    **keys("peft_trainable_token_indices", gone("model.add_tokens trains the embeddings of new tokens")),
    **keys(
        "loraplus_lr_ratio loraplus_lr_embedding lr_groups embedding_lr embedding_lr_scale",
        gone("one learning rate holds for all weights"),
    ),
    **keys(
        "relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps", gone("ReLoRA is not offered")
    ),
    **keys(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor",
        gone("the schedules are those of transformers"),
    ),
    **keys(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size ring_attn_func heads_k_stride",
        gone("sequences and layers are not split over devices"),
    ),
    **keys("reward_model process_reward_model", gone("reward models are not trained in this version")),
    **keys(
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
        gone("longer contexts are not simulated", UNSET),
    ),
    **keys(
        "num_labels eval_table_size do_bench_eval bench_dataset do_causal_lm_eval eval_causal_lm_metrics",
        gone("evaluation.metrics and evaluation.samples measure answers"),
    ),
    **keys(
        "default_system_message eot_tokens drop_system_message", gone("the template decides it; rows may have a column system")
    ),
    **keys("min_sample_len", gone("short rows are kept")),
    **keys("max_prompt_len", gone("data.max_length holds for prompt and answer together")),
    **keys("curriculum_sampling", gone("the order is random, or grouped by length")),
    **keys("loss_watchdog_threshold loss_watchdog_patience", gone("a loss that is not finite ends the run with exit code 3")),
    **keys("lisa_n_layers lisa_step_interval lisa_layers_attr llama4_linearized_experts", gone(ALGORITHM)),
    **keys(
        "base_model_config model_type tokenizer_type processor_type tokenizer_use_fast tokenizer_legacy "
        "tokenizer_use_mistral_common is_llama_derived_model is_mistral_derived_model is_falcon_derived_model "
        "is_qwen_derived_model type_of_model",
        useless(FROM_CONFIG),
    ),
    **keys(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm liger_glu_activation "
        "liger_layer_norm liger_swiglu liger_fused_linear_cross_entropy liger_cross_entropy cut_cross_entropy plugins "
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv flash_attn_fuse_mlp chunked_cross_entropy",
        useless(KERNELS),
    ),
    **keys(
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num dataset_shard_idx "
        "shuffle_merged_datasets skip_prepare_dataset push_dataset_to_hub hf_use_auth_token dataset_exact_deduplication",
        useless(CACHED),
    ),
    **keys(
        "pad_to_sequence_len eval_sample_packing sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially multipack_real_batches pretraining_sample_concatenation pretrain_multipack_buffer_size "
        "pretrain_multipack_attn batch_flattening",
        useless("padding is left out where the model allows it"),
    ),
    **keys(
        "strict debug device device_map world_size ddp max_memory gpu_memory_limit low_cpu_mem_usage gc_steps profiler_steps "
        "lora_on_cpu lora_fan_in_fan_out qlora_sharded_model_loading torchdistx_path merge_lora merge_method "
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast "
        "fix_untrained_tokens auto_resume_from_checkpoints fsdp_final_state_dict_type fsdp_version adam_epsilon2 adam_beta3 "
        "peft_autocast_adapter_dtype peft_ensure_weight_tying experimental_skip_move_to_device",
        useless("hfstrat decides it"),
    ),
    "gradient_checkpointing": chosen("training.activation_checkpointing", {True: True, False: False}, other=True),
}


def convert(draft: Draft, processes: int, trainer: str | None) -> None:
    """Fill the draft from a config of axolotl.

    Raises:
        UserError: what it trains has no counterpart.
    """
    given, inner = draft.given, draft.given.pop("trl", None)
    given |= {f"trl.{key}": value for key, value in inner.items()} if isinstance(inner, dict) else {}
    for key in ("reward_model", "process_reward_model"):
        if given.get(key) is True:
            raise UserError(f"{key}: true: reward models are not trained in this version")
    shared.one_warmup(draft)
    apply(draft, RULES)
    sources(draft)
    _strategy(draft)
    _objective(draft)
    _defaults(draft)
    for ours, theirs in (("bf16", "bfloat16"), ("fp16", "float16")):
        if draft.take(theirs):
            given.setdefault(ours, True)
    if given.get("bf16") == "auto":
        given.pop("bf16")
        draft.same("bf16", "model.dtype: auto is the default")
    shared.precision(draft)
    shared.intervals(draft)
    shared.times_per_epoch(draft)
    _batch(draft, processes)
    _trackers(draft)


def _strategy(draft: Draft) -> None:
    adapter = str(draft.take("adapter", "")).lower()
    four, eight = bool(draft.take("load_in_4bit")), bool(draft.take("load_in_8bit"))
    if adapter not in ("", "lora", "qlora"):
        raise UserError(f"adapter: {adapter}: not converted; expected lora or qlora")
    if adapter:
        draft.put("strategy.name", "lora", "adapter")
        shared.continued(draft)
        draft.drop("strategy.patterns", "an adapter is trained; strategy.modules_to_save names whole modules")
        if draft.value("strategy.target_modules") is None and not draft.given.get("lora_target_linear"):
            draft.look("lora_target_linear", "no modules are named: all linear layers get an adapter")
    elif draft.value("strategy.patterns"):
        patterns = draft.entries["strategy.patterns"]
        draft.drop("strategy.", "only used with adapter: lora")
        draft.notes = [note for note in draft.notes if note.key != "unfrozen_parameters" or note.kind != "missing"]
        draft.entries["strategy.patterns"] = patterns
        draft.put("strategy.name", "partial", "unfrozen_parameters")
        draft.put("strategy.head", False)
    else:
        draft.drop("strategy.", "only used with adapter: lora")
        draft.put("strategy.name", "full", "adapter" if "adapter" in draft.given else "")
    if adapter or four or eight:
        key = "load_in_8bit" if eight and not four else "load_in_4bit" if four else "adapter"
        shared.quantized(draft, four or (adapter == "qlora" and not eight), eight, "nf4", True, key)
    for key in ("load_in_4bit", "load_in_8bit"):
        if key in draft.given and not draft.given[key]:
            draft.same(key, "it is switched off")


def _objective(draft: Draft) -> None:
    kind = str(draft.take("rl", "")).lower()
    if not kind:
        draft.drop("objective.", "only used with rl")
        return
    if kind not in OBJECTIVES:
        raise UserError(f"rl: {kind}: not offered; expected one of {', '.join(OBJECTIVES)}")
    draft.put("objective.name", OBJECTIVES[kind], "rl")
    if kind == "ipo":
        draft.put("objective.loss_type", "ipo", "rl")
    if "trl.reward_funcs" in draft.given:
        rewards(draft, draft.take("trl.reward_funcs"), draft.take("trl.reward_weights"), "trl.reward_funcs")


def _defaults(draft: Draft) -> None:
    """Axolotl's defaults that are not those of hfstrat."""
    shared.length(draft, 1.0)
    draft.suppose("data.max_length", 512)
    shared.schedule(draft, "lr_scheduler", "cosine")
    if draft.value("objective.name") is None:
        draft.suppose("data.overflow", "drop")
    draft.suppose("output_dir", "./model-out")


def _batch(draft: Draft, processes: int) -> None:
    total = draft.take("batch_size")
    batch = shared.batch(draft, processes, "micro_batch_size", 1)
    if isinstance(total, int) and "gradient_accumulation_steps" not in draft.given:
        batch = total * processes
        draft.put("training.global_batch_size", batch, "batch_size")
    if draft.take("sample_packing"):
        if draft.value("objective.name") is None:
            shared.packed(draft, "sample_packing", batch, 512)
        else:
            draft.same("sample_packing", "training.packing: auto packs pairs where it saves time")
    elif "sample_packing" in draft.given:
        draft.same("sample_packing", "it is switched off; training.packing: auto packs where it saves time")


def _trackers(draft: Draft) -> None:
    names = {"wandb": ("use_wandb", "wandb_project"), "mlflow": ("use_mlflow",), "tensorboard": ("use_tensorboard",)}
    names["trackio"] = ("use_trackio",)
    found = {name: next((key for key in each if draft.take(key)), None) for name, each in names.items()}
    used = {name: key for name, key in found.items() if key}
    if used:
        draft.put("training.report_to", list(used), next(iter(used.values())))
    if draft.take("wandb_project"):
        draft.put("training.extra.project", draft.given["wandb_project"], "wandb_project")
    repo = draft.take("hub_model_id")
    if repo:
        draft.put("hub.repo_id", repo, "hub_model_id")
        draft.put("hub.push_to_hub", True, "hub_model_id")
    for each in names.values():
        for key in each:
            if key in draft.given and not draft.given[key]:
                draft.same(key, "it is switched off")
