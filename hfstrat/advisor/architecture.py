"""The sizes of a model, and what autograd stores for each of its blocks. No torch.

Sizes come from a config.json and safetensors headers, or from a number of parameters given by hand. Stored activations are
added up from the operations of transformers' own blocks, for three block layouts: Llama's (RMSNorm, rotary positions, gated
MLP), GPT-2's and BERT's (LayerNorm, dropout, GELU). A test compares the sums with what autograd really stores. In 16 bits
autocast casts the input of each linear layer separately, so q, k and v store three copies of one tensor; in float32 they share
one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from hfstrat.errors import UserError
from hfstrat.models import check, families, random_init
from hfstrat.models.load import read_json, read_shapes
from hfstrat.models.parameter_names import BLOCK, CONFIG_KEYS, config_size, count_blocks, height
from hfstrat.models.stack import Stem
from hfstrat.recipe import section
from hfstrat.recipe.section import Shapes
from hfstrat.strategies.description import Description
from hfstrat.tasks.base import Task

GPT_LIKE, BERT_LIKE = ("gpt2",), ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
VALIDATED = ("llama", "bert")  # families measured by benchmarks/memory_prediction.py
NO_STEM = Stem()
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Model:
    """What predictions need to know about a model.

    shapes: the parameters of the checkpoint, each tied weight once; of a model of files those of its body.
    checkpoint: all parameters of the checkpoint.
    stem: what is before the blocks, where that is not a table.
    whole: config.json; `config` has the keys of its text_config in their place.
    tower, projector: of a vision-language model, whose `shapes` are those of its language model.
    stored: bytes of the checkpoint.
    dropout, attention_dropout: shares.
    by_hand: no weights exist, only sizes.
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
    reads_files: bool = False
    checkpoint: Shapes = field(default_factory=dict, repr=False)
    stem: Stem = NO_STEM
    whole: dict[str, Any] = field(default_factory=dict, repr=False)
    tower: Model | None = field(default=None, repr=False)
    projector: Shapes = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> int:
        beside = self.tower.parameters if self.tower is not None else 0
        return sum(map(prod, self.shapes.values())) + sum(map(prod, self.projector.values())) + beside

    @property
    def layout(self) -> str:
        """The block layout of this family: llama, gpt2 or bert."""
        return "bert" if self.family in BERT_LIKE or self.reads_files else "gpt2" if self.family in GPT_LIKE else "llama"

    @property
    def is_encoder(self) -> bool:
        return self.layout == "bert"

    def line(self) -> str:
        kind = "sizes given by hand" if self.by_hand else self.family
        words = "" if self.reads_files else f", {self.vocabulary:,} tokens, context {self.context:,}"
        if self.tower is not None:
            words += f"; {self.tower.family}: {self.tower.layers} layers of width {self.tower.width:,}"
        return f"{self.name}: {kind}, {self.parameters:,} parameters, {self.layers} layers of width {self.width:,}{words}"


def read(name: str, task: Task | None = None) -> Model:
    """The model of a local folder, the Hub's cache or the Hub.

    Args:
        task: whose examples are files; None: one whose examples are texts.

    Raises:
        UserError: no such model, no config, or weights whose headers cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.name != "config.json":
            raise UserError(f"--model: {name} is a file; expected a model folder, a config.json or a Hub id")
        path = path.parent
    if path.is_dir():
        return from_folder(name, path, task)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"--model: {name}: no such folder{check.near(path)}")
    return from_hub(name, task)


def from_folder(name: str, folder: Path, task: Task | None = None) -> Model:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise UserError(f"--model: {name} is an adapter; give its base model{f' ({base})' if base else ''}")
        raise UserError(f"--model: {name} has no config.json; give a model folder, or a size: --parameters 1.1B")
    config = read_json(folder / "config.json")
    if not config:
        raise UserError(f"--model: {folder / 'config.json'}: expected a JSON object")
    try:
        shapes, stored = read_shapes(folder), _stored(folder)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"--model: {folder} contains a corrupt safetensors file; download the model again") from None
    return from_config(name, config, shapes, stored, folder, task)


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def from_hub(name: str, task: Task | None = None) -> Model:
    """Read from the cache if the config is there; otherwise download only the config and the safetensors headers."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    check.check_hub("--model", name, None, "config.json", "model", network=True)
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        return from_folder(name, Path(cached).parent, task)
    try:
        config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
        found = HfApi().get_safetensors_metadata(name)
    except Exception as error:  # the transport fails in many ways, and the repository may have no safetensors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model: {name}: its config or its safetensors headers cannot be read: {first}") from None
    tensors = [(key, info) for file in found.files_metadata.values() for key, info in file.tensors.items()]
    stored = sum(prod(info.shape) * ITEM_BYTES.get(info.dtype, 2) for _, info in tensors)
    return from_config(name, config, {key: tuple(info.shape) for key, info in tensors}, stored, task=task)


def from_config(
    name: str, config: dict[str, Any], shapes: Shapes, stored: int, folder: Path | None = None, task: Task | None = None
) -> Model:
    """The model of a config.json. Raises UserError if the config lacks a size that every model has."""
    if task is not None:
        return of_files(name, config, shapes, stored, folder, task)
    if "vision_config" in config:
        config = completed(config)
    full = {**config, **(config.get("text_config") or {})}
    number = {size: config_size(full, size) for size in CONFIG_KEYS}
    for size in ("width", "layers", "vocabulary"):
        if number[size] < 1:
            key = CONFIG_KEYS[size][0]
            what = "" if size != "vocabulary" else "; a model of images or recordings needs --data with such files"
            raise UserError(f"--model: {name}: config.json has no {key}, which is needed to predict memory{what}")
    width, family = number["width"], str(full.get("model_type", ""))
    heads = max(1, number["heads"])  # a state-space model has none
    if not shapes:
        shapes = families.shapes_of(family, families.canonical(family, config)) or {}
        if not shapes:
            raise UserError(
                f"--model: {name} has no weights (*.safetensors), and the parameter shapes of model_type {family or '(none)'} "
                "cannot be derived from the config alone; download the model, or give a size: --parameters 1.1B"
            )
    return Model(
        name=name,
        family=family,
        vocabulary=number["vocabulary"],
        width=width,
        inner=number["inner"] or 4 * width,
        layers=number["layers"],
        heads=heads,
        kv_heads=int(full.get("num_key_value_heads") or heads),
        head_width=int(full.get("head_dim") or width // heads),
        context=number["context"] or 10**6,
        tied=_tied(full, family, shapes),
        dropout=float(full.get("hidden_dropout_prob") or full.get("resid_pdrop") or 0.0),
        attention_dropout=_attention_dropout(full),
        shapes=shapes,
        config=full,
        stored=stored or 2 * sum(map(prod, shapes.values())),
        folder=folder,
        whole=config,
    )


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a vision-language model with the defaults of its family, which those on the Hub leave out.

    Its parts are configs of other families, so that transformers itself is asked.
    """
    from transformers import CONFIG_MAPPING

    family = str(config.get("model_type", ""))
    if family not in CONFIG_MAPPING:
        return config
    try:
        found: dict[str, Any] = CONFIG_MAPPING[family].from_dict(config).to_dict()
    except Exception:  # the code of a family; what is missing is named by what reads it
        return config
    return {**config, **found, "model_type": family, "architectures": config.get("architectures")}


def of_files(name: str, config: dict[str, Any], shapes: Shapes, stored: int, folder: Path | None, task: Task) -> Model:
    """The model of a task whose examples are files. Raises UserError where it is none, or is no stack of blocks."""
    task.model.check_architecture(name, config)
    family = str(config.get("model_type", ""))
    shapes = shapes or families.shapes_of(family, families.canonical(family, config)) or {}
    if not shapes:
        raise UserError(f"--model: {name} has no weights (*.safetensors), and their shapes are needed; download the model")
    stack = task.model.stack(name, shapes, config, 0)
    number = {size: config_size(stack.sizes, size) for size in CONFIG_KEYS}
    if not min(number["width"], number["layers"], number["heads"]):
        raise UserError(f"--model: {name}: config.json has no width, layers or heads, which are needed to predict memory")
    return Model(
        name=name,
        family=family,
        vocabulary=0,
        width=number["width"],
        inner=number["inner"],
        layers=number["layers"],
        heads=number["heads"],
        kv_heads=number["heads"],
        head_width=number["width"] // number["heads"],
        context=10**6,
        tied=False,
        dropout=float(stack.sizes["dropout"]),
        attention_dropout=float(stack.sizes["attention_dropout"]),
        shapes=stack.body,
        config=config,
        stored=stored or 2 * sum(map(prod, shapes.values())),
        folder=folder,
        reads_files=True,
        checkpoint=shapes,
        stem=stack.stem,
    )


def _attention_dropout(config: dict[str, Any]) -> float:
    names = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
    return float(next((config[name] for name in names if isinstance(config.get(name), int | float)), 0.0))


def _tied(config: dict[str, Any], family: str, shapes: Shapes) -> bool:
    tied = config.get("tie_word_embeddings")
    return bool(tied) if tied is not None else family == "gpt2" or not any("lm_head" in name for name in shapes)


@lru_cache(maxsize=256)
def by_hand(parameters: str, vocabulary: int, context: int) -> Model:
    """A Llama of about this many parameters, for when no model exists yet.

    Raises:
        UserError: not a number, or no architecture of that size.
    """
    try:
        wanted = section.parse(parameters)
    except ValueError as error:
        raise UserError(f"--parameters: {parameters}: {error}") from None
    if vocabulary < 2:
        raise UserError(f"--vocab: {vocabulary}: expected the size of a vocabulary, such as 32000")
    try:
        settings = random_init.pick("llama", wanted, vocabulary, context, {})
    except UserError as error:
        raise UserError(str(error).replace("strategy.parameters", "--parameters")) from None
    shapes = families.shapes_of("llama", settings) or {}
    model = from_config(f"a Llama of {parameters}", {"model_type": "llama", **settings}, shapes, 0)
    return replace(model, by_hand=True)


class Block(NamedTuple):
    """How a block takes part in training: its own weights are trained, it has adapters, or gradients only pass through."""

    trained: bool
    adapted: bool

    @property
    def state(self) -> str:
        return "trained" if self.trained else "adapted" if self.adapted else "passes"


def live_blocks(model: Model, description: Description) -> list[Block]:
    """The blocks that gradients pass through: all from the lowest one with trainable parameters in or below it."""
    depth = count_blocks(description.shapes)
    own = (description.names - description.beside, description.adapted - description.beside)
    trained, adapted = ({height(name, depth) - 1 for name in names} for names in own)
    lowest = min(max(0, number) for number in (*trained, *adapted, depth))
    if description.beside & (description.names | description.adapted):
        lowest = 0
    return [Block(number in trained, number in adapted) for number in range(lowest, depth)]


def trains_input(description: Description) -> bool:
    """Whether a parameter below the blocks is trained."""
    return any(height(name, 0) == 0 for name in description.names - description.beside)


def trains_stem(description: Description) -> bool:
    """Whether a convolution before the blocks is trained."""
    own = description.names - description.beside
    return any(len(description.shapes[name]) > 2 and not BLOCK.search(name) for name in own)


def parameters_of(model: Model, task: Task, labels: int) -> tuple[Shapes, bool] | None:
    """The parameters of the model that is trained, and whether its head is tied; None where its head is unknown.

    Args:
        labels: outputs of its head.
    """
    if model.tower is not None:
        return model.shapes | model.projector | model.tower.shapes, model.tied
    if not model.reads_files:
        return task.model.shapes(model.shapes, model.config, labels)
    stack = task.model.stack(model.name, model.checkpoint, model.config, labels)
    return stack.body | stack.head, False


def block_bytes(model: Model, description: Description, block: Block, compute: int, length: int, masked: bool) -> float:
    """Bytes per token that autograd stores for a block.

    Args:
        compute: bytes per number in the forward pass, 2 or 4.
        length: tokens per sequence, padding included; attention with dropout stores its square.
        masked: whether the sequences of a batch differ in length, so that a mask is passed.
    """
    wide = 4 if compute == 4 or trains_input(description) else 2
    return LAYOUTS[model.layout](model, description.rank, block.state, compute, wide, length, masked)


def _llama(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    queries, keys = m.heads * m.head_width, m.kv_heads * m.head_width
    trained, stored, narrow = state == "trained", state != "passes", a == 2
    norms = 2 * (4 * m.width + 4) + (2 * wide * m.width if trained else 0)  # the normalized input, for the weight's gradient
    copies = 5 if narrow else 2  # q, k, v; gate, up
    inputs = copies * a * m.width if stored else 0
    shared = queries if masked else keys  # with a mask, keys and values are repeated and the mask is cast in each block
    attention = a * (2 * queries + 2 * shared) + 4 * m.heads + (a * length if masked else 0)
    inner = a * m.inner * (4 if stored else 3)
    adapters = 7 * a * rank + (a * queries if narrow else 0) if state == "adapted" else 0
    return norms + inputs + attention + inner + adapters


def _bert(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    copies = 5 if a == 2 and (wide == 4 or state == "adapted") else 3  # q, k, v; both dense layers
    inputs = copies * a * m.width if state != "passes" else 0
    inner = a * m.inner * (2 if state != "passes" else 1)
    return _norms(m, state, wide) + inputs + _attention(m, state, a, length) + inner + _around(m, state, a, 6 * rank)


def _gpt2(m: Model, rank: int, state: str, a: int, wide: int, length: int, masked: bool) -> float:
    inputs = 3 * a * m.width if state != "passes" else 0
    inner = a * m.inner * (5 if state != "passes" else 4)  # its GELU consists of four operations
    return _norms(m, state, wide) + inputs + _attention(m, state, a, length) + inner + _around(m, state, a, 4 * rank)


def _norms(m: Model, state: str, wide: int) -> float:
    """Inputs of two LayerNorms, with a mean and a standard deviation per token."""
    return 2 * wide * m.width + 4 * (4 if state == "trained" else wide)


def _attention(m: Model, state: str, a: int, length: int) -> float:
    """Queries, keys and values; with dropout they are in float32, and the matrix of all pairs is stored three times."""
    if m.attention_dropout:
        return 3 * 4 * m.width + 3 * 4 * m.heads * length
    out = a * m.width if a == 2 and state == "adapted" else 0  # otherwise the dense layer stores it anyway
    return 3 * a * m.width + 4 * m.heads + out


def _around(m: Model, state: str, a: int, ranks: int) -> float:
    """The masks of two dropouts, and the activations between the two matrices of each adapter."""
    return (2 * a * m.width if m.dropout else 0) + (a * ranks if state == "adapted" else 0)


LAYOUTS = {"llama": _llama, "bert": _bert, "gpt2": _gpt2}
