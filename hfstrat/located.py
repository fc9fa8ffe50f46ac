"""Messages that begin with a key of the recipe, and where that key stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hfstrat.config import Recipe
from hfstrat.errors import UserError
from hfstrat.loading import Loaded


def key_of(message: str) -> tuple[str, ...] | None:
    """The recipe key that a message begins with, if it does."""
    match = re.match(r"(\w+(?:\.\w+)*): ", message)
    path = tuple(match.group(1).split(".")) if match else ()
    return path if path and path[0] in Recipe.model_fields else None


@contextmanager
def about(key: str) -> Iterator[None]:
    """A message that names no key of the recipe is about this one."""
    try:
        yield
    except UserError as error:
        if key_of(str(error)):
            raise
        raise UserError(f"{key}: {error}") from error.__cause__


@contextmanager
def located(loaded: Loaded) -> Iterator[None]:
    """A UserError from inside gets the file and line of the recipe key that it begins with."""
    try:
        yield
    except UserError as error:
        path = key_of(str(error))
        raise UserError(f"{loaded.place(path) if path else loaded.source}: {error}") from error.__cause__
