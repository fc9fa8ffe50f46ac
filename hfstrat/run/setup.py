"""From a recipe to a job that is ready to train: data, plan, model. Nothing is written before all of them are complete."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from hfstrat import strategies
from hfstrat.data.prepare import PreparedData as Data
from hfstrat.errors import UserError
from hfstrat.evaluation.simple_models import SimpleModel
from hfstrat.models import batch_norm, blocks, float8, load
from hfstrat.models.load import Base
from hfstrat.models.loss_kernels import choose_for, kernel_name
from hfstrat.objectives import Objective, objective_of, task_of
from hfstrat.recipe.format import plural
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.schema import Recipe
from hfstrat.run import head_rate, held_out, output_dir, resume, simple_models
from hfstrat.run.first_forward import first_forward
from hfstrat.strategies.base import Built, Prepared, Strategy
from hfstrat.tasks.base import Task
from hfstrat.trainer import autobatch, callbacks, checkpoints, muon, sharded
from hfstrat.trainer import progress as trainer_progress
from hfstrat.trainer.baselines import Baselines
from hfstrat.trainer.callbacks import Clock, OverfittingAlarm, Patience, StreamPosition
from hfstrat.trainer.collective import ProcessGroup
from hfstrat.trainer.distributed import is_sharded
from hfstrat.trainer.plan import ENDLESS, Plan, make_plan, training_arguments
from hfstrat.trainer.streamed import STREAM
from hfstrat.trainer.train_data import Batches, TrainData, make_batches, multiple_for, stream_batches
from hfstrat.trainer.trainer import StrategyTrainer


@dataclass
class Job:
    """The parts of a run that has passed all checks."""

    loaded: Loaded
    strategy: Strategy[Any]
    objective: Objective
    data: Data
    plan: Plan
    base: Base
    trainer: StrategyTrainer
    progress: trainer_progress.ProgressReport
    compute_dtype: torch.dtype
    checkpoint: Path | None
    lock: IO[str] | None  # of the output folder, until it is closed
    train_data: TrainData
    probe: dict[str, Any]  # inputs for comparing models
    baselines: Baselines | None = None  # losses to beat
    simple_models: list[SimpleModel] = field(default_factory=list)  # baselines of a task with a head
    outline: nn.Module | None = None  # of a sharded model
    held_out: Any = None  # training examples on which thresholds are chosen
    setup_seconds: float = 0.0  # before training: loading, and cached computations
    untrained: torch.Tensor | None = None  # logits of the probe before training
    parameters: tuple[int, int] = (0, 0)  # trainable and all, once training has ended
    published: Any = None  # the trained model as it is saved, once training has ended
    known_sums: Path | None = None  # of the evaluation examples, for the weights that the run starts from: `measure.keep_sums`
    ended_in: Path | None = None  # the checkpoint with the weights of the last step, once training has ended

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def task(self) -> Task:
        return self.objective.task

    @property
    def screen(self) -> Console:
        return self.progress.console

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir).expanduser()

    @property
    def prompts(self) -> list[Any]:
        wanted = self.recipe.evaluation
        return wanted.prompts or [sample["prompt"] for sample in self.data.samples[: wanted.samples]]

    def release(self) -> None:
        """Free the memory of model and optimizer, which reference cycles and the allocator's cache hold."""
        self.trainer.accelerator.free_memory()
        del self.trainer, self.base, self.train_data, self.published  # the data refer to what is bound to the model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def set_up(loaded: Loaded, world: Any, overwrite: bool) -> Job:
    """Load everything, decide every number, and claim the output folder last. Raises UserError before anything is written."""
    recipe, objective = loaded.recipe, objective_of(loaded.recipe)
    strategy, task = strategies.build(recipe.strategy), objective.task
    logging.disable_progress_bar()  # ours is the only one
    screen = trainer_progress.make_console(world.is_main_process)
    checkpoint, stored, remarks = resume.what_to_resume(recipe, overwrite, world.num_processes)

    tokenizer, data = strategy.read(recipe, screen)
    data, rows_held_out = held_out.hold_out(recipe, strategy, data)
    check_same_data(data, checkpoint, stored)
    task.metrics.for_data(data).for_training(recipe, data)  # refuses weights of other classes
    plan = plan_of(recipe, data, world.num_processes, stored)
    dtype = load.compute_dtype(recipe.model.dtype)
    # the arguments come before the model: they start the process group, and ZeRO-3 shards while loading
    before, quality = recipe.evaluation.eval_on_start and checkpoint is None, task.metrics.quality
    args = training_arguments(recipe, plan, dtype, before, quality.metric, quality.higher_is_better)
    if rows_held_out is not None:
        remarks.append(f"{'labels':<9} {len(rows_held_out):,} training rows are held out to choose the threshold of each label")
    remarks += resume.length_remarks(recipe, checkpoint, stored, plan, args)

    base, built, probe, simple = build_model(recipe, strategy, tokenizer, data, plan, args, screen)
    batches = decide_batches(recipe, base, built, data, args, stored)
    untrained = None if is_sharded() else first_forward(built.model, base, probe, dtype)
    plan, baselines = batches.plan, baselines_of(recipe, data, batches.plan, base.model)
    lines = [*data.lines(), *base.remarks, *remarks, *plan_lines(recipe, plan, built.model, dtype, args, base)]
    for line in (*lines, f"{'batches':<9} {batches.line}", *(baselines.lines() if baselines else [])):
        screen.print(line)

    is_solved = getattr(built.model, "is_solved", False)
    for line in head_rate.remarks(recipe, base, plan) if not is_solved else []:
        screen.print(line)
    products = float8.layers_of(built.model, args.device) if recipe.training.float8 else None
    if products is not None:
        screen.print(f"{'float8':<9} training steps compute {plural(len(products.places), 'linear layer')} in 8 bits")
    rows = replace(built.data, train=batches.rows, collate=batches.collate, plan=plan)
    prepared = head_rate.with_head_rate(recipe, base, strategy.prepare(built.model, rows))
    prepared.data, data = objective.prepare(recipe, built.model, prepared.data, data)
    prepared.trainer_class = prepared.trainer_class or objective.trainer_class
    for line in (*resume.cache_remarks(checkpoint, stored), *([simple_models.line(simple, task)] if simple else [])):
        screen.print(line)
    if recipe.training.optim == muon.NAME and not is_solved:
        muon.check(built.model)
    lock = output_dir.claim(recipe, overwrite) if world.is_main_process else None
    with output_dir.unlocked_on_error(lock):
        world.wait_for_everyone()
        progress = trainer_progress.ProgressReport(screen, batches.order, plan.time_limit, task.text.metrics)
        trainer = build_trainer(recipe, built.model, tokenizer, args, prepared, data, batches.sampler, progress, checkpoint)
        trainer.checkpoint, progress.trainer_counts = checkpoint, trainer.counts_tokens
        if products is not None:
            trainer.products = products
        if data.stream is not None:
            trainer.add_callback(StreamPosition(batches.rows, trainer.marker_state))
        outline, rows = sharded.outline(built.model), prepared.data
    return Job(
        loaded,
        strategy,
        objective,
        data,
        plan,
        base,
        trainer,
        progress,
        dtype,
        checkpoint,
        lock,
        rows,
        probe,
        baselines,
        simple,
        outline,
        untrained=untrained,
        held_out=rows_held_out,
    )


def plan_of(recipe: Recipe, data: Data, processes: int, stored: dict[str, Any] | None = None) -> Plan:
    """The numbers of the run."""
    rows, training = task_of(recipe).rows, recipe.training
    plan = make_plan(training, *rows.sizes(data), processes, stored, recipe.seed)
    if data.stream is not None:
        plan = replace(plan, rows=0)
    if not rows.answered_at_once or training.per_device_eval_batch_size != "auto":
        return plan
    return replace(plan, eval_batch=(stored or {}).get("eval_batch") or rows.answered_at_once)


def build_model(
    recipe: Recipe, strategy: Strategy[Any], tokenizer: Any, data: Data, plan: Plan, args: TrainingArguments, screen: Console
) -> tuple[Base, Built, dict[str, Any], list[SimpleModel]]:
    """The base model, the model to train with its data, the inputs on which the saved result is compared with it, and the
    baselines of a task with a head."""
    task, dtype = task_of(recipe), load.compute_dtype(recipe.model.dtype)
    sharded.disable_sharded_loading()
    set_seed(recipe.seed)  # the same random weights on every process, and again after a resume
    base = strategy.load(recipe, tokenizer, data)
    load.check_context(base.model, task.rows.longest(data), answers=task.rows.answer_tokens)
    task.model.bind_loss(base)  # before anything wraps the model

    if is_sharded():
        task.rows.check_sharded(data)
    collate = task.rows.collator(base, data, tokenizer, multiple_for(args.device))
    group, probe = ProcessGroup.current(), task.rows.probe(data, collate)
    rows = TrainData(data.train, data.eval, collate, plan, dtype, args.device, screen, group=group)
    if (undo := task.model.fit_output(base, data, collate)) is not None:
        rows = rows.with_undo(undo)
    simple = simple_models.measure(recipe, strategy, base, rows, data)  # before the body changes
    built = strategy.build(base, rows)
    load.set_precision(built.model, dtype)
    blocks.keep_statistics(built.model)
    undo_hooks = batch_norm.contiguous_gradients(built.model)
    return base, built._replace(data=built.data.with_undo(undo_hooks)), probe, simple


def check_same_data(data: Data, checkpoint: Path | None, stored: dict[str, Any]) -> None:
    """Refuse training examples that are not those of the checkpoint. Raises UserError."""
    if stored.get("data", data.fingerprint()) != data.fingerprint():
        raise UserError(
            f"data.train: the training data differ from those of {checkpoint}; restore them, or start again with --overwrite "
            "or another output_dir"
        )


def baselines_of(recipe: Recipe, data: Data, plan: Plan, model: nn.Module) -> Baselines | None:
    """The losses that a language model with random weights has to beat; None for pretrained weights and other tasks."""
    from hfstrat.trainer import baselines

    return None if recipe.strategy.needs_weights or data.label_names else baselines.measure(data, plan, model)


def decide_batches(
    recipe: Recipe, base: Base, built: Built, data: Data, args: TrainingArguments, stored: dict[str, Any]
) -> Batches:
    """The sizes and widths of batches and whether they are packed, from the memory at hand; `args` are updated."""
    if recipe.training.torch_compile:
        base.say(blocks.compile_blocks(base.model))
    if recipe.model.gguf_file:
        base.say(
            "the base model is a GGUF file, but PEFT loads the base of an adapter from a folder (`hfstrat merge` creates one)"
        )
    rows, task, device, on_gpu = built.data, task_of(recipe), args.device, args.device.type == "cuda"
    if is_sharded():
        sharded.add_remark(base)
    elif on_gpu:
        built.model.to(device)
        shape, before = (rows.plan.micro_batch, int(data.lengths.max())), stored.get("head_kernel")
        choose_for(base, shape, rows.dtype, device, before, rows.plan.processes)
        if not stored and rows.collate.sizes_batches:
            loss = task.metrics.for_data(data).loss
            plan = autobatch.fit_to_memory(recipe.training, rows, built.model, base, data, loss, task.rows.worst_row)
            rows = replace(rows, plan=plan)
    blocks.checkpoint_activations(base.model, rows.plan.checkpointing)
    if on_gpu and recipe.training.packing is not False and not is_sharded():
        for model in [base.model, *(built.others if rows.collate.selects_rows else [])]:
            model.to(device)  # packing is checked on the device of the run
    if data.stream is not None:
        batches = stream_batches(rows, data.stream, stored.get(STREAM))
    else:
        batches = make_batches(recipe, rows, data.lengths, base, built.others)
    if batches.plan.bins is None:
        why = "as transformers chooses" if recipe.model.attn_implementation == "auto" else "as model.attn_implementation says"
        used = str(base.model.config._attn_implementation)
        batches.plan = replace(batches.plan, attention=used, attention_because=why)
    if on_gpu or batches.plan.bins:
        base.say(f"attention: {batches.plan.attention}, {batches.plan.attention_because}")
    args.per_device_train_batch_size = batches.plan.rows_at_once
    args.gradient_accumulation_steps = batches.plan.accumulation
    args.per_device_eval_batch_size = batches.plan.eval_batch
    return batches


def build_trainer(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    args: TrainingArguments,
    prepared: Prepared,
    data: Data,
    sampler: Any,
    progress: trainer_progress.ProgressReport,
    checkpoint: Path | None,
) -> StrategyTrainer:
    """The Trainer of the run, with what the strategy adds to it."""
    rows, screen, plan, options = prepared.data, progress.console, prepared.data.plan, recipe.training
    patience = [Patience(options.early_stopping_patience)] if options.early_stopping_patience else []
    metrics = task_of(recipe).metrics.for_data(data).for_training(recipe, data)
    trackers = callbacks.tracker_callbacks(options.report_to, lambda line: screen.print(line, markup=False))
    trainer_class = prepared.trainer_class or StrategyTrainer
    state = marker_state(recipe, plan, data, model)
    state["margins"] = margins = dict(checkpoints.state_of(checkpoint).get("margins", {})) if checkpoint else {}
    alarm = [OverfittingAlarm(screen, margins)] if metrics.can_overfit else []
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        data_collator=rows.collate,
        processing_class=tokenizer,
        callbacks=[progress, *alarm, *patience, *trackers, *prepared.callbacks],
        sampler=sampler,
        metrics=metrics,
        clock=Clock(plan.time_limit, plan.eval_share) if plan.time_limit else None,
        keep=options.save_total_limit,
        print_line=screen.print,
        state=state,
        **prepared.trainer_kwargs,
    )
    if options.optim == muon.NAME:
        trainer.optimizer_cls_and_kwargs = muon.factory(trainer)
    return trainer


def marker_state(recipe: Recipe, plan: Plan, data: Data, model: nn.Module) -> dict[str, Any]:
    """What checkpoints record, so that a resumed run makes the same choices."""
    return {
        "recipe": recipe.model_dump(),
        "micro_batch": plan.micro_batch,
        "eval_batch": plan.eval_batch,
        "bins_at_once": plan.bins_at_once,
        "dense": plan.dense,
        "packed": plan.bins is not None,
        "attention": plan.attention,
        "checkpointing": plan.checkpointing,
        "processes": plan.processes,
        "steps": plan.steps,
        "caches": resume.caches_in_use(),
        "data": data.fingerprint(),
        "head_kernel": kernel_name(model),
        "models": resume.models_in_use(recipe),
    }


def plan_lines(recipe: Recipe, plan: Plan, trained: Any, dtype: torch.dtype, args: TrainingArguments, base: Base) -> list[str]:
    """Lines that describe the model and the length of the run."""
    trainable, total = load.count_parameters(trained)
    limits = [plural(plan.steps, "step")] if plan.steps < ENDLESS else []
    limits += [f"{plan.time_limit:.0f} s"] if plan.time_limit else []
    noun = task_of(recipe).rows.noun
    at_once = plural(plan.rows_at_once, "packed row" if plan.bins else noun)
    passes = f"{plural(plan.processes, 'process', 'processes')} x {plural(plan.accumulation, 'pass', 'passes')} of {at_once}"
    tokens = recipe.training.global_batch_tokens
    batch = f"at most {tokens:,} tokens" if tokens else plural(plan.global_batch_size, noun)
    epochs = plan.times if plan.steps < ENDLESS else ""
    recomputed = ", activation checkpointing" if plan.checkpointing else ""
    described = (
        f"{'strategy':<9} {recipe.strategy.title}: {trainable:,} of {total:,} parameters are trainable "
        f"({trainable / total:.2%}), forward in {str(dtype).removeprefix('torch.')}{recomputed}"
    )
    if getattr(trained, "is_solved", False):
        return [described, f"{'plan':<9} the head is solved exactly in one step, on {args.device}"]
    return [
        described,
        f"{'plan':<9} {' or '.join(limits)}{epochs}; each step {batch}: {passes}; "
        f"learning rate {recipe.training.learning_rate:g}{head_rate.words(recipe, base)}; on {args.device}",
    ]
