"""Whether the tokens of a tokenizer are those of a model: tokens beyond its embeddings, and a tokenizer of another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError
from hfstrat.models.load import source_of

if TYPE_CHECKING:
    from hfstrat.models.load import Base
    from hfstrat.recipe.schema import Model

SHOWN = 5  # tokens that a message names
SAME = 0.5  # share of a model's token ids that have to mean the same token in another tokenizer


def check_tokenizer(model: Model, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer of another model, whose token ids would select embeddings of other tokens. Raises UserError.

    Args:
        tokenizer: that of the run.
        rows: of the model's embeddings.
    """
    from transformers import AutoTokenizer

    if not model.tokenizer:
        return
    source, options = source_of(model)
    try:
        own = AutoTokenizer.from_pretrained(source, **options).get_vocab()
    except Exception:  # it has none, so there is nothing to compare with
        return
    given = tokenizer.get_vocab()
    same = sum(given.get(token) == index for token, index in own.items())
    if same < SAME * len(own):
        raise UserError(
            f"model.tokenizer: {model.tokenizer} gives only {same:,} of {len(own):,} tokens the ids that they have in the "
            f"tokenizer of {model.name_or_path}, whose embeddings would belong to other tokens; remove model.tokenizer, or "
            "train from random weights: strategy scratch"
        )


def note_tokens_beyond(base: Base, tokenizer: Any, rows: int, data: Any) -> None:
    """Record the tokens without an embedding in the checkpoint, which has `rows` of them, and say what becomes of them."""
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    found = sorted(beyond.keys() - set(base.new_token_ids))
    if not found:
        return
    used = used_ids(data, rows) & set(found)
    if data is not None and data.stream is not None:
        used = set(found)  # later rows may use any
    base.tokens_beyond, base.rows_use_them = found, bool(used)
    names = ", ".join(beyond[index] for index in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    base.say(
        f"{'tokenizer':<9} {len(found):,} of its tokens are beyond the model's {rows:,} embeddings: {names}; the rows use "
        f"{len(used):,} of them. They get new embeddings, as with model.add_tokens"
    )


def used_ids(data: Any, least: int) -> set[int]:
    """The token ids of at least `least` in the training and evaluation rows."""
    found: set[int] = set()
    for split in (data.train, data.eval) if data is not None else ():
        for batch in split.select_columns(["input_ids"]).iter(1000):
            found |= {int(index) for ids in batch["input_ids"] for index in ids if index >= least}
    return found


def refuse_frozen(base: Base, cure: str) -> None:
    """Refuse new tokens whose embeddings would stay random. Raises UserError with the `cure`."""
    if not (base.new_token_ids or base.rows_use_them) or base.model.get_input_embeddings().weight.requires_grad:
        return
    if base.new_token_ids:
        raise UserError(f"model.add_tokens: the embeddings of the new tokens are frozen and would stay random; {cure}")
    if base.rows_use_them:
        raise UserError(
            "model.tokenizer: the rows use tokens beyond the model's embeddings, as if model.add_tokens named them, and their "
            f"new embeddings are frozen and would stay random; {cure}"
        )
