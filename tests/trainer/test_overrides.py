"""Private members of Trainer: all that are used are listed with a reason, with the signatures of the tested version."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

import hfstrat
from hfstrat.trainer import trainer


def cases() -> list[tuple[Any, str, trainer.Member]]:
    from trl import DistillationTrainer, GRPOTrainer

    named = [(Trainer, "transformers", member) for member in trainer.PRIVATE_OF_TRAINER]
    distillation = [(DistillationTrainer, "trl", member) for member in trainer.PRIVATE_OF_DISTILLATION_TRAINER]
    return [*named, *distillation, *((GRPOTrainer, "trl", member) for member in trainer.PRIVATE_OF_GRPO_TRAINER)]


@pytest.mark.parametrize(("owner", "library", "member"), cases(), ids=lambda value: getattr(value, "name", None))
def test_signatures(owner: Any, library: str, member: trainer.Member) -> None:
    where = f"{owner.__name__}.{member.name} of {library} {version(library)}"
    written = f"hfstrat was written for {library} {trainer.TESTED[library]} (hfstrat/trainer/trainer.py)"
    method = getattr(owner, member.name, None)
    assert method is not None, f"{where} does not exist any more; {written}. It is used because: {member.why}"
    found = ", ".join(list(inspect.signature(method).parameters)[1:])
    assert found == member.parameters, f"{where} takes ({found}), expected ({member.parameters}); {written}"


def test_attributes() -> None:
    text = inspect.getsource(Trainer)
    for name in trainer.PRIVATE_ATTRIBUTES:
        assert f"self.{name} =" in text, f"Trainer of transformers {version('transformers')} has no attribute {name}"


def test_every_private_member_in_use_is_listed() -> None:
    """Found by name in the code: methods that we define or call, and that Trainer has too."""
    from trl import DistillationTrainer, GRPOTrainer

    listed = {member.name for member in (*trainer.PRIVATE_OF_TRAINER, *trainer.PRIVATE_OF_GRPO_TRAINER)}
    used, own = set[str](), set(vars(object))
    for file in Path(hfstrat.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "Trainer" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute | ast.FunctionDef):
                name = node.attr if isinstance(node, ast.Attribute) else node.name
                if name.startswith("_") and name not in own and not name.startswith("__"):
                    used |= {name} if any(hasattr(one, name) for one in (Trainer, DistillationTrainer, GRPOTrainer)) else set()
    assert used == listed, f"not listed: {sorted(used - listed)}; listed, and not in use: {sorted(listed - used)}"
