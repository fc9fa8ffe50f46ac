"""The keys of axolotl."""

from __future__ import annotations

from typing import Any

from hfstrat.errors import UserError
from hfstrat.recipe.migration import trainer_arguments as shared
from hfstrat.recipe.migration import trl, trl_grpo
from hfstrat.recipe.migration.axolotl_data import sources
from hfstrat.recipe.migration.axolotl_others import OTHERS
from hfstrat.recipe.migration.rewards import rewards
from hfstrat.recipe.migration.rules import (
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
    whole,
)
from hfstrat.recipe.migration.targets import target_modules

OBJECTIVES = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo"}
ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
IN_SHORT = {"flash": "flash_attention_2", "sdpa": "sdpa", "flex": "flex_attention", "eager": "eager"}
QUANTIZED = "of adapter: qlora, load_in_4bit and load_in_8bit"
SAMPLES = "with generate_samples: true"


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
    given = {name for name, token in value.items() if token} if isinstance(value, dict) else {"special_tokens"}
    if "additional_special_tokens" in given:
        return Look(
            as_list(value["additional_special_tokens"]), "the other tokens of special_tokens are those of the tokenizer"
        )
    if given <= {"pad_token", "unk_token"}:
        return Off("padding has neither loss nor attention, whatever its token")
    return Gone(
        "bos_token and eos_token are those of the tokenizer; for others save a changed one, and set model.tokenizer to it"
    )


def _tokens(value: Any) -> Any:
    """New tokens; an older form names the special ones."""
    return _special(value) if isinstance(value, dict) else as_list(value)


def _one_loss(value: Any) -> Any:
    if not (losses := as_list(value)):
        return Off("it is empty: the default is used")
    return losses[0] if len(losses) == 1 else Look(losses[0], f"a sum of losses is not offered; {losses[0]} is used")


def _recomputed(value: Any) -> Any:
    return value if isinstance(value, bool) else Look(True, f"{value}: activations are recomputed, and not moved to the CPU")


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
    "lora_target_modules": turned("strategy.target_modules", target_modules),
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
    "trl": read_with("its keys are trl.KEY below", "objective.name"),
    "rl": read_with("dpo, ipo, kto, orpo, simpo or grpo", "objective.name"),
    **keys("rl_beta orpo_alpha dpo_beta trl.beta", turned("objective.beta", number)),
    "kto_desirable_weight": turned("objective.desirable_weight", number),
    "kto_undesirable_weight": turned("objective.undesirable_weight", number),
    "simpo_gamma": turned("objective.simpo_gamma", number),
    "dpo_label_smoothing": turned("objective.label_smoothing", number),
    "cpo_alpha": gone("a sum of losses is not offered; simpo is cpo_alpha: 0", (None, 0, 0.0)),
    "dpo_loss_type": turned("objective.loss_type", _one_loss),
    **{f"trl.{key}": rule for key, rule in trl_grpo.OF_GRPO.items()},
    "trl.max_completion_length": turned("objective.max_completion_length", whole),
    "trl.loss_type": same("objective.loss_type"),
    "trl.chat_template_kwargs": same("data.chat_template_kwargs"),
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
    "tokens": turned("model.add_tokens", _tokens),
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
    **keys("bfloat16 float16", read_with("of bf16 and fp16", "model.dtype")),
    "float32": chosen("model.dtype", {True: "float32", False: Off("it is switched off")}),
    "gradient_checkpointing": turned("training.activation_checkpointing", _recomputed),
    "noisy_embedding_alpha": extra("neftune_noise_alpha"),
    "trackio_run_name": extra("run_name"),
    "trackio_project_name": extra("project"),
    "tf32": chosen("training.extra.tf32", {True: True, False: False, "auto": Off("the GPU's default is used")}),
    "streaming": same("data.streaming"),
    "reinit_weights": read_with("random weights", "strategy.name"),
    "processor_type": read_with("a vision-language model", "task"),
    "processor_kwargs": same("image.processor_kwargs"),
    **keys("generate_samples num_generation_samples", read_with(SAMPLES, "evaluation.samples")),
    "generation_max_new_tokens": read_with(SAMPLES, "evaluation.max_new_tokens"),
    **OTHERS,
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
    _images(draft)
    _objective(draft)
    _defaults(draft)
    _samples(draft)
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
    shared.streamed(draft)


def _images(draft: Draft) -> None:
    """A config with a processor trains a vision-language model on conversations with images."""
    if draft.take("processor_type"):
        draft.put("task", "image-text-to-text", "processor_type")
        draft.look(
            "processor_type", "read as a vision-language model, whose rows have images; for texts alone: task: causal-lm"
        )
    else:
        draft.drop("image.", "only used with images")


def _samples(draft: Draft) -> None:
    given = [key for key in ("num_generation_samples", "generation_max_new_tokens") if key in draft.given]
    if not draft.take("generate_samples"):
        for key in given:
            draft.same(key, "only used with generate_samples: true")
        if "generate_samples" in draft.given:
            draft.same("generate_samples", "it is switched off; evaluation.samples answers prompts before and after")
        return
    draft.put("evaluation.samples", whole(draft.take("num_generation_samples", 3)), "generate_samples")
    draft.put("evaluation.max_new_tokens", whole(draft.take("generation_max_new_tokens", 50)), "generate_samples")


def _strategy(draft: Draft) -> None:
    adapter = str(draft.take("adapter", "")).lower()
    four, eight = bool(draft.take("load_in_4bit")), bool(draft.take("load_in_8bit"))
    if adapter not in ("", "lora", "qlora"):
        raise UserError(f"adapter: {adapter}: not converted; expected lora or qlora")
    if adapter:
        draft.put("strategy.name", "lora", "adapter")
        shared.continued(draft)
        draft.drop("strategy.patterns", "an adapter is trained; strategy.modules_to_save names whole modules", "missing")
        if draft.value("strategy.target_modules") is None and not draft.given.get("lora_target_linear"):
            draft.look("lora_target_linear", "no modules are named: all linear layers get an adapter")
        if draft.given.get("lora_target_linear"):
            draft.drop("strategy.target_modules", "lora_target_linear adds all linear layers to them")
        if draft.take("reinit_weights"):
            draft.miss("reinit_weights", "random weights are trained as a whole: strategy: scratch, without an adapter")
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
        if draft.take("reinit_weights"):
            draft.put("strategy.name", "scratch", "reinit_weights")
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
    if kind == "simpo":
        shared.of_cpo(draft)
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
    answers = draft.value("objective.num_generations") if draft.value("objective.name") == "grpo" else 1
    answers = answers if isinstance(answers, int) and answers > 0 else 8
    batch = shared.batch(draft, processes, "micro_batch_size", 1, answers)
    if isinstance(total, int) and "gradient_accumulation_steps" not in draft.given:
        batch = max(1, total * processes // answers)
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
    names["trackio"] = ("use_trackio", "trackio_project_name")
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
