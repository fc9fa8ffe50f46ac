"""The sections of `strategy:`, one class for each strategy but distill (see `recipe/distill.py`). Configuration only."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from hfstrat.recipe import section
from hfstrat.recipe.section import Default, Section, from_text


class StrategySection(Section):
    """A way of training. `name` tags the union; `defaults` fill unset `training:` keys; `tasks` are those it supports."""

    name: str
    defaults: ClassVar[dict[str, Default]] = {}
    tasks: ClassVar[tuple[str, ...]] = (
        *("causal-lm", "text-classification", "regression"),
        *("image-classification", "object-detection", "audio-classification"),
    )
    refuses: ClassVar[dict[str, str]] = {}  # of tasks: why it does not support them
    augments: ClassVar[bool] = False  # whether training images and recordings are augmented by default
    takes_augmented: ClassVar[bool] = True  # whether they may be
    takes_views: ClassVar[bool] = False  # whether it may compute features of several fixed views of each image
    caches_tower: ClassVar[bool] = True  # whether features of a frozen vision tower are computed once
    random_weights: ClassVar[bool] = False  # whether training starts from random weights
    single_run: ClassVar[tuple[str, ...]] = ()  # overrides that keep a run from starting further runs to compare with

    @property
    def title(self) -> str:
        """The strategy in words, with the method where it stands for several."""
        return self.name

    @property
    def needs_weights(self) -> bool:
        """Whether `model:` has to name pretrained weights."""
        return not self.random_weights

    @property
    def packs(self) -> bool:
        """Whether several examples may be packed into one sequence."""
        return True

    @property
    def is_solved(self) -> bool:
        """Whether what is trained last has an exact solution, although training it takes long."""
        return False

    @property
    def unquantizable(self) -> str:
        """The reason why the base model cannot be quantized; empty if it can be."""
        return ""

    @property
    def unstreamable(self) -> str:
        """The setting that needs all training examples before training, and why; empty if there is none."""
        return ""

    @property
    def size(self) -> str | int | None:
        """The number of parameters that a model with random weights, if one is given."""
        return None

    @property
    def new_tokenizer(self) -> NewTokenizer | None:
        """The tokenizer that is trained on the training data, if there is one."""
        return None

    @property
    def adapters(self) -> dict[str, str]:
        """The existing adapters that training continues from, by their keys in the recipe."""
        return {}

    @property
    def models(self) -> dict[str, Any]:
        """The sections of further models that the run reads, by their keys in the recipe."""
        return {}

    def training_defaults(self) -> dict[str, Default]:
        """The values of unset `training:` keys."""
        return self.defaults


ALL_TASKS = (*StrategySection.tasks, "image-text-to-text")
Parts = list[Literal["vision", "projector", "language"]]


class Full(StrategySection):
    """Every parameter is trained, in float32 with a 16-bit forward pass where the hardware supports it."""

    name: Literal["full"]
    augments: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS
    freeze: Parts | None = Field(
        None,
        description="Parts of a vision-language model that stay frozen: vision, projector, language; default: [vision]. "
        "[vision, language] trains the projector alone",
    )
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(2e-5, "Llama 2 (arXiv 2307.09288, section 3.1) and Stanford Alpaca fine-tune at 2e-5"),
    }

    @field_validator("freeze")
    @classmethod
    def _some_part_is_left(cls, value: Parts | None) -> Parts | None:
        return _not_all(value)

    @property
    def unquantizable(self) -> str:
        return (
            "full fine-tuning trains every weight, and a weight in 4 or 8 bits is too coarse for small updates; use lora "
            "(QLoRA), partial or head, or a base model that is not quantized"
        )


def _not_all(parts: Parts | None) -> Parts | None:
    if parts and {"vision", "projector", "language"} <= set(parts):
        raise ValueError("all parts are frozen, so that nothing is trained; leave one out")
    return parts


LoraInit = Literal[True, "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"]
CHANGES_BASE = ("pissa", "olora")  # initializations that subtract the new adapter from the base weights
OF_THE_ADAPTER = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters"),
    *("use_dora", "use_rslora", "init_lora_weights", "modules_to_save", "freeze"),
)


class Lora(StrategySection):
    """Adapters are trained, the base model is frozen (in 16 bits where the hardware supports it)."""

    name: Literal["lora"]
    augments: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS
    freeze: Parts | None = Field(
        None,
        description="Parts of a vision-language model whose layers get no adapter: vision, projector, language; default: "
        "[vision]",
    )
    r: int = Field(16, ge=1, description="Rank of the adapters")
    lora_alpha: int | None = Field(
        None, ge=1, description="Scale: the update is multiplied by lora_alpha/r; default 2r (arXiv 2405.09673, section 4)"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names that get an adapter; all-linear: every linear layer but the head and routers"
    )
    target_parameters: list[str] = Field(
        [], description="Names of fused parameters that get an adapter, such as the experts' gate_up_proj"
    )
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (arXiv 2402.09353)")
    use_rslora: bool = Field(False, description="Scale by lora_alpha/sqrt(r) (arXiv 2312.03732)")
    init_lora_weights: LoraInit = Field(True, description="PEFT's initialization; true: Kaiming-uniform A, zero B")
    modules_to_save: list[str] = Field([], description="Modules that are trained in full and saved with the adapter")
    adapter: str | None = Field(None, description="Folder or Hub id of an adapter to continue from, instead of a new one")
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(
            2e-4, "QLoRA (arXiv 2305.14314, table 9); ten times that of full, as in 'LoRA Without Regret'"
        ),
    }

    @property
    def changes_base(self) -> bool:
        """Whether the initialization changes the weights of the base model."""
        return str(self.init_lora_weights).startswith(CHANGES_BASE)

    @property
    def adapters(self) -> dict[str, str]:
        return {} if self.adapter is None else {"strategy.adapter": self.adapter}

    @field_validator("freeze")
    @classmethod
    def _some_part_is_left(cls, value: Parts | None) -> Parts | None:
        return _not_all(value)

    @model_validator(mode="after")
    def _initialization_can_be_undone(self) -> Lora:
        if self.changes_base and (self.use_dora or self.modules_to_save):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} changes the base model's weights, and PEFT cannot save it as "
                "an ordinary adapter together with use_dora or modules_to_save; use only one of them"
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_its_own_shape(self) -> Lora:
        given = [key for key in OF_THE_ADAPTER if getattr(self, key) != type(self).model_fields[key].default]
        if self.adapter is not None and given:
            raise ValueError(
                f"adapter: an existing adapter has its own {', '.join(given)}; remove these keys, or remove adapter"
            )
        return self


class GradualUnfreezing(Section):
    """Gradual unfreezing (ULMFiT, arXiv 1801.06146): the head first, then the trainable blocks one by one from the top."""

    every: int | float = Field(gt=0, description="Steps from one unfrozen block to the next; below 1 a share of the run")

    @field_validator("every")
    @classmethod
    def _share_or_steps(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1:
            raise ValueError(f"expected a share below 1 or a whole number of steps, given {value}")
        return value


class Partial(StrategySection):
    """Some of the model's own weights are trained; the others are frozen and not in the optimizer."""

    name: Literal["partial"]
    caches_tower: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ALL_TASKS
    last_n_layers: int = Field(0, ge=0, description="Number of the last transformer blocks to train, with the final norm")
    patterns: list[str] = Field([], description="Shell patterns of further parameter names to train, such as '*.mlp.*'")
    head: bool | Literal["auto"] = Field(
        "auto", description="Train the LM head; auto: yes, unless it is tied. The head of a classifier is always trained"
    )
    embeddings: bool = Field(False, description="Train the input embeddings")
    gradual_unfreezing: GradualUnfreezing | None = Field(
        None, description="Unfreeze the trainable parameters step by step, from the top down"
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Learning rate of a block as a share of that of the block above it (the head has the full rate)",
    )
    precompute: bool | Literal["auto"] = Field(
        "auto",
        description="Cache the hidden states of the frozen blocks on disk instead of computing them in every epoch; "
        "auto: if this is possible and saves time",
    )
    frozen_dropout: bool = Field(True, description="Keep the model's dropout active in the frozen part")

    @property
    def unstreamable(self) -> str:
        return "strategy.precompute: true: hidden states are computed of all examples" if self.precompute is True else ""

    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(1e-4, "measured: five times that of full, half of that of lora (benchmarks/results/rates.md)"),
    }

    @model_validator(mode="after")
    def _something_is_trained(self) -> Partial:
        if not (self.last_n_layers or self.patterns or self.head or self.embeddings):
            raise ValueError("no parameter would be trained; set last_n_layers, patterns, embeddings or head")
        return self


Continuation = Annotated[Full | Lora | Partial, Field(discriminator="name")]
ContinuationName = Literal["partial", "lora", "full"]


class Head(StrategySection):
    """A classifier's head on pooled hidden states of one layer, or the LM head of a causal LM.

    With `then` the head is solved first and training continues from it with another strategy: linear probing, then
    fine-tuning (LP-FT, Kumar et al. 2022, arXiv 2202.10054), so that a random head does not distort the features.
    """

    name: Literal["head"]
    refuses: ClassVar[dict[str, str]] = {
        "object-detection": "a head is fitted on one vector of features per example, and a detector finds boxes by a decoder; "
        "set partial, which freezes the backbone and trains the rest",
        "image-text-to-text": "the part of it that is new is the projector, which has no exact solution; set strategy: {name: "
        "full, freeze: [vision, language]} to train it alone",
    }
    takes_augmented: ClassVar[bool] = False
    takes_views: ClassVar[bool] = True
    layer: int | Literal["auto"] = Field(
        "auto", description="The block after which the body ends, from 1; auto: by a probe on training examples"
    )
    pooling: Literal["auto", "mean", "last", "first"] = Field(
        "auto",
        description="How the hidden states of a text are pooled: their mean, or that of the last or the first token; "
        "auto: by the probe",
    )
    head: Literal["linear", "mlp"] = Field("linear", description="A linear layer, or one hidden layer of GELUs before it")
    hidden_size: int = Field(256, ge=1, description="Width of the hidden layer of head: mlp")
    solver: Literal["auto", "exact", "trainer"] = Field(
        "auto",
        description="exact: the optimum of a linear head in float64; trainer: gradient steps; auto: exact if it takes seconds",
    )
    l2: float | Literal["auto"] = Field(
        "auto", description="L2 penalty of the exact solver, per example; auto: the best on held-out examples"
    )
    contrastive: bool = Field(
        False,
        description="Train all weights of the body first, so that texts with equal labels become similar (SetFit, "
        "arXiv 2209.11055): for 8 to 64 rows per class",
    )
    contrastive_steps: int = Field(100, ge=1, description="Optimizer steps of contrastive: true, each on at most 32 rows")
    contrastive_learning_rate: float | Literal["auto"] = Field(
        "auto",
        description="Peak learning rate of contrastive: true; auto: half of that of full fine-tuning at its width",
    )
    untie: bool = Field(False, description="Give a causal LM whose head is tied to its embeddings a trainable head of its own")
    then: Annotated[Continuation | None, from_text("name", Continuation | ContinuationName | None)] = Field(
        None, description="Strategy that continues from the solved head: partial, lora or full, or a section of one"
    )
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(1e-3, "AdamW's default (arXiv 1711.05101); the features are standardized"),
    }

    @field_validator("layer", "l2", "contrastive_learning_rate")
    @classmethod
    def _positive(cls, value: int | float | str) -> int | float | str:
        if not isinstance(value, str) and value <= 0:
            raise ValueError("expected a number above 0, or auto")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Head:
        if self.head != "mlp" and self.hidden_size != type(self).model_fields["hidden_size"].default:
            raise ValueError("hidden_size: a linear head has no hidden layer; set head: mlp, or remove it")
        if self.head == "mlp" and self.solver == "exact":
            raise ValueError("solver: exact is for head: linear; an MLP has no exact solution, so remove solver")
        if self.l2 != "auto" and (self.head == "mlp" or self.solver == "trainer"):
            raise ValueError(
                "l2 is for the exact solver; for a head that is trained by gradient steps set training.weight_decay"
            )
        if self.then is not None and (self.head == "mlp" or self.solver == "trainer"):
            raise ValueError(
                "then needs head: linear and an exact solver, since the classifiers of transformers have a linear head"
            )
        if not self.contrastive:
            for key in ("contrastive_steps", "contrastive_learning_rate"):
                if key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key}: nothing is trained by contrast; set contrastive: true, or remove it")
        elif self.layer != "auto":
            raise ValueError("layer: contrastive: true trains the whole body, so the head is on its last layer; remove layer")
        elif self.then is not None:
            raise ValueError("then: contrastive: true trains the body already; remove then, or contrastive")
        if self.then is not None and self.pooling in ("mean", "first"):
            raise ValueError(
                f"then: no class of transformers pools by {self.pooling} at a chosen layer, so the full model could not be "
                "trained; remove pooling, or then"
            )
        return self

    @property
    def unstreamable(self) -> str:
        return "strategy.name: head: features of all examples are computed before training"

    @property
    def is_solved(self) -> bool:
        return self.contrastive and self.head == "linear" and self.solver != "trainer"

    @property
    def unquantizable(self) -> str:
        if self.contrastive:
            return "strategy.contrastive: true trains all weights of the body, and quantized weights cannot be trained"
        return "" if self.then is None else self.then.unquantizable

    def training_defaults(self) -> dict[str, Default]:
        return self.defaults if self.then is None else self.then.training_defaults()


END, PAD = "<|endoftext|>", "<|pad|>"  # the special tokens of every new tokenizer
BYTES = 256  # tokens of a byte-level vocabulary before its merges


class NewTokenizer(Section):
    """A tokenizer that is trained on the training data."""

    vocab_size: int = Field(4096, ge=BYTES + 2, description="Number of tokens, including the special ones and the 256 bytes")
    special_tokens: list[str] = Field([], description=f"Special tokens in addition to {END} and {PAD}")
    chat_template: str = Field(
        "auto", min_length=1, description="chatml, none, or a .jinja file; auto: chatml for conversations, else none"
    )

    @model_validator(mode="after")
    def _has_room(self) -> NewTokenizer:
        if double := [token for token in self.special_tokens if token in (END, PAD)]:
            raise ValueError(f"special_tokens: a new tokenizer has {double[0]} already; remove it")
        if self.vocab_size < (least := BYTES + 4 + len(self.special_tokens)):
            raise ValueError(f"vocab_size: the bytes and the special tokens take {least} tokens; expected more than that")
        return self


PYTHIA = "Pythia trains its 70M model at 1e-3 (arXiv 2304.01373, table 6)"
GPT3 = "GPT-3 (arXiv 2005.14165, appendix B)"


class Scratch(StrategySection):
    """A model with random weights; every parameter is trained, in float32.

    Its shape comes from `model_type` (with `parameters` or `config`), from the config of `model:` (its weights are not
    read), or from a class of your own.
    """

    name: Literal["scratch"]
    refuses: ClassVar[dict[str, str]] = {
        "image-text-to-text": "a tower and a language model with random weights need more pictures than a fine-tuning has; use "
        "full with freeze: []"
    }
    augments: ClassVar[bool] = True
    model_type: str | None = Field(
        None,
        min_length=1,
        description="Family of the model, as transformers' model_type (also bert for a classifier); llama unless model or "
        "model_class is given",
    )
    parameters: str | int | None = Field(
        None, description="Size, such as 10M: width, depth, heads and inner width are chosen for the vocabulary"
    )
    config: dict[str, Any] = Field(
        {}, description="Keys of the model's config, such as {hidden_size: 256}; they take precedence"
    )
    model_class: str | None = Field(
        None, description="A PreTrainedModel of your own: file.py:Class; it is created with config and saved with its code"
    )
    tokenizer: NewTokenizer | None = Field(None, description="Train a tokenizer on the training data")
    random_weights: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Default]] = {
        "learning_rate": Default(1e-3, PYTHIA),
        "weight_decay": Default(0.1, f"{GPT3}; for matrices only, not for norms and biases"),
        "extra": Default({"adam_beta2": 0.95}, GPT3),
    }

    @property
    def unquantizable(self) -> str:
        return "under strategy scratch all weights are random and trained; remove it"

    @property
    def size(self) -> str | int | None:
        return self.parameters

    @property
    def new_tokenizer(self) -> NewTokenizer | None:
        return self.tokenizer

    @property
    def unstreamable(self) -> str:
        if self.tokenizer is None:
            return ""
        return "strategy.tokenizer: a tokenizer is trained on all examples (model.tokenizer names an existing one)"

    @field_validator("parameters")
    @classmethod
    def _readable_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            section.parse(value)
        return value

    @model_validator(mode="after")
    def _one_shape(self) -> Scratch:
        if self.model_class is not None:
            if self.model_type or self.parameters:
                raise ValueError("model_class: the class defines the shape of the model; remove model_type and parameters")
            section.split_class(self.model_class)
        return self
