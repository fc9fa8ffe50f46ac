"""Chat templates: the tokenizer's, a file's, and what stands in where a template does not know tools.

From an example to token ids and labels. Masks are by position: a token's own value never decides.

A conversation is cut into segments where the assistant begins and ends to speak, by rendering it up to each
message and taking the difference (`places`). Segments are tokenised apart, each as it goes on from the one before
(`pieces`), and joined, so that the prompt's ids in training are exactly the ids that `generate` feeds to the model.

The plain template, for models without one of their own: each turn that is not the assistant's is followed by a blank
line, each turn of the assistant by the end token. There are no names of roles: who speaks is told by the end token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.formats import Example
from hfstrat.data.messages import BadRow, Message
from hfstrat.data.segments import TAIL, Pieces, Segment, prompt_segments, rows_of
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NAMES = ("auto", "chat", "plain")


PROBE = "hfstrat_probe"


_FUNCTION = {"name": PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}


_QUESTION = {"role": "user", "content": "a"}


_CALL = {"type": "function", "function": {"name": PROBE, "arguments": {}}}


def check_template(template: str) -> str | None:
    """The text of a template file, or None for one of the names.

    Raises:
        UserError: no such file, or no jinja.
    """
    if template in NAMES:
        return None
    path = Path(template).expanduser()
    if not path.is_file():
        raise UserError(f"data.template: {template}: no such file; expected {', '.join(NAMES)} or a .jinja file")
    text = path.read_text(encoding="utf-8")
    import jinja2

    try:
        if "generation" not in text:  # a tag of transformers, which jinja alone does not know
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {template}:{error.lineno}: this is no valid jinja: {error.message}") from None
    return text


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template writes both the definitions of tools and the calls: asked, not guessed from its text."""
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    tools = [{"type": "function", "function": _FUNCTION}]
    try:
        defined = tokenizer.apply_chat_template([_QUESTION], tools=tools, tokenize=False)
        called = tokenizer.apply_chat_template([_QUESTION, answer], tokenize=False)
    except Exception:  # jinja raises many kinds, templates their own
        return False
    return PROBE in defined and PROBE in called


def tools_as_text(messages: Sequence[Message], tools: list[Message] | None) -> list[Message]:
    """The same conversation for a template that does not know tools, in the form that Hermes and Qwen models use.

    Definitions go into the system message, a call into the assistant's text, a result into a user's turn.
    """
    talk = [_said(message) for message in messages]
    if not tools:
        return talk
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = f"You may call these tools, by a <tool_call> with a name and arguments in JSON:\n<tools>\n{listed}\n</tools>"
    if talk and talk[0]["role"] == "system":
        return [{**talk[0], "content": f"{talk[0]['content']}\n\n{text}"}, *talk[1:]]
    return [{"role": "system", "content": text}, *talk]


def _said(message: Message) -> Message:
    plain = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id", "name")}
    if message["role"] == "tool":
        return {**plain, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
    written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {**plain, "content": "\n".join(filter(None, [message["content"], *written]))}


IGNORED = -100


AROUND = 20  # characters that are shown on both sides of a difference


SHOWN = 60  # characters of a plain text that stand in for a prompt


FORM = 2  # of the ids and labels made here: another number where they change, so that rows stored before are not taken


class Rendered(NamedTuple):
    """Texts in order; `framed`: the template wrote BOS and EOS itself."""

    segments: list[Segment]
    framed: bool


class Renderer:
    """Renders examples for one tokenizer and one template.

    Args:
        tokenizer: gets the template of a file as its own, so that it is saved with the result.
        template: `chat` (the tokenizer's own), `plain`, `auto` (chat if there is one), or the path of a jinja file.
        train_on: what carries loss, always with the end of each turn. `completions`: what answers the prompt, which is
            the completion where rows have one, and the last turn of the assistant in a conversation (TRL's
            `completion_only_loss` where it has a meaning there). `assistant`: every turn of the assistant, also those in a
            prompt (TRL's `assistant_only_loss`). `all`: everything. `auto`: completions where rows have a completion,
            assistant for conversations.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, train_on: str = "auto") -> None:
        if template not in NAMES:
            tokenizer.chat_template = check_template(template)
            template = "chat"
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_template:
            raise UserError("data.template: chat was asked for, but this tokenizer has no chat template; use plain")
        self.tokenizer = tokenizer
        self.template = template if template != "auto" else ("chat" if has_template else "plain")
        self.train_on = train_on
        self.continues = False  # trained on plain text: a prompt is a beginning, and goes in as it is
        self.pieces = Pieces(tokenizer)
        self.knows_tools = self.template == "chat" and knows_tools(tokenizer)
        probe = tokenizer("a")["input_ids"]
        self.bos = [tokenizer.bos_token_id] if probe[:1] == [tokenizer.bos_token_id] else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def render(self, example: Example) -> list[Rendered]:
        """The example as texts in order, each with whether it carries loss: one row, or several where the chat template
        writes turns to be learnt otherwise once more follow, each up to the end of one such turn.

        Raises:
            BadRow: the template cannot render the conversation, or rewrites the prompt of a turn to be learnt.
        """
        if example.text is not None:
            return [Rendered([Segment(example.text, True, ends=True)] if example.text else [], framed=False)]
        assert example.messages is not None
        return self._rendered(example.messages, example.tools, self._learnt(example))

    def _learnt(self, example: Example) -> set[int]:
        """The numbers of the messages that carry loss."""
        messages, after = example.messages or [], example.prompt_turns
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "completions" or (self.train_on == "auto" and after):
            answers = [index for index in answers if index >= after] if after else answers[-1:]
        return {index for index in answers if messages[index].get("weight", 1)}

    def _rendered(
        self, messages: list[Message], tools: list[Message] | None, learnt: set[int], asks: bool = False
    ) -> list[Rendered]:
        """`asks`: up to where the assistant begins its next turn."""
        if not self.knows_tools and (tools or any("tool_calls" in m or m["role"] == "tool" for m in messages)):
            before = len(messages)
            messages, tools = tools_as_text(messages, tools), None
            learnt = {index + len(messages) - before for index in learnt}
        if self.template == "plain":
            return [Rendered(self._plain(messages, learnt), framed=False)]

        def chat(some: Sequence[Message], asks: bool) -> str:
            made = self.tokenizer.apply_chat_template(list(some), tools=tools, tokenize=False, add_generation_prompt=asks)
            return str(made)

        everything = self.train_on == "all"
        try:
            rows = [prompt_segments(messages, chat, everything)] if asks else rows_of(messages, learnt, chat, everything)
        except BadRow:
            raise
        except Exception as error:  # jinja raises many kinds, templates their own
            raise BadRow(f"the chat template cannot render this conversation: {error}") from error
        return [Rendered(segments, framed=True) for segments in rows]

    def _plain(self, messages: list[Message], learnt: set[int]) -> list[Segment]:
        everything = self.train_on == "all"
        segments: list[Segment] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                segments.append(Segment(message["content"], everything or index in learnt, ends=True))
            elif segments and not segments[-1].ends:
                segments[-1] = Segment(f"{segments[-1].text}{message['content']}\n\n", everything)
            else:
                segments.append(Segment(f"{message['content']}\n\n", everything))
        return segments

    def encode(self, rows: list[Rendered]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each row, from one call of the tokenizer (a few, where it puts a space before texts)."""
        texts, before = list[str](), list[str]()
        for row in rows:
            said = ""
            for segment in row.segments:
                texts.append(segment.text)
                before.append(said)
                said = (said[-TAIL:] + self._written(segment))[-TAIL:]
        pieces = iter(self.pieces.ids(texts, before))
        return [self._join([(next(pieces), segment) for segment in row.segments], row.framed) for row in rows]

    def _written(self, segment: Segment) -> str:
        """With its end token."""
        return segment.text + self.tokenizer.eos_token if segment.ends and self.eos else segment.text

    def misread(self, row: Rendered, ids: list[int]) -> tuple[str, str] | None:
        """What the row says and what its ids are read as, from their first difference on; None where these are the same.

        What the tokenizer cannot keep in any case (case, spaces) is none: the whole text's own ids are read as well.
        """
        if len(row.segments) < 2:
            return None
        text = "".join(map(self._written, row.segments))
        whole = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[0 if row.framed else len(self.bos) :]
        said, wanted = (str(self.tokenizer.decode(each, clean_up_tokenization_spaces=False)) for each in (ids, whole))
        if ids == whole or said in (text, wanted):
            return None
        place = next((i for i, (a, b) in enumerate(zip(said, wanted, strict=False)) if a != b), min(len(said), len(wanted)))
        begin = max(0, place - AROUND)
        return wanted[begin : place + AROUND], said[begin : place + AROUND]

    def _join(self, pieces: list[tuple[list[int], Segment]], framed: bool) -> tuple[list[int], list[int]]:
        ids = [] if framed else list(self.bos)
        labels = [IGNORED] * len(ids)
        for piece, segment in pieces:
            more = piece + self.eos if segment.ends else piece
            ids += more
            labels += more if segment.trained else [IGNORED] * len(more)
        if labels:
            labels[0] = IGNORED  # nothing predicts the first token
        return ids, labels

    def prompt_ids(self, prompt: Any) -> list[int]:
        """What the model reads before it answers: the same ids as the prompt's in training.

        Args:
            prompt: a text, a list of messages, or `{"messages": [...], "tools": [...]}`.
        """
        asked = prompt if isinstance(prompt, dict) else {"messages": prompt}
        talk = asked["messages"]
        if self.continues and isinstance(talk, str):
            return self.encode([Rendered([Segment(talk, False)], framed=False)])[0][0]
        messages = [{"role": "user", "content": talk}] if isinstance(talk, str) else talk
        return self.encode(self._rendered(messages, asked.get("tools"), set(), asks=True))[0][0]


def prompt_of(example: Example) -> Any:
    """What stands before the last assistant turn, as `Renderer.prompt_ids` takes it; of plain text its first words."""
    if example.text is not None:
        return _beginning(example.text) or None
    messages = example.messages or []
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if not messages[:last]:
        return None
    return {"messages": messages[:last], "tools": example.tools} if example.tools else messages[:last]


def _beginning(text: str) -> str:
    """The first words of a text that has more of them."""
    return text[:SHOWN].rpartition(" ")[0] if len(text) > SHOWN else text.rpartition(" ")[0]


def answer_of(example: Example) -> str:
    if example.text is not None:
        return example.text[len(_beginning(example.text)) :][: 4 * SHOWN]
    messages: list[Any] = example.messages or []
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "assistant"), "")
