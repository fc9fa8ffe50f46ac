"""Where the answers of a conversation are in its rendering.

The positions are found by rendering the chat template up to each message and taking the difference. An answer is what the
template adds to the prompt that `generate` reads, so that both have the same ids. Three kinds of templates need more care:

- Some render a turn differently once more turns follow: Qwen3 writes an empty `<think>` before an answer without reasoning in
  the last turn only, and many omit the reasoning of earlier turns. A trained answer is then the last turn of its own row.
- Some begin an answer in the generation prompt (`<think>`) and render the finished turn differently: with other white space or
  without its reasoning. The answer is then joined to the prompt. If it does not begin as the prompt does, it is trained from
  their longest common prefix, and the run reports it.
- Some write no end after an answer: the mark of the next turn is its end, as in GLM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hfstrat.data.chat_template import ChatTemplate
from hfstrat.data.messages import Message
from hfstrat.data.segments import Segment
from hfstrat.data.values import BadRow

ApplyTemplate = Callable[[Sequence[Message], bool], str]  # messages as text; True adds the generation prompt
Spans = dict[int, tuple[int, int]]  # by the index of a message: start and end of the turn, its end token included
MARK_LENGTH = 64  # characters: more than any special token has
OPEN_TAG = re.compile(r"<[^<>\s]*$")


class Answer(NamedTuple):
    """An answer and the prompt before it. `unopened` is the end of the generation prompt with which it does not begin."""

    prompt: str
    text: str
    unopened: str = ""


class Rows(NamedTuple):
    """The rows of a conversation; `unopened` has an entry per answer that does not begin as the generation prompt ends, and
    `skipped` is the number of answers that the template cannot render without the turns after them."""

    segments: list[list[Segment]]
    unopened: list[str]
    skipped: int = 0


class Locator:
    """Finds the answers of one conversation.

    Args:
        apply: renders messages of this conversation, with its tools.
    """

    def __init__(self, template: ChatTemplate, apply: ApplyTemplate, messages: Sequence[Message]) -> None:
        self.template, self.apply, self.messages = template, apply, messages
        self.found: dict[int, Answer | None] = {}
        self.first_user = next((index for index, message in enumerate(messages) if message["role"] == "user"), len(messages))

    def rows(self, trained: set[int], train_all: bool = False) -> Rows:
        """The conversation as one row; or as one row per trained turn, each up to the end of that turn, if some of these turns
        are not rendered in the same way once more turns follow.

        Args:
            trained: indices of the messages with loss.
            train_all: every token has loss, so that no positions are needed.

        Raises:
            BadRow: the template rewrites what precedes an answer as soon as the answer is present.
        """
        rendered, last = self.apply(self.messages, False), len(self.messages) - 1
        spans = self._spans(self.messages, rendered, is_last=True)
        skipped = {index for index in trained if self.found.get(index, ...) is None}
        if last in spans and spans[last][1] == len(rendered) and (train_all or last in trained):
            rendered += self._next_mark(last)
            spans[last] = spans[last][0], len(rendered)
        if train_all and (last in spans or self.messages[last]["role"] != "assistant" or last in skipped):
            return Rows([self._cut(rendered, spans, trained, True)], [], 0)
        wanted = sorted(trained - skipped) if not train_all else [last]
        unopened = [answer.unopened for index in wanted if (answer := self._answer(index)) and answer.unopened]
        if not train_all and trained - skipped <= spans.keys():
            return Rows([self._cut(rendered, spans, trained)], unopened, len(skipped))
        return Rows([self._row_until(index, train_all) for index in wanted], unopened, len(skipped))

    def prompt(self, train_all: bool = False) -> list[Segment]:
        """What precedes the next assistant turn, cut at the same positions as in the row that contains this turn."""
        rendered = self.apply(self.messages, True)
        return self._cut(rendered, self._spans(self.messages, rendered), set(), train_all)

    def _row_until(self, index: int, train_all: bool) -> list[Segment]:
        """The row up to the end of one answer, which alone has loss."""
        answer = self._answer(index)
        assert answer
        end = self._next_mark(index)
        spans = self._spans(self.messages[:index], self.apply(self.messages[:index], True)) if index else {}
        spans = {one: span for one, span in spans.items() if span[1] <= len(answer.prompt)}
        text = answer.prompt + answer.text + end
        return self._cut(text, {**spans, index: (len(answer.prompt), len(text))}, {index}, train_all)

    def _next_mark(self, index: int) -> str:
        """What ends an answer that nothing follows, if the template writes no end."""
        return self.template.next_marks["tool_calls" in self.messages[index]]

    def _spans(self, messages: Sequence[Message], rendered: str, is_last: bool = False) -> Spans:
        """The assistant turns that are rendered as they would be with nothing after them.

        Args:
            is_last: nothing follows the last message in `rendered`.
        """
        spans: Spans = {}
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            last = is_last and index + 1 == len(messages)
            answer = self._answer(index, rendered if last else None)
            if answer is None or len(answer.prompt) < done:
                continue
            end = len(answer.prompt) + len(answer.text)
            if rendered.startswith(answer.prompt) and rendered.startswith(answer.text, len(answer.prompt)):
                mark = self._mark_at(rendered, end) if self._next_mark(index) else ""
                spans[index] = len(answer.prompt), end + len(mark)
                done = end + len(mark)
        return spans

    def _mark_at(self, rendered: str, end: int) -> str:
        found = self.template.mark.match(rendered, end)
        return found.group() if found else ""

    def _answer(self, index: int, after: str | None = None) -> Answer | None:
        """The answer at this index; None if the template cannot render it without what follows.

        Args:
            after: the rendering up to its end, if it is known.
        """
        if index not in self.found:
            self.found[index] = self._locate(index, after)
        return self.found[index]

    def _locate(self, index: int, after: str | None) -> Answer | None:
        messages = self.messages
        if index <= self.first_user:  # the assistant speaks first, which some templates do not render alone
            try:
                after = self.apply(messages[: index + 1], False) if after is None else after
            except Exception:
                if index + 1 == len(messages):
                    raise
                return None
            before = self._opened_by(index, after)
        else:
            before = self.apply(messages[:index], True)
            after = self.apply(messages[: index + 1], False) if after is None else after
        if after.startswith(before):
            return Answer(before, after[len(before) :])
        return self._joined(index, before, after)

    def _opened_by(self, index: int, after: str) -> str:
        """The prompt of an answer that no user turn precedes: up to the generation prompt in its rendering."""
        opening, messages = self.template.opening, self.messages
        try:
            before = self.apply(messages[:index], True) if index else ""
            if before and after.startswith(before):
                return before
        except Exception:  # there is no such prompt
            pass
        for length in range(len(opening), 3, -1):
            if (place := after.rfind(opening[:length])) >= 0:
                return after[:place] + opening
        return after[: max(0, after.find(str(messages[index]["content"]).strip()))]

    def _joined(self, index: int, before: str, after: str) -> Answer:
        """An answer whose prompt is not how its rendering begins."""
        same = _length_in_common(before, after)
        if not before[same:].strip():
            return Answer(before, after[same:])
        common = _common_prefix(before, after, self.template)
        tail, rest = before[len(common) :], after[len(common) :]
        content = str(self.messages[index]["content"]).lstrip()
        opens = tail.strip()
        if opens and content.startswith(opens) and (end := _after_content(rest, content)) is not None:
            written = content[len(opens) :]
            return Answer(before, written.removeprefix(tail[len(tail.rstrip()) :]) + end)
        if index:
            plain = self.apply(self.messages[:index], False)
            if len(common) < len(_common_prefix(plain, before, self.template)):
                raise BadRow(
                    f"the chat template renders the turns before message {index + 1} differently once that message follows, so "
                    "its tokens cannot be located; set data.template to another template, data.chat_template_kwargs, or "
                    "data.train_on: all"
                )
        return Answer(common, rest, tail)

    @staticmethod
    def _cut(rendered: str, spans: Spans, trained: set[int], train_all: bool = False) -> list[Segment]:
        segments: list[Segment] = []
        done = 0
        for index, (start, end) in spans.items():
            segments.append(Segment(rendered[done:start], train_all))
            segments.append(Segment(rendered[start:end], train_all or index in trained))
            done = end
        return [segment for segment in [*segments, Segment(rendered[done:], train_all)] if segment.text]


def _length_in_common(one: str, two: str) -> int:
    """The length of the longest common prefix of two texts."""
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == two[low:middle] else (low, middle - 1)
    return low


def _common_prefix(one: str, two: str, template: ChatTemplate) -> str:
    """The longest common prefix of two texts that cuts no special token or tag."""
    common = _length_in_common(one, two)
    for text in (one, two):
        for place in range(max(0, common - MARK_LENGTH), common):
            found = template.mark.match(text, place)
            if found and found.end() > common:
                common = place
                break
    if unfinished := OPEN_TAG.search(one[:common]):
        common = unfinished.start()
    return one[:common]


def _after_content(rest: str, content: str) -> str | None:
    """What the template writes after the content of an answer of which it left out the reasoning; None if it did not."""
    said = content.rpartition("</think>")[2]
    if said == content:
        return None
    for part in (said, said.lstrip("\n"), said.strip()):
        if rest.startswith(part):
            return rest[len(part) :]
    return None
