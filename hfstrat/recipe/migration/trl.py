"""The keys of TRL: of its command line (`trl sft --config FILE`), its trainers' configs and PEFT's LoraConfig."""

from __future__ import annotations

from typing import Any, get_args

from hfstrat.errors import UserError
from hfstrat.recipe import peft, peft_source
from hfstrat.recipe.migration import trainer_arguments as shared
from hfstrat.recipe.migration.rewards import rewards
from hfstrat.recipe.migration.rules import (
    UNSET,
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
from hfstrat.recipe.migration.targets import target_modules
from hfstrat.recipe.migration.trl_grpo import OF_GRPO
from hfstrat.recipe.objectives import DpoLoss

RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "cpo": 1e-6, "grpo": 1e-6}
"""The default learning rate of each trainer."""

MARKS = {  # keys that only this trainer has
    "grpo": "num_generations reward_funcs reward_weights reward_model_name_or_path use_vllm vllm_mode epsilon_high",
    "kto": "desirable_weight undesirable_weight",
    "cpo": "cpo_alpha simpo_gamma",
    "dpo": "precompute_ref_log_probs discopop_tau f_divergence_type rpo_alpha ref_model_mixup_alpha label_smoothing ld_alpha",
    "sft": "assistant_only_loss completion_only_loss dataset_text_field packing packing_strategy eval_packing max_seq_length",
}
REFUSED = {
    "reward": "reward models are not trained in this version",
    "rloo": "RLOO is not offered; its nearest objective is grpo: --from trl-grpo",
    "cpo": "CPO is not offered, except with loss_type: simpo; there are dpo, orpo, simpo and kto",
    "ppo": "PPO is not offered; there is grpo: --from trl-grpo",
}
LORA = "of use_peft and the keys of LoRA"
INITS = {True: True, "default": True, "gaussian": "gaussian", "orthogonal": "orthogonal", "olora": "olora", "pissa": "pissa"}
QUANTIZED = "of load_in_4bit, load_in_8bit, bnb_4bit_quant_type and use_bnb_nested_quant"
COLUMNS = turned("data.columns", lambda value: Off("it is the default") if value == "text" else {str(value): "text"})


def _template(value: Any) -> Any:
    if str(value).endswith((".jinja", ".j2")):
        return value
    return Gone("a folder with a tokenizer; set model.tokenizer to it, or data.template to a .jinja file")


def _loss(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _sources(value: Any) -> Any:
    """The list of a mixture: {path, name, data_dir, data_files, split, columns}."""
    found = []
    listed = value.get("datasets") if isinstance(value, dict) else value
    for source in listed if isinstance(listed, list) else []:
        if not isinstance(source, dict):
            continue
        names = {"path": "path", "id": "path", "name": "config", "config": "config", "split": "split"}
        kept = {ours: source[theirs] for theirs, ours in names.items() if source.get(theirs)}
        weight = number(source.get("weight"))
        kept |= {"weight": weight} if isinstance(weight, int | float) and weight not in (1, 0) else {}
        files = source.get("data_files")
        found += [kept | {"path": str(file)} for file in as_list(files)] if files else [kept]
    return [source for source in found if source.get("path")] or Gone("expected a list of mappings with path")


def _mixer(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        return Gone("expected names of data sets with their shares")
    return [{"path": name, **({"weight": float(share)} if share not in (1, 1.0) else {})} for name, share in value.items()]


OF_LORA: Rules = {
    **keys("lora_r r", turned("strategy.r", whole)),
    "lora_alpha": turned("strategy.lora_alpha", whole),
    "lora_dropout": turned("strategy.lora_dropout", number),
    **keys("lora_target_modules target_modules", turned("strategy.target_modules", target_modules)),
    **keys("lora_target_parameters target_parameters", turned("strategy.target_parameters", as_list)),
    **keys("lora_modules_to_save modules_to_save", turned("strategy.modules_to_save", as_list)),
    "use_rslora": same("strategy.use_rslora"),
    "use_dora": same("strategy.use_dora"),
    "init_lora_weights": chosen("strategy.init_lora_weights", INITS, other=Gone("it is not offered; the default is PEFT's")),
    **keys("use_peft peft_type", read_with(LORA, "strategy.name")),
    **keys("lora_task_type task_type", read_with("of the trainer", "task")),
    **keys("bias lora_bias", gone("biases are not trained; strategy.modules_to_save names modules", (None, "none", False))),
    **keys(
        "layers_to_transform layers_pattern rank_pattern alpha_pattern", gone("all layers get the same rank", (None, [], {}))
    ),
    **keys("fan_in_fan_out inference_mode auto_mapping peft_version megatron_config", useless("PEFT sets it itself")),
}
OF_MODEL: Rules = {
    **keys("model_name_or_path base_model_name_or_path model_name", same("model.name_or_path")),
    **keys("model_revision revision", turned("model.revision", lambda v: Off("it is the default") if v == "main" else v)),
    **keys("tokenizer_name_or_path tokenizer_name", same("model.tokenizer")),
    "trust_remote_code": same("model.trust_remote_code"),
    "attn_implementation": same("model.attn_implementation"),
    "use_flash_attention_2": chosen("model.attn_implementation", {True: "flash_attention_2", False: Off("it is switched off")}),
    **keys("load_in_4bit load_in_8bit", read_with(QUANTIZED, "model.quantization.name")),
    "bnb_4bit_quant_type": read_with(QUANTIZED, "model.quantization.name"),
    **keys("use_bnb_nested_quant bnb_4bit_use_double_quant", read_with(QUANTIZED, "model.quantization.use_double_quant")),
    "bnb_4bit_compute_dtype": read_with(QUANTIZED, "model.quantization.compute_dtype"),
    "bnb_4bit_quant_storage": gone("it is for sharding quantized weights by FSDP"),
    "model_init_kwargs": read_with(
        "its dtype, attn_implementation, revision and trust_remote_code", "model.attn_implementation"
    ),
}
OF_DATA: Rules = {
    "dataset_name": same("data.train"),
    "datasets": turned("data.train", _sources),
    "dataset_mixture": turned("data.train", _sources),
    "dataset_mixer": turned("data.train", _mixer),
    "dataset_splits": read_with("the first trains, the second evaluates", "data.split", "data.eval_split"),
    "dataset_configs": turned("data.config", lambda value: as_list(value)[0] if as_list(value) else Gone("it is empty")),
    "num_processes": read_with("a flag, which multiplies the batch", "training.global_batch_size"),
    "system_prompt": gone("rows may have a column system"),
    "dataset_config": same("data.config"),
    "dataset_train_split": turned("data.split", lambda value: Off("it is the default") if value == "train" else value),
    "dataset_test_split": same("data.eval_split"),
    "test_split_size": turned("data.eval_size", number),
    **keys("dataset_streaming streaming", same("data.streaming")),
    **keys("max_length max_seq_length max_seq_len", turned("data.max_length", whole)),
    "dataset_text_field": COLUMNS,
    "chat_template_path": turned("data.template", _template),
    "chat_template": gone("save it as a file, such as mine.jinja, and set data.template to it"),
    "chat_template_kwargs": same("data.chat_template_kwargs"),
    "completion_only_loss": chosen("data.train_on", {True: "completions", False: "all"}),
    "assistant_only_loss": read_with("of completion_only_loss, too", "data.train_on"),
    "packing": read_with("batch x max_length", "training.packing", "training.global_batch_tokens"),
    "packing_strategy": useless("examples are packed whole, by best fit"),
    "padding_free": useless("padding is left out where the model allows it"),
    "eval_packing": useless("packing changes no metric"),
    "truncation_mode": gone("the beginning is kept; data.overflow: split loses nothing", (None, "keep_start")),
    "max_prompt_length": gone("data.max_length holds for prompt and answer together"),
    "eos_token": gone("the end of each answer is that of the template", UNSET),
    "dataset_kwargs": gone("formats and masks are found in the columns: docs/data.md", (None, {})),
    **keys("dataset_num_proc preprocessing_num_workers", useless("rows are prepared once, and cached")),
    **keys("pad_token padding_value pad_to_multiple_of shuffle_dataset", useless("hfstrat decides it")),
    "ignore_bias_buffers": useless("it is for DDP"),
}
OF_SFT: Rules = {
    "neftune_noise_alpha": shared.RULES["neftune_noise_alpha"],
    "activation_offloading": gone("training.activation_checkpointing: true needs less memory too"),
    "router_aux_loss_coef": gone("the model's own coefficient is used", (None, 0, 0.0)),
    **keys("generate_during_eval is_encoder_decoder", useless("evaluation.samples are answered before and after training")),
}
REFERENCE = "the reference is the untrained model, and its log-probabilities are computed once"
OF_PREFERENCE: Rules = {
    "beta": turned("objective.beta", number),
    "loss_type": read_with("by TRL's names", "objective.loss_type"),
    "label_smoothing": turned("objective.label_smoothing", number),
    "discopop_tau": turned("objective.discopop_tau", number),
    "desirable_weight": turned("objective.desirable_weight", number),
    "undesirable_weight": turned("objective.undesirable_weight", number),
    "simpo_gamma": turned("objective.simpo_gamma", number),
    "cpo_alpha": read_with("0 with loss_type: simpo", "objective.name"),
    "f_divergence_type": gone("the divergence is the reverse KL", (None, "reverse_kl")),
    **keys("loss_weights rpo_alpha ld_alpha alpha", gone("a sum of losses is not offered", (None, 0.0))),
    **keys("sync_ref_model use_weighting", gone(REFERENCE)),
    **keys("ref_model_mixup_alpha ref_model_sync_steps f_alpha_divergence_coef", useless("only used with other options")),
    **keys("precompute_ref_log_probs precompute_ref_batch_size disable_dropout", useless(REFERENCE)),
    "max_completion_length": read_with("of GRPO; elsewhere data.max_length", "objective.max_completion_length"),
}
RULES: Rules = {
    **shared.RULES,
    **OF_LORA,
    **OF_MODEL,
    **OF_DATA,
    **OF_SFT,
    **OF_PREFERENCE,
    **OF_GRPO,
}


def convert(draft: Draft, processes: int, trainer: str | None) -> None:
    """Fill the draft from a config of TRL.

    Raises:
        UserError: the trainer has no counterpart.
    """
    given = draft.given
    trainer = trainer or _trainer(draft)
    simpo = trainer == "cpo" and "simpo" in as_list(given.get("loss_type") or "")
    if trainer in REFUSED and not simpo:
        raise UserError(f"trl {trainer}: {REFUSED[trainer]}")
    _unfold(draft)
    shared.one_warmup(draft)
    apply(draft, RULES)
    _strategy(draft)
    objective = "simpo" if simpo else trainer
    if objective != "sft":
        draft.put("objective.name", objective, "by the keys, or --from")
    _objective(draft, objective)
    _masks(draft, objective)
    _defaults(draft, trainer)
    shared.precision(draft)
    shared.intervals(draft)
    if draft.take("eval_strategy", "no") != "no" and draft.value("data.eval_size") is None:
        draft.suppose("data.eval_split", "test")
    answers = draft.value("objective.num_generations")
    answers = answers if isinstance(answers, int) and answers > 0 else 8
    splits = as_list(draft.take("dataset_splits", []))
    for target, split in zip(("data.split", "data.eval_split"), splits, strict=False):
        draft.put(target, split, "dataset_splits")
    ran_on = whole(draft.take("num_processes", 1))
    processes = ran_on if processes == 1 and isinstance(ran_on, int) and ran_on > 1 else processes
    shared.streamed(draft)
    batch = shared.batch(draft, processes, "per_device_train_batch_size", 8, answers if objective == "grpo" else 1)
    if draft.take("packing") and objective == "sft":
        shared.packed(draft, "packing", batch, 1024)
    elif "packing" in given:
        draft.same("packing", "it is switched off; training.packing: auto packs where it saves time")


def _trainer(draft: Draft) -> str:
    for name, marks in MARKS.items():
        if any(mark in draft.given for mark in marks.split()):
            return name
    losses = as_list(draft.given.get("loss_type") or "")
    if draft.given.get("beta") is not None or any(loss in get_args(DpoLoss) for loss in losses):
        draft.look(
            "beta" if "beta" in draft.given else "loss_type",
            "read as that of DPO; for others: --from trl-kto, trl-orpo, trl-grpo",
        )
        return "dpo"
    draft.look("(trainer)", "no key names one: read as `trl sft`; for another: --from trl-dpo, trl-kto, trl-orpo, trl-grpo")
    return "sft"


def _unfold(draft: Draft) -> None:
    """Read `model_init_kwargs` as keys of their own."""
    inner = draft.take("model_init_kwargs")
    known = ("dtype", "torch_dtype", "attn_implementation", "revision", "trust_remote_code")
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if key in known:
            draft.given.setdefault(key, value)
        else:
            draft.miss(f"model_init_kwargs.{key}", "hfstrat loads the model itself; the section model lists its settings")


def _strategy(draft: Draft) -> None:
    wanted = draft.take("use_peft")
    kind = draft.take("peft_type")
    draft.read |= {"lora_task_type", "task_type"} & set(draft.given)
    if str(draft.given.get("lora_task_type") or draft.given.get("task_type") or "CAUSAL_LM").upper() == "SEQ_CLS":
        draft.put("task", "text-classification", "task_type")
    if kind is not None and str(kind).upper() != "LORA":
        _adapter(draft, str(kind).upper())
        return
    used = [
        key
        for key in OF_LORA
        if key in draft.given and draft.given[key] is not None and "strategy." in str(OF_LORA[key].targets)
    ]
    used = [key for key in used if key not in ("use_peft", "peft_type")]
    lora = wanted if wanted is not None else bool(used or kind)
    if not lora:
        draft.drop("strategy.", "only used with use_peft: true")
        draft.put("strategy.name", "full", "use_peft" if "use_peft" in draft.given else "")
        return
    draft.put("strategy.name", "lora", "use_peft" if "use_peft" in draft.given else "")
    if wanted is None and not kind:
        draft.look(used[0], "read as LoRA, although use_peft is not set (TRL alone would train all weights)")
    for target, value in (("r", 8 if "r" in draft.given or kind else 16), ("lora_alpha", 8 if kind else 32)):
        draft.suppose(f"strategy.{target}", value)
    draft.suppose("strategy.lora_dropout", 0.0 if kind else 0.05)
    if not {"lora_target_modules", "target_modules", "lora_target_parameters"} & set(draft.given):
        draft.look(
            "lora_target_modules",
            "it is not set: PEFT adapts a few modules by the model's type (q_proj and v_proj of most), this recipe all linear "
            "layers; for those write strategy.target_modules: [q_proj, v_proj]",
        )


def _adapter(draft: Draft, kind: str) -> None:
    """Another adapter of PEFT: strategy peft has the fields of its configuration, by their names.

    Raises:
        UserError: hfstrat does not train it, with the reason.
    """
    fields = peft_source.fields(kind)
    if kind in peft.REFUSED or not fields:
        reason = peft.REFUSED.get(kind, f"expected LORA or one of {', '.join(peft.supported())}")
        raise UserError(f"peft_type: {kind}: not converted; {reason}")
    draft.drop("strategy.", f"not a setting of {kind}")
    draft.put("strategy.name", "peft", "peft_type")
    draft.put("strategy.peft_type", kind, "peft_type")
    draft.notes = [note for note in draft.notes if note.key not in fields]
    for key, field in fields.items():
        value = draft.take(key)
        if value not in (None, [], {}) and value != field.default:
            draft.put(f"strategy.{key}", value, key)
        elif key in draft.given:
            draft.same(key, f"it is PEFT's default for {kind}")


def _objective(draft: Draft, objective: str) -> None:
    loss = _loss(draft.take("loss_type"))
    draft.take("cpo_alpha")
    if objective == "simpo":
        shared.of_cpo(draft)
    if loss is not None and objective in ("dpo", "kto", "grpo"):
        if isinstance(loss, list):
            draft.miss("loss_type", f"a sum of losses is not offered; {loss[0]} is used")
            loss = loss[0]
        draft.put("objective.loss_type", loss, "loss_type")
    elif loss not in (None, "nll", "simpo"):
        draft.miss("loss_type", "the loss is the cross-entropy of the supervised tokens")
    elif "loss_type" in draft.given:
        draft.same("loss_type", "it is the loss of this objective")
    longest = whole(draft.take("max_completion_length"))
    if objective == "grpo":
        draft.put("objective.max_completion_length", longest or 512, "max_completion_length")
        if "reward_funcs" in draft.given:
            rewards(draft, draft.take("reward_funcs"), draft.take("reward_weights"), "reward_funcs")
    elif longest is not None:
        draft.miss("max_completion_length", "data.max_length holds for prompt and answer together")


def _masks(draft: Draft, objective: str) -> None:
    """Set `data.train_on`; TRL's default, all tokens of a conversation, is not that of hfstrat."""
    if draft.take("assistant_only_loss"):
        draft.put("data.train_on", "assistant", "assistant_only_loss")
    elif objective == "sft" and draft.value("data.train_on") is None:
        draft.look(
            "assistant_only_loss",
            "TRL trains on all tokens of rows with messages, this recipe on the turns of the assistant: for all of them write "
            "data.train_on: all",
        )
    elif "assistant_only_loss" in draft.given:
        draft.same("assistant_only_loss", "it is not used with the other settings")


def _defaults(draft: Draft, trainer: str) -> None:
    """TRL's defaults that are not those of hfstrat."""
    draft.suppose("training.learning_rate", RATES[trainer])
    shared.length(draft, 3.0)
    shared.schedule(draft, "lr_scheduler_type")
    draft.suppose("training.warmup_steps", 0)
    four, eight = bool(draft.take("load_in_4bit")), bool(draft.take("load_in_8bit"))
    double = draft.take("use_bnb_nested_quant", draft.take("bnb_4bit_use_double_quant", False))
    kind = draft.take("bnb_4bit_quant_type", "nf4")
    shared.quantized(draft, four, eight, kind, bool(double), "load_in_4bit" if four else "load_in_8bit")
    compute = str(draft.take("bnb_4bit_compute_dtype", "")).removeprefix("torch.")
    if four and compute in ("bfloat16", "float16", "float32"):
        draft.put("model.quantization.compute_dtype", compute, "bnb_4bit_compute_dtype")
    for key in ("load_in_4bit", "load_in_8bit"):
        if key in draft.given and not draft.given[key]:
            draft.same(key, "it is switched off")
