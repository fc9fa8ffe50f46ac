"""The classification heads of transformers' encoders and decoders: their modules and shapes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError

if TYPE_CHECKING:
    from torch import nn

CLASS_HEAD = re.compile(r"(?:^|\.)(?:score|classifier|pre_classifier|pooler|sequence_summary)\.|^head\.")
ROBERTA_LIKE = ("roberta", "xlm-roberta", "camembert", "mpnet", "electra")

Shapes = dict[str, tuple[int, ...]]


def head_modules(model: Any) -> list[str]:
    """The names of the head's modules in a classification model: those next to the body, and the pooler."""
    body = model.base_model_prefix
    beside = [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
    inner = getattr(model, body, None)
    within = [f"{body}.pooler"] if getattr(inner, "pooler", None) is not None else []
    return [*beside, *within]


def with_head(shapes: Shapes, config: dict[str, Any], labels: int) -> Shapes | None:
    """The parameters of the classification model that transformers builds from a checkpoint, without torch.

    Args:
        shapes: of the checkpoint, which may have no head or another head.

    Returns:
        None for families with unknown heads.
    """
    kind, prefix = str(config.get("model_type")), _prefix(config)
    if prefix is None:
        return None
    bare = not any(name.startswith(f"{prefix}.") for name in shapes)
    if bare and any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or []):
        return None  # a decoder whose body has another name
    named = {f"{prefix}.{name}" if bare else name: shape for name, shape in shapes.items()}
    body = {name: shape for name, shape in named.items() if name.startswith(f"{prefix}.") and "position_ids" not in name}
    width = int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or config.get("d_model") or 0)
    if not body or not width:
        return None
    head = _head(kind, prefix, width, labels, bool(config.get("classifier_bias", False)), bool(config.get("norm_bias", False)))
    if not any(name.startswith(f"{prefix}.pooler.") for name in head):
        body = {name: shape for name, shape in body.items() if not name.startswith(f"{prefix}.pooler.")}
    return body | head


def final_linear(model: Any) -> nn.Linear:
    """The last linear layer of a classifier, whose outputs are the logits. Raises UserError where none is found."""
    from torch import nn

    body = model.base_model_prefix
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{body}.") and module.out_features == model.config.num_labels
    ]
    if not found:
        raise UserError(f"strategy: {type(model).__name__} has no linear head; take partial or lora")
    return found[-1]


def _prefix(config: dict[str, Any]) -> str | None:
    """The name of the body in the classification model of this family."""
    kind = str(config.get("model_type"))
    prefixes = {
        "distilbert": "distilbert",
        "modernbert": "model",
        "gpt2": "transformer",
        "gpt_neox": "gpt_neox",
        "opt": "model",
    }
    prefixes |= {"bert": "bert", "electra": "electra", "mpnet": "mpnet", "bloom": "transformer"}
    prefixes |= dict.fromkeys(("roberta", "xlm-roberta", "camembert"), "roberta")
    if kind in prefixes:
        return prefixes[kind]
    architectures = [str(name) for name in config.get("architectures") or []]
    return "model" if any(name.endswith("ForCausalLM") for name in architectures) else None


def _head(kind: str, prefix: str, width: int, labels: int, bias: bool, norm_bias: bool) -> Shapes:
    square, row = (width, width), (width,)
    if kind == "bert":
        return {
            f"{prefix}.pooler.dense.weight": square,
            f"{prefix}.pooler.dense.bias": row,
            "classifier.weight": (labels, width),
            "classifier.bias": (labels,),
        }
    if kind in ROBERTA_LIKE:
        return {
            "classifier.dense.weight": square,
            "classifier.dense.bias": row,
            "classifier.out_proj.weight": (labels, width),
            "classifier.out_proj.bias": (labels,),
        }
    if kind == "distilbert":
        return {
            "pre_classifier.weight": square,
            "pre_classifier.bias": row,
            "classifier.weight": (labels, width),
            "classifier.bias": (labels,),
        }
    if kind == "modernbert":
        head = {"head.dense.weight": square, "head.norm.weight": row}
        head |= {"head.dense.bias": row} if bias else {}
        head |= {"head.norm.bias": row} if norm_bias else {}
        return head | {"classifier.weight": (labels, width), "classifier.bias": (labels,)}
    return {"score.weight": (labels, width)}


def pad_token_of(config: Any, tokenizer: Any) -> int:
    """The id of the padding token.

    Raises:
        UserError: none exists.
    """
    for pad in (tokenizer.pad_token_id, config.pad_token_id):
        if pad is not None:
            return int(pad)
    raise UserError("model.tokenizer: it has neither a padding token nor an end token, so texts cannot be batched")
