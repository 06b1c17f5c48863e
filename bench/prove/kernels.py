"""``ditfast kernels``: compiles every kernel for real GPUs on any machine, and compares it with its budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from ditfast.kernels.aot.compile import KernelCase, Report

SCHEMA = "ditfast.kernels/1"
# of a report's instructions: how memory is reached, which units do the arithmetic, and how often GELU is taken
_TELLING = ("LDG", "STG", "LDL", "STL", "HGMMA", "HMMA", "UTMA", "LDGSTS", "MUFU.TANH")


def compile_all(
    architectures: Sequence[str],
    cases: Iterable[KernelCase] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Report]:
    """Compiles every case for every architecture.

    Args:
        architectures: of ``ditfast.kernels.aot.compile.ARCHITECTURES``.
        cases: all of ditfast's by default.
        report: called with a line for each compilation.

    Raises:
        ValueError: unknown architecture, triton is not installed, or TRITON_INTERPRET is set.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("kernels are compiled without Triton's interpreter: unset TRITON_INTERPRET")
    try:
        from ditfast.kernels.aot import compile as aot
        from ditfast.kernels.aot.cases import cases as all_cases
    except ImportError as error:
        raise ValueError(f"compiling kernels needs the package triton: {error}") from None
    reports = []
    for case in all_cases() if cases is None else cases:
        for arch in architectures:
            if case.arch not in (None, arch):
                continue
            reports.append(aot.compile_case(case, arch))
            report(f"{case.name}, {case.shape}, {case.dtype}, {arch}")
    return reports


def to_json(reports: Sequence[Report]) -> dict[str, Any]:
    """The whole report as JSON-ready values, instructions and budgets included."""
    import triton

    from ditfast.kernels.aot.compile import violations

    rows = [
        {
            "kernel": item.case.name,
            "shape": item.case.shape,
            "dtype": item.case.dtype,
            "arch": item.arch,
            "num_warps": item.case.num_warps,
            "registers": item.registers,
            "spill_bytes": item.spill_bytes,
            "shared": item.shared,
            "resident_warps": item.resident_warps,
            "wide": round(item.wide, 4),
            "instructions": telling(item),
            "budget": asdict(item.case.budget),
            "violations": violations(item),
        }
        for item in reports
    ]
    return {"schema": SCHEMA, "triton": triton.__version__, "kernels": rows}


def telling(report: Report) -> dict[str, int]:
    """The instructions that matter, by name."""
    chosen = {name: count for name, count in report.instructions.items() if name.startswith(_TELLING)}
    return dict(sorted(chosen.items()))


def render(data: dict[str, Any]) -> Table:
    """The table of :func:`to_json`'s data."""
    table = Table(
        title=f"Kernels compiled by triton {data['triton']}: used / budget",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in ("kernel", "shape", "dtype", "arch"):
        table.add_column(header, no_wrap=True)
    for header in ("warps", "registers", "spills", "shared", "resident", "128-bit"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("instructions", overflow="fold")
    table.add_column("")
    for row in data["kernels"]:
        budget = row["budget"]
        table.add_row(
            *(row[key] for key in ("kernel", "shape", "dtype", "arch")),
            str(row["num_warps"]),
            f"{row['registers']}/{budget['registers']}",
            f"{row['spill_bytes']}/0",
            f"{row['shared']}/{budget['shared']}",
            f"{row['resident_warps']}/{budget['resident_warps']}",
            f"{row['wide']:.0%}/{budget['wide']:.0%}",
            " ".join(f"{name}:{count}" for name, count in row["instructions"].items()),
            "[green]✓[/]" if not row["violations"] else f"[red]{'; '.join(row['violations'])}[/]",
        )
    return table


def kernel_functions() -> dict[str, Any]:
    """Every kernel by its name; empty where triton is not installed."""
    from ditfast import kernels

    try:
        modules = [import_module(f"{kernels.__name__}.{info.name}") for info in iter_modules(kernels.__path__)]
    except ImportError:
        return {}
    members = {name: value for module in modules for name, value in vars(module).items()}
    return {name: value for name, value in members.items() if name.startswith("_") and name.endswith("_kernel")}
