"""Text bytes per token, so that losses of different tokenizers compare as bits per byte. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MARK = "▁"
_PREPEND = {"type": "Prepend", "prepend": MARK}


class TokenBytes(NamedTuple):
    """The bytes of each token of a vocabulary.

    Args:
        sizes: UTF-8 bytes that the token stands for, `[V]`; 0 for special tokens.
        spaced: whether the token may begin with the space that the tokenizer puts before a text, `[V]`; all false if it puts
            none.
        is_first: only the first text of a row gets that space; else every text after a special token does.
    """

    sizes: np.ndarray
    spaced: np.ndarray
    is_first: bool = False

    def count_bytes(self, ids: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Text bytes of each token, `[tokens]`, without the spaces that the tokenizer added.

        Args:
            ids: the rows, concatenated.
            starts: where each row begins; its first token is not predicted and counts 0.
        """
        known = ids < len(self.sizes)
        ids = np.where(known, ids, 0)
        found = np.where(known, self.sizes[ids], 0)
        if self.spaced.any():
            added = np.zeros(len(ids), dtype=bool)
            added[1:] = self.spaced[ids[1:]] & (self.sizes[ids[:-1]] == 0) & known[:-1]
            if self.is_first:
                added &= np.isin(np.arange(len(ids)), starts + 1)
            found = found - (added & known)
        found[starts[starts < len(ids)]] = 0
        return found


def token_bytes(tokenizer: Any) -> TokenBytes | None:
    """The bytes of a tokenizer's tokens: exact for byte-level BPE, and for SentencePiece with byte fallback unless the text
    itself contains `▁`.

    None for a tokenizer whose tokens have no definite bytes: one that changes the text, or has an unknown token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else {}
    vocabulary = tokenizer.get_vocab()
    if (spec.get("decoder") or {}).get("type") == "ByteLevel" and not spec.get("normalizer"):
        space = "Ġ" if any(part.get("add_prefix_space") for part in _parts(spec.get("pre_tokenizer"))) else None
        found = {token: len(token) for token in vocabulary}  # each character stands for one byte
    elif _is_sentencepiece(spec, vocabulary):
        space = MARK if _prepends(spec) else None
        found = {token: len(token.replace(MARK, " ").encode()) for token in vocabulary} | dict.fromkeys(BYTES, 1)
    else:
        return None
    for added in spec["added_tokens"]:
        if added["content"] not in BYTES:
            found[added["content"]] = 0 if added["special"] else len(added["content"].encode())
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    spaced = np.zeros(len(sizes), dtype=bool)
    for token, index in vocabulary.items():
        sizes[index] = found[token]
        spaced[index] = space is not None and found[token] > 0 and token.startswith(space)
    return TokenBytes(sizes, spaced, _is_first(spec))


def _parts(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer, or each step of a sequence."""
    yield from (step or {}).get("normalizers") or (step or {}).get("pretokenizers") or ([step] if step else [])


def _is_sentencepiece(spec: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Whether tokens are the text itself with `▁` for spaces, and bytes for characters without a token."""
    if not (spec.get("model") or {}).get("byte_fallback") or not all(byte in vocabulary for byte in BYTES):
        return False
    marks = (part["type"] == "Metaspace" and part.get("replacement") == MARK for part in _parts(spec.get("pre_tokenizer")))
    if not (any(marks) or any(_replaces_spaces(part) for part in _parts(spec.get("normalizer")))):
        return False
    keeps = all(_keeps_text(part) for part in _parts(spec.get("pre_tokenizer")))
    return keeps and all(_replaces_spaces(part) or part == _PREPEND for part in _parts(spec.get("normalizer")))


def _replaces_spaces(part: dict[str, Any]) -> bool:
    return part == {"type": "Replace", "pattern": {"String": " "}, "content": MARK}


def _keeps_text(part: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer removes nothing from the text."""
    if part["type"] == "Metaspace":
        return bool(part.get("replacement") == MARK)
    return part["type"] == "Digits" or (part["type"] == "Split" and part.get("behavior") != "Removed")


def _prepends(spec: dict[str, Any]) -> bool:
    """Whether every text gets a space before it."""
    marks = [part for part in _parts(spec.get("pre_tokenizer")) if part["type"] == "Metaspace"]
    return _PREPEND in _parts(spec.get("normalizer")) or any(part.get("prepend_scheme") != "never" for part in marks)


def _is_first(spec: dict[str, Any]) -> bool:
    return any(part.get("prepend_scheme") == "first" for part in _parts(spec.get("pre_tokenizer")))
