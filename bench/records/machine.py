"""The machine on which a result was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import Results

COMPUTED = "Computed without a device"


def part(environment: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within an environment; empty where it is absent or something else."""
    value = environment.get(name)
    return value if isinstance(value, dict) else {}


def is_traced(results: Results) -> bool:
    """Whether the results were traced on meta tensors, so that nothing ran."""
    return results.suite == "cost" or results.settings.get("device") == "meta"


def is_gpu(results: Results) -> bool:
    on_cpu = str(results.settings.get("device", "")).startswith("cpu")
    return bool(part(results.environment, "gpu").get("name")) and not on_cpu and not is_traced(results)


def device_label(results: Results) -> str:
    """The GPU's name, or the processor and the threads in use; for what was traced, that."""
    if is_traced(results):
        return COMPUTED
    if is_gpu(results):
        return one_line(part(results.environment, "gpu")["name"])
    cpu = part(results.environment, "cpu")
    return one_line(
        f"{cpu.get('model') or 'unnamed CPU'}, {cpu.get('torch_threads') or 'an unknown number of'} threads"
    )


def one_line(value: object) -> str:
    """A value from a file as text without line breaks."""
    return " ".join(str(value).split())
