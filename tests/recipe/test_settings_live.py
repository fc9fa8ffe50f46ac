"""No setting is read by nothing: for every key of the recipe, another value makes a difference that can be seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEMPLATE, make_tokenizer, sentences, write_jsonl
from datasets import Dataset
from helpers import sounds
from helpers.classifiers import labeled
from helpers.detectors import folder_of_boxes, processor_of
from helpers.hub_runs import finished_run
from helpers.hub_server import LoopbackHub, in_process
from helpers.images import folder_of_classes, image_recipe, make_image_model
from helpers.recipes import OWN
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback

from hfstrat.data.prepare import prepare
from hfstrat.errors import UserError
from hfstrat.evaluation import lm_eval
from hfstrat.evaluation.suite import Suite
from hfstrat.models import fused_loss
from hfstrat.objectives.reinforcement.rewards import Scorer
from hfstrat.publish import push
from hfstrat.recipe import suggestions
from hfstrat.recipe.audio import Audio
from hfstrat.recipe.data import Data
from hfstrat.recipe.images import Images
from hfstrat.recipe.load import load_recipe
from hfstrat.recipe.rewards import Reward
from hfstrat.recipe.schema import OBJECTIVES, STRATEGIES, Recipe
from hfstrat.run import measure, setup
from hfstrat.run.setup import Job
from hfstrat.run.train import answer_prompts
from hfstrat.tasks import generation
from hfstrat.tasks.report import read
from hfstrat.trainer import checkpoints
from hfstrat.trainer.callbacks import Tracker

SOUND = """\
model: {name_or_path: MODEL, dtype: float32}
strategy: {name: lora, r: 4}
data: {train: ROWS, eval_size: 12, max_length: 128, overflow: drop}
training: {max_steps: 4, global_batch_size: 8, per_device_train_batch_size: 4, learning_rate: 1e-2, eval_steps: 2}
evaluation: {samples: 1, max_new_tokens: 4}
output_dir: RUN
"""


OF_CHATS = ("processor_kwargs", "precompute")  # keys of `image` for conversations with images


@dataclass
class Seen:
    """A job that is ready to train, and the keywords that its weights and tokenizer were loaded with."""

    job: Job
    calls: dict[str, dict[str, Any]]

    @property
    def args(self) -> Any:
        return self.job.trainer.args

    @property
    def model(self) -> Any:
        return self.job.trainer.model

    @property
    def adapter(self) -> Any:
        return self.model.peft_config["default"]

    def layer(self) -> Any:
        """The first linear layer with an adapter."""
        return next(module for module in self.model.modules() if hasattr(module, "lora_A"))

    def learning(self) -> set[str]:
        return {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Probe:
    """Set `overrides` (words in capitals are replaced by paths) and look: it differs, and is `wanted` where that is given.

    `beside` is set both times.
    """

    overrides: list[str]
    look: Callable[[Seen], Any]
    wanted: Any = None
    beside: list[str] = field(default_factory=list)


def account(seen: Seen, name: str = "train") -> Any:
    return seen.job.data.statistics[name]


def first_row(seen: Seen) -> str:
    """The text of the training row that was read first."""
    return str(seen.job.data.renderer.tokenizer.decode(seen.job.data.train[0]["input_ids"]))


def patience(seen: Seen) -> list[int]:
    callbacks = seen.job.trainer.callback_handler.callbacks
    return [callback.early_stopping_patience for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]


def recomputes(seen: Seen) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in seen.model.modules())


def dropouts(seen: Seen) -> list[float]:
    return [module.p for module in seen.layer().lora_dropout.values() if hasattr(module, "p")]


def blocks(seen: Seen) -> set[str]:
    """The numbers of the trainable transformer blocks."""
    return {name.split("layers.")[1].split(".")[0] for name in seen.learning() if "layers." in name}


def linears(seen: Seen) -> list[Any]:
    """The linear layers of a head on features."""
    return [module for module in seen.model.head if isinstance(module, torch.nn.Linear)]


def distiller(seen: Seen) -> Any:
    """What a student minimises, None where there is none."""
    from hfstrat.strategies.distill.objective import Distiller

    objective = fused_loss.objective_of(seen.model)
    return objective if isinstance(objective, Distiller) else None


def matched(seen: Seen, name: str) -> Any:
    """Of the layers that are matched."""
    return getattr(distiller(seen).match, name, None)


def contrast(seen: Seen, name: str) -> Any:
    """Of contrastive training, None without it."""
    return seen.job.train_data.facts["head"].get("contrastive", {}).get(name)


def answers_kept(seen: Seen) -> Any:
    return seen.job.train_data.facts["distillation"].get("cache", {})


def asked_length(seen: Seen) -> list[int]:
    """How long the answers may be that a run asks its model for."""
    lengths: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "answer", lambda model, renderer, prompt, length, dtype: lengths.append(length))
        answer_prompts(seen.job)
    return lengths


def measured(seen: Seen) -> Any:
    """What is measured beside the evaluation loss, by name."""
    return measure.measure(seen.job)


def asked_of_the_harness(seen: Seen) -> Any:
    """The requested tasks, and the folder in which it looks for them."""
    requested: list[Any] = [None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lm_eval, "measure", lambda subject, wanted, *rest: requested.append((wanted.lm_eval, wanted.include_path)) or {}
        )
        measured(seen)
    return requested[-1]


def budget(seen: Seen) -> int:
    """Tokens of a forward pass."""
    found: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Suite, "measure", lambda self, subject, runner: found.append(runner.budget))
        measured(seen)
    return found[0]


def stages(seen: Seen) -> list[int]:
    """The steps between two unfrozen stages and the number of stages, with gradual unfreezing."""
    thawing = [cb for cb in seen.job.trainer.callback_handler.callbacks if hasattr(cb, "stages")]
    return [number for cb in thawing for number in (cb.every, len(cb.stages))]


def rates(seen: Seen) -> list[float]:
    return sorted({group["lr"] for group in seen.job.trainer.create_optimizer().param_groups})


def stored(seen: Seen) -> bool:
    """Whether rows bring the hidden states of the frozen blocks."""
    return "boundary_states" in seen.job.trainer.train_dataset[0]


def drops(seen: Seen) -> list[bool]:
    """Whether each dropout module is active in training."""
    seen.model.train()
    return [module.training for name, module in seen.model.named_modules() if name.endswith("resid_dropout")]


BITS = "model.quantization"


def has_bits(model: Any) -> int:
    """How many layers are quantized."""
    return sum(hasattr(module, "quant_state") for module in model.modules())


def bits(seen: Seen) -> Any:
    """The first quantized layer."""
    return next(module for module in seen.job.base.model.modules() if hasattr(module, "quant_state"))


def bits_of_teacher(seen: Seen) -> Any:
    teacher = distiller(seen).teacher.model
    return next((module for module in teacher.modules() if hasattr(module, "quant_state")), None)


LORA, PARTIAL = "strategy={name: lora, r: 4}", "strategy={name: partial, head: false, last_n_layers: 1}"
SCRATCH = "strategy={name: scratch, parameters: 80k}"
WORDS, NO_MODEL = "model={tokenizer: BASE, dtype: float32}", "model={dtype: float32}"
NEW_WORDS = "strategy={name: scratch, parameters: 80k, tokenizer: {vocab_size: 300}}"


def tokens(seen: Seen) -> dict[str, int]:
    return dict(seen.job.data.renderer.tokenizer.get_vocab())


LABELS = ["task=text-classification", "data.train=LABELED"]
HEADED = ["task=text-classification", "data.train=LABELED", "strategy={name: head, layer: 3, pooling: mean}"]
PEFT = "strategy={name: peft, peft_type: IA3}"
PROBES: dict[str, Probe] = {
    "task": Probe(
        ["task=text-classification", "data.train=LABELED"],
        lambda s: type(s.job.base.model).__name__,
        "LlamaForSequenceClassification",
    ),
    "model.name_or_path": Probe(["model.name_or_path=GPT2"], lambda s: s.job.base.model.config.model_type, "gpt2"),
    "model.revision": Probe(
        ["model.revision=v1"], lambda s: (s.calls["model"].get("revision"), s.adapter.revision), ("v1", "v1")
    ),
    "model.tokenizer": Probe(["model.tokenizer=PLAIN"], lambda s: (s.calls["tokenizer"]["source"], account(s).template)),
    "model.add_tokens": Probe(["model.add_tokens=['<a>', '<b>']"], lambda s: len(s.adapter.trainable_token_indices or []), 2),
    "model.dtype": Probe(["model.dtype=bfloat16"], lambda s: s.layer().base_layer.weight.dtype, torch.bfloat16),
    "model.attn_implementation": Probe(
        ["model.attn_implementation=eager"], lambda s: s.job.base.model.config._attn_implementation, "eager"
    ),
    "model.pooling": Probe(
        ["model.pooling=mean"], lambda s: type(s.job.base.model).__name__, "PooledLlamaForSequenceClassification", LABELS
    ),
    "model.trust_remote_code": Probe(["model.trust_remote_code=true"], lambda s: s.calls["model"]["trust_remote_code"], True),
    "model.quantization.name": Probe([f"{BITS}=fp4"], lambda s: bits(s).weight.quant_type, "fp4", [f"{BITS}=nf4"]),
    "model.quantization.use_double_quant": Probe(
        [f"{BITS}={{name: nf4, use_double_quant: false}}"], lambda s: bits(s).weight.quant_state.nested, False, [f"{BITS}=nf4"]
    ),
    "model.quantization.compute_dtype": Probe(
        [f"{BITS}={{name: nf4, compute_dtype: bfloat16}}"], lambda s: bits(s).compute_dtype, torch.bfloat16, [f"{BITS}=nf4"]
    ),
    "model.quantization.skip_modules": Probe(
        [f"{BITS}={{name: nf4, skip_modules: [mlp]}}"], lambda s: has_bits(s.job.base.model), 16, [f"{BITS}=nf4"]
    ),
    "data.train.path": Probe(["data.train=OTHER"], lambda s: account(s).rows_read, 40),
    "data.train.weight": Probe(["data.train=[{path: DATA, weight: 2.5}]"], lambda s: len(s.job.data.train), 120),
    "data.train.format": Probe(["data.train=[{path: DATA, format: text}]"], lambda s: account(s).format, "text"),
    "data.train.columns": Probe(
        ["data.train=[{path: DATA, columns: {prompt: unused, spare: prompt}}]"],
        lambda s: "the spare column" in first_row(s),
        True,
    ),
    "data.eval.path": Probe(["data.eval=OTHER"], lambda s: len(s.job.data.eval), 40),
    "data.eval.weight": Probe(["data.eval=[{path: OTHER, weight: 1}]"], lambda s: len(s.job.data.eval), 40),
    "data.eval.format": Probe(
        ["data.eval=[{path: DATA, format: text}]"], lambda s: account(s, "eval").format, "text", ["data.eval=DATA"]
    ),
    "data.eval.columns": Probe(
        ["data.eval=[{path: DATA, columns: {prompt: unused, spare: prompt}}]"],
        lambda s: account(s, "eval").tokens,
        beside=["data.eval=DATA"],
    ),
    "data.eval_size": Probe(["data.eval_size=0.5"], lambda s: len(s.job.data.eval), 30),
    "data.eval_seed": Probe(["data.eval_seed=7"], lambda s: sorted(s.job.data.eval["row"])),
    "data.format": Probe(["data.format=text"], lambda s: account(s).format, "text"),
    "data.documents": Probe(
        ["data.documents=files"],
        lambda s: (account(s).rows_read, account(s, "eval").rows_read),
        (1, 1),
        ["data={train: TEXT, eval: TEXT}"],
    ),
    "data.columns": Probe(["data.columns={prompt: unused, spare: prompt}"], lambda s: "the spare column" in first_row(s), True),
    "data.template": Probe(
        ["data.template=plain"], lambda s: (account(s).template, "<|im_start|>" in first_row(s)), ("plain", False)
    ),
    "data.chat_template_kwargs": Probe(
        ["data.chat_template_kwargs={brief: true}"], lambda s: "Be brief" in first_row(s), True, ["data.template=BRIEF"]
    ),
    "data.train_on": Probe(["data.train_on=all"], lambda s: account(s).tokens - account(s).supervised, 60),
    "data.max_length": Probe(["data.max_length=40"], lambda s: account(s).rows_dropped > 0, True),
    "data.overflow": Probe(["data.overflow=truncate"], lambda s: account(s).rows_cut, beside=["data.max_length=LONGEST"]),
    "data.streaming": Probe(["data.streaming=true"], lambda s: s.job.data.stream is not None, True),
    "data.shuffle_buffer": Probe(
        ["data.shuffle_buffer=7"],
        lambda s: [row["row"] for row in s.job.train_data.train.step(1)],
        beside=["data.streaming=true"],
    ),
    "training.learning_rate": Probe(["training.learning_rate=3e-4"], lambda s: s.args.learning_rate, 3e-4),
    "training.head_learning_rate": Probe(["training.head_learning_rate=0.05"], rates, [0.01, 0.05], LABELS),
    "training.num_train_epochs": Probe(
        ["training={num_train_epochs: 2, global_batch_size: 8}"], lambda s: s.job.plan.steps, 12
    ),
    "training.max_steps": Probe(["training.max_steps=3"], lambda s: s.args.max_steps, 3),
    "training.max_time": Probe(["training.max_time=90s"], lambda s: s.job.trainer.clock and s.job.trainer.clock.limit, 90.0),
    "training.global_batch_size": Probe(["training.global_batch_size=16"], lambda s: s.args.gradient_accumulation_steps, 4),
    "training.per_device_train_batch_size": Probe(
        ["training.per_device_train_batch_size=2"],
        lambda s: (s.args.per_device_train_batch_size, s.args.gradient_accumulation_steps),
        (2, 4),
    ),
    "training.per_device_eval_batch_size": Probe(
        ["training.per_device_eval_batch_size=3"], lambda s: s.args.per_device_eval_batch_size, 3
    ),
    "training.train_sampling_strategy": Probe(
        ["training.train_sampling_strategy=random"], lambda s: list(s.job.trainer._get_train_sampler())
    ),
    "training.torch_compile": Probe(
        ["training.torch_compile=true"],
        lambda s: s.job.base.model.model.layers[0]._compiled_call_impl is not None,
        True,
    ),
    "training.global_batch_tokens": Probe(
        ["training.global_batch_size=16", "training.packing=dense", "training.global_batch_tokens=400"],
        lambda s: max(s.job.progress.order.tokens(step) for step in range(4)) <= 400,
        True,
        ["training.global_batch_size=16", "training.packing=dense", "training.global_batch_tokens=2000"],
    ),
    "training.packing": Probe(["training.packing=true"], lambda s: type(s.job.trainer.train_dataset).__name__, "PackedRows"),
    "training.lr_scheduler_type": Probe(
        ["training.lr_scheduler_type=linear"], lambda s: s.args.lr_scheduler_type.value, "linear"
    ),
    "training.warmup_steps": Probe(["training.warmup_steps=2"], lambda s: s.args.get_warmup_steps(100), 2),
    "training.optim": Probe(["training.optim=sgd"], lambda s: type(s.job.trainer.create_optimizer()).__name__, "SGD"),
    "training.weight_decay": Probe(["training.weight_decay=0.1"], lambda s: s.args.weight_decay, 0.1),
    "training.max_grad_norm": Probe(["training.max_grad_norm=0.5"], lambda s: s.args.max_grad_norm, 0.5),
    "training.activation_checkpointing": Probe(["training.activation_checkpointing=true"], recomputes, True),
    "training.logging_steps": Probe(["training.logging_steps=2"], lambda s: s.args.logging_steps, 2),
    "training.eval_steps": Probe(["training.eval_steps=1"], lambda s: s.args.eval_steps, 1),
    "training.save_steps": Probe(["training.save_steps=4"], lambda s: s.args.save_steps, 4),
    "training.save_total_limit": Probe(["training.save_total_limit=5"], lambda s: s.job.trainer.keep, 5),
    "training.load_best_model_at_end": Probe(
        ["training.load_best_model_at_end=false"], lambda s: s.args.load_best_model_at_end, False
    ),
    "training.early_stopping_patience": Probe(["training.early_stopping_patience=2"], patience, [2]),
    "training.resume_from_checkpoint": Probe(
        ["training.resume_from_checkpoint=CHECKPOINT"], lambda s: s.job.checkpoint and s.job.checkpoint.name, "checkpoint-2"
    ),
    "training.extra": Probe(["training.extra.adam_beta2=0.9"], lambda s: s.args.adam_beta2, 0.9),
    "evaluation.eval_on_start": Probe(["evaluation.eval_on_start=false"], lambda s: s.args.eval_on_start, False),
    "evaluation.max_rows": Probe(["evaluation.max_rows=5"], lambda s: len(s.job.data.eval), 5),
    "evaluation.prompts": Probe(["evaluation.prompts=[who]"], lambda s: s.job.prompts, ["who"]),
    "evaluation.samples": Probe(["evaluation.samples=2"], lambda s: len(s.job.prompts), 2),
    "evaluation.metrics": Probe(["evaluation.metrics=[f1]"], lambda s: "answers" in measured(s), True),
    "evaluation.metric_rows": Probe(
        ["evaluation.metric_rows=2"], lambda s: measured(s)["answers"].rows, 2, ["evaluation.metrics=[json]"]
    ),
    "evaluation.regex": Probe(
        ["evaluation.regex='.*'"],
        lambda s: measured(s)["answers"].values(),
        {"regex": 1.0},
        ["evaluation={metrics: [regex], regex: zzz}"],
    ),
    "evaluation.temperature": Probe(
        ["evaluation.temperature=5.0"], lambda s: measured(s)["answers"].details, None, ["evaluation.metrics=[f1]"]
    ),
    "evaluation.choices": Probe(["evaluation.choices=[CHOICES]"], lambda s: "choices.jsonl" in measured(s), True),
    "evaluation.lm_eval": Probe(["evaluation.lm_eval=[a, b]"], asked_of_the_harness, (["a", "b"], None)),
    "evaluation.include_path": Probe(
        ["evaluation.include_path=here"], asked_of_the_harness, (["a"], "here"), ["evaluation.lm_eval=[a]"]
    ),
    "evaluation.control": Probe(["evaluation.control=off"], lambda s: "control text" in measured(s), False),
    "evaluation.baselines": Probe(["evaluation.baselines=false"], lambda s: len(s.job.simple_models), 0, HEADED),
    "evaluation.label_thresholds": Probe(
        ["evaluation.label_thresholds=false"], lambda s: len(s.job.data.train), 208, [LABELS[0], "data.train=SEVERAL"]
    ),
    "evaluation.batch_tokens": Probe(["evaluation.batch_tokens=77"], budget, 77),
    "evaluation.max_new_tokens": Probe(["evaluation.max_new_tokens=2"], asked_length, [2], ["seed=42"]),
    "seed": Probe(["seed=1"], lambda s: (s.args.seed, s.job.trainer.sampler.batch(0).tolist())),
    "output_dir": Probe(
        ["output_dir=ELSEWHERE"], lambda s: (s.job.folder.name, Path(s.args.output_dir).name), ("elsewhere",) * 2
    ),
    "strategy.full.name": Probe(["strategy=full"], lambda s: all(p.requires_grad for p in s.model.parameters()), True),
    "strategy.lora.name": Probe([LORA], lambda s: hasattr(s.model, "peft_config"), True, ["strategy=full"]),
    "strategy.partial.name": Probe([PARTIAL], blocks, {"3"}, ["strategy=full"]),
    "strategy.lora.r": Probe(["strategy.r=2"], lambda s: s.layer().lora_A["default"].weight.shape[0], 2),
    "strategy.lora.lora_alpha": Probe(["strategy.lora_alpha=4"], lambda s: s.layer().scaling["default"], 1.0),
    "strategy.lora.lora_dropout": Probe(["strategy.lora_dropout=0.25"], dropouts, [0.25]),
    "strategy.lora.target_modules": Probe(
        ["strategy.target_modules=[q_proj]"], lambda s: {n.split(".")[-4] for n in s.learning()}, {"q_proj"}
    ),
    "strategy.lora.target_parameters": Probe(
        ["strategy.target_parameters=[lm_head.weight]"], lambda s: any("lm_head" in name for name in s.learning()), True
    ),
    "strategy.lora.use_dora": Probe(["strategy.use_dora=true"], lambda s: any("magnitude" in n for n in s.learning()), True),
    "strategy.lora.use_rslora": Probe(["strategy.use_rslora=true"], lambda s: s.layer().scaling["default"], 4.0),
    "strategy.lora.init_lora_weights": Probe(
        ["strategy.init_lora_weights=pissa"], lambda s: bool(s.layer().lora_B["default"].weight.any()), True
    ),
    "strategy.lora.modules_to_save": Probe(
        ["strategy.modules_to_save=[lm_head]"], lambda s: any("lm_head" in name for name in s.learning()), True
    ),
    "strategy.lora.adapter": Probe(
        ["strategy={name: lora, adapter: ADAPTER}"],
        lambda s: (s.adapter.r, bool(s.layer().lora_B["default"].weight.any())),
        (3, True),
    ),
    "strategy.peft.name": Probe([PEFT], lambda s: hasattr(s.model, "peft_config"), True, ["strategy=full"]),
    "strategy.peft.peft_type": Probe(
        ["strategy.peft_type=VERA"], lambda s: s.model.peft_config["default"].peft_type.value, "VERA", [PEFT]
    ),
    "strategy.head.name": Probe(["strategy=head"], lambda s: s.learning(), {"lm_head.weight"}, ["strategy=full"]),
    "strategy.head.layer": Probe(["strategy.layer=1"], lambda s: s.model.layer, 1, HEADED),
    "strategy.head.pooling": Probe(["strategy.pooling=first"], lambda s: s.model.pooling, "first", HEADED),
    "strategy.head.head": Probe(["strategy.head=mlp"], lambda s: len(linears(s)), 2, HEADED),
    "strategy.head.hidden_size": Probe(
        ["strategy.hidden_size=8"], lambda s: linears(s)[0].out_features, 8, [*HEADED, "strategy.head=mlp"]
    ),
    "strategy.head.solver": Probe(["strategy.solver=trainer"], lambda s: hasattr(s.job.trainer, "strength"), False, HEADED),
    "strategy.head.l2": Probe(["strategy.l2=0.5"], lambda s: s.job.trainer.strength, 0.5, HEADED),
    "strategy.head.contrastive": Probe(
        ["strategy={name: head, contrastive: true, contrastive_steps: 2}"],
        lambda s: contrast(s, "steps"),
        2,
        HEADED,
    ),
    "strategy.head.contrastive_steps": Probe(
        ["strategy={name: head, contrastive: true, contrastive_steps: 3}"],
        lambda s: contrast(s, "steps"),
        3,
        HEADED,
    ),
    "strategy.head.contrastive_learning_rate": Probe(
        ["strategy={name: head, contrastive: true, contrastive_steps: 2, contrastive_learning_rate: 1e-4}"],
        lambda s: contrast(s, "learning_rate"),
        1e-4,
        HEADED,
    ),
    "strategy.head.then": Probe(
        ["strategy.then=full"],
        lambda s: all(p.requires_grad for p in s.model.parameters()),
        True,
        [*HEADED[:2], "strategy={name: head, layer: 3}"],
    ),
    "strategy.partial.last_n_layers": Probe(["strategy.last_n_layers=2"], blocks, {"2", "3"}, [PARTIAL]),
    "strategy.partial.patterns": Probe(["strategy.patterns=['*.0.mlp.*']"], blocks, {"0", "3"}, [PARTIAL]),
    "strategy.partial.embeddings": Probe(
        ["strategy.embeddings=true"], lambda s: "model.embed_tokens.weight" in s.learning(), True, [PARTIAL]
    ),
    "strategy.gradual_unfreezing.every": Probe(
        ["strategy.gradual_unfreezing={every: 0.25}"],
        stages,
        [1, 2],
        ["strategy={name: partial, head: true, last_n_layers: 1}"],
    ),
    "strategy.partial.layer_decay": Probe(
        ["strategy.layer_decay=0.5"], rates, [0.005, 0.01], ["strategy={name: partial, head: true, last_n_layers: 1}"]
    ),
    "strategy.partial.precompute": Probe(["strategy.precompute=true"], stored, True, [PARTIAL]),
    "strategy.partial.frozen_dropout": Probe(
        ["strategy.frozen_dropout=false"], drops, [False, False, True], [PARTIAL, "model.name_or_path=GPT2"]
    ),
    "strategy.partial.head": Probe(["strategy.head=true"], lambda s: "lm_head.weight" in s.learning(), True, [PARTIAL]),
    "strategy.scratch.name": Probe(
        [SCRATCH], lambda s: s.job.baselines is not None, True, [WORDS, "strategy=full", "model=BASE"]
    ),
    "strategy.scratch.model_type": Probe(
        ["strategy.model_type=gpt2"], lambda s: s.model.config.model_type, "gpt2", [WORDS, SCRATCH]
    ),
    "strategy.scratch.parameters": Probe(
        ["strategy.parameters=300k"], lambda s: s.model.num_parameters() // 10_000 in (29, 30, 31), True, [WORDS, SCRATCH]
    ),
    "strategy.scratch.config": Probe(
        ["strategy.config={num_key_value_heads: 1}"], lambda s: s.model.config.num_key_value_heads, 1, [WORDS, SCRATCH]
    ),
    "strategy.scratch.model_class": Probe(
        ["strategy={name: scratch, model_class: 'CLASS:Bag'}"], lambda s: type(s.model).__name__, "Bag", [WORDS, SCRATCH]
    ),
    "strategy.tokenizer.vocab_size": Probe(
        ["strategy.tokenizer.vocab_size=305"], lambda s: len(tokens(s)), 305, [NO_MODEL, NEW_WORDS]
    ),
    "strategy.tokenizer.special_tokens": Probe(
        ["strategy.tokenizer.special_tokens=['<a>']"], lambda s: "<a>" in tokens(s), True, [NO_MODEL, NEW_WORDS]
    ),
    "strategy.tokenizer.chat_template": Probe(
        ["strategy.tokenizer.chat_template=none"], lambda s: account(s).template, "plain", [NO_MODEL, NEW_WORDS]
    ),
}
DISTILL = "strategy={name: distill, teacher: {name_or_path: TEACHER}, student: full}"
UNCACHED = "strategy={name: distill, teacher: {name_or_path: TEACHER}, student: full, teacher_cache: {form: 'off'}}"
THEIRS = "strategy.teacher.quantization"
PROBES |= {
    "strategy.distill.name": Probe(["strategy={name: distill, student: full}"], lambda s: distiller(s) is not None, True),
    "strategy.distill.divergence": Probe(["strategy.divergence=jsd"], lambda s: distiller(s).mix.divergence, "jsd", [DISTILL]),
    "strategy.distill.teacher_weight": Probe(
        ["strategy.teacher_weight=0.0"], lambda s: distiller(s).is_active, False, [DISTILL]
    ),
    "strategy.distill.temperature": Probe(["strategy.temperature=2.0"], lambda s: distiller(s).mix.temperature, 2.0, [DISTILL]),
    "strategy.distill.skew": Probe(
        ["strategy.skew=0.3"], lambda s: distiller(s).mix.skew, 0.3, [DISTILL, "strategy.divergence=skew_kl"]
    ),
    "strategy.distill.seq_kd": Probe(["strategy.seq_kd=true"], first_row, None, [DISTILL]),
    "strategy.distill.on_policy": Probe(
        ["strategy.on_policy=true"], lambda s: type(s.job.trainer).__name__, "OnPolicyTrainer", [DISTILL]
    ),
    "strategy.distill.max_new_tokens": Probe(
        ["strategy.max_new_tokens=3"], lambda s: max(s.job.data.train["length"]), None, [DISTILL, "strategy.seq_kd=true"]
    ),
    "strategy.teacher.name_or_path": Probe(
        ["strategy.teacher.name_or_path=UNTIED"],
        lambda s: s.job.train_data.facts["distillation"]["teacher"]["parameters"],
        56_800,
        [DISTILL],
    ),
    "strategy.teacher.revision": Probe(
        ["strategy.teacher.revision=v1"], lambda s: s.calls["model"].get("revision"), "v1", [DISTILL]
    ),
    "strategy.teacher.trust_remote_code": Probe(
        ["strategy.teacher.trust_remote_code=true"], lambda s: s.calls["model"]["trust_remote_code"], True, [DISTILL]
    ),
    "strategy.teacher.quantization.name": Probe(
        [f"{THEIRS}=nf4"], lambda s: bits_of_teacher(s) and bits_of_teacher(s).weight.quant_type, "nf4", [UNCACHED]
    ),
    "strategy.teacher.quantization.use_double_quant": Probe(
        [f"{THEIRS}={{name: nf4, use_double_quant: false}}"],
        lambda s: bits_of_teacher(s).weight.quant_state.nested,
        False,
        [UNCACHED, f"{THEIRS}=nf4"],
    ),
    "strategy.teacher.quantization.compute_dtype": Probe(
        [f"{THEIRS}={{name: nf4, compute_dtype: bfloat16}}"],
        lambda s: bits_of_teacher(s).compute_dtype,
        torch.bfloat16,
        [UNCACHED, f"{THEIRS}=nf4"],
    ),
    "strategy.teacher.quantization.skip_modules": Probe(
        [f"{THEIRS}={{name: nf4, skip_modules: [mlp]}}"],
        lambda s: has_bits(distiller(s).teacher.model),
        16,
        [UNCACHED, f"{THEIRS}=nf4"],
    ),
    "strategy.shrink.layers": Probe(
        ["strategy.shrink={layers: [0, 3]}"], lambda s: s.job.base.model.config.num_hidden_layers, 2, [DISTILL]
    ),
    "strategy.shrink.intermediate_size": Probe(
        ["strategy.shrink={intermediate_size: 24}"], lambda s: s.job.base.model.config.intermediate_size, 24, [DISTILL]
    ),
    "strategy.hidden_states.loss": Probe(
        ["strategy.hidden_states={loss: cosine}"], lambda s: matched(s, "kind"), "cosine", [DISTILL]
    ),
    "strategy.hidden_states.weight": Probe(
        ["strategy.hidden_states={weight: 2.0}"], lambda s: matched(s, "weight"), 2.0, [DISTILL]
    ),
    "strategy.hidden_states.layers": Probe(
        ["strategy.hidden_states={layers: [[0, 1]]}"], lambda s: matched(s, "pairs"), [(0, 1)], [DISTILL]
    ),
    "strategy.teacher_cache.form": Probe(
        ["strategy.teacher_cache.form=sampled"], lambda s: answers_kept(s)["form"], "sampled", [DISTILL]
    ),
    "strategy.teacher_cache.tokens": Probe(
        ["strategy.teacher_cache.tokens=7"],
        lambda s: answers_kept(s)["width"],
        7,
        [DISTILL, "strategy.teacher_cache.form=top_k"],
    ),
    "strategy.teacher_cache.budget": Probe(
        ["strategy.teacher_cache.budget=1KB"], lambda s: bool(answers_kept(s)), False, [DISTILL]
    ),
}
GRPO_KEYS: dict[str, Any] = {  # and beta and loss_type, which other objectives have as well
    "num_generations": 3,
    "max_completion_length": 5,
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 7,
    "scale_rewards": "batch",
    "epsilon": 0.3,
    "epsilon_high": 0.4,
    "mask_truncated_completions": True,
    "use_vllm": True,
    "vllm_mode": "server",
}
APART = {  # keys that are probed by a test of their own, below
    "training.float8": "test_float8_needs_a_gpu_that_has_it",
    "evaluation.rare_class_precision": "test_a_precision_gives_a_rare_class_a_threshold",
    "strategy.head.untie": "test_a_tied_head_can_be_untied",
    "strategy.student": "test_a_student_is_the_strategy_that_it_learns_by",
    "strategy.distill.baseline": "test_when_the_run_without_a_teacher_is_made",
    "data.bad_rows": "test_bad_rows_end_a_stream_or_are_left_out",
    "data.config": "test_what_a_hub_data_set_is_asked_for",
    "data.revision": "test_what_a_hub_data_set_is_asked_for",
    "data.split": "test_what_a_hub_data_set_is_asked_for",
    "data.eval_split": "test_what_a_hub_data_set_is_asked_for",
    **{
        f"data.{part}.{name}": "test_each_source_asks_for_its_own"
        for part in ("train", "eval")
        for name in ("config", "split", "revision")
    },
    **dict.fromkeys(
        (
            *("objective.name", "objective.beta", "objective.loss_type", "objective.label_smoothing", "objective.discopop_tau"),
            *("objective.simpo_gamma", "objective.desirable_weight", "objective.undesirable_weight"),
        ),
        "test_every_key_of_an_objective_changes_its_loss",
    ),
    **{f"objective.{key}": "test_every_key_of_grpo_reaches_its_trainer" for key in GRPO_KEYS},
    **{f"objective.rewards.{key}": "test_every_key_of_a_reward_changes_it" for key in Reward.model_fields},
    **{f"image.{key}": "test_every_key_of_images_changes_a_batch" for key in Images.model_fields if key not in OF_CHATS},
    **{f"audio.{key}": "test_every_key_of_audio_changes_a_batch" for key in Audio.model_fields},
    **dict.fromkeys(
        (*(f"image.{key}" for key in OF_CHATS), "strategy.full.freeze", "strategy.lora.freeze"),
        "test_every_key_of_vision_language_changes_a_job",
    ),
    **dict.fromkeys(("data.box_format", "data.class_names"), "test_every_key_of_boxes_changes_the_data"),
    "training.class_weights": "test_class_weights_are_those_of_the_training_loss",
    "training.report_to": "test_a_tracker_is_handed_to_the_trainer",
    "hub.push_to_hub": "test_what_the_hub_is_asked_for",
    "hub.repo_id": "test_what_the_hub_is_asked_for",
    "hub.private": "test_what_the_hub_is_asked_for",
    "hub.revision": "test_what_the_hub_is_asked_for",
}


def keys() -> set[str]:
    """Every key of the schema that is no section, with the strategy's name where it belongs to one."""
    sections = suggestions.sections_of(Recipe)
    found = set()
    for path, classes in sections.items():
        if path[:2] in (("strategy", "student"), ("strategy", "then")):  # have other strategies' keys
            found.add("strategy.student" if path[1] == "student" else "strategy.head.then")
            continue
        for section in classes:
            names = {name for name in section.model_fields if (*path, name) not in sections}
            found |= {".".join((*path, *_strategy(section), name)) for name in names}
    return found


def _strategy(section: type[BaseModel]) -> list[str]:
    return [name for name, cls in STRATEGIES.items() if cls is section]


def test_every_key_has_a_probe_and_every_probe_a_key() -> None:
    """A new key needs a line here that shows what it does."""
    assert set(PROBES) | set(APART) == keys()
    assert not set(PROBES) & set(APART)
    assert all(callable(globals().get(test)) for test in APART.values())


@pytest.fixture(scope="module")
def data_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that several formats can read, in unequal lengths."""
    texts = sentences(120, seed=1)
    rows = [
        {"prompt": f"{n} {a}", "completion": b, "text": a, "spare": f"the spare column {n}"}
        for n, (a, b) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    return write_jsonl(tmp_path_factory.mktemp("live") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def set_up(models: Any, data_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """`set_up(["a.b=c"])` makes a job of the sound recipe, in a folder of its own."""

    def get(overrides: list[str]) -> Seen:
        folder = tmp_path_factory.mktemp("job")
        recipe = folder / "recipe.yaml"
        text = SOUND.replace("MODEL", str(models())).replace("ROWS", str(data_rows)).replace("RUN", str(folder / "run"))
        recipe.write_text(text)
        with recorded() as calls:
            job = setup.set_up(load_recipe(str(recipe), overrides), one_process(), overwrite=False)
        assert job.lock is not None
        job.lock.close()
        return Seen(job, calls)

    return get


def one_process() -> Any:
    return SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)


class recorded:
    """Keeps the source and the keywords that model and tokenizer are loaded with."""

    def __enter__(self) -> dict[str, dict[str, Any]]:
        self.patch, self.calls = pytest.MonkeyPatch(), {}
        for name, loader in (("model", AutoModelForCausalLM), ("tokenizer", AutoTokenizer)):
            self.patch.setattr(loader, "from_pretrained", self._recorder(name, loader.from_pretrained))
        return self.calls

    def _recorder(self, name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: str, **options: Any) -> Any:
            self.calls[name] = {"source": source, **options}
            return load(source, **options)

        return call

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def sound(set_up: Callable[..., Seen]) -> Seen:
    return set_up([])


@pytest.fixture
def paths(models: Any, sound: Seen, tmp_path: Path) -> Callable[[str], str]:
    """Fills in the paths for words in capitals, creating what they name."""
    makers: dict[str, Callable[[], Any]] = {
        "GPT2": lambda: models(family="gpt2"),
        "BASE": lambda: models(),
        "CLASS": lambda: own_class(tmp_path),
        "TEXT": lambda: some_text(tmp_path),
        "TEACHER": lambda: models(tied=True),
        "UNTIED": lambda: models(),
        "PLAIN": lambda: models(chat=False),
        "DATA": lambda: sound.job.recipe.data.train[0].path,
        "BRIEF": lambda: write_template(tmp_path, "{% if brief %}Be brief. {% endif %}" + TEMPLATE),
        "OTHER": lambda: other_rows(tmp_path),
        "LABELED": lambda: labeled(tmp_path),
        "SEVERAL": lambda: labeled(tmp_path, count=220, many=True),
        "CHOICES": lambda: write_jsonl(tmp_path / "choices.jsonl", [{"query": "a", "choices": ["cat", "dog"], "gold": 0}]),
        "LONGEST": lambda: max(sound.job.data.train["length"]) - 1,
        "ELSEWHERE": lambda: tmp_path / "elsewhere",
        "CHECKPOINT": lambda: checkpoint_of(sound, tmp_path),
        "ADAPTER": lambda: adapter_for(sound, tmp_path),
    }

    def fill(override: str) -> str:
        for word, make in makers.items():
            if word in override:
                override = override.replace(word, str(make()))
        return override

    return fill


def own_class(folder: Path) -> Path:
    (folder / "own_bag.py").write_text(OWN)
    return folder / "own_bag.py"


def some_text(folder: Path) -> Path:
    (folder / "some.txt").write_text("\n".join(sentences(5)))
    return folder / "some.txt"


def write_template(folder: Path, text: str) -> Path:
    file = folder / "template.jinja"
    file.write_text(text)
    return file


def other_rows(folder: Path) -> Path:
    rows = [{"prompt": f"{n}", "completion": text} for n, text in enumerate(sentences(40, seed=9))]
    return write_jsonl(folder / "other.jsonl", rows)


def checkpoint_of(sound: Seen, folder: Path) -> Path:
    """A complete checkpoint of the sound recipe."""
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir()
    recipe = sound.job.recipe.model_dump()
    checkpoints.mark_complete(checkpoint, {"recipe": recipe, "micro_batch": 4})
    return checkpoint


def adapter_for(sound: Seen, folder: Path) -> Path:
    """An adapter of rank 3 whose update is not zero."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(sound.job.recipe.model.name_or_path)
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize("key", PROBES)
@pytest.mark.slow
def test_another_value_makes_a_difference(set_up: Any, sound: Seen, paths: Callable[[str], str], key: str) -> None:
    probe = PROBES[key]
    beside, overrides = [paths(word) for word in probe.beside], [paths(word) for word in probe.overrides]
    before = probe.look(set_up(beside) if beside else sound)
    after = probe.look(set_up([*beside, *overrides]))
    assert before != after
    if probe.wanted is not None:
        assert after == probe.wanted


def test_bad_rows_end_a_stream_or_are_left_out(set_up: Any, tmp_path: Path) -> None:
    file = other_rows(tmp_path)
    file.write_text(file.read_text() + "{\n")
    given = [f"data={{train: {file}, streaming: true, eval_size: 12, max_length: 128}}"]
    with pytest.raises(UserError, match="not valid JSON"):
        set_up(given)
    assert account(set_up([*given, "data.bad_rows=skip"])).rows_bad == 1


def test_a_student_is_the_strategy_that_it_learns_by(sound: Seen) -> None:
    """Every key of a student is read by the strategy that has it, which has probes of its own."""
    sections: list[dict[str, Any]] = [
        {"name": "full"},
        {"name": "lora", "r": 2, "lora_alpha": 3, "lora_dropout": 0.5, "target_modules": ["q_proj"], "use_rslora": True},
        {"name": "partial", "last_n_layers": 2, "patterns": ["*.0.*"], "head": True},
        {"name": "scratch", "model_type": "gpt2", "parameters": "1M", "config": {"n_head": 2}},
    ]
    recipe = sound.job.recipe.model_dump(exclude_none=True)
    for section in sections:
        alone = Recipe.model_validate({**recipe, "strategy": section}).strategy
        distill = {"name": "distill", "teacher": "a-teacher", "student": section}
        nested = Recipe.model_validate({**recipe, "strategy": distill}).strategy
        assert nested.student == alone
        assert nested.training_defaults() == alone.training_defaults()


def test_when_the_run_without_a_teacher_is_made(
    sound: Seen, set_up: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfstrat.strategies.distill import report as distill_report

    started: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(load_recipe(command[3]).recipe)
        return SimpleNamespace(returncode=1, stderr="stopped here")

    monkeypatch.setattr(distill_report.subprocess, "run", run)
    for setting, seconds, runs in (("auto", 10, 1), ("auto", 1000, 0), ("true", 1000, 1), ("false", 10, 0)):
        started.clear()
        job = set_up([DISTILL.replace("TEACHER", sound.job.recipe.model.name_or_path), f"strategy.baseline={setting}"]).job
        _, reason = distill_report._baseline(job.recipe.strategy, job.loaded, seconds)
        assert len(started) == runs, reason
        assert reason
        if runs:
            assert started[0].strategy.teacher_weight == 0.0
            assert started[0].training == job.recipe.training.model_copy(update={"resume_from_checkpoint": "never"})
            assert not started[0].hub.push_to_hub


@pytest.mark.parametrize(
    ("settings", "requested"),
    [
        ({"eval": "me/eval"}, [("me/set", None, "train", None), ("me/eval", None, "train", None)]),
        ({"eval": "me/eval", "config": "c"}, [("me/set", "c", "train", None), ("me/eval", "c", "train", None)]),
        ({"eval": "me/eval", "revision": "r"}, [("me/set", None, "train", "r"), ("me/eval", None, "train", "r")]),
        ({"eval": "me/eval", "split": "s"}, [("me/set", None, "s", None), ("me/eval", None, "s", None)]),
        ({"split": "train[:10%]"}, [("me/set", None, "train[:10%]", None)]),
        ({"eval_split": "test"}, [("me/set", None, "train", None), ("me/set", None, "test", None)]),
    ],
    ids=["plain", "config", "revision", "split", "slice", "eval_split"],
)
def test_what_a_hub_data_set_is_asked_for(
    sound: Seen, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], requested: list[Any]
) -> None:
    seen = []

    def load_dataset(source: str, config: str | None, split: str, revision: str | None) -> Dataset:
        seen.append((source, config, split, revision))
        return Dataset.from_list([{"prompt": f"who {n}", "completion": "the cat"} for n in range(4)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    prepare(Data(train="me/set", **settings), sound.job.data.renderer.tokenizer, seed=1)
    assert seen == requested


def test_each_source_asks_for_its_own(sound: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And another revision of the same rows is another entry in the cache."""
    seen = []

    def load_dataset(source: str, config: str | None, split: str, revision: str | None) -> Dataset:
        seen.append((source, config, split, revision))
        return Dataset.from_list([{"prompt": f"{source} {n}", "completion": "the cat"} for n in range(4)])

    def requested(**settings: Any) -> set[str]:
        seen.clear()
        data = Data.model_validate({"config": "all", "revision": "main", **settings})
        prepare(data, sound.job.data.renderer.tokenizer, seed=1)
        return {path.stem for path in tmp_path.glob("*.arrow")}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setenv("HFSTRAT_CACHE", str(tmp_path))
    own = {"path": "me/a", "config": "c", "split": "s[:10%]", "revision": "r"}
    before = requested(train=[own, "me/b"], eval=[own | {"split": "test"}, "me/c"])
    assert seen == [
        ("me/a", "c", "s[:10%]", "r"),
        ("me/b", "all", "train", "main"),
        ("me/a", "c", "test", "r"),
        ("me/c", "all", "train", "main"),
    ]
    after = requested(train=[own | {"revision": "other"}, "me/b"], eval=[own | {"split": "test"}, "me/c"])
    assert len(after - before) == 1
    requested(train=[own], eval_split="validation")
    assert [split for _, _, split, _ in seen] == ["s[:10%]", "validation"]


@pytest.mark.parametrize(
    ("settings", "repo", "private", "branches"),
    [
        ({"repo_id": "me/x"}, None, None, []),
        ({"push_to_hub": True, "repo_id": "me/x"}, "me/x", True, ["main"]),
        ({"push_to_hub": True, "repo_id": "me/y"}, "me/y", True, ["main"]),
        ({"push_to_hub": True, "repo_id": "me/x", "private": False}, "me/x", False, ["main"]),
        ({"push_to_hub": True, "repo_id": "me/x", "revision": "v2"}, "me/x", True, ["main", "v2"]),
    ],
    ids=["no push", "push", "repo", "private", "revision"],
)
def test_what_the_hub_is_asked_for(
    tmp_path: Path, settings: dict[str, Any], repo: str | None, private: bool | None, branches: list[str]
) -> None:
    run = finished_run(tmp_path / "run", hub=settings)
    report = read(run)
    assert report
    with LoopbackHub() as server, in_process(server, tmp_path / "home"):
        push.push(report.run.recipe, run, report)
        assert list(server.repos) == ([repo] if repo else [])
        if repo:
            assert server.repos[repo].private is private
            assert sorted(server.repos[repo].branches) == branches


def test_a_tracker_is_handed_to_the_trainer(set_up: Callable[..., Seen]) -> None:
    """Whether or not its package is there."""
    callbacks = set_up(["training.report_to=[tensorboard]"]).job.trainer.callback_handler.callbacks
    assert [each.name for each in callbacks if isinstance(each, Tracker)] == ["tensorboard"]


def test_a_tied_head_can_be_untied(set_up: Callable[..., Seen], models: Any) -> None:
    tied = f"model.name_or_path={models(tied=True)}"
    assert set_up([tied, "strategy={name: head, untie: true}"]).learning() == {"lm_head.weight"}
    with pytest.raises(UserError, match=r"strategy\.untie"):
        set_up([tied, "strategy={name: head, untie: false}"])


def test_a_precision_gives_a_rare_class_a_threshold(tmp_path: Path) -> None:
    """`evaluation.rare_class_precision`; what it does is in tests/tasks/test_thresholds.py."""
    from types import SimpleNamespace

    import numpy as np

    from hfstrat.run import held_out
    from hfstrat.strategies.full import Full

    counts = SimpleNamespace(train=range(500), counts=np.array([450, 50]), label_names=["a", "b"], many=False)
    counts.hold_out = lambda count, seed: (counts, count)
    given = {"task": "text-classification", "model": "m", "strategy": "full", "data": {"train": "x"}, "output_dir": "o"}
    plain = load_recipe("recipe.yaml", [], json.dumps(given)).recipe
    asked = load_recipe("recipe.yaml", ["evaluation.rare_class_precision=0.8"], json.dumps(given)).recipe
    found = [held_out.hold_out(recipe, Full(recipe.strategy), counts)[1] for recipe in (plain, asked)]  # type: ignore[arg-type]
    assert found == [None, 75]


def test_float8_needs_a_gpu_that_has_it(set_up: Callable[..., Seen]) -> None:
    """Another value of `training.float8`; what it changes is in tests/models/test_float8.py."""
    with pytest.raises(UserError, match=r"training\.float8: true needs a GPU"):
        set_up(["strategy=full", "training.float8=true"])


def test_overflow_can_split(set_up: Callable[..., Seen], paths: Callable[[str], str]) -> None:
    """Another value of `data.overflow`."""
    assert account(set_up(["data.overflow=split", paths("data.max_length=LONGEST")])).rows_split > 0


def test_overflow_can_refuse(set_up: Callable[..., Seen], paths: Callable[[str], str]) -> None:
    """The last value of `data.overflow`."""
    with pytest.raises(UserError, match="overflow: error"):
        set_up(["data.overflow=error", paths("data.max_length=LONGEST")])


def test_a_recipe_is_what_its_job_says(sound: Seen) -> None:
    """The marker of a checkpoint holds the recipe as it was resolved."""
    assert json.loads(json.dumps(sound.job.trainer.marker_state["recipe"])) == sound.job.recipe.model_dump()


def test_every_key_of_grpo_reaches_its_trainer(set_up: Callable[..., Seen]) -> None:
    from hfstrat.objectives.reinforcement.trainer import SAME

    assert {*GRPO_KEYS, "beta", "loss_type", "name", "rewards"} == set(OBJECTIVES["grpo"].model_fields)
    assert {*GRPO_KEYS, "loss_type"} == set(SAME)
    changes = {**{key: value for key, value in GRPO_KEYS.items() if "vllm" not in key}, "beta": 0.1, "loss_type": "bnpo"}
    given = {"name": "grpo", "rewards": ["exact_match", {"name": "json_valid", "weight": 2.0}]}
    training = ["training.global_batch_size=2", "training.per_device_train_batch_size=1"]
    plain, other = (
        set_up([f"objective={json.dumps(objective)}", *training]).args
        for objective in ({**given, "max_completion_length": 9}, {**given, **changes})
    )
    for key, value in changes.items():
        assert getattr(other, key) == value
        assert getattr(plain, key) != value, key
    assert other.reward_weights == [1.0, 2.0]
    assert (plain.per_device_train_batch_size, other.per_device_train_batch_size) == (8, 3)


def test_every_key_of_a_reward_changes_it(tmp_path: Path) -> None:
    tokenizer, file = make_tokenizer(), tmp_path / "mine.py"
    file.write_text("def mine(completions, length=3):\n    return [float(len(text) == length) for text in completions]\n")
    given = [{"prompt": "a", "answer": "The cat 1,000", "columns": {}}]
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
        "name": ({"name": "exact_match"}, {"name": "numeric"}, "1000"),
        "pattern": ({"name": "regex", "pattern": "dog"}, {"name": "regex", "pattern": "cat"}, "cat"),
        "ignore_case": ({"name": "exact_match"}, {"name": "exact_match", "ignore_case": True}, "the CAT 1,000"),
        "json_schema": (
            {"name": "json_schema", "json_schema": {"required": ["b"]}},
            {"name": "json_schema", "json_schema": {"required": ["a"]}},
            '{"a": 1}',
        ),
        "min_length": ({"name": "length", "min_length": 50}, {"name": "length", "min_length": 1}, "cat"),
        "max_length": ({"name": "length", "max_length": 1}, {"name": "length", "max_length": 90}, "a cat sat"),
        "unit": (
            {"name": "length", "max_length": 4, "unit": "characters"},
            {"name": "length", "max_length": 4, "unit": "words"},
            "a cat sat",
        ),
        "tolerance": ({"name": "numeric"}, {"name": "numeric", "tolerance": 0.1}, "1001"),
        "kwargs": ({"name": f"{file}:mine"}, {"name": f"{file}:mine", "kwargs": {"length": 5}}, "a cat"),
    }
    assert {*pairs, "weight"} == set(Reward.model_fields)  # the weight is given to TRL, see above
    for key, (one, other, answer) in pairs.items():
        section = OBJECTIVES["grpo"].model_validate({"name": "grpo", "rewards": [one, other]})
        scorer, ids = Scorer(section, tokenizer), [tokenizer(answer)["input_ids"]]  # type: ignore[arg-type]
        found = [scorer.score(place, given, ids)[0] for place in (0, 1)]
        assert found[1] == 1.0, key
        assert found[0] is not None, key
        assert found[0] < 1.0, key


def loss_of(**given: Any) -> float:
    """The loss of an objective on a batch of two pairs, or of two answers, with a reference."""
    from hfstrat.objectives.preference.loss import PreferenceLoss

    section = OBJECTIVES[given["name"]].model_validate(given)
    batch = {"pair_sequence": torch.tensor([0, 0, 1, 2, 3, 3]), "pair_tokens": torch.tensor([2, 1, 1, 2])}
    batch["reference_logps"] = torch.tensor([[-2.5, -1.5], [-3.0, -2.0]])
    if given["name"] == "kto":
        batch = {"pair_sequence": torch.tensor([0, 0, 1, 1, 1, 1]), "pair_tokens": torch.tensor([2, 4])}
        batch |= {"reference_logps": torch.tensor([[-2.5, -1.5], [-3.0, -2.0]]), "desirable": torch.tensor([True, False])}
        batch["pair_divergence"] = torch.tensor(0.2)
    if given["name"] == "orpo":
        batch["pair_answer"] = torch.tensor([False, True, True, True, True, True])
    nll = torch.tensor([1.1, 0.7, 2.2, 0.9, 1.4, 0.3])
    return float(PreferenceLoss(section).of_tokens(nll, nll < 1, batch).total)  # type: ignore[arg-type]


OBJECTIVE_KEYS = {
    "dpo": [
        {"beta": 0.5},
        *({"loss_type": kind} for kind in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero")),
    ],
    "orpo": [{"beta": 0.5}],
    "simpo": [{"beta": 0.5}, {"simpo_gamma": 0.3}],
    "kto": [{"beta": 0.5}, {"loss_type": "apo_zero_unpaired"}, {"desirable_weight": 2.0}, {"undesirable_weight": 2.0}],
}


def test_every_key_of_an_objective_changes_its_loss() -> None:
    """And no two objectives have the same one."""
    assert set(OBJECTIVE_KEYS) | {"sft", "grpo"} == set(OBJECTIVES)
    for name, changes in OBJECTIVE_KEYS.items():
        keys = {key for change in changes for key in change} | {"name"}
        assert keys >= set(OBJECTIVES[name].model_fields) - {"label_smoothing", "discopop_tau"}
        losses = [loss_of(name=name), *(loss_of(name=name, **change) for change in changes)]
        assert len({round(loss, 6) for loss in losses}) == len(losses), name
    assert len({round(loss_of(name=name), 6) for name in OBJECTIVE_KEYS}) == len(OBJECTIVE_KEYS)
    for kind in ("robust", "exo_pair"):
        one, other = (loss_of(name="dpo", loss_type=kind, label_smoothing=share) for share in (0.1, 0.2))
        assert one != other
    assert loss_of(name="dpo", loss_type="discopop") != loss_of(name="dpo", loss_type="discopop", discopop_tau=1.0)


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """`of_images("image.flip=false")` is a job of an image classification."""
    root = tmp_path_factory.mktemp("images")
    model, images = make_image_model(root / "model"), folder_of_classes(root / "data")

    def get(*overrides: str) -> Job:
        recipe = image_recipe(tmp_path_factory.mktemp("job"), model, images)
        job = setup.set_up(load_recipe(str(recipe), list(overrides)), one_process(), overwrite=False)
        assert job.lock is not None
        job.lock.close()
        return job

    return get


@pytest.mark.slow
def test_every_key_of_images_changes_a_batch(of_images: Callable[..., Job]) -> None:
    def batch(*overrides: str) -> torch.Tensor:
        rows = of_images(*overrides).trainer.train_dataset
        collate = of_images(*overrides).trainer.data_collator
        pixels: torch.Tensor = collate([rows[place] for place in range(8)])["pixel_values"]
        return pixels

    plain = batch()
    other = ["image_size=48", "augmentation=off", "crop=0.2", "flip=false", "color=0.5", "mixup=0.4"]
    assert {key.partition("=")[0] for key in other} == set(Images.model_fields) - {*OF_CHATS, "views"}  # has a test of its own
    for key in other:
        changed = batch(f"image.{key}")
        assert changed.shape != plain.shape or not torch.equal(changed, plain), key


@pytest.mark.slow
def test_every_key_of_audio_changes_a_batch(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("sounds")
    model, data = sounds.make_audio_model(root / "model"), sounds.folder_of_classes(root / "data")

    def batch(*overrides: str) -> torch.Tensor:
        recipe = sounds.audio_recipe(tmp_path_factory.mktemp("job"), model, data)
        job = setup.set_up(load_recipe(str(recipe), list(overrides)), one_process(), overwrite=False)
        assert job.lock is not None
        job.lock.close()
        rows = job.trainer.train_dataset
        values: torch.Tensor = job.trainer.data_collator([rows[place] for place in range(8)])["input_values"]
        return values

    plain = batch()
    other = ["max_length=0.2", "augmentation=off", "shift=0", "noise=0.5", "time_mask=0.5", "frequency_mask=0"]
    assert {key.partition("=")[0] for key in other} == set(Audio.model_fields)
    for key in other:
        changed = batch(f"audio.{key}")
        assert changed.shape != plain.shape or not torch.equal(changed, plain), key


@pytest.mark.slow
def test_every_key_of_vision_language_changes_a_job(tmp_path_factory: pytest.TempPathFactory) -> None:
    from helpers.vision_language import conversations, make_vision_language

    model = make_vision_language(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")
    rows = conversations(tmp_path_factory.mktemp("chats"), 12)

    def job(*overrides: str, strategy: str = "full") -> Job:
        folder = tmp_path_factory.mktemp("job")
        text = SOUND.replace("MODEL", str(model)).replace("ROWS", str(rows)).replace("RUN", str(folder / "run"))
        text = text.replace("{name: lora, r: 4}", strategy).replace("eval_size: 12", "eval_size: 3").replace("128", "400")
        (folder / "recipe.yaml").write_text("task: image-text-to-text\n" + text)
        found = setup.set_up(load_recipe(str(folder / "recipe.yaml"), list(overrides)), one_process(), overwrite=False)
        assert found.lock is not None
        found.lock.close()
        return found

    def trained(found: Job) -> set[str]:
        return {name for name, p in found.trainer.model.named_parameters() if p.requires_grad}

    plain = job()
    small = job("image.processor_kwargs={max_pixels: 256}")
    assert small.data.counts["image_tokens"].sum() < plain.data.counts["image_tokens"].sum()
    assert any("visual.blocks" in name for name in trained(job("strategy.freeze=[language]")) - trained(plain))
    lora, frozen = job(strategy="lora"), job("strategy.freeze=[vision, projector]", strategy="lora")
    assert trained(frozen) < trained(lora)
    cached = job("image.precompute=true", "strategy.freeze=[vision, projector]", strategy="lora")
    assert "vision_features" in cached.train_data.facts
    assert (
        "vision_features"
        not in job("image.precompute=false", "strategy.freeze=[vision, projector]", strategy="lora").train_data.facts
    )


def test_every_key_of_boxes_changes_the_data(tmp_path: Path) -> None:
    from hfstrat.data.box_classes import prepare
    from hfstrat.data.image_batches import ImageProcessor

    folder = folder_of_boxes(tmp_path / "data", 8)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        objects = row["objects"]
        objects |= {"bbox": [[2, 2, 9, 9] for _ in objects["bbox"]], "categories": [0 for _ in objects["categories"]]}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def read(**more: Any) -> Any:
        data = Data.model_validate({"train": str(folder), "eval_size": 2, **more})
        return prepare(data, ImageProcessor(processor_of("yolos"), 8), seed=0)

    def first(data: Any) -> list[float]:
        return next(list(row["boxes"]) for row in data.train if row["boxes"])

    assert first(read())[:4] == [2, 2, 11, 11]
    assert first(read(box_format="xyxy"))[:4] == [2, 2, 9, 9]
    assert (read().label_names, read(class_names=["cell"]).label_names) == (("0",), ("cell",))


def test_class_weights_are_those_of_the_training_loss(of_images: Callable[..., Job]) -> None:
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    plain, weighted, focal = (
        float(of_images(*given).trainer.loss({"logits": logits}, labels))
        for given in ((), ("training.class_weights=[1,2,5]",), ("training.class_weights=focal",))
    )
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    by_hand = torch.tensor([1.0, 2.0, 5.0]) / (8 / 3)  # as many training rows of each class: the mean weight is one
    assert weighted == pytest.approx(float((each * by_hand[labels]).mean()), rel=1e-6)
    assert focal == pytest.approx(float(((1 - (-each).exp()) ** 2 * each).mean()), rel=1e-6)
    assert len({plain, weighted, focal}) == 3
