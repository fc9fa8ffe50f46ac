"""An example as token ids and labels. Masks are by position: the value of a token never decides.

A conversation is cut into segments where an assistant turn begins and ends. The positions are found by rendering the chat
template up to each message and taking the difference. Segments are tokenized separately, each as the continuation of the
one before, and joined: the prompt has the same ids in training as when `generate` reads it.

Most templates render a turn the same way whatever follows it. Some do not: Qwen3's puts an empty `<think>` before an answer
without reasoning in the last turn only, and many omit the reasoning of earlier turns. A trained answer must then be the last
turn of its row, as it is when the model generates it.

The plain template, for models without a chat template: a blank line follows each turn that is not the assistant's, the end
token follows each assistant turn. It writes no role names; the end token marks the change of speaker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.formats import Example, Message
from hfstrat.data.values import BadRow
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token without loss
RENDER_VERSION = 2  # of the ids and labels produced here: increase it where they change, so that cached rows are not reused
TEMPLATES = ("auto", "chat", "plain")
DIFFERENCE_CONTEXT = 20  # characters shown on both sides of a difference
TAIL = 64  # characters of preceding text that matter for tokenization: more than any special token has
ANCHORS = ("\n", "0", "|", "a")  # texts that rarely merge with what follows
PROBES = ("a", "A", "1", "(")
TOOL_PROBE = "hfstrat_probe"
_FUNCTION = {"name": TOOL_PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
_CALL = {"type": "function", "function": {"name": TOOL_PROBE, "arguments": {}}}
_QUESTION = {"role": "user", "content": "a"}

ApplyTemplate = Callable[[Sequence[Message], bool], str]  # messages as text; True adds the generation prompt
Spans = dict[int, tuple[int, int]]  # by the index of a message: start and end of the turn, its end token included


class Segment(NamedTuple):
    """A text that is tokenized separately, whether it has loss, and whether the end token follows it."""

    text: str
    trained: bool
    ends: bool = False


class Rendered(NamedTuple):
    """Segments in order; `framed`: the template wrote BOS and EOS itself."""

    segments: list[Segment]
    framed: bool


def check_template(template: str) -> str | None:
    """The content of a template file, or None for one of the names in `TEMPLATES`.

    Raises:
        UserError: no such file, or not valid jinja.
    """
    if template in TEMPLATES:
        return None
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(f"data.template: {template}: no such file; expected {', '.join(TEMPLATES)} or a .jinja file")
    text = path.read_text(encoding="utf-8")
    import jinja2

    try:
        if "generation" not in text:  # a tag defined by transformers, unknown to jinja
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {template}:{error.lineno}: not valid jinja: {error.message}") from None
    return text


def supports_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes both tool definitions and tool calls, found by rendering a probe."""
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    tools = [{"type": "function", "function": _FUNCTION}]
    try:
        defined = tokenizer.apply_chat_template([_QUESTION], tools=tools, tokenize=False)
        called = tokenizer.apply_chat_template([_QUESTION, answer], tokenize=False)
    except Exception:  # jinja raises many kinds of errors, and templates their own
        return False
    return TOOL_PROBE in defined and TOOL_PROBE in called


def tools_as_text(messages: Sequence[Message], tools: list[Message] | None) -> list[Message]:
    """The conversation with tools as text, for a template that does not support them, in the form of Hermes and Qwen models.

    Definitions go into the system message, a call into the assistant's text, a result into a user turn.
    """
    turns = [_turn_as_text(message) for message in messages]
    if not tools:
        return turns
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = f"You may call these tools, by a <tool_call> with a name and arguments in JSON:\n<tools>\n{listed}\n</tools>"
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _turn_as_text(message: Message) -> Message:
    plain = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id", "name")}
    if message["role"] == "tool":
        return {**plain, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {**plain, "content": "\n".join(filter(None, [message["content"], *written]))}


def training_segments(
    messages: Sequence[Message], trained: set[int], apply: ApplyTemplate, train_all: bool = False
) -> list[list[Segment]]:
    """The conversation as one row; or as one row per trained turn, each up to the end of that turn, if the template renders
    some of these turns differently once more turns follow.

    Args:
        trained: indices of the messages with loss.
        train_all: every token has loss, so that no positions are needed.

    Raises:
        BadRow: the template rewrites what precedes an answer as soon as the answer is present.
    """
    rendered = apply(messages, False)
    spans = _assistant_spans(messages, rendered, apply, is_last=True)
    if train_all or trained <= spans.keys():
        return [_cut(rendered, spans, trained, train_all)]
    return [_row_until(messages, index, apply) for index in sorted(trained)]


def prompt_segments(messages: Sequence[Message], apply: ApplyTemplate, train_all: bool = False) -> list[Segment]:
    """What precedes the next assistant turn, cut at the same positions as in the row that contains this turn."""
    rendered = apply(messages, True)
    return _cut(rendered, _assistant_spans(messages, rendered, apply), set(), train_all)


def _row_until(messages: Sequence[Message], index: int, apply: ApplyTemplate) -> list[Segment]:
    """The row up to the end of one answer, which alone has loss."""
    before, after = apply(messages[:index], True), apply(messages[: index + 1], False)
    if not after.startswith(before):
        raise BadRow(
            f"the chat template renders the turns before message {index + 1} differently once that message follows, so its "
            "tokens cannot be located; set data.template to another template, or data.train_on: all"
        )
    spans = _assistant_spans(messages[:index], before, apply)
    return _cut(after, {**spans, index: (len(before), len(after))}, {index})


def _assistant_spans(messages: Sequence[Message], rendered: str, apply: ApplyTemplate, is_last: bool = False) -> Spans:
    """The assistant turns that are rendered as they would be with nothing after them.

    Args:
        is_last: nothing follows the last message in `rendered`.
    """
    spans: Spans = {}
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = apply(messages[:index], True)
        after = rendered if is_last and index + 1 == len(messages) else apply(messages[: index + 1], False)
        if rendered.startswith(after) and after.startswith(before) and len(before) >= done:
            spans[index] = len(before), len(after)
            done = len(after)
    return spans


def _cut(rendered: str, spans: Spans, trained: set[int], train_all: bool = False) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for index, (start, end) in spans.items():
        segments.append(Segment(rendered[done:start], train_all))
        segments.append(Segment(rendered[start:end], train_all or index in trained))
        done = end
    return [segment for segment in [*segments, Segment(rendered[done:], train_all)] if segment.text]


class SegmentTokenizer:
    """Tokenizes texts that follow one another separately, with the ids that they have in the complete text.

    Some tokenizers put a space before every text (SentencePiece's `▁`: Llama 2, Mistral v1, T5; byte-level ones with
    `add_prefix_space`), so that a continuation tokenized by itself would gain a space (`prepends`). It is then tokenized
    after the end of the preceding text, whose ids are removed again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        anchors = zip(ANCHORS, self._ids_of_each(ANCHORS), strict=True)
        self.anchors = [(text, ids) for text, ids in anchors if self._is_unambiguous(ids)]
        self.prepends = any(
            self._ids_after_anchor(text) != ids for text, ids in zip(PROBES, self._ids_of_each(PROBES), strict=True)
        )

    def ids(self, texts: Sequence[str], before: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens around it.

        Args:
            before: the last `TAIL` characters that precede each text in its row; empty for the first.
        """
        if not self.prepends:
            return self._ids_of_each(texts)
        joined = self._ids_of_each([tail + text for tail, text in zip(before, texts, strict=True)])
        tails = list(dict.fromkeys(filter(None, before)))
        heads = dict(zip(tails, self._ids_of_each(tails), strict=True))
        return [
            self._without_head(heads[b], ids, text) if b else ids for b, ids, text in zip(before, joined, texts, strict=True)
        ]

    def _without_head(self, head: list[int], ids: list[int], text: str) -> list[int]:
        """The ids without those of the head; if the two merged, the ids of the text alone, since the head keeps its ids."""
        if self._is_unambiguous(head) and ids[: len(head)] == head:
            return ids[len(head) :]
        return self._ids_after_anchor(text)

    def _ids_after_anchor(self, text: str) -> list[int]:
        """The ids after the first anchor that the text does not merge with; by itself if there is none."""
        for anchor, head in self.anchors:
            (ids,) = self._ids_of_each([anchor + text])
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._ids_of_each([text])[0]

    def _is_unambiguous(self, head: list[int]) -> bool:
        """Whether equal ids mean equal characters: the unknown token stands for any number of characters."""
        return bool(head) and head[-1] != self.tokenizer.unk_token_id

    def _ids_of_each(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: Any = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return list(found)


class Renderer:
    """Renders examples for one tokenizer and one template.

    Args:
        tokenizer: receives the template of a file as its own, so that it is saved with the result.
        template: `chat` (the tokenizer's own), `plain`, `auto` (chat if the tokenizer has one), or the path of a jinja file.
        train_on: which tokens have loss, always with the end of each turn. `completions`: what answers the prompt, which is
            the completion where rows have one, and the last assistant turn of a conversation (TRL's `completion_only_loss`
            where defined there). `assistant`: every assistant turn, also those in a prompt (TRL's `assistant_only_loss`).
            `all`: everything. `auto`: completions where rows have a completion, assistant for conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, train_on: str = "auto") -> None:
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
        self.supports_tools = self.template == "chat" and supports_tools(tokenizer)
        probe = tokenizer("a")["input_ids"]
        self.bos = [tokenizer.bos_token_id] if probe[:1] == [tokenizer.bos_token_id] else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def render(self, example: Example) -> list[Rendered]:
        """The example as segments: one row, or several if the chat template renders trained turns differently once more turns
        follow, each up to the end of one such turn.

        Raises:
            BadRow: the template cannot render the conversation, or rewrites the prompt of a trained turn.
        """
        if example.text is not None:
            return [Rendered([Segment(example.text, True, ends=True)] if example.text else [], framed=False)]
        assert example.messages is not None
        return self._render_messages(example.messages, example.tools, self._trained_turns(example))

    def _trained_turns(self, example: Example) -> set[int]:
        """The indices of the messages with loss."""
        messages, after = example.messages or [], example.prompt_turns
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "completions" or (self.train_on == "auto" and after):
            answers = [index for index in answers if index >= after] if after else answers[-1:]
        return {index for index in answers if messages[index].get("weight", 1)}

    def _render_messages(
        self, messages: list[Message], tools: list[Message] | None, trained: set[int], is_prompt: bool = False
    ) -> list[Rendered]:
        """`is_prompt`: up to where the assistant begins its next turn."""
        if not self.supports_tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)):
            before = len(messages)
            messages, tools = tools_as_text(messages, tools), None
            trained = {index + len(messages) - before for index in trained}
        if self.template == "plain":
            return [Rendered(self._render_plain(messages, trained), framed=False)]

        def apply(some: Sequence[Message], is_prompt: bool) -> str:
            text = self.tokenizer.apply_chat_template(list(some), tools=tools, tokenize=False, add_generation_prompt=is_prompt)
            return str(text)

        train_all = self.train_on == "all"
        try:
            if is_prompt:
                rows = [prompt_segments(messages, apply, train_all)]
            else:
                rows = training_segments(messages, trained, apply, train_all)
        except BadRow:
            raise
        except Exception as error:  # jinja raises many kinds of errors, and templates their own
            raise BadRow(f"the chat template cannot render this conversation: {error}") from error
        return [Rendered(segments, framed=True) for segments in rows]

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
        texts, before = list[str](), list[str]()
        for row in rows:
            tail = ""
            for segment in row.segments:
                texts.append(segment.text)
                before.append(tail)
                tail = (tail[-TAIL:] + self._with_end(segment))[-TAIL:]
        ids = iter(self.segments.ids(texts, before))
        return [self._join([(next(ids), segment) for segment in row.segments], row.framed) for row in rows]

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
        given = prompt if isinstance(prompt, dict) else {"messages": prompt}
        turns = given["messages"]
        if self.continues_text and isinstance(turns, str):
            return self.encode([Rendered([Segment(turns, False)], framed=False)])[0][0]
        messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        return self.encode(self._render_messages(messages, given.get("tools"), set(), is_prompt=True))[0][0]
