"""Configs of TRL, axolotl and LLaMA-Factory as recipes: one table of keys per tool, and what applies it."""
