"""The conditions of a result, in words; values that an environment lacks are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from ..records.files import Ceilings
from ..records.machine import is_gpu, one_line, part
from ..records.text import digits

if TYPE_CHECKING:
    from .data import Machine

_PACKAGES = ("torch", "triton", "diffusers", "flash-attn")
_READINGS = (
    ("sm_clock_mhz", "SM {} MHz"),
    ("memory_clock_mhz", "memory {} MHz"),
    ("power_draw_w", "{} W"),
    ("temperature_c", "{} °C"),
)


def version(environment: dict[str, Any]) -> str:
    """Version, commit and changes since: ditfast 0.1 (1a2b3c4d5 with uncommitted changes, source 0f1e2d3c)."""
    commit, dirty, source = (environment.get(name) for name in ("commit", "dirty", "source"))
    changed = "with uncommitted changes" if dirty else ""
    details = [" ".join(filter(None, [one_line(commit)[:9] if commit else "", changed]))]
    if source and (dirty or not commit):
        # the commit alone does not tell the code
        details.append(f"source {one_line(source)[:8]}")
    inner = ", ".join(filter(None, details))
    return f"ditfast {one_line(environment.get('ditfast') or 'of an unknown version')}" + (
        f" ({inner})" if inner else ""
    )


def short_conditions(machine: Machine) -> str:
    """Device and versions in a line, as printed under every plot."""
    packages = part(machine.environment, "packages")
    facts = [machine.label, *(f"{name} {value}" for name, value in _drivers(machine))]
    facts += [
        f"{name} {one_line(packages[name])}" for name in ("torch", "triton", "diffusers") if packages.get(name)
    ]
    return ", ".join([*facts, version(machine.environment)])


def conditions(machine: Machine) -> list[tuple[str, str]]:
    """(name, value) of every condition that is known."""
    environment = machine.environment
    gpu, cpu, packages = (part(environment, name) for name in ("gpu", "cpu", "packages"))
    pairs = [("device", machine.label), *_drivers(machine)]
    if is_gpu(machine.runs[0].results):
        memory, power = gpu.get("memory_bytes"), gpu.get("power_limit_w")
        if _is_number(memory):
            pairs.append(("memory", f"{memory / 2**30:.0f} GiB"))
        if _is_number(power):
            pairs.append(("power limit", f"{power:g} W"))
        if cpu.get("model"):
            pairs.append(("host", f"{cpu['model']}, {cpu.get('torch_threads')} threads"))
    pairs += [(name, str(packages[name])) for name in _PACKAGES if packages.get(name)]
    pairs.append(("ditfast", version(environment).removeprefix("ditfast ")))
    pairs += [
        (name, str(environment[key]))
        for key, name in (("python", "Python"), ("os", "system"))
        if environment.get(key)
    ]
    if (limits := limits_text(machine.ceilings)) is not None:
        pairs.append(("limits, measured in the same runs", limits))
    for run in machine.runs:
        before, after = (_reading(run.results.readings, when) for when in ("before", "after"))
        if before or after:
            pairs.append(
                (f"clocks, {run.name}", f"before: {before or 'not read'}; after: {after or 'not read'}")
            )
    return pairs


def limits_text(ceilings: Ceilings | None) -> str | None:
    if ceilings is None:
        return None
    matmul = "".join(
        f"; matmul {name} {digits(rate)} TFLOP/s" for name, rate in ceilings.matmul_tflops.items()
    )
    return f"copy {digits(ceilings.copy_gb_per_s)} GB/s{matmul}"


def _drivers(machine: Machine) -> list[tuple[str, str]]:
    if not is_gpu(machine.runs[0].results):
        return []
    gpu = part(machine.environment, "gpu")
    return [(name, one_line(gpu[key])) for key, name in (("driver", "driver"), ("cuda", "CUDA")) if gpu.get(key)]


def _reading(readings: Sequence[dict[str, Any]], when: str) -> str:
    """The first reading before, or the last one after; empty if there is none."""
    matching = [reading for reading in readings if reading.get("when") == when]
    if not matching:
        return ""
    chosen = matching[0 if when == "before" else -1]
    values = [(text, chosen.get(key)) for key, text in _READINGS]
    return ", ".join(text.format(f"{value:,.0f}") for text, value in values if _is_number(value))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
