"""Examples as they are shown: in pieces with and without loss, and without the middle of long ones."""

from __future__ import annotations

import itertools
from typing import Any

from hfstrat.data.render import IGNORED

SHOWN_TOKENS = 200
LEAST = 8  # tokens of a span to show


def pieces(tokenizer: Any, ids: list[int], labels: list[int]) -> list[dict[str, Any]]:
    """The text of an example in pieces with and without loss."""
    found, done = list[dict[str, Any]](), ""
    spans = itertools.groupby(range(len(ids)), key=lambda place: labels[place] != IGNORED)
    for trained, places in spans:
        place = list(places)
        text = tokenizer.decode(ids[: place[-1] + 1], clean_up_tokenization_spaces=False)  # some decoders strip a first space
        alone = text[len(done) :] if text.startswith(done) else tokenizer.decode(ids[place[0] : place[-1] + 1])
        found.append({"text": alone, "trained": trained})
        done = text
    return found


def elided(ids: list[int], labels: list[int]) -> list[tuple[list[int], bool, str]]:
    """An example in spans with and without loss, `SHOWN_TOKENS` in all, so that the borders of the mask are visible.

    Long spans lose their middle, and an example of very many spans those in the middle.

    Returns:
        Token ids and whether they are supervised; or no ids, and in words what is omitted.
    """
    begins = [0, *(i for i in range(1, len(ids)) if (labels[i] != IGNORED) != (labels[i - 1] != IGNORED)), len(ids)]
    spans = [(begin, end, labels[begin] != IGNORED) for begin, end in itertools.pairwise(begins) if begin < end]
    most = SHOWN_TOKENS // LEAST
    middle = range(most // 2, len(spans) - most // 2) if len(spans) > most and len(ids) > SHOWN_TOKENS else range(0)
    each = _share([end - begin for place, (begin, end, _) in enumerate(spans) if place not in middle])
    shown: list[tuple[list[int], bool, str]] = []
    for place, (begin, end, is_supervised) in enumerate(spans):
        if middle and place == middle[0]:
            left, right = begin, spans[middle[-1]][1]
            supervised = sum(label != IGNORED for label in labels[left:right])
            shown.append(([], False, f"{_more(right - left)}, {supervised:,} with loss"))
        elif place in middle:
            continue
        elif end - begin <= each:
            shown.append((ids[begin:end], is_supervised, ""))
        else:
            head, tail = begin + each // 2, end - (each - each // 2)
            omitted = f"{_more(tail - head)} {'with' if is_supervised else 'without'} loss"
            shown += [(ids[begin:head], is_supervised, ""), ([], is_supervised, omitted), (ids[tail:end], is_supervised, "")]
    return shown


def _share(lengths: list[int]) -> int:
    """Tokens to show of each span at most: short ones leave their room to the longer ones."""
    room = SHOWN_TOKENS
    for place, length in enumerate(sorted(lengths)):
        each = room // (len(lengths) - place)
        if length > each:
            return each
        room -= length
    return SHOWN_TOKENS


def _more(count: int) -> str:
    return f"{count:,} more token{'s' * (count != 1)}"
