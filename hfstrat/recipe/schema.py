"""The recipe: frozen, typed sections. `load.py` reads a recipe file into a `Recipe`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from hfstrat.recipe.audio import Audio
from hfstrat.recipe.data import Data, Source
from hfstrat.recipe.distill import Distill
from hfstrat.recipe.images import Images
from hfstrat.recipe.objectives import Dpo, Grpo, Kto, ObjectiveSection, Orpo, Sft, Simpo
from hfstrat.recipe.peft import Peft
from hfstrat.recipe.section import Default, FromName, PositiveOrAuto, Quantization, Section, from_text, seconds
from hfstrat.recipe.strategies import Full, Head, Lora, Partial, Scratch, StrategySection

__all__ = ["Data", "Evaluation", "Hub", "Model", "Recipe", "Source", "Training", "seconds"]


Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "stable_adamw",
    "grokadamw",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "adafactor",
    "adagrad",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "muon",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "sgd",
]
"""Names of transformers' `OptimizerNames`, and muon."""


AttentionName = Literal[
    "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
]


HubKernel = Annotated[
    str, Field(pattern=r"^[^/:@\s]+/[^/:@\s]+(@[^/:@\s]+)?(:[^/:@\s]+)?$", description="a kernel on the Hub (owner/name)")
]
"""As transformers takes it: a repository, where needed with a revision and a function (`owner/name@revision:function`)."""


Tracker = Literal["trackio", "tensorboard", "wandb", "mlflow"]


Metric = Literal["exact_match", "f1", "rouge", "chrf", "regex", "json", "length"]


PositiveNumber = Annotated[float, Field(gt=0)]


def _names_as_text(value: Any) -> Any:
    """Keys such as 0 and 1, which YAML reads as numbers, are names of classes."""
    if not isinstance(value, dict):
        return value
    return {str(key) if isinstance(key, int) and not isinstance(key, bool) else key: weight for key, weight in value.items()}


ClassWeights = Annotated[
    Literal["balanced", "focal"] | list[PositiveNumber] | dict[str, PositiveNumber] | None, BeforeValidator(_names_as_text)
]


AnyStrategy = Annotated[Distill | Full | Head | Lora | Partial | Peft | Scratch, Field(discriminator="name")]


STRATEGIES: dict[str, type[StrategySection]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(get_args(AnyStrategy)[0])
}
"""Every strategy's section by its name. A new strategy is a section, a name here, and a class in `hfstrat.strategies`."""


StrategyName: Any = Literal[tuple(STRATEGIES)]


AnyObjective = Annotated[Dpo | Grpo | Kto | Orpo | Sft | Simpo, Field(discriminator="name")]


OBJECTIVES: dict[str, type[ObjectiveSection]] = {
    get_args(cls.model_fields["name"].annotation)[0]: cls for cls in get_args(get_args(AnyObjective)[0])
}
"""Every objective's section by its name. A new objective is a section, a name here, and a folder in `hfstrat.objectives`."""


ObjectiveName: Any = Literal[tuple(OBJECTIVES)]


UNIONS: dict[str, dict[str, type[Any]]] = {"strategy": dict(STRATEGIES), "objective": dict(OBJECTIVES)}
"""The keys of a recipe whose section is one of several, by the `name` in it."""


class Model(Section):
    """The weights to start from, and their form. Under `scratch`: the config and the tokenizer, if any."""

    name_or_path: str = Field("", description="Hub id, local folder, or a .gguf file; under scratch also a config.json")
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub")
    tokenizer: str | None = Field(None, description="Hub id or folder of a tokenizer other than the model's own")
    add_tokens: list[str] = Field([], description="New special tokens; their embeddings are trained")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="dtype of frozen weights and of the forward pass; auto: 16 bits where the hardware supports it"
    )
    pooling: Literal["class", "mean", "last", "first"] | None = Field(
        None,
        description="How a classifier pools the hidden states of a text: class: as its class in transformers; mean, last or "
        "first (token); default: as modules.json of a sentence encoder names it, else class",
    )
    attn_implementation: AttentionName | HubKernel = Field(
        "auto",
        description="Attention implementation: sdpa, eager, flash_attention_2, 3 or 4, flex_attention, or a kernel on the Hub, "
        "such as kernels-community/flash-attn2; auto: the default of transformers, and for packed rows the first that passes "
        "a test on the model: torch's kernel for variable lengths, flash attention, flex attention",
    )
    quantization: Annotated[Quantization | None, FromName] = Field(
        None, description="Quantize frozen linear layers with bitsandbytes: int8, nf4 or fp4, or a mapping with name"
    )
    trust_remote_code: bool = Field(False, description="Run Python code of the model repository")

    @property
    def gguf_file(self) -> bool:
        return self.name_or_path.endswith(".gguf")


class Training(Section):
    """Length, learning rate, batches, evaluations and checkpoints. Names are those of TrainingArguments where it has them."""

    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; default by strategy")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of a classifier's new head; default: ten times learning_rate"
    )
    num_train_epochs: float | None = Field(None, gt=0, description="Epochs; 3 if no length is given")
    max_steps: int | None = Field(None, ge=1, description="Maximum number of optimizer steps")
    max_time: str | None = Field(
        None, description="Maximum wall-clock time of training, such as 10min; the learning rate schedule follows it"
    )
    global_batch_size: int = Field(
        16, ge=1, description="Sequences per optimizer step, over all processes; gradient accumulation is derived"
    )
    global_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Of packing: dense, in place of global_batch_size: tokens per optimizer step at most",
    )
    per_device_train_batch_size: PositiveOrAuto = Field(
        "auto", description="Sequences (with packing: dense packed ones) per forward pass on each device; auto: as many as fit"
    )
    per_device_eval_batch_size: PositiveOrAuto = Field("auto", description="The same for evaluation")
    train_sampling_strategy: Literal["auto", "group_by_length", "random"] = Field(
        "auto",
        description="group_by_length: steps of examples of similar length (less padding); random: each step is a random "
        "sample. Each example is seen once per epoch. auto: group_by_length if a step has fewer than 16 examples",
    )
    packing: bool | Literal["auto", "dense"] = Field(
        "auto",
        description="Pack several examples of a step into one sequence, if a test on the model shows that they do not attend "
        "to each other; auto: on a GPU, where it saves padding; dense: steps of global_batch_tokens, each of the examples that "
        "fill its sequences best",
    )
    lr_scheduler_type: Schedule = Field(
        "cosine",
        description="Learning rate schedule after the warmup; warmup_stable_decay: constant, then lowered to zero in the last "
        "extra.lr_scheduler_kwargs.num_decay_steps steps",
    )
    warmup_steps: float = Field(0.03, ge=0, description="Warmup steps; below 1 a share of all steps")
    optim: Optimizer = Field(
        "adamw_torch_fused",
        description="Optimizer, by its name in transformers; muon: Muon for hidden matrices, AdamW for the rest. Those "
        "of bitsandbytes (8-bit, paged, lion, ademamix), torchao (adamw_torch_4bit, _8bit), torch-optimi (stable_adamw) and "
        "grokadamw need that package",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which gradients are clipped")
    activation_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, more time; auto: on a GPU where not even "
        "one example fits without",
    )
    class_weights: ClassWeights = Field(
        None,
        description="How much each class counts in the training loss of a classifier with one label per row. balanced: all "
        "classes equally, however rare; focal: the focal loss, in which confident examples count little (arXiv 1708.02002); or "
        "a weight for each class, as a list in their order or by name",
    )
    torch_compile: bool = Field(
        False, description="Compile the model's blocks: minutes for each new sequence length, faster steps afterwards"
    )
    float8: bool = Field(
        False,
        description="Compute the products of trained linear layers in float8 during training steps, on a GPU that can (Ada, "
        "Hopper); needs torchao, and torch_compile to be faster. For strategies without an adapter",
    )
    logging_steps: int = Field(5, ge=1, description="Steps between two logged losses")
    eval_steps: int | float = Field(0.25, gt=0, description="Steps between two evaluations; below 1 a share of the run")
    save_steps: int | float | None = Field(
        None, gt=0, description="Steps between two checkpoints, below 1 a share of the run; default: eval_steps"
    )
    save_total_limit: int = Field(2, ge=1, description="Number of checkpoints to keep (the best one is always kept)")
    load_best_model_at_end: bool = Field(
        True,
        description="End with the weights of the best evaluation: the lowest loss, or the highest accuracy of a classifier",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this number of evaluations without improvement"
    )
    report_to: list[Tracker] = Field([], description="Experiment trackers, such as [wandb]")
    resume_from_checkpoint: str = Field(
        "auto", min_length=1, description="auto (the last complete checkpoint), never, or the path of a checkpoint"
    )
    extra: dict[str, Any] = Field({}, description="Other TrainingArguments, passed through")

    @property
    def must_pack(self) -> bool:
        """Whether a run that cannot be packed is refused."""
        return self.packing in (True, "dense")

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
                raise ValueError(f"{name}: given {value}; expected a whole number of steps, or below 1 a share of the run")
        if self.lr_scheduler_type == "warmup_stable_decay":
            if "num_decay_steps" not in (self.extra.get("lr_scheduler_kwargs") or {}):
                raise ValueError("lr_scheduler_type: warmup_stable_decay needs extra.lr_scheduler_kwargs: {num_decay_steps: N}")
            if self.max_time is not None:
                raise ValueError("lr_scheduler_type: warmup_stable_decay counts steps; set max_steps instead of max_time")
        if self.packing == "dense":
            if self.global_batch_tokens is None:
                raise ValueError("packing: dense needs a batch in tokens; set training.global_batch_tokens, such as 65536")
            for name in ("global_batch_size", "train_sampling_strategy"):  # a stored recipe has the defaults too
                if getattr(self, name) not in (type(self).model_fields[name].default, "random"):
                    raise ValueError(f"{name}: packing: dense chooses the examples of a step by their lengths; remove this key")
        elif self.global_batch_tokens is not None:
            raise ValueError("global_batch_tokens: only used by packing: dense; set packing: dense, or remove this key")
        if self.optim == "muon" and "optim_args" in self.extra:
            raise ValueError("optim: muon reads no extra.optim_args; remove them")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience: needs training.load_best_model_at_end: true; set it, or remove this key")
        return self


class Evaluation(Section):
    """What is measured in addition to the training loss, before and after training; `hfstrat evaluate` measures the same."""

    eval_on_start: bool = Field(True, description="Also measure everything before training")
    max_rows: int | None = Field(None, ge=1, description="Maximum number of evaluation examples")
    prompts: list[str] = Field(
        [], description="Prompts to answer before and after training; default: those of evaluation examples"
    )
    samples: int = Field(3, ge=0, description="Number of evaluation examples to answer if no prompts are given")
    max_new_tokens: int = Field(48, ge=1, description="Maximum length of an answer in tokens")
    metrics: list[Metric] = Field(
        [],
        description="Metrics of generated answers against their references: exact_match, f1 (both as in SQuAD), rouge, chrf "
        "(pip install 'hfstrat[eval]'), regex (share that matches `regex`), json (share of valid JSON), length (tokens of the "
        "answer; preference objectives measure it by default)",
    )
    metric_rows: int = Field(200, ge=1, description="Maximum number of evaluation examples to answer for `metrics`")
    regex: str | None = Field(
        None, description="Pattern of metrics: [regex]; with a group, its match has to equal that in the reference"
    )
    temperature: float = Field(
        0.0, ge=0, description="Temperature of the answers for `metrics`; 0: greedy, above: sampled with the recipe's seed"
    )
    choices: list[str] = Field(
        [],
        description="Files of multiple-choice examples, scored by likelihood: {query, choices, gold}, {context_options, "
        "continuation, gold}, or {context, continuation}",
    )
    lm_eval: list[str] = Field(
        [], description="Tasks of lm-evaluation-harness, by name or YAML file (pip install 'hfstrat[eval]')"
    )
    include_path: str | None = Field(None, description="Folder with more tasks for `lm_eval`")
    control: str = Field(
        "auto",
        min_length=1,
        description="Forgetting check: the loss on a text outside of the training data. auto: bundled passages, for causal LMs "
        "with pretrained weights; off; or a file with rows of text",
    )
    baselines: bool = Field(
        True,
        description="Of a task with a head, also measure what it has to beat: a constant prediction, a linear model of TF-IDF, "
        "and a linear head on frozen features",
    )
    label_thresholds: bool = Field(
        True,
        description="Where a text may have several labels, choose the probability above which each is predicted, for F1, "
        "on training examples that are held out of training (15 %, at most 2,000; none below 200), or out of fold (head)",
    )
    rare_class_precision: float | None = Field(
        None,
        ge=0.5,
        le=1,
        description="Where an example has one class: predict the rarest class wherever its probability is above a threshold, "
        "which is the lowest one with this precision on training examples that are held out of training, or out of fold (head)",
    )
    batch_tokens: PositiveOrAuto = Field(
        "auto", description="Tokens per forward pass, padding included, of all measurements but the evaluation loss"
    )

    @property
    def rows_to_answer(self) -> int:
        """Number of evaluation examples whose text is kept."""
        return max(self.samples, self.metric_rows if self.metrics else 0)

    @field_validator("regex")
    @classmethod
    def _a_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"expected a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _fits(self) -> Evaluation:
        if "regex" in self.metrics and self.regex is None:
            raise ValueError("metrics: regex needs a pattern; set evaluation.regex, such as '#### (-?[0-9]+)'")
        if self.regex is not None and "regex" not in self.metrics:
            raise ValueError("regex: only used by metrics: [regex]; add regex to evaluation.metrics, or remove the pattern")
        if self.temperature and not self.metrics:
            raise ValueError("temperature: only used by metrics; set evaluation.metrics, or remove it")
        if self.include_path and not self.lm_eval:
            raise ValueError("include_path: only used by lm_eval; set evaluation.lm_eval, or remove it")
        return self


class Hub(Section):
    """Upload of the result to the Hugging Face Hub."""

    push_to_hub: bool = Field(False, description="Upload the result after it is verified")
    repo_id: str | None = Field(None, description="Repository, such as me/my-model")
    private: bool = Field(
        True, description="Whether the repository is private; an existing public one is refused unless this is false"
    )
    revision: str | None = Field(None, min_length=1, description="Branch to push to, created if missing; default: main")

    @model_validator(mode="after")
    def _has_a_repo(self) -> Hub:
        if self.push_to_hub and not self.repo_id:
            raise ValueError("push_to_hub: true needs a repository; set hub.repo_id, such as me/my-model")
        return self


OF_IMAGES = ("image-classification", "object-detection")  # tasks that read the section `image`


MODEL_DEFAULTS: dict[str, dict[str, Default]] = {  # by task: `model:` keys whose default is another one
    "regression": {"dtype": Default("float32", "predictions in original units need the precision")},  # not rounded to 16 bits
}


class Recipe(Section):
    """One training run. Distribution is not part of it: that is the Accelerate config."""

    task: Literal[
        "causal-lm",
        "text-classification",
        "regression",
        "image-classification",
        "object-detection",
        "image-text-to-text",
        "audio-classification",
    ] = Field(
        "causal-lm",
        description="What the model is trained for: generated text, labels of texts, numbers, classes of images or of sound, "
        "boxes, or answers in conversations with images",
    )
    model: Annotated[Model, from_text("name_or_path", Model | str)] = Model()
    strategy: Annotated[AnyStrategy, from_text("name", AnyStrategy | StrategyName)]
    objective: Annotated[AnyObjective, from_text("name", AnyObjective | ObjectiveName)] = Field(
        Sft(),
        description="What is minimized: sft (the task's own loss), a preference objective (dpo, kto, orpo, simpo), or grpo, "
        "which maximizes rewards",
    )
    data: Annotated[Data, from_text("train", Data | str)]
    image: Images = Field(
        Images(), description="Size and augmentation of images, for tasks of images; processor_kwargs for image-text-to-text"
    )
    audio: Audio = Field(Audio(), description="Length and augmentation of recordings, for task: audio-classification")
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    hub: Hub = Hub()
    seed: int = Field(42, ge=0, description="Seed of initialization, data order and dropout")
    output_dir: str = Field(min_length=1, description="Folder for checkpoints, the result and report.json")

    @model_validator(mode="after")
    def _media_are_of_their_task(self) -> Recipe:
        own = Images.model_construct(**{**self.image.__dict__, "processor_kwargs": {}, "precompute": "auto"}) != Images()
        if self.task == "image-text-to-text" and own:
            raise ValueError(
                "image: size and augmentation are for task: image-classification; the images of image-text-to-text have the "
                "size that its processor gives them: set image.processor_kwargs, such as {max_pixels: 262144}"
            )
        if self.task in OF_IMAGES and (self.image.processor_kwargs or self.image.precompute != "auto"):
            raise ValueError("image: processor_kwargs and precompute are for task: image-text-to-text; remove them")
        if self.task not in (*OF_IMAGES, "image-text-to-text") and self.image != Images():
            raise ValueError(f"image: it is for task: {' or '.join(OF_IMAGES)}; set the task, or remove it")
        if self.task != "audio-classification" and self.audio != Audio():
            raise ValueError("audio: it is for task: audio-classification; set the task, or remove it")
        if self.task != "object-detection" and (self.data.box_format != "auto" or self.data.class_names):
            key = "class_names" if self.data.class_names else "box_format"
            raise ValueError(f"data.{key}: it is for task: object-detection; set the task, or remove it")
        return self

    @model_validator(mode="after")
    def _classes_are_of_their_task(self) -> Recipe:
        if self.evaluation.rare_class_precision is not None and not self.task.endswith("-classification"):
            raise ValueError(
                f"evaluation.rare_class_precision: it is for classifiers, and not for task: {self.task}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_of_their_task(self) -> Recipe:
        trained = [self.strategy, getattr(self.strategy, "student", None)]
        freezes = any(hasattr(each, "freeze") for each in trained)
        if self.task == "image-text-to-text" and self.image.precompute != "auto" and not freezes:
            raise ValueError(
                f"image.precompute: it is for strategies with freeze; {self.strategy.name} caches hidden states: set "
                "strategy.precompute, or remove it"
            )
        if self.task != "image-text-to-text" and any(getattr(each, "freeze", None) is not None for each in trained):
            raise ValueError(
                "strategy: freeze names parts of a vision-language model; set task: image-text-to-text, or remove it"
            )
        return self
