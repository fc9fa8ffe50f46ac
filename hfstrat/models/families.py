"""The parameter shapes of a model family from its config alone, for the families in `KNOWN`, and those of its classification
head; no torch. transformers itself decides when the model is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfstrat.errors import UserError
from hfstrat.models.load import parse_config
from hfstrat.models.transformers_source import attribute_map, config_keys, families_of
from hfstrat.recipe.section import Shapes

Settings = dict[str, Any]


def is_bidirectional(family: str, settings: Settings) -> bool:
    """Whether tokens attend to later tokens, unless the config sets `is_decoder`: a causal LM cannot be trained that way.

    Some decoders have the key too, and never read it; they have no masked-LM class.
    """
    masked = families_of("AutoModelForMaskedLM")
    return {**config_keys(family), **settings}.get("is_decoder") is False and (not masked or family in masked)


def canonical(family: str, settings: Settings) -> Settings:
    """The settings with the family's own names of keys: GPT-2 calls `hidden_size` n_embd."""
    names = attribute_map(family)
    return {names.get(key, key): value for key, value in settings.items()}


def common_name(family: str, key: str) -> str:
    """The family's own name of a common key."""
    return attribute_map(family).get(key, key)


def common_names(family: str, *keys: str) -> tuple[str, ...]:
    return tuple(common_name(family, key) for key in keys)


def shapes_of(family: str, settings: Settings) -> Shapes | None:
    """Parameter shapes by name, tied weights once; None for a family that is not in `KNOWN`.

    Args:
        settings: keys of the config that differ from its class's defaults, by the family's own names.
    """
    whole = {**config_keys(family), **settings}
    try:
        return KNOWN[family](whole) if family in KNOWN else None
    except (KeyError, TypeError, ZeroDivisionError):  # a key is missing or not a number: transformers will report it
        return None


def is_tied(family: str, settings: Settings) -> bool:
    return bool({**config_keys(family), **settings}.get("tie_word_embeddings"))


def _llama_like(qkv_bias: bool | None, norms: bool = False) -> Callable[[Settings], Shapes]:
    """Llama and similar families. `qkv_bias`: whether query, key and value have a bias; None: all four by `attention_bias`."""

    def shapes(c: Settings) -> Shapes:
        width, inner, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        each = c.get("head_dim") or width // heads
        queries, keys = heads * each, (c.get("num_key_value_heads") or heads) * each
        found: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], width)}
        for index in range(c["num_hidden_layers"]):
            block = f"model.layers.{index}"
            linear = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
            for name, shape in linear.items():
                found[f"{block}.self_attn.{name}_proj.weight"] = shape
                if c.get("attention_bias") if qkv_bias is None else (qkv_bias and name != "o"):
                    found[f"{block}.self_attn.{name}_proj.bias"] = shape[:1]
            if norms:
                found |= {f"{block}.self_attn.{name}_norm.weight": (each,) for name in "qk"}
            for name, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
                found[f"{block}.mlp.{name}_proj.weight"] = shape
                if c.get("mlp_bias"):
                    found[f"{block}.mlp.{name}_proj.bias"] = shape[:1]
            found |= {f"{block}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        found["model.norm.weight"] = (width,)
        return found if c.get("tie_word_embeddings") else found | {"lm_head.weight": (c["vocab_size"], width)}

    return shapes


def _gpt2(c: Settings) -> Shapes:
    width = c["n_embd"]
    inner = c["n_inner"] or 4 * width
    found: Shapes = {"transformer.wte.weight": (c["vocab_size"], width), "transformer.wpe.weight": (c["n_positions"], width)}
    layers = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    layers |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}  # stored transposed
    for index in range(c["n_layer"]):
        block = f"transformer.h.{index}"
        for name, shape in layers.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[1:]}
        found |= {f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    found |= {f"transformer.ln_f.{part}": (width,) for part in ("weight", "bias")}
    return found if c["tie_word_embeddings"] else found | {"lm_head.weight": (c["vocab_size"], width)}


def _bert(c: Settings) -> Shapes:
    """The body without its pooler, which belongs to a classifier's head."""
    width, inner = c["hidden_size"], c["intermediate_size"]
    tables = {"word": c["vocab_size"], "position": c["max_position_embeddings"], "token_type": c["type_vocab_size"]}
    found: Shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables.items()}
    layers = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    layers |= {"attention.output.dense": (width, width), "intermediate.dense": (inner, width), "output.dense": (width, inner)}
    norms = ["embeddings.LayerNorm"]
    for index in range(c["num_hidden_layers"]):
        block = f"encoder.layer.{index}"
        for name, shape in layers.items():
            found |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        norms += [f"{block}.attention.output.LayerNorm", f"{block}.output.LayerNorm"]
    return found | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def _vit(c: Settings) -> Shapes:
    """The body of a vision transformer without a pooler, for square images and patches."""
    return _of_patches(c, {"cls_token": 1}, (c["image_size"] // c["patch_size"]) ** 2, c["num_channels"])


def _ast(c: Settings) -> Shapes:
    """The body of an audio spectrogram transformer."""
    sides = ((c["num_mel_bins"], c["frequency_stride"]), (c["max_length"], c["time_stride"]))
    high, wide = ((side - c["patch_size"]) // stride + 1 for side, stride in sides)
    return _of_patches(c, {"cls_token": 1, "distillation_token": 1}, high * wide, 1)


def _of_patches(c: Settings, tokens: Settings, patches: int, channels: int) -> Shapes:
    """A vision transformer with these tokens before its patches."""
    width, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    found: Shapes = {f"embeddings.{name}": (1, 1, width) for name in tokens} | {
        "embeddings.position_embeddings": (1, patches + len(tokens), width),
        "embeddings.patch_embeddings.projection.weight": (width, channels, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
    }
    layers = {f"attention.{name}_proj": (width, width) for name in "qkvo"} | {
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    norms = ["layernorm"]
    for index in range(c["num_hidden_layers"]):
        block = f"layers.{index}"
        for name, shape in layers.items():
            found[f"{block}.{name}.weight"] = shape
            if c["qkv_bias"] or name[-6:] not in ("q_proj", "k_proj", "v_proj"):
                found[f"{block}.{name}.bias"] = shape[:1]
        norms += [f"{block}.layernorm_before", f"{block}.layernorm_after"]
    return found | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


SHAPES: dict[str, Callable[[Settings], Shapes]] = {
    "llama": _llama_like(None),
    "mistral": _llama_like(False),
    "qwen2": _llama_like(True),
    "qwen3": _llama_like(None, norms=True),
    "gpt2": _gpt2,
}
BODIES: dict[str, Callable[[Settings], Shapes]] = {"bert": _bert}  # encoders, without any head
OF_MEDIA: dict[str, Callable[[Settings], Shapes]] = {  # models without a vocabulary, without any head
    "vit": _vit,
    "audio-spectrogram-transformer": _ast,
}
KNOWN = SHAPES | BODIES | OF_MEDIA


def read_stored(source: str) -> dict[str, Any] | None:
    """The config of a local folder or file; None for a Hub id.

    Raises UserError: it is not a JSON object, or has no model_type.
    """
    path = Path(source).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if path.exists():
            raise UserError(f"model.name_or_path: {source} has no config.json")
        return None
    config = parse_config(file)
    if not isinstance(config, dict) or not config.get("model_type"):
        raise UserError(f"model.name_or_path: {file}: expected a JSON object with a model_type, as transformers saves it")
    return {key: _decoded(value) for key, value in config.items()}


def _decoded(value: Any) -> Any:
    """A value of a config.json, in which transformers writes infinity as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


ROBERTA_HEAD = ("classifier.dense", "classifier.out_proj")
ENCODERS = {  # a family: the body's name in its classification model, and the two linear layers of the head
    "bert": ("bert", "bert.pooler.dense", "classifier"),
    "distilbert": ("distilbert", "pre_classifier", "classifier"),
    "modernbert": ("model", "head.dense", "classifier"),
    "electra": ("electra", *ROBERTA_HEAD),
    "mpnet": ("mpnet", *ROBERTA_HEAD),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ("roberta", *ROBERTA_HEAD)),
}
DECODERS = {"gpt2": "transformer", "gpt_neox": "gpt_neox", "opt": "model", "bloom": "transformer"}


def with_class_head(shapes: Shapes, config: Settings, labels: int, pooled: bool = False) -> Shapes | None:
    """The parameters of the classification model that transformers builds from a checkpoint, without torch.

    Args:
        shapes: of the checkpoint, which may have no head or another head.
        pooled: whether the head is that of `hfstrat.models.pooling.pooled_class`.

    Returns:
        None for families with unknown heads.
    """
    kind, names = str(config.get("model_type")), config.get("architectures") or []
    is_causal = any(str(name).endswith("ForCausalLM") for name in names)
    prefix = ENCODERS[kind][0] if kind in ENCODERS else DECODERS.get(kind, "model" if is_causal else None)
    if prefix is None:
        return None
    bare = not any(name.startswith(f"{prefix}.") for name in shapes)
    if bare and is_causal:
        return None  # a decoder whose body has another name
    named = {f"{prefix}.{name}" if bare else name: shape for name, shape in shapes.items()}
    body = {name: shape for name, shape in named.items() if name.startswith(f"{prefix}.") and "position_ids" not in name}
    width = int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or config.get("d_model") or 0)
    if not body or not width:
        return None
    linear: Shapes = {"classifier.weight": (labels, width), "classifier.bias": (labels,)}
    head = linear if pooled else _class_head(kind, width, labels, config)
    if not any(name.startswith(f"{prefix}.pooler.") for name in head):
        body = {name: shape for name, shape in body.items() if not name.startswith(f"{prefix}.pooler.")}
    return body | head


def _class_head(kind: str, width: int, labels: int, config: Settings) -> Shapes:
    if kind not in ENCODERS:
        return {"score.weight": (labels, width)}
    _, square, last = ENCODERS[kind]
    found: Shapes = {f"{square}.weight": (width, width), f"{square}.bias": (width,)}
    if kind == "modernbert":
        found = {f"{square}.weight": (width, width), "head.norm.weight": (width,)}
        optional = {"classifier_bias": f"{square}.bias", "norm_bias": "head.norm.bias"}
        found |= {name: (width,) for key, name in optional.items() if config.get(key)}
    return found | {f"{last}.weight": (labels, width), f"{last}.bias": (labels,)}
