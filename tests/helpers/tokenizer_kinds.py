"""Small tokenizers and chat templates of several kinds."""

from __future__ import annotations

from typing import Any

from conftest import sentences

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|answer|>"]


MARKED = (  # each turn begins and ends with a special token
    "{{ bos_token }}{% for m in messages %}{{ '<|answer|>' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


KINDS = ("first", "always", "prepend", "bytes", "prefixed")


def make(kind: str, template: str | None = MARKED) -> Any:
    """A small tokenizer with a space before every text: Metaspace's `first` and `always`, Llama 2's normaliser without and
    with bytes for unknown characters, and a byte-level one with `add_prefix_space`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    legacy = kind in ("prepend", "bytes")
    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=kind != "prepend"))
    alphabet = ["▁", *(chr(code) for code in range(33, 127)), *([] if kind == "bytes" else ["\n"])]
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))] if kind != "prepend" else SPECIAL
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "prefixed":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), SPECIAL
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    if kind != "prefixed":
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 260, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # one sentence per text: no merges across lines, as in SentencePiece
    tokenizer.train_from_iterator(sentences(200), trainer)
    stored = _without_bytes(tokenizer.to_str())
    tokenizer = Tokenizer.from_str(stored)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)
    made.chat_template = template
    return made


def _without_bytes(stored: str) -> str:
    """Byte tokens are in the vocabulary, but are not special tokens that are matched in the text."""
    import json

    tree = json.loads(stored)
    tree["added_tokens"] = [each for each in tree["added_tokens"] if each["content"] in SPECIAL]
    return json.dumps(tree)


TOKENIZERS = {kind: make(kind) for kind in KINDS}


HEAD = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
    "<|im_start|>{{ m.role }}\n"
)


TAIL = (
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# an answer after the last question has its thoughts, an empty block of them where it is the very last; others have none
THINKING = HEAD + (
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said if m.role == 'assistant' else m.content }}" + TAIL
)
