"""The checkpoint that a run resumes from, and remarks about it: skipped checkpoints, changed settings, length, processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.data import cache
from hfstrat.errors import UserError
from hfstrat.models.fingerprint import model_fingerprint
from hfstrat.trainer import checkpoints
from hfstrat.trainer.plan import ENDLESS

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.plan import Plan

SAMPLES, SAMPLE = 256, 1 << 14  # pieces of a file that are hashed, and their bytes
ENDINGS = ("safetensors", "bin", "gguf")
PREPARED = ("rows", "tokenizer", "answers", "given")  # kinds of cache entries that the fingerprint of the data covers


def what_to_resume(recipe: Recipe, overwrite: bool, processes: int) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The checkpoint to resume from, the content of its marker, and remarks to print.

    Raises:
        UserError: it was made by another recipe, is not complete, or is not seen by all processes.
    """
    if overwrite:
        return None, {}, []
    folder = Path(recipe.output_dir).expanduser()
    checkpoint, remarks = checkpoints.find_resume(folder, recipe.training.resume_from_checkpoint, recipe.model_dump())
    if processes > 1:
        _check_agreed(checkpoint)
    stored = checkpoints.state_of(checkpoint) if checkpoint else {}
    _check_models(recipe, checkpoint, stored.get("models", {}))
    if stored and stored.get("processes", 1) != processes:
        remarks.append(
            f"this run started with {stored.get('processes')} processes and resumes with {processes}: the same batches in the "
            "same order, but other random numbers where there is dropout"
        )
    return checkpoint, stored, remarks


def models_in_use(recipe: Recipe) -> dict[str, str]:
    """Hashes of the initial weights of the run and of a teacher, by the key in the recipe."""
    found = {key: weights_seen(one.name_or_path, getattr(one, "revision", None)) for key, one in _models(recipe).items()}
    return {key: seen for key, seen in found.items() if seen} | recipe.objective.code()


def _models(recipe: Recipe) -> dict[str, Any]:
    """The sections of the models that the run reads, by their keys."""
    return {"model": recipe.model, **recipe.strategy.models}


def _check_models(recipe: Recipe, checkpoint: Path | None, before: dict[str, str]) -> None:
    now = models_in_use(recipe) if before else {}
    for key in sorted(before.keys() & now.keys()):
        if before[key] != now[key] and key.endswith(".py"):
            raise UserError(
                f"objective.rewards: {key} has changed since {checkpoint}; restore it, or start afresh with --overwrite or "
                "another output_dir"
            )
        if before[key] != now[key]:
            name = _models(recipe)[key].name_or_path
            raise UserError(
                f"{key}: the weights of {name} are not those with which {checkpoint} was trained; "
                "restore them, or start afresh with --overwrite or another output_dir"
            )


def weights_seen(name_or_path: str, revision: str | None = None) -> str | None:
    """A hash over the sizes and SAMPLES pieces of a local model's weight files, the commit of a cached Hub model, or None.

    Pieces are fast to read and suffice, since other weights differ everywhere.
    """
    path = Path(name_or_path).expanduser()
    if not name_or_path or not path.exists():
        return model_fingerprint(name_or_path, revision)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else [each for end in ENDINGS for each in sorted(path.glob(f"*.{end}"))]:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.open("rb") as stream:
            for number in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE) * number // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()


def _check_agreed(checkpoint: Path | None) -> None:
    from accelerate.utils import gather_object

    seen = gather_object([str(checkpoint)])
    if len(set(seen)) > 1:
        other = next(place for place in seen if place != seen[0])
        raise UserError(
            f"output_dir: the first process would resume from {seen[0]}, and another from {other}: it must be on a file "
            "system that all machines share"
        )


def length_remarks(
    recipe: Recipe, checkpoint: Path | None, stored: dict[str, Any], plan: Plan, args: TrainingArguments
) -> list[str]:
    """Remarks on the schedule if the length of the run changed. Raises UserError if the checkpoint is beyond the end."""
    if checkpoint is None or stored.get("steps", plan.steps) == plan.steps:
        return []
    at, before = checkpoints.step_of(checkpoint), int(stored["steps"])
    if at > plan.steps:
        raise UserError(
            f"training.num_train_epochs or max_steps: {plan.steps:,} steps in total, but {checkpoint} is at step {at:,}; "
            "give more, or name an earlier checkpoint in training.resume_from_checkpoint"
        )
    if ENDLESS in (before, plan.steps) or plan.time_limit:
        return ["the schedule follows the new length from here on"]
    old, new = (_rate(recipe, args, steps, at) for steps in (before, plan.steps))
    return [
        f"{plan.steps:,} steps instead of {before:,}: the {recipe.training.lr_scheduler_type} schedule is stretched over them, "
        f"so the learning rate continues with {new:.3g} at step {at:,}, where it was {old:.3g}"
    ]


def _rate(recipe: Recipe, args: TrainingArguments, steps: int, at: int) -> float:
    """The learning rate at step `at` of a run of `steps` steps."""
    import torch
    from transformers.optimization import get_scheduler

    rate = args.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    extra: Any = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
    shape: Any = get_scheduler(recipe.training.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, **extra)
    return float(rate * shape.lr_lambdas[0](at))


def caches_in_use() -> list[str]:
    """The names of the cache entries that this run uses, without prepared data."""
    return sorted(name for name in cache.names_in_use() if name.rsplit("-", 1)[0] not in PREPARED)


def cache_remarks(checkpoint: Path | None, stored: dict[str, Any]) -> list[str]:
    """A remark, if the run now uses other cache entries than before the checkpoint."""
    before, now = set(stored.get("caches", caches_in_use())), set(caches_in_use())
    if checkpoint is None or before == now:
        return []
    old, new = (", ".join(sorted(names)) or "nothing" for names in (before - now, now - before))
    return [
        f"cache: {old} until {checkpoint.name}, {new} from here on (other libraries, threads, batch sizes or "
        "evaluation rows); its last bits may differ"
    ]
