"""Bad recipes whose data are read while training; a part of the corpus in `bad_recipes`."""

from __future__ import annotations

import json

from bad_recipes import COMMAND, EVAL_SIZE, GOOD_ROW, STEPS, TRAIN, Bad, at, rows

STREAM = ["data.streaming=true"]
PAIR = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})


def streamed(name: str, line: int, text: str, message: list[str], where: str | None = None, **more: object) -> Bad:
    """The sound recipe, streamed, with another line; `where` is the place of the message if it is not that line."""
    overrides = [*STREAM, *more.pop("overrides", [])]  # type: ignore[misc]  # a list
    return Bad(name, where or at(line), message, {line: text}, overrides=overrides, **more)  # type: ignore[arg-type]


def beside(name: str, override: str, message: list[str], **more: object) -> Bad:
    """The sound recipe, streamed, with one more override."""
    overrides = [*STREAM, override, *more.pop("overrides", [])]  # type: ignore[misc]  # a list
    return Bad(name, COMMAND, message, overrides=overrides, **more)  # type: ignore[arg-type]


def unstreamed(name: str, override: str, message: list[str]) -> Bad:
    return Bad(name, COMMAND, message, overrides=[override])


STREAMING = [
    unstreamed("a shuffle buffer without a stream", "data.shuffle_buffer=100", ["data.shuffle_buffer", "streaming: true"]),
    unstreamed("bad rows without a stream", "data.bad_rows=skip", ["data.bad_rows", "only used with data.streaming"]),
    beside("an empty shuffle buffer", "data.shuffle_buffer=0", ["data.shuffle_buffer = 0", "at least 1"]),
    beside("a rule for bad rows that is none", "data.bad_rows=ignore", ["data.bad_rows", "error, skip"]),
    unstreamed("a stream in words", "data.streaming=often", ["data.streaming", "true or false"]),
    streamed("a stream without a length", STEPS, "  optim: sgd", ["training.max_steps: not given", "data.streaming"], at(8)),
    streamed("a stream in epochs", STEPS, "  num_train_epochs: 2", ["training.max_steps: not given"], at(8)),
    beside("a stream in steps and epochs", "training.num_train_epochs=2", ["training.num_train_epochs: 2", "remove it"]),
    streamed("a stream by the clock alone", STEPS, "  max_time: 10min", ["training.max_steps: not given"], at(8)),
    streamed("a share of a stream", EVAL_SIZE, "  eval_size: 0.1", ["data.eval_size", "0.1 is a share", "data.eval_split"]),
    streamed("nothing to evaluate a stream on", EVAL_SIZE, "  max_length: 64", ["eval_size", "such as 500"], at(5)),
    beside("a draw from a stream", "data.eval_seed=3", ["data.eval_seed", "the first ones are held out"]),
    streamed(
        "a stream of files as documents",
        TRAIN,
        "  train: rows.txt",
        ["data.documents", "an example is a row"],
        COMMAND,
        overrides=["data.documents=files"],
        files={"rows.txt": "a\nb\n" * 9},
    ),
    streamed("a slice of a stream", TRAIN, "  train: me/set\n  split: 'train[:10%]'", ["data.split", "no slices"], at(7)),
    beside("a packed stream", "training.packing=true", ["training.packing: true", "lengths of later rows are unknown"]),
    beside(
        "a densely packed stream",
        "training.packing=dense",
        ["training.packing: dense", "lengths of later rows are unknown"],
        overrides=["training.global_batch_tokens=4096"],
    ),
    beside(
        "a stream grouped by length",
        "training.train_sampling_strategy=group_by_length",
        ["training.train_sampling_strategy: group_by_length", "data.shuffle_buffer"],
    ),
    beside(
        "workers of a stream",
        "training.extra.dataloader_num_workers=2",
        ["training.extra.dataloader_num_workers: 2", "remove it"],
    ),
    beside(
        "cached states of a stream",
        "strategy={name: partial, last_n_layers: 1, precompute: true}",
        ["strategy.precompute: true", "data.streaming"],
    ),
    beside("a head on a stream", "strategy=head", ["strategy.name: head", "features of all examples", "data.streaming"]),
    beside(
        "a teacher of a stream",
        "strategy={name: distill, teacher: model, student: full}",
        ["strategy.name: distill", "the teacher", "data.streaming"],
    ),
    Bad(
        "a tokenizer from a stream",
        COMMAND,
        ["strategy.tokenizer", "model.tokenizer", "data.streaming"],
        overrides=[*STREAM, "strategy={name: scratch, model_type: llama, tokenizer: {vocab_size: 300}}", "model={}"],
    ),
    beside(
        "classes of a stream",
        "task=text-classification",
        ["data.streaming", "task text-classification", "expected task causal-lm"],
        files=rows(*[json.dumps({"text": "a", "label": "b"})] * 8),
    ),
    beside(
        "preferences of a stream",
        "objective=dpo",
        ["data.streaming", "objective dpo", "objective sft"],
        files=rows(*[PAIR] * 8),
    ),
    Bad(
        "prompts of a stream",
        COMMAND,
        ["data.streaming", "objective grpo"],
        overrides=[*STREAM, "objective={name: grpo, rewards: json_valid}"],
        files=rows(*[json.dumps({"prompt": "a"})] * 8),
    ),
    Bad("a bad row of a stream", at(TRAIN), ["rows.jsonl:2: ", "not valid JSON"], overrides=STREAM, files=rows(GOOD_ROW, "{")),
    Bad(
        "a stream of bad rows alone",
        at(TRAIN),
        ["rows.jsonl", "it has no rows"],
        overrides=[*STREAM, "data.bad_rows=skip"],
        files=rows("{", "["),
    ),
    streamed("a stream that is not there", TRAIN, "  train: row.jsonl", ["data.train: row.jsonl", "did you mean rows.jsonl?"]),
]
