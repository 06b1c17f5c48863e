"""A campaign: a plan of steps in order of value within a wall-clock budget, each in a process of its own.

Its folder holds a result file a step, the logs, campaign.state with what has been done, the compilers' caches, and
archives of all of it that are renewed after every step. Suites save after every row and go on where they were cut, so
that a campaign can be interrupted, killed, and run again, here or from its archive elsewhere.
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

_GRACE_SECONDS = 20.0  # for a step to save and print after its time is up
_MIN_SECONDS = 15.0  # importing torch and measuring the limits take as long: less is not worth a start
_PLANNED_SECONDS = 480.0  # the budget that the steps' limits are made for; a longer one stretches them
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its files and in the state.
        command: what follows the interpreter; "{json}" stands for its result file, "{seconds}" for its own budget.
        title: what it finds out, for people.
        limit: seconds that it may take in the first pass.
        beside: whether it may run beside the steps next to it that say the same, for nothing in them is timed.
        suite: whether its result file says itself whether it came to its end; an exit code alone does not, for a
            missed parity and a crash are both 1.
        left_over: a pattern of the last line of its output that says that there is more to do, or "".
        serves: the steps that it is for, once all of which are done it has no purpose; none: one of its own.
        fine: exit codes besides 0 after which it has come to its end (a missed parity is a result).
        skip: why there is nothing to run here, or "".
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
    """What became of a step, in the last attempt; seconds of all of them. "older": done under other sources."""

    state: State
    seconds: float
    exit_code: int | None
    note: str = ""


@dataclass
class _Running:
    """A step's process; ``asked``: when it was to end, its time being up."""

    step: Step
    process: subprocess.Popen[bytes]
    start: float
    limit: float
    before: tuple[int, int] | None  # of the result file, when it began
    asked: float | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def end_where_overdue(self, grace: float) -> None:
        """Asks it to save and end, and ends it where it has not done so in time; waits for nothing."""
        if self.asked is None and self.seconds > self.limit:
            self.asked = time.monotonic()
            _ask_to_end(self.process)
        elif self.asked is not None and time.monotonic() - self.asked > grace:
            _kill_group(self.process)


@dataclass
class Campaign:
    """A folder of results.

    Attributes:
        folder: where everything goes.
        environment: of the last start.
        steps: name -> what became of it.
        variables: of the environment, set for every step.
    """

    folder: Path
    environment: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Done] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, variables: Mapping[str, str] | None = None) -> Campaign:
        """A new campaign in the folder, or the one that is there; what was done under other sources is to do again.

        Raises:
            ValueError: the folder cannot be written, its state is damaged, or it is another machine's.
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
            there = _load(path)
            differing = differences(there["environment"], campaign.environment)
            if differing:
                raise ValueError(f"{folder} holds a campaign of other conditions ({differing}): give another --out")
            campaign.steps = there["steps"]
            if changed := renewing(there["environment"], campaign.environment):
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
        """The result files there are, in the order of their names."""
        return sorted(self.folder.glob("*.json"))

    def result_file(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"

    def log(self, step: Step) -> Path:
        return self.folder / "logs" / f"{step.name}.txt"

    def is_over(self, step: Step) -> bool:
        """Whether nothing is left to do: it is done and what it found is there, or what it serves is over."""
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
        """Runs what is not done yet: first each step within its limit, then, while time remains, what was cut, and what
        failed before this call.

        Args:
            steps: in order of value.
            budget: seconds for all of it, the last step's saving included.
            report: told what begins and what became of it.
            renew: called after every step, for what is kept of it elsewhere.
            grace: seconds for a step to save and end once its time is up.
            minimum: seconds less than which a step is not begun.

        Raises:
            KeyboardInterrupt: passed on after the running steps have saved.
        """
        deadline = time.monotonic() + max(budget - grace, 0)
        stretch = max(budget / _PLANNED_SECONDS, 1.0)
        self._set_damaged_aside(steps, report)
        failed_before = {name for name, done in self.steps.items() if done.state == "failed"}
        for first in (True, False):
            for group in _groups(steps):
                begun = []
                for step in group:
                    done = self.steps.get(step.name)
                    failed = done is not None and done.state == "failed"
                    # it may fail again, and what has not had its turn goes first
                    if self.is_over(step) or (failed and first == (step.name in failed_before)):
                        continue
                    if step.skip:
                        self._note(step, Done("skipped", 0.0, None, step.skip))
                        if first:
                            report(f"{step.name}: skipped: {step.skip}")
                        continue
                    remaining = deadline - time.monotonic()
                    limit = min(remaining, step.limit * stretch) if first else remaining
                    if limit >= minimum:
                        report(f"{step.name}: up to {limit:.0f} s")
                        begun.append((step, limit))
                if begun:
                    try:
                        self._attempt(begun, report, grace)
                    finally:
                        renew()

    def _set_damaged_aside(self, steps: Sequence[Step], report: Callable[[str], None]) -> None:
        """Has a step begin anew where its result file cannot be read, which stays beside under another name."""
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
                    _kill_group(item.process)  # a worker it left behind would measure on beside the next step
                    running.remove(item)
                    done = self._outcome(item, code, item.asked is not None)
                    self._note(item.step, done)
                    outcome = ": ".join(filter(None, (f"{done.state} after {done.seconds:.0f} s", done.note)))
                    report(f"{item.step.name}: {outcome}")
                if running:
                    time.sleep(_POLL_SECONDS)
        except BaseException:
            for item in running:
                code = item.process.poll()  # it may have come to its end since it was asked
                ended = None if code is None else self._outcome(item, code, False)
                self._note(item.step, ended or Done("cut", item.seconds, None, "interrupted"))
            _stop([item.process for item in running], grace)
            raise

    def _start(self, step: Step, limit: float) -> _Running:
        # so that a step's own budget ends it in order, with what is ready timed, before it is cut
        values = {"{json}": str(self.result_file(step)), "{seconds}": f"{max(0.85 * limit, 1.0):.0f}s"}
        command = [sys.executable]
        for part in step.command:
            for name, value in values.items():
                part = part.replace(name, value)
            command.append(part)
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
                preexec_fn=end_with_parent,  # it would measure on beside the next campaign
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
            # every orderly end saves: what lies there untouched is of an earlier attempt
            untouched: tuple[State, str] = ("failed", last)
            state, note = untouched if _identity(path) == item.before else _said(path)
            if state != "done":
                return Done(state, item.seconds, code, note or f"exit code {code}: {last}")
        return Done("done", item.seconds, code, "" if code == 0 else f"exit code {code}: see {log.name}")

    def _note(self, step: Step, done: Done) -> None:
        before = self.steps.get(step.name)
        done.seconds += before.seconds if before else 0.0
        self.steps[step.name] = done
        self.save()


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps one by one, or, where they say so, with their neighbours."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.beside and groups[-1][-1].beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _identity(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file is written anew."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def _said(path: Path) -> tuple[State, str]:
    """What a suite's result file says: complete, ended in order before that, or with rows that failed and may not fail
    again."""
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
    # not SIGINT, which a shell's background job has its children ignore; and to the step alone, for a worker of
    # its that died first would be taken for a failure of the provider
    process.terminate()


def _stop(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """Asks steps to save and end, then ends them and everything they started."""
    for process in processes:
        _ask_to_end(process)
    deadline = time.monotonic() + grace
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(deadline - time.monotonic(), 0))
    finally:  # also where a second interruption comes
        for process in processes:
            _kill_group(process)
            process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def _load(path: Path) -> dict[str, Any]:
    """The checked contents of campaign.state."""
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
