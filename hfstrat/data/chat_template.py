"""The chat template of a tokenizer: what it supports, found by rendering probes, and conversations in a form that it renders.

A template that has no place for a system message, for tools or for reasoning leaves them out or fails. They are then written as
text: a system message at the beginning of the next user turn, reasoning in <think> tags, tools in the form of Hermes and Qwen
models. `coverage` checks that the text is really there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from hfstrat.data.messages import Message, with_reasoning
from hfstrat.errors import UserError

TEMPLATES = ("auto", "chat", "plain")
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}  # not a user's to set
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # a tag defined by transformers, unknown to jinja
MARK = r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]"  # what looks like a special token
WORD, REASON, TOOL = "hfstratword", "hfstratreason", "hfstrat_probe"
TALKING = ("user", "assistant")
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": WORD}
FUNCTION = {"name": TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": TOOL, "arguments": {"a": REASON}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": TOOL, "content": WORD}


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
        _variables(text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"data.template: {template}:{error.lineno}: not valid jinja: {error.message}") from None
    return text


def _variables(text: str) -> set[str]:
    """The variables that a template reads, without those that it sets itself, unless it asks whether they are defined."""
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(GENERATION.sub("", text))
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
    asked: list[nodes.Node | None] = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked += [found.node for found in tree.find_all(nodes.Filter) if found.name in ("default", "d")]
    own -= {node.name for node in asked if isinstance(node, nodes.Name)}
    return meta.find_undeclared_variables(tree) - own - set(environment.globals)


def options_of(template: Any) -> list[str]:
    """The arguments that a chat template reads (a text, or several by name), such as `enable_thinking`."""
    texts = template.values() if isinstance(template, Mapping) else [template]
    found: set[str] = set().union(*(_variables(text) for text in texts))
    return sorted(name for name in found - GIVEN if not name.endswith("_token"))


def with_options(template: str, options: Mapping[str, Any]) -> str:
    """The template with these arguments as defaults, for programs that cannot pass them."""
    defaults = (
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in options.items()
    )
    return "".join(defaults) + template


def _literal(value: Any) -> str:
    """A value of JSON in jinja."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):  # jinja reads the escapes of Python
        return repr(value)
    return "none" if value is None else json.dumps(value)


def check_options(given: Mapping[str, Any], template: Any, where: str) -> None:
    """Raises UserError if the template does not read one of the arguments.

    Args:
        where: what gives them, for the message.
    """
    if not given:
        return
    known = options_of(template)
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(known) or 'none'}"
            raise UserError(f"{where}: the chat template does not read '{name}'; {hint}")


def tools_as_text(messages: Sequence[Message], tools: list[Message] | None, calls: bool = True) -> list[Message]:
    """The conversation with tools as text, in the form of Hermes and Qwen models.

    Definitions go into the system message, a call into the assistant's text, results into a user turn.

    Args:
        calls: calls and results too, not only the definitions.
    """
    turns = _calls_as_text(messages) if calls else list(messages)
    if not tools:
        return turns
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    how = ", by a <tool_call> with a name and arguments in JSON" if calls else ""
    text = f"You may call these tools{how}:\n<tools>\n{listed}\n</tools>"
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Each call as text of its turn; results that follow one another are one user turn, since roles often have to alternate."""
    turns: list[Message] = []
    previous = ""
    for message in messages:
        turn = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id", "name")}
        if message["role"] == "tool":
            turn |= {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
        written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
        turn["content"] = "\n".join(filter(None, [turn["content"], *written]))
        if message["role"] == previous == "tool":
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n{turn['content']}"}
        else:
            turns.append(turn)
        previous = message["role"]
    return turns


def systems_as_user(messages: Sequence[Message], first: bool = True) -> list[Message]:
    """System messages at the beginning of the user turn that follows, or as one if none does.

    Args:
        first: that of the beginning too, not only later ones.
    """
    turns, waiting = list[Message](), ""
    for index, message in enumerate(messages):
        if message["role"] == "system" and (first or index):
            waiting = f"{waiting}\n\n{message['content']}" if waiting else message["content"]
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": f"{waiting}\n\n{message['content']}"}
        elif waiting:
            turns.append({"role": "user", "content": waiting})
        waiting = ""
        turns.append(message)
    return [*turns, {"role": "user", "content": waiting}] if waiting else turns


class ChatTemplate:
    """A chat template with its arguments.

    Args:
        options: `data.chat_template_kwargs`.

    Raises:
        UserError: an option that the template does not read.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        check_options(options, tokenizer.chat_template, "data.chat_template_kwargs")
        self.tokenizer, self.options = tokenizer, dict(options)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {str(token) for token in added.values()} | set(tokenizer.all_special_tokens)
        marks = [re.escape(token) for token in sorted(filter(str.strip, special), key=len, reverse=True)]
        self.mark = re.compile("|".join([*marks, MARK]))
        self.as_parts = self.as_json = False  # content is a list of parts; arguments of calls are JSON text
        self.as_parts = WORD not in self._probe([{"role": "user", "content": WORD}]) and WORD in self._probe(
            [{"role": "user", "content": [{"type": "text", "text": WORD}]}]
        )
        question = {"role": "user", "content": WORD}
        self.has_system = WORD in self._probe([{"role": "system", "content": WORD}, USER])
        later = [USER, {"role": "assistant", "content": "b"}, {"role": "system", "content": WORD}, USER]
        self.has_later_system = WORD in self._probe(later)
        self.has_developer = WORD in self._probe([{"role": "developer", "content": WORD}, USER])
        self.has_reasoning = REASON in self._probe([question, {**ANSWER, "reasoning_content": REASON}])
        self.has_definitions = TOOL in self._probe([USER], [{"type": "function", "function": FUNCTION}])
        self.has_calls = self._renders_calls()
        if not self.has_calls:
            self.as_json = True  # DeepSeek-V3 joins the arguments to a text
            self.has_calls = self.as_json = self._renders_calls()

    def _renders_calls(self) -> bool:
        made = self._probe([USER, CALLING, RESULT])
        return TOOL in self._probe([USER, CALLING]) and REASON in made and WORD in made

    def _probe(self, messages: Sequence[Message], tools: list[Message] | None = None, opens: bool = False) -> str:
        """The rendering, or an empty text where the template fails."""
        try:
            return self.render(messages, tools, opens)
        except Exception:  # jinja raises many kinds of errors, and templates their own
            return ""

    @property
    def supports_tools(self) -> bool:
        return self.has_definitions and self.has_calls

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Message] | None = None,
        opens: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as text.

        Args:
            opens: add the generation prompt.
            options: of this example, in addition to those of the recipe.
        """
        given = [self._in_its_form(message) for message in messages] if self._needs_form(messages) else messages
        chosen = {**self.options, **options} if options else self.options
        apply = self.tokenizer.apply_chat_template
        return str(apply(given, tools=tools, tokenize=False, add_generation_prompt=opens, **chosen))

    def _needs_form(self, messages: Sequence[Message]) -> bool:
        """Whether the template takes these messages in another form than ours."""
        return self.as_parts or self.as_json

    def _in_its_form(self, message: Message) -> Message:
        if self.as_parts and isinstance(message["content"], str):
            message = {**message, "content": [{"type": "text", "text": message["content"]}]}
        if self.as_json and "tool_calls" in message:
            functions = [call["function"] for call in message["tool_calls"]]
            texts = [json.dumps(function["arguments"], ensure_ascii=False) for function in functions]
            pairs = zip(message["tool_calls"], functions, texts, strict=True)
            message = {**message, "tool_calls": [{**call, "function": {**f, "arguments": text}} for call, f, text in pairs]}
        return message

    def fit(
        self, messages: list[Message], tools: list[Message] | None
    ) -> tuple[list[Message], list[Message] | None, Counter[str]]:
        """The conversation in a form that the template renders, its tools, and what was rewritten; answers keep their order."""
        done = Counter[str]()
        if not tools and all(len(turn) == 2 and turn["role"] in TALKING for turn in messages):
            return messages, tools, done
        turns = list(messages)
        if not self.has_reasoning and any("reasoning_content" in turn for turn in turns):
            turns = [_reasoning_as_text(turn) for turn in turns]
        roles = {turn["role"] for turn in turns}
        if "developer" in roles and not self.has_developer:
            done["developer messages are written as system messages"] = sum(turn["role"] == "developer" for turn in turns)
            turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
        calls, given = "tool" in roles or any("tool_calls" in turn for turn in turns), len(turns)
        if (calls and not self.has_calls) or (tools and not self.supports_tools):
            turns, tools = tools_as_text(turns, tools, calls=not self.has_calls), None
        systems = [index for index, turn in enumerate(turns) if turn["role"] == "system"]
        moved = [index for index in systems if not (self.has_later_system if index else self.has_system)]
        if moved:
            if own := len(moved) - (len(turns) > given and 0 in moved):  # the first is not of the data, but the text of tools
                done["system messages are written at the beginning of a user turn"] = own
            turns = systems_as_user(turns, first=0 in moved)
        return turns, tools, done

    @cached_property
    def opening(self) -> str:
        """The generation prompt, as it follows a user turn."""
        closed, opened = self._probe([USER]), self._probe([USER], opens=True)
        return opened[len(closed) :] if opened.startswith(closed) else ""

    @cached_property
    def _ending(self) -> str:
        """What the template writes after the text of an answer."""
        found = self._probe([USER, ANSWER])
        return found.rpartition(WORD)[2] if WORD in found else ""

    @property
    def writes_end(self) -> bool:
        return self.mark.search(self._ending) is not None

    @cached_property
    def next_marks(self) -> tuple[str, str]:
        """For a template that writes no end: the marks that begin the turn after an answer and after calls, as in GLM, whose
        models end an answer with `<|user|>`. Empty where there are none."""
        if self.writes_end:
            return "", ""
        pairs: list[tuple[list[Message], Message]] = [([USER, ANSWER], USER), ([USER, CALLING], RESULT)]
        found = []
        for before, turn in pairs:
            text, longer = self._probe(before), self._probe([*before, turn])
            match = self.mark.match(longer[len(text) :]) if text and longer.startswith(text) else None
            found.append(match.group() if match else "")
        return found[0], found[1]

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the first mark after its text, or those that begin the next turn. Empty if the
        template writes none that is a token."""
        marks = self.mark.findall(self._ending)[:1] or list(filter(None, self.next_marks))
        return list(dict.fromkeys(self.tokenizer.convert_tokens_to_ids(mark) for mark in marks if self._is_token(mark)))

    @cached_property
    def end_remark(self) -> str:
        """What to know about the end of answers; empty where the template writes an end token."""
        marks = self.mark.findall(self._ending) or list(filter(None, self.next_marks[:1]))
        if not marks:
            return (
                "the chat template writes no end token after an answer, so the model is not trained to stop; set data.template "
                "to a template that writes one"
            )
        known = [mark for mark in marks if self._is_token(mark)]
        if not known:
            return (
                f"the chat template ends an answer with {json.dumps(marks[-1])}, which is not a token of this tokenizer, so "
                "generation does not stop there; set data.template to another template, or model.add_tokens"
            )
        if not self.writes_end:
            return (
                f"the chat template writes no end after an answer: {json.dumps(marks[0])}, which begins the next turn, has loss"
            )
        return ""

    def _is_token(self, text: str) -> bool:
        found = self.tokenizer.convert_tokens_to_ids(text)
        return found is not None and found != self.tokenizer.unk_token_id


def end_tokens(tokenizer: Any) -> list[int]:
    """The tokens with which the tokenizer's chat template ends an answer; none without a template."""
    template = getattr(tokenizer, "chat_template", None)
    return list(_ends_of(tokenizer, template, len(tokenizer))) if isinstance(template, str) else []


@lru_cache(maxsize=4)  # each call renders a dozen probes, and every batch of answers asks
def _ends_of(tokenizer: Any, template: str, size: int) -> tuple[int, ...]:
    return tuple(ChatTemplate(tokenizer, {}).ends)


def _reasoning_as_text(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    return {name: value for name, value in message.items() if name != "reasoning_content"} | {
        "content": with_reasoning(message)
    }
