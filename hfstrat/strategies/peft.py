"""Any adapter of PEFT by its type: built, checked and merged by PEFT from its own configuration class.

PEFT's configurations need torch, so `check` imports it: a value that PEFT refuses is reported before the data are read. What is
trained has no formula in common: PEFT builds the adapter on the meta device, around the model's class without weights, and the
parameters are counted there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line, quiet_libraries
from hfstrat.models.load import read_config
from hfstrat.models.parameter_names import CLASS_HEAD
from hfstrat.recipe import peft as section
from hfstrat.recipe import peft_source
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.adapters import Adapter, all_linear
from hfstrat.strategies.description import Description, Footprint
from hfstrat.tasks import TASKS
from hfstrat.tasks.base import Task
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, FSDP

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hfstrat.data.prepare import PreparedData as Data
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Model, Recipe

NOT_ON_META = ("ADAMSS", "FROD", "SHIRA")  # what is trained depends on the weights of the base, or PEFT reads them
ONLY_FLOAT32 = {  # types that need it, and why
    "OSF": "changes gradients in hooks that fail",
    **dict.fromkeys(("ADAMSS", "ADAPTION_PROMPT", "LN_TUNING"), "passes numbers of 32 bits on to layers that compute"),
    **dict.fromkeys(("FROD", "UNILORA"), "is not the same after loading"),  # as the verification of the result says
}


class Peft(Adapter[section.Peft]):
    """An adapter of any type that PEFT has."""

    def __init__(self, section: section.Peft) -> None:
        super().__init__(section)
        self._known: tuple[Recipe, int] | None = None  # what `describe` builds on the meta device

    # before torch is imported, but for PEFT's own check

    def check_task(self, task: Task) -> None:
        kind = self.section.peft_type
        if task.text.generates:
            return
        if self.section.virtual_tokens:
            raise UserError(
                f"strategy.peft_type: {kind} is for task: causal-lm: PEFT puts virtual tokens before those of the text, where "
                f"a head for {task.name} would read them; use an adapter in the layers, such as IA3, VERA or OFT"
            )
        if "modules_to_save" not in peft_source.fields(kind):
            raise UserError(
                f"strategy.peft_type: PEFT's {kind} has no modules_to_save, so a head for {task.name} could not be trained; "
                "use another type, or strategy lora"
            )

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        self._known = self._known or (recipe, 2)
        super().check(recipe, wrapping, network)
        kind = self.section.peft_type
        if wrapping in (DEEPSPEED, FSDP):
            raise UserError(
                "strategy.name: peft has not been tried where processes share the weights; use --accelerate-config ddp, or "
                "strategy lora"
            )
        if recipe.model.add_tokens:
            raise UserError(
                f"model.add_tokens: {kind} trains no embeddings of new tokens; use strategy lora, full or partial, which do"
            )
        if self.section.virtual_tokens:
            self._check_virtual_tokens(recipe)
        quiet_libraries()
        with refusals(self.section):
            self._config(recipe.task, [])
        if kind in ONLY_FLOAT32:
            from hfstrat.models.load import compute_dtype

            if (dtype := str(compute_dtype(recipe.model.dtype)).removeprefix("torch.")) != "float32":
                raise UserError(f"model.dtype: PEFT's {kind} {ONLY_FLOAT32[kind]} in {dtype}; set model.dtype: float32")

    def _check_virtual_tokens(self, recipe: Recipe) -> None:
        kind = self.section.peft_type
        if recipe.objective.name != "sft":
            raise UserError(
                f"objective: {recipe.objective.name} compares positions of answers, which the virtual tokens of {kind} move; "
                "use an adapter in the layers, such as IA3, VERA or OFT"
            )
        if recipe.training.packing is True or recipe.training.packing == "dense":
            raise UserError(
                f"training.packing: {kind} puts its virtual tokens before the first example of a row only; set false or auto"
            )
        if recipe.evaluation.lm_eval:
            raise UserError(f"evaluation.lm_eval: the harness would not see the virtual tokens of {kind}; remove it")
        if kind in section.CACHED and recipe.training.activation_checkpointing is True:
            raise UserError(
                f"training.activation_checkpointing: recomputed blocks would extend the cache that holds the prefix of {kind}; "
                "set false"
            )

    def model_of(self, recipe: Recipe) -> Model:
        """An adapter that cannot be merged is not published as one model with a pooling."""
        if self.section.peft_type not in section.UNMERGED:
            return recipe.model
        return recipe.model.model_copy(update={"pooling": None if TASKS[recipe.task].text.generates else "class"})

    def shapes(self, recipe: Recipe, labels: int = 2) -> tuple[Shapes, bool] | None:
        self._known = recipe, labels
        return None if self.section.peft_type in NOT_ON_META else super().shapes(recipe, labels)

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        if self._known is None:
            raise UserError(f"strategy.name: PEFT itself counts what {self.section.peft_type} trains, so it is not predicted")
        from hfstrat.models.load import count_parameters

        heads = frozenset(name for name in shapes if CLASS_HEAD.search(name)) if not self._generates else frozenset[str]()
        saved = self.section.options.get("modules_to_save") or []
        whole = frozenset(name for name in shapes if any(part in saved for part in name.split(".")))
        model = self._on_meta()
        return Description(
            Footprint(*count_parameters(model)),
            heads | whole,
            shapes,
            int(self.section.options.get("r") or 0),
            unquantized=whole,
            saves_model=False,
        )

    @property
    def _generates(self) -> bool:
        assert self._known is not None
        return TASKS[self._known[0].task].text.generates

    def _on_meta(self) -> nn.Module:
        """The model that would be trained, without weights."""
        import torch
        import transformers

        from hfstrat.models.blocks import head_modules
        from hfstrat.models.load import source_of
        from hfstrat.tasks.loading import class_of

        assert self._known is not None
        recipe, labels = self._known
        task, model = TASKS[recipe.task], self.model_of(recipe)
        source, options = source_of(model)
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if not task.text.generates:
            config.num_labels = labels
        kind = class_of(task, config, task.model.pooling(model, config.to_dict())[0])
        with torch.device("meta"):
            base = (kind.from_config if hasattr(kind, "from_config") else kind._from_config)(config)
        with refusals(self.section):
            return self._wrapped(base, recipe.task, [] if task.text.generates else head_modules(base))

    # the run

    def read(self, recipe: Recipe, screen: Console | None = None) -> tuple[PreTrainedTokenizerBase, Data]:
        tokenizer, data = super().read(recipe, screen)
        context = (read_config(recipe.model) or {}).get("max_position_embeddings")
        longest, count = TASKS[recipe.task].rows.longest(data), self.section.virtual_tokens
        if count and isinstance(context, int) and longest + count > context:
            raise UserError(
                f"strategy.num_virtual_tokens: {count} and the longest example of {longest} tokens are more than this model's "
                f"context of {context}; set data.max_length: {context - count}, or fewer virtual tokens"
            )
        return tokenizer, data

    def load(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data | None) -> Base:
        self._known = self._known or (recipe, 2)
        return super().load(recipe, tokenizer, data)

    def build_model(self, base: Base) -> nn.Module:
        from hfstrat.models.virtual_tokens import align

        if base.tokens_beyond:
            base.say(f"{len(base.tokens_beyond)} tokens that the checkpoint has no embeddings for keep random ones")
        if self.section.options.get("target_modules") == "all-linear":
            all_linear(base)  # says what is left out
        with refusals(self.section):
            model: Any = self._wrapped(base.model, base.task.name, base.head_modules, base.commit)
        self._check_merged(model, base)
        return align(model)

    def _check_merged(self, model: Any, base: Base) -> None:
        if base.pooling is not None and not hasattr(model, "merge_and_unload"):
            raise UserError(
                f"model.pooling: {base.pooling.mode}: PEFT does not merge {self.section.peft_type}, and no library loads an "
                "adapter beside a pooling; set model.pooling: class, or use another type"
            )

    def _wrapped(self, model: Any, task: str, heads: list[str], revision: str | None = None) -> Any:
        from peft import get_peft_model

        given: dict[str, Any] = {}
        if self.section.options.get("target_modules") == "all-linear":
            from hfstrat.models.linear_layers import all_linear

            found = all_linear(model)
            given = {"target_modules": found.target_modules}
            if "exclude_modules" in peft_source.fields(self.section.peft_type):
                given["exclude_modules"] = found.exclude_modules
        return get_peft_model(model, self._config(task, heads, revision=revision, **given))

    def _config(self, task: str, heads: list[str], **more: Any) -> Any:
        """PEFT's configuration of a new adapter. Raises what PEFT raises."""
        from peft import TaskType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kind, options = self.section.peft_type, {**self.section.options, **more}
        if "modules_to_save" in peft_source.fields(kind):
            options["modules_to_save"] = [*(options.get("modules_to_save") or []), *heads] or None
        named = TASKS[task].model.peft_type
        return PEFT_TYPE_TO_CONFIG_MAPPING[kind](task_type=TaskType[named] if named else None, **options)


@contextmanager
def refusals(strategy: section.Peft) -> Iterator[None]:
    """What PEFT refuses, as a sentence at the field that it names."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        text, known = first_line(error), peft_source.fields(strategy.peft_type)
        words = [word for word in re.findall(r"\w+", text.lower().replace("target modules", "target_modules")) if word in known]
        key = next((word for word in words if word in strategy.options), words[0] if words else "peft_type")
        hint = ""
        if "target_modules" in words and "target_modules" not in strategy.options:
            linear = "" if strategy.peft_type == "LN_TUNING" else ", or set it to all-linear"
            text, hint = text.rstrip("."), f"; name the modules{linear}"
        version = peft_source.peft_version()
        raise UserError(f"strategy.{key}: PEFT {version} refuses this {strategy.peft_type}: {text}{hint}") from error
