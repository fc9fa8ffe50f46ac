"""What models of sound need before they are trained: the length of their inputs, padding that changes nothing, their head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfstrat.errors import UserError
from hfstrat.models.blocks import evaluating

NEAR_SINUSOIDS = 2e-3  # of the positions of a checkpoint in 16 bits
SAME = {4: 1e-3, 2: 5e-2}  # bytes of a number: allowed difference of outputs with padding, as a share of the largest
DROPPED = ("layerdrop", "encoder_layerdrop")  # shares of layers that are skipped at random
MASKED = ("mask_time_prob", "mask_feature_prob")


# the length of inputs


@torch.no_grad()
def fit_length(model: Any, frames: int) -> str:
    """Give a model with inputs of one length those of a spectrogram of `frames`, in place; returns a line about it, or "".

    Whisper's positions are sinusoids of which the first are kept (or continued): those that stay are the same. A shorter input
    still gives other hidden states than one padded with silence to 30 seconds, to which the model attends. AST's positions are
    cut around the middle, or interpolated to longer inputs, as by its authors (arXiv 2104.01778).
    """
    config = model.config
    if config.model_type == "whisper":
        before, wanted = config.max_source_positions, frames // 2
        if before == wanted:
            return ""
        _fit_sinusoids(model.encoder, wanted)
        config.max_source_positions = wanted
        how = f"the first {wanted:,} of {before:,} positions are used" if wanted < before else f"{wanted:,} positions are used"
        return f"{'audio':<9} {wanted / 50:g} s instead of {before / 50:g} s: {how}"
    if config.model_type == "audio-spectrogram-transformer" and config.max_length != frames:
        before = config.max_length
        _fit_patches(model.audio_spectrogram_transformer.embeddings, frames)
        config.max_length = frames
        return f"{'audio':<9} {frames / 100:g} s instead of {before / 100:g} s: position embeddings are fitted"
    return ""


def _fit_sinusoids(encoder: Any, wanted: int) -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids

    old = encoder.embed_positions.weight
    plain = sinusoids(max(wanted, len(old)), old.shape[1])
    if (old.float() - plain[: len(old)]).abs().max() > NEAR_SINUSOIDS:
        if wanted > len(old):
            raise UserError(
                f"audio.max_length: the positions of this model were trained for {len(old) / 50:g} s; set at most that"
            )
        plain = old.detach()
    new = nn.Embedding(wanted, old.shape[1], dtype=old.dtype, device=old.device)
    new.weight.copy_(plain[:wanted])
    encoder.embed_positions = new.requires_grad_(old.requires_grad)
    encoder.max_source_positions = wanted


def _fit_patches(embeddings: Any, frames: int) -> None:
    config, old = embeddings.config, embeddings.position_embeddings
    high, wide = embeddings.get_shape(config)
    config.max_length = frames
    new = embeddings.get_shape(config)[1]
    extra, width = old.shape[1] - high * wide, old.shape[2]
    grid = old[:, extra:].reshape(1, high, wide, width).permute(0, 3, 1, 2)
    if new <= wide:
        start = (wide - new) // 2
        grid = grid[..., start : start + new]
    else:
        grid = nn.functional.interpolate(grid.float(), size=(high, new), mode="bilinear").to(old.dtype)
    flat = grid.permute(0, 2, 3, 1).reshape(1, high * new, width)
    embeddings.position_embeddings = nn.Parameter(torch.cat([old[:, :extra], flat], dim=1).contiguous())


# padding


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm over time that counts the frames of each recording alone, and not those of its padding.

    transformers' feature encoders with `feat_extract_norm: group` (wav2vec2-base, HuBERT-base, WavLM-base) normalize over the
    complete width of a batch. Here a recording has the same features in a batch as alone. Weights and their names are those of
    the norm that it replaces, so that a saved model has the class of transformers.
    """

    lengths: torch.Tensor | None = None  # samples of each recording in the batch; None: all have the complete width

    def __init__(self, norm: nn.GroupNorm, kernel: int, stride: int) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.kernel, self.stride = kernel, stride

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.lengths is None:
            return super().forward(hidden)
        frames = ((self.lengths - self.kernel) // self.stride + 1).clamp(min=1)[:, None, None]
        mask = torch.arange(hidden.shape[-1], device=hidden.device) < frames
        values = hidden.float() * mask
        mean = values.sum(-1, keepdim=True) / frames
        spread = ((values - mean) * mask).square().sum(-1, keepdim=True) / frames
        normed = (values - mean) * torch.rsqrt(spread + self.eps)
        return (normed * self.weight.float()[:, None] + self.bias.float()[:, None]).to(hidden.dtype)


def mask_norms(model: Any) -> None:
    """Replace the group norms of a model's feature encoder, in place; its `attention_mask` tells them the lengths."""
    found = False
    for layer in list(model.modules()):
        norm, conv = getattr(layer, "layer_norm", None), getattr(layer, "conv", None)
        if type(norm) is nn.GroupNorm and isinstance(conv, nn.Conv1d) and norm.num_groups == norm.num_channels:
            layer.layer_norm = MaskedGroupNorm(norm, conv.kernel_size[0], conv.stride[0])
            found = True
    if found:
        model.register_forward_pre_hook(_tell_lengths, with_kwargs=True)


def _tell_lengths(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    lengths = None if mask is None else mask.sum(-1)
    for module in model.modules():
        if isinstance(module, MaskedGroupNorm):
            module.lengths = lengths


@torch.no_grad()
def check_padding(model: Any, processor: Any) -> None:
    """Refuse a model whose outputs for a recording depend on the longer ones in its batch. Raises UserError.

    Args:
        processor: an `AudioProcessor`.
    """
    import numpy as np

    if processor.is_fixed:
        return
    source = np.random.default_rng(0)
    lengths = (max(processor.least, processor.rate // 4), max(2 * processor.least, processor.rate // 2))
    short, long = (source.standard_normal(count).astype(np.float32) / 10 for count in lengths)
    weight = next(model.parameters())

    def logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: t.to(weight.device, weight.dtype if t.is_floating_point() else None) for name, t in inputs.items()}
        return model(**moved).logits[0].float()  # type: ignore[no-any-return]

    with evaluating(model):
        alone, together = logits(processor.one(short)), logits(processor.inputs([short, long]))
    allowed = SAME[min(4, weight.dtype.itemsize)] * max(1.0, float(alone.abs().max()))
    if not float((alone - together).abs().max()) <= allowed:
        raise UserError(
            f"model.name_or_path: the outputs of {type(model).__name__} for a recording depend on the padding in its batch, "
            "so that results would differ from those of a pipeline; use a model such as wav2vec2, HuBERT, WavLM, Whisper or AST"
        )


# the rest


def settle(model: Any) -> list[str]:
    """Turn off what a model changes at random in training apart from dropout, in place; returns lines about it.

    Layers that are skipped, and masks that are drawn for a complete batch: augmentation draws them for each recording.
    """
    config, lines = model.config, list[str]()
    if dropped := [name for name in DROPPED if getattr(config, name, 0)]:
        lines.append(
            f"layers are not skipped at random ({dropped[0]} {getattr(config, dropped[0]):g} of the config is set to 0)"
        )
    for name in DROPPED:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
        if "masked_spec_embed" in getattr(module, "_parameters", {}):
            del module.masked_spec_embed
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False
    for name in MASKED:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if config.model_type == "whisper":
        config.is_encoder_decoder = False  # a classifier has no decoder: its blocks are those of the encoder
    return lines


@torch.no_grad()
def open_projector(model: Any) -> str:
    """Make a new projector the identity, so that a new head sees all of the hidden states; returns a line about it.

    transformers puts a random linear layer of width 256 before the head, which loses a part of them.
    """
    config, old, head = model.config, model.projector, model.classifier
    width = old.in_features
    new = nn.Linear(width, width, dtype=old.weight.dtype, device=old.weight.device)
    nn.init.eye_(new.weight)
    nn.init.zeros_(new.bias)
    wider = nn.Linear(width, head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    wider.weight.normal_(std=getattr(config, "initializer_range", getattr(config, "init_std", 0.02)))
    nn.init.zeros_(wider.bias)
    model.projector, model.classifier = new, wider
    config.classifier_proj_size = width
    return f"the new projector of width {old.out_features} before the head is replaced by the identity of width {width}"
