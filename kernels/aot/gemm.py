"""What ``ditfast kernels`` compiles of the GEMMs: every epilogue at the models' widths, as the heuristic has it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import gemm, linear, modulations
from ..configs.gemm import GemmConfig, for_results, heuristic, modulations_heuristic, sum_rows
from .compile import TYPE_NAMES, Budget, KernelCase, Types

_TOKENS, _BATCHES = 256, (1, 64)
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
_MODULATION_ROWS = (1, 32, 64, 256)  # one for each tile of the heuristic
_LAYERS = 28
_MODULATION_WIDTH = 1152  # in every pair of dtypes: widths change nothing but constants
_TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA"}
# a multiprocessor's memory that a block may take; half of it where two share one
_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

# operator -> (epilogue, stores a second tile, its Linear's (N, K) in units of the width)
_OPERATORS = {
    "linear_gelu": ("gelu", False, (4, 1)),
    "linear_gelu_save": ("gelu", True, (4, 1)),
    "linear_gelu_backward": ("gelu_grad", True, (4, 1)),
    "linear_gated_residual": ("gated_residual", False, (1, 4)),
    "linear_gated_residual_save": ("gated_residual", True, (1, 4)),
}


def cases(width: int) -> Iterator[KernelCase]:
    """Of one model width: both architectures, few rows and many, tiles that straddle samples, an fp32 stream beside
    bf16, and fp32 with TF32 and without."""
    large = _BATCHES[-1] * _TOKENS
    for arch in _MULTIPROCESSORS:
        for operator in _OPERATORS:
            for batch in _BATCHES:
                yield _gemm(operator, width, arch, batch * _TOKENS, torch.bfloat16)
            for tf32 in (False, True):
                yield _gemm(operator, width, arch, large, torch.float32, tf32=tf32)
            if "gated_residual" in operator:
                yield _gemm(operator, width, arch, large, torch.bfloat16, stream=torch.float32)
        yield _gemm("linear_gated_residual", width, arch, 64 * 257, torch.bfloat16, tokens=257)
    for dtype in (torch.bfloat16, torch.float32):
        yield _gelu_gradient(width, dtype)
    for arch in _MULTIPROCESSORS:
        for rows in _MODULATION_ROWS:
            yield _modulations(width, arch, rows, torch.bfloat16, torch.bfloat16)
            if width == _MODULATION_WIDTH:
                yield _modulations(width, arch, rows, torch.bfloat16, torch.float32)
                yield _modulations(width, arch, rows, torch.float32, torch.float32)
        yield _modulations(width, arch, _MODULATION_ROWS[-1], torch.float32, torch.float32, tf32=True)


def _gemm(
    operator: str,
    width: int,
    arch: str,
    rows: int,
    dtype: torch.dtype,
    stream: torch.dtype | None = None,
    tokens: int = _TOKENS,
    tf32: bool = False,
) -> KernelCase:
    epilogue, saves, (out_units, in_units) = _OPERATORS[operator]
    columns, inner = out_units * width, in_units * width
    major = int(arch.removeprefix("sm_")) // 10
    stream = stream or dtype
    config = heuristic(operator, rows, columns, inner, dtype, major, _MULTIPROCESSORS[arch], demanded=True, tf32=tf32)
    config = for_results(config, stream)
    kernel = gemm._gemm_tma_kernel if config.tma else gemm._gemm_kernel
    suffix, kind = ("desc" if config.tma else "ptr"), TYPE_NAMES[dtype]

    def matrix(down: int, across: int, dtype: torch.dtype = dtype) -> str:
        return f"tensordesc<{TYPE_NAMES[dtype]}[{down},{across}]>" if config.tma else f"*{TYPE_NAMES[dtype]}"

    part = (config.block_m, config.block_n // config.parts)
    transposed = epilogue != "gelu_grad"
    block_b = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    types: dict[str, Types] = {
        f"a_{suffix}": matrix(config.block_m, config.block_k),
        f"b_{suffix}": matrix(*block_b),
        f"out_{suffix}": matrix(*part, stream),
    }
    if epilogue == "gelu_grad":
        types["sums_ptr"] = "*fp32"
    else:
        types["bias_ptr"] = f"*{kind}"
    if epilogue == "gated_residual":
        types["gate_ptr"] = f"*{kind}"
    if epilogue != "gelu":
        types[f"aux_{suffix}"] = matrix(*part, stream)
    if saves:
        types[f"saved_{suffix}"] = matrix(*part)
    numbers = [name for name in kernel.arg_names if name in ("M", "N", "K", "tokens") or name.startswith("stride_")]
    types |= dict.fromkeys(numbers, "i32")
    one_sample = tokens % config.block_m == 0
    constants = {
        "TRANSPOSED": transposed,
        "EPILOGUE": epilogue,
        "ONE_SAMPLE": one_sample,
        "FAST": dtype != torch.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": False,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": config.parts,
    }
    if config.tma:
        constants |= {"PROGRAMS": config.tma * _MULTIPROCESSORS[arch]}
    else:
        constants |= {"EVEN_K": inner % config.block_k == 0}
    straddles = "" if one_sample else f", T={tokens}"
    return KernelCase(
        name=operator,
        shape=f"M={rows} N={columns} K={inner}{straddles}",
        dtype=f"{kind}, fp32 stream" if stream != dtype else "tf32" if tf32 else kind,
        kernel=kernel,
        types=types,
        constants=constants,
        divisible=frozenset({"N", "K", *(name for name in numbers if name.startswith("stride_"))}),
        num_warps=config.num_warps,
        budget=_budget(config, arch, dtype != torch.float32 or tf32),
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        arch=arch,
    )


def _budget(config: GemmConfig, arch: str, tensor_cores: bool) -> Budget:
    if not tensor_cores:  # multiply-adds: what counts is that nothing spills
        return Budget(registers=255, shared=_SHARED[arch] // 2, resident_warps=8)
    if config.tma:
        instructions = ("HGMMA", "UTMALDG", "UTMASTG")
        return Budget(registers=255, shared=_SHARED[arch], resident_warps=4, instructions=instructions)
    # two blocks share a multiprocessor: one computes while the other is in its epilogue
    instructions = (_TENSOR_CORES[arch], "LDGSTS")
    return Budget(
        registers=config.max_registers or 255,
        shared=_SHARED[arch] // 2 - 1024,
        resident_warps=2 * config.num_warps,
        instructions=instructions,
    )


def _gelu_gradient(width: int, dtype: torch.dtype) -> KernelCase:
    kind = TYPE_NAMES[dtype]
    pointers = dict.fromkeys(("d_act_ptr", "pre_ptr", "d_pre_ptr", "act_ptr"), f"*{kind}")
    return KernelCase(
        name="gelu_backward",
        shape=f"M=16384 N={4 * width}",
        dtype=kind,
        kernel=linear._gelu_bwd_kernel,
        types={**pointers, "sums_ptr": "*fp32", **dict.fromkeys(("M", "N", "stride_d_act"), "i32")},
        constants={
            "ROWS": sum_rows(16384, dtype),
            "COLS": linear._GRAD_COLS,
            "CHUNK": linear._GRAD_CHUNK,
            "FAST": dtype != torch.float32,
        },
        divisible=frozenset({"N", "stride_d_act"}),
        num_warps=4,
        budget=Budget(
            registers=128, shared=8192, resident_warps=16, wide=0.8, instructions=("LDG.E.128", "STG.E.128")
        ),
    )


def _modulations(
    width: int, arch: str, rows: int, dtype: torch.dtype, stored: torch.dtype, tf32: bool = False
) -> KernelCase:
    """Of blocks of six vectors and a final layer of two; under autocast c and the weights are fp32."""
    major = int(arch.removeprefix("sm_")) // 10
    config = modulations_heuristic(rows, dtype, stored, major, demanded=True, tf32=tf32)
    kind, count = f"*{TYPE_NAMES[stored]}", _LAYERS + 1
    tensor_cores = dtype != torch.float32 or tf32
    # weights that are converted go through registers
    instructions: tuple[str, ...] = ("LDGSTS",)
    if tensor_cores:
        instructions = (_TENSOR_CORES[arch] if rows >= 64 else "HMMA", "LDGSTS.E.BYPASS.128")
    return KernelCase(
        name="modulations",
        shape=f"M={rows} N={(6 * _LAYERS + 2) * width} K={width}",
        dtype="tf32" if tf32 else TYPE_NAMES[dtype] + ("" if stored == dtype else f", {TYPE_NAMES[stored]} weights"),
        kernel=modulations._modulations_kernel,
        types={
            "c_ptr": kind,
            "weights": (kind,) * count,
            "biases": (kind,) * count,
            "out_ptr": f"*{TYPE_NAMES[dtype]}",
            **dict.fromkeys(("M", "K", "stride_c", "stride_out"), "i32"),
        },
        constants={
            "WIDTHS": modulations.packed((6 * width,) * _LAYERS + (2 * width,)),
            "DTYPE": modulations._TRITON[dtype],
            "PRECISION": "tf32" if tf32 else "ieee",
            "UPCAST": False,
            "EVEN_K": width % config.block_k == 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        },
        divisible=frozenset({"K", "stride_c", "stride_out"}),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
        # a multiprocessor's blocks have three k-steps each on their way: 64 KB and more of weights
        budget=Budget(
            registers=128, shared=_SHARED[arch] // 2 - 1024, resident_warps=12 if rows <= 64 else 16, wide=0.75,
            instructions=instructions,
        ),
        arch=arch,
    )  # fmt: skip
