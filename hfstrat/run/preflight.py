"""What can be checked before torch is imported: files, folders, names, free disk space."""

from __future__ import annotations

import importlib.util
from difflib import get_close_matches
from pathlib import Path

from hfstrat import strategies
from hfstrat.data import chat_template, features, readers, sources
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError
from hfstrat.evaluation.evaluate import check_measurements
from hfstrat.models import check as models_check
from hfstrat.models.transformers_source import training_argument_names
from hfstrat.objectives import objective_of, task_of
from hfstrat.publish import push
from hfstrat.recipe.data import Source
from hfstrat.recipe.load import Loaded, about, located
from hfstrat.recipe.schema import Recipe, Training
from hfstrat.run import output_dir, streaming
from hfstrat.strategies import checks
from hfstrat.strategies.description import Description
from hfstrat.trainer import checkpoints, distributed

TRACKER_PACKAGES = {"trackio": "trackio", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
OF_BITSANDBYTES = ("8bit", "paged", "bnb", "lion", "ademamix")  # parts of the names of its optimizers
OPTIMIZER_PACKAGES = {  # of the others that need one: its module, and what to install
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "grokadamw": ("grokadamw", "grokadamw"),
}
ADVICE = {  # TrainingArguments that would break guarantees of hfstrat, or that its Trainer never reads
    "set training.global_batch_size and training.per_device_train_batch_size": "gradient_accumulation_steps",
    "leave training.per_device_train_batch_size at auto": "auto_find_batch_size",
    "set model.dtype": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "use `hfstrat train RECIPE --accelerate-config NAME`": "deepspeed fsdp fsdp_config parallelism_config accelerator_config",
    "set training.train_sampling_strategy": "train_sampling_strategy",
    "the order of examples is a function of seed and step; set seed": "data_seed length_column_name dataloader_drop_last",
    "the loss is the mean over the supervised tokens; remove it": "label_smoothing_factor average_tokens_across_devices",
    "set training.eval_steps": "eval_strategy do_eval eval_delay",
    "evaluation is per token, by the lowest loss; remove it": (
        "metric_for_best_model greater_is_better prediction_loss_only label_names batch_eval_metrics eval_do_concat_batches "
        "include_for_metrics"
    ),
    "use the recipe's section hub": (
        "push_to_hub hub_model_id hub_private_repo hub_token hub_strategy hub_always_push hub_revision"
    ),
    "remove it": (
        "remove_unused_columns logging_nan_inf_filter disable_tqdm do_train do_predict restore_callback_states_from_checkpoint "
        "save_only_model local_rank ignore_data_skip ddp_find_unused_parameters"
    ),
    "the process group is created before the arguments; remove it": "ddp_backend ddp_timeout",
    "set evaluation.eval_on_start": "eval_on_start",
    "set training.save_steps": "save_strategy",
    "set training.resume_from_checkpoint": "resume_from_checkpoint",
    "a SIGTERM saves a checkpoint after the current step anyway; remove it": "enable_jit_checkpoint",
    "set CUDA_VISIBLE_DEVICES to an empty string to train on the CPU": "use_cpu",
    "set training.activation_checkpointing": (
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
}
DECIDED = {name: advice for advice, names in ADVICE.items() for name in names.split()}


def check(loaded: Loaded, overwrite: bool = False, network: bool = True, wrapping: str | None = None) -> Description | None:
    """Refuse what cannot work, before anything is written; returns what is trained, None if that is unknown without torch.

    Args:
        network: whether the Hub may be queried.
        wrapping: how the processes of the run share the model; by default as in the environment of this process.

    Raises:
        UserError: one sentence with the place in the recipe.
    """
    recipe, strategy = loaded.recipe, strategies.build(loaded.recipe.strategy)
    with located(loaded):
        objective_of(recipe).check(recipe, wrapping or distributed.wrapping())
        checks.check_task(recipe)
        streaming.check(recipe)
        _check_data(recipe, network)
        _check_training(recipe)
        check_float8(recipe, wrapping or distributed.wrapping())
        check_measurements(recipe.evaluation)
        strategy.check(recipe, wrapping or distributed.wrapping(), network)
        description = strategies.describe(recipe)
        output_dir.check_output(recipe, overwrite)
        if description is not None:
            base = checks.quantized_bytes(recipe, description)
            output_dir.check_disk(recipe, description.checkpoint_bytes(base))
        if network:
            push.check_access(recipe)
    return description


def _check_data(recipe: Recipe, network: bool) -> None:
    data = recipe.data
    if template := chat_template.check_template(data.template):
        chat_template.check_options(data.chat_template_kwargs, template, "data.chat_template_kwargs")
    for source in data.train:
        sources.check_split(source.path, "data.train" if source.split else "data.split", data.of(source, "split"))
        _check_source(source, recipe, "data.train", "data.train", network)
        if data.eval_split:
            sources.check_split(source.path, "data.eval_split", data.eval_split)
            _check_source(source, recipe, "data.eval", "data.eval_split", network=False)
    for source in data.eval or []:
        sources.check_split(source.path, "data.eval", source.split or "train")
        _check_source(source, recipe, "data.eval", "data.eval", network)
    held_out = data.eval is None and data.eval_split is None and data.eval_size >= 1
    if held_out and recipe.evaluation.max_rows and recipe.evaluation.max_rows < data.eval_size:
        raise UserError(
            f"evaluation.max_rows: {recipe.evaluation.max_rows} is less than data.eval_size = {data.eval_size:g}, "
            "so some held-out rows would not be used; give one of them"
        )


def _check_source(source: Source, recipe: Recipe, part: str, key: str, network: bool) -> None:
    """Refuse a source that does not exist, and files whose first rows cannot be read."""
    data = recipe.data
    if sources.is_local(source.path):
        with about(key):
            if task_of(recipe).rows.check_source(source, data, part):
                return
    files = sources.local_files(source.path, key, sources.splits_of(source, data, part)[1])
    if files is None:
        models_check.check_hub(key, source.path, data.of(source, "revision"), "", "dataset", network)
    elif of_hub := next((name for name in ("config", "revision") if getattr(source, name)), None):
        raise UserError(f"{key}: {source.path} is local, and only a Hub dataset has a {of_hub}; remove it")
    for file in files or []:
        if data.documents == "files" and readers.file_kind(file) != "text":
            raise UserError(f"data.documents: {file}: `documents: files` needs .txt files; remove data.documents")
        with about(key):
            _check_rows(file, recipe, source, str(file) if len(files or []) > 1 else source.path)


def _check_rows(file: Path, recipe: Recipe, source: Source, name: str) -> None:
    """Refuse columns that fit no format, and the first row that its format cannot read."""
    data, task = recipe.data, task_of(recipe)
    skips = data.bad_rows == "skip"
    rows = readers.read_head(file, skips)
    columns = data.of(source, "columns")
    try:
        reading = task.rows.read_format(rows, name, data, data.of(source, "format"), columns, features.class_names([file]))
    except UserError as error:
        if not (unknown := [name for name in columns.values() if name not in task.rows.columns]):
            raise
        near = get_close_matches(unknown[0], task.rows.columns, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(task.rows.columns)}"
        raise UserError(f"data.columns: no format has a column '{unknown[0]}'; {hint} ({error})") from None
    for number, row in enumerate(rows):
        try:
            reading.example(row)
        except BadRow as error:
            if not skips:
                raise UserError(f"{reading.where(number)}: {error}") from None


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    _check_optimizer(training.optim)
    for name in training.report_to:
        found = importlib.util.find_spec(TRACKER_PACKAGES[name])
        # wandb and others create a folder of their own name where they run, which Python imports as a package without a file
        if found is None or found.origin is None:
            raise UserError(f"training.report_to: {name} is not installed: pip install {TRACKER_PACKAGES[name]}, or remove it")
    if training.max_time and training.warmup_steps >= 1:
        raise UserError("training.warmup_steps: with max_time the number of steps is unknown; give a share below 1")
    _check_extra(training)
    if training.resume_from_checkpoint not in ("auto", "never"):
        with about("training.resume_from_checkpoint"):
            checkpoints.find_resume(Path(recipe.output_dir), training.resume_from_checkpoint, recipe.model_dump())


def check_float8(recipe: Recipe, wrapping: str) -> None:
    """Refuse what does not compute in float8. Raises UserError."""
    if not recipe.training.float8:
        return
    key, sections = "training.float8: true", (recipe.strategy, getattr(recipe.strategy, "student", None))
    if any(hasattr(section, name) for section in sections for name in ("target_modules", "peft_type")):
        raise UserError(
            f"{key}: with an adapter the linear layers are frozen; quantize them (model.quantization), or remove it"
        )
    if wrapping in (distributed.FSDP, distributed.DEEPSPEED):
        raise UserError(f"{key}: sharded weights are not computed in float8 in this version; use --accelerate-config ddp")
    if recipe.objective.generates or getattr(recipe.strategy, "on_policy", False):
        raise UserError(f"{key}: this run generates answers within its steps, which need exact products; remove it")
    if not float8_is_installed():
        raise UserError(f"{key} needs torchao: pip install torchao, or remove it")


def float8_is_installed() -> bool:
    return importlib.util.find_spec("torchao") is not None


def _check_optimizer(name: str) -> None:
    """Refuse an optimizer whose package is not installed."""
    module, package = OPTIMIZER_PACKAGES.get(name, ("", ""))
    if not module and any(part in name for part in OF_BITSANDBYTES):
        module, package = "bitsandbytes", "'hfstrat[quantization]'"
    if module and importlib.util.find_spec(module) is None:
        raise UserError(f"training.optim: {name} needs {module}: pip install {package}")


def _check_extra(training: Training) -> None:
    known = training_argument_names()
    for key in training.extra:
        place = f"training.extra.{key}"
        if key in type(training).model_fields or key in ("seed", "output_dir"):
            setting = key if key in Recipe.model_fields else f"training.{key}"
            raise UserError(f"{place}: this is a key of the recipe itself; set {setting}")
        if key in DECIDED:
            raise UserError(f"{place}: hfstrat sets this itself to keep its guarantees; {DECIDED[key]}")
        if known and key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{place}: not a field of TrainingArguments of the installed transformers{hint}")
