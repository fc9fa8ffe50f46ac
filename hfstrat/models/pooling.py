"""How a text's hidden states become one vector, and a classifier that pools them in another way than transformers' class.

A sentence encoder comes with `modules.json`, in which sentence-transformers names its pooling. transformers' classes ignore it:
BERT's puts a pooler on the first token, which such an encoder was never trained for.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hfstrat.models.load import read_json

if TYPE_CHECKING:
    import torch

    from hfstrat.recipe.schema import Model

MODES = {"mean": "mean", "cls": "first", "lasttoken": "last"}  # sentence-transformers' names, and ours
LEGACY = "pooling_mode_"  # keys of older files, such as pooling_mode_mean_tokens: true
BY_CONFIG = {"modernbert": {"mean": "mean", "first": "cls"}}  # families whose class reads `classifier_pooling`


class Pooling(NamedTuple):
    """`mode` is mean, first or last. `head`: the file of the trained linear layer on the pooled states, None without one."""

    mode: str
    head: str | None = None


def read(source: str, revision: str | None = None) -> Pooling | None:
    """The pooling that a model's own files name; None without such files, or where it is none of `MODES`.

    Args:
        source: a folder or a Hub id.
    """
    modules = _json(source, "modules.json", revision)
    if not isinstance(modules, list):
        return None
    kinds = [(str(one.get("type", "")).rpartition(".")[2], str(one.get("path", ""))) for one in modules]
    places = [path for kind, path in kinds if kind == "Pooling"]
    if len(places) != 1 or kinds[0][0] != "Transformer" or kinds[0][1]:
        return None
    mode = MODES.get(_mode_of(_json(source, f"{places[0]}/config.json", revision) or {}))
    return None if mode is None else Pooling(mode, _head(source, kinds, revision))


def _mode_of(config: dict[str, Any]) -> str:
    """sentence-transformers' name of the pooling; empty for several at once."""
    if isinstance(config.get("pooling_mode"), str):
        return str(config["pooling_mode"])
    active = [key.removeprefix(LEGACY) for key, on in config.items() if key.startswith(LEGACY) and on]
    return active[0].removesuffix("_tokens").removesuffix("_token") if len(active) == 1 else ""


def _head(source: str, kinds: list[tuple[str, str]], revision: str | None) -> str | None:
    """The weights of a classifier's only linear layer: a Dense directly on the pooled states, with an output per label."""
    if [kind for kind, _ in kinds] != ["Transformer", "Pooling", "Dense"]:
        return None
    config, dense = _json(source, "config.json", revision) or {}, _json(source, f"{kinds[2][1]}/config.json", revision) or {}
    linear = str(dense.get("activation_function", "")).endswith("Identity")
    if not config.get("problem_type") or not linear or dense.get("out_features") != len(config.get("id2label") or {}):
        return None
    return _file(source, f"{kinds[2][1]}/model.safetensors", revision)


def _json(source: str, name: str, revision: str | None) -> Any:
    import json

    file = _file(source, name, revision)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        return None


def _file(source: str, name: str, revision: str | None) -> str | None:
    """The local path of a model's file, downloaded from the Hub if need be; None if there is none."""
    folder = Path(source).expanduser()
    if folder.exists():
        return str(folder / name) if (folder / name).is_file() else None
    from transformers.utils import cached_file

    options: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    found: str | None = cached_file(source, name, revision=revision, **options)
    return found


def of_model(model: Model, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
    """The pooling of a classifier where transformers' class has another one, else None and keys for the class's config.

    Args:
        config: of the model, as its config.json has it.
    """
    if model.pooling == "class" or model.quantization or model.gguf_file or model.trust_remote_code or not model.name_or_path:
        return None, {}
    stored = read(model.name_or_path, model.revision)
    if model.pooling is not None and (stored is None or stored.mode != model.pooling):
        stored = Pooling(model.pooling)
    return (None, {}) if stored is None else _beyond_class(stored, config)


def _beyond_class(wanted: Pooling, config: dict[str, Any]) -> tuple[Pooling | None, dict[str, Any]]:
    from hfstrat.models.families import ENCODERS

    kind = str(config.get("model_type"))
    if wanted.head is not None:
        return wanted, {}
    if wanted.mode in BY_CONFIG.get(kind, {}):
        return None, {"classifier_pooling": BY_CONFIG[kind][wanted.mode]}
    if wanted.mode == "last" and kind not in ENCODERS and _is_decoder(config):
        return None, {}
    return wanted, {}


def _is_decoder(config: dict[str, Any]) -> bool:
    """Whether transformers' class of a model reads the last token."""
    from hfstrat.models.families import DECODERS, SHAPES

    names = [str(name) for name in config.get("architectures") or []]
    return config.get("model_type") in {*DECODERS, *SHAPES} or any(name.endswith("ForCausalLM") for name in names)


def is_local(model: Model) -> bool:
    """Whether the files that name the pooling can be read without the network."""
    return Path(model.name_or_path).expanduser().is_dir()


def local_of(model: Model) -> Pooling | None:
    """As `of_model`, before torch is imported; None for a model that is not local."""
    if not model.name_or_path or not is_local(model):
        return None
    return of_model(model, read_json(Path(model.name_or_path).expanduser() / "config.json"))[0]


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """`[B, T, H]` with a right-padded mask `[B, T]` to `[B, H]` in float32.

    mean: over the real tokens; last: the last real token; first: the first (CLS where the tokenizer has one).
    """
    import torch

    hidden = hidden.float()
    if pooling == "mean":
        weights = mask[:, :, None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return hidden[:, 0]


@functools.cache
def pooled_class(config_class: Any, mode: str) -> Any:
    """A class like transformers' classifier for this config, whose head is a linear layer on the pooled hidden states.

    Its body has the names of transformers' own class, without a pooler; the head is `classifier`, computed in float32.
    """
    import torch
    from torch import nn
    from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    own: Any = AutoModelForSequenceClassification._model_mapping[config_class]  # type: ignore[index]

    class WideLinear(nn.Linear):
        """Computes in the precision of its input, also while its weights are in 16 bits."""

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            bias = None if self.bias is None else self.bias.to(given.dtype)
            return nn.functional.linear(given, self.weight.to(given.dtype), bias)

    family: Any = next(cls for cls in own.__mro__ if PreTrainedModel in cls.__bases__)
    prefix: str = own.base_model_prefix

    class Pooled(family):  # type: ignore[misc]
        base_model_prefix = prefix
        pooling = mode
        _keys_to_ignore_on_load_unexpected = (r"pooler\.",)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_labels = config.num_labels
            body: Any = AutoModel.from_config(config)
            if getattr(body, "pooler", None) is not None:
                body.pooler = None
            setattr(self, prefix, body)
            text = config.get_text_config()
            rate: Any = getattr(text, "classifier_dropout", None) or getattr(text, "hidden_dropout_prob", 0.0)
            self.dropout = nn.Dropout(rate)
            self.classifier = WideLinear(text.hidden_size, config.num_labels)
            self.post_init()

        def forward(
            self,
            input_ids: torch.Tensor | None = None,
            attention_mask: torch.Tensor | None = None,
            token_type_ids: torch.Tensor | None = None,
            labels: torch.Tensor | None = None,
            **inputs: Any,
        ) -> SequenceClassifierOutput:
            assert input_ids is not None
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
            hidden = getattr(self, prefix)(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
            with torch.autocast(hidden.device.type, enabled=False):
                return SequenceClassifierOutput(logits=self.classifier(self.dropout(pool(hidden, mask, mode))))

    Pooled.__name__ = Pooled.__qualname__ = f"Pooled{own.__name__}"
    return Pooled


def restore_head(model: Any, pooling: Pooling) -> list[str]:
    """Load the trained head that a result has beside its body; returns the names of the parameters that are loaded."""
    import torch
    from safetensors.torch import load_file

    if pooling.head is None:
        return []
    stored = {name.removeprefix("linear."): tensor for name, tensor in load_file(pooling.head).items()}
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            parameter.copy_(stored[name]) if name in stored else parameter.zero_()
    return [f"classifier.{name}" for name, _ in model.classifier.named_parameters()]
