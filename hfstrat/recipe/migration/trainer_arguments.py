"""The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory share, and axolotl in part."""

from __future__ import annotations

from typing import Any, get_args

from hfstrat.recipe.migration.rules import (
    UNSET,
    Draft,
    Gone,
    Look,
    Off,
    Rule,
    Rules,
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
from hfstrat.recipe.schema import Optimizer, Schedule, Tracker
from hfstrat.recipe.strategies import OF_THE_ADAPTER

CONFIGS = "distribution is not part of a recipe: `hfstrat train RECIPE --num-processes N --accelerate-config "
OPTIMIZERS = {name: name for name in get_args(Optimizer)} | {
    **dict.fromkeys(("adamw_hf", "adamw_apex_fused", "adamw"), "adamw_torch_fused"),
    **dict.fromkeys(("paged_adamw", "adamw_bnb_32bit"), "paged_adamw_32bit"),
    "lion": "lion_32bit",
    "paged_lion": "paged_lion_32bit",
    "lion_pytorch": "lion_32bit",
}
OTHER_OPTIMIZER = Gone("it is not offered: the default is adamw_torch_fused; adamw_8bit and adafactor need less memory")
SCHEDULES = {name: name for name in get_args(Schedule)}
OTHER_SCHEDULE = Gone(f"it is not offered: the default is cosine; expected one of {', '.join(SCHEDULES)}")
TRACKERS = get_args(Tracker)


def positive_steps(value: Any) -> Any:
    value = whole(value)
    return value if not isinstance(value, int) or value > 0 else Off("epochs are counted instead")


def clipped(value: Any) -> Any:
    value = number(value)
    if value == 0:
        return Gone("clipping cannot be switched off; write a large norm, such as training.max_grad_norm: 1e6")
    return value


def resumed(value: Any) -> Any:
    return Off("the same command resumes the last checkpoint anyway") if value is True else value


def logged(value: Any) -> Any:
    value = number(value)
    if isinstance(value, float) and value < 1:
        return Gone("it is a whole number of steps, not a share of the run; the default is 5")
    return whole(value)


def sharded(value: Any) -> Gone:
    """The Accelerate config that does what a DeepSpeed config does, as far as its name or content says."""
    text = str(value).lower().replace("_", "").replace("-", "").replace(" ", "").replace("'", "").replace('"', "")
    stage = next((n for n in ("3", "2", "1") if f"zero{n}" in text or f"z{n}" in text or f"stage:{n}" in text), None)
    name = {"3": "deepspeed_zero3", "2": "deepspeed_zero2", "1": "deepspeed_zero2"}.get(stage or "", "NAME")
    return Gone(f"{CONFIGS}{name}`, or your own Accelerate config")


def tracked(value: Any) -> Any:
    names = [str(name).lower() for name in as_list(value)]
    if names in (["none"], []):
        return Off("no tracker is the default")
    known = [name for name in names if name in TRACKERS]
    if others := [name for name in names if name not in TRACKERS]:
        answer = f"{', '.join(others)}: expected {', '.join(TRACKERS)}"
        return Look(known, answer) if known else Gone(answer)
    return known


HUB = "the result is pushed once, after it was verified"
PROCESSES = "set by hfstrat and the Accelerate config"
BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes"
PRECISION = "of bf16, fp16 and dtype; trained weights are float32 in any case"
EVALUATED = "of eval_strategy and eval_steps: a number of steps, or a share of the run"
SAVED = "of save_strategy and save_steps: a number of steps, or a share of the run"
SHARDED = Rule((), lambda value: Gone(f"{CONFIGS}fsdp2`, or your own Accelerate config"), f"{CONFIGS}fsdp2`", UNSET)
CHECKPOINTING = Rule(("training.activation_checkpointing",), bool, "", (None,))

RULES: Rules = {
    "output_dir": same("output_dir"),
    "num_train_epochs": turned("training.num_train_epochs", number),
    "max_steps": turned("training.max_steps", positive_steps),
    "learning_rate": turned("training.learning_rate", number),
    "lr_scheduler_type": chosen("training.lr_scheduler_type", SCHEDULES, other=OTHER_SCHEDULE),
    "lr_scheduler_kwargs": extra("lr_scheduler_kwargs"),
    **keys("warmup_steps warmup_ratio", turned("training.warmup_steps", number, "below 1 a share of all steps")),
    "optim": chosen("training.optim", OPTIMIZERS, other=OTHER_OPTIMIZER),
    "weight_decay": turned("training.weight_decay", number),
    "max_grad_norm": turned("training.max_grad_norm", clipped),
    **{name: extra(name) for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "tf32", "neftune_noise_alpha")},
    **{name: extra(name) for name in ("torch_empty_cache_steps", "full_determinism", "run_name", "project")},
    **{name: extra(f"{name}") for name in ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory")},
    **{name: extra(name) for name in ("dataloader_persistent_workers", "trackio_space_id")},
    **keys("per_device_train_batch_size gradient_accumulation_steps", read_with(BATCH, "training.global_batch_size")),
    "per_device_eval_batch_size": turned("training.per_device_eval_batch_size", whole),
    **keys("eval_strategy evaluation_strategy eval_steps", read_with(EVALUATED, "training.eval_steps")),
    **keys("save_strategy save_steps", read_with(SAVED, "training.save_steps")),
    **keys("bf16 fp16 dtype torch_dtype", read_with(PRECISION, "model.dtype")),
    "logging_steps": turned("training.logging_steps", logged),
    "logging_strategy": useless("training.logging_steps counts steps"),
    "eval_on_start": same("evaluation.eval_on_start"),
    "save_total_limit": turned("training.save_total_limit", whole),
    "load_best_model_at_end": same("training.load_best_model_at_end"),
    "torch_compile": chosen("training.torch_compile", {True: True, False: False, "auto": False}),
    **keys("gradient_checkpointing activation_checkpointing", CHECKPOINTING),
    "report_to": turned("training.report_to", tracked),
    "resume_from_checkpoint": Rule(("training.resume_from_checkpoint",), resumed, "", UNSET),
    "seed": turned("seed", whole),
    "push_to_hub": same("hub.push_to_hub"),
    "hub_model_id": same("hub.repo_id"),
    "hub_private_repo": same("hub.private"),
    "hub_revision": same("hub.revision"),
    "train_sampling_strategy": chosen(
        "training.train_sampling_strategy",
        {"random": "random", "group_by_length": "group_by_length"},
        other=Gone("the order is random, or grouped by length"),
    ),
    "group_by_length": chosen("training.train_sampling_strategy", {True: "group_by_length", False: Off("it is switched off")}),
    "deepspeed": Rule((), sharded, f"{CONFIGS}deepspeed_zero3`", UNSET),
    **keys("fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params", SHARDED),
    **keys("accelerator_config parallelism_config", gone(f"{CONFIGS}NAME`")),
    "use_cpu": gone("set CUDA_VISIBLE_DEVICES to an empty string"),
    "label_smoothing_factor": gone("the loss is the mean over the supervised tokens", (None, 0, 0.0)),
    "data_seed": gone("the order of examples is a function of seed and step"),
    "eval_delay": gone("evaluations begin with the first step", (None, 0)),
    "hub_token": gone("a token does not belong in a recipe: run `hf auth login`, or set HF_TOKEN"),
    "overwrite_output_dir": gone("it is a flag: `hfstrat train RECIPE --overwrite`"),
    **keys("torch_compile_backend torch_compile_mode", gone("blocks are compiled with torch's defaults")),
    "metric_for_best_model": Rule(
        (),
        lambda value: Off("it is the default") if value in ("loss", "eval_loss") else Gone("the lowest loss is the best"),
        "the lowest loss is the best; of a classifier the highest accuracy",
        (None,),
    ),
    **keys("hub_strategy hub_always_push trackio_static_space_id trackio_bucket_id", useless(HUB)),
    **keys("use_liger_kernel liger_kernel_config", useless("the loss is computed in chunks without logits of the whole batch")),
    **keys("gradient_checkpointing_kwargs activation_checkpointing_kwargs", useless("hfstrat sets them itself")),
    **keys(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "local_rank average_tokens_across_devices log_on_each_node save_on_each_node dataloader_multiprocessing_context "
        "dataloader_in_order dataloader_drop_last",
        useless(PROCESSES),
    ),
    **keys(
        "bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps include_for_metrics batch_eval_metrics greater_is_better",
        useless("evaluation is per token, whatever the batch"),
    ),
    **keys(
        "save_only_model restore_callback_states_from_checkpoint ignore_data_skip enable_jit_checkpoint save_safetensors",
        useless("checkpoints are complete, so that the same command resumes"),
    ),
    **keys(
        "log_level log_level_replica disable_tqdm logging_first_step logging_nan_inf_filter include_num_input_tokens_seen "
        "debug skip_memory_metrics logging_dir include_tokens_per_second",
        useless("the run prints and reports it in its own way"),
    ),
    **keys("do_train do_eval do_predict", useless("a run trains and evaluates")),
    **keys(
        "use_cache remove_unused_columns label_names length_column_name auto_find_batch_size optim_target_modules",
        useless("hfstrat decides it"),
    ),
}


def batch(draft: Draft, processes: int, micro: str, default: int, sequences: int = 1) -> int:
    """Set `training.global_batch_size`; returns it.

    Args:
        micro: the key of the sequences per forward pass, and `default` its default.
        sequences: answers per prompt, if a pass counts answers but a step here counts prompts.
    """
    size = whole(draft.take(micro, default)) if draft.given.get(micro) != "auto" else default
    steps = whole(draft.take("gradient_accumulation_steps", 1))
    steps = steps if isinstance(steps, int) else 1
    size = size if isinstance(size, int) else default
    draft.read |= {micro, "gradient_accumulation_steps"} & set(draft.given)
    total = max(1, size * steps * processes // sequences)
    draft.put("training.global_batch_size", total, micro if micro in draft.given else "")
    if processes == 1 and (micro in draft.given or "gradient_accumulation_steps" in draft.given):
        draft.look(
            micro if micro in draft.given else "gradient_accumulation_steps",
            f"training.global_batch_size: {total} is that of one process; if it ran on N GPUs, add --num-processes N",
        )
    return total


def one_warmup(draft: Draft) -> None:
    """Keep one of warmup_steps and warmup_ratio, before rules are applied: steps above 0 win in all three tools."""
    steps, ratio = number(draft.given.get("warmup_steps")), number(draft.given.get("warmup_ratio"))
    if steps is not None and ratio is not None:
        unused, used = ("warmup_ratio", "warmup_steps") if steps else ("warmup_steps", "warmup_ratio")
        del draft.given[unused]
        draft.same(unused, f"{used} is used")


def length(draft: Draft, epochs: float) -> None:
    """Set the length of the run: in all three tools max_steps takes precedence over epochs, whose default is `epochs`."""
    if draft.value("training.max_steps") is None:
        draft.suppose("training.num_train_epochs", epochs)
    elif given := draft.entries.pop("training.num_train_epochs", None):
        draft.same(given.key, "max_steps takes precedence")


def intervals(draft: Draft, logging_default: int = 500) -> None:
    """Set `training.eval_steps` and `training.save_steps` from strategies and numbers of steps."""
    for kind in ("eval", "save"):
        names = ("eval_strategy", "evaluation_strategy") if kind == "eval" else ("save_strategy",)
        key = next((name for name in names if draft.given.get(name) is not None), names[0])
        strategy = str(draft.take(key, "")).lower().replace("false", "no")
        steps = number(draft.take(f"{kind}_steps"))
        target = f"training.{kind}_steps"
        if strategy == "epoch":
            _per_epoch(draft, key, target, 1)
        elif strategy == "no":
            draft.put(target, 1.0, key)
            what = "evaluation" if kind == "eval" else "checkpoint"
            draft.look(key, f"every run has at least one {what}: {target} 1.0 is one at the end")
        elif strategy not in ("", "steps"):
            draft.miss(key, f"{strategy}: {target} is a number of steps; the best evaluation is kept, whatever it is")
        elif isinstance(steps, int | float) and steps > 0:
            draft.put(target, steps if steps < 1 else whole(steps), f"{kind}_steps")
        elif f"{kind}_steps" in draft.given:
            draft.same(f"{kind}_steps", "it has no value")
        if strategy not in ("", "steps") and steps is not None:
            draft.same(f"{kind}_steps", f"not used with {key}: {strategy}")
        if strategy == "steps" and steps is None and kind == "eval":
            draft.put(target, whole(number(draft.given.get("logging_steps", logging_default))), key)


def _per_epoch(draft: Draft, key: str, target: str, times: float) -> None:
    epochs = draft.value("training.num_train_epochs")
    if draft.value("training.max_steps") is not None or not isinstance(epochs, int | float) or epochs * times <= 0:
        draft.miss(key, f"{target} is a number of steps, or below 1 a share of the run, and the steps per epoch are unknown")
        return
    draft.put(target, min(1.0, float(f"{1 / (epochs * times):.3g}")), key)


def times_per_epoch(draft: Draft) -> None:
    """Axolotl's evals_per_epoch and saves_per_epoch."""
    for key, target in (("evals_per_epoch", "training.eval_steps"), ("saves_per_epoch", "training.save_steps")):
        times = number(draft.take(key))
        if isinstance(times, int | float) and times > 0:
            _per_epoch(draft, key, target, times)
        elif key in draft.given:
            draft.same(key, "it is switched off")


def schedule(draft: Draft, key: str, default: str = "linear") -> None:
    """The schedule that the tool has by default; the options of one that is not offered are left out."""
    if draft.given.get(key) is None:
        draft.suppose("training.lr_scheduler_type", default)
    elif draft.value("training.lr_scheduler_type") is None:
        draft.drop("training.extra.lr_scheduler_kwargs", "its schedule is not offered", "missing")


def precision(draft: Draft) -> None:
    """Set `model.dtype`: mixed precision decides, then the dtype in which the weights are loaded."""
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        value = draft.take(key)
        if value is True or str(value).lower() in ("true", "full"):
            draft.put("model.dtype", name, key)
        elif key in draft.given and value is None:
            draft.same(key, "it has no value")
        elif key in draft.given:
            draft.same(key, "model.dtype: auto is 16 bits where the hardware supports it; for others write float32")
    for key in ("dtype", "torch_dtype"):
        value = str(draft.take(key, "")).removeprefix("torch.")
        if key not in draft.given:
            continue
        if value in ("bfloat16", "float16") and draft.value("model.dtype") is None:
            draft.put("model.dtype", value, key)
        else:
            draft.same(key, "trained weights are float32, the forward pass has model.dtype")


def packed(draft: Draft, key: str, batch_size: int, default_length: int) -> None:
    """Turn a packed batch, which counts rows of the maximum length, into one that counts tokens."""
    length = draft.value("data.max_length")
    length = length if isinstance(length, int) else default_length
    draft.entries.pop("training.global_batch_size", None)
    for target in ("training.train_sampling_strategy", "training.per_device_train_batch_size"):
        draft.drop(target, "packing: dense chooses the examples of a step by their lengths", "missing")
    origin = key if key in draft.given else ""
    draft.put("training.packing", "dense", origin)
    draft.put("training.global_batch_tokens", batch_size * length, origin)
    draft.look(
        key,
        f"a packed batch of {batch_size} rows is a step of {batch_size * length:,} tokens: training.packing: dense; no example "
        "is cut, and a model that cannot keep packed examples apart is refused",
    )


def continued(draft: Draft) -> None:
    """Drop the shape of a new adapter where training continues from an existing one."""
    if draft.value("strategy.adapter"):
        for key in OF_THE_ADAPTER:
            draft.drop(f"strategy.{key}", "an existing adapter has its own")


def quantized(draft: Draft, four: bool, eight: bool, kind: str, double: bool, key: str) -> None:
    """Set `model.quantization`."""
    if four:
        draft.put("model.quantization.name", "fp4" if kind == "fp4" else "nf4", key)
        draft.put("model.quantization.use_double_quant", double)
    elif eight:
        draft.put("model.quantization.name", "int8", key)


def of_cpo(draft: Draft) -> None:
    """SimPO in TRL is CPO with another loss: its defaults, and the cross-entropy that its `cpo_alpha` adds."""
    if draft.given.get("cpo_alpha") not in (0, 0.0):
        draft.miss("cpo_alpha", "simpo has no further loss: TRL's default of cpo_alpha is 1.0, its SimPO has 0")
    draft.suppose("objective.beta", 0.1)
    draft.suppose("objective.simpo_gamma", 0.5)


HELD_OUT = 100  # rows of a stream, whose number is unknown


def streamed(draft: Draft) -> None:
    """Streamed rows cannot be held out as a share of all rows, and epochs of unknown length have no share of a run."""
    if draft.value("data.streaming") is not True or draft.value("data.eval") or draft.value("data.eval_split"):
        return
    size = draft.entries.get("data.eval_size")
    if size is None or not isinstance(size.value, int) or size.value < 1:
        key = size.key if size is not None else ""
        draft.put("data.eval_size", HELD_OUT, key)
        draft.look(key or "data.eval_size", f"the number of streamed rows is unknown: the first {HELD_OUT} are held out")
