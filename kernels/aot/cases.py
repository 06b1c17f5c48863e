"""What ``ditfast kernels`` compiles: every kernel at the models' widths, as the heuristic launches it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import adaln, conditioning, sums
from ..configs.rows import row_config
from . import attention, gemm
from .compile import ARCHITECTURES, TYPE_NAMES, Budget, KernelCase

WIDTHS = (384, 768, 1024, 1152)
_TOKENS, _BATCH = 256, 64

# Memory-bound: what counts are wide accesses and enough warps to keep loads in flight. 16 warps, each with four
# 16-byte loads a lane, are 32 KB in flight (28 with two: 28 KB); 4.8 TB/s at 700 ns want 25 KB a multiprocessor.
_FORWARD = Budget(registers=96, shared=4096, resident_warps=28, wide=0.8, instructions=("LDG.E.128", "STG.E.128"))
_BACKWARD = Budget(registers=128, shared=8192, resident_warps=16, wide=0.8, instructions=("LDG.E.128", "STG.E.128"))
_SUM = Budget(registers=64, shared=4096, resident_warps=32, instructions=("LDG.E.128",))

_SMALL = Budget(registers=64, shared=1024, resident_warps=16)  # (B, D) vectors: one short launch each

# operator -> (adds a branch, normalises)
_OPERATORS = {
    "layer_norm_modulate": (False, True),
    "gated_residual": (True, False),
    "gated_residual_layer_norm_modulate": (True, True),
}


def cases() -> Iterator[KernelCase]:
    """Every kernel, operator, width and dtype, the fp32 stream beside bf16 included."""
    for width in WIDTHS:
        for stream, rest in (
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
        ):
            for operator in _OPERATORS:
                yield _forward(operator, width, stream, rest)
                yield _backward(operator, width, stream, rest)
        yield _sum(width)
        yield _conditioning(width)
        yield from gemm.cases(width)
    for arch in ARCHITECTURES:
        yield from (replace(case, arch=arch) for case in attention.cases(arch))
    yield _sinusoid()


def _forward(operator: str, width: int, stream: torch.dtype, rest: torch.dtype) -> KernelCase:
    branch, norm = _OPERATORS[operator]
    present = {"x": stream}
    if branch:
        present |= {"branch": rest, "gate": rest, "r": stream}
    if norm:
        present |= {"shift": rest, "scale": rest, "out": rest, "mean": torch.float32, "rstd": torch.float32}
    constants = {"HAS_BRANCH": branch, "HAS_NORM": norm}
    return _case(f"{operator}, forward", adaln._adaln_fwd_kernel, "adaln_fwd", width, present, constants, _FORWARD)


def _backward(operator: str, width: int, stream: torch.dtype, rest: torch.dtype) -> KernelCase:
    branch, norm = _OPERATORS[operator]
    present = {}
    if branch:
        present |= {"d_r": stream, "branch": rest, "gate": rest, "d_branch": rest}
        present |= dict.fromkeys(("sums", "sum_bias"), torch.float32)
    if norm:
        present |= {"d_out": rest, "r": stream, "shift": rest, "scale": rest, "d_x": stream, "out": rest}
        present |= dict.fromkeys(("mean", "rstd", "sums"), torch.float32)
    constants = {
        "HAS_NORM": norm,
        "HAS_D_R": branch,
        "WANT_X": norm,
        "WANT_BRANCH": branch,
        "WANT_GATE": branch,
        "WANT_MODULATION": norm,
        "WANT_BIAS": branch,
        "WANT_OUT": norm,
    }
    case = _case(f"{operator}, backward", adaln._adaln_bwd_kernel, "adaln_bwd", width, present, constants, _BACKWARD)
    return replace(case, max_registers=adaln.MAX_REGISTERS)


def _case(
    name: str,
    kernel: Any,
    operator: str,
    width: int,
    present: dict[str, torch.dtype],
    constants: dict[str, Any],
    budget: Budget,
) -> KernelCase:
    stream = present.get("x", present.get("d_x", present.get("d_r")))
    rest = present.get("out", present.get("d_out", present.get("branch")))
    config = row_config(operator, width, _TOKENS, _BATCH, torch.empty(0, dtype=stream, device="meta"))
    pointers = {f"{argument}_ptr": f"*{TYPE_NAMES[dtype]}" for argument, dtype in present.items()}
    types: dict[str, str | None] = {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            types[argument] = pointers.get(argument)
        elif argument == "eps":
            types[argument] = "fp32"
        elif argument.islower():
            types[argument] = "i32"
    return KernelCase(
        name=name,
        shape=f"D={width}",
        dtype=TYPE_NAMES[rest] if stream == rest else f"{TYPE_NAMES[rest]}, {TYPE_NAMES[stream]} stream",
        kernel=kernel,
        types=types,
        constants={"D": width, "BLOCK": config.block, "TAIL": config.tail, **constants},
        divisible=frozenset(argument for argument in types if argument.startswith("stride_")),
        num_warps=config.num_warps,
        budget=budget,
    )


def _conditioning(width: int) -> KernelCase:
    return KernelCase(
        name="conditioning",
        shape=f"D={width}",
        dtype="bf16",
        kernel=conditioning._conditioning_kernel,
        types={
            **dict.fromkeys(("t_emb_ptr", "table_ptr", "out_ptr"), "*bf16"),
            "y_ptr": "*i64",
            **dict.fromkeys(("labels", "stride_t_emb", "stride_table"), "i32"),
        },
        constants={"D": width, "BLOCK": conditioning._BLOCK},
        divisible=frozenset({"stride_t_emb", "stride_table"}),
        num_warps=1,
        budget=_SMALL,
    )


def _sinusoid() -> KernelCase:
    return KernelCase(
        name="timestep embedding",
        shape="dim=256",
        dtype="bf16",
        kernel=conditioning._sinusoid_kernel,
        types={"t_ptr": "*i64", "out_ptr": "*bf16"},
        constants={"STEP": -0.1, "HALF": 128, "BLOCK": 128},
        divisible=frozenset(),
        num_warps=4,
        budget=_SMALL,
    )


def _sum(width: int) -> KernelCase:
    """Three groups, as a training block has them: modulations, a Linear's bias, the MLP's first bias."""
    types: dict[str, str | None] = {}
    for index in range(3):
        types |= {f"partial{index}_ptr": "*fp32", f"out{index}_ptr": "*bf16", f"rows{index}": "i32"}
        types[f"width{index}"] = "i32"
    types |= dict.fromkeys(("rows3", "width3", "end0", "end1", "end2"), "i32")
    blocks = {"R0": 16, "W0": 128, "R1": 128, "W1": 16, "R2": 128, "W2": 16, "R3": 1, "W3": 1}
    return KernelCase(
        name="sums of partial sums",
        shape=f"D={width}",
        dtype="bf16",
        kernel=sums._sum_kernel,
        types=types,
        constants=blocks,
        divisible=frozenset({"width0", "width1", "width2"}),
        num_warps=4,
        budget=_SUM,
    )
