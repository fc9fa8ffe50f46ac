"""Strategies side by side on the user's own data: the same rows, the same budget, one process a run. No torch in here."""
