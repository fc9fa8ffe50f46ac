"""Several runs in one group of processes: starting a group takes many seconds, a tiny run two.

`python -m torch.distributed.run --nproc_per_node 2 -m helpers.distributed_worker SPEC.json`. SPEC is a list of
`{name, recipe, overrides, stop_at, notes_rows}`; beside it, NAME.json says how each ended on the first process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(spec: Path) -> None:
    from helpers import fsdp_on_cpu
    from hfstrat.tasks import verify
    from hfstrat.trainer import distributed

    fsdp_on_cpu.install()
    fsdp_on_cpu.without_spinning()
    verify.verify = reload_here
    distributed.leave_world = stay
    shares = count_shares()
    for asked in json.loads(spec.read_text()):
        shares.clear()
        told = one(asked)
        (spec.parent / f"{asked['name']}.share{os.environ['RANK']}").write_text(str(len(shares)))
        if os.environ["RANK"] == "0":
            (spec.parent / f"{asked['name']}.json").write_text(json.dumps(told, default=str))
        leave()


def one(asked: dict[str, Any]) -> dict[str, Any]:
    from hfstrat import errors
    from hfstrat.recipe.load import load_recipe
    from hfstrat.run import train
    from hfstrat.trainer.trainer import StrategyTrainer

    original, rows = StrategyTrainer.training_step, list[list[list[int]]]()

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == asked.get("stop_at"):
            raise KeyboardInterrupt
        if "notes_rows" in asked:
            masks = inputs["attention_mask"].bool()
            rows.append([ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)])
        return original(self, model, inputs, *args, **kwargs)

    if "stop_at" in asked or "notes_rows" in asked:  # else a subclass keeps the training step of its own base class
        StrategyTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        report = train.run(load_recipe(asked["recipe"], asked["overrides"]))
        return {"status": "done", "result": report.finished.model_dump(mode="json")} if report else {}
    except BaseException as error:
        named = errors.named(error)
        if named.code == errors.CRASH:
            import traceback

            traceback.print_exc()
        return {"status": errors.NAMES[named.code], "sentence": str(named)}
    finally:
        if "notes_rows" in asked:
            Path(f"{asked['notes_rows']}{os.environ['RANK']}").write_text(json.dumps(rows))
        if "training_step" in vars(StrategyTrainer):
            del StrategyTrainer.training_step  # type: ignore[misc]


def count_shares() -> list[Any]:
    """The batches of cached work that this process computes."""
    from hfstrat.trainer.collective import ProcessGroup

    original, found = ProcessGroup.each, list[Any]()

    def each(self: Any, items: Any, compute: Any, for_all: bool = False) -> Any:
        return original(self, items, lambda item: (found.append(None), compute(item))[1], for_all)

    ProcessGroup.each = each  # type: ignore[method-assign]
    return found


def stay() -> None:
    """Do not leave: the next run uses the same process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    import gc

    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from hfstrat.trainer import heartbeat

    heartbeat.end()
    AcceleratorState._reset_state(not dist.is_initialized())
    GradientState._reset_state()
    if not dist.is_initialized():
        PartialState._reset_state()
    gc.collect()


def reload_here(folder: Path, probe: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Verify by reloading, without the ten seconds of a fresh process."""
    import torch

    from hfstrat.tasks.artifact import load_artifact
    from hfstrat.tasks.verify import probe_logits

    model = load_artifact(str(folder), getattr(torch, probe["dtype"]), options)
    said = probe_logits(model, probe["inputs"])
    return {
        "bit_equal": bool(torch.equal(said, probe["logits"])),
        "max_difference": float((said - probe["logits"]).abs().max()),
        "max_logit": float(said.abs().max()),
        "top1_agreement": float((said.argmax(-1) == probe["logits"].argmax(-1)).float().mean()),
        "loaded_with": type(model).__name__,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
