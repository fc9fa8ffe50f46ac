"""The parts of a report: what was read, measured and verified. No torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of the report. Keys that this version does not declare are kept as they are."""

    model_config = ConfigDict(extra="allow", ser_json_inf_nan="constants")


def optional(description: str) -> Any:
    """A field that is left out of the file where it is None: a part of some strategies, or of some ends."""
    return Field(default=None, exclude_if=lambda value: value is None, description=description)


class Statistics(Part):
    """Statistics of the training or the evaluation examples of a run."""

    source: str = ""
    format: str = ""
    template: str = ""
    train_on: str = Field("", description="Which tokens are supervised")
    rows_read: int = 0
    rows_kept: int = 0
    tokens: int = 0
    supervised: int = Field(0, description="Tokens that contribute to the loss")
    tokens_lost: int = Field(
        0, description="Tokens left out: of examples longer than data.max_length, or without anything to train on"
    )
    sha256: str = Field("", description="Over all token ids and labels, in order")
    sources: list[Statistics] = Field([], description="The same for each source, where there are several")


class Overlap(Part):
    """Examples that occur more than once."""

    train_duplicates: int = 0
    train_duplicate_examples: list[str] = []
    eval_rows_in_train: int = 0
    eval_rows_in_train_examples: list[str] = []


class Labels(Part):
    """The labels of a classification, or the numbers of a regression."""

    problem_type: str = ""
    training_rows: dict[str, int] = Field({}, description="Training examples of each label")
    targets: dict[str, dict[str, float]] | None = optional(
        "Mean and standard deviation of each number in the training examples"
    )


class Lengths(Part):
    """How many tokens examples have."""

    least: int
    median: float
    p95: float = Field(description="95 % of the examples have at most as many")
    most: int
    counts: list[int] = Field([], description="Examples in intervals of equal width, from `least` to `most`")


class Span(Part):
    """A part of an example as the model sees it."""

    text: str
    supervised: bool = Field(False, description="Whether it contributes to the loss")
    omitted: bool = Field(False, description="Whether `text` says in words what is left out here")


class Shown(Part):
    """A training example as the model sees it; of preferences one of its answers."""

    title: str
    tokens: int | None = optional("None of an image")
    supervised: int | None = optional("Tokens that contribute to the loss; None where the example has a target instead")
    text: list[Span] = []
    target: str = Field("", description="What it is trained to predict, where that is no text")
    note: str = ""


class DataStatistics(Part):
    """Statistics of the data of a run."""

    train: Statistics
    eval: Statistics | None = optional("None where examples are held out from the training data")
    overlap: Overlap = Overlap()
    labels: Labels | None = optional("Of a task with a head")
    lengths: dict[str, Lengths] | None = optional("Of the training and the evaluation examples, of inputs that are tokens")
    shown: list[Shown] = Field([], description="The first training examples as the model sees them")


class Estimate(Part):
    """A metric with the bounds of its 95 % confidence interval; None where no interval can be computed."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Label(Part):
    """Scores of one label of a classification."""

    label: str
    precision: float = 0.0
    recall: float = 0.0
    f1: float = 0.0
    support: int = 0
    threshold: float | None = optional("The probability above which it is predicted, of several labels per example")
    ap: float | None = optional("Average precision of boxes, over overlaps from 0.5 to 0.95")
    ap50: float | None = optional("Average precision of boxes at an overlap of 0.5")
    recall50: float | None = optional("Share of the boxes that are found at an overlap of 0.5")


class Confused(Part):
    """Two labels that are confused."""

    true: str
    predicted: str
    count: int


class Confusion(Part):
    """The confusion matrix: a row for each true label, a column for each predicted one."""

    counts: list[list[int]]


class Target(Part):
    """Errors and correlations of one number of a regression."""

    target: str
    mae: float
    rmse: float
    pearson: float
    spearman: float
    points: list[tuple[float, float]] | None = optional("Target and prediction of some evaluation examples")


class Details(Part):
    """The evaluation metrics in detail."""

    labels: list[Label] = []
    confusion: Confusion | None = optional("Where each example has one label")
    confusions: list[Confused] | None = optional("The most frequent ones, where each example has one label")
    targets: list[Target] | None = optional("Of a regression")
    baseline: dict[str, float] | None = optional("Errors of always predicting the training mean")


class SimpleModel(Part):
    """A baseline of a task with a head, measured on the evaluation examples."""

    name: str
    metric: str
    value: Estimate
    difference: Estimate = Field(description="Result minus baseline, on the same resampled examples")
    train_rows: int = Field(0, description="Training examples that it was fitted on")
    seconds: float = 0.0


class Measured(Part):
    """Metrics of one set of examples, with confidence intervals."""

    rows: int
    tokens: float | None = optional("Supervised tokens")
    before: dict[str, Estimate] | None = optional("Before training")
    after: dict[str, Estimate]
    difference: dict[str, Estimate] | None = optional("After minus before, on the same resampled examples")
    details: dict[str, Any] | None = optional("What a task reports in addition")


class Point(Part):
    """An evaluation during training. Further keys are the metrics, as `eval_*`."""

    step: int
    seconds: float
    tokens: int
    eval_loss: float


class LoggedLoss(Part):
    """A training loss that was logged."""

    step: int
    loss: float
    learning_rate: float | None = optional("Of the step; None where it was not logged")
    grad_norm: float | None = optional("The norm of the gradient before it is clipped")


class Speed(Part):
    """The throughput between two logs of the training loss, without evaluations and checkpoints."""

    step: int
    tokens_per_second: float


class Mistake(Part):
    """An evaluation example whose prediction is wrong."""

    row: int = Field(description="Its place in the evaluation data, from 0")
    place: int = Field(description="Its place in the order in which they are evaluated")
    text: str = ""
    expected: str
    predicted: str
    score: float | None = optional("The probability of what is expected, or the absolute error of a number")


class Predicted(Part):
    """What `hfstrat advise` predicts for the recipe, made before the run; a band is the widest error over measured runs."""

    seconds: float | None = optional("From the start of the process to trained weights")
    seconds_band: tuple[float, float] | None = optional("The least and the most to expect")
    memory_bytes: float | None = optional("Peak memory")
    memory_band: tuple[float, float] | None = optional("The least and the most to expect")
    source: str = ""
    reason: str | None = optional("Why something is not predicted")


class Overfitting(Part):
    """A step at which the evaluation loss rose while the training loss fell."""

    step: int
    eval_loss: float
    train_loss: float


class Plan(Part):
    """Steps and batches of the run."""

    steps: int = 0
    epochs: float | None = None
    rows: int = 0
    processes: int = 1
    global_batch_size: int = Field(0, description="Sequences per step; with dense packing on average")
    rows_per_step: float | None = Field(None, description="Of dense packing: sequences per step, on average")
    micro_batch: int = 0
    eval_batch: int | None = Field(None, description="Examples of a forward pass of evaluations")
    accumulation: int = 1
    checkpointing: bool = False
    bins: int | None = Field(None, description="Packed sequences per step; None: not packed")
    attention: str | None = Field(None, description="The attention implementation in training")
    attention_because: str = Field("", description="Why this attention implementation, in words")


class Baselines(Part):
    """Losses that a language model from random weights has to beat, in nats per token of the evaluation examples."""

    uniform: float
    unigram: float
    unigram_bits_per_byte: float | None = None
    parameters: int
    unique_tokens: int
    epoch_tokens: int
    epochs: float | None = None


class Verified(Part):
    """Comparison of the saved result, reloaded in a fresh process, with the trained model."""

    bit_equal: bool
    max_difference: float = Field(0.0, description="Of the logits")
    loaded_with: str
    max_logit: float | None = None
    top1_agreement: float | None = None
    device: str | None = None
    trained_on: str | None = None


class Reference(Part):
    """The log-probabilities of answers under the model at its start, which were computed once."""

    rows: int
    seconds: float
    computed: bool = Field(description="Whether they were computed in this session, not loaded from the cache")


class Answer(Part):
    """The answers to a prompt before and after training."""

    prompt: str
    before: str = ""
    after: str = ""
    reference: str = ""


class Quantized(Part):
    """The quantized base model."""

    name: str
    parameters: int
    quantized_parameters: int
    share: float
    weight_bytes: int
    left_out: list[str] = []


class Precomputed(Part):
    """Hidden states of frozen layers that were computed once (strategy `partial`)."""

    blocks: list[int]
    bytes: int
    seconds: float
    built: list[str]


class VisionFeatures(Part):
    """The features of a frozen vision tower, computed once (task `image-text-to-text`).

    `reads_pixels`: whether batches still have the pixels of their images.
    """

    rows: int
    bytes: int
    seconds: float
    built: list[str]
    reads_pixels: bool


class ClassifierHead(Part):
    """The classification head on frozen features (strategy `head`)."""

    layer: int
    pooling: str
    solved_exactly: bool
    l2: float | None = Field(None, description="The penalty of a solved head")


class Teacher(Part):
    """The teacher's metrics on the evaluation examples. Further keys are the metrics."""

    loss: float
    parameters: int


class TeacherCache(Part):
    """Outputs of the teacher that were computed once."""

    form: str
    bytes: int
    seconds: float
    mass: float = Field(description="Share of the teacher's probability mass that is stored")
    width: int | None = None
    built: list[str] = []


class Distillation(Part):
    """The teacher of a distillation."""

    teacher: Teacher | None = None
    cache: TeacherCache | None = optional("Where the teacher's outputs are cached")


class Comparison(Part):
    """Teacher, student, and the same student trained without the teacher (strategy `distill`)."""

    teacher: dict[str, float | None]
    student: dict[str, float | None]
    before: dict[str, float] | None = None
    without_teacher: dict[str, float] | None = None
    no_baseline: str | None = Field(None, description="Why no student was trained without the teacher")
    lines: list[str] = []


class HubCommit(Part):
    """The commit on the Hub that holds the result."""

    repo: str
    commit: str
    revision: str | None = None
    compared: bool = Field(False, description="Whether the files were downloaded again and compared")


class Environment(Part):
    """The machine and the versions of the libraries."""

    python: str = ""
    platform: str = ""
    libraries: dict[str, str] = {}
    processor: str = ""
    threads: int | None = None
    gpus: list[str] = []
    model_sha256: str | None = Field(None, description="Over a local model's weight files, or the commit of a Hub model")
    data_sha256: dict[str, str] = {}
