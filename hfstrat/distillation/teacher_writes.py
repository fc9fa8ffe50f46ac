"""Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the teacher writes the answers that the student is
fine-tuned on. It writes in blocks that stay on the disk, so that an interrupted run goes on with the next one.
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

from hfstrat.data import cache, shelf
from hfstrat.data.pieces import TAIL, Pieces
from hfstrat.data.render import IGNORED
from hfstrat.distillation.teacher_cache import Rows
from hfstrat.errors import UserError
from hfstrat.frozen.unchanged import digest_of_weights
from hfstrat.generation import continued
from hfstrat.together import Team

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from hfstrat.config import Recipe
    from hfstrat.data import Prepared
    from hfstrat.strategies.distill import Distill

BLOCK = 32  # rows that are written together, and kept together


def ask_to_write(strategy: Distill, data: Prepared, recipe: Recipe, tokenizer: Any, screen: Console) -> Prepared:
    """The data with the answers of the recipe's teacher. Raises UserError where it writes no text."""
    from hfstrat.distillation.teacher import different_words, load_teacher, tokenizer_of, words_of
    from hfstrat.model import compute_dtype, context_of
    from hfstrat.strategies.distill_section import TeacherModel
    from hfstrat.tasks import TASKS

    model = recipe.model
    section = strategy.teacher or TeacherModel(
        name_or_path=model.name_or_path, trust_remote_code=model.trust_remote_code, quantization=model.quantization
    )
    writer = load_teacher(section, TASKS[recipe.task], compute_dtype(model.dtype))
    if not writer.can_generate():
        raise UserError(f"strategy.level: sequence, but {section.name_or_path} writes no text; remove it")
    theirs = tokenizer_of(section)
    differs = different_words(tokenizer.get_vocab(), theirs.get_vocab(), words_of(writer))
    if differs:
        screen.print(f"{'teacher':<9} reads and writes with a tokenizer of its own ({differs}): texts are handed over")
    writer.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    length = min(recipe.data.max_length, context_of(writer) or recipe.data.max_length)
    return rewritten(data, writer, tokenizer, strategy.max_new_tokens, length, screen, theirs if differs else None)


def rewritten(
    data: Prepared,
    teacher: PreTrainedModel,
    tokenizer: Any,
    max_new_tokens: int,
    max_length: int,
    screen: Console,
    theirs: Any = None,
) -> Prepared:
    """The data whose training rows end with what the teacher says, greedily, to what stands before their last answer.

    Args:
        max_new_tokens: of an answer; one that is longer ends without the end token.
        max_length: of a row.
        theirs: the teacher's tokenizer, where it is another one.

    Raises:
        UserError: rows without a prompt.
    """
    from datasets import Dataset

    rows = Rows.of(data.train)
    prompts = [prompt_of(data.train[int(place)]) for place in rows.first]
    order = np.argsort([-len(prompt) for prompt in prompts], kind="stable")
    blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    weights, answers, built = digest_of_weights(teacher), dict[int, list[int]](), list[int]()
    options = {"max_new_tokens": max_new_tokens, "max_length": max_length, "libraries": torch.__version__}
    reader, ours = tokenizer if theirs is None else theirs, Pieces(tokenizer)
    team = Team.of_world()
    mine = blocks[team.rank :: team.size] if team.size > 1 else []
    # each process has its share written first; then all of them find (on one machine) what the others wrote
    for number, block in enumerate(_track([*mine, *blocks], screen)):
        if number == len(mine):
            team.wait()
        asked = [heard(prompts[int(one)], tokenizer, theirs) for one in block]
        name = cache.fingerprint({"teacher": weights, "prompts": asked, "end": reader.eos_token_id, **options})

        def build(target: Path, asked: list[list[int]] = asked) -> None:
            built.append(len(asked))
            room = max(1, min(max_new_tokens, max_length - max(map(len, asked))))
            table = pa.table({"answer": write_answers(teacher, asked, reader, room)})
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)

        entry = cache.fetch("answers", name, f"answers of a teacher to {len(asked)} prompts", build)
        said = pa.ipc.open_stream(pa.memory_map(str(entry.path))).read_all().column("answer").to_pylist()
        shelf.let_go(entry.path)  # there may be thousands
        said = said if theirs is None else repeated(said, asked, [prompts[int(one)] for one in block], ours, theirs)
        for one, answer in zip(map(int, block), said, strict=True):
            answers[one] = answer[: max(1, max_length - len(prompts[one]))]
    made = [{"input_ids": prompts[i] + answers[i], "labels": [IGNORED] * len(prompts[i]) + answers[i]} for i in answers]
    made = [made[place] for place in np.argsort(list(answers))]
    numbers = data.train["row"]
    table = [{**made[int(i)], "length": len(made[int(i)]["input_ids"]), "row": numbers[n]} for n, i in enumerate(rows.which)]
    ended = sum(answer[-1] == tokenizer.eos_token_id for answer in answers.values())
    screen.print(
        f"{'teacher':<9} {'wrote' if built else 'wrote before: found in the cache:'} {len(answers):,} answers, "
        f"{sum(map(len, answers.values())):,} tokens; {len(answers) - ended:,} were cut at {max_new_tokens} tokens"
    )
    digest = hashlib.sha256(repr([row["input_ids"] for row in table]).encode()).hexdigest()
    lengths = np.array([row["length"] for row in table], dtype=np.int32)
    return replace(data, train=Dataset.from_list(table), lengths=lengths, order=digest)


def prompt_of(row: dict[str, Any], key: str = "level: sequence") -> list[int]:
    """The ids before a row's last answer. Raises UserError where there are none."""
    carries = np.asarray(row["labels"]) != IGNORED
    begins = np.flatnonzero(carries & ~np.concatenate([[False], carries[:-1]]))
    if not len(begins) or begins[-1] == 0 or (carries[1:].all() and len(carries) > 1):
        raise UserError(f"strategy.{key}: a row has no prompt that could be answered; give rows with prompts")
    return [int(one) for one in row["input_ids"][: int(begins[-1])]]


def heard(prompt: list[int], ours: Any, theirs: Any) -> list[int]:
    """A prompt in the teacher's tokens: the same ids, or the same text where its tokenizer is another one."""
    if theirs is None:
        return prompt
    begin = int(prompt[0] == ours.bos_token_id)  # the teacher has its own
    ids: list[int] = theirs(ours.decode(prompt[begin:], clean_up_tokenization_spaces=False))["input_ids"]
    return ids[:-1] if ids[1:] and ids[-1] == theirs.eos_token_id else ids


def repeated(
    answers: list[list[int]], asked: list[list[int]], prompts: list[list[int]], ours: Pieces, theirs: Any
) -> list[list[int]]:
    """What the teacher wrote to what it was asked, in our tokens as they go on from our prompts (`prompts`), with our end
    where it came to its end."""
    tokenizer = ours.tokenizer
    texts = [_written(answer, heard, theirs) for answer, heard in zip(answers, asked, strict=True)]
    before = [str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))[-TAIL:] for prompt in prompts]
    ended = [answer[-1:] == [theirs.eos_token_id] for answer in answers]
    made = zip(ours.ids(texts, before), ended, strict=True)
    return [ids + [tokenizer.eos_token_id] if end or not ids else ids for ids, end in made]


def _written(answer: list[int], asked: list[int], theirs: Any) -> str:
    """The answer's text as it goes on: read by itself, tokenizers such as Llama 2's take its first space away."""
    before, whole, alone = (
        str(theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (asked, asked + answer, answer)
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def write_answers(teacher: PreTrainedModel, prompts: list[list[int]], tokenizer: Any, room: int) -> list[list[int]]:
    """Greedy answers of at most `room` tokens, each with the end token where it came to its end."""
    out = continued(teacher, prompts, tokenizer, room)
    return [_until_end(answer, tokenizer.eos_token_id) for answer in out.tolist()]


def _until_end(answer: list[int], end: int | None) -> list[int]:
    return answer[: answer.index(end) + 1] if end in answer else answer


def _track(blocks: list[Any], screen: Console) -> Iterator[Any]:
    from rich.progress import track

    if screen.is_terminal:
        yield from track(blocks, "the teacher writes", console=screen, transient=True)
        return
    for number, block in enumerate(blocks):
        if number and not number % 10:
            screen.print(f"the teacher has written {number} of {len(blocks)} blocks of {BLOCK} answers")
        yield block
