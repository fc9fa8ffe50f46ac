"""Rows in, token ids with a mask out, and an account of what became of every row."""

from hfstrat.data.prepare import Account, Prepared, prepare

__all__ = ["Account", "Prepared", "prepare"]
