"""Bytes of tokens: they add up to those of the text, except for the space that a tokenizer puts before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer, write_jsonl
from helpers.tokenizer_kinds import MARKED, SPECIAL, TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st

from hfstrat.data.prepare import prepare
from hfstrat.data.render import IGNORED
from hfstrat.data.token_bytes import token_bytes
from hfstrat.recipe.data import Data
from hfstrat.trainer.baselines import row_bytes

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<"), min_size=1, max_size=40)
PREPENDS = {"bytes": True, "first": False, "always": False, "prefixed": False}  # also before a space


def ids_of(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("kind", PREPENDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_bytes_of_any_text_are_those_of_its_tokens(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    found, ids = token_bytes(tokenizer), ids_of(tokenizer, text)
    assert found is not None
    is_added = PREPENDS[kind] or not text.startswith(" ")
    assert found.sizes[ids].sum() == len(text.encode()) + is_added
    assert found.spaced[ids[0]]
    if is_added:  # after a special token the added space does not count; the end token has no bytes
        row = np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        assert found.count_bytes(row, np.array([0])).sum() == len(text.encode())


@given(text=TEXTS)
@settings(max_examples=50, deadline=None)
def test_no_space_is_counted_where_none_is_added(text: str) -> None:
    tokenizer = make_tokenizer()
    found, ids = token_bytes(tokenizer), ids_of(tokenizer, text)
    assert found is not None
    assert not found.spaced.any()
    assert found.sizes[ids].sum() == len(text.encode())


def test_a_real_sentencepiece_tokenizer(shared: Path) -> None:
    from hfstrat.models.load import load_tokenizer
    from hfstrat.recipe.schema import Model

    tokenizer = load_tokenizer(Model(name_or_path=str(shared / "models" / "stories260K")))
    found = token_bytes(tokenizer)
    assert found is not None
    stories = (shared / "data" / "tinystories_sample" / "tiny_stories.txt").read_text().splitlines()
    for text in [*filter(None, stories[:200]), "naïve 世界\n\ttabs\r\n", "  two"]:
        assert found.sizes[ids_of(tokenizer, text)].sum() == len(text.encode()) + 1


@pytest.mark.parametrize("length", [400, 24])
@pytest.mark.parametrize("kind", PREPENDS)
def test_the_bytes_of_rows_are_those_of_predicted_tokens(kind: str, length: int, tmp_path: Path) -> None:
    """For texts, complete or split, and for answers, before which no space is added."""
    tokenizer = TOKENIZERS[kind]
    found = token_bytes(tokenizer)
    assert found is not None
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(each) for each in SPECIAL}
    texts = [f"the cat {n} sat, é世 and went on to sit {'again ' * n}" for n in range(12)]
    talks = [{"prompt": f"who {n}", "completion": f"the cat {n} é"} for n in range(12)]
    for rows in ([{"text": text} for text in texts], talks):
        tokenizer.chat_template = MARKED if rows is talks else None
        train = write_jsonl(tmp_path / "rows.jsonl", rows)
        section = Data(train=str(train), eval=str(train), max_length=length, overflow="split")
        data = prepare(section, tokenizer, 0)
        slow: dict[int, float] = {}
        for ids, labels, row in zip(data.eval["input_ids"], data.eval["labels"], data.eval["row"], strict=True):
            for place in range(1, len(ids)):
                if labels[place] != IGNORED:
                    begins = ids[place - 1] in special and (place == 1 or kind != "first")
                    size = found.sizes[ids[place]] - (begins and bool(found.spaced[ids[place]]))
                    slow[row] = slow.get(row, 0) + size
        fast: dict[int, float] = {}
        for row, size in zip(data.eval["row"], row_bytes(data.eval, found), strict=True):
            fast[row] = fast.get(row, 0) + size
        assert fast == slow
        if rows is talks:
            assert [fast[n] for n in range(12)] == [len(talk["completion"].encode()) for talk in talks]
        else:
            assert [fast[n] for n in range(12)] == [len(text.encode()) for text in texts]


def test_tokenizers_without_definite_bytes_have_none() -> None:
    """An unknown token, a normalizer that changes the text, a pre-tokenizer that removes something, a word vocabulary."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert token_bytes(TOKENIZERS["prepend"]) is None
    for change in ("normalizer", "pre_tokenizer"):
        backend = Tokenizer.from_str(TOKENIZERS["first"].backend_tokenizer.to_str())
        if change == "normalizer":
            backend.normalizer = normalizers.NFKC()
        else:
            backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) is None
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=words)) is None
