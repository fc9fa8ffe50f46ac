"""From an example to token ids and labels. Masks are by position: a token's own value never decides.

A conversation is cut into segments where the assistant begins and ends to speak, by rendering it up to each
message and taking the difference. Segments are tokenised apart and joined, so that the prompt's ids in training
are exactly the ids that `generate` feeds to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.data.formats import BadRow, Example, Message
from hfstrat.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


class Rendered(NamedTuple):
    """Texts in order, each with whether its tokens carry loss; `framed`: the template wrote BOS and EOS itself."""

    segments: list[tuple[str, bool]]
    framed: bool


class Renderer:
    """Renders examples for one tokenizer and one template.

    Args:
        template: `chat` (the tokenizer's own), `plain`, or `auto` (chat if there is one).
        train_on: `completions` (assistant turns with their end) or `all`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, train_on: str) -> None:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if template == "chat" and not has_template:
            raise UserError("data.template: chat was asked for, but this tokenizer has no chat template; use plain")
        self.tokenizer = tokenizer
        self.template = template if template != "auto" else ("chat" if has_template else "plain")
        self.all = train_on == "all"
        probe = tokenizer("a")["input_ids"]
        self.bos = [tokenizer.bos_token_id] if probe[:1] == [tokenizer.bos_token_id] else []
        self.eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def _chat(self, messages: Sequence[Message], prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return str(text)

    def render(self, example: Example) -> Rendered:
        """The example as texts in order, each with whether it carries loss.

        Raises:
            BadRow: the template cannot render the conversation, or rewrites an earlier turn.
        """
        if example.text is not None:
            return Rendered([(example.text, True)], framed=False)
        assert example.messages is not None
        if self.template == "plain":
            return Rendered(self._plain(example.messages), framed=False)
        try:
            return Rendered(self._conversation(example.messages), framed=True)
        except BadRow:
            raise
        except Exception as error:  # jinja raises many kinds, templates their own
            raise BadRow(f"the chat template cannot render this conversation: {error}") from error

    def _conversation(self, messages: list[Message]) -> list[tuple[str, bool]]:
        full = self._chat(messages)
        segments: list[tuple[str, bool]] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._chat(messages[:index], prompt=True), self._chat(messages[: index + 1])
            if not (full.startswith(after) and after.startswith(before) and len(before) >= done):
                raise BadRow(
                    f"the chat template renders message {index + 1} otherwise once more follow, so its tokens have no place"
                )
            segments += [(full[done : len(before)], self.all), (full[len(before) : len(after)], True)]
            done = len(after)
        return [segment for segment in [*segments, (full[done:], self.all)] if segment[0]]

    def _plain(self, messages: list[Message]) -> list[tuple[str, bool]]:
        roles = [message["role"] for message in messages]
        if roles[-1] != "assistant" or roles.count("assistant") != 1:
            raise BadRow(
                "this tokenizer has no chat template, and the plain one takes one prompt and one answer; "
                "set model.tokenizer to a chat model's"
            )
        return [(plain_prompt(messages[:-1]), self.all), (messages[-1]["content"], True)]

    def encode(self, rows: list[Rendered]) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each row, from one call of the tokenizer."""
        texts = [text for row in rows for text, _ in row.segments]
        pieces = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        return [self._join([(next(pieces), trained) for _, trained in row.segments], row.framed) for row in rows]

    def _join(self, pieces: list[tuple[list[int], bool]], framed: bool) -> tuple[list[int], list[int]]:
        ids = [] if framed else list(self.bos)
        labels = [IGNORED] * len(ids)
        for piece, trained in pieces:
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
        if not framed and any(piece for piece, _ in pieces):
            ids += self.eos
            labels += self.eos
        if labels:
            labels[0] = IGNORED  # nothing predicts the first token
        return ids, labels

    def prompt_ids(self, prompt: str | list[Message]) -> list[int]:
        """What the model reads before it answers: the same ids as the prompt's in training."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.template == "chat":
            text, start = self._chat(messages, prompt=True), []
        else:
            text, start = plain_prompt(messages), self.bos
        return start + self.tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_prompt(messages: Sequence[Message]) -> str:
    """Prompts for models without a chat template: the texts, and a blank line before the answer."""
    return "\n\n".join(message["content"] for message in messages) + "\n\n"


def prompt_of(example: Example) -> list[Message] | None:
    """The messages up to the last assistant turn, or None for plain text."""
    messages = example.messages or []
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:last] or None


def answer_of(example: Example) -> str:
    messages: list[Any] = example.messages or []
    return next((str(m["content"]) for m in reversed(messages) if m["role"] == "assistant"), "")
