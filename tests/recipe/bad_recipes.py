"""A corpus of bad recipes: each a sound recipe with one thing wrong, and what must be answered to it.

No torch here: the file is also run by a process that must not have it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.recipes import SOUND

MODEL, STRATEGY, NAME, R, DATA, TRAIN, EVAL_SIZE, TRAINING, STEPS, RATE, OUTPUT = range(1, 12)  # its lines
COMMAND = "command line"
KIBIBYTE = 1024


@dataclass(frozen=True)
class Bad:
    """One case.

    `lines` replaces lines of the sound recipe by number (a replacement may have several), `text` replaces it whole.
    `files` are made beside it: a name with a slash at its end is a folder, None removes a file. `at` is where the
    message has to point, as file and line; `message` are fragments that it has to contain.
    """

    name: str
    at: str
    message: list[str]
    lines: dict[int, str] = field(default_factory=dict)
    text: str | bytes | None = None
    overrides: list[str] = field(default_factory=list)
    files: dict[str, str | bytes | None] = field(default_factory=dict)
    recipe: str = "recipe.yaml"
    free: int | None = None  # bytes on the disk


def at(line: int) -> str:
    return f"recipe.yaml:{line}: "


def key(name: str, line: int, old: str, message: list[str], more: int = 0) -> Bad:
    """A case that writes another line in the recipe; `more` is how many lines below it the mistake is."""
    return Bad(name, at(line + more), message, lines={line: old})


def given(name: str, override: str, message: list[str]) -> Bad:
    """A case that is given on the command line."""
    return Bad(name, f"{COMMAND}: {override}: ", message, overrides=[override])


def headed(name: str, lines: str, message: list[str], more: int | None = 0) -> Bad:
    """A classifier's head with other lines; `more` is how many lines below it the mistake is (None: anywhere)."""
    where = at(R + more) if more is not None else "recipe.yaml:"
    given = {NAME: "  name: head", R: lines, OUTPUT: "output_dir: run\ntask: text-classification"}
    labeled = rows(*(json.dumps({"text": f"a {n}", "label": n % 2}) for n in range(8)))
    config = config_of("LlamaForCausalLM", model_type="llama", num_hidden_layers=2, hidden_size=8)
    return Bad(name, where, message, given, files=labeled | config)


def small_model() -> dict[str, str | bytes]:
    """A model as the checks see it: a config and the header of a weights file."""
    shapes = {"model.embed_tokens.weight": [32, 8], "model.norm.weight": [8], "lm_head.weight": [32, 8]}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = [8, 8]
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = [16, 8]
    header: dict[str, Any] = {name: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for name, s in shapes.items()}
    packed = json.dumps(header).encode()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    return {
        "model/config.json": json.dumps(config),
        "model/tokenizer.json": "{}",
        "model/model.safetensors": len(packed).to_bytes(8, "little") + packed,
    }


def config_of(architecture: str, **more: Any) -> dict[str, str | bytes | None]:
    return {"model/config.json": json.dumps({"architectures": [architecture], **more})}


def rows(*lines: str) -> dict[str, str | bytes | None]:
    return {"rows.jsonl": "".join(f"{line}\n" for line in lines)}


INDEX = json.dumps({"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}})
CUT_SHORT = b"\x3c" + bytes(7) + b'{"x": {"dtype": "F32", "shape": [9], "data_offsets":[0,36]}}' + bytes(20)
GOOD_ROW = json.dumps({"prompt": "a", "completion": "b"})
QUESTION = json.dumps({"messages": [{"role": "user", "content": "a"}]})
MARKER = json.dumps({"sizes": {}, "recipe": {}})


def build(case: Bad, folder: Path) -> None:
    """Write the case's recipe and files into an empty folder."""
    lines = SOUND.splitlines()
    for number, line in case.lines.items():
        lines[number - 1] = line
    text = case.text if case.text is not None else "".join(f"{line}\n" for line in lines)
    sound: dict[str, Any] = {"recipe.yaml": text, "rows.jsonl": f"{GOOD_ROW}\n" * 8, **small_model()}
    for name, content in (sound | case.files).items():
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


UNKNOWN_KEYS = [
    key("a typo at the top", OUTPUT, "output_dir: run\nsede: 1", ["sede = 1", "no such key in a recipe", "'seed'"], 1),
    key(
        "a typo in model", MODEL, "model:\n  name_or_path: model\n  dtpye: float32", ["model.dtpye", "did you mean 'dtype'?"], 2
    ),
    key(
        "a typo in strategy",
        R,
        "  lora_alhpa: 4",
        ["strategy.lora_alhpa = 4", "strategy lora", "did you mean 'lora_alpha'?", "lora_dropout"],
    ),
    key("a typo in data", EVAL_SIZE, "  max_lenght: 64", ["data.max_lenght = 64", "did you mean 'max_length'?"]),
    key("a typo in training", RATE, "  learning_rat: 1e-3", ["training.learning_rat = 0.001", "did you mean 'learning_rate'?"]),
    key(
        "a pattern that is none",
        OUTPUT,
        "output_dir: run\nevaluation: {metrics: [regex], regex: '('}",
        ["evaluation.regex", "regular"],
        1,
    ),
    key(
        "a pattern for nothing", OUTPUT, "output_dir: run\nevaluation: {regex: a}", ["evaluation.regex", "metrics: [regex]"], 1
    ),
    key("no pattern", OUTPUT, "output_dir: run\nevaluation: {metrics: [regex]}", ["evaluation.metrics", "needs a pattern"], 1),
    key(
        "a metric that nobody knows",
        OUTPUT,
        "output_dir: run\nevaluation: {metrics: [bleu]}",
        ["evaluation.metrics", "rouge"],
        1,
    ),
    key(
        "drawn, but what?", OUTPUT, "output_dir: run\nevaluation: {temperature: 1.0}", ["evaluation.temperature", "metrics"], 1
    ),
    key(
        "choices from nowhere",
        OUTPUT,
        "output_dir: run\nevaluation: {choices: [no.jsonl]}",
        ["evaluation.choices", "no such"],
        1,
    ),
    key(
        "a control text from nowhere",
        OUTPUT,
        "output_dir: run\nevaluation: {control: no.txt}",
        ["evaluation.control", "no such"],
        1,
    ),
    key(
        "tasks in a folder that is not there",
        OUTPUT,
        "output_dir: run\nevaluation: {lm_eval: [x], include_path: no}",
        ["evaluation."],
        1,
    ),
    key(
        "a folder for no tasks",
        OUTPUT,
        "output_dir: run\nevaluation: {include_path: .}",
        ["evaluation.include_path", "lm_eval"],
        1,
    ),
    key(
        "passes of nothing",
        OUTPUT,
        "output_dir: run\nevaluation: {batch_tokens: 0}",
        ["evaluation.batch_tokens", "at least 1"],
        1,
    ),
    key("a typo in evaluation", OUTPUT, "output_dir: run\nevaluation: {sample: 1}", ["evaluation.sample", "'samples'"], 1),
    key("a typo in hub", OUTPUT, "output_dir: run\nhub: {privat: true}", ["hub.privat", "did you mean 'private'?"], 1),
    key("an unknown tracker", RATE, "  report_to: [tensorbord]", ["training.report_to", "tensorbord", "trackio"]),
    key("a tracker where a list is expected", RATE, "  report_to: wandb", ["training.report_to", "wandb"]),
    key("an empty branch", OUTPUT, "output_dir: run\nhub: {revision: ''}", ["hub.revision"], 1),
    key("a typo in a source", TRAIN, "  train: [{path: rows.jsonl, wieght: 2}]", ["train.0.wieght", "did you mean 'weight'?"]),
    key("a section misspelt", TRAINING, "trainning:", ["trainning", "did you mean 'training'?"]),
    key(
        "nonsense at the top",
        OUTPUT,
        "output_dir: run\nxyzzy: 1",
        ["xyzzy = 1", "hfstrat schema", "keys of a recipe: audio, data, evaluation"],
        1,
    ),
    key("nonsense in training", RATE, "  xyzzy: 1", ["training.xyzzy", "training.extra", "keys of 'training': activation"]),
    key("a key of partial under lora", R, "  last_n_layers: 2", ["strategy.last_n_layers", "belongs to strategy partial"]),
    Bad(
        "a key of lora under full",
        at(R),
        ["strategy.r = 4", "strategy full", "belongs to strategy lora"],
        lines={NAME: "  name: full"},
    ),
    Bad(
        "a key of lora under partial",
        at(R),
        ["strategy.target_modules", "strategy partial", "belongs to strategy lora"],
        lines={NAME: "  name: partial", R: "  target_modules: all-linear"},
    ),
    key("eval_steps at the top", OUTPUT, "output_dir: run\neval_steps: 2", ["eval_steps", "'training.eval_steps'"], 1),
    key("max_length in training", RATE, "  max_length: 64", ["training.max_length", "'data.max_length'"]),
    key("learning_rate in strategy", R, "  learning_rate: 1e-3", ["strategy.learning_rate", "'training.learning_rate'"]),
    key("seed in training", RATE, "  seed: 1", ["training.seed = 1", "'seed'"]),
    key("output_dir in training", RATE, "  output_dir: x", ["training.output_dir", "'output_dir'"]),
    key("r at the top", OUTPUT, "output_dir: run\nr: 8", ["r = 8", "'strategy.r'"], 1),
    given("an unknown key on the command line", "training.learning_rat=1e-3", ["did you mean 'learning_rate'?"]),
    given("an unknown section on the command line", "optimizer.lr=1e-3", ["optimizer", "no such key", "training.optim"]),
    given("a list as keys", "training.extra.0.x.y=1", ["training.extra.0", "not a field of"]),
]

THEIRS = [  # the key of another tool, a value of it, and the answer
    ("lora_rank", "8", "strategy.r"),
    ("lora_target", "q_proj", "strategy.target_modules"),
    ("finetuning_type", "lora", "strategy.name"),
    ("base_model", "x/y", "model.name_or_path"),
    ("model_name_or_path", "x/y", "model.name_or_path"),
    ("bf16", "true", "model.dtype"),
    ("torch_dtype", "bfloat16", "model.dtype"),
    ("flash_attention", "true", "model.attn_implementation"),
    ("datasets", "[x]", "data.train"),
    ("val_size", "0.1", "data.eval_size"),
    ("val_set_size", "0.1", "data.eval_size"),
    ("cutoff_len", "512", "data.max_length"),
    ("sequence_len", "512", "data.max_length"),
    ("train_on_inputs", "true", "data.train_on"),
    ("lr", "1e-3", "training.learning_rate"),
    ("num_epochs", "3", "training.num_train_epochs"),
    ("micro_batch_size", "2", "training.per_device_train_batch_size"),
    ("gradient_accumulation_steps", "4", "training.global_batch_size"),
    ("warmup_ratio", "0.1", "training.warmup_steps"),
    ("optimizer", "adamw", "training.optim"),
    ("gradient_checkpointing", "true", "training.activation_checkpointing"),
    ("eval_strategy", "steps", "training.eval_steps"),
    ("auto_resume_from_checkpoints", "true", "resume_from_checkpoint"),
    ("push_to_hub", "true", "hub.push_to_hub"),
    ("hub_model_id", "me/x", "hub.repo_id"),
    ("overwrite_output_dir", "true", "hfstrat train RECIPE --overwrite"),
    ("deepspeed", "ds.json", "--accelerate-config"),
    ("fsdp", "full_shard", "--accelerate-config"),
    ("load_in_4bit", "true", "quantization: nf4"),
    ("load_in_8bit", "true", "quantization: int8"),
    ("bnb_4bit_use_double_quant", "true", "model.quantization.use_double_quant"),
    ("sample_packing", "true", "training.packing"),
    ("group_by_length", "true", "training.train_sampling_strategy"),
]
EXPLAINED = [  # the key of another tool, a value that has to be written otherwise here, and what is answered
    ("gradient_accumulation_steps", "4", "`training.global_batch_size: 32`", "8 (the default of TrainingArguments)"),
    ("gradient_accumulation_steps", "auto", "per_device_train_batch_size x gradient_accumulation_steps x number of processes"),
    ("adapter", "qlora", "`strategy: lora` with `model.quantization: nf4`"),
    ("adapter", "lora", "write `strategy: lora`"),
    ("adapter", "runs/a", "'strategy.adapter'"),
    ("peft_type", "LORA", "write `strategy: lora`"),
    ("stage", "sft", "supervised fine-tuning is the default, with `task: causal-lm`: remove the key"),
    ("stage", "ppo", "not supported in this version"),
    ("stage", "first", "set `task` and `strategy`"),
    ("task_type", "CAUSAL_LM", "`task: causal-lm` (the default)"),
    ("task_type", "SEQ_CLS", "`task: text-classification`"),
    ("model_type", "LlamaForCausalLM", "the class comes from the model's config"),
    ("lmbda", "0.5", "strategy.on_policy"),
    ("beta", "0.5", "for GKD's write `strategy.divergence: forward_kl` (0), jsd (0.5) or reverse_kl (1)"),
    ("kd_alpha", "0.5", "strategy.teacher_weight"),
    ("bf16", "true", "`model.dtype: bfloat16`"),
    ("fp16", "true", "`model.dtype: float16`"),
    ("bf16", "auto", "`model.dtype: auto`"),
    ("tf32", "true", "`training.extra.tf32: true`"),
    ("quantization_bit", "4", "`model.quantization: nf4`"),
    ("bits", "8", "`model.quantization: int8`"),
    ("load_in_4bit", "false", "remove the key"),
    ("dataset_text_field", "body", "`data.columns: {body: text}`"),
    ("dataset_text_field", "text", "remove the key"),
    ("label_column", "stars", "`data.columns: {stars: label}`"),
    ("train_on_inputs", "true", "`data.train_on: all`"),
    ("train_on_inputs", "false", "`data.train_on: completions`"),
    ("assistant_only_loss", "true", "`data.train_on: assistant`"),
    ("batch_size", "8", "training.global_batch_size", "over all processes", "training.per_device_train_batch_size"),
    ("sample_packing", "true", "`training.packing: true`"),
    ("group_by_length", "true", "`training.train_sampling_strategy: group_by_length`"),
    ("warmup_ratio", "0.1", "`training.warmup_steps: 0.1`: below 1 it is a share of all steps"),
    ("eval_strategy", "epoch", "`training.eval_steps: 0.333` (3 epochs)"),
    ("save_strategy", "epoch", "`training.save_steps: 0.333` (3 epochs)"),
    ("evals_per_epoch", "4", "`training.eval_steps: 0.0833` (3 epochs)"),
    ("hub_token", "hf_x", "hub_token = ***", "HF_TOKEN"),
]
FOREIGN_KEYS = [
    *(
        key(f"{name} at the top", OUTPUT, f"output_dir: run\n{name}: {value}", [name, message, "no such key in a recipe"], 1)
        for name, value, message in THEIRS
    ),
    *(
        key(f"{name} in training", RATE, f"  {name}: {value}", [f"training.{name}", message, "no such key in 'training'"])
        for name, value, message in THEIRS
    ),
    *(
        key(f"{name}: {value}", OUTPUT, f"output_dir: run\n{name}: {value}", [f"{name} = ", *message], 1)
        for name, value, *message in EXPLAINED
    ),
    key(
        "accumulation with its micro-batch",
        RATE,
        "  per_device_train_batch_size: 2\n  gradient_accumulation_steps: 4",
        [
            "sequences per optimizer step over all processes",
            "`training.global_batch_size: 8` for one process",
            "2 x",
            "multiply",
        ],
        1,
    ),
    key(
        "evaluations per epoch of a given length",
        STEPS,
        "  num_train_epochs: 2\n  evals_per_epoch: 4",
        ["`training.eval_steps: 0.125` (2 epochs)"],
        1,
    ),
    key("lora_rank in strategy", R, "  lora_rank: 4", ["strategy.lora_rank", "'strategy.r'"]),
    key("cutoff_len in data", EVAL_SIZE, "  cutoff_len: 64", ["data.cutoff_len", "'data.max_length'"]),
    key("packing in data", EVAL_SIZE, "  packing: true", ["data.packing", "'training.packing'"]),
    key(
        "batch size of the Trainer at the top", OUTPUT, "output_dir: run\nper_device_train_batch_size: 2", ["'training.per_"], 1
    ),
]

RENAMED = [  # the names that keys had in earlier versions
    *(
        key(f"{old} of {under}", line, text % old, [f"{under}.{old} = ", f"`{under}.{new}: "], 1)
        for under, line, text, old, new in (
            ("training", RATE, "  logging_steps: 1\n  %s: never", "resume", "resume_from_checkpoint"),
            ("hub", OUTPUT, "output_dir: run\nhub: {%s: true}", "push", "push_to_hub"),
            ("hub", OUTPUT, "output_dir: run\nhub: {%s: me/x}", "repo", "repo_id"),
            ("evaluation", OUTPUT, "output_dir: run\nevaluation: {%s: false}", "before", "eval_on_start"),
            ("strategy", R, "  r: 4\n  %s: 8", "alpha", "lora_alpha"),
            ("strategy", R, "  r: 4\n  %s: 0.1", "dropout", "lora_dropout"),
        )
    ),
    *(
        Bad(
            f"{old} of {name}",
            at(R + 1),
            [f"`strategy.{new}: {now}"],
            lines={NAME: f"  name: {name}", R: f"{more}\n  {old}: {was}"},
        )
        for name, more, old, was, new, now in (
            ("distill", "  student: full", "alpha", "0.3", "teacher_weight", "0.3"),
            ("distill", "  student: full", "loss", "jsd", "divergence", "jsd"),
            ("distill", "  student: full", "level", "sequence", "seq_kd", "true"),
            ("distill", "  student: full", "hidden", "{}", "hidden_states", "{}"),
            ("distill", "  student: full", "cache", "{form: hidden}", "teacher_cache", "{"),
            ("partial", "  last_n_layers: 1", "thaw", "{every: 2}", "gradual_unfreezing", "{"),
            ("scratch", "  parameters: 1M", "architecture", "gpt2", "model_type", "gpt2"),
            ("distill", "  teacher: other", "student", "{name: lora, dropout: 0.1}", "student.lora_dropout", "0.1"),
        )
    ),
    key(
        "double_quant of a quantization",
        MODEL,
        "model: {name_or_path: model, quantization: {name: nf4, double_quant: false}}",
        ["`model.quantization.use_double_quant: false`"],
    ),
    key("the default initialization", R, "  init_lora_weights: default", ['= "default"', "of true, gaussian", "write true"]),
]

FOREIGN_VALUES = [
    key(
        "qlora as a strategy",
        NAME,
        "  name: qlora",
        ['strategy.name = "qlora"', "`strategy: lora` with `model.quantization: nf4`"],
    ),
    key("sft as a task", OUTPUT, "output_dir: run\ntask: sft", ["supervised fine-tuning is the default"], 1),
    key("a task of PEFT", OUTPUT, "output_dir: run\ntask: SEQ_CLS", ["write `task: text-classification`"], 1),
    key(
        "bits as a number",
        MODEL,
        "model: {name_or_path: model, quantization: 4}",
        ["model.quantization = 4", "quantization: nf4"],
    ),
    key("bits by another name", MODEL, "model: {name_or_path: model, quantization: int4}", ["quantization.name", "nf4`"]),
    key("the format of ShareGPT", EVAL_SIZE, "  format: sharegpt", ['data.format = "sharegpt"', "write `conversations`"]),
    key("no tracker", RATE, "  report_to: none", ["training.report_to", "remove the key"]),
    key("true for resuming", RATE, "  resume_from_checkpoint: true", ["training.resume_from_checkpoint = true", "write auto"]),
    key("on for packing", RATE, "  packing: on", ['training.packing = "on"', "write true"]),
    Bad(
        "a number for shrink",
        at(R + 1),
        ["strategy.shrink = 2", "a mapping of keys (layers, intermediate_size)", "write `strategy.shrink: {layers: 2}`"],
        lines={NAME: "  name: distill", R: "  student: full\n  shrink: 2"},
    ),
    Bad(
        "a loss for layers",
        at(R + 1),
        ['strategy.hidden_states = "cosine"', "write `strategy.hidden_states: {loss: cosine}`"],
        lines={NAME: "  name: distill", R: "  student: full\n  hidden_states: cosine"},
    ),
    Bad(
        "true for layers",
        at(R + 1),
        ["strategy.hidden_states = true", "write `strategy.hidden_states: {}`"],
        lines={NAME: "  name: distill", R: "  student: full\n  hidden_states: true"},
    ),
    Bad(
        "a share for a thaw",
        at(R + 1),
        ["strategy.gradual_unfreezing = 0.25", "write `strategy.gradual_unfreezing: {every: 0.25}`"],
        lines={NAME: "  name: partial", R: "  last_n_layers: 1\n  gradual_unfreezing: 0.25"},
    ),
]

WRONG_TYPES = [
    key("a quoted rate", RATE, '  learning_rate: "1e-3"', ['training.learning_rate = "1e-3"', "a number", "remove the quotes"]),
    key("a quoted count", STEPS, "  max_steps: '4'", ['training.max_steps = "4"', "a whole number", "remove the quotes"]),
    key("a quoted batch", RATE, '  global_batch_size: "16"', ["a whole number, at least 1", "remove the quotes"]),
    key("a quoted micro-batch", RATE, '  per_device_train_batch_size: "4"', ["a whole number or auto", "remove the quotes"]),
    key("a quoted share", EVAL_SIZE, '  eval_size: "0.1"', ["data.eval_size", "a number", "remove the quotes"]),
    key("a quoted bool", RATE, '  load_best_model_at_end: "true"', ["true or false", "write true, without quotes"]),
    key("text for a number", RATE, "  learning_rate: fast", ['learning_rate = "fast"', "expected a number, more than 0"]),
    key("a number with an underscore", STEPS, "  max_steps: 1_000", ['max_steps = "1_000"', "a whole number", "1000"]),
    key("a number with a comma", STEPS, "  max_steps: 1,000", ['max_steps = "1,000"', "a whole number", "1000"]),
    key("a number with a unit", STEPS, "  max_steps: 4k", ['max_steps = "4k"', "a whole number"]),
    key("a percentage", EVAL_SIZE, "  eval_size: 5%", ['eval_size = "5%"', "a number", "0.05"]),
    key("a fraction for a count", STEPS, "  max_steps: 4.5", ["max_steps = 4.5", "a whole number"]),
    key("a fraction for a rank", R, "  r: 4.5", ["strategy.r = 4.5", "a whole number, at least 1"]),
    key("a whole number written as a float", R, "  r: 1e1", ["strategy.r = 10.0", "a whole number", "write 10"]),
    key("on for a bool", RATE, "  load_best_model_at_end: on", ['= "on"', "true or false", "write true"]),
    key("off for a bool", RATE, "  load_best_model_at_end: off", ['= "off"', "true or false", "write false"]),
    key("no for a bool", RATE, "  load_best_model_at_end: no", ['= "no"', "true or false", "write false"]),
    key("yes for a bool", R, "  use_dora: yes", ["strategy.use_dora", '= "yes"', "true or false", "write true"]),
    key("one for a bool", R, "  use_dora: 1", ["strategy.use_dora = 1", "true or false"]),
    key("no for a number", STEPS, "  max_steps: no", ['max_steps = "no"', "a whole number"]),
    key("true for a number", STEPS, "  max_steps: true", ["max_steps = true", "a whole number"]),
    key("true for a rate", RATE, "  learning_rate: true", ["learning_rate = true", "a number"]),
    key("a list for a number", RATE, "  learning_rate: [1e-3, 1e-4]", ["learning_rate = [0.001, 0.0001]", "a number"]),
    key("a mapping for a number", RATE, "  learning_rate: {peak: 1e-3}", ["learning_rate", "a number", "peak"]),
    key("a mapping for a text", OUTPUT, "output_dir: {path: run}", ["output_dir", "text", "path"]),
    key("a number for data", TRAIN, "  train: 3", ["data.train = 3", "expected text", "Hub id"]),
    key("a number in a list of data", TRAIN, "  train: [rows.jsonl, 3]", ["data.train.1 = 3", "a mapping of keys"]),
    key("a weight in words", TRAIN, "  train: [{path: rows.jsonl, weight: twice}]", ["data.train.0.weight", "a number"]),
    key("a number for a text", OUTPUT, "output_dir: 2024", ["output_dir = 2024", "text", "quotes"]),
    key(
        "a number for a revision",
        MODEL,
        "model: {name_or_path: model, revision: 12345}",
        ["revision = 12345", "text", "quotes"],
    ),
    key("null for a whole number", R, "  r: null", ["strategy.r = null", "a whole number", "remove"]),
    key("nothing after the colon", OUTPUT, "output_dir:", ["output_dir = null", "text"]),
    key("null for a section", TRAINING, "training: null\nevaluation:", ["training = null", "a mapping of keys"]),
    key("a text for a list", R, "  modules_to_save: lm_head", ['modules_to_save = "lm_head"', "a list", "[lm_head]"]),
    key(
        "a number in a list of texts", R, "  target_modules: [q_proj, 3]", ["strategy.target_modules", "3", "a list, each text"]
    ),
    key("a text for modules", R, "  target_modules: q_proj", ['target_modules = "q_proj"', "all-linear or a list", "[q_proj]"]),
    key("a list for a mapping", EVAL_SIZE, "  columns: [a, b]", ["data.columns", "a mapping", '["a", "b"]']),
    key("a number in a mapping of texts", EVAL_SIZE, "  columns: {a: 3}", ["data.columns.a = 3", "text"]),
    key("a list for a section", TRAINING, "training: [1]\nevaluation:", ["training", "[1]", "a mapping of keys"]),
    key("a text for a section", TRAINING, "training: fast\nevaluation:", ['training = "fast"', "a mapping of keys"]),
    key("a number for a strategy", STRATEGY, "strategy: 3\nhub:", ["strategy = 3", "full, head, lora, partial"]),
    key("a list for a strategy", STRATEGY, "strategy: [lora]\nhub:", ["strategy", "full, head, lora, partial"]),
    key("a time without a unit", STEPS, "  max_time: 10", ["max_time = 10", "10min"]),
    key("a time in words", STEPS, "  max_time: ten minutes", ['max_time = "ten minutes"', "90s, 10min or 1.5h"]),
    key("a time of nothing", STEPS, "  max_time: 0min", ['max_time = "0min"', "90s, 10min or 1.5h"]),
    given("text for a number on the command line", "training.learning_rate=fast", ["expected a number"]),
    given("no for a bool on the command line", "training.load_best_model_at_end=no", ['= "no"', "true or false"]),
    given("nothing on the command line", "training.optim=", ["training.optim = null", "remove the key to get its default"]),
]

BOUNDS = [
    key("a rate of zero", RATE, "  learning_rate: 0", ["learning_rate = 0", "a number, more than 0"]),
    key("a negative rate", RATE, "  learning_rate: -1e-3", ["learning_rate = -0.001", "more than 0"]),
    key("an infinite rate", RATE, "  learning_rate: .inf", ["learning_rate", "a finite number, more than 0"]),
    key("a rate that is no number", RATE, "  learning_rate: .nan", ["learning_rate", "a finite number"]),
    key("an infinite share", RATE, "  eval_steps: .inf", ["eval_steps", "a finite number"]),
    key("a huge rate", RATE, "  learning_rate: 1e999", ["learning_rate", "a finite number"]),
    key("no steps", STEPS, "  max_steps: 0", ["max_steps = 0", "a whole number, at least 1"]),
    key("steps as the Trainer's default", STEPS, "  max_steps: -1", ["max_steps = -1", "at least 1", "remove"]),
    key("no epochs", STEPS, "  num_train_epochs: 0", ["num_train_epochs = 0", "more than 0"]),
    key("no rank", R, "  r: 0", ["strategy.r = 0", "at least 1"]),
    key("all dropout", R, "  lora_dropout: 1.0", ["strategy.lora_dropout = 1.0", "at least 0", "less than 1"]),
    key("short rows", EVAL_SIZE, "  max_length: 4", ["max_length = 4", "at least 8"]),
    key("no source", TRAIN, "  train: []", ["data.train = []", "at least one"]),
    key("a weight of nothing", TRAIN, "  train: [{path: rows.jsonl, weight: 0}]", ["weight = 0", "more than 0"]),
    key("an empty source", TRAIN, "  train: ['']", ["data.train.0.path", "text that is not empty"]),
    key("no eval rows", EVAL_SIZE, "  eval_size: 0", ["eval_size = 0", "more than 0"]),
    key("an empty path", OUTPUT, 'output_dir: ""', ['output_dir = ""', "text that is not empty"]),
    key("an empty model", MODEL, 'model: ""', ["model.name_or_path", "text that is not empty"]),
    key("no micro-batch", RATE, "  per_device_train_batch_size: 0", ["per_device_train_batch_size = 0", "at least 1, or auto"]),
    key("a negative seed", OUTPUT, "output_dir: run\nseed: -1", ["seed = -1", "at least 0"], 1),
    key(
        "a share above one",
        RATE,
        "  eval_steps: 2.5",
        ["eval_steps: given 2.5; expected a whole number of steps, or below 1 a share"],
    ),
    given("a negative seed of the held-out rows", "data.eval_seed=-1", ["eval_seed = -1", "at least 0"]),
    given("a bound on the command line", "training.warmup_steps=-1", ["warmup_steps = -1", "at least 0"]),
]

CHOICES = [
    key("an unknown strategy", NAME, "  name: lorra", ['strategy.name = "lorra"', "full, head, lora, partial", "mean 'lora'?"]),
    key(
        "an unknown short strategy", STRATEGY, "strategy: dpo\nhub:", ['"dpo"', "no such strategy", "full, head, lora, partial"]
    ),
    key("no strategy name", NAME, "  teacher_weight: 8", ["strategy.name: missing", "full, head, lora, partial"], -1),
    key("an unknown optimiser", RATE, "  optim: adamw", ['optim = "adamw"', "adamw_torch_fused", "did you mean"]),
    key(
        "an optimizer that is not offered", RATE, "  optim: galore_adamw", ['optim = "galore_adamw"', "write `strategy: lora`"]
    ),
    key(
        "arguments that an optimizer does not read",
        RATE,
        "  optim: muon\n  extra: {optim_args: momentum=0.9}",
        ["muon reads no extra.optim_args"],
    ),
    key("dense packing without tokens", RATE, "  packing: dense", ["packing: dense needs a batch in tokens", "such as 65536"]),
    key(
        "a batch in tokens without dense packing",
        RATE,
        "  global_batch_tokens: 65536",
        ["global_batch_tokens: only used by packing: dense", "set packing: dense"],
    ),
    key(
        "two sizes of the batch",
        RATE,
        "  packing: dense\n  global_batch_tokens: 65536\n  global_batch_size: 8",
        ["global_batch_size: packing: dense chooses the examples of a step by their lengths", "remove this key"],
        2,
    ),
    key("an unknown schedule", RATE, "  lr_scheduler_type: cosin", ['"cosin"', "did you mean 'cosine'?"]),
    key("an unknown format", EVAL_SIZE, "  format: sharegpt", ['data.format = "sharegpt"', "messages", "alpaca"]),
    key("an unknown overflow", EVAL_SIZE, "  overflow: cut", ['data.overflow = "cut"', "truncate, split, drop, error"]),
    key("an unknown mask", EVAL_SIZE, "  train_on: assistants", ['"assistants"', "did you mean 'assistant'?"]),
    key("an unknown format of one source", TRAIN, "  train: [{path: rows.jsonl, format: chat}]", ['format = "chat"', "alpaca"]),
    key("an unknown dtype", MODEL, "model: {name_or_path: model, dtype: bf16}", ['"bf16"', "did you mean 'bfloat16'?"]),
    key(
        "an unknown attention",
        MODEL,
        "model: {name_or_path: model, attn_implementation: flash_atention_2}",
        ['"flash_atention_2"', "flex_attention or a kernel on the Hub (owner/name)", "did you mean 'flash_attention_2'?"],
    ),
    key(
        "a Hub kernel without a name",
        MODEL,
        "model: {name_or_path: model, attn_implementation: kernels-community/}",
        ['"kernels-community/"', "a kernel on the Hub (owner/name)"],
    ),
    key("an unknown task", OUTPUT, "output_dir: run\ntask: sft", ['task = "sft"', "causal-lm"], 1),
    key("upper case", NAME, "  name: LoRA", ['"LoRA"', "did you mean 'lora'?"]),
    given("a choice on the command line", "training.optim=adam", ['training.optim = "adam"', "adamw_torch"]),
]

MISSING = [
    Bad("no model", "recipe.yaml: ", ["model: missing", "name_or_path", "Hub id"], lines={MODEL: "seed: 1"}),
    Bad(
        "no strategy",
        "recipe.yaml: ",
        ["strategy: missing", "full, head, lora, partial"],
        text="model: m\ndata: d\noutput_dir: o\n",
    ),
    Bad("no data", "recipe.yaml: ", ["data: missing", "train"], text="model: m\nstrategy: full\noutput_dir: o\n"),
    Bad("no output", "recipe.yaml: ", ["output_dir: missing", "Folder"], lines={OUTPUT: "seed: 1"}),
    key("no training rows", TRAIN, "  split: train", ["data.train: missing", "jsonl"], -1),
    key("a source without a path", TRAIN, "  train: [{weight: 2}]", ["data.train.0.path: missing", "Hub id"]),
    key("no weights named", MODEL, "model: {dtype: auto}", ["model.name_or_path: missing", "Hub id"]),
]

FILES = [
    Bad("an empty recipe", "recipe.yaml: ", ["mapping", "model, strategy, data", "this file holds nothing"], text=""),
    Bad("only comments", "recipe.yaml: ", ["mapping", "this file holds nothing"], text="# nothing\n\n"),
    Bad("a list", "recipe.yaml: ", ["mapping", "this file holds a list"], text="- model: x\n- strategy: y\n"),
    Bad("a sentence", "recipe.yaml: ", ["mapping", "this file holds text"], text="train a model please\n"),
    Bad("two documents", "recipe.yaml:", ["one document", "---"], text=f"{SOUND}---\n{SOUND}"),
    key("a tab", R, "\tr: 4", ["not valid YAML", "tab", "spaces"]),
    Bad("an unclosed quote", "recipe.yaml:", ["not valid YAML", "quote"], lines={OUTPUT: 'output_dir: "run'}),
    Bad("an unclosed bracket", "recipe.yaml:", ["not valid YAML", "bracket"], lines={R: "  target_modules: [q_proj, v_proj"}),
    key("a wrong indentation", R, "   r: 4", ["not valid YAML", "indentation"]),
    key("a second colon", TRAIN, "  train: data: rows.jsonl", ["not valid YAML", "colon"]),
    key("an unknown tag", R, "  r: !!python/object:os.system 4", ["not valid YAML", "tag"]),
    key("an alias to itself", R, "  target_modules: &a\n    b: *a", ["alias to itself"], 1),
    key("an unknown alias", R, "  r: *rank", ["not valid YAML", "alias"]),
    key("a key given twice", RATE, "  learning_rate: 1e-3\n  max_steps: 5", ["training.max_steps", "twice", "line 9"], 1),
    key("a section given twice", OUTPUT, "output_dir: run\ntraining: {seed: 1}", ["training", "twice", "line 8"], 1),
    key("a mapping as a key", R, "  {a: b}: 4", ["strategy", "key"]),
    key("a number as a key", R, "  4: 4", ["strategy.4", "no such key"]),
    Bad("a recipe in Latin-1", "recipe.yaml: ", ["UTF-8"], text=SOUND.encode() + b"# caf\xe9\n"),
    Bad("a recipe in UTF-16", "recipe.yaml: ", ["UTF-8"], text=SOUND.encode("utf-16")),
    Bad("a control character", "recipe.yaml:", ["not valid YAML", "character"], text=SOUND + "# \x00\n"),
    Bad("no such recipe", "recipes.yaml: ", ["no such recipe file", "did you mean recipe.yaml?"], recipe="recipes.yaml"),
    Bad("no such recipe, nothing near", "zzz: ", ["no such recipe file", "hfstrat recipes ls"], recipe="zzz"),
    Bad("a shipped name", "quickstart: ", ["no such recipe file", "hfstrat recipes cp quickstart"], recipe="quickstart"),
    Bad("a folder as recipe", "model: ", ["is a folder", "expected a recipe file"], recipe="model"),
]

OVERRIDES = [
    Bad("an override without =", COMMAND, ["'training.max_steps'", "key=value"], overrides=["training.max_steps"]),
    Bad("an override with a colon", COMMAND, ["'seed: 1'", "key=value"], overrides=["seed: 1"]),
    Bad("an override as a flag's value", COMMAND, ["'=1'", "key=value"], overrides=["=1"]),
    Bad("an empty part", COMMAND, ["'training..max_steps=1'", "key=value"], overrides=["training..max_steps=1"]),
    Bad("through a value", COMMAND, ["'output_dir'", "is no section"], overrides=["output_dir.name=x"]),
    Bad("through a number", COMMAND, ["'training.max_steps'", "is no section"], overrides=["training.max_steps.x=1"]),
    Bad("a short form on the command line", f"{COMMAND}: strategy=loar: ", ["'lora'"], overrides=["strategy=loar"]),
    Bad("broken YAML", f"{COMMAND}: ", ["[1, 2", "not valid YAML"], overrides=["strategy.modules_to_save=[1, 2"]),
    Bad("a section as text", f"{COMMAND}: training=3: ", ["a mapping of keys"], overrides=["training=3"]),
    Bad(
        "two mistakes",
        at(RATE),
        [f"{COMMAND}: seed=x: ", "seed", "learning_rat"],
        {RATE: "  learning_rat: 1"},
        None,
        ["seed=x"],
    ),
]

COMBINATIONS = [
    Bad(
        "early stopping without the best",
        at(RATE + 1),
        ["early_stopping_patience", "load_best_model_at_end: true"],
        lines={RATE: "  load_best_model_at_end: false\n  early_stopping_patience: 2"},
    ),
    key(
        "push without a repository",
        OUTPUT,
        "output_dir: run\nhub:\n  push_to_hub: true",
        ["hub.push_to_hub: true needs a repository", "me/my-model"],
        2,
    ),
    key("a time with counted warm-up", RATE, "  max_time: 10min\n  warmup_steps: 10", ["warmup_steps", "a share below 1"], 1),
    key("an adapter with a rank", R, "  r: 4\n  adapter: adapter", ["adapter", "its own r", "remove"], 1),
    key("pissa with dora", R, "  init_lora_weights: pissa\n  use_dora: true", ["pissa", "use_dora", "use only one of them"]),
    key(
        "olora with whole modules", R, "  init_lora_weights: olora\n  modules_to_save: [lm_head]", ["olora", "modules_to_save"]
    ),
    Bad(
        "partial with nothing",
        at(R),
        ["no parameter would be trained", "last_n_layers, patterns, embeddings or head"],
        lines={NAME: "  name: partial", R: "  head: false"},
    ),
    key("eval and eval_split", EVAL_SIZE, "  eval: rows.jsonl\n  eval_split: test", ["both eval and eval_split are given"], 1),
    key("a weight of evaluation rows", EVAL_SIZE, "  eval: [{path: rows.jsonl, weight: 2}]", ["data.eval", "remove weight"]),
    key("a broken split", EVAL_SIZE, "  split: train[:10%", ["data.split", "train[:10%]"]),
    key("a slice of a file", EVAL_SIZE, "  split: 'train[:10%]'", ["data.split", "rows.jsonl is local", "only Hub data sets"]),
    key("a split of a file", EVAL_SIZE, "  split: test", ["data.split", "rows.jsonl has no splits"]),
    key("a split of one file", TRAIN, "  train: [{path: rows.jsonl, split: test}]", ["data.train", "rows.jsonl has no splits"]),
    key(
        "a split of one evaluation file", EVAL_SIZE, "  eval: [{path: rows.jsonl, split: test}]", ["data.eval", "has no splits"]
    ),
    key("a broken split of a source", TRAIN, "  train: [{path: a/b, split: 'train['}]", ["train.0.split", "train["]),
    key("a config of a file", TRAIN, "  train: [{path: rows.jsonl, config: en}]", ["data.train", "is local", "has a config"]),
    key("a revision of a file", EVAL_SIZE, "  eval: [{path: rows.jsonl, revision: v1}]", ["data.eval", "has a revision"]),
    key("an evaluation split of a file", EVAL_SIZE, "  eval_split: test", ["data.eval_split", "rows.jsonl has no splits"]),
    Bad(
        "turns of plain text",
        at(EVAL_SIZE),
        ["data.train_on: assistant", "plain text", "set all, or auto"],
        {EVAL_SIZE: "  train_on: assistant"},
        files={"rows.jsonl": '{"text": "a"}\n'},
    ),
    key("a template that is not there", EVAL_SIZE, "  template: chatml", ["data.template: chatml", "no such file", "plain"]),
    Bad(
        "a broken template",
        at(EVAL_SIZE),
        ["data.template", "t.jinja:2", "not valid jinja"],
        {EVAL_SIZE: "  template: t.jinja"},
        files={"t.jinja": "x\n{% for %}"},
    ),
    key(
        "extra with a key of ours",
        RATE,
        "  extra: {max_steps: 3}",
        ["training.extra.max_steps", "a key of the recipe", "set training.max_steps"],
    ),
    key("extra with a seed", RATE, "  extra: {seed: 3}", ["training.extra.seed", "a key of the recipe itself", "set seed"]),
    key(
        "extra with a typo",
        RATE,
        "  extra: {adam_beta: 0.9}",
        ["training.extra.adam_beta: not a field", "did you mean 'adam_beta"],
    ),
    key("extra with nonsense", RATE, "  extra: {xyzzy: 1}", ["extra.xyzzy: not a field of TrainingArguments"]),
    key(
        "extra with what we decide",
        RATE,
        "  extra: {gradient_accumulation_steps: 2}",
        ["hfstrat sets this itself", "training.global_batch_size"],
    ),
    key("extra with bf16", RATE, "  extra: {bf16: true}", ["training.extra", "bf16", "model.dtype"]),
    key("extra with deepspeed", RATE, "  extra: {deepspeed: ds.json}", ["training.extra", "deepspeed", "--accelerate-config"]),
    Bad(
        "rows held out for nothing",
        at(OUTPUT + 1),
        ["evaluation.max_rows", "data.eval_size = 2"],
        lines={OUTPUT: "output_dir: run\nevaluation: {max_rows: 1}"},
    ),
]

PREFERENCE = {"instruction": "a", "input": "", "output": "b", "chosen": "b", "rejected": "c"}
NOT_FOR_SFT = {  # rows that another objective trains on, and the objective
    "preference pairs": (PREFERENCE, "dpo"),
    "preference pairs of ShareGPT": ({"conversations": [], "chosen": {}, "rejected": {}}, "dpo"),
    "answers with labels": ({"messages": [], "label": True}, "kto"),
}
LABELED = {"a text": {"text": "a", "label": "b"}, "a pair": {"premise": "a", "hypothesis": "b", "label": "c"}}
DATA_FILES = [
    *(
        Bad(name, at(TRAIN), [name.split(" of S")[0], f"set `objective: {objective}`"], files=rows(json.dumps(row)))
        for name, (row, objective) in NOT_FOR_SFT.items()
    ),
    Bad(
        "multiple choice",
        at(TRAIN),
        ["multiple choice", "not supported"],
        files=rows(json.dumps({"query": "a", "choices": ["b", "c"], "gold": 1})),
    ),
    *(
        Bad(f"{name} with a label", at(TRAIN), ["texts with labels", "task: text-classification"], files=rows(json.dumps(row)))
        for name, row in LABELED.items()
    ),
    Bad(
        "another speaker",
        at(TRAIN),
        ["row 1", "'narrator'", "human"],
        files=rows(json.dumps({"conversations": [{"from": "narrator", "value": "a"}]})),
    ),
    Bad(
        "tools that are no JSON",
        at(TRAIN),
        ["row 1", "'tools' is not valid JSON"],
        files=rows(json.dumps({"messages": [{"role": "assistant", "content": "a"}], "tools": "[{"})),
    ),
    Bad(
        "half a weight of a message",
        at(TRAIN),
        ["row 1", "weight 0.5", "1 (trained) or 0 (not trained)"],
        files=rows(json.dumps({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]})),
    ),
    Bad(
        "a part of another kind",
        at(TRAIN),
        ["row 1", "'image'", "expected text"],
        files=rows(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "value": "a.png"}]}]})),
    ),
    key("a glob without files", TRAIN, "  train: data/*.jsonl", ["data.train: data/*.jsonl", "no file matches"]),
    Bad("a folder without rows", at(TRAIN), ["contains no data files"], {TRAIN: "  train: d"}, files={"d/a.bin": "x"}),
    Bad(
        "a folder without the split",
        at(TRAIN),
        ["data.train: d", "named test", "none is named train"],
        {TRAIN: "  train: d"},
        files={"d/test.jsonl": GOOD_ROW},
    ),
    Bad(
        "a bad row in a folder",
        at(TRAIN),
        ["b.jsonl: row 1", "'completion' is null"],
        {TRAIN: "  train: d"},
        files={"d/a.jsonl": GOOD_ROW, "d/b.jsonl": '{"prompt": "a", "completion": null}'},
    ),
    Bad(
        "a bad second source",
        at(TRAIN),
        ["b.jsonl", "no known format", "answer: completion"],
        {TRAIN: "  train: [rows.jsonl, {path: b.jsonl, columns: {question: prompt}}]"},
        files={"b.jsonl": '{"question": "a", "answer": "b"}'},
    ),
    Bad(
        "a false arrow file",
        at(TRAIN),
        ["x.arrow", "not a readable Arrow file"],
        {TRAIN: "  train: x.arrow"},
        files={"x.arrow": "nothing of the kind"},
    ),
    key(
        "a missing data file",
        TRAIN,
        "  train: row.jsonl",
        ["data.train: row.jsonl", "no such file", "did you mean rows.jsonl?"],
    ),
    key("a missing data file, nothing near", TRAIN, "  train: zzz.csv", ["data.train: zzz.csv", "no such file", "searched in"]),
    key("a missing evaluation file", EVAL_SIZE, "  eval: evals.jsonl", ["data.eval: evals.jsonl", "no such file"]),
    key("a folder as data", TRAIN, "  train: model", ["data.train: model", "a folder", "name a file"]),
    Bad(
        "a data file with the name of a section",
        at(TRAIN),
        ["data.train: data.csv: no known format"],
        {TRAIN: "  train: data.csv"},
        files={"data.csv": "q,a\n1,2\n"},
    ),
    key("a section within itself", EVAL_SIZE, "  data: {train: rows.jsonl}", ["data.data", "named twice; write 'data' once"]),
    given("a section on the command line", "hub={push_to_hub: true}", ["hub.push_to_hub: true needs a repository"]),
    Bad("an empty data file", at(TRAIN), ["data.train: rows.jsonl", "empty"], files={"rows.jsonl": ""}),
    Bad("a blank data file", at(TRAIN), ["rows.jsonl", "has no rows"], files={"rows.jsonl": " \n\n  \n"}),
    Bad("broken JSON", at(TRAIN), ["rows.jsonl:2", "not valid JSON", '{"prompt": "a'], files=rows(GOOD_ROW, '{"prompt": "a"')),
    Bad("a row that is a list", at(TRAIN), ["rows.jsonl:2", "an object", "[1, 2]"], files=rows(GOOD_ROW, "[1, 2]")),
    Bad("a row that is a text", at(TRAIN), ["rows.jsonl:1", "an object", '"hello"'], files=rows('"hello"', GOOD_ROW)),
    Bad("a JSON array of texts", at(TRAIN), ["rows.jsonl", "row 1", "an object", '"a"'], files=rows('["a", "b"]')),
    Bad("a broken JSON array", at(TRAIN), ["rows.jsonl:2", "not valid JSON"], files=rows("[", "{]")),
    Bad("an empty JSON array", at(TRAIN), ["rows.jsonl", "has no rows"], files=rows("[]")),
    Bad(
        "one JSON object over lines",
        at(TRAIN),
        ["rows.jsonl:1", "not valid JSON", "one row per line"],
        files=rows("{", '"a": 1}'),
    ),
    Bad(
        "unknown columns",
        at(TRAIN),
        ["question, answer", "`data.columns: {question: prompt, answer: completion}`"],
        files=rows('{"question": "a", "answer": "b"}'),
    ),
    key(
        "columns that the format lacks", EVAL_SIZE, "  format: alpaca", ["format alpaca needs", "instruction, output", "prompt"]
    ),
    key("a mapped column that is not there", EVAL_SIZE, "  columns: {promt: prompt}", ["'promt'", "did you mean 'prompt'?"]),
    key("columns mapped the wrong way", EVAL_SIZE, "  columns: {text: prompt}", ["data.columns", "'text'", "{prompt: text}"]),
    key("columns mapped to nothing known", EVAL_SIZE, "  columns: {prompt: promt}", ["data.columns", "promt", "'prompt'"]),
    key(
        "two columns under one name",
        EVAL_SIZE,
        "  columns: {prompt: completion}",
        ["data.columns", "two columns", "completion"],
    ),
    Bad(
        "a false parquet file",
        at(TRAIN),
        ["x.parquet", "not a readable Parquet file"],
        {TRAIN: "  train: x.parquet"},
        files={"x.parquet": "x"},
    ),
    Bad("a blank text", at(TRAIN), ["x.txt", "has no rows"], {TRAIN: "  train: x.txt"}, files={"x.txt": " \n\n\t\n"}),
    Bad("a conversation without answers", at(TRAIN), ["row 1", "no assistant turn"], files=rows(QUESTION)),
    Bad(
        "a message without content",
        at(TRAIN),
        ["row 1", "content is not text"],
        files=rows(QUESTION.replace("content", "text")),
    ),
    Bad(
        "an unread suffix",
        at(TRAIN),
        ["rows.xlsx", "unsupported file type", ".jsonl"],
        {TRAIN: "  train: rows.xlsx"},
        files={"rows.xlsx": "x"},
    ),
    Bad(
        "no suffix",
        at(TRAIN),
        ["data.train: rows", "unsupported file type", ".jsonl"],
        {TRAIN: "  train: rows"},
        files={"rows": GOOD_ROW},
    ),
    Bad(
        "data in Latin-1",
        at(TRAIN),
        ["rows.jsonl", "UTF-8"],
        files={"rows.jsonl": b'{"prompt": "caf\xe9", "completion": "x"}\n'},
    ),
    Bad(
        "a csv with a header only",
        at(TRAIN),
        ["rows.csv", "has no rows"],
        {TRAIN: "  train: rows.csv"},
        files={"rows.csv": "prompt,completion\n"},
    ),
    Bad(
        "a csv with other columns",
        at(TRAIN),
        ["rows.csv", "q, a", "prompt"],
        {TRAIN: "  train: rows.csv"},
        files={"rows.csv": "q,a\n1,2\n"},
    ),
    Bad(
        "a csv row with too many fields",
        at(TRAIN),
        ["rows.csv:3", "3 fields", "2 columns"],
        {TRAIN: "  train: rows.csv"},
        files={"rows.csv": "prompt,completion\na,b\na,b,c\n"},
    ),
    Bad(
        "a gz that is none",
        at(TRAIN),
        ["rows.jsonl.gz", "cannot read"],
        {TRAIN: "  train: rows.jsonl.gz"},
        files={"rows.jsonl.gz": "plain"},
    ),
    Bad(
        "a number where text belongs",
        at(TRAIN),
        ["rows.jsonl: row 2", "'completion' is int, expected text"],
        files=rows(GOOD_ROW, '{"prompt": "a", "completion": 3}'),
    ),
    Bad(
        "a missing column in one row",
        at(TRAIN),
        ["rows.jsonl: row 2", "'completion' is null, expected text"],
        files=rows(GOOD_ROW, '{"prompt": "a"}'),
    ),
    Bad("evaluation data empty", at(EVAL_SIZE), ["data.eval", "empty"], {EVAL_SIZE: "  eval: e.jsonl"}, files={"e.jsonl": ""}),
    given("a missing file on the command line", "data.train=row.jsonl", ["no such file", "did you mean rows.jsonl?"]),
]

MODELS = [
    key(
        "a missing model folder",
        MODEL,
        "model: ./modle",
        ["model.name_or_path: ./modle", "no such folder", "did you mean model?"],
    ),
    key(
        "modules that are not there",
        R,
        "  target_modules: [q_porj]",
        ["strategy.target_modules", "'q_porj'", "did you mean 'q_proj'?"],
    ),
    key("whole modules that are not there", R, "  modules_to_save: [lm_haed]", ["modules_to_save", "'lm_haed'"]),
    key("a missing model path", MODEL, "model: a/b/c", ["model.name_or_path: a/b/c", "no such folder"]),
    Bad("a folder without config", at(MODEL), ["has no config.json", "not a model folder"], files={"model/config.json": None}),
    Bad("a broken config", at(MODEL), ["config.json", "not valid JSON"], files={"model/config.json": '{"a": '}),
    Bad("a config that is a list", at(MODEL), ["config.json", "expected a JSON object"], files={"model/config.json": "[]"}),
    Bad(
        "an adapter as base",
        at(MODEL),
        ["is an adapter, not a base model", "(x/base)", "adapter: model"],
        files={"model/config.json": None, "model/adapter_config.json": '{"base_model_name_or_path": "x/base"}'},
    ),
    Bad(
        "a broken adapter as base", at(MODEL), ["adapter"], files={"model/config.json": None, "model/adapter_config.json": "{"}
    ),
    Bad(
        "a translation model",
        at(MODEL),
        ["no causal LM"],
        files=config_of("T5ForConditionalGeneration", is_encoder_decoder=True),
    ),
    Bad("BERT", at(MODEL), ["BertForMaskedLM", "no causal LM", "ForCausalLM"], files=config_of("BertForMaskedLM")),
    Bad("a classifier", at(MODEL), ["no causal LM"], files=config_of("LlamaForSequenceClassification")),
    Bad("no weights", at(MODEL), ["contains no weights", "safetensors"], files={"model/model.safetensors": None}),
    Bad("broken weights", at(MODEL), ["model.safetensors", "download"], files={"model/model.safetensors": b"\x10"}),
    Bad(
        "weights cut short",
        at(MODEL),
        ["is truncated or not a safetensors file", "again"],
        files={"model/model.safetensors": CUT_SHORT},
    ),
    Bad(
        "a missing shard",
        at(MODEL),
        ["b.safetensors of its index is missing", "again"],
        files={"model/model.safetensors.index.json": INDEX},
    ),
    Bad("no tokenizer", at(MODEL), ["has no tokenizer", "model.tokenizer"], files={"model/tokenizer.json": None}),
    Bad(
        "a pointer for weights",
        at(MODEL),
        ["model.safetensors", "download"],
        files={"model/model.safetensors": "version https"},
    ),
    Bad("a plain file", at(MODEL), ["is a file", "a model folder"], {MODEL: "model: rows.jsonl"}),
    Bad("a false GGUF", at(MODEL), ["x.gguf", "is not a GGUF file"], {MODEL: "model: x.gguf"}, files={"x.gguf": "nope"}),
    key("a missing GGUF", MODEL, "model: y.gguf", ["y.gguf", "no such GGUF file"]),
    key("a Hub id while offline", MODEL, "model: nobody/nothing", ["nobody/nothing", "not in the Hub cache", "HF_HUB_OFFLINE"]),
    key("a near name while offline", MODEL, "model: modell", ["modell", "did you mean model?"]),
    Bad("no valid Hub id", at(MODEL), ["model.name_or_path: a b", "Hub id"], {MODEL: "model: a b"}),
    Bad(
        "more layers than there are",
        at(R),
        ["strategy.last_n_layers", "given 9", "has 2 layers"],
        {NAME: "  name: partial", R: "  last_n_layers: 9"},
    ),
    Bad(
        "a pattern that matches nothing",
        at(R),
        ["strategy.patterns", "'*.ffn.*'", "matches no parameter", "model.embed_tokens.weight"],
        {NAME: "  name: partial", R: "  patterns: ['*.ffn.*']"},
    ),
    Bad(
        "a thaw that never comes",
        at(R + 1),
        ["strategy.gradual_unfreezing.every", "more than 0"],
        {NAME: "  name: partial", R: "  last_n_layers: 1\n  gradual_unfreezing: {every: 0}"},
    ),
    Bad(
        "a thaw by epochs",
        at(R + 1),
        ["strategy.gradual_unfreezing.every", "a share below 1 or a whole number of steps", "1.5"],
        {NAME: "  name: partial", R: "  last_n_layers: 1\n  gradual_unfreezing: {every: 1.5}"},
    ),
    Bad(
        "a thaw without its steps",
        at(R + 1),
        ["strategy.gradual_unfreezing"],
        {NAME: "  name: partial", R: "  last_n_layers: 1\n  gradual_unfreezing: 0.25"},
    ),
    Bad(
        "a decay that grows",
        at(R + 1),
        ["strategy.layer_decay", "at most 1"],
        {NAME: "  name: partial", R: "  last_n_layers: 1\n  layer_decay: 1.1"},
    ),
    Bad(
        "precomputing that is a switch",
        at(R + 1),
        ["strategy.precompute", "auto", "true or false"],
        {NAME: "  name: partial", R: "  last_n_layers: 1\n  precompute: always"},
    ),
    Bad(
        "a head that is tied",
        at(STRATEGY),
        ["no parameter would be trained", "tied", "head: true"],
        {NAME: "  name: partial", R: "  last_n_layers: 0"},
        files=config_of("LlamaForCausalLM", tie_word_embeddings=True),
    ),
    Bad(
        "an LM head that is tied",
        at(STRATEGY),
        ["strategy.untie", "tie_word_embeddings", "untie: true"],
        {NAME: "  name: head", R: ""},
        files=config_of("LlamaForCausalLM", tie_word_embeddings=True),
    ),
    headed("a layer that is none", "  layer: 0", ["strategy.layer", "above 0"]),
    headed("a layer beyond the last", "  layer: 9", ["strategy.layer", "given 9", "has 2 layers"]),
    headed("a pooling that is none", "  pooling: max", ["strategy.pooling", "mean, last, first"]),
    headed("a width without a hidden layer", "  hidden_size: 64", ["strategy.hidden_size", "head: mlp"]),
    headed("an mlp that is solved", "  head: mlp\n  solver: exact", ["strategy.solver", "head: linear"], 1),
    headed("a penalty for the trainer", "  solver: trainer\n  l2: 0.1", ["l2", "weight_decay"], None),
    headed("a negative penalty", "  l2: -1", ["strategy.l2", "above 0"]),
    headed("an untied classifier", "  untie: true", ["strategy.untie", "remove it"]),
    headed("contrast at a layer", "  contrastive: true\n  layer: 1", ["layer", "last layer", "remove layer"], None),
    headed("contrast, then more", "  contrastive: true\n  then: full", ["then", "contrastive: true trains the body"], None),
    headed("steps without contrast", "  contrastive_steps: 5", ["contrastive_steps", "set contrastive: true"], None),
    headed("a rate of contrast of 0", "  contrastive_learning_rate: 0", ["strategy.contrastive_learning_rate", "above 0"]),
    headed(
        "no steps of contrast", "  contrastive: true\n  contrastive_steps: 0", ["strategy.contrastive_steps", "at least 1"], 1
    ),
    headed("then what is no strategy", "  then: prefix", ["strategy.then.name", '"prefix"', "partial, lora, full"]),
    headed("then with a typo", "  then: {name: lora, rr: 4}", ["strategy.then.rr", "did you mean 'r'?"]),
    headed("then with a bad value", "  then: {name: lora, r: 0}", ["strategy.then.r = 0", "at least 1"]),
    headed("then after a mean", "  pooling: mean\n  then: full", ["then", "pools by mean", "remove pooling"], None),
    headed("then after an mlp", "  head: mlp\n  then: full", ["then needs head: linear"], None),
    Bad(
        "a layer for an LM head", at(R), ["strategy.layer", "last layer", "remove it"], {NAME: "  name: head", R: "  layer: 1"}
    ),
    key("an adapter that is not there", R, "  adapter: ./none", ["strategy.adapter: ./none", "no such folder"]),
    Bad("a broken adapter", at(R), ["strategy.adapter", "JSON"], {R: "  adapter: a"}, files={"a/adapter_config.json": "{"}),
    key("an adapter that is none", R, "  adapter: model", ["strategy.adapter", "adapter_config.json"]),
    key(
        "a tokenizer that is not there",
        MODEL,
        "model: {name_or_path: model, tokenizer: ./tok}",
        ["model.tokenizer", "no such folder"],
    ),
    key(
        "a tokenizer that is a file",
        MODEL,
        "model: {name_or_path: model, tokenizer: rows.jsonl}",
        ["model.tokenizer", "a file"],
    ),
]

ROWS = f"{GOOD_ROW}\n" * 400
LONG: dict[str, str | bytes | None] = {"rows.jsonl": ROWS}
NEW = "  tokenizer: {vocab_size: 300}"


def scratch(name: str, line: str, message: list[str], **files: str | bytes | None) -> Bad:
    """A case under strategy scratch; the mistake is on line R."""
    return Bad(name, at(R), message, {MODEL: "seed: 1", NAME: "  name: scratch", R: line}, files={**LONG, **files})


def scratch_model(name: str, model: str, line: str, message: list[str], **files: str | bytes | None) -> Bad:
    """A case under strategy scratch; the mistake is in the model."""
    return Bad(name, at(MODEL), message, {MODEL: model, NAME: "  name: scratch", R: line}, files={**LONG, **files})


FROM_SCRATCH = [
    scratch("an unknown family", f"  model_type: lama\n{NEW}", ["model_type: lama", "no causal LM", "'llama'"]),
    scratch("a family that is no causal LM", f"  model_type: t5\n{NEW}", ["model_type: t5", "no causal LM"]),
    scratch(
        "a causal LM that sees ahead", f"  model_type: bert\n{NEW}", ["model_type: bert", "bidirectional attention", "llama"]
    ),
    scratch("an unknown key of a config", f"  config: {{hiden_size: 64}}\n{NEW}", ["config.hiden_size", "'hidden_size'"]),
    scratch(
        "a key of another family's config",
        f"  config: {{rms_norm_eps: 1e-5}}\n  model_type: gpt2\n{NEW}",
        ["config.rms_norm_eps", "gpt2 has no such key", "layer_norm_epsilon"],
    ),
    scratch(
        "heads that do not divide",
        f"  config: {{hidden_size: 100, num_attention_heads: 3}}\n{NEW}",
        ["num_attention_heads", "hidden_size = 100 is not divisible by 3 heads", "99"],
    ),
    scratch(
        "heads that share unevenly",
        f"  config: {{hidden_size: 96, num_attention_heads: 6, num_key_value_heads: 4}}\n{NEW}",
        ["num_key_value_heads", "6 heads are not divisible by num_key_value_heads = 4", "num_key_value_heads: 3"],
    ),
    scratch(
        "too few parameters", "  parameters: 60k\n  tokenizer: {vocab_size: 4096}", ["parameters", "4,096 tokens", "smaller"]
    ),
    scratch("parameters in words", "  parameters: huge", ['parameters = "huge"', "300k, 10M or 1.5B"]),
    scratch("zero parameters", "  parameters: 0", ["parameters = 0", "300k, 10M or 1.5B"]),
    scratch(
        "sizes of an unknown shape", f"  parameters: 10M\n  model_type: opt\n{NEW}", ["parameters", "opt", "strategy.config"]
    ),
    scratch("a width that is no number", f"  config: {{hidden_size: wide}}\n  parameters: 80k\n{NEW}", ["hidden_size", "wide"]),
    scratch("more tokens than bytes", "  tokenizer: {vocab_size: 90000}", ["vocab_size: 90,000", "bytes of data", "smaller"]),
    scratch("fewer tokens than bytes", "  tokenizer: {vocab_size: 100}", ["vocab_size = 100", "at least 258"]),
    scratch("a special token twice", "  tokenizer: {special_tokens: ['<|pad|>']}", ["special_tokens", "already"]),
    scratch("a key of the tokenizer", "  tokenizer: {vocab_sise: 300}", ["vocab_sise", "did you mean 'vocab_size'?"]),
    scratch(
        "a chat template that is not there",
        "  tokenizer: {chat_template: x.jinja, vocab_size: 300}",
        ["chat_template", "x.jinja"],
    ),
    scratch("a class that is not there", f"  model_class: own.py:Net\n{NEW}", ["model_class: own.py", "no such file"]),
    scratch(
        "a class of another name", f"  model_class: own.py:Nets\n{NEW}", ["no class Nets", "Net?"], **{"own.py": "class Net: 1"}
    ),
    scratch(
        "a class that is no Python", f"  model_class: own.py:Net\n{NEW}", ["is not valid Python"], **{"own.py": "class Net"}
    ),
    scratch("a class without a file", f"  model_class: own.Net\n{NEW}", ["model_class", "my_model.py:TinyModel"]),
    scratch("a class with a size", f"  model_class: own.py:Net\n  parameters: 1M\n{NEW}", ["model_class", "remove"]),
    scratch("an adapter from scratch", "  adapter: x", ["strategy.adapter", "strategy scratch", "belongs to strategy lora"]),
    scratch("fewer in the config", f"  config: {{vocab_size: 200}}\n{NEW}", ["config.vocab_size: 200", "300 tokens"]),
    Bad(
        "no size",
        at(STRATEGY),
        ["strategy.parameters: missing", "10M", "strategy.config"],
        {MODEL: "seed: 1", NAME: "  name: scratch", R: NEW},
        files=LONG,
    ),
    Bad(
        "no tokenizer from scratch",
        at(STRATEGY),
        ["strategy.tokenizer: missing", "vocab_size: 4096", "model.tokenizer"],
        {MODEL: "seed: 1", NAME: "  name: scratch", R: "  parameters: 1M"},
    ),
    scratch_model(
        "two tokenizers", "model: {tokenizer: model}", f"  parameters: 1M\n{NEW}", ["model.tokenizer", "trains a new one"]
    ),
    scratch_model("tokens for a new tokenizer", "model: {add_tokens: [x]}", f"  parameters: 1M\n{NEW}", ["special_tokens"]),
    scratch_model("a revision of nothing", "model: {revision: main}", f"  parameters: 1M\n{NEW}", ["model.revision", "remove"]),
    scratch_model("weights for a config", "model: x.gguf", NEW, ["gguf", "config.json"]),
    scratch_model(
        "a model beside a class and a tokenizer",
        "model: model",
        f"  model_class: own.py:Net\n{NEW}",
        ["model.name_or_path", "nothing would be read", "remove it"],
        **{"own.py": "class Net: 1"},
    ),
    scratch_model("a config that is broken", "model: c.json", NEW, ["c.json", "not valid JSON"], **{"c.json": "{"}),
    scratch_model("a config of nothing", "model: c.json", NEW, ["c.json", "model_type"], **{"c.json": "{}"}),
    scratch_model("a config out of reach", "model: no/model", NEW, ["no/model", "not in the Hub cache"]),
    Bad(
        "a config and a family",
        at(R),
        ["strategy.model_type", "model has a config that defines the shape", "remove one"],
        {NAME: "  name: scratch", R: f"  model_type: gpt2\n{NEW}"},
        files=LONG,
    ),
    key("rows as files", EVAL_SIZE, "  documents: files\n  eval_size: 0.1", ["data.documents", "rows.jsonl", ".txt"]),
    key("rows of files", EVAL_SIZE, "  documents: files\n  eval_size: 2", ["eval_size", "a share of the text", "below 1"], 1),
]

CHECKPOINT: dict[str, str | bytes | None] = {"run/.hfstrat.lock": "", "run/checkpoint-2/hfstrat_complete.json": MARKER}


def distilled(name: str, keys: str, message: list[str], line: int = 1, **more: Any) -> Bad:
    """A case of strategy distill with these keys after its name; the mistake is in the one with this number."""
    return Bad(name, at(NAME + line), message, lines={NAME: "  name: distill", R: keys}, **more)


def words(*tokens: str) -> str:
    return json.dumps({"model": {"vocab": {token: number for number, token in enumerate(tokens)}}})


def another_model(**config: Any) -> dict[str, str | bytes | None]:
    """A second folder with a model, as the checks see it."""
    made = {"other" + name.removeprefix("model"): content for name, content in small_model().items()}
    return {**made, "other/config.json": json.dumps({"num_hidden_layers": 2, "vocab_size": 3, **config})}


ADAPTER: dict[str, str | bytes | None] = {"other/adapter_config.json": "{}"}
DISTILL: list[Bad] = [
    distilled("a teacher that is not there", "  student: full\n  teacher: ./none", ["strategy.teacher", "no such folder"], 2),
    distilled("a teacher that is a file", "  student: full\n  teacher: rows.jsonl", ["strategy.teacher", "is a file"], 2),
    distilled(
        "a teacher without weights",
        "  student: full\n  teacher: other",
        ["strategy.teacher: other contains no weights"],
        2,
        files={"other/config.json": '{"num_hidden_layers": 2}'},
    ),
    distilled(
        "a teacher that is an adapter",
        "  student: full\n  teacher: other",
        ["strategy.teacher: other is an adapter", "hfstrat merge"],
        2,
        files=ADAPTER,
    ),
    distilled(
        "a teacher with another vocabulary",
        "  student: full\n  teacher: other",
        ["strategy.teacher: other has another vocabulary", "1 is 'b' for the student and 'c' for the teacher", "GOLD"],
        2,
        files={**another_model(), "model/tokenizer.json": words("a", "b", "c"), "other/tokenizer.json": words("a", "c", "b")},
    ),
    distilled(
        "a teacher without a tokenizer",
        "  student: full\n  teacher: other",
        ["strategy.teacher: other contains no tokenizer", "put the one that it was trained with into its folder"],
        2,
        files={**another_model(), "other/tokenizer.json": None},
    ),
    distilled(
        "a teacher that tells classes apart",
        "  student: full\n  teacher: other",
        ["strategy.teacher: other is a LlamaForSequenceClassification, which is no causal LM"],
        2,
        files=another_model(architectures=["LlamaForSequenceClassification"]),
    ),
    distilled(
        "a layer below the first",
        "  student: full\n  hidden_states: {layers: [[-1, 1]]}",
        ["strategy.hidden_states.layers: [-1, 1]", "the student has no layer -1", "expected a number from 0 to 1"],
        2,
    ),
    distilled(
        "a pair with a layer that was left out",
        "  student: full\n  shrink: {layers: 1}\n  hidden_states: {layers: [[1, 1]]}",
        ["strategy.hidden_states.layers: [1, 1]", "the student has no layer 1"],
        3,
    ),
    distilled(
        "kept answers where layers are compared",
        "  student: full\n  teacher_cache: {form: hidden}\n  hidden_states: {}",
        ["strategy.teacher_cache.form: hidden: what `hidden_states` compares", "remove one of them"],
        2,
    ),
    distilled(
        "draws for a divergence that needs everything",
        "  student: full\n  teacher_cache: {form: sampled}\n  divergence: jsd",
        ["strategy.teacher_cache.form: sampled stores the probabilities of some tokens", "divergence: forward_kl"],
        2,
    ),
    distilled(
        "more layers to keep than there are", "  student: full\n  shrink: {layers: 9}", ["shrink.layers: given 9", "has 2"], 2
    ),
    distilled("a layer that is not there", "  student: full\n  shrink: {layers: [0, 2]}", ["there is no layer 2"], 2),
    distilled("no layer at all", "  student: full\n  shrink: {layers: 0}", ["expected at least one layer"], 2),
    distilled("nothing to shrink", "  student: full\n  shrink: {}", ["strategy.shrink: expected layers"], 2),
    distilled(
        "wider than the model",
        "  student: full\n  shrink: {intermediate_size: 17}",
        ["shrink.intermediate_size: given 17, but this model has 16"],
        2,
        files={"model/config.json": '{"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 16}'},
    ),
    distilled(
        "inner channels that nobody knows",
        "  student: full\n  shrink: {intermediate_size: 8}",
        ["MLPs of a llama model are not structured like those of Llama", "strategy.shrink.layers"],
        2,
        files={"model/config.json": '{"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": 16}'},
    ),
    distilled(
        "a pair with a layer that is not there",
        "  student: full\n  hidden_states: {layers: [[0, 1], [1, 2]]}",
        ["strategy.hidden_states.layers: [1, 2]", "the teacher has no layer 2"],
        2,
    ),
    distilled("a pair of three", "  student: full\n  hidden_states: {layers: [[0, 1, 2]]}", ["expected a list of pairs"], 2),
    distilled(
        "a student that is no strategy", "  student: lorra", ["strategy.student.name", '"lorra"', "did you mean 'lora'?"]
    ),
    distilled(
        "a student that is missing", "  teacher_weight: 0.5", ["strategy.student.name: missing", "full, lora, partial"], -1
    ),
    distilled("a typo in a student", "  student: {name: lora, rr: 4}", ["strategy.student.rr"]),
    distilled(
        "two who write",
        "  student: full\n  seq_kd: true\n  on_policy: true",
        ["seq_kd: true trains on answers of the teacher"],
        2,
    ),
    distilled(
        "a divergence that TRL does not have",
        "  student: full\n  divergence: skew_kl\n  on_policy: true",
        ["strategy.divergence: TRL's DistillationTrainer has no skew_kl", "jsd"],
        2,
    ),
    distilled(
        "labels on its own answers", "  student: full\n  teacher_weight: 0.3\n  on_policy: true", ["from the teacher alone"], 2
    ),
    distilled(
        "layers on its own answers",
        "  student: full\n  hidden_states: {}\n  on_policy: true",
        ["does not match hidden states"],
        2,
    ),
    distilled(
        "kept answers to what nobody has said yet",
        "  student: full\n  teacher_cache: {form: hidden}\n  on_policy: true",
        ["strategy.teacher_cache: with on_policy the answers of the student change in every step"],
        2,
    ),
    distilled(
        "no teacher on its own answers",
        "  student: full\n  baseline: true\n  on_policy: true",
        ["no loss without the teacher"],
        2,
    ),
    distilled(
        "an adapter's own base on-policy", "  student: lora\n  on_policy: true", ["strategy.teacher: missing", "name one"]
    ),
    distilled("a random student of nobody", "  student: {name: scratch, parameters: 3M}", ["strategy.teacher: missing"]),
    distilled(
        "a random student with layers left out",
        "  student: {name: scratch, parameters: 3M}\n  teacher: other\n  shrink: {layers: 1}",
        ["strategy.shrink: it removes layers of a pretrained model"],
        3,
        files=another_model(),
    ),
    distilled(
        "a random student with tokens of its own",
        "  student: {name: scratch, parameters: 3M, tokenizer: {vocab_size: 512}}\n  teacher: other",
        ["student: with a new tokenizer", "seq_kd: true"],
        files=another_model(),
    ),
    distilled(
        "a random student beside a model that has a shape",
        "  student: {name: scratch, parameters: 3M}\n  teacher: other",
        ["strategy.student.parameters: model: model has a config", "strategy.student.config"],
        files=another_model(),
    ),
    distilled(
        "a random student of a size that is none",
        "  student: {name: scratch, parameters: 3Q}\n  teacher: other",
        ["strategy.student.parameters"],
        files=another_model(),
    ),
    distilled(
        "an adapter on fewer layers", "  student: lora\n  shrink: {layers: 1}", ["shrink", "student: full or partial"], 2
    ),
    distilled(
        "layers of a teacher that only writes",
        "  student: full\n  seq_kd: true\n  hidden_states: {loss: mse}",
        ["hidden_states", "the teacher only generates text"],
        3,
    ),
    distilled(
        "a temperature where the teacher only writes",
        "  student: full\n  seq_kd: true\n  temperature: 2.0",
        ["strategy.temperature: with seq_kd the teacher only generates text", "remove it"],
        3,
    ),
    distilled(
        "a length where nobody writes", "  student: full\n  max_new_tokens: 8", ["max_new_tokens: no text is generated"], 2
    ),
    distilled("a skew that nothing reads", "  student: full\n  skew: 0.2", ["strategy.skew: it is for divergence: skew_kl"], 2),
    distilled(
        "tokens of no draws",
        "  student: full\n  teacher_cache: {form: hidden, tokens: 9}",
        ["strategy.teacher_cache.tokens: form: hidden stores no tokens"],
        2,
    ),
    distilled(
        "room for nothing", '  student: full\n  teacher_cache: {form: "off", budget: 1GB}', ["form: off stores nothing"], 2
    ),
    distilled(
        "a student's adapter that is not there",
        "  student: {name: lora, adapter: ./none}",
        ["strategy.student.adapter: ./none: no such folder"],
    ),
    Bad(
        "pieces of rows that the teacher shall answer",
        at(EVAL_SIZE + 1),
        ["data.overflow: split: only the first piece of an example has a prompt", "truncate or drop"],
        lines={NAME: "  name: distill", R: "  student: full\n  seq_kd: true", EVAL_SIZE: "  overflow: split"},
    ),
    distilled("no such divergence", "  student: full\n  divergence: forward", ["strategy.divergence", "forward_kl"], 2),
    distilled(
        "more than all of the teacher",
        "  student: full\n  teacher_weight: 1.5",
        ["strategy.teacher_weight = 1.5", "at most 1"],
        2,
    ),
    distilled("no temperature", "  student: full\n  temperature: 0", ["strategy.temperature", "more than 0"], 2),
    distilled(
        "a budget that is no size",
        "  student: full\n  teacher_cache: {budget: 10}",
        ["strategy.teacher_cache.budget", "10GB"],
        2,
    ),
    distilled("another tool's name for the teacher", "  student: full\n  teacher_model: x", ["'strategy.teacher'"], 2),
]

OUTPUTS: list[Bad] = [
    key("output is a file", OUTPUT, "output_dir: rows.jsonl", ["output_dir: rows.jsonl is a file", "name a folder"]),
    key("output below a file", OUTPUT, "output_dir: rows.jsonl/run", ["output_dir: rows.jsonl/run", "rows.jsonl is a file"]),
    Bad(
        "output holds other files", at(OUTPUT), ["run contains files", "name another folder"], files={"run/thesis.txt": "mine"}
    ),
    key("output is the model", OUTPUT, "output_dir: model", ["output_dir: model", "name another folder"]),
    Bad(
        "output holds a finished run",
        at(OUTPUT),
        ["holds a finished run", "another folder", "--overwrite"],
        files={"run/.hfstrat.lock": "", "run/report.json": '{"result": {"status": "done"}}'},
    ),
    Bad("output holds a broken report", at(OUTPUT), ["report.json"], files={"run/.hfstrat.lock": "", "run/report.json": "{"}),
    Bad(
        "never to resume",
        at(OUTPUT),
        ["checkpoints", "training.resume_from_checkpoint=auto", "--overwrite"],
        {RATE: "  resume_from_checkpoint: never"},
        files=CHECKPOINT,
    ),
    key(
        "resume from nothing",
        RATE,
        "  resume_from_checkpoint: run/checkpoint-9",
        ["training.resume_from_checkpoint: run/checkpoint-9", "no such folder"],
    ),
    Bad(
        "resume from half a checkpoint",
        at(RATE),
        ["training.resume_from_checkpoint: run/checkpoint-2", "no complete checkpoint"],
        {RATE: "  resume_from_checkpoint: run/checkpoint-2"},
        files={"run/.hfstrat.lock": "", "run/recipe.yaml": "a: 1", "run/checkpoint-2/": None},
    ),
    Bad(
        "resume from an earlier checkpoint",
        at(RATE),
        [
            "training.resume_from_checkpoint: run/checkpoint-2",
            "up to checkpoint-4",
            "training.resume_from_checkpoint: auto",
        ],
        {RATE: "  resume_from_checkpoint: run/checkpoint-2"},
        files={"run/.hfstrat.lock": "", **{f"run/checkpoint-{n}/hfstrat_complete.json": MARKER for n in (2, 4)}},
    ),
    Bad("another recipe's checkpoint", "", ["checkpoint-2 belongs to another recipe", "--overwrite"], files=CHECKPOINT),
    Bad("no room on the disk", at(OUTPUT), ["output_dir", "one checkpoint needs", "free"], free=KIBIBYTE),
]

LABELS = [json.dumps({"text": f"t {n}", "label": "ab"[n % 2]}) for n in range(8)]


def classify(name: str, line: int, message: list[str], lines: dict[int, str] | None = None, **more: Any) -> Bad:
    """A case of task: text-classification; its rows are sound unless `files` has others."""
    task = {OUTPUT: "output_dir: run\ntask: text-classification"}
    return Bad(name, at(line), message, lines=task | (lines or {}), **{"files": rows(*LABELS), **more})


def labels(*values: Any) -> dict[str, str | bytes | None]:
    return rows(*(json.dumps({"text": "t", "label": value}) for value in values))


def taught(name: str, keys: str, message: list[str], line: int = 2, **more: Any) -> Bad:
    """A classifier with a teacher and these keys; the mistake is in the one with this number."""
    lines = {NAME: "  name: distill\n  student: full", R: keys}
    return classify(name, NAME + line, message, lines, files=rows(*LABELS) | more.pop("files", {}), **more)


CLASSIFICATION = [
    taught(
        "a classifier that writes",
        "  on_policy: true",
        ["strategy.on_policy: a model for text-classification generates no text"],
    ),
    taught(
        "a classifier's sentences",
        "  seq_kd: true",
        ["strategy.seq_kd: a model for text-classification generates no text", "remove it"],
    ),
    taught(
        "a classifier's layers",
        "  hidden_states: {}",
        ["strategy.hidden_states: layers can be matched for causal-lm only"],
    ),
    taught(
        "a classifier's likeliest tokens",
        "  teacher_cache: {form: top_k}",
        ["strategy.teacher_cache.form: top_k is for tokens"],
    ),
    taught(
        "a teacher that knows no classes",
        "  teacher: other",
        ["strategy.teacher: other is a LlamaForCausalLM", "(...ForSequenceClassification); train it first"],
        files=another_model(architectures=["LlamaForCausalLM"]),
    ),
    classify("rows of another task", TRAIN, ["text + label", "prompt, completion", "columns:"], files=rows(GOOD_ROW)),
    classify(
        "columns that want a map",
        TRAIN,
        ["the data have review, sentiment", "`data.columns: {review: text, sentiment: label}`"],
        files=rows(json.dumps({"review": "a", "sentiment": "b"})),
    ),
    classify("a label that is null", TRAIN, ["row 2", "'label' is null"], files=labels("a", None)),
    classify("scores for labels", TRAIN, ["row 1", "'label' is 0.5", "regression"], files=labels(0.5, 0.7)),
    classify("a list among labels", TRAIN, ["row 1", "but other rows have a list"], files=labels("a", ["b"])),
    classify("a vector for labels", TRAIN, ["row 1", "vectors of 0 and 1"], files=labels([0, 1, 0], [1, 0, 0])),
    classify(
        "a format of the other task",
        EVAL_SIZE,
        ["data.format: messages is for task: causal-lm"],
        {EVAL_SIZE: "  format: messages"},
    ),
    classify(
        "texts that are split", EVAL_SIZE, ["overflow: split", "belongs to a complete text"], {EVAL_SIZE: "  overflow: split"}
    ),
    classify("a template without a chat", EVAL_SIZE, ["data.template", "causal-lm"], {EVAL_SIZE: "  template: plain"}),
    classify("loss on turns", EVAL_SIZE, ["data.train_on", "causal-lm"], {EVAL_SIZE: "  train_on: all"}),
    classify(
        "a frozen new head",
        R,
        ["strategy.head: false", "has to be trained"],
        {NAME: "  name: partial", R: "  head: false\n  last_n_layers: 1"},
    ),
    classify(
        "an encoder with a decoder",
        MODEL,
        ["an encoder-decoder model", "BERT"],
        files=rows(*LABELS) | config_of("T5ForConditionalGeneration", is_encoder_decoder=True, model_type="t5"),
    ),
    classify(
        "an adapter of the other task",
        R,
        ["strategy.adapter", "CAUSAL_LM", "SEQ_CLS"],
        {R: "  adapter: other"},
        files=rows(*LABELS) | {"other/adapter_config.json": json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"})},
    ),
    classify("a number of labels", EVAL_SIZE, ["labels are found in the training data"], {EVAL_SIZE: "  num_labels: 2"}),
    key("a format without its task", EVAL_SIZE, "  format: text-classification", ["needs `task: text-classification`"]),
]


def regress(name: str, line: int, message: list[str], lines: dict[int, str] | None = None, **more: Any) -> Bad:
    """A case of task: regression; its rows are sound unless `files` says otherwise."""
    task = {OUTPUT: "output_dir: run\ntask: regression"}
    return Bad(name, at(line), message, lines=task | (lines or {}), **{"files": numbers(*range(8)), **more})


def numbers(*values: Any) -> dict[str, str | bytes | None]:
    return rows(*(json.dumps({"text": "t", "score": value}) for value in values))


def of_csv(*lines: str) -> dict[str, str | bytes | None]:
    return {"rows.csv": "".join(f"{line}\n" for line in lines)}


CSV = {TRAIN: "  train: rows.csv"}
REGRESSION = [
    regress("a word for a number", TRAIN, ["row 2: 'score' is 'good'", "text-classification"], files=numbers(0.5, "good")),
    regress("no number", TRAIN, ["row 2: 'score' is missing", "expected a number"], files=numbers(0.5, None)),
    regress("a number that is none", TRAIN, ["row 3: 'score' is missing", "number"], files=numbers(1, 2, float("nan"))),
    regress("an endless number", TRAIN, ["row 2: 'score' is -inf", "finite"], files=numbers(1, -float("inf"))),
    regress("a number beyond floats", TRAIN, ["row 2: 'score' is inf", "finite"], files=numbers(1, 10**400)),
    regress("a truth value for a number", TRAIN, ["row 1: 'score' is true", "expected a number"], files=numbers(True, 1)),
    regress("a list among numbers", TRAIN, ["row 2: 'score[0]' is 'a'", "number"], files=numbers([1, 2], ["a", 2])),
    regress("a number among lists", TRAIN, ["row 2: 'score' is 3", "list of 2 numbers"], files=numbers([1, 2], 3)),
    regress("a shorter list", TRAIN, ["row 3: 'score' is a list of 1", "of 2 numbers"], files=numbers([1, 2], [3, 4], [5])),
    regress("an empty list", TRAIN, ["row 1: 'score' is a list", "a number"], files=numbers([], [])),
    regress("decimals with a comma", TRAIN, ["row 1: 'score' is '3,5'", "a point"], CSV, files=of_csv("text,score", 'a,"3,5"')),
    regress("several numbers as text", TRAIN, ["'[1, 2]'", "a list"], CSV, files=of_csv("text,score", 'a,"[1, 2]"')),
    regress("an empty field", TRAIN, ["row 2: 'score' is", "number"], CSV, files=of_csv("text,score", "a,1", "b,")),
    regress(
        "no column of numbers",
        TRAIN,
        ["text + score", "review, stars", "stars: target"],
        CSV,
        files=of_csv("review,stars", "a,1"),
    ),
    regress("columns of another task", TRAIN, ["text + score", "prompt, completion"], files=rows(GOOD_ROW)),
    regress(
        "a column that is not there",
        EVAL_SIZE,
        ["data.columns", "no column 'valenc'", "did you mean 'valence'?"],
        CSV | {EVAL_SIZE: "  columns: {valenc: target, arousal: target}"},
        files=of_csv("text,valence,arousal", "a,1,2"),
    ),
    regress("a format of another task", EVAL_SIZE, ["data.format: messages", "regression"], {EVAL_SIZE: "  format: messages"}),
    regress("numbers of parts", EVAL_SIZE, ["overflow: split", "complete text"], {EVAL_SIZE: "  overflow: split"}),
    regress("a template for numbers", EVAL_SIZE, ["data.template", "causal-lm"], {EVAL_SIZE: "  template: plain"}),
    regress("half precision", MODEL + 2, ["float16", "bfloat16"], {MODEL: "model:\n  name_or_path: model\n  dtype: float16"}),
    regress(
        "a divergence of numbers",
        R + 1,
        ["strategy.divergence", "squared error"],
        {NAME: "  name: distill\n  student: full", R: "  divergence: reverse_kl"},
    ),
    key("regression without its task", EVAL_SIZE, "  format: regression", ["needs `task: regression`"]),
    key("its name in transformers", OUTPUT, "output_dir: run\nproblem_type: regression", ["write `task: regression`"], 1),
]


def quantized(name: str, section: str, message: list[str], strategy: str | None = None, **more: Any) -> Bad:
    """A case with another `quantization`, and maybe another strategy (in one line)."""
    lines = {MODEL: f"model: {{name_or_path: model, quantization: {section}}}"}
    if strategy:
        lines |= {STRATEGY: f"strategy: {strategy}", NAME: "seed: 1", R: "task: causal-lm"}
    return Bad(name, at(more.pop("line", MODEL)), message, lines | more.pop("lines", {}), **more)


BNB_CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 2, "quantization_config": {"load_in_4bit": True}})
ALL_LEARN = ["model.quantization: nf4", "trains every weight", "lora"]
QUANTIZED = [
    quantized("an unknown form", "int4", ["model.quantization.name", "int8, nf4, fp4"]),
    quantized("a number of bits", "4", ["model.quantization = 4", "a mapping of keys"]),
    quantized(
        "a typo in quantization", "{name: nf4, use_double_qant: true}", ["use_double_qant", "did you mean 'use_double_quant'?"]
    ),
    quantized("no form", "{use_double_quant: true}", ["model.quantization.name: missing", "int8, nf4, fp4"]),
    quantized("modules as a text", "{name: nf4, skip_modules: mlp}", ["skip_modules", "a list", "[mlp]"]),
    quantized(
        "double scales in 8 bits",
        "{name: int8, use_double_quant: false}",
        ["quantization.use_double_quant: for nf4 and fp4 only"],
    ),
    quantized(
        "a dtype for 8 bits", "{name: int8, compute_dtype: bfloat16}", ["quantization.compute_dtype: for nf4 and fp4 only"]
    ),
    quantized("quantized and full", "nf4", ALL_LEARN, "full"),
    quantized("quantized and from scratch", "nf4", ["all weights are random"], "{name: scratch}"),
    quantized(
        "a quantized head that goes on full",
        "nf4",
        ALL_LEARN,
        "{name: head, then: full}",
        lines={R: "task: text-classification"},
        files=rows(*(json.dumps({"text": f"a {n}", "label": n % 2}) for n in range(8))),
    ),
    quantized("a quantized full student", "nf4", ["full fine-tuning trains every weight"], "{name: distill, student: full}"),
    quantized(
        "pissa on bits", "nf4", ["pissa changes the base model's weights"], line=R, lines={R: "  init_lora_weights: pissa"}
    ),
    quantized("compiled bits", "nf4", ["not compiled"], line=RATE, lines={RATE: "  torch_compile: true"}),
    quantized(
        "bits of fewer layers",
        "nf4",
        ["layers are left out", "strategy.teacher"],
        "{name: distill, shrink: {layers: 1}, student: {name: partial, last_n_layers: 1}}",
        line=STRATEGY,
    ),
    quantized("bits of bits", "nf4", ["is already quantized"], files={"model/config.json": BNB_CONFIG}),
    Bad(
        "a GGUF in bits",
        at(MODEL),
        ["model.quantization: nf4", "a second time", "save_pretrained"],
        {MODEL: "model: {name_or_path: x.gguf, quantization: nf4}"},
        files={"x.gguf": "GGUF"},
    ),
    Bad(
        "all of a quantized base",
        at(MODEL),
        ["model is quantized", "trains every weight"],
        {STRATEGY: "strategy: full", NAME: "seed: 1", R: "task: causal-lm"},
        files={"model/config.json": BNB_CONFIG},
    ),
    Bad(
        "blocks of a quantized base",
        at(MODEL),
        ["model is quantized", "trainable weights cannot be quantized"],
        {NAME: "  name: partial", R: "  last_n_layers: 1"},
        files={"model/config.json": BNB_CONFIG},
    ),
    Bad(
        "an unknown form of a teacher",
        at(R + 1),
        ["strategy.teacher.quantization.name", "int8, nf4, fp4"],
        {NAME: "  name: distill", R: "  student: lora\n  teacher: {name_or_path: model, quantization: q4}"},
    ),
    given("a form on the command line", "model.quantization=int3", ["int8, nf4, fp4"]),
    key("quantization at the top", OUTPUT, "output_dir: run\nquantization: nf4", ["did you mean 'model.quantization'?"], 1),
    key("quantization in strategy", R, "  quantization: nf4", ["did you mean 'model.quantization'?"]),
]
CASES = [
    *QUANTIZED,
    *CLASSIFICATION,
    *REGRESSION,
    *UNKNOWN_KEYS,
    *FOREIGN_KEYS,
    *FOREIGN_VALUES,
    *RENAMED,
    *WRONG_TYPES,
    *BOUNDS,
    *CHOICES,
    *MISSING,
    *FILES,
    *OVERRIDES,
    *COMBINATIONS,
    *DATA_FILES,
    *MODELS,
    *FROM_SCRATCH,
    *DISTILL,
    *OUTPUTS,
]
