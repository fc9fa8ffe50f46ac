"""Tiny models of sound and recordings of three tones, created for the tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from helpers.images import four_steps

RATE = 16_000
CLASSES = ("high", "low", "middle")
TONES = {"low": 300, "middle": 900, "high": 2400}  # Hz
FAMILIES = ("wav2vec2", "wav2vec2-group", "hubert", "wavlm", "whisper", "ast")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 8, 8),
    "conv_stride": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def tone(label: str, number: int, seconds: float = 0.3, rate: int = RATE) -> np.ndarray:
    """A noisy tone whose frequency is its class; its length differs a little with its number."""
    source = np.random.default_rng((CLASSES.index(label), number))
    count = int(rate * (seconds + 0.02 * (number % 5)))
    wave = np.sin(2 * np.pi * TONES[label] * (1 + 0.05 * source.random()) * np.arange(count) / rate)
    return (0.3 * wave + 0.02 * source.standard_normal(count)).astype(np.float32)


def bytes_of(samples: np.ndarray, kind: str = "WAV", rate: int = RATE, subtype: str | None = None) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def folder_of_classes(root: Path, count: int = 12, start: int = 0) -> Path:
    """A folder for each class with `count` recordings."""
    for name in CLASSES:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + count):
            (root / name / f"{number:03}.wav").write_bytes(bytes_of(tone(name, number)))
    return root


def config_of(family: str, **more: Any) -> Any:
    import transformers as tf

    if family.startswith("wav2vec2"):
        norm = "group" if family.endswith("group") else "layer"
        return tf.Wav2Vec2Config(**SMALL, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", **more)
    if family in ("hubert", "wavlm"):
        return {"hubert": tf.HubertConfig, "wavlm": tf.WavLMConfig}[family](**SMALL, **more)
    if family == "whisper":
        sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
        return tf.WhisperConfig(
            **sizes, decoder_attention_heads=2, decoder_ffn_dim=48, num_mel_bins=20, max_source_positions=100, vocab_size=64,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, **more,
        )  # fmt: skip
    return tf.ASTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, num_mel_bins=32, max_length=60, **more
    )


def extractor_of(family: str) -> Any:
    import transformers as tf

    if family == "whisper":
        return tf.WhisperFeatureExtractor(feature_size=20, chunk_length=2)
    if family == "ast":
        return tf.ASTFeatureExtractor(num_mel_bins=32, max_length=60)
    return tf.Wav2Vec2FeatureExtractor(return_attention_mask=family == "wav2vec2")


def make_audio_model(folder: Path, family: str = "wav2vec2", classes: int = 0, seed: int = 0) -> Path:
    """A random model with its feature extractor: its body, or with `classes` a classifier."""
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    names = dict(enumerate(CLASSES[:classes]))
    more: dict[str, Any] = {"id2label": names, "label2id": {name: id for id, name in names.items()}} if classes else {}
    auto = tf.AutoModelForAudioClassification if classes else tf.AutoModel
    auto.from_config(config_of(family, **more)).save_pretrained(folder)
    extractor_of(family).save_pretrained(folder)
    return folder


def audio_recipe(folder: Path, model: Path | None, train: Path, **more: Any) -> Path:
    """A recipe of four steps; `more` are sections, which are merged with it."""
    return four_steps("audio-classification", 2e-3, folder, model, train, more)
