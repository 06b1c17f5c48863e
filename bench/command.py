"""``ditfast bench``: the suites. What is heavy is imported when it runs."""

from __future__ import annotations

import typer

from .campaign.command import campaign
from .commands.cost import cost
from .commands.host import host
from .commands.memory import memory
from .commands.models import bench
from .commands.ops import ops
from .commands.sample import sample
from .commands.scaling import scaling
from .report.command import readme, report

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
