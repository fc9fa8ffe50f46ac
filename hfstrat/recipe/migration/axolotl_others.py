"""The keys of axolotl that have no counterpart in a recipe, or that a run does not need, each with its reason."""

from __future__ import annotations

from typing import Any

from hfstrat.recipe.migration import trl, trl_grpo
from hfstrat.recipe.migration.rules import UNSET, Gone, Off, Rule, Rules, as_list, gone, keys, same, useless

FROM_CONFIG = "the class comes from the model's config"
KERNELS = "the loss is computed in chunks, and no other kernels are replaced"
ATTENTION = "attention is that of model.attn_implementation: sdpa, eager, flash_attention_2, 3 or 4, flex_attention"
CACHED = "rows are prepared once, and cached"
TRACKED = "training.report_to names the trackers; their settings are environment variables"
ALGORITHM = "it is not offered"
SHARDED = "distribution is not part of a recipe: `hfstrat train RECIPE --num-processes N --accelerate-config fsdp2`"
CLUSTER = "jobs on several machines: `hfstrat launch RECIPE --on slurm` (or hf-jobs, skypilot)"
PLACED = "weights and activations stay on the device: training.activation_checkpointing, model.quantization, or deepspeed_zero3"
MODEL_CONFIG = "the model's config decides it; change a copy of its config.json"
PLACES = "sequences and layers are not split over devices"
ELSEWHERE = "only used by another option, which has no counterpart"

PLUGINS = {  # the beginning of a plugin's module below axolotl.integrations: what it does, if it changes what is trained
    "kd": "a teacher: strategy: distill",
    "spectrum": "layers are not chosen by their signal; strategy: partial with patterns trains named ones",
    "diffusion": ALGORITHM,
    "nemo_gym": "rewards are functions: objective: grpo",
    "hatchery": ALGORITHM,
    "mora": "strategy: peft has PEFT's types, such as HRA or VERA",
    "grokfast": ALGORITHM,
    "llm_compressor": "models are quantized by bitsandbytes: model.quantization",
    "lm_eval": "evaluation.lm_eval names tasks of lm-evaluation-harness",
    "swanlab": "training.report_to: trackio, tensorboard, wandb or mlflow",
    "densemixer": "experts are routed as the model does it",
    "expert_parallel": "experts are not split over devices",
}


def plugins(value: Any) -> Any:
    """Plugins that replace kernels change nothing; the others have no counterpart."""
    modules = [str(each).removeprefix("axolotl.integrations.").partition(".")[0] for each in as_list(value)]
    known = ("liger", "cut_cross_entropy", "kernels")
    others = [f"{each}: {PLUGINS.get(each, 'this plugin is not known here')}" for each in modules if each not in known]
    return Gone("; ".join(others)) if others else Off(KERNELS)


OTHERS: Rules = {
    "plugins": Rule((), plugins, "kernels are not needed; of others the reason is named", (None,)),
    # what is trained, and how
    **keys(
        "reward_model process_reward_model center_rewards_coefficient", gone("reward models are not trained in this version")
    ),
    **keys(
        "ebft scaling_softmax use_eaft use_onebitllms llama4_linearized_experts lisa_n_layers lisa_step_interval diffusion "
        "nemo_gym_enabled hatchery grokfast_alpha grokfast_lamb mora dense_mixer spectrum_top_fraction",
        gone(ALGORITHM),
    ),
    **keys(
        "kd_trainer kd_alpha kd_ce_alpha kd_temperature kd_beta kd_online_server_base_url",
        gone("a teacher is strategy: distill, with teacher, temperature and teacher_weight"),
    ),
    "trainer_cls": gone("the Trainer is hfstrat's own; callbacks are given in Python: hfstrat.train(..., callbacks=[...])"),
    **keys("dpo_loss_weights rpo_alpha dpo_use_weighting dpo_norm_loss", gone("a sum of losses is not offered", (*UNSET, 0.0))),
    **keys("precompute_ref_log_probs", useless(trl.REFERENCE)),
    **keys("dpo_use_logits_to_keep dpo_use_liger_kernel", useless("only supervised positions go through the head")),
    "dpo_generate_during_eval": gone("evaluation.samples answers prompts before and after"),
    **keys("vllm trl.vllm_dtype trl.vllm_guided_decoding_regex trl.vllm_lora_sync", gone(trl_grpo.VLLM)),
    "trl.use_liger_loss": useless(KERNELS),
    "trl.rollout_func": gone("answers are written by transformers' generate, or by vLLM"),
    **keys("trl.sync_ref_model trl.ref_model_mixup_alpha trl.ref_model_sync_steps", gone(trl.REFERENCE, (None, False))),
    **keys(
        "trl.use_data_producer trl.async_prefetch trl.streaming_partial_batch",
        gone("answers are written for each step, by the weights of that step"),
    ),
    **keys("trl.prefetch_depth trl.vllm_sync_interval trl.streaming_min_groups trl.reward_num_workers", useless(ELSEWHERE)),
    **keys(
        "trl.replay_buffer_size trl.reroll_start_fraction trl.skip_zero_advantage_batches",
        gone(ALGORITHM, (*UNSET, 0, 0.0, 1.0)),
    ),
    **keys("trl.replay_recompute_logps trl.reroll_max_groups", useless(ELSEWHERE)),
    **keys("xformers_attention s2_attention sage_attention flash_optimum", gone(ATTENTION)),
    "fp8": same("training.float8"),
    **keys("fp8_config fp8_enable_fsdp_float8_all_gather", gone("training.float8 has a scale per tensor, unsharded")),
    **keys("qat quantization", gone("training for a result in few bits is not offered")),
    **keys("gptq gptq_bits bnb_config_kwargs peft loftq_config", gone("model.quantization: int8, nf4 or fp4")),
    **keys(
        "model_quantization_config model_quantization_config_kwargs",
        gone("models are quantized by bitsandbytes; others load as they are"),
    ),
    "quantize_moe_experts": gone("bitsandbytes quantizes linear layers; fused experts stay in 16 bits"),
    **keys("peft_layers_to_transform peft_layers_pattern peft_layer_replication", gone("all layers get an adapter")),
    **keys("lora_rank_pattern lora_alpha_pattern", gone("all layers get the same rank", (None, {}))),
    **keys("peft_trainable_token_indices", gone("model.add_tokens trains the embeddings of new tokens")),
    **keys(
        "loraplus_lr_ratio loraplus_lr_embedding lr_groups embedding_lr embedding_lr_scale",
        gone("one learning rate holds for all weights"),
    ),
    **keys(
        "relora relora_prune_ratio relora_prune_method relora_cpu_offload jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps",
        gone("ReLoRA is not offered"),
    ),
    **keys(
        "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor",
        gone("the schedules are those of transformers"),
    ),
    **keys("curriculum_sampling", gone("the order is random, or grouped by length")),
    **keys(
        "freeze_mm_modules",
        gone("strategy.freeze names the parts of a vision-language model that stay frozen, by default [vision]"),
    ),
    **keys("overrides_of_model_config model_config rope_scaling", gone(MODEL_CONFIG, (*UNSET, {}))),
    **keys("overrides_of_model_kwargs model_kwargs", gone("hfstrat loads the model itself: the section model", (*UNSET, {}))),
    # data
    **keys("use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks", gone("longer contexts are not simulated")),
    **keys(
        "default_system_message eot_tokens drop_system_message", gone("the template decides it; rows may have a column system")
    ),
    "role_boundaries": gone("the template decides which tokens are whose; see the masks of `hfstrat check`", (*UNSET, [])),
    "added_tokens_overrides": gone("tokens are not renamed; model.add_tokens adds new ones"),
    "min_sample_len": gone("short rows are kept"),
    "max_prompt_len": gone("data.max_length holds for prompt and answer together"),
    "eval_sequence_len": gone("data.max_length holds for evaluation too"),
    **keys("image_size image_resize_algorithm", gone("image.processor_kwargs has the settings of the model's own processor")),
    # evaluation and checkpoints
    **keys(
        "num_labels eval_table_size do_bench_eval bench_dataset bench_split do_causal_lm_eval eval_causal_lm_metrics",
        gone("evaluation.metrics and evaluation.samples measure answers"),
    ),
    **keys("lm_eval_tasks", gone("evaluation.lm_eval names tasks of lm-evaluation-harness", (*UNSET, []))),
    **keys(
        "generation_top_p generation_top_k generation_prompt_ratio generation_do_sample generation_temperature",
        useless("samples are greedy; evaluation.temperature is that of evaluation.metrics"),
    ),
    "save_first_step": gone("training.save_steps is the distance of checkpoints"),
    "dynamic_checkpoint": gone("training.save_steps is the distance of checkpoints, and the same command resumes"),
    **keys("loss_watchdog_threshold loss_watchdog_patience", gone("a loss that is not finite ends the run with exit code 3")),
    # machines
    **keys(
        "sequence_parallel_degree context_parallel_size tensor_parallel_size ring_attn_func heads_k_stride",
        gone(PLACES, (*UNSET, 1)),
    ),
    **keys("expert_parallel_size", gone("experts are not split over devices", (*UNSET, 1))),
    **keys("dp_shard_size dp_replicate_size", gone(SHARDED, (*UNSET, 1))),
    "deepcompile": gone("it is a setting of DeepSpeed: your own Accelerate config has it"),
    **keys("activation_offloading layer_offloading ple_cpu_offload tiled_mlp", gone(PLACED)),
    "selective_checkpointing": gone("whole blocks are recomputed: training.activation_checkpointing"),
    **keys("torch_compile_options", gone("blocks are compiled with torch's defaults")),
    **keys("use_ray", gone(CLUSTER)),
    **keys(
        "wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode mlflow_tracking_uri mlflow_experiment_name "
        "hf_mlflow_log_artifacts use_comet comet_project_name comet_api_key comet_workspace comet_experiment_key comet_mode "
        "comet_online comet_experiment_config use_swanlab swanlab_project swanlab_experiment_name swanlab_description "
        "swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host "
        "swanlab_lark_webhook_url swanlab_lark_secret swanlab_log_completions use_otel_metrics",
        gone(TRACKED),
    ),
    "llmcompressor": gone(PLUGINS["llm_compressor"]),
    # what a run does not need
    **keys(
        "base_model_config model_type tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common "
        "is_llama_derived_model is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model type_of_model "
        "cls_model_config",
        useless(FROM_CONFIG),
    ),
    **keys(
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm liger_glu_activation "
        "liger_layer_norm liger_swiglu liger_fused_linear_cross_entropy liger_cross_entropy liger_rms_norm_gated "
        "liger_use_token_scaling liger_kernel_impl cut_cross_entropy unsloth_cross_entropy_loss unsloth_lora_mlp "
        "unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_qkv flash_attn_fuse_mlp chunked_cross_entropy chunked_cross_entropy_num_chunks fused_attn_kernel "
        "use_kernels experts_implementation expert_backend nonexpert_quantization moe_grouped_backend moe_dequant_chunk_size "
        "moe_bnb_fast use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_nonexpert_mode "
        "dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all dsv4_fp4_grouped_mode gemma4_fp8_nonexpert "
        "gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step",
        useless(KERNELS),
    ),
    **keys(
        "flex_attn_compile_kwargs gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen", useless(ATTENTION)
    ),
    **keys(
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory dataset_shard_num dataset_shard_idx "
        "num_dataset_shards_to_save shuffle_merged_datasets shuffle_before_merging_datasets skip_prepare_dataset "
        "push_dataset_to_hub hf_use_auth_token dataset_exact_deduplication",
        useless(CACHED),
    ),
    **keys(
        "pad_to_sequence_len pad_to_multiple_of eval_sample_packing sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est multipack_real_batches "
        "pretraining_sample_concatenation pretrain_multipack_buffer_size pretrain_multipack_attn "
        "streaming_multipack_buffer_size batch_flattening dpo_padding_free max_packed_sequence_len",
        useless("padding is left out where the model allows it"),
    ),
    **keys(
        "strict debug device device_map world_size ddp max_memory gpu_memory_limit low_cpu_mem_usage gc_steps gc_collect_steps "
        "profiler_steps profiler_steps_start lora_on_cpu lora_fan_in_fan_out qlora_sharded_model_loading torchdistx_path "
        "merge_lora merge_method resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings "
        "embeddings_skip_upcast fix_untrained_tokens auto_resume_from_checkpoints fsdp_final_state_dict_type fsdp_version "
        "fp32_norms fp32_norm_classes adam_epsilon2 adam_beta3 peft_autocast_adapter_dtype peft_ensure_weight_tying "
        "experimental_skip_move_to_device tokenizer_save_jinja_files include_tkps is_preprocess preprocess_iterable "
        "total_num_tokens total_supervised_tokens axolotl_config_path",
        useless("hfstrat decides it"),
    ),
    **keys(
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
        useless("`hfstrat chat RUN` talks to the result, `hfstrat use RUN` shows how to serve it"),
    ),
    **keys(
        "dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale "
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold "
        "qgalore_gamma_proj qgalore_queue_size",
        useless("only used by an optimizer that is not offered"),
    ),
    **keys(
        "scaling_softmax_factor scaling_softmax_bias eaft_alpha eaft_k tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "lisa_layers_attr lisa_layers_attribute otel_metrics_host otel_metrics_port ray_run_name ray_num_workers "
        "resources_per_worker expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
        "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported kd_normalize_topk kd_online_topk "
        "kd_online_server kd_online_timeout kd_temperature_min lm_eval_batch_size lm_eval_post_train lm_eval_model "
        "spectrum_model_name swanlab_completion_log_interval swanlab_completion_max_buffer nemo_gym_dir nemo_gym_auto_clone "
        "nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout "
        "nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns",
        useless(ELSEWHERE),
    ),
}
