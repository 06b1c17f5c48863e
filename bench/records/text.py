"""Numbers and names as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ditfast.config import MODELS, VAE_FACTOR

from .rows import CostRow, HostRow, MemoryRow, ModelRow, OpRow, SampleRow, ScalingRow

STATUS = {"ok": "ran", "oom": "out of memory", "error": "failed", "unavailable": "unavailable"}
# where there is room for a word or two
STATUS_SHORT = {"oom": "no memory", "error": "failed", "unavailable": "n/a"}
MODES = {
    "forward": "forward",
    "cfg": "guided forward",
    "train": "training step",
    "train-checkpoint": "training step with checkpointing",
}
_COST_MODES = {**MODES, "train": "loss and backward, without optimiser"}
_PAPER = tuple(MODELS)
_LONGEST_NAME = 120


def digits(value: float | None) -> str:
    """Three digits, without an exponent where that is readable."""
    if value is None:
        return "-"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else (f"{value:.2f}" if value >= 1 else f"{value:.3f}")


def percent(share: float | None) -> str:
    """0.876 -> "88 %"; one decimal below 10 %, where it is what matters."""
    if share is None:
        return "-"
    return f"{share * 100:.1f} %" if 0 < abs(share) < 0.1 else f"{share * 100:.0f} %"


def size(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def tick(parity: bool | None) -> str:
    return {True: "✓", False: "✗ no", None: "not judged"}[parity]


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def mode_name(mode: str) -> str:
    return MODES.get(mode, mode)


def cost_mode_name(mode: str) -> str:
    """What is traced of a mode, which in training is no whole step."""
    return _COST_MODES.get(mode, mode)


def pixels(latent_size: tuple[int, int]) -> str:
    """(32, 32) -> "256 px"; (32, 64) -> "256x512 px"."""
    height, width = (side * VAE_FACTOR for side in latent_size)
    return f"{height} px" if height == width else f"{height}x{width} px"


def model_name(row: ModelRow | MemoryRow | CostRow | HostRow | SampleRow) -> str:
    """The model's name, with what differs from the paper's default."""
    parts = [row.model]
    if tuple(row.latent_size) != (32, 32):
        parts.append(pixels(row.latent_size))
    if row.conditioning != "adaln_zero":
        parts.append(row.conditioning)
    return " ".join(parts)


def model_order(name: str) -> tuple[int, str]:
    """The paper's models in the paper's order, others after them by name."""
    return (_PAPER.index(name), "") if name in _PAPER else (len(_PAPER), name)


def case_name(row: ModelRow) -> str:
    return f"{model_name(row)}, batch {row.batch}, {row.dtype}, {mode_name(row.mode)}"


def op_case_name(row: OpRow) -> str:
    return f"{row.operator} {row.direction} at {row.size}, {row.dtype}"


def row_name(row: ModelRow | OpRow | ScalingRow) -> str:
    """The case and the provider of a row with a time."""
    if isinstance(row, ScalingRow):
        return f"{row.axis} {row.value:,}: {case_name(row.row)}, {row.row.provider}"
    case = op_case_name(row) if isinstance(row, OpRow) else case_name(row)
    return f"{case}, {row.provider}"


def listed(items: Sequence[str], limit: int = 6) -> str:
    """The items in a line; past the limit, how many more there are."""
    shown = "; ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}; and {len(items) - limit} more"


def median_of(samples: Sequence[int]) -> str:
    """Of how many samples the medians are: "Median of 20 samples", or a range."""
    if not samples:
        return "No samples"
    low, high = min(samples), max(samples)
    return f"Median of {low if low == high else f'{low} to {high}'} samples"


def count(number: int, noun: str) -> str:
    """The number with its noun: 1 row, 2 rows."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def slug(text: str) -> str:
    """A name for a file or an anchor: small letters, digits and hyphens, no longer than file systems take."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_LONGEST_NAME].strip("-") or "x"


HOST_CAPTION = (
    "Process time, torch on one thread: the least, which a busy machine adds to, median and half the quartiles' range.",
    "Nothing is computed: torch's CPU kernels (GEMMs, attention, all others) return at once, Triton launches on a GPU",
    "that is not there. forward: under no_grad. train: forward, loss and backward, without the optimiser, the same for",
    "all. official: the reference with timm's attention and MLP, as users have it; accelerated: that one, accelerated.",
    "launches: of a call on a GPU, as ditfast bench cost counts them, and those among them that Triton made here.",
)
HOST_DIFFERENCES = (
    "In neither: what the driver takes for each launch, the choice of a kernel within cuBLAS, cuDNN and SDPA.",
    "Not as on a GPU's host: memory comes from the CPU's allocator, a Linear's bias is one more kernel's call, the",
    "backward has no thread of its own, and ditfast's launches do not make their GPU the current one.",
)
HOST_PARTS_CAPTION = (
    "Medians; each level holds those below it: the public operator with its checks and autograd node, the launchers in",
    "kernels/, their launches. backward: by torch.autograd.grad, whose own start counts too.",
)


COST_CAPTION = (
    "Computed, not measured: counted on meta tensors, everyone eager, ditfast with its kernels. /s: images a second.",
    "ms: the sum over the launches of the longer of arithmetic and traffic at a GPU's datasheet rates (dense), as if",
    "no cache kept anything between two launches (at small batches one does), and launching took no time.",
)
