"""Made-up results of a made-up device, for the tests of reports. No figure here was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ditfast.bench.records.files import Ceilings, Results, Suite
from ditfast.bench.records.metrics import with_speedups
from ditfast.bench.records.rows import CostRow, MemoryRow, ModelRow, OpRow, ScalingRow, Spread, VerifyRow
from ditfast.bench.report.data import Report, Run, gather
from ditfast.config import MODELS, DiTConfig

GPU = {
    "ditfast": "0.0.test",
    "commit": "0123456789abcdef",
    "dirty": False,
    "python": "3.11.0",
    "packages": {"torch": "9.9.9", "triton": "8.8.8"},
    "os": "Test OS",
    "cpu": {"model": "Test CPU", "cores": 2, "torch_threads": 2},
    "gpu": {
        "name": "Test GPU",
        "driver": "111.22",
        "cuda": "99.9",
        "memory_bytes": 100 * 2**30,
        "power_limit_w": 500.0,
    },
}
CPU = {**GPU, "gpu": None}
CEILINGS = Ceilings(4000.0, 4, {"bf16": 800.0, "tf32": 400.0}, {"bf16": 8, "tf32": 8})
READINGS = [
    {"when": "before", "sm_clock_mhz": 1000.0, "power_draw_w": 100.0, "temperature_c": 30.0},
    {"when": "after", "sm_clock_mhz": 1500.0, "power_draw_w": 400.0, "temperature_c": 60.0},
]
# share of the matmul limit that each made-up provider reaches
PACE = {
    "reference-tf32": 0.25,
    "reference": 0.50,
    "reference-compile": 0.60,
    "reference-max-autotune": 0.62,
    "reference-reduce-overhead": 0.58,
    "diffusers": 0.40,
    "ditfast": 0.64,
    "ditfast-compile": 0.66,
    "ditfast-graph": 0.70,
}


# made-up FLOPs an element
OPERATORS = {
    "layer_norm_modulate": 8,
    "gated_residual": 2,
    "gated_residual_layer_norm_modulate": 10,
    "linear_gelu": 4608,
    "linear_gated_residual": 4600,
    "gelu_mlp": 9216,
    "self_attention": 1024,
}


def spread(ms: float, width: float = 0.02) -> Spread:
    return Spread(ms, ms * (1 - width), ms * (1 + width), 20, 1)


def model_row(
    provider: str = "ditfast",
    ms: float | None = 10.0,
    model: str = "DiT-XL/2",
    batch: int = 256,
    parity: bool | None = True,
    **changes: Any,
) -> ModelRow:
    """A row whose columns follow from its time; without one it is out of memory."""
    config = DiTConfig.named(model) if model in MODELS else MODELS["DiT-S/2"]
    blank = ModelRow(
        model, "adaln_zero", (32, 32), config.num_tokens, config.hidden_size, config.depth, batch, "bf16", "forward",
        provider, "tf32" if provider.endswith("tf32") else "bf16", "oom" if ms is None else "ok", noise=0.01,
    )  # fmt: skip
    if ms is not None:
        values: dict[str, Any] = {"ms": spread(ms), "images_per_s": batch / ms * 1e3, "parity": parity}
        blank = replace(blank, **values, error=1e-3, bound=2e-3, first_call_ms=5 * ms, peak_bytes=2**30)
    return replace(blank, **changes)


def model_case(
    model: str, batch: int, providers: Sequence[str] = tuple(PACE), **changes: Any
) -> list[ModelRow]:
    """Every provider on one model, with speed-ups and shares."""
    config = MODELS[model]
    flops = batch * config.depth * config.num_tokens * 24 * config.hidden_size**2
    rows = []
    for provider in providers:
        share = PACE[provider] * min(1.0, 0.3 + 0.1 * len(model) * batch / (batch + 30))
        ms = flops / (share * 800e9) + 0.05
        row = model_row(
            provider, ms, model, batch, tflops=flops / ms / 1e9, ceiling_share=share, ceiling="matmul"
        )
        rows.append(replace(row, **changes))
    return with_speedups(rows)


def results(suite: Suite, rows: Sequence[Any], environment: dict[str, Any] = GPU, **changes: Any) -> Results:
    """A complete run of made-up rows; changes are fields of Results."""
    gpu = environment.get("gpu") is not None
    complete = Results(
        suite,
        environment,
        {"device": "cuda" if gpu else "cpu"},
        CEILINGS,
        list(READINGS),
        1,
        list(rows),
        True,
    )
    return replace(complete, **changes)


def twelve_models(batch: int = 256) -> Results:
    """All twelve models and nine providers: some out of memory, failed, unavailable, and without a tick."""
    rows: list[ModelRow] = []
    for name in MODELS:
        for row in model_case(name, batch):
            if name == "DiT-XL/2" and row.provider in ("reference-tf32", "diffusers"):
                row = model_row(row.provider, None, name, batch, note="out of memory at 100 GiB")
            elif name == "DiT-B/2" and row.provider == "ditfast-graph":
                row = replace(row, parity=False, speedup=None, rival=None, note="parity failed: made up")
            elif name == "DiT-L/4" and row.is_ours:
                row = replace(row, parity=None, speedup=None, rival=None)
            elif name == "DiT-S/8" and row.provider == "reference-compile":
                row = model_row(row.provider, None, name, batch, status="error", note="RuntimeError: made up")
            elif row.provider == "reference-tf32" and name == "DiT-S/4":
                row = model_row(
                    row.provider, None, name, batch, status="unavailable", note="made up to be absent"
                )
            rows.append(row)
    return results("models", rows)


def op_rows() -> list[OpRow]:
    """Seven operators, forward and backward, at two shapes; eager, compile and ditfast."""
    return [
        row
        for operator, per_element in OPERATORS.items()
        for direction in ("forward", "backward")
        for batch in (8, 256)
        for row in op_case(operator, direction, batch, per_element)
    ]


def op_case(operator: str, direction: Any, batch: int, per_element: int) -> list[OpRow]:
    """Three providers of one operator; a low count of FLOPs an element makes it memory-bound."""
    elements, heavier = batch * 256 * 1152, 2 if direction == "backward" else 1
    flops, total_bytes = elements * per_element * heavier, elements * 4 * (heavier + 1)
    memory, rows = per_element < 100, []
    for provider, share in (("eager", 0.4), ("compile", 0.7), ("ditfast", 0.9)):
        ms = total_bytes / (share * 4000e6) if memory else flops / (share * 800e9)
        rate = total_bytes / ms / 1e6 if memory else flops / ms / 1e9
        case = (operator, direction, batch, 256, 1152, "bf16", provider, "ok", "graph", flops, total_bytes)
        row = OpRow(
            *case, unit="GB/s" if memory else "TFLOP/s", ms=spread(ms), rate=rate, share=share, parity=True
        )
        if provider == "ditfast" and (operator, direction) == ("self_attention", "backward"):
            row = replace(row, parity=False)
        elif provider == "ditfast":
            row = replace(row, speedup=0.9 / 0.7, rival="compile")
        rows.append(replace(row, noise=0.01))
    return rows


def scaling_rows() -> list[ScalingRow]:
    """Times of exact powers: tokens^1.5, batch^1, width^2; the eager reference runs out of memory at last."""
    rows = []
    for axis, values, exponent in (
        ("tokens", (64, 256, 1024, 4096, 16384), 1.5),
        ("batch", (1, 8, 64, 256), 1.0),
        ("width", (384, 768, 1152), 2.0),
    ):
        for value in values:
            for provider, slow in (("reference", 2.0), ("reference-compile", 1.5), ("ditfast", 1.0)):
                ms = slow * (value / values[0]) ** exponent
                batch = value if axis == "batch" else 8
                row = model_row(provider, ms, "DiT-S/2", batch)
                if axis == "tokens":
                    side = int(2 * value**0.5)
                    row = replace(row, tokens=value, latent_size=(side, side))
                if axis == "width":
                    row = replace(row, model=f"width-{value}", hidden_size=value)
                if value == 16384 and provider == "reference":
                    row = replace(row, status="oom", ms=None, images_per_s=None, parity=None, note="made up")
                if value == 4096 and provider == "ditfast":
                    row = replace(row, parity=False)
                rows.append(ScalingRow(axis, value, row))  # type: ignore[arg-type]
    return rows


def memory_rows() -> list[MemoryRow]:
    rows = []
    for index, name in enumerate(MODELS, 1):
        for provider, share in (("reference", 1.0), ("reference-compile", 0.8), ("ditfast", 0.5)):
            numbers = {
                "peak_bytes": int(index * 8 * share * 2**30),
                "saved_bytes": int(index * 4 * share * 2**30),
            }
            row = MemoryRow(
                name, "adaln_zero", (32, 32), 256, "bf16", "train", provider, "ok", device_bytes=100 * 2**30
            )
            row = replace(row, **numbers, max_batch=int(1024 / share))
            if provider == "reference" and index == 12:
                row = replace(row, status="oom", peak_bytes=None, saved_bytes=None, note="made up")
            rows.append(row)
    return rows


def cost_rows(batch: int = 256) -> list[CostRow]:
    rows = []
    for name, config in MODELS.items():
        flops = batch * config.depth * config.num_tokens * 24 * config.hidden_size**2
        for provider, intensity in (("reference", 150.0), ("ditfast", 260.0), ("diffusers", 120.0)):
            intensity *= config.hidden_size / 1152
            rows.append(
                CostRow(
                    name,
                    "adaln_zero",
                    (32, 32),
                    batch,
                    "bf16",
                    "forward",
                    provider,
                    207 if provider == "ditfast" else 585,
                    int(flops / intensity),
                    flops,
                    intensity,
                    {"Test GPU": 1.5},
                )  # fmt: skip
            )
    return rows


def verify_rows(ok: bool = True) -> list[VerifyRow]:
    right = VerifyRow("layer_norm_modulate", "triton", "bf16", "output0", 1e-3, 1e-3, 2e-3, True)
    return [right, replace(right, dtype="fp16", tensor="d_x", error=1e-3 if ok else 1.0, ok=ok)]


def traced_memory() -> Results:
    """Saved bytes of two providers, traced on the host of the made-up GPU."""
    case = ("DiT-XL/2", "adaln_zero", (32, 32), 256, "bf16", "train")
    rows = [
        MemoryRow(*case, provider, "ok", "traced on meta tensors", saved_bytes=saved * 2**30)
        for provider, saved in (("reference", 40), ("ditfast", 24))
    ]
    return results("memory", rows, ceilings=None, readings=[], settings={"device": "meta"})


def runs(*files: Results) -> list[Run]:
    return [Run(f"{index}.json", item) for index, item in enumerate(files)]


def report_of(*files: Results) -> Report:
    return gather(runs(*files))


def everything() -> list[Results]:
    """One run of every suite on the made-up GPU, one of the made-up CPU, broken off, and one that was traced."""
    cpu = [
        *model_case(
            "DiT-S/8", 8, ["reference", "reference-compile", "ditfast"], dtype="fp32", precision="fp32"
        )
    ]
    return [
        twelve_models(),
        results("ops", op_rows()),
        results("scaling", scaling_rows()),
        results("memory", memory_rows()),
        results("cost", cost_rows(), ceilings=None, readings=[]),
        results("verify", verify_rows()),
        results("models", cpu, CPU, complete=False, parts=2, readings=[]),
        traced_memory(),
    ]
