"""Early stopping that a resumed run takes up where it was."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback


class Patience(EarlyStoppingCallback):  # type: ignore[misc]
    """Ends training after `early_stopping_patience` evaluations without a gain over the best so far.

    The evaluation before training counts as the first one.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:  # it was over when it was cut off
            control.should_training_stop = True

    def follow(self, given: Any) -> None:
        """Take the settings of the recipe as it is now."""
        self.early_stopping_patience = given.early_stopping_patience
