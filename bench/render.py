"""The tables of ``ditfast bench`` for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .metrics import is_tie
from .records import Results, Row

_MAX_WIDTH = 400

_STATUS = {"oom": "out of memory", "error": "failed", "unavailable": "unavailable"}


def results_table(results: Results, ascii_only: bool | None = None) -> RenderableType:
    """The rows that ran or failed, and below them the limits, the noise, and who is missing and why."""
    if ascii_only is None:
        ascii_only = Console().options.ascii_only
    settings = results.settings
    title = f"ditfast bench: {settings['mode']}, {settings['dtype']}, {_device(results)}"
    table = _table()
    for header in ("model", "batch", "provider"):
        table.add_column(header, justify="right" if header == "batch" else "left", no_wrap=True)
    headers = ("images/s", "ms", "TFLOP/s", "of limit", "memory", "error", "parity", "speed-up")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    shown = [row for row in results.rows if row.status != "unavailable"]
    for index, row in enumerate(shown):
        last = index + 1 == len(shown) or _case(shown[index + 1]) != _case(row)
        first = index == 0 or _case(shown[index - 1]) != _case(row)
        names = (_model(row), str(row.batch)) if first else ("", "")
        table.add_row(*names, escape(row.provider), *_cells(row, ascii_only), end_section=last)
    return _section(title, table, _notes(results))


def comparison_table(comparison: Comparison, old_name: str) -> RenderableType:
    """The changes against an older run."""
    table = _table()
    for header in ("model", "batch", "provider"):
        table.add_column(header, no_wrap=True)
    for header in ("then, ms", "now, ms", "change", ""):
        table.add_column(header, justify="right", no_wrap=True)
    styles = {"faster": "green", "slower": "red", "tie": "dim"}
    for change in comparison.changes:
        verdict = f"[{styles[change.verdict]}]{change.verdict}[/]"
        numbers = (_digits(change.old_ms), _digits(change.new_ms), f"{change.speedup:.2f}x")
        table.add_row(_model(change.row), str(change.row.batch), escape(change.row.provider), *numbers, verdict)
    lines = ["A change within the noise of either run, or with overlapping quartiles, is a tie."]
    if comparison.only_old or comparison.only_new:
        lines.append(f"Not compared: {comparison.only_old} rows only then, {comparison.only_new} rows only now.")
    lines += [f"Conditions differ: {condition}." for condition in comparison.conditions]
    return _section(f"against {old_name}", table, lines)


def print_tables(*tables: RenderableType) -> None:
    """Prints on stdout at the tables' own width where the terminal, or the pipe, is narrower."""
    console = Console()
    wide = console.options.update(max_width=_MAX_WIDTH)
    parts = [part for table in tables for part in (table.renderables if isinstance(table, Group) else [table])]
    widths = [Measurement.get(console, wide, part).maximum for part in parts if isinstance(part, Table)]
    Console(width=max([console.width, *widths])).print(*tables, crop=False)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _section(title: str, table: Table, lines: Sequence[str]) -> Group:
    """Lines are left to the terminal to wrap: a path or a message stays in one piece."""

    def text(line: str, style: str = "") -> Text:
        return Text(line, style, no_wrap=True, overflow="ignore")

    return Group(text(title, "bold"), table, *map(text, lines))


def _cells(row: Row, ascii_only: bool) -> Sequence[str]:
    """The cells after the provider."""
    if row.ms is None:
        return (f"[red]{_STATUS[row.status]}[/]", *("",) * 7)
    spread = (row.ms.p75 - row.ms.p25) / 2
    share = "-" if row.ceiling_share is None else f"{row.ceiling_share:.0%}"
    return (
        _digits(row.images_per_s),
        f"{_digits(row.ms.median)} {'+-' if ascii_only else '±'} {_digits(spread)}",
        _digits(row.tflops),
        f"{share} mem" if row.ceiling == "copy" else share,
        "-" if row.peak_bytes is None else _bytes(row.peak_bytes),
        "-" if row.error is None else f"{row.error:.1e}",
        _tick(row, ascii_only),
        _speedup(row),
    )


def _tick(row: Row, ascii_only: bool) -> str:
    if row.parity is None:
        return "-"
    if row.parity:
        return f"[green]{'yes' if ascii_only else '✓'}[/]"
    return f"[red]{'NO' if ascii_only else '✗'}[/]"


def _speedup(row: Row) -> str:
    if row.speedup is None:
        return ""
    if is_tie(row.speedup, row.noise or 0.0):
        return f"[dim]{row.speedup:.2f}x, tie[/]"
    return f"[bold]{row.speedup:.2f}x[/]"


def _notes(results: Results) -> list[str]:
    lines = []
    if results.ceilings is not None:
        matmul = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in results.ceilings.matmul_tflops.items())
        copy = f"{results.ceilings.copy_gb_per_s:.3g} GB/s"
        lines.append(f"Limits measured in this run: matmul {matmul}; copy {copy} (mem).")
    lines.append("ms: median and half the interquartile range. parity: error against fp64 within the bound.")
    lines.append("speed-up: over the fastest rival of the same model and batch in this run; only with parity.")
    noises = [row.noise for row in results.rows if row.noise is not None]
    if noises:
        lines.append(f"Noise: the reference timed twice differed by up to {max(noises):.1%}; less than that is a tie.")
    for row in results.rows:
        if row.note and row.status != "unavailable":
            lines.append(f"{_model(row)} batch {row.batch}, {row.provider}: {row.note}")
    absent = {row.provider: row.note for row in results.rows if row.status == "unavailable"}
    in_part = {row.provider for row in results.rows if row.status != "unavailable"} & absent.keys()
    for name, reason in {**results.settings.get("providers_left_out", {}), **absent}.items():
        missing = [f"{_model(row)} batch {row.batch}" for row in results.rows if _is_absent(row, name)]
        where = f" ({', '.join(missing)})" if name in in_part else ""
        lines.append(f"Not measured: {name}{where}: {reason}")
    lines += _largest_batches(results)
    if not results.complete:
        lines.append("Interrupted: these are the rows so far.")
    return lines


def _largest_batches(results: Results) -> list[str]:
    """Where a batch did not fit: the largest one that did."""
    lines = []
    short = dict.fromkeys((_model(row), row.provider) for row in results.rows if row.status == "oom")
    for model, provider in short:
        ran = [row.batch for row in results.rows if row.ms and (_model(row), row.provider) == (model, provider)]
        largest = f"the largest batch that fits is {max(ran)}" if ran else "no batch fits"
        lines.append(f"{model}, {provider}: {largest}")
    return lines


def _is_absent(row: Row, provider: str) -> bool:
    return row.provider == provider and row.status == "unavailable"


def _case(row: Row) -> tuple[object, ...]:
    return row.key[:-1]


def _model(row: Row) -> str:
    """The model's name, with what differs from the paper's default."""
    parts = [row.model]
    if row.latent_size != (32, 32):
        parts.append("x".join(str(side * 8) for side in row.latent_size))
    if row.conditioning != "adaln_zero":
        parts.append(row.conditioning)
    return " ".join(parts)


def _device(results: Results) -> str:
    environment, device = results.environment, str(results.settings["device"])
    if device.startswith("cuda"):
        return str((environment.get("gpu") or {}).get("name", device))
    cpu = environment.get("cpu") or {}
    return f"{cpu.get('model') or 'CPU'}, {cpu.get('torch_threads')} threads"


def _digits(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else (f"{value:.2f}" if value >= 1 else f"{value:.3f}")


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
