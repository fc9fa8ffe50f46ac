"""Rows in, token ids with a mask out, and an account of what became of every row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfstrat.data.account import Account
    from hfstrat.data.preparation import Prepared, prepare

__all__ = ["Account", "Prepared", "prepare"]


def __getattr__(name: str) -> Any:
    """`prepare` needs numpy, and the checks of the command line, which live in here too, have no time for it."""
    if name not in __all__:
        raise AttributeError(name)
    from hfstrat.data.account import Account
    from hfstrat.data.preparation import Prepared, prepare

    return {"Account": Account, "Prepared": Prepared, "prepare": prepare}[name]
