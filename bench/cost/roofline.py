"""The roofline: the least time that what a model launches can take, computed from the rates of a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .count import Cost


@dataclass(frozen=True)
class Datasheet:
    """What the maker of a GPU promises, dense, without sparsity.

    Attributes:
        tflops: precision ("bf16", "fp16", "tf32", "fp32") -> peak TFLOP/s; fp32 outside the tensor cores.
        gb_per_s: memory bandwidth, 1 GB = 1e9 bytes.
    """

    tflops: Mapping[str, float]
    gb_per_s: float


_A100 = MappingProxyType({"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5})
_HOPPER = MappingProxyType({"bf16": 989.0, "fp16": 989.0, "tf32": 494.0, "fp32": 67.0})

#: The SXM modules, by the name that the tables print.
DATASHEETS: Mapping[str, Datasheet] = MappingProxyType(
    {
        "A100-40": Datasheet(_A100, 1555.0),
        "A100-80": Datasheet(_A100, 2039.0),
        "H100": Datasheet(_HOPPER, 3350.0),
        "H200": Datasheet(_HOPPER, 4800.0),
    }
)


def roofline_ms(cost: Cost, peak_tflops: float, gb_per_s: float) -> float:
    """A lower bound of a call's time in ms: the sum over its launches of the longer of arithmetic and traffic.

    Launches do not overlap, and what one wrote the next reads from memory: a cache can beat the bound where
    everything fits into it, as at batch 1.

    Args:
        cost: what the call launches.
        peak_tflops: of a datasheet, or measured (``Ceilings.matmul_tflops``), in the precision of the call.
        gb_per_s: likewise (``Ceilings.copy_gb_per_s``).

    Raises:
        ValueError: a rate is not above 0.
    """
    for name, rate in (("peak_tflops", peak_tflops), ("gb_per_s", gb_per_s)):
        if not rate > 0:
            raise ValueError(f"{name} must be above 0, got {rate}")
    flops_per_ms, bytes_per_ms = peak_tflops * 1e9, gb_per_s * 1e6
    return sum(max(launch.flops / flops_per_ms, launch.bytes / bytes_per_ms) for launch in cost.records)


def datasheet_bounds(cost: Cost, precision: str) -> dict[str, float]:
    """GPU -> :func:`roofline_ms` at its datasheet's rates.

    Args:
        precision: "bf16", "fp16", "tf32" or "fp32" (which is the plain fp32 rate).

    Raises:
        ValueError: another precision.
    """
    known = list(_A100)
    if precision not in known:
        raise ValueError(f"precision must be one of {', '.join(known)}, got {precision!r}")
    return {name: roofline_ms(cost, gpu.tflops[precision], gpu.gb_per_s) for name, gpu in DATASHEETS.items()}
