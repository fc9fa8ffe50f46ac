"""Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947): the student is fine-tuned on answers of the teacher.

The answers are generated in blocks that are cached on disk, so an interrupted run continues with the next one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from transformers import PreTrainedModel

from hfstrat.data import cache
from hfstrat.data.prepare import PreparedData
from hfstrat.data.render import IGNORED, Renderer
from hfstrat.data.segments import TAIL, SegmentTokenizer
from hfstrat.errors import UserError
from hfstrat.recipe.data import Data
from hfstrat.recipe.distill import Distill
from hfstrat.recipe.format import plural
from hfstrat.recipe.schema import Recipe
from hfstrat.strategies.distill.teacher_cache import Rows
from hfstrat.tasks.generation import continued
from hfstrat.trainer.cached_columns import digest_of_weights, groups_of, read_column, write_column
from hfstrat.trainer.collective import ProcessGroup

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
    teacher = load_teacher(section, TASKS[recipe.task], compute_dtype(model.dtype))
    if not teacher.can_generate():
        raise UserError(f"strategy.seq_kd: true, but {section.name_or_path} cannot generate text; remove it")
    context = context_of(teacher)
    foreign = OtherTokenizer.detect(
        tokenizer, tokenizer_of(section), vocabulary_size(teacher), data.renderer, recipe.data, context
    )
    if foreign:
        screen.print(f"{'teacher':<9} {foreign.line}")
    teacher.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    length = min(recipe.data.max_length, context or recipe.data.max_length)
    return replace_answers(data, teacher, tokenizer, strategy.max_new_tokens, length, screen, foreign)


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
    blocks = groups_of(order, BLOCK)
    answers, built = dict[int, list[int]](), list[int]()
    reader, longest = (foreign.theirs, foreign.context) if foreign else (tokenizer, max_length)
    requests = foreign.prompts(data.train, rows.first, prompts) if foreign else prompts
    generator = Generator(teacher, digest_of_weights(teacher), reader, max_new_tokens, longest)
    group = ProcessGroup.current()
    mine = blocks[group.rank :: group.size] if group.size > 1 else []
    # each process first generates its share; then all of them load (on one machine) what the others generated
    for number, block in enumerate(_track([*mine, *blocks], screen)):
        if number == len(mine):
            group.wait()
        given = [requests[one] for one in block]
        found = generator.answers(given, built)
        found = foreign.answers(found, given, [prompts[one] for one in block]) if foreign else found
        for one, answer in zip(block, found, strict=True):
            answers[one] = answer[: max(1, max_length - len(prompts[one]))]
    ended = sum(answer[-1] == tokenizer.eos_token_id for answer in answers.values())
    screen.print(
        f"{'teacher':<9} {'generated' if built else 'loaded from the cache:'} {plural(len(answers), 'answer')}, "
        f"{sum(map(len, answers.values())):,} tokens; {len(answers) - ended:,} cut at {max_new_tokens} tokens"
    )
    return _with_answers(data, rows, prompts, answers)


class Generator(NamedTuple):
    """A teacher that answers prompts in its own tokens: the digest of its weights, its tokenizer, the maximum number of tokens
    of an answer, and of a prompt with its answer."""

    teacher: PreTrainedModel
    weights: str
    tokenizer: Any
    max_new_tokens: int
    max_length: int

    def answers(self, prompts: list[list[int]], built: list[int]) -> list[list[int]]:
        """The answers, from the cache or generated; then their number is added to `built`."""
        inputs = {"teacher": self.weights, "prompts": prompts, "end": self.tokenizer.eos_token_id}
        inputs |= {"max_new_tokens": self.max_new_tokens, "max_length": self.max_length, "libraries": torch.__version__}

        def build(target: Path) -> None:
            built.append(len(prompts))
            room = max(1, min(self.max_new_tokens, self.max_length - max(map(len, prompts))))
            kind = pa.list_(pa.int64())
            made = pa.array(write_answers(self.teacher, prompts, self.tokenizer, room), kind)
            write_column(target, "answer", kind, [made])

        description = f"answers of a teacher to {plural(len(prompts), 'prompt')}"
        entry = cache.fetch("answers", cache.fingerprint(inputs), description, build)
        answers: list[list[int]] = read_column(entry.path, "answer").to_pylist()
        cache.release(entry.path)  # there may be thousands of entries
        return answers


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
    answers, end = continued(teacher, prompts, tokenizer, room).tolist(), tokenizer.eos_token_id
    return [answer[: answer.index(end) + 1] if end in answer else answer for answer in answers]


def _track(blocks: list[Any], screen: Console) -> Iterator[Any]:
    from rich.progress import track

    if screen.is_terminal:
        yield from track(blocks, "generating answers", console=screen, transient=True)
        return
    for number, block in enumerate(blocks):
        if number and not number % 10:
            screen.print(f"the teacher has generated {number} of {len(blocks)} blocks of {BLOCK} answers")
        yield block


ENDLESS = 1 << 30  # tokens, for a model without a maximum context


@dataclass
class OtherTokenizer:
    """Converts prompts to the teacher's tokens, and its answers to the student's.

    Args:
        ours: the student's tokenizer.
        theirs: the teacher's.
        section: the recipe's `data`.
        context: the teacher's context, in tokens.
        line: a description of the difference.
    """

    ours: Any
    theirs: Any
    section: Data
    context: int
    line: str

    @classmethod
    def detect(
        cls, ours: Any, theirs: Any, words: int, renderer: Any, section: Data, context: int | None
    ) -> OtherTokenizer | None:
        """The conversion that is needed; None if the teacher can read the student's ids.

        Args:
            words: the number of token ids that the teacher knows.
            renderer: of the student's examples.
        """
        from hfstrat.data.prepare import options_for
        from hfstrat.strategies.distill.teacher import first_difference

        found, form = first_difference(ours.get_vocab(), theirs.get_vocab(), words), Renderer(theirs, "auto")
        own = (form.template, theirs.chat_template if form.template == "chat" else "", theirs.eos_token_id)
        if not found and own == (renderer.template, ours.chat_template if own[0] == "chat" else "", ours.eos_token_id):
            return None
        differs = f"has another tokenizer ({found})" if found else "has another format"
        how = "its own chat template" if form.template == "chat" else "the plain template, since it has no chat template"
        unread = section.chat_template_kwargs.keys() - options_for(theirs, section).keys()
        how += f", which does not read {', '.join(sorted(unread))}" if unread else ""
        line = f"{differs}: its prompts use {how}, and its answers are converted as text"
        return cls(ours, theirs, section, context or ENDLESS, line)

    def prompts(self, rows: Any, first: np.ndarray, prompts: list[list[int]]) -> list[list[int]]:
        """The teacher's ids of each prompt: the same turns of the same example in its own format, or the text of the prompt if
        the example was split into pieces without such a turn.

        Args:
            rows: the student's training examples.
            first: the indices of the distinct ones, in the order of the source.
            prompts: their ids before the last answer.

        Raises:
            UserError: a prompt is longer than the teacher's context, or its template cannot render an example.
        """
        theirs, numbers = self._turns(), [int(number) for number in np.asarray(rows["row"])[first]]
        answers = [len(answer_starts(rows[int(place)]["labels"])) for place in first]
        pieces, total, passed = Counter(numbers), Counter[int](), Counter[int]()
        for number, count in zip(numbers, answers, strict=True):
            total[number] += count
        found = []
        for number, count, prompt in zip(numbers, answers, prompts, strict=True):
            passed[number] += count
            turns = theirs(number)
            same = total[number] == len(turns) or (pieces[number] == 1 and count < len(turns))  # else it was split into pieces
            found.append(turns[passed[number] - 1] if same else retokenize_prompt(prompt, self.ours, self.theirs))
        longest = max(map(len, found))
        if longest >= self.context:
            raise UserError(
                f"strategy.teacher: its context is {self.context:,} tokens, and a prompt has {longest:,} tokens in its format; "
                "use another teacher, or shorter prompts"
            )
        return found

    def _turns(self) -> Callable[[int], list[list[int]]]:
        """A function from the number of a source row to the ids before each of its answers."""
        from hfstrat.data.prepare import prepare_untruncated

        try:
            made = prepare_untruncated(self.section, self.theirs)
        except UserError as error:
            raise UserError(f"strategy.teacher: the data cannot be rendered in the format of the teacher: {error}") from error
        table, all_numbers = made.dataset(), made.take(made.row)  # in ascending order

        def turns(number: int) -> list[list[int]]:
            begin, end = np.searchsorted(all_numbers, [number, number + 1])
            pieces = [table[place] for place in range(int(begin), int(end))]
            return [piece["input_ids"][:begin] for piece in pieces for begin in answer_starts(piece["labels"])]

        return turns

    def answers(self, answers: list[list[int]], requests: list[list[int]], prompts: list[list[int]]) -> list[list[int]]:
        return retokenize_answers(answers, requests, prompts, SegmentTokenizer(self.ours), self.theirs)


def answer_starts(labels: Any) -> list[int]:
    """The positions where answers begin: the first of each span of supervised labels."""
    carries = np.asarray(labels) != IGNORED
    return [int(place) for place in np.flatnonzero(carries & ~np.concatenate([[False], carries[:-1]]))]


def prompt_ids(row: dict[str, Any], key: str = "seq_kd: true") -> list[int]:
    """The ids before the last answer of an example. Raises UserError if there are none."""
    carries, begins = np.asarray(row["labels"]) != IGNORED, answer_starts(row["labels"])
    if not begins or begins[-1] == 0 or (carries[1:].all() and len(carries) > 1):
        raise UserError(f"strategy.{key}: an example has no prompt to answer; expected examples with prompts")
    return [int(one) for one in row["input_ids"][: begins[-1]]]


def retokenize_prompt(prompt: list[int], ours: Any, theirs: Any) -> list[int]:
    """A prompt's text in the teacher's tokens."""
    begin = int(prompt[0] == ours.bos_token_id)  # the teacher adds its own
    ids: list[int] = theirs(ours.decode(prompt[begin:], clean_up_tokenization_spaces=False))["input_ids"]
    return ids[:-1] if ids[1:] and ids[-1] == theirs.eos_token_id else ids


def retokenize_answers(
    answers: list[list[int]], requests: list[list[int]], prompts: list[list[int]], ours: SegmentTokenizer, theirs: Any
) -> list[list[int]]:
    """The teacher's answers in the student's tokens, as they continue the student's `prompts`, with the student's end token
    if they are complete."""
    tokenizer = ours.tokenizer
    texts = [_answer_text(answer, before, theirs) for answer, before in zip(answers, requests, strict=True)]
    before = [str(tokenizer.decode(prompt, clean_up_tokenization_spaces=False))[-TAIL:] for prompt in prompts]
    ended = [answer[-1:] == [theirs.eos_token_id] for answer in answers]
    made = zip(ours.ids(texts, before), ended, strict=True)
    return [ids + [tokenizer.eos_token_id] if end or not ids else ids for ids, end in made]


def _answer_text(answer: list[int], prompt: list[int], theirs: Any) -> str:
    """The text of an answer after its prompt: decoded alone, tokenizers such as Llama 2's remove its first space."""
    before, whole, alone = (
        str(theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in (prompt, prompt + answer, answer)
    )
    return whole[len(before) :] if whole.startswith(before) else alone
