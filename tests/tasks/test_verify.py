"""Where an artifact is compared with the trained model, also if a GPU has too little memory. GPUs are simulated."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hfstrat import errors
from hfstrat.tasks import artifact, verify
from hfstrat.tasks.generation import How, renderer_of, stream

PLENTY = 1 << 40
CHILD = ["python"]


@pytest.fixture
def probe(tiny: Path) -> dict[str, Any]:
    """What a model said on a GPU, as far as a CPU can tell."""
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = verify.probe_logits(artifact.load_artifact(str(tiny), torch.float32, {}), inputs)
    return {"inputs": inputs, "logits": logits, "untrained": logits + 1, "dtype": "float32", "device": "cuda"}


def pretend(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (free, PLENTY))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], set[str]]:
    """The devices that were asked for, and those whose memory runs out; the fresh process is this one."""
    devices, full = list[str](), set[str]()

    def ask(spec: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        devices.append(spec["device"])
        file = Path(spec["probe"]).with_name("spec.json")
        file.write_text(json.dumps(spec))
        load = artifact._load_complete

        def out_of_memory(*given: Any) -> Any:
            if spec["device"] in full:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return load(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(artifact, "_load_complete", out_of_memory)
            try:
                verify._main(str(file))
            except SystemExit as ended:
                return subprocess.CompletedProcess(CHILD, int(str(ended.code)), "", "")
        return subprocess.CompletedProcess(CHILD, 0, capsys.readouterr().out, "")

    monkeypatch.setattr(verify, "compare", ask)
    return devices, full


def test_a_gpu_whose_memory_runs_out_is_followed_by_the_cpu(
    tiny: Path, probe: dict[str, Any], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, full = asked
    pretend(monkeypatch, PLENTY)
    full.add("cuda")
    found = verify.verify(tiny, probe, {})
    assert devices == ["cuda", "cpu"]
    assert found["bit_equal"]
    assert (found["device"], found["trained_on"]) == ("cpu", "cuda")
    full.add("cpu")
    with pytest.raises(errors.RunError, match=r"was not compared.*it is kept") as ended:
        verify.verify(tiny, probe, {})
    assert ended.value.code == errors.OUT_OF_MEMORY


def test_a_process_that_the_system_killed_says_nothing_of_the_artefact(
    tiny: Path, probe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "compare", lambda spec: subprocess.CompletedProcess(CHILD, -9, "", ""))
    with pytest.raises(errors.RunError, match="was not compared"):
        verify.verify(tiny, probe, {})


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("CUDA error: out of memory", errors.OUT_OF_MEMORY),
        ("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED", errors.OUT_OF_MEMORY),
        ("no", None),
    ],
)
def test_a_gpu_too_full_to_begin_with(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int | None
) -> None:
    def full(*given: Any) -> Any:
        raise RuntimeError(said)

    monkeypatch.setattr(artifact, "_load_complete", full)
    torch.save({}, tmp_path / "probe.pt")
    spec = {"folder": str(tiny), "probe": str(tmp_path / "probe.pt"), "dtype": "float32", "device": "cuda", "options": {}}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises((SystemExit, RuntimeError)) as ended:
        verify._main(str(tmp_path / "spec.json"))
    assert getattr(ended.value, "code", None) == code


def test_weights_that_a_gpu_cannot_hold_are_not_tried_there(
    tiny: Path, probe: dict[str, Any], asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, _ = asked
    least = verify.weight_bytes(tiny, {}, 4)
    assert least == 4 * sum(p.numel() for p in artifact.load_artifact(str(tiny), torch.float32, {}).parameters())
    pretend(monkeypatch, least)
    assert verify.verify(tiny, probe, {})["device"] == "cpu"
    assert devices == ["cpu"]
    assert verify.first_device(tiny, probe | {"dtype": "bfloat16"}, {}) == "cuda"  # half the bytes
    assert verify.first_device(tiny, probe | {"device": "cpu"}, {}) == "cpu"  # where the logits come from
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.first_device(tiny, probe | {"device": "mps", "dtype": "bfloat16"}, {}) == "cpu"


def test_an_adapter_takes_the_bytes_of_its_base(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    whole = verify.weight_bytes(tiny, {}, 2)
    assert verify.weight_bytes(tmp_path, {}, 2) == whole > 0
    assert verify.weight_bytes(tmp_path, {"quantization": {"load_in_4bit": True}}, 2) == 0  # nobody knows before
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/something"}))
    assert verify.weight_bytes(tmp_path, {}, 2) == 0


@pytest.mark.parametrize(
    ("device", "share", "moved", "passes"),
    [
        ("cpu", 0.5, 1.0, True),
        ("cpu", 2.0, 1.0, False),
        ("cuda", 2.0, 1.0, True),  # another device adds up in another order
        ("cuda", 2.0, 1e-4, False),  # but what is as near to the untrained model is none, anywhere
        ("cuda", 20.0, 1.0, False),
        ("cpu", 0.5, 0.0, True),  # the weights of step 0 are the untrained ones
        ("cpu", 2.0, 0.0, False),
    ],
)
def test_another_device_may_differ_by_more(
    tiny: Path, probe: dict[str, Any], asked: Any, device: str, share: float, moved: float, passes: bool
) -> None:
    logits = probe["logits"]
    off = share * verify.TOLERANCE["float32"] * float(logits.abs().max())
    probe |= {"logits": logits + off, "untrained": logits + off + moved, "device": device}  # no GPU here: compared on the CPU
    if passes:
        assert verify.verify(tiny, probe, {})["device"] == "cpu"
        return
    with pytest.raises(errors.RunError, match="does not match the trained model") as ended:
        verify.verify(tiny, probe, {})
    assert ended.value.code == errors.ARTIFACT


@pytest.mark.usefixtures("fresh_process")
def test_a_process_for_the_cpu_sees_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, env, **more: seen.append(env))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for device in ("cuda", "cpu"):
        verify.compare({"probe": str(tmp_path / "probe.pt"), "device": device})
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["3", ""]


# what is used


@pytest.mark.parametrize(
    ("needed", "free", "spreads", "where"),
    [
        (10, None, True, "cpu"),
        (14, 80, True, "cuda"),
        (71, 80, False, "cuda"),
        (73, 80, False, "cpu"),  # no room for what is computed beside them
        (140, 80, True, "spread"),
        (140, 80, False, "cpu"),
    ],
)
def test_where_a_model_has_room(needed: int, free: int | None, spreads: bool, where: str) -> None:
    assert artifact.choose(needed, free, spreads) == where


def test_a_model_without_room_stays_on_the_cpu_or_is_shared_out(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = artifact.load(str(tiny), dtype="float32")
    said = stream(model, renderer_of(tokenizer, None, plain=False), "the cat", How(6))
    size = 4 * sum(p.numel() for p in model.parameters())
    capsys.readouterr()
    pretend(monkeypatch, size)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert artifact.placed(model) is model
    assert "runs on the CPU" in capsys.readouterr().err
    shared = artifact.placed(model, spreads=True)  # among no GPUs and the CPU
    assert "its layers are distributed" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stream(shared, renderer_of(tokenizer, None, plain=False), "the cat", How(6)) == said
    pretend(monkeypatch, size)
    monkeypatch.setenv("WORLD_SIZE", "2")
    artifact.placed(model, spreads=True)
    assert "runs on the CPU" in capsys.readouterr().err  # the other process needs the GPUs too
    half = model.to(torch.bfloat16)
    monkeypatch.setattr(half, "to", lambda device: device)
    assert artifact.placed(half) == "cuda"
    assert artifact.placed(half, widened=True) is half  # merging needs it in float32


def test_a_model_in_pieces_answers_as_the_whole(models: Callable[..., Path], tmp_path: Path) -> None:
    """Layers on one device and, in place of another one, on the disk: accelerate's hooks bring them together."""
    from accelerate import dispatch_model
    from peft import LoraConfig, get_peft_model

    model, tokenizer, _ = artifact.load(str(models(tied=True)), dtype="float32")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    renderer = renderer_of(tokenizer, None, plain=False)
    said = stream(adapted, renderer, "the cat", How(8))
    inner = artifact.inner_of(adapted)
    names = [f"model.layers.{index}" for index in range(len(inner.model.layers))]
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {name: "disk" if index else "cpu" for index, name in enumerate(names)}
    dispatch_model(inner, places, offload_dir=tmp_path, skip_keys=inner._skip_keys_device_placement)
    assert any(p.is_meta for p in adapted.parameters())
    assert stream(adapted, renderer, "the cat", How(8)) == said


def test_a_gpu_that_is_full_is_said_with_a_cure(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(artifact, "placed", full)
    with pytest.raises(errors.RunError, match=r"--quantization nf4.*CUDA_VISIBLE_DEVICES=") as ended:
        artifact.load(str(tiny))
    assert ended.value.code == errors.OUT_OF_MEMORY
