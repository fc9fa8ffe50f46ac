"""Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the student is fine-tuned on answers of the teacher.

The answers are generated in blocks that are cached on disk, so an interrupted run continues with the next one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from hfstrat.data import cache
from hfstrat.data.render import IGNORED
from hfstrat.errors import UserError
from hfstrat.strategies.distill.teacher_cache import Rows
from hfstrat.strategies.distill.tokenizer_mismatch import OtherTokenizer, prompt_ids
from hfstrat.strategies.frozen.states import digest_of_weights
from hfstrat.tasks.generation import continued
from hfstrat.trainer.collective import ProcessGroup

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from hfstrat.data.prepare import PreparedData
    from hfstrat.recipe.distill import Distill
    from hfstrat.recipe.schema import Recipe

BLOCK = 32  # examples that are generated and cached together


def generate_answers(strategy: Distill, data: PreparedData, recipe: Recipe, tokenizer: Any, screen: Console) -> PreparedData:
    """The data with answers of the recipe's teacher. Raises UserError if it cannot generate text."""
    from hfstrat.models.load import compute_dtype, context_of
    from hfstrat.recipe.distill import TeacherModel
    from hfstrat.strategies.distill.teacher import load_teacher, tokenizer_of, vocabulary_size
    from hfstrat.tasks import TASKS

    model = recipe.model
    section = strategy.teacher or TeacherModel(
        name_or_path=model.name_or_path, trust_remote_code=model.trust_remote_code, quantization=model.quantization
    )
    writer = load_teacher(section, TASKS[recipe.task], compute_dtype(model.dtype))
    if not writer.can_generate():
        raise UserError(f"strategy.seq_kd: true, but {section.name_or_path} cannot generate text; remove it")
    context = context_of(writer)
    foreign = OtherTokenizer.detect(
        tokenizer, tokenizer_of(section), vocabulary_size(writer), data.renderer, recipe.data, context
    )
    if foreign:
        screen.print(f"{'teacher':<9} {foreign.line}")
    writer.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    length = min(recipe.data.max_length, context or recipe.data.max_length)
    return replace_answers(data, writer, tokenizer, strategy.max_new_tokens, length, screen, foreign)


def replace_answers(
    data: PreparedData,
    teacher: PreTrainedModel,
    tokenizer: Any,
    max_new_tokens: int,
    max_length: int,
    screen: Console,
    foreign: OtherTokenizer | None = None,
) -> PreparedData:
    """The data with the last answer of each training example replaced by the teacher's, generated greedily.

    Args:
        max_new_tokens: of an answer; a longer one is cut and has no end token.
        max_length: of an example.
        foreign: converts prompts and answers, if the teacher has another tokenizer or chat template.

    Raises:
        UserError: examples without a prompt.
    """
    rows = Rows.of(data.train)
    prompts = [prompt_ids(data.train[int(place)]) for place in rows.first]
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    weights, answers, built = digest_of_weights(teacher), dict[int, list[int]](), list[int]()
    reader, reach = (foreign.theirs, foreign.reach) if foreign else (tokenizer, max_length)
    asks = foreign.prompts(data.train, rows.first, prompts) if foreign else prompts
    options = {"max_new_tokens": max_new_tokens, "max_length": reach, "libraries": torch.__version__}
    group = ProcessGroup.current()
    mine = blocks[group.rank :: group.size] if group.size > 1 else []
    # each process first generates its share; then all of them load (on one machine) what the others generated
    for number, block in enumerate(_track([*mine, *blocks], screen)):
        if number == len(mine):
            group.wait()
        asked = [asks[int(one)] for one in block]
        name = cache.fingerprint({"teacher": weights, "prompts": asked, "end": reader.eos_token_id, **options})

        def build(target: Path, asked: list[list[int]] = asked) -> None:
            built.append(len(asked))
            room = max(1, min(max_new_tokens, reach - max(map(len, asked))))
            table = pa.table({"answer": write_answers(teacher, asked, reader, room)})
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)

        entry = cache.fetch("answers", name, f"answers of a teacher to {len(asked)} prompts", build)
        said = pa.ipc.open_stream(pa.memory_map(str(entry.path))).read_all().column("answer").to_pylist()
        cache.release(entry.path)  # there may be thousands of entries
        said = foreign.answers(said, asked, [prompts[int(one)] for one in block]) if foreign else said
        for one, answer in zip(map(int, block), said, strict=True):
            answers[one] = answer[: max(1, max_length - len(prompts[one]))]
    ended = sum(answer[-1] == tokenizer.eos_token_id for answer in answers.values())
    screen.print(
        f"{'teacher':<9} {'generated' if built else 'loaded from the cache:'} {len(answers):,} answers, "
        f"{sum(map(len, answers.values())):,} tokens; {len(answers) - ended:,} cut at {max_new_tokens} tokens"
    )
    return _with_answers(data, rows, prompts, answers)


def _with_answers(data: PreparedData, rows: Rows, prompts: list[list[int]], answers: dict[int, list[int]]) -> PreparedData:
    """The data with these answers, by the index of the distinct example."""
    from datasets import Dataset

    made = [
        {"input_ids": prompts[i] + answers[i], "labels": [IGNORED] * len(prompts[i]) + answers[i]} for i in range(len(prompts))
    ]
    numbers = data.train["row"]
    table = [{**made[int(i)], "length": len(made[int(i)]["input_ids"]), "row": numbers[n]} for n, i in enumerate(rows.which)]
    digest = hashlib.sha256(repr([row["input_ids"] for row in table]).encode()).hexdigest()
    lengths = np.array([row["length"] for row in table], dtype=np.int32)
    return replace(data, train=Dataset.from_list(table), lengths=lengths, order=digest)


def write_answers(teacher: PreTrainedModel, prompts: list[list[int]], tokenizer: Any, room: int) -> list[list[int]]:
    """Greedy answers of at most `room` tokens, with the end token if they are complete."""
    out = continued(teacher, prompts, tokenizer, room)
    return [_until_end(answer, tokenizer.eos_token_id) for answer in out.tolist()]


def _until_end(answer: list[int], end: int | None) -> list[int]:
    return answer[: answer.index(end) + 1] if end in answer else answer


def _track(blocks: list[Any], screen: Console) -> Iterator[Any]:
    from rich.progress import track

    if screen.is_terminal:
        yield from track(blocks, "generating answers", console=screen, transient=True)
        return
    for number, block in enumerate(blocks):
        if number and not number % 10:
            screen.print(f"the teacher has generated {number} of {len(blocks)} blocks of {BLOCK} answers")
        yield block
