"""A head on pooled hidden states in the format of sentence-transformers: `SentenceTransformer(folder).encode(texts)` returns
its outputs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hfstrat.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


class PooledClassifier(Protocol):
    """What is saved: a body, the pooling of its hidden states, and a head of linear layers."""

    body: Any
    head: nn.Sequential
    pooling: str
    config: Any


POOLING = {"mean": "mean", "last": "lasttoken", "first": "cls"}  # their names


def check_installed(otherwise: str = "") -> None:
    """Raises UserError where the library is not installed, with what may be set instead. Imports nothing."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            f"{'model.pooling' if otherwise else 'strategy.name'}: a head on pooled hidden states is saved in the format of "
            f"sentence-transformers: {otherwise}pip install 'hfstrat[head]'"
        )


def is_one(folder: str | Path) -> bool:
    return (Path(folder) / "modules.json").is_file()


def save(
    model: PooledClassifier, tokenizer: Any, folder: Path, labels: dict[str, Any], max_length: int, dtype: torch.dtype
) -> None:
    """Write Transformer + Pooling + Dense, with the body's weights in `dtype` on the disk and the head's in float32.

    The config has float32, in which it is loaded: in the body's 16 bits the head would be rounded.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer

    folder.mkdir(parents=True, exist_ok=True)
    body = folder / "body.partial"
    model.body.save_pretrained(body)
    tokenizer.save_pretrained(body)
    transformer = Transformer(str(body), max_seq_length=max_length)
    unused = transformer.auto_model.load_state_dict(model.body.state_dict(), strict=False).missing_keys
    for name in unused:  # a pooler that the body lacks: unused, and zero so that results are reproducible
        torch.nn.init.zeros_(transformer.auto_model.get_parameter(name))
    modules: list[nn.Module] = [transformer, Pooling(model.config.get_text_config().hidden_size, POOLING[model.pooling])]
    for linear, activation in layers_of(model.head):
        dense = Dense(linear.in_features, linear.out_features, bias=linear.bias is not None, activation_function=activation)
        dense.linear.load_state_dict(linear.state_dict())
        modules.append(dense)
    whole = SentenceTransformer(modules=modules, device="cpu")
    whole.save_pretrained(str(folder), create_model_card=False)
    for file in sorted(body.iterdir()):
        file.unlink()
    body.rmdir()
    add_to_config(folder / "config.json", labels)
    only_texts(folder / "sentence_bert_config.json")
    shrink(folder, dtype)


def layers_of(head: nn.Sequential) -> list[tuple[nn.Linear, nn.Module]]:
    """Each linear layer with its activation."""
    from torch import nn

    found = []
    parts = list(head)
    for index, part in enumerate(parts):
        if isinstance(part, nn.Linear):
            following = parts[index + 1] if index + 1 < len(parts) else nn.Identity()
            found.append((part, following))
    return found


def add_to_config(file: Path, values: dict[str, Any]) -> None:
    """Add values, such as labels, to a config.json, where `AutoConfig` finds them."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def only_texts(file: Path) -> None:
    """Keep the library from applying the tokenizer's chat template: the head was trained on plain texts."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["modality_config"] = {"text": config["modality_config"]["text"]}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shrink(folder: Path, dtype: torch.dtype) -> None:
    """Store float32 tensors whose values a 16-bit type holds exactly in that type; the config keeps float32."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        smaller = {name: smallest(tensor, dtype) for name, tensor in tensors.items()}
        save_file(smaller, file, metadata={"format": "pt"})


def smallest(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if tensor.dtype != torch.float32 or dtype == torch.float32:
        return tensor
    cast = tensor.to(dtype)
    return cast if torch.equal(cast.float(), tensor) else tensor


def load(folder: str) -> Any:
    """The saved classifier with the forward of transformers' ones: token ids in, `.logits` out."""
    check_installed()
    from sentence_transformers import SentenceTransformer
    from torch import nn
    from transformers.modeling_outputs import SequenceClassifierOutput

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = SentenceTransformer(folder, device="cpu")
            self.config = self.whole[0].auto_model.config

        def forward(self, labels: Any = None, **inputs: Any) -> Any:
            import torch

            given = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            given = self.whole[0](given)
            with torch.autocast(given["token_embeddings"].device.type, enabled=False):  # as the head was trained
                given["token_embeddings"] = given["token_embeddings"].float()
                for module in list(self.whole)[1:]:
                    given = module(given)
            return SequenceClassifierOutput(logits=given["sentence_embedding"])

    loaded = Classifier().eval()
    loaded.__class__.__name__ = "SentenceTransformer"  # the name in the report
    return loaded
