"""The recipe's `data:` section: which examples to train on, and how they are tokenized."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from hfstrat.recipe.section import Section

Format = Literal[
    "auto",
    "text",
    "prompt-completion",
    "alpaca",
    "messages",
    "conversations",
    "text-classification",
    "regression",
    "image-classification",
    "audio-classification",
    "object-detection",
    "preference",
    "unpaired-preference",
]
_PART = r"\w[\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?"


def _readable_split(value: str) -> str:
    if not re.fullmatch(rf"{_PART}(\+{_PART})*", value):
        raise ValueError("expected a split such as train, train[:10%], train[100:] or train+validation")
    return value


Split = Annotated[str, AfterValidator(_readable_split)]


SHUFFLE_BUFFER = 10_000  # rows


RESERVED = (  # parameters of `apply_chat_template` that hfstrat sets
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "kwargs"),
)


def _options(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in RESERVED or name.endswith("_token"):
            raise ValueError(
                f"{name}: hfstrat sets this itself; expected arguments that the template reads, such as enable_thinking"
            )
    return value


Options = Annotated[dict[str, Any], AfterValidator(_options)]


class Source(Section):
    """One source of examples. Unset keys have the values of the `data` section.

    The weight is the number of times that each example is seen in an epoch: 2 is twice, 0.5 is one half of the examples,
    2.5 is every example twice and one half of them a third time. The half is drawn once with the recipe's seed and is the
    same in every epoch. Evaluation examples are held out before weights apply, and are evaluated once.

    With `data.streaming` the number of rows is unknown, and the weight of a source over the sum of all weights is the
    probability that the next example is one of its rows; a source that ends begins again.
    """

    path: str = Field(min_length=1, description="File, folder, glob or Hub id")
    weight: float = Field(1.0, gt=0, le=1000, description="Times that each example is seen in an epoch")
    format: Format | None = Field(None, description="Format of its rows; default: data.format")
    columns: dict[str, str] | None = Field(None, description="Maps column names, as data.columns does; default: data.columns")
    config: str | None = Field(None, description="Configuration name of this Hub dataset; default: data.config")
    split: Split | None = Field(None, description="Split of this Hub dataset or folder; default: data.split")
    revision: str | None = Field(None, description="Branch, tag or commit of this Hub dataset; default: data.revision")


def _as_list(value: Any) -> Any:
    """Read `train: rows.jsonl` as [{path: rows.jsonl}]."""
    if value is None or isinstance(value, Source):
        return value if value is None else [value]
    if not isinstance(value, str | list | dict):
        raise ValueError("expected text (in quotes where it looks like a number): a file, folder, glob or Hub id")
    if value == []:
        raise ValueError("expected at least one file, folder, glob or Hub id")
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source])]
MaybeSources = Annotated[
    list[Source] | None, BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source] | None)
]


class Data(Section):
    """Which examples to train on, and how they are tokenized.

    Examples are read one by one and tokenized once to the disk (`$HFSTRAT_CACHE`, see `hfstrat cache ls`), from which
    training reads them. They may be larger than memory, which holds about 20 bytes per example.

    With `streaming` nothing is read before it is needed and no tokens are written to the disk: memory and disk space do not
    depend on the number of rows, and training begins at once.
    """

    train: Sources = Field(
        description="File (.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, also .gz), folder, glob or Hub id; or a list, "
        "each one of these or {path, weight, format, columns, config, split, revision}"
    )
    eval: MaybeSources = Field(None, description="The same for evaluation; default: some of the examples of train are held out")
    eval_size: int | float = Field(0.05, gt=0, description="Number of examples to hold out; below 1 a share (at most 1,000)")
    eval_seed: int | None = Field(None, ge=0, description="Seed that selects the examples to hold out; default: seed")
    config: str | None = Field(None, description="Configuration name of a Hub dataset")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub dataset")
    split: Split = Field("train", description="Split to train on, such as train; of a Hub dataset also train[:10%]")
    eval_split: Split | None = Field(None, description="Split to evaluate on, of the same Hub dataset or folder")
    format: Format = Field("auto", description="Format of the rows; auto: detected from the columns")
    documents: Literal["lines", "files"] = Field(
        "lines",
        description="An example of a .txt file is a line that is not blank, or the complete file (overflow: split cuts it, and "
        "the last eval_size of each file is held out in one piece)",
    )
    columns: dict[str, str] = Field(
        {}, description="Maps column names of the data to those of the format, such as {response: completion}"
    )
    template: str = Field(
        "auto",
        min_length=1,
        description="chat: the tokenizer's chat template; a .jinja file; plain: a blank line after each prompt, the end token "
        "after each answer; auto: chat if the tokenizer has a template",
    )
    chat_template_kwargs: Options = Field(
        {},
        description="Arguments of the chat template, such as {enable_thinking: false}; the same in training, evaluation and "
        "generation. A row's own column chat_template_kwargs is added to them",
    )
    train_on: Literal["auto", "completions", "assistant", "all"] = Field(
        "auto",
        description="Tokens that contribute to the loss. completions: the completion, or the last turn of the assistant; "
        "assistant: all turns of the assistant; all: every token; auto: completions where rows have one, else assistant",
    )
    box_format: Literal["auto", "xywh", "xyxy", "cxcywh"] = Field(
        "auto",
        description="Numbers of a box, for task: object-detection. xywh: left, top, width and height in pixels, as in COCO; "
        "xyxy: left, top, right and bottom in pixels, as in Pascal VOC; cxcywh: center, width and height as shares of the "
        "image, as in YOLO; auto: xywh, refused where the boxes do not fit",
    )
    class_names: list[str] = Field(
        [], description="Names of classes that are numbers in the data, from 0, for task: object-detection"
    )
    max_length: int = Field(1024, ge=8, description="Maximum number of tokens of an example")
    overflow: Literal["truncate", "split", "drop", "error"] = Field(
        "truncate", description="What to do with longer examples; split: they become several, and no supervised token is lost"
    )

    streaming: bool = Field(
        False,
        description="Read and tokenize rows while training, file after file, again from the beginning where they end; "
        "needs training.max_steps, and eval, eval_split or a whole number as eval_size",
    )
    shuffle_buffer: int = Field(
        SHUFFLE_BUFFER,
        ge=1,
        description="With streaming: so many rows of a source are read ahead and shuffled together, and the files of a source "
        "are in random order; 1: rows stay in order",
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error",
        description="With streaming, a row that cannot be read. error: the run ends and names it; skip: it is left out and "
        "counted",
    )

    def of(self, source: Source, name: str) -> Any:
        """The value of a source's key, or that of the `data` section where it is unset."""
        value = getattr(source, name)
        return getattr(self, name) if value is None else value

    def drawn_by(self, seed: int) -> int:
        """The seed that selects the held-out examples in a run with this seed."""
        return seed if self.eval_seed is None else self.eval_seed

    @field_serializer("train", "eval")
    def _short(self, value: list[Source] | None) -> Any:
        """As it would be written by hand."""
        short = [s.path if s.model_fields_set == {"path"} else s.model_dump(exclude_unset=True) for s in value or []]
        return (short[0] if len(short) == 1 and isinstance(short[0], str) else short) if value else None

    @model_validator(mode="after")
    def _evaluation_has_one_source(self) -> Data:
        if self.eval_split and self.eval:
            raise ValueError("eval_split: both eval and eval_split are given; remove one of them")
        if self.documents == "files" and self.eval_size >= 1 and not (self.eval or self.eval_split or self.streaming):
            raise ValueError("eval_size: with documents: files a share of the text is held out; expected a number below 1")
        if any(source.weight != 1 for source in self.eval or []):
            raise ValueError("eval: each example is evaluated once; remove weight")
        return self

    @model_validator(mode="after")
    def _streams(self) -> Data:
        if not self.streaming:
            for key, default in (("shuffle_buffer", SHUFFLE_BUFFER), ("bad_rows", "error")):
                if getattr(self, key) != default:
                    raise ValueError(f"{key}: only used with data.streaming: true; set it, or remove this key")
            return self
        if self.documents == "files":
            raise ValueError("documents: with data.streaming an example is a row, not a file; remove one of the two")
        if self.eval_seed is not None:
            raise ValueError("eval_seed: with data.streaming no rows are drawn: the first ones are held out; remove it")
        if not (self.eval or self.eval_split or self.eval_size >= 1):
            raise ValueError(
                f"eval_size: {self.eval_size:g} is a share, and with data.streaming the number of rows is unknown; give a "
                "number of rows, such as 500 (the first ones are held out), or set data.eval or data.eval_split"
            )
        for source in self.train:
            split = self.of(source, "split")
            if "[" in split or "+" in split:
                raise ValueError(f"split: {split}: with data.streaming there are no slices and sums of splits; name one split")
        return self
