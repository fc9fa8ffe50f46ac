"""The keys of TRL's GRPOConfig, which axolotl has under `trl`."""

from __future__ import annotations

from hfstrat.recipe.migration.rules import Rules, chosen, gone, keys, number, read_with, same, turned, useless, whole

GENERATION = "objective.temperature, top_p and top_k set the sampling"
ALGORITHM = "it is not offered; docs/rewards.md lists the settings of grpo"
VLLM = "vLLM is given its defaults: use_vllm and vllm_mode are the settings"
OF_GRPO: Rules = {
    "reward_funcs": read_with("files with functions", "objective.rewards"),
    "reward_weights": read_with("weight of each reward", "objective.rewards"),
    "reward_model_name_or_path": gone("a reward is a function; call the model in one of your own: docs/rewards.md"),
    "num_generations": turned("objective.num_generations", whole),
    "temperature": turned("objective.temperature", number),
    "top_p": turned("objective.top_p", number),
    "top_k": turned("objective.top_k", whole),
    "epsilon": turned("objective.epsilon", number),
    "epsilon_high": turned("objective.epsilon_high", number),
    "scale_rewards": chosen(
        "objective.scale_rewards", {"group": "group", "batch": "batch", "none": "none", True: "group", False: "none"}
    ),
    "mask_truncated_completions": same("objective.mask_truncated_completions"),
    "use_vllm": same("objective.use_vllm"),
    "vllm_mode": same("objective.vllm_mode"),
    "num_iterations": gone(ALGORITHM, (None, 1)),
    "importance_sampling_level": gone(ALGORITHM, (None, "token")),
    "multi_objective_aggregation": gone(ALGORITHM, (None, "sum_then_normalize")),
    "repetition_penalty": gone(GENERATION, (None, 1, 1.0)),
    "top_entropy_quantile": gone(ALGORITHM, (None, 1, 1.0)),
    **keys("min_p generation_kwargs cache_implementation", gone(GENERATION)),
    **keys("delta entropy_coef use_adaptive_entropy off_policy_mask_threshold", gone(ALGORITHM, (None, False, 0, 0.0))),
    **keys("max_tool_calling_iterations", gone("there are no tools during training")),
    **keys("entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", useless("only used with other options")),
    **keys(
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
        useless("only used by losses that are not offered"),
    ),
    "use_bias_correction_kl": useless("only used with beta and off-policy samples"),
    **keys("generation_batch_size steps_per_generation", gone("answers are written for each step")),
    **keys("num_generations_eval", gone("evaluation writes one answer to a prompt")),
    **keys(
        "log_completions num_completions_to_print log_unique_prompts log_completions_hub_repo log_multimodal",
        useless("the report has answers before and after"),
    ),
    **keys("ds3_gather_for_generation cast_lm_head_to_fp32", useless("hfstrat decides it")),
    **keys(
        "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
        gone("answers are written by transformers' generate, or by vLLM"),
    ),
    **keys(
        "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host "
        "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_tensor_parallel_size vllm_importance_sampling_correction vllm_importance_sampling_mode "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap vllm_device "
        "vllm_max_model_len vllm_dtype",
        gone(VLLM, (None, False)),
    ),
}
