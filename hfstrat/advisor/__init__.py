"""Predicts memory, time and quality of the strategies for a model, data and a machine."""
