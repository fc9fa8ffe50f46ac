"""The keys of LLaMA-Factory."""

from __future__ import annotations

from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe.migration import llama_factory_images as with_images
from hfstrat.recipe.migration import trainer_arguments as shared
from hfstrat.recipe.migration.llama_factory_data import sources
from hfstrat.recipe.migration.rules import (
    Draft,
    Gone,
    Off,
    Rules,
    apply,
    as_list,
    chosen,
    gone,
    keys,
    number,
    read_with,
    same,
    turned,
    useless,
    whole,
)

STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto"}
PREFERENCES = {"sigmoid": "dpo", "hinge": "dpo", "ipo": "dpo", "orpo": "orpo", "simpo": "simpo"}
STRATEGIES = {"lora": "lora", "full": "full", "freeze": "partial", "oft": "peft"}
ATTENTION = {"sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}
GENERATION = "evaluation.metrics, max_new_tokens and temperature measure generated answers"
REFERENCE = "the reference is the untrained model, and its log-probabilities are computed once"
PROJECTED = "gradients are not projected; adamw_8bit and adafactor need less memory, lora least"
PART = "of a Hub data set a part is a slice of its split, data.split: train[:1000]; shorten a file"
OFT = "of finetuning_type: oft"
EVALUATION = "of its evaluation command; `hfstrat evaluate RUN --lm-eval TASK` measures tasks"
SERVED = "only used for inference: `hfstrat use RUN` shows how to serve a result"
QUANTIZED = "of quantization_bit, quantization_type and double_quantization"


def _targets(value: Any) -> Any:
    return Off("all linear layers are the default") if str(value).strip() in ("all", "all-linear") else as_list(value)


def _adapter(value: Any) -> Any:
    found = as_list(value)
    return found[0] if len(found) == 1 else Gone("a run continues from one adapter; merge the others into the base first")


RULES: Rules = {
    **shared.RULES,
    "model_name_or_path": same("model.name_or_path"),
    "model_revision": turned("model.revision", lambda value: Off("it is the default") if value == "main" else value),
    "adapter_name_or_path": turned("strategy.adapter", _adapter),
    "trust_remote_code": same("model.trust_remote_code"),
    "flash_attn": chosen(
        "model.attn_implementation", {**ATTENTION, "auto": Off("it is the default")}, other=Gone("not offered")
    ),
    **keys("add_tokens add_special_tokens", turned("model.add_tokens", as_list)),
    "quantization_bit": read_with(QUANTIZED, "model.quantization.name"),
    "quantization_type": read_with(QUANTIZED, "model.quantization.name"),
    "double_quantization": read_with(QUANTIZED, "model.quantization.use_double_quant"),
    "quantization_method": gone("models are quantized by bitsandbytes", (None, "bnb", "bitsandbytes")),
    "train_from_scratch": read_with("random weights", "strategy.name"),
    **keys("stage pref_loss", read_with("supervised training is the default", "objective.name", "objective.loss_type")),
    "finetuning_type": read_with("lora, freeze (partial) or full", "strategy.name"),
    "lora_rank": turned("strategy.r", whole),
    "lora_alpha": turned("strategy.lora_alpha", whole),
    "lora_dropout": turned("strategy.lora_dropout", number),
    "lora_target": turned("strategy.target_modules", _targets),
    "additional_target": turned("strategy.modules_to_save", as_list),
    "use_rslora": same("strategy.use_rslora"),
    "use_dora": same("strategy.use_dora"),
    "pissa_init": chosen("strategy.init_lora_weights", {True: "pissa_niter_16", False: Off("it is switched off")}),
    "freeze_trainable_layers": read_with("the last blocks", "strategy.last_n_layers"),
    "freeze_trainable_modules": read_with("parts of blocks", "strategy.patterns"),
    "freeze_extra_modules": read_with("further parameters", "strategy.patterns"),
    "pref_beta": turned("objective.beta", number),
    "dpo_label_smoothing": turned("objective.label_smoothing", number),
    "kto_chosen_weight": turned("objective.desirable_weight", number),
    "kto_rejected_weight": turned("objective.undesirable_weight", number),
    "simpo_gamma": turned("objective.simpo_gamma", number),
    **keys("dataset eval_dataset dataset_dir", read_with("files of dataset_info.json", "data.train", "data.eval")),
    "cutoff_len": turned("data.max_length", whole),
    "val_size": turned(
        "data.eval_size", lambda v: Gone("every run is evaluated: data.eval_size is 0.05") if v == 0 else whole(v)
    ),
    "streaming": same("data.streaming"),
    "buffer_size": turned("data.shuffle_buffer", whole),
    "train_on_prompt": chosen("data.train_on", {True: "all", False: Off("data.train_on: auto is the default")}),
    "mask_history": chosen("data.train_on", {True: "completions", False: Off("data.train_on: auto is the default")}),
    "template": read_with("the tokenizer's own", "data.template"),
    "enable_thinking": turned("data.chat_template_kwargs", lambda value: {"enable_thinking": value}),
    "packing": read_with("per_device_train_batch_size x cutoff_len", "training.packing", "training.global_batch_tokens"),
    "neat_packing": read_with("the same", "training.packing", "training.global_batch_tokens"),
    "max_new_tokens": turned("evaluation.max_new_tokens", whole),
    "early_stopping_steps": turned("training.early_stopping_patience", whole),
    "disable_gradient_checkpointing": chosen(
        "training.activation_checkpointing", {True: False, False: Off("training.activation_checkpointing: auto is the default")}
    ),
    "use_muon": chosen("training.optim", {True: "muon", False: Off("it is switched off")}),
    **keys("oft_rank oft_block_size module_dropout oft_target", read_with(OFT, "strategy.peft_type")),
    **keys("use_badam use_galore use_apollo use_adam_mini", gone(PROJECTED)),
    "use_llama_pro": gone("blocks are not added; strategy: partial trains the last ones"),
    **keys("use_dft_loss use_asft_loss use_eaft_loss", gone("the loss is the cross-entropy of the supervised tokens")),
    **keys("use_mca use_hyper_parallel use_kt", gone("distribution is Accelerate's: DDP, FSDP2 or DeepSpeed")),
    **keys("default_system", gone("rows may have a column system")),
    **keys("preserve_thinking", gone("the chat template decides it: data.chat_template_kwargs")),
    "new_special_tokens_config": gone("model.add_tokens names new tokens; their embeddings begin as the mean of all"),
    **keys("loraplus_lr_ratio", gone("one learning rate holds for all weights")),
    **keys("pref_ftx pref_bco_weight ld_alpha", gone("a sum of losses is not offered", (None, 0, 0.0))),
    **keys("ref_model ref_model_adapters ref_model_quantization_bit", gone(REFERENCE)),
    **keys(
        "reward_model reward_model_adapters reward_model_type reward_model_quantization_bit",
        gone("reward models are not used; grpo has functions"),
    ),
    **keys("max_samples", gone(PART)),
    **keys("mix_strategy", gone("sources have a weight, the times that each row is seen", (None, "concat"))),
    **keys("interleave_probs", gone("sources have a weight, the times that each row is seen")),
    **keys("tool_format", gone("tools are rendered by the chat template")),
    **keys("rope_scaling shift_attn mixture_of_depths", gone("the model's config decides it; change a copy of config.json")),
    "fp8": same("training.float8"),
    **keys("use_unsloth", gone("it is not offered")),
    **keys("pure_bf16", gone("trained weights are float32; model.dtype is that of the forward pass")),
    **keys("moe_aux_loss_coef", gone("the model's own coefficient is used", (None, 0, 0.0))),
    **keys("eval_on_each_dataset", gone("the evaluation rows are measured together")),
    **keys(
        "predict_with_generate do_sample temperature top_p top_k num_beams eval_num_beams repetition_penalty", gone(GENERATION)
    ),
    **with_images.RULES,
    **keys("use_swanlab", gone("training.report_to: trackio, tensorboard, wandb or mlflow")),
    **keys("hf_hub_token ms_hub_token om_hub_token", gone("a token does not belong in a recipe: run `hf auth login`")),
    **keys("pissa_iter pissa_convert create_new_adapter", useless("an adapter is saved as an ordinary one")),
    **keys(
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size tokenized_path cache_dir data_shared_file_system",
        useless("rows are prepared once, and cached"),
    ),
    **keys(
        "plot_loss compute_accuracy include_effective_tokens_per_second print_param_status",
        useless("every run reports losses, token accuracy and speed"),
    ),
    **keys(
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples "
        "export_quantization_maxlen export_legacy_format export_hub_model_id",
        useless("a result is merged and exported by `hfstrat merge` and `hfstrat export`"),
    ),
    **keys("task task_dir batch_size lang n_shot save_dir download_mode", useless(EVALUATION)),
    **keys(
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend skip_special_tokens",
        useless(SERVED),
    ),
    **keys(
        "compute_dtype device_map model_max_length block_diag_attn adapter_folder init_special_tokens loraplus_lr_embedding "
        "ppo_buffer_size ppo_score_norm ppo_target ppo_whiten_rewards galore_update_interval galore_proj_type "
        "apollo_update_interval apollo_proj apollo_proj_type apollo_scale_front badam_start_block badam_mask_mode "
        "swanlab_workspace swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret "
        "badam_verbose hyper_parallel_args asft_alpha eaft_alpha kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts "
        "kt_lora_expert_num kt_lora_expert_intermediate_size master_addr master_port fp8_backend "
        "fp8_enable_fsdp_float8_all_gather enable_torch_profiler profiler_output_dir profiler_wait_steps "
        "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes profiler_profile_memory "
        "profiler_with_stack profile_modules",
        useless("hfstrat decides it, or it is only used with other options"),
    ),
    **keys(
        "enable_liger_kernel use_unsloth_gc use_reentrant_gc upcast_layernorm upcast_lmhead_output low_cpu_mem_usage "
        "use_fast_tokenizer resize_vocab split_special_tokens ignore_pad_token_for_loss disable_shuffling use_v1_kernels "
        "use_kv_cache infer_backend infer_dtype offload_folder ddp_timeout ray_run_name ray_storage_path ray_num_workers "
        "resources_per_worker placement_strategy ray_init_kwargs swanlab_project swanlab_run_name swanlab_mode "
        "badam_mode badam_switch_mode badam_switch_interval badam_update_ratio galore_layerwise galore_target galore_rank "
        "galore_scale apollo_layerwise apollo_target apollo_rank apollo_scale apollo_scale_type quantization_device_map "
        "seed_data ppo_epochs max_length length_penalty",
        useless("hfstrat decides it, or it is only used with other options"),
    ),
}


def convert(draft: Draft, processes: int, trainer: str | None) -> None:
    """Fill the draft from a config of LLaMA-Factory.

    Raises:
        UserError: what it does has no counterpart.
    """
    stage = str(draft.take("stage", "sft")).lower()
    if draft.given.get("export_dir"):
        raise UserError("export_dir: this config exports a model; `hfstrat merge` and `hfstrat export` do that")
    if stage not in STAGES:
        raise UserError(f"stage: {stage}: not offered; expected one of {', '.join(STAGES)}, and there is objective: grpo")
    shared.one_warmup(draft)
    apply(draft, RULES)
    images = sources(draft, stage)
    _strategy(draft)
    with_images.images(draft, images)
    _objective(draft, stage)
    _template(draft)
    _defaults(draft)
    shared.precision(draft)
    shared.intervals(draft)
    batch = shared.batch(draft, processes, "per_device_train_batch_size", 8)
    key = "neat_packing" if draft.take("neat_packing") else "packing"
    packed = draft.take("neat_packing") or draft.take("packing", stage == "pt")  # its default
    if packed and stage in ("sft", "pt"):
        shared.packed(draft, key, batch, 2048)
    for name in ("packing", "neat_packing"):
        if name in draft.given and not draft.given[name]:
            draft.same(name, "it is switched off; training.packing: auto packs where it saves time")


def _strategy(draft: Draft) -> None:
    kind = str(draft.take("finetuning_type", "lora")).lower()
    if kind not in STRATEGIES:
        raise UserError(f"finetuning_type: {kind}: not converted; expected one of {', '.join(STRATEGIES)}")
    if kind != "lora":
        draft.drop("strategy.", "only used with finetuning_type: lora")
    key = "finetuning_type" if "finetuning_type" in draft.given else ""
    draft.put("strategy.name", STRATEGIES[kind], key)
    if kind == "lora":
        draft.suppose("strategy.r", 8)
        shared.continued(draft)
    elif kind == "oft":
        _orthogonal(draft)
    layers = whole(draft.take("freeze_trainable_layers", 2))
    modules, more = draft.take("freeze_trainable_modules", "all"), draft.take("freeze_extra_modules")
    if kind == "freeze":
        _frozen(draft, layers, modules, more)
    elif draft.take("train_from_scratch"):
        draft.put("strategy.name", "scratch", "train_from_scratch")
        draft.suppose("training.weight_decay", 0.0)
        draft.suppose("training.extra.adam_beta2", 0.999)
    bits = whole(draft.take("quantization_bit"))
    double, form = draft.take("double_quantization", True), draft.take("quantization_type", "nf4")
    shared.quantized(draft, bits == 4, bits == 8, str(form), bool(double), "quantization_bit")
    if bits not in (None, 4, 8):
        draft.miss("quantization_bit", f"{bits}: expected 4 or 8")


def _orthogonal(draft: Draft) -> None:
    """OFT is a type of strategy peft, with the names of PEFT's own configuration."""
    draft.put("strategy.peft_type", "OFT", "finetuning_type")
    for key, ours in (("oft_rank", "r"), ("oft_block_size", "oft_block_size"), ("module_dropout", "module_dropout")):
        value = number(draft.take(key))
        if value is not None:
            draft.put(f"strategy.{ours}", value if key == "module_dropout" else whole(value), key)
    if draft.value("strategy.r"):
        draft.suppose("strategy.oft_block_size", 0)  # PEFT takes one of both
    targets = draft.take("oft_target")
    if targets is not None and not isinstance(named := _targets(targets), Off):
        draft.put("strategy.target_modules", named, "oft_target")
    if extra := draft.take("additional_target"):
        draft.put("strategy.modules_to_save", as_list(extra), "additional_target")


def _frozen(draft: Draft, layers: Any, modules: Any, more: Any) -> None:
    draft.put("strategy.head", False)
    if isinstance(layers, int) and layers < 0:
        draft.miss("freeze_trainable_layers", "the first blocks are named by strategy.patterns: ['model.layers.0.*', ...]")
        layers = 0
    if as_list(modules) == ["all"]:
        draft.put(
            "strategy.last_n_layers", layers, "freeze_trainable_layers" if "freeze_trainable_layers" in draft.given else ""
        )
    else:
        draft.put("strategy.patterns", [f"*{name}*" for name in as_list(modules)], "freeze_trainable_modules")
        draft.look(
            "freeze_trainable_modules", f"the patterns name modules of all blocks; those of the last {layers} alone are longer"
        )
    if more:
        found = draft.value("strategy.patterns") or []
        draft.put("strategy.patterns", [*found, *(f"*{name}*" for name in as_list(more))], "freeze_extra_modules")


def _objective(draft: Draft, stage: str) -> None:
    loss = str(draft.take("pref_loss", "sigmoid")).lower()
    objective = PREFERENCES.get(loss, "dpo") if stage == "dpo" else STAGES[stage]
    if objective == "sft":
        draft.drop("objective.", "only used by preferences")
        return
    draft.put("objective.name", objective, "stage")
    if loss not in PREFERENCES:
        draft.miss("pref_loss", f"{loss}: not offered; the loss is that of dpo")
    elif objective == "dpo" and loss != "sigmoid":
        draft.put("objective.loss_type", loss, "pref_loss")
    if objective == "simpo":
        draft.suppose("objective.beta", 0.1)
        draft.suppose("objective.simpo_gamma", 0.5)


def _template(draft: Draft) -> None:
    name = draft.take("template")
    if name is not None:
        draft.look(
            "template",
            f"{name}: the tokenizer's own chat template is used, which may differ in white space or a system message: see "
            "`hfstrat check`; for another one set data.template to a .jinja file",
        )


def _defaults(draft: Draft) -> None:
    """LLaMA-Factory's defaults that are not those of hfstrat."""
    draft.suppose("training.learning_rate", 5e-5)
    shared.length(draft, 3.0)
    shared.schedule(draft, "lr_scheduler_type")
    draft.suppose("training.warmup_steps", 0)
    draft.suppose("data.max_length", 2048)
    if draft.value("data.streaming") is not True:
        draft.drop("data.shuffle_buffer", "only used with streaming")
    shared.streamed(draft)
