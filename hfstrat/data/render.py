"""An example as token ids and labels. Masks are by position: the value of a token never decides.

A conversation is cut into segments where an assistant turn begins and ends (`answers`). Segments are tokenized separately, each
as the continuation of the one before, and joined: the prompt has the same ids in training as when `generate` reads it.

The plain template, for models without a chat template: a blank line follows each turn that is not the assistant's, the end
token follows each assistant turn. It writes no role names; the end token marks the change of speaker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from hfstrat.data.answers import Locator
from hfstrat.data.chat_template import TEMPLATES as TEMPLATES
from hfstrat.data.chat_template import ChatTemplate, check_template, options_of, tools_as_text
from hfstrat.data.coverage import Coverage, Notes
from hfstrat.data.formats import Example
from hfstrat.data.messages import Message, is_blank, with_reasoning
from hfstrat.data.segments import TAIL, Rendered, Segment, SegmentTokenizer
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss
RENDER_VERSION = 3  # of the ids and labels produced here: increase it where they change, so that cached rows are not reused
DIFFERENCE_CONTEXT = 20  # characters shown on both sides of a difference

Found = TypeVar("Found")


class Renderer:
    """Renders examples for one tokenizer and one template.

    Args:
        tokenizer: receives the template of a file as its own, so that it is saved with the result.
        template: `chat` (the tokenizer's own), `plain`, `auto` (chat if the tokenizer has one), or the path of a jinja file.
        train_on: which tokens have loss, always with the end of each turn. `completions`: what answers the prompt, which is
            the completion where rows have one, and the last assistant turn of a conversation (TRL's `completion_only_loss`
            where defined there). `assistant`: every assistant turn, also those in a prompt (TRL's `assistant_only_loss`).
            `all`: everything. `auto`: completions where rows have a completion, assistant for conversations.
        options: arguments of the chat template (`data.chat_template_kwargs`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        train_on: str = "auto",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if template not in TEMPLATES:
            tokenizer.chat_template = check_template(template)
            template = "chat"
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_template:
            raise UserError("data.template: chat: this tokenizer has no chat template; use plain, auto or a .jinja file")
        self.tokenizer = tokenizer
        self.template = template if template != "auto" else ("chat" if has_template else "plain")
        self.train_on = train_on
        self.continues_text = False  # trained on plain text: a prompt is the beginning of a text and is read as it is
        self.segments = SegmentTokenizer(tokenizer)
        if options and self.template == "plain":
            raise UserError("data.chat_template_kwargs: the plain template has no arguments; remove them, or set data.template")
        self.chat = ChatTemplate(tokenizer, options or {}) if self.template == "chat" else None
        self.coverage, self.notes = Coverage(), Notes()
        probe = tokenizer("a")["input_ids"]
        self.bos = [tokenizer.bos_token_id] if probe[:1] == [tokenizer.bos_token_id] else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    @property
    def supports_tools(self) -> bool:
        return self.chat is not None and self.chat.supports_tools

    @property
    def end_remark(self) -> str:
        """What to know about the end of answers; empty if an end token follows them."""
        return self.chat.end_remark if self.chat else ""

    @cached_property
    def options_read(self) -> list[str]:
        """The arguments that the chat template reads."""
        return options_of(self.tokenizer.chat_template) if self.chat else []

    def _own_options(self, example: Example) -> Mapping[str, Any]:
        """The example's arguments of the chat template, without those that it does not read."""
        given = example.template_kwargs
        unread = given.keys() - set(self.options_read) if given else ()
        for name in unread:
            self.notes.lose(f"chat_template_kwargs named {name}", str(given[name]))
        return {name: value for name, value in given.items() if name not in unread} if unread else given

    def render(self, example: Example) -> list[Rendered]:
        """The example as segments: one row, or several if the chat template renders trained turns differently once more turns
        follow, each up to the end of one such turn. What is left out is added to `notes`.

        Raises:
            BadRow: the template cannot render the conversation, or rewrites the prompt of a trained turn.
        """
        if example.text is not None:
            return [Rendered([Segment(example.text, True, ends=True)] if example.text else [], framed=False)]
        assert example.messages is not None
        messages, tools, options = example.messages, example.tools, self._own_options(example)
        trained = self._trained_turns(example)
        if example.has_target:
            self.notes.blank += sum(message["role"] == "assistant" and is_blank(message) for message in messages)
        rows = self._render_messages(messages, tools, trained, options, self.notes)

        def texts(words: list[Message], defined: list[Message] | None) -> list[str]:
            return [row.text for row in self._render_messages(words, defined, trained, options, Notes())]

        more = (tuple(trained), repr(options) if options else "")
        self.coverage.note(messages, tools, [row.text for row in rows], texts, more, self.notes)
        return rows

    def _trained_turns(self, example: Example) -> set[int]:
        """The indices of the messages with loss."""
        messages, after = example.messages or [], example.prompt_turns
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "completions" or (self.train_on == "auto" and after):
            answers = [index for index in answers if index >= after] if after else answers[-1:]
        return {index for index in answers if messages[index].get("weight", 1) and not is_blank(messages[index])}

    def _render_messages(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        trained: set[int],
        options: Mapping[str, Any],
        notes: Notes,
    ) -> list[Rendered]:
        turns, tools, rewritten = self._fit(messages, tools)
        if rewritten:
            notes.rewritten.update(rewritten)
        trained = _same_answers(messages, turns, trained)
        if self.chat is None:
            return [Rendered(self._render_plain(turns, trained), framed=False)]
        rows = self._located(turns, tools, options, lambda found: found.rows(trained, self.train_on == "all"))
        if rows.skipped or rows.unopened:
            notes.skipped += rows.skipped
            notes.unopened += len(rows.unopened)
            notes.unopened_by = notes.unopened_by or "".join(rows.unopened[:1])
        return [Rendered(segments, framed=True) for segments in rows.segments]

    def _fit(
        self, messages: list[Message], tools: list[Message] | None
    ) -> tuple[list[Message], list[Message] | None, Counter[str]]:
        """The conversation in a form that the template renders, its tools, and what was rewritten."""
        if self.chat is not None:
            return self.chat.fit(messages, tools)
        turns = [{**turn, "content": with_reasoning(turn)} if "reasoning_content" in turn else turn for turn in messages]
        if tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
            turns = tools_as_text(turns, tools)
        return turns, None, Counter()

    def _located(
        self,
        messages: list[Message],
        tools: list[Message] | None,
        options: Mapping[str, Any],
        find: Callable[[Locator], Found],
    ) -> Found:
        """What `find` returns for the conversation. Raises BadRow if the template fails."""
        chat = self.chat
        assert chat

        def apply(some: Sequence[Message], opens: bool) -> str:
            return chat.render(some, tools, opens, options)

        try:
            return find(Locator(chat, apply, messages))
        except BadRow:
            raise
        except Exception as error:  # jinja raises many kinds of errors, and templates their own
            first = " (it begins with the assistant)" if messages and messages[0]["role"] == "assistant" else ""
            raise BadRow(f"the chat template cannot render this conversation{first}: {error}") from error

    def _render_plain(self, messages: list[Message], trained: set[int]) -> list[Segment]:
        train_all = self.train_on == "all"
        segments: list[Segment] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                segments.append(Segment(message["content"], train_all or index in trained, ends=True))
            elif segments and not segments[-1].ends:
                segments[-1] = Segment(f"{segments[-1].text}{message['content']}\n\n", train_all)
            else:
                segments.append(Segment(f"{message['content']}\n\n", train_all))
        return segments

    def encode(self, rows: list[Rendered]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each row, by one call of the tokenizer (a few, if it puts a space before texts)."""
        return [self._join(pairs, row.framed) for row, pairs in zip(rows, self.encode_segments(rows), strict=True)]

    def encode_segments(self, rows: list[Rendered]) -> list[list[tuple[list[int], Segment]]]:
        """The segments of each row with their token ids, without end tokens and special tokens around the row."""
        texts, before = list[str](), list[str]()
        for row in rows:
            tail = ""
            for segment in row.segments:
                texts.append(segment.text)
                before.append(tail)
                tail = (tail[-TAIL:] + self._with_end(segment))[-TAIL:]
        ids = iter(self.segments.ids(texts, before))
        return [[(next(ids), segment) for segment in row.segments] for row in rows]

    def _with_end(self, segment: Segment) -> str:
        """The text with its end token."""
        return segment.text + self.tokenizer.eos_token if segment.ends and self.eos else segment.text

    def decoding_difference(self, row: Rendered, ids: list[int]) -> tuple[str, str] | None:
        """The text of the row and what its ids decode to, around their first difference; None if there is none.

        What the tokenizer never preserves (case, spaces) is no difference: the ids of the complete text are decoded as well.
        """
        if len(row.segments) < 2:
            return None
        text = "".join(map(self._with_end, row.segments))
        expected_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[0 if row.framed else len(self.bos) :]
        found, expected = (str(self.tokenizer.decode(e, clean_up_tokenization_spaces=False)) for e in (ids, expected_ids))
        if ids == expected_ids or found in (text, expected):
            return None
        pairs = enumerate(zip(found, expected, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        start, stop = max(0, first - DIFFERENCE_CONTEXT), first + DIFFERENCE_CONTEXT
        return expected[start:stop], found[start:stop]

    def _join(self, encoded: list[tuple[list[int], Segment]], framed: bool) -> tuple[list[int], list[int]]:
        ids = [] if framed else list(self.bos)
        labels = [IGNORED] * len(ids)
        for segment_ids, segment in encoded:
            more = segment_ids + self.eos if segment.ends else segment_ids
            ids += more
            labels += more if segment.trained else [IGNORED] * len(more)
        if labels:
            labels[0] = IGNORED  # no position predicts the first token
        return ids, labels

    def prompt_ids(self, prompt: Any) -> list[int]:
        """What the model reads before it answers: the same ids as those of the prompt in training.

        Args:
            prompt: a text, a list of messages, or `{"messages": [...], "tools": [...]}`.
        """
        return self.encode([self.prompt_row(prompt)])[0][0]

    def prompt_row(self, prompt: Any) -> Rendered:
        """A prompt as `prompt_ids` takes it, as segments."""
        given = prompt if isinstance(prompt, dict) else {"messages": prompt}
        turns = given["messages"]
        if self.continues_text and isinstance(turns, str):
            return Rendered([Segment(turns, False)], framed=False)
        messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        messages, tools, _ = self._fit(messages, given.get("tools"))
        if self.chat is None:
            return Rendered(self._render_plain(messages, set()), framed=False)
        own = given.get("chat_template_kwargs") or {}
        options = {name: value for name, value in own.items() if name in self.options_read}
        segments = self._located(messages, tools, options, lambda found: found.prompt(self.train_on == "all"))
        return Rendered(segments, framed=True)


def _same_answers(before: list[Message], after: list[Message], trained: set[int]) -> set[int]:
    """The indices of the same answers after a conversation was rewritten, which keeps their order."""
    if before is after or not trained:
        return trained
    places = [index for index, message in enumerate(after) if message["role"] == "assistant"]
    answers = [index for index, message in enumerate(before) if message["role"] == "assistant"]
    return {place for index, place in zip(answers, places, strict=True) if index in trained}
