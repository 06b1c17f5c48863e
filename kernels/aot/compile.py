"""Ahead-of-time compilation for real GPUs on any machine, and what the machine code says of a kernel.

A :class:`KernelCase` is one kernel as one shape launches it; :func:`compile_case` compiles it for an architecture
and reads registers, spills, shared memory and memory instructions from the binary; :func:`violations` holds it
against its :class:`Budget`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}  # Triton's
Types = str | tuple[str, ...] | None

# architecture -> (shared memory of a multiprocessor, of one block at the most), bytes
_SHARED = {"sm_80": (164 * 1024, 163 * 1024), "sm_90": (228 * 1024, 227 * 1024)}
ARCHITECTURES = tuple(_SHARED)
_MAX_WARPS, _MAX_BLOCKS, _REGISTERS, _RESERVED_SHARED = 64, 32, 65536, 1024

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.[\w.]+)?)", re.MULTILINE)
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel may use. Spills are never allowed.

    Attributes:
        registers: of a thread.
        shared: bytes of a block.
        resident_warps: of a multiprocessor, at least: enough loads in flight to hide memory's latency.
        wide: the least share of global bytes moved by 128-bit accesses.
        instructions: prefixes of instructions that must appear.
    """

    registers: int
    shared: int
    resident_warps: int
    wide: float = 0.0
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class KernelCase:
    """One kernel as one shape launches it.

    Attributes:
        name, shape, dtype: as the report prints them.
        kernel: the @triton.jit function.
        types: Triton types of its run-time arguments ("*bf16", "i32", "tensordesc<bf16[128,64]>"), by name; None
            stays None, and a tuple is of arguments that come as one.
        constants: its constexprs, by name.
        divisible: run-time arguments that are multiples of 16, as pointers are.
        max_registers: of a thread, that the compiler is held to; 0 for none.
        arch: the only architecture that is launched so; None for all.
    """

    name: str
    shape: str
    dtype: str
    kernel: Any
    types: Mapping[str, Types]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    num_warps: int
    budget: Budget
    num_stages: int = 3
    max_registers: int = 0
    arch: str | None = None


@dataclass(frozen=True)
class Report:
    """What one case became on one architecture; bytes, and instructions by name."""

    case: KernelCase
    arch: str
    registers: int
    spill_bytes: int
    shared: int
    resident_warps: int
    wide: float
    instructions: dict[str, int] = field(repr=False)


def compile_case(case: KernelCase, arch: str) -> Report:
    """Compiles a case for "sm_80" or "sm_90"; no GPU is needed.

    Raises:
        ValueError: unknown architecture.
    """
    if arch not in _SHARED:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    types, constants = tuple(case.types.items()), tuple(case.constants.items())
    launch = (case.num_warps, case.num_stages, case.max_registers)
    registers, stack, shared, instructions = _compile(case.kernel, types, constants, case.divisible, *launch, arch)
    warps = resident_warps(arch, case.num_warps, registers, shared)
    return Report(case, arch, registers, stack, shared, warps, _wide_share(instructions), instructions)


@lru_cache(maxsize=1024)
def _compile(
    kernel: Any,
    types: tuple[tuple[str, Types], ...],
    constants: tuple[tuple[str, Any], ...],
    divisible: frozenset[str],
    num_warps: int,
    num_stages: int,
    max_registers: int,
    arch: str,
) -> tuple[int, int, int, dict[str, int]]:
    """(registers, bytes of stack, bytes of shared memory, instructions): shapes that differ in sizes alone are one."""
    kinds = dict(types)
    constexprs = {**dict(constants), **{name: None for name, kind in types if kind is None}}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = kinds.get(name)
        signature[name] = "constexpr" if kind is None else kind
        members = {(index, place): each for place, each in enumerate(kind)} if isinstance(kind, tuple) else None
        for path, each in (members or {(index,): kind}).items():
            if each is not None and (each.startswith("*") or name in divisible):
                attributes[path] = [["tt.divisibility", 16]]
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers:
        options["maxnreg"] = max_registers
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
        options=options,
    )
    usage, listing = _disassemble(compiled.asm["cubin"])
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK"))
    return registers, stack, int(compiled.metadata.shared), dict(Counter(_INSTRUCTION.findall(listing)))


def violations(report: Report) -> list[str]:
    """Each way in which a report is past its budget, in words; none where it is within."""
    budget = report.case.budget
    spilled = sum(count for name, count in report.instructions.items() if name.startswith(("LDL", "STL")))
    reasons = []
    if report.spill_bytes or spilled:
        reasons.append(f"spills {report.spill_bytes} bytes ({spilled} local loads and stores), none allowed")
    for name in ("registers", "shared"):
        if getattr(report, name) > getattr(budget, name):
            reasons.append(f"{name} {getattr(report, name)}, at most {getattr(budget, name)} allowed")
    if report.shared > _SHARED[report.arch][1]:
        reasons.append(f"shared {report.shared} bytes, {report.arch} has {_SHARED[report.arch][1]} a block")
    if report.resident_warps < budget.resident_warps:
        reasons.append(f"resident warps {report.resident_warps}, at least {budget.resident_warps} wanted")
    if report.wide < budget.wide:
        reasons.append(f"{report.wide:.0%} of global bytes in 128-bit accesses, at least {budget.wide:.0%} wanted")
    for instruction in budget.instructions:
        if not any(name.startswith(instruction) for name in report.instructions):
            reasons.append(f"no {instruction} instruction")
    return reasons


def resident_warps(arch: str, num_warps: int, registers: int, shared: int) -> int:
    """Warps of a multiprocessor that registers, shared memory and the hardware's own limits leave room for."""
    registers_a_block = num_warps * 32 * -(-registers // 8) * 8
    blocks = min(_REGISTERS // registers_a_block, _MAX_WARPS // num_warps, _MAX_BLOCKS)
    return min(blocks, _SHARED[arch][0] // (shared + _RESERVED_SHARED)) * num_warps


def _wide_share(instructions: Mapping[str, int]) -> float:
    """The share of global bytes that 128-bit instructions move, each instruction counted once."""
    total = wide = 0
    for name, count in instructions.items():
        if name.startswith(("LDG", "STG")):
            width = next((size for part, size in _WIDTHS.items() if part in name.split(".")), 4)
            total += width * count
            wide += width * count * (width == 16)
    return wide / total if total else 0.0


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as text, by the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, listing = (
            subprocess.run([str(tool), flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, listing
