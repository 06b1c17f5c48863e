"""What ``ditfast info`` prints: versions, devices, and which implementation each operator can use here."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..environment import cpu_model, gpu_properties, package_version

# distributions whose version changes what runs or how fast; the first four are always needed
_DISTRIBUTIONS = ("torch", "triton", "numpy", "safetensors", "diffusers", "flash-attn", "flash-attn-3", "flash-attn-4")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: T x H x head_dim, whose attention is reported by default: DiT-XL/2 and DiT-L/2 at 256 and 512 px
SHAPES = ("256x16x72", "1024x16x72", "256x16x64", "1024x16x64")


def collect(shapes: Sequence[str] = SHAPES, dtype: str = "bf16") -> dict[str, Any]:
    """The facts about this installation, JSON-ready.

    Args:
        shapes: of packed projections, "TxHxhead_dim"; the batch does not count.
        dtype: of those: "bf16", "fp16" or "fp32".

    Returns:
        versions: distribution -> version, or None where it is not installed; ditfast and python first.
        platform: operating system and machine.
        devices: one entry a device, the CPU first, each with its "type" and "name".
        no_gpu: why there is no CUDA device, or None.
        triton_interpreter: whether kernels run in Triton's interpreter (TRITON_INTERPRET).
        backends: one entry an operator (or family) and backend; "reason" says why it is unavailable, or is None.
        attention: one entry a shape: which backend self_attention takes on this device in "inference" and "training",
            and by backend the "reasons" why the others cannot take it, or None.

    Raises:
        ValueError: a shape or dtype that is none, naming it.
    """
    from .. import ops

    return {
        "versions": {
            "ditfast": __version__,
            "python": platform.python_version(),
            **{name: package_version(name) for name in _DISTRIBUTIONS},
        },
        "platform": platform.platform(),
        "devices": [_cpu(), *_gpus()],
        "no_gpu": _no_gpu(),
        "triton_interpreter": _interpreter(),
        "backends": [
            {"operator": operator, "backend": backend, "available": reason is None, "reason": reason}
            for operator, backend, reason in ops.available_backends()
        ],
        "attention": [_attention(shape, dtype) for shape in shapes],
    }


def render(facts: dict[str, Any], reasons: bool = False) -> str:
    """The facts as text for people, without a trailing newline; with ``reasons``, those of each attention too."""
    lines = ["versions"]
    lines += _columns([(name, version or "not installed") for name, version in facts["versions"].items()])
    lines += ["", "devices"]
    devices = [(_device_name(device), _device_details(device)) for device in facts["devices"]]
    if facts["no_gpu"]:
        devices.append(("cuda", f"none: {facts['no_gpu']}"))
    lines += _columns(devices)
    interpreter = "on" if facts["triton_interpreter"] else "off (TRITON_INTERPRET=1 turns it on)"
    lines += ["", f"Triton's interpreter: {interpreter}", "", "operator backends"]
    lines += _columns(
        [
            (backend["operator"], backend["backend"], backend["reason"] or "available")
            for backend in facts["backends"]
        ]
    )
    lines += ["", "self_attention takes"]
    for entry in facts["attention"]:
        choice = f"{entry['inference']} in inference, {entry['training']} in training"
        lines.append(f"  {entry['shape']} {entry['dtype']}: {choice}")
        if reasons:
            lines += ["  " + line for line in _columns([(n, r or "can run") for n, r in entry["reasons"].items()])]
    return "\n".join(lines)


def _attention(shape: str, dtype: str) -> dict[str, Any]:
    import torch

    from .. import ops

    parts = shape.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"shape must look like 256x16x72 (T x H x head_dim), got {shape!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    tokens, num_heads, head_dim = map(int, parts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = torch.empty(1, tokens, 3 * num_heads * head_dim, dtype=getattr(torch, _DTYPES[dtype]), device=device)

    def chosen(training: bool) -> str:
        return ops.attention_backend(qkv, tokens, head_dim, training=training)

    return {
        "shape": shape,
        "dtype": dtype,
        "inference": chosen(False),
        "training": chosen(True),
        "reasons": ops.attention_backends(qkv, num_heads),
    }


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "type": "cpu",
        "name": cpu_model() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = gpu_properties(index)
        memory = round(properties.pop("memory_bytes") / 2**30, 1)
        gpus.append({"type": "cuda", "index": index, **properties, "memory_gib": memory, "runtime": runtime})
    return gpus


def _no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch is built with CUDA but finds no usable GPU or driver"


def _interpreter() -> bool:
    # Triton reads this variable itself; asking Triton would import it
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def _device_name(device: dict[str, Any]) -> str:
    return f"cuda:{device['index']}" if device["type"] == "cuda" else str(device["type"])


def _device_details(device: dict[str, Any]) -> str:
    if device["type"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, {device['torch_threads']} torch threads"
    return (
        f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB, "
        f"{device['multiprocessors']} multiprocessors, {device['runtime']}"
    )


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows with every column but the last padded to its width, indented by two."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
