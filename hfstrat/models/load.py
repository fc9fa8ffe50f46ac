"""A model's config and shapes from its files, without torch; tokenizer, base model and precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfstrat.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfstrat.recipe.schema import Model


def read_config(model: Model) -> dict[str, Any] | None:
    """The local `config.json`, without torch; None if it does not exist."""
    file = Path(model.name_or_path).expanduser() / "config.json"
    config = parse_config(file) if file.is_file() else None
    return config if isinstance(config, dict) else None


def parse_config(file: Path) -> Any:
    """The content of a model's config file. Raises UserError if it is not valid JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.name_or_path: {file} is not valid JSON: {error}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter shapes from the headers of a folder's safetensors files, without torch; empty if there are none.

    Raises:
        UserError: a file is not complete.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = _header(file)
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: the shape of each tensor by its name."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            found = json.loads(stream.read(length)) if length < size else None
        except ValueError:
            found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: no complete safetensors file ({size:,} bytes); copy or download it again, and in a clone of a repository "
            "run `git lfs pull`"
        )
    return found


@dataclass
class Base:
    """A loaded base model with the facts that strategies and tasks need; `task` is of `hfstrat.tasks`."""

    model: PreTrainedModel
    task: Any
    name_or_path: str
    revision: str | None
    new_token_ids: list[int]  # of model.add_tokens
    compute_dtype: torch.dtype  # of frozen weights and of the forward pass
    own_dtype: torch.dtype  # of the checkpoint, or as set in the recipe
    reload: dict[str, Any] = field(default_factory=dict)  # further keywords of `from_pretrained` for the result
    remarks: list[str] = field(default_factory=list)
    new_head: bool = False  # whether its head has random weights
    head_modules: list[str] = field(default_factory=list)  # that are trained in full, as the head of a classifier
    new_modules: list[str] = field(default_factory=list)  # those of them with random weights
    tokens_beyond: list[int] = field(default_factory=list)  # of the tokenizer, for which the checkpoint had no embeddings
    rows_use_them: bool = False  # whether the data have any of these
    quantized: dict[str, Any] = field(default_factory=dict)  # facts for the report, if it is quantized
    backbone: str = ""  # of a detector: the name of the module that makes features of an image, which `partial` freezes
    pooling: Any = None  # of `hfstrat.models.pooling`, where the class is not one of transformers

    @property
    def is_tied(self) -> bool:
        """Whether the output head shares its weight with the input embeddings."""
        head = self.model.get_output_embeddings()
        return head is not None and head.weight is self.model.get_input_embeddings().weight

    @property
    def commit(self) -> str | None:
        """The revision that was loaded: from the recipe, else the commit that the Hub returned."""
        return self.revision or getattr(self.model.config, "_commit_hash", None)

    def say(self, remark: str) -> None:
        self.remarks.append(remark)


def source_of(model: Model) -> tuple[str, dict[str, Any]]:
    """The first argument and the keywords for `from_pretrained`; a .gguf file is its folder and its name."""
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision:
        options["revision"] = model.revision
    if not model.name_or_path:
        return "", options
    path = Path(model.name_or_path).expanduser()
    if model.gguf_file:
        return str(path.absolute().parent), {**options, "gguf_file": path.name}
    # a local folder by its full path: an adapter stores it, and must find its base from any working directory
    return str(path.absolute()) if path.is_dir() else model.name_or_path, options


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer with `add_tokens` and a padding token, which only fills batches: masks depend on positions."""
    from transformers import AutoTokenizer

    source, options = (str(Path(model.tokenizer).expanduser()), {}) if model.tokenizer else source_of(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        key = "model.tokenizer" if model.tokenizer else "model.name_or_path"
        raise UserError(f"{key}: {source}: cannot load a tokenizer: {first_line(error)}") from error
    known = set(tokenizer.get_vocab())
    if already := [token for token in model.add_tokens if token in known]:
        raise UserError(f"model.add_tokens: the vocabulary already has {', '.join(already)}; remove these")
    if model.add_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": model.add_tokens}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def pad_token_of(config: Any, tokenizer: Any) -> int:
    """The id of the padding token. Raises UserError: none exists."""
    for pad in (tokenizer.pad_token_id, config.pad_token_id):
        if pad is not None:
            return int(pad)
    raise UserError("model.tokenizer: it has neither a padding token nor an end token, so texts cannot be batched")


def keep_padding_index(model: Any) -> None:
    """Set the config's padding token back to the one with which the positions were made (XGLM, RoBERTa and similar).

    Trainer changes it to the tokenizer's; a model loaded with that config would count its positions from another one.
    """
    from torch import nn

    for name, module in model.named_modules():
        made_with = getattr(module, "padding_idx", "")
        if "position" in name and made_with != "" and not (isinstance(module, nn.Embedding) and made_with is None):
            model.config.pad_token_id = made_with


def context_of(model: PreTrainedModel) -> int | None:
    """The maximum number of positions of a model; None if its config does not have it."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    positions = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(positions, "padding_idx", None)
    if isinstance(context, int) and offset is not None:
        context -= offset + 1  # RoBERTa and similar models start to count positions after it
    return context if isinstance(context, int) and context > 0 else None  # XLNet's is -1, without a limit


def forward_operations(model: PreTrainedModel) -> float:
    """About how many operations the forward pass of the body takes for a token: two for each weight that is no embedding."""
    from torch import nn

    tables = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Embedding))
    return 2.0 * max(1, sum(p.numel() for p in model.base_model.parameters()) - tables)


def check_context(model: PreTrainedModel, longest: int, whose: str = "this model", answers: int = 0) -> None:
    """Refuse examples that are longer than the model's context. Raises UserError: the context, and the setting to change.

    Args:
        answers: tokens of `longest` that the model generates.
    """
    context = context_of(model)
    if context is not None and longest > context and answers:
        raise UserError(
            f"objective.max_completion_length: the longest prompt has {longest - answers} tokens, with {answers} of its answer "
            f"more than {whose}'s context of {context} (max_position_embeddings); set a lower one, or a lower data.max_length"
        )
    if context is not None and longest > context:
        raise UserError(
            f"data.max_length: the longest example has {longest} tokens, but {whose}'s context is {context} "
            f"(max_position_embeddings); set max_length: {context}, and data.overflow: split to keep the rest"
        )


def compute_dtype(wanted: str) -> torch.dtype:
    """The precision of frozen weights and of the forward pass on this machine.

    Raises UserError: float16 on a CPU, where it would be slower than float32 and overflow.
    """
    import torch

    if wanted == "float16" and not torch.cuda.is_available():
        raise UserError("model.dtype: float16 needs a GPU; on this machine use auto, bfloat16 or float32")
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if torch.backends.mps.is_available():
        return torch.bfloat16
    has_bf16: Callable[[], bool] = torch.cpu._is_avx512_bf16_supported
    return torch.bfloat16 if has_bf16() else torch.float32


def set_precision(model: nn.Module, compute: torch.dtype) -> None:
    """Cast frozen weights to `compute` and trainable ones to float32, so that small updates are not lost.

    A norm of which only the bias or only the weight is trained is in float32 as a whole: kernels take one type for both. What
    needs no cast is copied if other weights are cast: it would keep the whole file of the checkpoint mapped.
    """
    import torch

    from hfstrat.models import vision_parts

    joined = [parameter for module in vision_parts.of_one_type(model) for parameter in module.parameters(recurse=False)]
    is_joined_trained = any(parameter.requires_grad for parameter in joined)
    together = {id(parameter) for parameter in joined} if is_joined_trained else set[int]()
    is_narrowed = any(
        parameter.is_floating_point() and not parameter.requires_grad and parameter.dtype.itemsize > compute.itemsize
        for parameter in model.parameters()
    )
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_floating_point()]
        is_norm = all(parameter.dim() < 2 for parameter in own)
        for parameter in own:
            trained = any(other.requires_grad for other in own) if is_norm else parameter.requires_grad
            trained |= id(parameter) in together  # a tied head has the parameter of the embeddings
            parameter.data = parameter.data.to(torch.float32 if trained else compute, copy=is_narrowed)
    if not all(parameter.requires_grad for parameter in model.parameters()):
        _cast_buffers(model, compute)
        for module in model.modules():  # statistics of a batch norm that is trained have the type of its weights
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                for buffer in module.buffers(recurse=False):
                    buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point weights to `dtype`, and the buffers that transformers would create in it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _cast_buffers(model, dtype)


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Give buffers the types that they have in a model created in `dtype`.

    Rotary frequencies stay in float32, where rounding would move positions; XGLM's table of positions does not: it is added to
    the hidden states, which have the type of the weights.
    """
    import torch
    from transformers import PreTrainedModel

    inner: Any = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not any(buffer.is_floating_point() for buffer in inner.buffers()):
        return
    with torch.device("meta"):
        twin = type(inner)._from_config(inner.config, dtype=dtype)
    types = {name: buffer.dtype for name, buffer in twin.named_buffers() if buffer.is_floating_point()}
    for name, buffer in inner.named_buffers():
        if buffer.is_floating_point() and name in types:
            buffer.data = buffer.data.to(types[name])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trainable and of all parameters; tied weights count once."""
    from hfstrat.models.quantization import elements

    sizes = {id(p): (elements(p), p.requires_grad) for p in model.parameters()}
    return sum(n for n, trainable in sizes.values() if trainable), sum(n for n, _ in sizes.values())


def takes_logits_mask(model: nn.Module) -> bool:
    """Whether the forward pass takes the positions that go through the LM head (`logits_to_keep`)."""
    import inspect

    return "logits_to_keep" in inspect.signature(model.forward).parameters


def main_dtype(model: nn.Module) -> torch.dtype:
    """The precision of most weights; in a quantized model, of most frozen weights that are not quantized."""
    sizes: dict[torch.dtype, int] = {}
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if len(floating) < len(list(model.parameters())):
        floating = [p for p in floating if not p.requires_grad] or floating
    for parameter in floating:
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
