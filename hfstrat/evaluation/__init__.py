"""Measurement of a model, by `hfstrat evaluate` and by a training run before and after training, with the same code."""
