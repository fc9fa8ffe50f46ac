"""LoRA (arXiv 2106.09685): low-rank adapters on frozen linear layers, by PEFT."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line
from hfstrat.models import experts
from hfstrat.models.check import check_adapter
from hfstrat.models.experts import not_adaptable
from hfstrat.models.parameter_names import CLASS_HEAD, check_modules, is_linear
from hfstrat.recipe import strategies as section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.adapters import Adapter, all_linear
from hfstrat.strategies.description import Description, Footprint, count
from hfstrat.trainer.distributed import ALONE, DEEPSPEED, is_sharded

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Model, Recipe
    from hfstrat.trainer.trainer import StrategyTrainer


class Lora(Adapter[section.Lora]):
    """LoRA, DoRA and their initializations."""

    def __init__(self, section: section.Lora) -> None:
        super().__init__(section)
        self.family, self.generates = "", False  # the model's, and whether it has an LM head, as far as known before loading
        self.initial_adapter: Path | None = None  # of an initialization that changed the base's weights

    def check(self, recipe: Recipe, wrapping: str = ALONE, network: bool = True) -> None:
        super().check(recipe, wrapping, network)
        if recipe.model.quantization is not None and self.section.changes_base:
            raise UserError(
                f"strategy.init_lora_weights: {self.section.init_lora_weights} changes the base model's weights, which cannot "
                "be changed once quantized; set true, gaussian or orthogonal, or remove model.quantization"
            )
        if self.section.changes_base and recipe.model.dtype in ("bfloat16", "float16"):
            self._refuse_16_bits(recipe.model.dtype)
        if self.section.use_dora and wrapping == DEEPSPEED:
            raise UserError(
                "strategy.use_dora: it reads the base model's weights outside of their layers, where DeepSpeed may not have "
                "gathered them; use --accelerate-config fsdp2 or ddp, or remove it"
            )

    def _refuse_16_bits(self, dtype: str) -> None:
        raise UserError(
            f"strategy.init_lora_weights: {self.section.init_lora_weights} subtracts the adapter from the base weights, and in "
            f"{dtype} the rounding of the difference is as large as what training changes: the saved adapter would differ from "
            "the trained model; set model.dtype: float32, or init_lora_weights: orthogonal"
        )

    def model_of(self, recipe: Recipe) -> Model:
        """An adapter to continue from holds the head of transformers' class."""
        return recipe.model if self.section.adapter is None else recipe.model.model_copy(update={"pooling": "class"})

    def config(self, base: Base) -> LoraConfig:
        """The PEFT configuration of a new adapter."""
        from peft import LoraConfig, TaskType

        target_modules, exclude_modules, target_parameters = self._targets_of_parts(base)
        return LoraConfig(
            task_type=TaskType[base.task.model.peft_type] if base.task.model.peft_type else None,
            r=self.section.r,
            lora_alpha=self.section.lora_alpha or 2 * self.section.r,
            lora_dropout=self.section.lora_dropout,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            target_parameters=[*self.section.target_parameters, *target_parameters] or None,
            use_dora=self.section.use_dora,
            use_rslora=self.section.use_rslora,
            init_lora_weights=self.section.init_lora_weights,
            modules_to_save=[*self.section.modules_to_save, *base.head_modules] or None,
            trainable_token_indices=self._new_token_indices(base),
            revision=base.commit,
        )

    def _targets(self, base: Base) -> tuple[str | list[str], list[str] | None, list[str]]:
        """`target_modules`, `exclude_modules` and further `target_parameters` of the PEFT configuration."""
        if self.section.target_modules != "all-linear":
            return self.section.target_modules, None, []
        found = all_linear(base)
        return found.target_modules, found.exclude_modules, [] if base.quantized else found.target_parameters

    def _targets_of_parts(self, base: Base) -> tuple[str | list[str], list[str] | None, list[str]]:
        """`_targets` without the layers of frozen parts, each by its full name. Raises UserError where none is left."""
        targets, excluded, parameters = self._targets(base)
        is_frozen = base.task.model.frozen_modules(base, self.section.freeze)
        from hfstrat.models.linear_layers import linear_names

        names = linear_names(base.model) if targets == "all-linear" else [n for n, _ in base.model.named_modules() if n]
        if targets != "all-linear":
            names = [name for name in names if any(name == one or name.endswith(f".{one}") for one in targets)]
        kept = [name for name in names if not is_frozen(name)]
        if len(kept) == len(names):
            return targets, excluded, parameters
        if not kept:
            raise UserError("strategy.freeze: all layers that strategy.target_modules names are in frozen parts; freeze fewer")
        return kept, excluded, parameters

    def _new_token_indices(self, base: Base) -> Any:
        """The added tokens whose embeddings are trained, also those of the LM head if it is not tied."""
        new = [*base.new_token_ids, *base.tokens_beyond]
        if not new:
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
        names = [name.rsplit(".", 1)[-1] for name in _vocabulary_modules(base)]
        return new if base.is_tied else dict.fromkeys(names, new)

    def build_model(self, base: Base) -> nn.Module:
        from peft import PeftModel, get_peft_model

        modules = [name for name, _ in base.model.named_modules() if name]
        if self.section.adapter is not None:
            return self._load_adapter(base, PeftModel)
        self._check_names(modules)
        self._check_tied(base)
        if self.section.changes_base and base.compute_dtype.itemsize < 4:
            self._refuse_16_bits(str(base.compute_dtype).removeprefix("torch."))
        try:
            model: Any = get_peft_model(base.model, self.config(base))
            if self.section.changes_base and base.pooling is None:
                self._save_initial_adapter(model, base)
            if self.section.target_modules == "all-linear":
                _report_frozen(model, base, model.peft_config["default"])
            return model
        except ValueError as error:
            if self.section.target_modules == "all-linear" and "No modules were targeted" in str(error):
                name = type(base.model).__name__
                raise UserError(
                    f"strategy.target_modules: all-linear: {name} has no linear layer that PEFT adapts; use full or partial"
                ) from error
            raise UserError(f"strategy: PEFT rejected this adapter: {error}") from error

    def _load_adapter(self, base: Base, peft_model: Any) -> nn.Module:
        """The base model with an existing adapter."""
        assert self.section.adapter is not None
        if base.new_token_ids:
            raise UserError("model.add_tokens: an existing adapter has no embeddings for new tokens; remove it")
        check_adapter(self.section.adapter)
        path = Path(self.section.adapter).expanduser()
        source = str(path) if path.exists() else self.section.adapter
        fit = base.task.model.fit_adapter(base, source)
        try:
            model = peft_model.from_pretrained(base.model, source, is_trainable=True)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise self._misfit(source, base, error) from error
        if odd := _unmatched(model, source):
            raise self._misfit(source, base, KeyError(odd))
        config, here = model.peft_config["default"], base.model.name_or_path
        base.say(f"continuing from the adapter {self.section.adapter}")
        fit(model)
        if config.base_model_name_or_path not in (None, here, base.name_or_path):
            base.say(f"the adapter was trained on {config.base_model_name_or_path}; its base model is now {here}")
        config.base_model_name_or_path, config.revision = here, base.commit
        return model

    def _misfit(self, source: str, base: Base, error: Exception) -> UserError:
        """Why PEFT cannot load an adapter into this base model, and which setting to change."""
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(source)
        rows = base.model.get_input_embeddings().weight.shape[0]
        indices = getattr(config, "trainable_token_indices", None) or []
        new = indices if isinstance(indices, list) else [index for some in indices.values() for index in some]
        if (missing := sum(index >= rows for index in set(new))) or "embed_tokens" in str(error):
            tokens = f"{missing} tokens" if missing else "tokens"
            return UserError(
                f"strategy.adapter: {source} was trained with {tokens} more than this base model has ({rows:,}); set "
                f"model.tokenizer: {source}, whose tokenizer has them"
            )
        return UserError(
            f"strategy.adapter: {source} does not fit {base.name_or_path}: it was trained on "
            f"{config.base_model_name_or_path}; set model.name_or_path to that model, or remove the adapter "
            f"({type(error).__name__}: {first_line(error)[:200]})"
        )

    def _check_tied(self, base: Base) -> None:
        """Refuse an adapter on one of two tied modules: merged, it would change both. Raises UserError."""
        if not base.is_tied or self.section.target_modules == "all-linear":
            return
        tied = _vocabulary_modules(base)
        for target in self.section.target_modules:
            if any(name == target or name.endswith(f".{target}") for name in tied):
                raise UserError(
                    f"strategy.target_modules: {target} is tied: input embeddings and LM head are one matrix in this model, "
                    "and a merged adapter would change both; remove it, or train the matrix: strategy partial, embeddings: true"
                )

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

    def write(self, trainer: StrategyTrainer, folder: Path, base: Base) -> None:
        if self.initial_adapter is None:
            super().write(trainer, folder, base)
        elif trainer.args.should_save:
            # the initialization moved part of the base weights into the adapter: what is published is the
            # difference to the original base, an ordinary adapter of twice the rank
            trainer.model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(self.initial_adapter))
            trainer.processing_class.save_pretrained(str(folder))

    def set_family(self, family: str, generates: bool) -> None:
        self.family, self.generates = family, generates

    def _is_target(self, name: str, shape: tuple[int, ...], has_experts: bool) -> bool:
        module = name.removesuffix(".weight")
        if (expert := self._adapter_of_expert(name, shape)) is not None:
            return expert > 0
        if self.section.target_modules == "all-linear":
            excluded = (has_experts and experts.ROUTER.search(module)) or not_adaptable(self.family, module)
            return is_linear(name, shape) and not excluded
        is_matrix = module != name and len(shape) == 2
        return is_matrix and any(module == target or module.endswith(f".{target}") for target in self.section.target_modules)

    def _adapter_of_expert(self, name: str, shape: tuple[int, ...]) -> int | None:
        """Parameters of the adapter on a weight of routed experts; None for other weights."""
        family = self.family if self.section.target_modules == "all-linear" else ""
        return experts.adapter_weights(name, shape, self.section.r, family, self.section.target_parameters)

    def describe(self, shapes: Shapes, tied: bool) -> Description:
        saved = frozenset(name for name in shapes if any(part in self.section.modules_to_save for part in name.split(".")))
        trained = saved | {
            name for name in shapes if CLASS_HEAD.search(name) and not self.generates
        }  # RWKV's LM head is `head`
        has_experts = any(".experts." in name or ".router." in name for name in shapes)
        adapted = frozenset(name for name, shape in shapes.items() if self._is_target(name, shape, has_experts))
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
        added = 0
        for name in adapted:
            expert = self._adapter_of_expert(name, shapes[name])
            added += self.section.r * sum(shapes[name]) if expert is None else expert
        if self.section.use_dora:  # one magnitude for each output row; Conv1D in GPT-2 stores its weight transposed
            added += sum(shapes[name][1 if fnmatchcase(name, "*.c_*.weight") else 0] for name in adapted)
        added += sum(prod(shapes[name]) for name in trained)
        return Footprint(added, base + added)


def _vocabulary_modules(base: Base) -> list[str]:
    """The names of the input embeddings and the LM head."""
    tables = {id(base.model.get_input_embeddings()), id(base.model.get_output_embeddings())}
    return [name for name, module in base.model.named_modules() if id(module) in tables]


def _unmatched(model: Any, source: str) -> str | None:
    """An adapter tensor that only the file or only the model has, which PEFT would ignore or leave as it was initialized."""
    from peft import get_peft_model_state_dict, load_peft_weights

    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        return None  # the tensors of experts have other names in the file
    ours, theirs = (
        {name for name in names if "lora_A" in name} for names in (get_peft_model_state_dict(model), load_peft_weights(source))
    )
    return min(ours ^ theirs, default=None)


def _report_frozen(model: nn.Module, base: Base, config: LoraConfig) -> None:
    """Say which layers of a mixture of experts got no adapter by all-linear: PEFT adapts experts in some families only."""
    from hfstrat.models.linear_layers import expert_parameters, not_adapted

    found = [name.replace(".base_layer.", ".") for name in expert_parameters(base.model) if "lora_" not in name]
    if not found:
        return
    parts = [name.rsplit(".", 1)[-1] if not name.endswith(".weight") else ".".join(name.split(".")[-2:]) for name in found]
    adapted = {module.parameter_name for module in model.modules() if type(module).__name__ == "ParamWrapper"}
    if frozen := sorted({part for part in parts if part.rsplit(".", 1)[-1] not in adapted}):
        base.say(f"the routed experts stay frozen; to adapt them set strategy.target_parameters: [{', '.join(frozen)}]")
    else:
        base.say("the routed experts are adapted")
    if others := not_adapted(model, base.model, list(config.exclude_modules or [])):
        base.say(
            f"without an adapter: {', '.join(others)} of shared experts and dense layers, which PEFT treats as experts because "
            "of their names"
        )
