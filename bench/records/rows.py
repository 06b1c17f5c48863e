"""The rows of every suite, as they stand in a result file. What could not be measured is None; ``note`` says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...testing.units import Direction, Unit

Status = Literal["ok", "oom", "error", "unavailable"]
Axis = Literal["tokens", "batch", "width"]
OwnMode = Literal["forward", "train"]


def is_ours(provider: str) -> bool:
    """Whether a provider is ditfast; all others are rivals."""
    return provider == "ditfast" or provider.startswith("ditfast-")


class _Provided:
    """A row of a provider."""

    provider: str

    @property
    def is_ours(self) -> bool:
        return is_ours(self.provider)


@dataclass(frozen=True)
class ModelRow(_Provided):
    """One provider on one model, batch, dtype and mode (``ditfast bench models``).

    Attributes:
        model, conditioning, latent_size, tokens, hidden_size, depth: the model; tokens is T of one sample.
        batch: images; a guided step runs 2 * batch samples.
        dtype, mode: of the case; "train-checkpoint" is "train" with activation checkpointing of every block.
        provider: its name.
        precision: what it computes in: the case's dtype, or "tf32".
        isolated: whether it ran in a process of its own.
        status: "ok" (it ran), "oom", "error", or "unavailable" (it cannot run on this device).
        note: why there is no time or no parity tick, or under which conditions it ran; otherwise empty.
        ms: time of a call.
        first_call_ms: the first call, with compilation as far as PyTorch's disk caches lack it, and capture.
        images_per_s, tflops: by the median and the reference's FLOPs.
        weight_bytes: the least a call must read.
        ceiling_share: of the measured ceiling ``ceiling`` ("matmul" or "copy").
        peak_bytes: peak memory of the provider on its own.
        error: against fp64; in training of the gradient furthest up its bound. None where not finite.
        yardstick_error, bound: the reference's own error in the dtype, and the bound that follows from it.
        parity: the tick; None where it could not be judged.
        parity_samples: how many images of the batch were compared.
        noise: how far the reference timed twice lay apart in this case, as a share; at least twice the standard
            error of its medians.
        speedup, rival: over the fastest rival that ran; only beside a parity tick.
    """

    model: str
    conditioning: str
    latent_size: tuple[int, int]
    tokens: int
    hidden_size: int
    depth: int
    batch: int
    dtype: str
    mode: str
    provider: str
    precision: str
    status: Status
    isolated: bool = False
    note: str = ""
    ms: Spread | None = None
    first_call_ms: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None
    weight_bytes: int | None = None
    ceiling_share: float | None = None
    ceiling: str | None = None
    peak_bytes: int | None = None
    error: float | None = None
    yardstick_error: float | None = None
    bound: float | None = None
    parity: bool | None = None
    parity_samples: int | None = None
    noise: float | None = None
    speedup: float | None = None
    rival: str | None = None

    @property
    def series(self) -> tuple[object, ...]:
        """The case without its batch."""
        shape = (self.latent_size, self.hidden_size, self.depth)
        return (self.model, self.conditioning, *shape, self.dtype, self.mode)

    @property
    def case(self) -> tuple[object, ...]:
        """What the rows that are timed side by side have in common."""
        return (*self.series, self.batch)

    @property
    def key(self) -> tuple[object, ...]:
        """What must agree for two rows to measure the same thing."""
        return (*self.case, self.provider)


@dataclass(frozen=True)
class OpRow(_Provided):
    """One provider of one operator (``ditfast bench ops``).

    Attributes:
        operator, direction, batch, tokens, width, dtype: the case; backward computes every gradient.
        num_heads: of attention; None for others.
        provider: "eager", "compile", "max-autotune" (torch.compile's), "ditfast"; of attention an implementation by
            its name; or the yardstick "gemm": the library's GEMM without the epilogue, neither judged nor a rival.
        timed: "graph" (replays of a CUDA graph, without launch overhead) or "calls".
        flops, bytes: the work that must be done: FLOPs, and each input read once and each output written once.
        rate, unit: GB/s where the operator is bound by memory, else TFLOP/s.
        share: of the ceiling measured in the same run.
        status, note, ms, parity, noise, speedup, rival: as in :class:`ModelRow`.
    """

    operator: str
    direction: Direction
    batch: int
    tokens: int
    width: int
    dtype: str
    provider: str
    status: Status
    timed: Literal["graph", "calls"]
    flops: int
    bytes: int
    unit: Unit
    note: str = ""
    ms: Spread | None = None
    rate: float | None = None
    share: float | None = None
    parity: bool | None = None
    noise: float | None = None
    speedup: float | None = None
    rival: str | None = None
    num_heads: int | None = None

    @property
    def case(self) -> tuple[object, ...]:
        return (self.operator, self.direction, self.batch, self.tokens, self.width, self.dtype, self.num_heads)

    @property
    def size(self) -> str:
        """B x T x D, of attention B x T x H x head_dim."""
        tail = [self.num_heads, self.width // self.num_heads] if self.num_heads else [self.width]
        return " x ".join(map(str, [self.batch, self.tokens, *tail]))

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.case, self.provider)


@dataclass(frozen=True)
class OwnRow(_Provided):
    """One way to run a user's own model (``ditfast bench --provider-module``).

    Attributes:
        provider: "before", "before-compile" (torch.compile), or "ditfast": accelerated.
        mode: "forward", or "train": forward and backward, without an optimiser.
        status, note, ms, parity, noise, speedup, rival: as in :class:`ModelRow`.
    """

    provider: str
    mode: OwnMode
    status: Status
    note: str = ""
    ms: Spread | None = None
    parity: bool | None = None
    noise: float | None = None
    speedup: float | None = None
    rival: str | None = None


@dataclass(frozen=True)
class SampleRow(_Provided):
    """One provider's whole sampling trajectories, guided, latents only (``ditfast bench sample``).

    Attributes:
        model, conditioning, latent_size: the model.
        batch: images; a step evaluates 2 * batch samples.
        sampler, steps: the solver and its steps.
        cfg_scale: of the guidance, on the first three channels.
        provider: a plain loop ("reference", "reference-compile", "diffusers"), or ditfast's engine: "ditfast" with
            schedule table and CUDA graphs, or with less.
        ms: of a trajectory, from noise on the device to latents.
        error, bound, parity, parity_samples: of final latents and all predictions, by the reference's loop in fp64.
        status, note, dtype, images_per_s, noise, speedup, rival: as in :class:`ModelRow`.
    """

    model: str
    conditioning: str
    latent_size: tuple[int, int]
    batch: int
    dtype: str
    sampler: str
    steps: int
    cfg_scale: float
    provider: str
    status: Status
    note: str = ""
    ms: Spread | None = None
    images_per_s: float | None = None
    error: float | None = None
    bound: float | None = None
    parity: bool | None = None
    parity_samples: int | None = None
    noise: float | None = None
    speedup: float | None = None
    rival: str | None = None

    @property
    def case(self) -> tuple[object, ...]:
        how = (self.sampler, self.steps, self.cfg_scale)
        return (self.model, self.conditioning, self.latent_size, self.batch, self.dtype, *how)

    @property
    def key(self) -> tuple[object, ...]:
        return (*self.case, self.provider)


@dataclass(frozen=True)
class ScalingRow:
    """A model row as a point of a curve (``ditfast bench scaling``): ``value`` tokens, images or width."""

    axis: Axis
    value: int
    row: ModelRow

    @property
    def key(self) -> tuple[object, ...]:
        return (self.axis, *self.row.key)


@dataclass(frozen=True)
class _CaseRow(_Provided):
    """What names a row of the suites that do not time: fields as in :class:`ModelRow`."""

    model: str
    conditioning: str
    latent_size: tuple[int, int]
    batch: int
    dtype: str
    mode: str
    provider: str

    @property
    def key(self) -> tuple[object, ...]:
        names = (self.model, self.conditioning, self.latent_size, self.batch, self.dtype, self.mode)
        return (*names, self.provider)


@dataclass(frozen=True)
class MemoryRow(_CaseRow):
    """What one provider needs (``ditfast bench memory``).

    Attributes:
        peak_bytes: peak memory of the provider on its own, weights included.
        saved_bytes: in training, what the forward keeps for the backward: unique storages, parameters left out.
        max_batch: the largest batch that fits the device, to the next sixteenth; None where it was not searched.
        device_bytes: the device's memory.
    """

    status: Status
    note: str = ""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    max_batch: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True)
class CostRow(_CaseRow):
    """What one call launches, moves and computes, traced on meta tensors (``ditfast bench cost``).

    Its mode "train" is the forward and the backward without the optimiser, which is the same for everyone.

    Attributes:
        launches, bytes, flops: of one call.
        intensity: FLOPs a byte.
        roofline_ms: GPU -> a computed lower bound: over the launches, the sum of the longer of arithmetic and
            traffic at the datasheet's rates.
    """

    launches: int
    bytes: int
    flops: int
    intensity: float
    roofline_ms: dict[str, float]


@dataclass(frozen=True)
class HostPart:
    """One operator of ditfast as a model calls it; each level is timed with those below it in it, process time in ms.

    Attributes:
        operator, direction: backward is the public operator's by torch.autograd.grad.
        uses: calls in one call of the model.
        launches: of Triton's kernels in one call of the operator.
        public: the operator with its checks and autograd node.
        launcher: the plans of kernels/ that it calls; None where it calls none.
        launch: the launches that these make.
    """

    operator: str
    direction: Direction
    uses: int
    launches: int
    public: Spread
    launcher: Spread | None
    launch: Spread | None


@dataclass(frozen=True)
class HostRow(_CaseRow):
    """What a host spends on one eager call of a model before and between its launches (``ditfast bench host``).

    Its mode "train" is the forward, the loss and the backward, without the optimiser.

    Attributes:
        arch: of the GPU that is not there.
        process_ms: process time of a call in one thread.
        least_ms: of all samples: what else runs on the machine's cores only adds to it.
        launches: of a call on a GPU, as ``ditfast bench cost`` counts them; None where it does not.
        triton_launches: those among them that Triton made of a GPU that is not there.
        replaced: calls of torch's kernels that returned at once.
        parts: of ditfast's row.
    """

    arch: str
    process_ms: Spread
    least_ms: float
    launches: int | None
    triton_launches: int
    replaced: int
    parts: list[HostPart] = field(default_factory=list)


@dataclass(frozen=True)
class VerifyRow:
    """The worst tensor of one operator or model in one dtype (``ditfast verify``).

    Attributes:
        subject, backend, dtype: what was judged.
        tensor: the worst; "" where none was judged.
        error, yardstick, bound: of that tensor; None where not finite, or where none was judged.
        ok: whether it passed.
        note: why nothing was judged: an exception, a process that died or hung; else "".
    """

    subject: str
    backend: str
    dtype: str
    tensor: str
    error: float | None
    yardstick: float | None
    bound: float | None
    ok: bool
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        return (self.subject, self.backend, self.dtype)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a call's time in ms, and how many samples of how many calls they stem from."""

    median: float
    p25: float
    p75: float
    samples: int
    calls_per_sample: int

    def __post_init__(self) -> None:
        if not 0 < self.p25 <= self.median <= self.p75:
            raise ValueError(f"times must be above 0 and in order, got {self.p25}, {self.median}, {self.p75} ms")
        if self.samples < 1 or self.calls_per_sample < 1:
            raise ValueError(f"samples and calls must be at least 1, got {self.samples} of {self.calls_per_sample}")
