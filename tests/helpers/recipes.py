"""Recipes that several test files start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfstrat.recipe.schema import Recipe


def recipe_of(model: Path, strategy: dict[str, Any], **more: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name_or_path": str(model), **more}, "strategy": strategy, "data": "x.jsonl", "output_dir": "x"}
    )


OWN = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BagConfig(PreTrainedConfig):
    model_type = "bag"
    def __init__(self, vocab_size=10, width=8, **kwargs):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, 1
        super().__init__(**kwargs)


class Bag(PreTrainedModel, GenerationMixin):
    config_class = BagConfig
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()
    def get_input_embeddings(self):
        return self.table
    def get_output_embeddings(self):
        return self.head
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        seen = self.table(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[:, None]
        return CausalLMOutput(logits=self.head(seen))
"""


SOUND = """\
model: model
strategy:
  name: lora
  r: 4
data:
  train: rows.jsonl
  eval_size: 2
training:
  max_steps: 4
  learning_rate: 1e-3
output_dir: run
"""
