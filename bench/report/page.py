"""``report.html``: one page that holds everything and loads nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ..records.text import count, slug
from .compared import comparison_table
from .conditions import conditions
from .data import Machine, Report
from .figure import Plot
from .roofline import NO_COST, lacks_costs
from .style import CSS, DEFINITIONS
from .tables import (
    Cell,
    Table,
    cost_tables,
    host_tables,
    memory_tables,
    model_tables,
    op_tables,
    sample_tables,
    scaling_tables,
    verify_tables,
)

# a longer table opens at a touch
_OPEN_ROWS = 30
# a longer text in a cell is wrapped
_LONG = 48
_DEVICE_INCH = 96


def page(report: Report, plots: Sequence[Plot]) -> str:
    """The page; the plots are embedded, each with its alternative text."""
    anchors, body = [], []
    for number, machine in enumerate(report.machines, 1):
        anchor = f"machine-{number}"
        anchors.append((anchor, machine.label))
        body.append(_machine(anchor, machine, _plots_of(machine, plots), report))
    for number, machine in enumerate(report.computed, 1):
        anchor = "computed" if number == 1 else f"computed-{number}"
        anchors.append((anchor, machine.label))
        body.append(_computed(anchor, machine, _plots_of(machine, plots)))
    if report.compared:
        anchors.append(("comparison", "Comparison"))
        tables = [_table(comparison_table(pair), closed=False) for pair in report.compared]
        body.append(_wrap("comparison", "Against older runs", tables))
    anchors.append(("definitions", "Definitions"))
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS)
    body.append(_wrap("definitions", "What the columns mean", [f"<dl>{entries}</dl>"]))
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in anchors)
    devices = ", ".join(machine.label for machine in report.machines) or "no device"
    files = ", ".join(run.name for run in report.runs)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # an empty icon: browsers would ask the server for one
        f'<link rel="icon" href="data:,">\n<title>ditfast bench: {escape(devices)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<header>\n<h1>ditfast bench: {escape(devices)}</h1>\n"
        f'<p class="note">Made from {escape(files)}.</p>\n<nav aria-label="Sections">{links}</nav>\n</header>\n'
        f"<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _machine(anchor: str, machine: Machine, plots: Sequence[Plot], report: Report) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in conditions(machine))
    parts = [f"<h3>Conditions</h3>\n<dl>{facts}</dl>"]
    parts += _remarks(machine)
    parts += [f'<p class="note">{escape(note)}</p>' for note in _unmeasured(machine)]
    groups = (
        ("models", "Models", model_tables(machine)),
        ("ops", "Operators", op_tables(machine)),
        ("sample", "Sampling", sample_tables(machine)),
        ("scaling", "Scaling", scaling_tables(machine)),
        ("memory", "Memory", memory_tables(machine)),
        ("host", "The host", host_tables(machine)),
        ("verify", "Numerics", verify_tables(machine)),
    )
    for group, title, tables in groups:
        figures = [_figure(plot) for plot in plots if plot.group == group]
        if figures or tables:
            parts.append(f'<h3 id="{anchor}-{group}">{title}</h3>')
            parts += figures
            if group == "models" and lacks_costs(machine, report.computed):
                parts.append(f'<p class="note">{escape(NO_COST)}</p>')
            parts += [_table(table) for table in tables]
    return _wrap(anchor, machine.label, parts)


def _unmeasured(machine: Machine) -> list[str]:
    """Sentences on what no table has: nothing measured at all, and providers left out by default, with reasons."""
    settings = [run.results.settings.get("providers_left_out") for run in machine.of("models")]
    reasons = {name: why for left_out in settings if isinstance(left_out, dict) for name, why in left_out.items()}
    shown = {row.provider for row in machine.rows("models")}
    nothing = [] if any(run.results.rows for run in machine.runs) else ["Nothing was measured."]
    return nothing + [f"Not measured: {name}: {why}." for name, why in reasons.items() if name not in shown]


def _computed(anchor: str, machine: Machine, plots: Sequence[Plot]) -> str:
    parts = [
        f'<p class="note">{escape(machine.short_conditions)}.</p>',
        *_remarks(machine),
        *map(_figure, plots),
    ]
    parts += [_table(table) for table in [*cost_tables(machine), *memory_tables(machine)]]
    return _wrap(anchor, machine.label, parts)


def _plots_of(machine: Machine, plots: Sequence[Plot]) -> list[Plot]:
    return [plot for plot in plots if plot.machine == machine.label]


def _remarks(machine: Machine) -> list[str]:
    return [f'<p class="bad">{escape(remark)}</p>' for remark in machine.remarks]


def _wrap(anchor: str, title: str, parts: Sequence[str]) -> str:
    inner = "\n".join(parts)
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{inner}\n</section>\n'


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode("ascii")
    width = round(plot.width * _DEVICE_INCH)
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(plot.alt)}" width="{width}">'
    return (
        f'<figure id="{slug(plot.name)}"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(plot.title)}">{image}</div>\n<figcaption>{escape(plot.caption)}</figcaption></figure>'
    )


def _table(table: Table, closed: bool | None = None) -> str:
    """A table in a scrolling container; a long one is folded."""
    head = "".join(
        f"<th{_class(['number'] if numeric else [])}>{escape(name)}</th>" for name, numeric in table.columns
    )
    rows = "".join(f"<tr>{_row(row, table)}</tr>\n" for row in table.rows)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    opened = "" if (len(table.rows) > _OPEN_ROWS if closed is None else closed) else " open"
    title = f"{escape(table.title)} ({count(len(table.rows), 'row')})"
    # which a folded table would hide
    bad = sum(any(cell.tone == "bad" for cell in row) for row in table.rows)
    title += f' <span class="bad">bad news in {count(bad, "row")}</span>' if bad else ""
    return (
        f'<details{opened}><summary>{title}</summary>\n<div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(table.title)}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n'
        f"</table></div>{notes}</details>"
    )


def _row(row: Sequence[Cell], table: Table) -> str:
    cells = []
    for cell, (_, numeric) in zip(row, table.columns, strict=True):
        names = [name for name, applies in ((cell.tone, cell.tone), ("number", numeric)) if applies]
        names += ["long"] if len(cell.text) > _LONG else []
        cells.append(f"<td{_class(names)}>{escape(cell.text)}</td>")
    return "".join(cells)


def _class(names: Sequence[str]) -> str:
    return f' class="{" ".join(names)}"' if names else ""
