"""``ditfast bench``: the suites. What is heavy is imported when it runs."""

from __future__ import annotations

import typer

from .campaign.command import campaign
from .report.command import readme, report
from .suites.cost_command import cost
from .suites.host_command import host
from .suites.memory_command import memory
from .suites.models import bench
from .suites.ops_command import ops
from .suites.sample_command import sample
from .suites.scaling import scaling

app = typer.Typer(help="Measure DiT models and operators: fair to rivals, each row with a parity tick.")

app.callback(invoke_without_command=True)(bench)
app.command("models")(bench)
app.command("ops")(ops)
app.command("sample")(sample)
app.command("memory")(memory)
app.command("scaling")(scaling)
app.command("cost")(cost)
app.command("host")(host)
app.command("campaign")(campaign)
app.command("report")(report)
app.command("readme")(readme)
