"""LoRA (arXiv 2106.09685): low-rank adapters on frozen linear layers, by PEFT."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.check import check_adapter
from hfstrat.models.parameter_names import CLASS_HEAD, check_modules, is_linear
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.base import Strategy
from hfstrat.strategies.description import Description, Footprint, count
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Recipe
    from hfstrat.trainer.trainer import StrategyTrainer


class Lora(Strategy[section.Lora]):
    """Adapters are trained, the base model is frozen (in 16 bits where the hardware supports it)."""

    def __init__(self, section: section.Lora) -> None:
        super().__init__(section)
        self.initial_adapter: Path | None = None  # of an initialization that changed the base's weights

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        super().check(recipe, wrapping, network)
        if recipe.model.quantization is not None and self.section.changes_base:
            raise UserError(
                f"strategy.init_lora_weights: {self.section.init_lora_weights} changes the base model's weights, which cannot "
                "be changed once quantized; set default, gaussian or orthogonal, or remove model.quantization"
            )
        if self.section.use_dora and wrapping == DEEPSPEED:
            raise UserError(
                "strategy.use_dora: it reads the base model's weights outside of their layers, where DeepSpeed may not have "
                "gathered them; use --accelerate-config fsdp2 or ddp, or remove it"
            )

    def config(self, base: Base) -> LoraConfig:
        """The PEFT configuration of a new adapter."""
        from peft import LoraConfig, TaskType

        return LoraConfig(
            task_type=TaskType[base.task.model.peft_type],
            r=self.section.r,
            lora_alpha=self.section.lora_alpha or 2 * self.section.r,
            lora_dropout=self.section.lora_dropout,
            target_modules=self.section.target_modules,
            use_dora=self.section.use_dora,
            use_rslora=self.section.use_rslora,
            init_lora_weights=self.section.init_lora_weights,
            modules_to_save=[*self.section.modules_to_save, *base.head_modules] or None,
            trainable_token_indices=self._new_token_indices(base),
            revision=base.commit,
        )

    def _new_token_indices(self, base: Base) -> Any:
        """The added tokens whose embeddings are trained, also those of the LM head if it is not tied."""
        if not base.new_token_ids:
            return None
        if is_sharded():
            raise UserError(
                "model.add_tokens: PEFT writes the new embeddings into the full matrix, which no process has here; use "
                "--accelerate-config ddp, or strategy full or partial"
            )
        if self.section.changes_base:
            raise UserError(
                f"strategy.init_lora_weights: {self.section.init_lora_weights} together with model.add_tokens: PEFT would not "
                "save the embeddings of the new tokens; set another initialization"
            )
        tables = {id(base.model.get_input_embeddings()), id(base.model.get_output_embeddings())}
        names = [name.rsplit(".", 1)[-1] for name, module in base.model.named_modules() if id(module) in tables]
        return base.new_token_ids if base.is_tied else dict.fromkeys(names, base.new_token_ids)

    def build_model(self, base: Base) -> nn.Module:
        from peft import PeftModel, get_peft_model

        modules = [name for name, _ in base.model.named_modules() if name]
        if self.section.adapter is not None:
            return self._load_adapter(base, PeftModel)
        self._check_names(modules)
        try:
            model = get_peft_model(base.model, self.config(base))
            if self.section.changes_base:
                self._save_initial_adapter(model, base)
            return model
        except ValueError as error:
            raise UserError(f"strategy: PEFT rejected this adapter: {error}") from error

    def _load_adapter(self, base: Base, peft_model: Any) -> nn.Module:
        """The base model with an existing adapter."""
        assert self.section.adapter is not None
        if base.new_token_ids:
            raise UserError("model.add_tokens: an existing adapter has no embeddings for new tokens; remove it")
        check_adapter(self.section.adapter)
        path = Path(self.section.adapter).expanduser()
        model = peft_model.from_pretrained(base.model, str(path) if path.exists() else self.section.adapter, is_trainable=True)
        config, here = model.peft_config["default"], base.model.name_or_path
        base.say(f"continuing from the adapter {self.section.adapter}")
        if config.base_model_name_or_path not in (None, here, base.name_or_path):
            base.say(f"the adapter was trained on {config.base_model_name_or_path}; its base model is now {here}")
        config.base_model_name_or_path, config.revision = here, base.commit
        return model

    def finish(self, model: nn.Module, base: Base) -> None:
        """Cast the modules to save to the precision of the base model, since PEFT loads them without a cast."""
        for module in model.modules():
            if type(module).__name__ == "ModulesToSaveWrapper":
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(base.compute_dtype)

    def _check_names(self, modules: list[str]) -> None:
        """Refuse names that match no module, which PEFT ignores if others match. Raises UserError."""
        targets = [] if self.section.target_modules == "all-linear" else self.section.target_modules
        check_modules("strategy.target_modules", targets, modules)
        check_modules("strategy.modules_to_save", self.section.modules_to_save, modules)

    def _save_initial_adapter(self, model: Any, base: Base) -> None:
        """Save the initial adapter; `save` needs it for the difference to the trained one."""
        self.initial_adapter = Path(tempfile.mkdtemp(prefix="hfstrat-initial-"))
        atexit.register(shutil.rmtree, self.initial_adapter, ignore_errors=True)
        config = model.peft_config["default"]
        given, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(str(self.initial_adapter))
        config.init_lora_weights = given

    def save(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        if self.initial_adapter is None:
            super().save(trainer, folder, base)
        elif trainer.args.should_save:
            # the initialization moved part of the base weights into the adapter: what is published is the
            # difference to the original base, an ordinary adapter of twice the rank
            trainer.model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(self.initial_adapter))
            trainer.processing_class.save_pretrained(str(folder))
        if trainer.args.should_save:
            base.task.model.write_config(base, folder)

    def _is_target(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.section.target_modules == "all-linear":
            return is_linear(name, shape)
        module = name.removesuffix(".weight")
        is_matrix = module != name and len(shape) == 2
        return is_matrix and any(module == target or module.endswith(f".{target}") for target in self.section.target_modules)

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        saved = frozenset(name for name in shapes if any(part in self.section.modules_to_save for part in name.split(".")))
        trained = saved | {name for name in shapes if CLASS_HEAD.search(name)}
        adapted = frozenset(name for name, shape in shapes.items() if self._is_target(name, shape))
        return Description(
            self._footprint(shapes, tied, trained, adapted),
            trained,
            shapes,
            self.section.r,
            adapted,
            unquantized=saved,
            saves_model=False,
        )

    def _footprint(self, shapes: Shapes, tied: bool, trained: frozenset[str], adapted: frozenset[str]) -> Footprint:
        base = count(shapes)
        if self.section.adapter is not None:
            from hfstrat.models.load import read_shapes

            theirs = count(read_shapes(Path(self.section.adapter).expanduser()))
            return Footprint(theirs, base + theirs)
        self._check_names([*(name.rpartition(".")[0] for name in shapes), *(["lm_head"] if tied else [])])
        added = sum(self.section.r * sum(shapes[name]) for name in adapted)
        if self.section.use_dora:  # one magnitude for each output row; Conv1D in GPT-2 stores its weight transposed
            added += sum(shapes[name][1 if fnmatchcase(name, "*.c_*.weight") else 0] for name in adapted)
        added += sum(prod(shapes[name]) for name in trained)
        return Footprint(added, base + added)
