"""The limits of this machine, measured: a device copy and large matmuls on random data, never zeros."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from ..cases.case import DTYPES
from ..cases.precision import float32_precision
from ..records.files import Ceilings

_GPU_MATMUL = 8192
CPU_MATMUL = 1024
CPU_MATMUL_MAX = 4096
CPU_COPY_BYTES = 256 << 20


def measure_ceilings(device: torch.device, precisions: Iterable[str], seconds: float = 0.5) -> Ceilings:
    """Measures the copy and each precision's matmul for about ``seconds`` each.

    Args:
        device: a CPU or CUDA device.
        precisions: names of DTYPES, or "tf32" (fp32 operands, TF32 arithmetic; CUDA).
        seconds: time for each measurement.
    """
    copy_gb_per_s, copy_bytes = _copy(device, seconds)
    rates: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for precision in dict.fromkeys(precisions):
        rates[precision], sizes[precision] = _matmul(device, precision, seconds)
    return Ceilings(copy_gb_per_s, copy_bytes, rates, sizes)


def _copy(device: torch.device, seconds: float) -> tuple[float, int]:
    size = CPU_COPY_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        size = min(1 << 30, free // 8)
    # a small random block over and over: to draw all of it would take longer than to measure
    source = torch.randn(min(size // 4, 1 << 20), device=device).repeat(max(size // 4 >> 20, 1))
    target = torch.empty_like(source)
    best = _best(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / best / 1e9, source.nbytes


def _matmul(device: torch.device, precision: str, seconds: float) -> tuple[float, int]:
    dtype = torch.float32 if precision == "tf32" else DTYPES[precision]
    mode = "high" if precision == "tf32" else "highest"
    with float32_precision(mode):
        size = _GPU_MATMUL if device.type == "cuda" else CPU_MATMUL
        while True:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            best = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)  # type: ignore[misc]
            # a short matmul understates a fast machine
            if device.type == "cuda" or best > 0.05 or size >= CPU_MATMUL_MAX:
                return 2 * size**3 / best / 1e12, size
            size *= 2


def _best(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of a call in seconds, over at least three after one warm-up."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        times.append(_seconds(call, device))
    return min(times)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e9
