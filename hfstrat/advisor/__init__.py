"""The adviser: which strategy fits a model, data, a machine and a deadline, with predictions that were checked. No torch."""
