"""The attention kernels as ``ditfast kernels`` compiles them: as the heuristic launches them on each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import _attention_fwd_kernel, fwd_launch
from ..attention_bwd import OPERATORS, bwd_launches
from ..configs.attention import attention_config
from .compile import TYPE_NAMES, Budget, KernelCase

_BATCH, _HEADS = 8, 16
_LIMIT = 255  # registers of a thread: the accumulators of a tile take most of them

# Tensor cores (wgmma on sm_90) fed by asynchronous copies, on both at least two warps for each of a multiprocessor's
# four schedulers. Shared memory: two blocks of a multiprocessor at head dims up to 96, one beyond.
_BUDGETS = {
    "sm_80": Budget(registers=_LIMIT, shared=96 * 1024, resident_warps=8, instructions=("HMMA", "LDGSTS")),
    "sm_90": Budget(registers=_LIMIT, shared=128 * 1024, resident_warps=8, instructions=("HGMMA", "LDGSTS")),
}
# fp32 without TF32 runs on the ordinary units
_FP32 = Budget(registers=_LIMIT, shared=80 * 1024, resident_warps=4, instructions=("FFMA",))


def cases(arch: str) -> Iterator[KernelCase]:
    """The kernels for "sm_80" or "sm_90", whose tiles differ."""
    for head_dim in (32, 48, 64, 72, 80, 96, 128):
        yield _forward(arch, head_dim)
    yield _forward(arch, 72, tokens=257)
    yield _forward(arch, 64, bias=True)
    yield _forward(arch, 64, dtype=torch.float32)
    for head_dim in (32, 48, 64, 72, 80, 96, 128):
        yield from _backward(arch, head_dim)
    yield from _backward(arch, 72, tokens=257)
    yield from _backward(arch, 72, tokens=64)
    yield from _backward(arch, 128, tokens=128)
    yield from _backward(arch, 72, tokens=65, bias=True)
    yield from _backward(arch, 64, bias=True)
    yield from _backward(arch, 72, bias=True)
    yield from _backward(arch, 64, dtype=torch.float32)


def _forward(
    arch: str, head_dim: int, tokens: int = 256, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> KernelCase:
    qkv, table, out, stats = _inputs(head_dim, tokens, dtype, bias)
    config = attention_config("attention_fwd", head_dim, tokens, dtype, _capability(arch), bias)
    _, arguments = fwd_launch(qkv, table, out, stats, head_dim**-0.5, config)
    return _case("self_attention, forward", arch, _attention_fwd_kernel, arguments)


def _backward(
    arch: str, head_dim: int, tokens: int = 256, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> Iterator[KernelCase]:
    qkv, table, out, stats = _inputs(head_dim, tokens, dtype, bias)
    configs = [attention_config(name, head_dim, tokens, dtype, _capability(arch), bias) for name in OPERATORS]
    sums = torch.empty(_BATCH * 4, 3 * _HEADS * head_dim, device="meta")
    delta = torch.empty(_BATCH, _HEADS, 3, tokens, device="meta")
    launches = bwd_launches(out, qkv, out, stats, head_dim**-0.5, table, qkv, table, 4, configs, delta, sums)
    for name, (kernel, _, arguments) in zip(("d_q", "d_k and d_v", "d_bias"), launches, strict=False):
        yield _case(f"self_attention, {name}", arch, kernel, arguments)


def _inputs(head_dim: int, tokens: int, dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """qkv, the bias, out and stats, without memory."""
    qkv = torch.empty(_BATCH, tokens, 3, _HEADS, head_dim, dtype=dtype, device="meta")
    table = torch.empty(1, _HEADS, tokens, tokens, dtype=dtype, device="meta") if bias else None
    out = torch.empty(_BATCH, tokens, _HEADS * head_dim, dtype=dtype, device="meta")
    return qkv, table, out, torch.empty(_BATCH, _HEADS, 2, tokens, device="meta")


def _capability(arch: str) -> tuple[int, int]:
    return divmod(int(arch.removeprefix("sm_")), 10)


def _case(name: str, arch: str, kernel: Any, arguments: dict[str, Any]) -> KernelCase:
    """A launch as Triton specialises it: a 1 becomes a constant, multiples of 16 are known to be ones."""
    arguments = dict(arguments)
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages")}
    types: dict[str, str | None] = {}
    constants: dict[str, Any] = {}
    divisible = set()
    for argument, value in arguments.items():
        specialised = isinstance(value, int) and argument not in kernel.do_not_specialize
        if argument.isupper() or (specialised and value == 1):
            constants[argument] = value
        elif value is None:
            types[argument] = None
        elif isinstance(value, Tensor):
            types[argument] = f"*{TYPE_NAMES[value.dtype]}"
        elif isinstance(value, float):
            types[argument] = "fp32"
        else:
            types[argument] = "i32"
            if specialised and value % 16 == 0:
                divisible.add(argument)
    dtype = arguments["qkv_ptr"].dtype
    bias = "" if arguments["bias_ptr"] is None else ", bias"
    return KernelCase(
        name=name,
        shape=f"D={arguments['D']}, T={arguments['tokens']}{bias}",
        dtype=TYPE_NAMES[dtype],
        kernel=kernel,
        types=types,
        constants=constants,
        divisible=frozenset(divisible),
        budget=_FP32 if dtype == torch.float32 else _BUDGETS[arch],
        **options,
    )
