"""A campaign runs the steps of a plan in order of value within a wall-clock budget, each in its own process.

Its folder holds a result file for each step, the logs, the state of the steps (campaign.state), the compilers' caches,
and archives of all these, renewed after every step. Suites save after every row and continue where they stopped. A
campaign may therefore be interrupted or killed, and run again here, or from its archive elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...environment import collect
from ...files import write_json
from ..measure.processes import end_with_parent
from ..records.files import Results
from ..records.parsing import parse
from ..suites.suite import differences, renewing

SCHEMA = "ditfast.bench.campaign/2"
State = Literal["done", "older", "cut", "failed", "skipped"]
STATE_FILE = "campaign.state"  # not .json: DIR/*.json are results

_GRACE_SECONDS = 20.0  # for a step to save and print once its time is up
_MIN_SECONDS = 15.0  # importing torch and measuring the limits takes as long
_PLANNED_SECONDS = 480.0  # the steps' limits assume this budget; a longer one stretches them
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its files, and its key in the state.
        command: the interpreter's arguments; "{json}" stands for the result file, "{seconds}" for its own budget.
        title: its purpose, for people.
        limit: seconds that it may take in the first pass.
        beside: whether it may run at the same time as adjacent steps with ``beside``; nothing in them is timed.
        suite: whether its result file records that it is complete. An exit code does not: a missed parity and a crash
            are both 1.
        left_over: a pattern; if the last line of output matches, the step has more to do. "": none.
        serves: the steps that need this one; once all are done it is not run. Empty: it is run for its own sake.
        fine: exit codes besides 0 of a step that is done (a missed parity is a result).
        skip: why the step cannot run here, or "".
    """

    name: str
    command: tuple[str, ...]
    title: str = ""
    limit: float = _PLANNED_SECONDS
    beside: bool = False
    suite: bool = False
    left_over: str = ""
    serves: tuple[str, ...] = ()
    fine: tuple[int, ...] = (1,)
    skip: str = ""


@dataclass
class Done:
    """The outcome of a step's last attempt; ``seconds`` of all attempts. "older": done under other sources."""

    state: State
    seconds: float
    exit_code: int | None
    note: str = ""


@dataclass
class _Running:
    """A step's process; ``asked_at``: when it was asked to end, its time being up."""

    step: Step
    process: subprocess.Popen[bytes]
    start: float
    limit: float
    before: tuple[int, int] | None  # of the result file, when it began
    asked_at: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def end_where_overdue(self, grace: float) -> None:
        """Once its time is up asks it to save and end, and after ``grace`` seconds more kills it; does not wait."""
        if self.asked_at is None and self.seconds > self.limit:
            self.asked_at = time.monotonic()
            _ask_to_end(self.process)
        elif self.asked_at is not None and time.monotonic() - self.asked_at > grace:
            _kill_group(self.process)


@dataclass
class Campaign:
    """A folder of results.

    Attributes:
        folder: where everything goes.
        environment: at the last start.
        steps: name -> outcome.
        variables: environment variables of every step.
    """

    folder: Path
    environment: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Done] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, variables: Mapping[str, str] | None = None) -> Campaign:
        """The campaign in the folder, or a new one; steps done under other sources are to be run again.

        Raises:
            ValueError: the folder cannot be written, its state is damaged, or it is of another machine.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out must be a folder that can be written, got {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--out must be a folder that can be written, got {folder}")
        campaign = cls(folder, collect(), variables=dict(variables or {}))
        path = folder / STATE_FILE
        if path.exists():
            saved = _load(path)
            differing = differences(saved["environment"], campaign.environment)
            if differing:
                raise ValueError(f"{folder} holds a campaign of other conditions ({differing}): give another --out")
            campaign.steps = saved["steps"]
            if changed := renewing(saved["environment"], campaign.environment):
                for done in campaign.steps.values():
                    if done.state in ("done", "failed"):
                        done.state, done.note = "older", changed
        campaign.save()
        return campaign

    def save(self) -> None:
        steps = {name: asdict(step) for name, step in self.steps.items()}
        data = {"schema": SCHEMA, "environment": self.environment, "steps": steps}
        write_json(data, self.folder / STATE_FILE)

    def result_files(self) -> list[Path]:
        """The existing result files, ordered by name."""
        return sorted(self.folder.glob("*.json"))

    def result_file(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.txt"

    def is_over(self, step: Step) -> bool:
        """Whether a step need not run: it is done, or every step that it serves is."""
        return self._is_done(step.name) or (step.serves != () and all(map(self._is_done, step.serves)))

    def _is_done(self, name: str) -> bool:
        done = self.steps.get(name)
        return done is not None and done.state == "done"

    def run(
        self,
        steps: Sequence[Step],
        budget: float,
        report: Callable[[str], None],
        renew: Callable[[], None] = lambda: None,
        grace: float = _GRACE_SECONDS,
        minimum: float = _MIN_SECONDS,
    ) -> None:
        """Runs the steps that are not done: first each within its limit; then, while time remains, those that were cut,
        and those that failed before this call.

        Args:
            steps: in order of value.
            budget: seconds in all, the last step's saving included.
            report: called with a line when a step begins and when it ends.
            renew: called after every step, to update archives.
            grace: seconds for a step to save and end once its time is up.
            minimum: a step is not begun with fewer seconds.

        Raises:
            KeyboardInterrupt: passed on after the running steps have saved.
        """
        deadline = time.monotonic() + max(budget - grace, 0)
        stretch = max(budget / _PLANNED_SECONDS, 1.0)
        self._set_damaged_aside(steps, report)
        failed_before = {name for name, done in self.steps.items() if done.state == "failed"}
        for first_pass in (True, False):
            for group in _groups(steps):
                begun = []
                for step in group:
                    done = self.steps.get(step.name)
                    failed = done is not None and done.state == "failed"
                    # it may fail again, so steps that have not run yet go first
                    if self.is_over(step) or (failed and first_pass == (step.name in failed_before)):
                        continue
                    if step.skip:
                        self._note(step, Done("skipped", 0.0, None, step.skip))
                        if first_pass:
                            report(f"{step.name}: skipped: {step.skip}")
                        continue
                    remaining = deadline - time.monotonic()
                    limit = min(remaining, step.limit * stretch) if first_pass else remaining
                    if limit >= minimum:
                        report(f"{step.name}: up to {limit:.0f} s")
                        begun.append((step, limit))
                if begun:
                    try:
                        self._attempt(begun, report, grace)
                    finally:
                        renew()

    def _set_damaged_aside(self, steps: Sequence[Step], report: Callable[[str], None]) -> None:
        """Renames result files that cannot be read; their steps begin anew."""
        for step in steps:
            path, done = self.result_file(step), self.steps.get(step.name)
            if not step.suite or done is None or done.state == "skipped":
                continue
            try:
                Results.load(path)
            except (ValueError, OSError) as error:
                if path.exists():
                    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                    path.rename(aside)
                    report(f"{step.name}: begins anew: {error}; kept as {aside.name}")
                if done.state == "done":
                    done.state, done.note = "cut", "its result file cannot be read"

    def _attempt(self, begun: Sequence[tuple[Step, float]], report: Callable[[str], None], grace: float) -> None:
        """Runs steps side by side, each for at most its seconds."""
        running: list[_Running] = []
        try:
            for step, limit in begun:
                running.append(self._start(step, limit))
            while running:
                for item in list(running):
                    code = item.process.poll()
                    if code is None:
                        item.end_where_overdue(grace)
                        continue
                    _kill_group(item.process)  # a worker that outlived it would disturb the next step
                    running.remove(item)
                    done = self._outcome(item, code, item.asked_at is not None)
                    self._note(item.step, done)
                    outcome = ": ".join(filter(None, (f"{done.state} after {done.seconds:.0f} s", done.note)))
                    report(f"{item.step.name}: {outcome}")
                if running:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            for item in running:
                code = item.process.poll()  # it may have ended by now
                ended = None if code is None else self._outcome(item, code, False)
                self._note(item.step, ended or Done("cut", item.seconds, None, "interrupted"))
            _stop([item.process for item in running], grace)
            raise

    def _start(self, step: Step, limit: float) -> _Running:
        # less than the limit, so that a step ends in order before it is cut, with prepared work timed
        values = {"{json}": str(self.result_file(step)), "{seconds}": f"{max(0.85 * limit, 1.0):.0f}s"}
        command = [sys.executable]
        for argument in step.command:
            for name, value in values.items():
                argument = argument.replace(name, value)
            command.append(argument)
        before = _identity(self.result_file(step))
        with self.log(step).open("ab") as output:
            # a group of its own: the terminal's interruption reaches this process, which passes it on
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.variables},
                start_new_session=True,
                preexec_fn=end_with_parent,  # else it would disturb the next campaign
            )
        return _Running(step, process, time.monotonic(), limit, before)

    def _outcome(self, item: _Running, code: int, cut: bool) -> Done:
        step, log = item.step, self.log(item.step)
        last, path = _last_line(log), self.result_file(item.step)
        if cut:
            return Done("cut", item.seconds, code, "its time was up")
        if code != 0 and code not in step.fine:
            return Done("failed", item.seconds, code, f"exit code {code}: {last}")
        if step.left_over and re.search(step.left_over, last):
            return Done("cut", item.seconds, code, last)
        if step.suite:
            # every orderly end saves, so an untouched file is of an earlier attempt
            untouched: tuple[State, str] = ("failed", last)
            state, note = untouched if _identity(path) == item.before else _state_in(path)
            if state != "done":
                return Done(state, item.seconds, code, note or f"exit code {code}: {last}")
        return Done("done", item.seconds, code, "" if code == 0 else f"exit code {code}: see {log.name}")

    def _note(self, step: Step, done: Done) -> None:
        before = self.steps.get(step.name)
        done.seconds += before.seconds if before else 0.0
        self.steps[step.name] = done
        self.save()


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in groups that run at the same time: adjacent ones with ``beside``; the others one by one."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.beside and groups[-1][-1].beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _identity(path: Path) -> tuple[int, int] | None:
    """A value that changes whenever a file is rewritten."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _state_in(path: Path) -> tuple[State, str]:
    """(state, note) of a suite's result file: done; cut, if it ended in order; or failed, if rows did."""
    try:
        results = Results.load(path)
    except (ValueError, OSError) as error:
        return "failed", str(error)
    if not results.complete:
        ended = results.suite == "verify" or (results.readings and results.readings[-1].get("when") == "after")
        return ("cut", "its time was up") if ended else ("failed", "")
    rows = [getattr(row, "row", row) for row in results.rows]
    failed = [row for row in rows if getattr(row, "status", "") == "error" or (hasattr(row, "ok") and row.note)]
    return ("failed", f"{len(failed)} of its rows: {failed[0].note}") if failed else ("done", "")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    # not SIGINT, which children of a shell's background job ignore; and only the step, as the death of its worker
    # would be taken for a failure of the provider
    process.terminate()


def _stop(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Asks steps to save and end, then kills them and everything they started."""
    for process in processes:
        _ask_to_end(process)
    deadline = time.monotonic() + grace
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(deadline - time.monotonic(), 0))
    finally:  # also after a second interruption
        for process in processes:
            _kill_group(process)
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def _load(path: Path) -> dict[str, Any]:
    """The contents of campaign.state, checked."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"it must have the schema {SCHEMA!r}")
        return {
            "environment": parse(dict[str, Any], data.get("environment"), "environment"),
            "steps": parse(dict[str, Done], data.get("steps"), "steps"),
        }
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no state of a campaign: {error}") from error
