"""The recipe: frozen, typed sections. How a recipe file becomes a `Recipe` is in `loading.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.distill import Distill
from hfstrat.recipe.evaluation import Evaluation
from hfstrat.recipe.quantization import FromName, Quantization
from hfstrat.recipe.section import Section, seconds
from hfstrat.recipe.strategies import Full, Head, Lora, Partial, Scratch, StrategySection

__all__ = ["Data", "Evaluation", "Hub", "Model", "Recipe", "Source", "Training", "seconds"]


Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"]


Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"
]


Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]


AnyStrategy = Annotated[Distill | Full | Head | Lora | Partial | Scratch, Field(discriminator="name")]


STRATEGIES: dict[str, type[StrategySection]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(get_args(AnyStrategy)[0])
}
"""Every strategy's section by its name. A new strategy is a section, a name here, and a class in `hfstrat.strategies`."""


StrategyName: Any = Literal[tuple(STRATEGIES)]


class Model(Section):
    """Which weights to start from, and in which form. Under `scratch`: which config and which tokenizer, if any."""

    name_or_path: str = Field("", description="Hub id, local folder, or a .gguf file; under scratch also a config.json")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub")
    tokenizer: str | None = Field(None, description="Hub id or folder of another tokenizer than the model's own")
    add_tokens: list[str] = Field([], description="New special tokens; their embeddings learn")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of frozen weights and of the forward pass; auto: 16 bits where the hardware has them"
    )
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="Attention kernel; auto: the library's choice"
    )
    quantization: Annotated[Quantization | None, FromName] = Field(
        None, description="Frozen linear layers in 8 or 4 bits, by bitsandbytes: int8, nf4 or fp4, or a mapping with name"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model")

    @property
    def gguf_file(self) -> bool:
        return self.name_or_path.endswith(".gguf")


class Training(Section):
    """How long, how fast, how often. Names and meanings are those of TrainingArguments where it has them."""

    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; default by strategy")
    num_train_epochs: float | None = Field(None, gt=0, description="Passes over the data; 3 if no length is given")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, at most")
    max_time: str | None = Field(None, description="Wall-clock time of training, such as 10min; the schedule follows it")
    global_batch_size: int = Field(16, ge=1, description="Sequences per optimiser step, over all processes")
    per_device_train_batch_size: int | Literal["auto"] = Field(
        "auto", description="Sequences per forward pass; auto: what fits. Accumulation makes up the rest"
    )
    per_device_eval_batch_size: int | Literal["auto"] = Field("auto", description="The same, for evaluation")
    train_sampling_strategy: Literal["auto", "group_by_length", "random"] = Field(
        "auto",
        description="Steps of rows of like length (less padding), or as they come (each step a fair sample); each row is seen "
        "once an epoch either way. auto: of like length where a step has fewer than 16 rows",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Several rows of a step side by side in one, shown on the model at hand not to see each other; auto: where "
        "it saves padding, on a GPU",
    )
    lr_scheduler_type: Schedule = Field("cosine", description="Shape of the learning rate after the warm-up")
    warmup_steps: float = Field(0.03, ge=0, description="Steps of warm-up; below 1 a share of all steps")
    optim: Optimizer = Field("adamw_torch_fused", description="Optimiser; the 8-bit and paged ones need bitsandbytes")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm")
    activation_checkpointing: bool | Literal["auto"] = Field(
        "auto", description="Recompute activations: less memory, more time; auto: on a GPU where not one row fits without"
    )
    torch_compile: bool = Field(
        False, description="Compile the model's blocks: up to minutes for each new width of a batch, faster steps after that"
    )
    logging_steps: int = Field(5, ge=1, description="Steps between logged losses")
    eval_steps: int | float = Field(0.25, gt=0, description="Steps between evaluations; below 1 a share of the run")
    save_steps: int | float | None = Field(None, gt=0, description="Steps between checkpoints; default as eval_steps")
    save_total_limit: int = Field(2, ge=1, description="Complete checkpoints to keep (the best is always kept)")
    load_best_model_at_end: bool = Field(
        True, description="End with the weights of the lowest evaluation loss, of a classifier the highest accuracy"
    )
    early_stopping_patience: int | None = Field(None, ge=1, description="Stop after so many evaluations without gain")
    report_to: list[Tracker] = Field([], description="Trackers that the losses go to as well; none by default")
    resume: str = Field("auto", min_length=1, description="auto, never, or the path of a checkpoint")
    extra: dict[str, Any] = Field({}, description="Other TrainingArguments, passed on as they are")

    @field_validator("per_device_train_batch_size", "per_device_eval_batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("a whole number of at least 1, or auto, is expected")
        return value

    @field_validator("max_time", mode="before")
    @classmethod
    def _readable_time(cls, value: Any) -> Any:
        if value is not None:
            seconds(value if isinstance(value, str) else "")
        return value

    @model_validator(mode="after")
    def _steps_fit(self) -> Training:
        for name in ("eval_steps", "save_steps"):
            value = getattr(self, name)
            if isinstance(value, float) and value > 1:
                raise ValueError(f"{name}: a share below 1 or a whole number of steps is expected, given {value}")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        return self


class Hub(Section):
    """Where the result goes on the Hugging Face Hub."""

    push: bool = Field(False, description="Upload the result after it was verified")
    repo: str | None = Field(None, description="Repository, such as me/my-model")
    private: bool = Field(
        True, description="Whether the repository is private; a public one is pushed to only where this is false"
    )
    revision: str | None = Field(None, min_length=1, description="Branch to push to, made if missing; default: main")

    @model_validator(mode="after")
    def _has_a_repo(self) -> Hub:
        if self.push and not self.repo:
            raise ValueError("push: true needs repo, such as repo: me/my-model")
        return self


def _from_string(key: str, either: Any) -> BeforeValidator:
    """`strategy: lora` and `model: some/id` say all there is to say; `either` is what the JSON schema allows."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value, json_schema_input_type=either)


class Recipe(Section):
    """One training run. How to distribute it is not in here: that is the Accelerate config's."""

    task: Literal["causal-lm", "text-classification", "regression"] = Field(
        "causal-lm", description="What the model learns to do"
    )
    model: Annotated[Model, _from_string("name_or_path", Model | str)] = Model()
    strategy: Annotated[AnyStrategy, _from_string("name", AnyStrategy | StrategyName)]
    data: Annotated[Data, _from_string("train", Data | str)]
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    hub: Hub = Hub()
    seed: int = Field(42, ge=0, description="Of initialisation, data order and dropout")
    output_dir: str = Field(min_length=1, description="Folder for checkpoints, the result and report.json")
