"""The bytes added up for a block equal what autograd stores, for each family, precision and strategy."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hfstrat.advisor import architecture
from hfstrat.models import fused_loss
from hfstrat.models.load import set_precision
from hfstrat.models.parameter_names import BLOCK
from hfstrat.recipe.schema import STRATEGIES
from hfstrat.strategies import build
from hfstrat.strategies.description import Description

ROWS, LENGTH, WORDS, LABELS = 2, 64, 200, 3
SECTIONS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 16},
    "partial": {"name": "partial"},
}


def config_of(family: str, layers: int) -> Any:
    from transformers import BertConfig, GPT2Config, LlamaConfig

    common = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    if family == "llama":
        sizes = {"intermediate_size": 160, "num_key_value_heads": 2, "tie_word_embeddings": True}
        return LlamaConfig(max_position_embeddings=512, **common, **sizes)
    if family == "gpt2":
        return GPT2Config(**common, n_positions=512)
    return BertConfig(**common, intermediate_size=160, num_labels=LABELS)


def model_of(family: str, name: str, layers: int, dtype: torch.dtype) -> tuple[Any, Any, Description]:
    """The model as it is trained, the advisor's view of it, and its trainable parameters."""
    from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(0)
    config = config_of(family, layers)
    kinds: dict[str, Any] = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel, "bert": BertForSequenceClassification}
    model = kinds[family](config)
    found = {key: tuple(p.shape) for key, p in model.named_parameters()}
    seen = architecture.from_config("a test", config.to_dict(), found, 0)
    section = SECTIONS[name] | ({"last_n_layers": layers} if name == "partial" else {})
    description = build(STRATEGIES[name].model_validate(section)).describe(found, family != "bert")
    trained = model
    if family != "bert":
        assert fused_loss.bind_head_loss(model) is None
    model.requires_grad_(False)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in description.names)
    if name == "lora":
        from peft import LoraConfig, get_peft_model

        whole = ["classifier", "pooler"] if family == "bert" else None
        kind = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
        settings: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "modules_to_save": whole, "task_type": kind}
        trained = get_peft_model(model, LoraConfig(**settings))
    set_precision(trained, dtype)
    return trained.train(), seen, description


def stored(model: Any, family: str, dtype: torch.dtype, masked: bool) -> int:
    """Bytes of storages, other than parameters and buffers, that the forward pass leaves for the backward pass."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    if masked:
        mask[1, -4:] = 0
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, WORDS, (ROWS, LENGTH)), "attention_mask": mask}
    if family != "bert":
        inputs |= {"loss_rows": torch.arange(ROWS * LENGTH), "targets": torch.randint(0, WORDS, (ROWS * LENGTH,))}
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        outputs = model(**inputs)
    assert outputs is not None  # keeps the storages alive until the sizes are counted
    return sum(sizes.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["full", "lora", "partial"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_block_stores_what_was_added_up(family: str, name: str, dtype: torch.dtype, masked: bool) -> None:
    sizes = []
    for layers in (2, 3):
        model, seen, description = model_of(family, name, layers, dtype)
        copies = 2 * copied(description) if dtype == torch.bfloat16 else 0
        sizes.append(stored(model, family, dtype, masked) - copies)
    block = architecture.live_blocks(seen, description)[-1]
    predicted = architecture.block_bytes(seen, description, block, dtype.itemsize, LENGTH, masked)
    assert (sizes[1] - sizes[0]) / (ROWS * LENGTH) == pytest.approx(predicted, rel=1e-6)


def copied(description: Description) -> int:
    """Weights of the blocks' linear layers and adapters, of which autocast stores a 16-bit copy."""
    matrices = {key: shape for key, shape in description.shapes.items() if BLOCK.search(key) and len(shape) == 2}
    whole = sum(prod(shape) for key, shape in matrices.items() if key in description.names)
    return whole + sum(description.rank * sum(description.shapes[key]) for key in description.adapted if key in matrices)
