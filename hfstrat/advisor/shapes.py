"""The architecture's numbers: from a config.json and safetensors headers, or from sizes given by hand. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models import check
from hfstrat.models.load import read_json, read_shapes
from hfstrat.models.random import families, sizes
from hfstrat.recipe import section
from hfstrat.recipe.section import Shapes

GPT_LIKE, BERT_LIKE = ("gpt2",), ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
VALIDATED = ("llama", "bert")  # families that benchmarks/memory_prediction.py measures
NAMES = {  # our name: what configs call it
    "width": ("hidden_size", "n_embd", "dim", "d_model"),
    "inner": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "context": ("max_position_embeddings", "n_positions"),
    "vocabulary": ("vocab_size",),
}
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Model:
    """What the predictions need to know of a model.

    `shapes` are the checkpoint's parameters (each tied weight once), `stored` their bytes there; `attention_dropout` and
    `dropout` are shares. `by_hand`: there are no weights, only numbers.
    """

    name: str
    family: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    tied: bool
    dropout: float = 0.0
    attention_dropout: float = 0.0
    shapes: Shapes = field(default_factory=dict, repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    stored: int = 0
    folder: Path | None = None
    by_hand: bool = False

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def plan(self) -> str:
        """Which of the three block plans this family has: that of Llama, GPT-2 or BERT."""
        return "bert" if self.family in BERT_LIKE else "gpt2" if self.family in GPT_LIKE else "llama"

    @property
    def is_encoder(self) -> bool:
        return self.plan == "bert"

    def line(self) -> str:
        kind = "sizes given by hand" if self.by_hand else self.family
        return (
            f"{self.name}: {kind}, {self.parameters:,} parameters, {self.layers} layers of width {self.width:,}, "
            f"{self.vocabulary:,} tokens, context {self.context:,}"
        )


def read(name: str) -> Model:
    """A local folder, a cached or an online Hub model.

    Raises:
        UserError: no such model, no config, or weights whose headers cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.name != "config.json":
            raise UserError(f"--model: {name} is a file; expected a model folder, a config.json or a Hub id")
        path = path.parent
    if path.is_dir():
        return _of_folder(name, path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--model: {name}: no such folder{check.near(path)}")
    return _of_hub(name)


def _of_folder(name: str, folder: Path) -> Model:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise UserError(f"--model: {name} is an adapter; give its base{f' ({base})' if base else ''}")
        raise UserError(f"--model: {name} has no config.json, so it is no model folder; give one, or --parameters")
    config = read_json(folder / "config.json")
    if not config:
        raise UserError(f"--model: {folder / 'config.json'}: expected a JSON object, so this is no model folder")
    try:
        shapes, stored = read_shapes(folder), _stored(folder)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--model: {folder} holds a broken safetensors file; download the model again") from None
    return of_config(name, config, shapes, stored, folder)


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _of_hub(name: str) -> Model:
    """From the cache if the config is in there, else the headers alone are read over the network."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    check.check_hub("--model", name, None, "config.json", "model", network=True)
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        return _of_folder(name, Path(cached).parent)
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
        found = HfApi().get_safetensors_metadata(name)
    except Exception as error:  # the transport has many ways to fail, and the repository may hold no safetensors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {name}: its config or its safetensors headers cannot be read: {first}") from None
    tensors = [(key, info) for file in found.files_metadata.values() for key, info in file.tensors.items()]
    stored = sum(prod(info.shape) * ITEM_BYTES.get(info.dtype, 2) for _, info in tensors)
    return of_config(name, config, {key: tuple(info.shape) for key, info in tensors}, stored)


def of_config(name: str, config: dict[str, Any], shapes: Shapes, stored: int, folder: Path | None = None) -> Model:
    """Raises UserError for a config that lacks a number that every model has."""
    whole = {**config, **(config.get("text_config") or {})}
    number = {ours: next((whole[n] for n in theirs if isinstance(whole.get(n), int)), None) for ours, theirs in NAMES.items()}
    for ours in ("width", "layers", "heads", "vocabulary"):
        if (number[ours] or 0) < 1:
            raise UserError(f"--model: {name}: its config.json has no {NAMES[ours][0]}, so its memory cannot be told")
    width, heads, family = int(number["width"] or 0), int(number["heads"] or 0), str(whole.get("model_type", ""))
    if not shapes:
        shapes = families.shapes_of(family, families.canonical(family, config)) or {}
        if not shapes:
            raise UserError(
                f"--model: {name} holds no weights (*.safetensors), and the shapes of the family {family or '(none named)'} "
                "are not known without; download the model, or give --parameters"
            )
    return Model(
        name=name,
        family=family,
        vocabulary=int(number["vocabulary"] or 0),
        width=width,
        inner=int(number["inner"] or 4 * width),
        layers=int(number["layers"] or 0),
        heads=heads,
        kv_heads=int(whole.get("num_key_value_heads") or heads),
        head_width=int(whole.get("head_dim") or width // heads),
        context=int(number["context"] or 10**6),
        tied=_tied(whole, family, shapes),
        dropout=float(whole.get("hidden_dropout_prob") or whole.get("resid_pdrop") or 0.0),
        attention_dropout=_attention_dropout(whole),
        shapes=shapes,
        config=whole,
        stored=stored or 2 * sum(map(prod, shapes.values())),
        folder=folder,
    )


def _attention_dropout(config: dict[str, Any]) -> float:
    names = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
    return float(next((config[name] for name in names if isinstance(config.get(name), int | float)), 0.0))


def _tied(config: dict[str, Any], family: str, shapes: Shapes) -> bool:
    said = config.get("tie_word_embeddings")
    return bool(said) if said is not None else family == "gpt2" or not any("lm_head" in name for name in shapes)


@lru_cache(maxsize=256)
def by_hand(parameters: str, vocabulary: int, context: int) -> Model:
    """A Llama of about that size, where there is no model yet.

    Raises:
        UserError: no number, or no shape of that size.
    """
    try:
        wanted = section.parse(parameters)
    except ValueError as error:
        raise UserError(f"--parameters: {parameters}: {error}") from None
    if vocabulary < 2:
        raise UserError(f"--vocab: {vocabulary}: expected the number of tokens of a vocabulary, such as 32000")
    try:
        settings = sizes.pick("llama", wanted, vocabulary, context, {})
    except UserError as error:
        raise UserError(str(error).replace("strategy.parameters", "--parameters")) from None
    shapes = families.shapes_of("llama", settings) or {}
    made = of_config(f"a Llama of {parameters}", {"model_type": "llama", **settings}, shapes, 0)
    return Model(**{**vars(made), "by_hand": True})
