"""The chat templates that TRL ships with a training variant of each, and TRL's masks as texts."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import trl
from trl.chat_template_utils import get_training_chat_template
from trl.data_utils import prepare_multimodal_messages

from hfstrat.data.render import Renderer

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
PAIRED = [name for name in NAMES if (FOLDER / f"{name}_training.jinja").is_file()]
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "finds",
        "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "it"}}},
    },
}
QUESTION, ANSWER = {"role": "user", "content": "who sat"}, {"role": "assistant", "content": "the cat"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "mat"}}}
TALKS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [QUESTION, ANSWER]},
    "system": {"messages": [{"role": "system", "content": "be brief"}, QUESTION, ANSWER]},
    "turns": {"messages": [QUESTION, ANSWER, {"role": "user", "content": "where"}, {**ANSWER, "content": "on the mat"}]},
    "tools": {
        "messages": [
            {"role": "user", "content": "find it"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "find", "content": "7 found"},
            {"role": "assistant", "content": "seven", "reasoning_content": "look here"},
        ],
        "tools": [TOOL],
    },
}
MARKS = ("<s>", "</s>", "<pad>", "<unk>")


def tokenizer_of(template: str) -> Any:
    """A tokenizer of single bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer: Any = Tokenizer(models.BPE(vocab={one: place for place, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), MARKS, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    made.chat_template = template
    return made


def tokenizer_named(name: str) -> Any:
    return tokenizer_of((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def answers_of_trl(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[str] | None:
    """What TRL trains of each answer (`assistant_only_loss`); None if it refuses the conversation."""
    try:
        training = get_training_chat_template(tokenizer) or tokenizer.chat_template
    except ValueError:  # a template without a training variant
        return None
    for parts in (False, True):  # TRL gives content as parts to the processors of vision models
        talk = prepare_multimodal_messages(copy.deepcopy(messages)) if parts else messages
        try:
            made = tokenizer.apply_chat_template(
                talk, tools=tools, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
            )
        except Exception:  # the template's own refusal
            continue
        if all(message["content"] in tokenizer.decode(made["input_ids"]) for message in messages):
            runs = itertools.groupby(zip(made["input_ids"], made["assistant_masks"], strict=True), lambda pair: pair[1])
            return [str(tokenizer.decode([place for place, _ in run])) for trained, run in runs if trained]
    return None


def answers_of_ours(renderer: Renderer, example: Any) -> list[str]:
    """What is trained of each answer, in their order."""
    return [segment.text for row in renderer.render(example) for segment in row.segments if segment.trained]
