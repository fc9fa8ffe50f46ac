"""From a recipe to a job that is ready to train: data, plan, model. Nothing is written before all of them stand."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from hfstrat import strategies
from hfstrat.data.collate import TokenCollator
from hfstrat.data.corpus import held_out
from hfstrat.data.prepare import PreparedData
from hfstrat.errors import UserError
from hfstrat.models import blocks, load
from hfstrat.models.load import Base
from hfstrat.models.loss_kernels import choose_for, in_use
from hfstrat.recipe.load import Loaded
from hfstrat.recipe.schema import Recipe
from hfstrat.run import output_dir, resume
from hfstrat.strategies.base import Strategy
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer import arguments, autobatch, batching, callbacks, sharded, trackers
from hfstrat.trainer import progress as trainer_progress
from hfstrat.trainer.baselines import Baselines
from hfstrat.trainer.callbacks import Clock, OverfittingAlarm, Patience
from hfstrat.trainer.collective import ProcessGroup
from hfstrat.trainer.distributed import is_sharded, wrapping
from hfstrat.trainer.plan import ENDLESS, Plan, make_plan
from hfstrat.trainer.train_data import TrainData
from hfstrat.trainer.trainer import StrategyTrainer


@dataclass
class Job:
    """What a run is made of once everything that can be refused has been."""

    loaded: Loaded
    strategy: Strategy[Any]
    screen: Console
    data: PreparedData
    plan: Plan
    base: Base
    trainer: StrategyTrainer
    progress: trainer_progress.ProgressReport
    compute_dtype: torch.dtype
    checkpoint: Path | None
    lock: IO[str] | None  # held until the process ends
    feed: TrainData
    probe: dict[str, Any]  # inputs for comparing models
    baselines: Baselines | None = None  # to beat
    outline: nn.Module | None = None  # of a model that is trained in pieces
    setup_seconds: float = 0.0  # until training: loading, and what is computed once
    untrained: torch.Tensor | None = None  # what the model said to the probe before training

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir).expanduser()

    def release(self) -> None:
        """Give back the memory of model and optimiser: they sit in reference cycles and in the allocator's cache."""
        self.trainer.accelerator.free_memory()
        del self.trainer, self.base, self.feed  # the feed holds what is bound to the model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def prompts(self) -> list[Any]:
        wanted = self.recipe.evaluation
        return wanted.prompts or [sample["prompt"] for sample in self.data.samples[: wanted.samples]]


def set_up(loaded: Loaded, world: Any, overwrite: bool) -> Job:
    """Load everything, decide every number, and claim the output folder last.

    Raises:
        UserError: whatever can be known to be wrong before training.
    """
    recipe, task = loaded.recipe, TASKS[loaded.recipe.task]
    strategy = strategies.build(recipe.strategy)
    logging.disable_progress_bar()  # ours is the only one
    screen = trainer_progress.make_console(world.is_main_process)
    strategy.check_wrapping(wrapping())
    checkpoint, stored, remarks = resume.what_to_resume(recipe, overwrite, world.num_processes)
    tokenizer = strategy.load_tokenizer(recipe)
    data = read_data(recipe, strategy, tokenizer, screen, checkpoint, stored)
    plan = make_plan(recipe.training, data.lengths, data.eval_lengths, world.num_processes, stored)
    dtype = load.compute_dtype(recipe.model.dtype)
    # the arguments come before the model: they start the process group, and ZeRO-3 shards while loading
    before, quality = recipe.evaluation.before and checkpoint is None, task.quality
    args = arguments.training_arguments(recipe, plan, dtype, before, quality.metric, quality.higher_is_better)
    remarks += resume.length_remarks(recipe, checkpoint, stored, plan, args)

    sharded.load_whole()
    set_seed(recipe.seed)  # the same fresh weights on every process, and again after a resume
    base = strategy.load_base(recipe, tokenizer, data)
    load.check_context(base.model, int(max(data.lengths.max(), data.eval_lengths.max())))
    task.own_the_loss(base)  # before anything wraps the model
    collate = task.collator(base, data, tokenizer, batching.multiple_for(args.device))
    feed = TrainData(
        data.train, data.eval, collate, plan, dtype, args.device, world.num_processes, screen, group=ProcessGroup.current()
    )
    feed, probe = strategy.prepare_base(base, feed), task.probe(data, collate)
    trained = strategy.build_model(base)
    load.set_precision(trained, dtype)
    batches = decide_batches(recipe, strategy, base, trained, feed, data, args, stored)
    plan, baselines = batches.plan, strategy.baselines(data, batches.plan, base.model)
    said = (*data.lines(), *base.remarks, *remarks, *plan_lines(recipe, plan, trained, dtype, args))
    for line in (*said, f"{'batches':<9} {batches.line}", *(baselines.lines() if baselines else [])):
        screen.print(line)

    feed = strategy.prepare_data(replace(feed, train=batches.rows, collate=batches.collate, plan=plan), trained)
    for line in resume.cache_remarks(checkpoint, stored):
        screen.print(line)
    lock = output_dir.claim(recipe, overwrite) if world.is_main_process else None
    world.wait_for_everyone()
    progress = trainer_progress.ProgressReport(screen, batches.order, plan.time_limit, task.said)
    trainer = build_trainer(recipe, strategy, trained, tokenizer, args, feed, data, batches.sampler, progress)
    trainer.checkpoint, progress.trainer_counts = checkpoint, trainer.counts_tokens
    job = Job(loaded, strategy, screen, data, plan, base, trainer, progress, dtype, checkpoint, lock, feed, probe, baselines)
    job.outline = sharded.outline(trained)
    return job


def read_data(
    recipe: Recipe,
    strategy: Strategy[Any],
    tokenizer: Any,
    screen: Console,
    checkpoint: Path | None,
    stored: dict[str, Any],
) -> PreparedData:
    """The rows of the run.

    Raises:
        UserError: they cannot be read, or are not those that the checkpoint was made with.
    """
    task, wanted = TASKS[recipe.task], recipe.evaluation
    data = task.prepare(
        recipe.data, tokenizer, recipe.seed, wanted.rows_to_answer, wanted.max_rows, held_out(recipe, task.reader)
    )
    data = strategy.rewrite(data, recipe, tokenizer, screen)
    if stored.get("data", data.fingerprint()) != data.fingerprint():
        raise UserError(
            f"data.train: the training rows are not those that {checkpoint} was made with; restore them, or start afresh with "
            "--overwrite or another output_dir"
        )
    return data


def decide_batches(
    recipe: Recipe,
    strategy: Strategy[Any],
    base: Base,
    trained: Any,
    feed: TrainData,
    data: PreparedData,
    args: TrainingArguments,
    stored: dict[str, Any],
) -> batching.Batches:
    """How large, how wide and whether packed, from the memory at hand; `args` are brought into line."""
    if recipe.training.torch_compile:
        base.say(blocks.compile_blocks(base.model))
    if recipe.model.gguf_file:
        base.say("the base is a GGUF file: plain peft finds an adapter's base only as a folder (hfstrat merge makes one)")
    plan, task = feed.plan, TASKS[recipe.task]
    if is_sharded():
        sharded.remark(base)
    elif args.device.type == "cuda":
        trained.to(args.device)
        shape, before = (plan.rows_at_once, int(data.lengths.max())), stored.get("head_kernel")
        choose_for(base, shape, feed.dtype, args.device, before, plan.processes)
        if not stored and isinstance(feed.collate, TokenCollator):  # else rows are features already
            plan = autobatch.fit_to_memory(
                recipe.training, plan, trained, base, feed.collate, data, feed.dtype, task.loss, task.worst_row
            )
    others = strategy.asked(base)
    blocks.checkpoint_activations(base.model, plan.checkpointing)
    if args.device.type == "cuda" and recipe.training.packing != "off" and not is_sharded():
        can_pack = isinstance(feed.collate, TokenCollator) and feed.collate.selects_rows
        for one in [base.model, *(others if can_pack else [])]:
            one.to(args.device)  # packing is shown where it will run
    batches = batching.make_batches(recipe, plan, feed.train, data.lengths, base, others, feed.collate, args.device, feed.dtype)
    args.per_device_train_batch_size = batches.plan.rows_at_once
    args.gradient_accumulation_steps = batches.plan.accumulation
    args.per_device_eval_batch_size = batches.plan.eval_batch
    return batches


def build_trainer(
    recipe: Recipe,
    strategy: Strategy[Any],
    trained: Any,
    tokenizer: Any,
    args: TrainingArguments,
    feed: TrainData,
    data: PreparedData,
    sampler: Any,
    progress: trainer_progress.ProgressReport,
) -> StrategyTrainer:
    plan, screen, task = feed.plan, progress.console, TASKS[recipe.task]
    return strategy.build_trainer(
        model=trained,
        args=args,
        train_dataset=feed.train,
        eval_dataset=feed.eval,
        data_collator=feed.collate,
        processing_class=tokenizer,
        callbacks=[progress, OverfittingAlarm(screen), *early_stopping(recipe), *trackers_of(recipe, screen)],
        sampler=sampler,
        loss=task.loss,
        sums=task.sums,
        measure=partial(task.measure, names=data.label_names),
        clock=Clock(plan.time_limit, plan.eval_share) if plan.time_limit else None,
        keep=recipe.training.save_total_limit,
        say=screen.print,
        state={
            "recipe": recipe.model_dump(),
            "micro_batch": plan.micro_batch,
            "eval_batch": plan.eval_batch,
            "packed": plan.bins is not None,
            "checkpointing": plan.checkpointing,
            "processes": plan.processes,
            "steps": plan.steps,
            "caches": resume.caches_in_use(),
            "data": data.fingerprint(),
            "head_kernel": in_use(trained),
            "models": resume.models_in_use(recipe),
        },
    )


def early_stopping(recipe: Recipe) -> list[Any]:
    patience = recipe.training.early_stopping_patience
    return [Patience(patience)] if patience else []


def trackers_of(recipe: Recipe, screen: Console) -> list[Any]:
    names = recipe.training.report_to
    trackers.ready(names)
    return callbacks.tracker_callbacks(names, lambda line: screen.print(line, markup=False))


def plan_lines(recipe: Recipe, plan: Plan, trained: Any, dtype: torch.dtype, args: TrainingArguments) -> list[str]:
    """What will run, in words."""
    learning, total = load.count_parameters(trained)
    length = f"{plan.steps:,} steps" if plan.steps < ENDLESS else f"{plan.time_limit:.0f} s"
    if plan.time_limit and plan.steps < ENDLESS:
        length += f" or {plan.time_limit:.0f} s"
    passes = f"{plan.accumulation} x {plan.rows_at_once}{' packed rows' if plan.bins else ''}"
    epochs = f" = {plan.epochs:.2f} epochs" if plan.steps < ENDLESS else ""
    recomputed = ", activations recomputed in the backward pass" if plan.checkpointing else ""
    return [
        f"{'strategy':<9} {recipe.strategy.name}: {learning:,} of {total:,} parameters learn ({learning / total:.2%}), "
        f"forward in {str(dtype).removeprefix('torch.')}{recomputed}",
        f"{'plan':<9} {length}{epochs} of {plan.global_batch_size} sequences = {plan.processes} process(es) x "
        f"{passes}, learning rate {recipe.training.learning_rate:g}, on {args.device}",
    ]
