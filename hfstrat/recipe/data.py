"""The recipe's `data:` section: which rows to train on, and how they become tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, model_validator

from hfstrat.recipe.section import Section

Format = Literal[
    "auto", "text", "prompt-completion", "alpaca", "messages", "conversations", "text-classification", "regression"
]
_PART = r"\w[\w.-]*(\[(-?\d+%?)?:(-?\d+%?)?\])?"


def _readable_split(value: str) -> str:
    if not re.fullmatch(rf"{_PART}(\+{_PART})*", value):
        raise ValueError("a split such as train, train[:10%], train[100:] or train+validation is expected")
    return value


Split = Annotated[str, AfterValidator(_readable_split)]


class Source(Section):
    """One source of rows. What it leaves open is as `data` says.

    A weight is how often each row is seen in one epoch: 2 is twice, 0.5 is one half of the rows, 2.5 is every row twice
    and one half of them a third time. Which rows make up such a half is drawn once, by the recipe's seed: it is the same
    in every epoch. Rows are held out for evaluation before weights apply, and stand there once.
    """

    path: str = Field(min_length=1, description="File, folder, glob or Hub id")
    weight: float = Field(1.0, gt=0, le=1000, description="How often each of its rows is seen in one epoch")
    format: Format | None = Field(None, description="What a row is, if not as data.format says")
    columns: dict[str, str] | None = Field(None, description="Their name for our name, if not as data.columns says")
    config: str | None = Field(None, description="Configuration name of this Hub data set, if not data.config")
    split: Split | None = Field(None, description="Split of this Hub data set or folder, if not as data.split says")
    revision: str | None = Field(None, description="Branch, tag or commit of this Hub data set, if not data.revision")


def _as_list(value: Any) -> Any:
    """`train: rows.jsonl` is [{path: rows.jsonl}]."""
    if value is None or isinstance(value, Source):
        return value if value is None else [value]
    if not isinstance(value, str | list | dict):
        raise ValueError("text is expected, in quotes where it looks like a number: a file, folder, glob or Hub id")
    if value == []:
        raise ValueError("at least one file, folder, glob or Hub id is expected")
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source])]
MaybeSources = Annotated[
    list[Source] | None, BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source] | None)
]


class Data(Section):
    """Which rows to train on, and how they become tokens.

    Rows are read one after another and tokenised once, onto the disk (`$HFSTRAT_CACHE`, see `hfstrat cache ls`), from where
    training reads them: they may be more than fits into memory, which holds some 20 bytes for each row.
    """

    train: Sources = Field(
        description="File (.jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt, also .gz), folder, glob or Hub id; or a list, "
        "each one of these or {path, weight, format, columns, config, split, revision}"
    )
    eval: MaybeSources = Field(None, description="The same, for evaluation; if not given, rows of train are held out")
    eval_size: int | float = Field(0.05, gt=0, description="Rows to hold out, below 1 a share (never more than 1000)")
    eval_seed: int | None = Field(
        None, ge=0, description="Seed of the draw of the rows to hold out; default: seed, so that another seed holds out others"
    )
    config: str | None = Field(None, description="Configuration name of a Hub data set")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub data set")
    split: Split = Field("train", description="Split to train on, such as train or, of a Hub data set, train[:10%]")
    eval_split: Split | None = Field(None, description="Split to evaluate on, of the same Hub data set or folder")
    format: Format = Field("auto", description="What a row is; auto: told from its columns")
    documents: Literal["lines", "files"] = Field(
        "lines",
        description="What a document of a .txt is: a line that is not blank, or the whole file (overflow: split cuts it, and "
        "the last eval_size of each file is held out in one piece)",
    )
    columns: dict[str, str] = Field({}, description="Their name for our name, such as {response: completion}")
    template: str = Field(
        "auto",
        min_length=1,
        description="chat: the tokenizer's chat template; a .jinja file; plain: a blank line after each prompt, the end token "
        "after each answer; auto: chat if there is one",
    )
    train_on: Literal["auto", "completions", "assistant", "all"] = Field(
        "auto",
        description="Which tokens carry loss. completions: the completion, or the last turn of the assistant; assistant: all "
        "turns of the assistant; all: everything; auto: completions where rows have one, else assistant",
    )
    max_length: int = Field(1024, ge=8, description="Tokens per row, at most")
    overflow: Literal["truncate", "split", "drop", "error"] = Field(
        "truncate", description="What happens to longer rows; split: they become several, and no supervised token is lost"
    )

    def of(self, source: Source, name: str) -> Any:
        """What a source says, or what `data` says for all of them."""
        value = getattr(source, name)
        return getattr(self, name) if value is None else value

    def drawn_by(self, seed: int) -> int:
        """The seed by which rows are held out, in a run with this one."""
        return seed if self.eval_seed is None else self.eval_seed

    @field_serializer("train", "eval")
    def _short(self, value: list[Source] | None) -> Any:
        """As it would be written by hand."""
        short = [s.path if s.model_fields_set == {"path"} else s.model_dump(exclude_unset=True) for s in value or []]
        return (short[0] if len(short) == 1 and isinstance(short[0], str) else short) if value else None

    @model_validator(mode="after")
    def _evaluation_has_one_source(self) -> Data:
        if self.eval_split and self.eval:
            raise ValueError("eval_split: give eval or eval_split, not both")
        if self.documents == "files" and self.eval_size >= 1 and not (self.eval or self.eval_split):
            raise ValueError("eval_size: with documents: files a share of the text is held out; give a number below 1")
        if any(source.weight != 1 for source in self.eval or []):
            raise ValueError("eval: rows are evaluated once each; remove weight")
        return self
