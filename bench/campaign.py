"""A campaign: every suite in order of value within a wall-clock budget, each in a process of its own.

Its folder holds one result file a step, the logs, and campaign.state with what has been done. Every step saves after
every row and goes on where it was cut, so a campaign can be interrupted, killed, and run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .child_processes import end_with_parent
from .environment import collect
from .files import write_json
from .parsing import parse
from .records import Results
from .suite import differences

SCHEMA = "ditfast.bench.campaign/1"
State = Literal["done", "cut", "failed", "skipped"]

_STATE_FILE = "campaign.state"  # not .json: DIR/*.json are results
_GRACE_SECONDS = 20.0  # for a step to save and print after its time is up
_MIN_SECONDS = 20.0  # importing torch and measuring the limits take as long: less is not worth a start


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its files and in the state.
        command: what follows the interpreter; "{json}" stands for its result file.
        share: of the budget that it may take in the first pass.
        suite: whether its result file says itself whether it came to its end; an exit code alone does not, for a
            missed parity and a crash are both 1.
        fine: exit codes besides 0 after which it has come to its end (a missed parity is a result).
        skip: why there is nothing to run here, or "".
    """

    name: str
    command: tuple[str, ...]
    share: float = 1.0
    suite: bool = False
    fine: tuple[int, ...] = (1,)
    skip: str = ""


@dataclass
class Done:
    """What became of a step, in the last attempt; seconds of all of them."""

    state: State
    seconds: float
    exit_code: int | None
    note: str = ""


@dataclass
class Campaign:
    """A folder of results.

    Attributes:
        folder: where everything goes.
        environment: of the first start; another machine or version is no continuation.
        steps: name -> what became of it.
    """

    folder: Path
    environment: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Done] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Campaign:
        """A new campaign in the folder, or the one that is there.

        Raises:
            ValueError: the folder cannot be written, its state is damaged, or it stems from other conditions.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out must be a folder that can be written, got {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--out must be a folder that can be written, got {folder}")
        campaign = cls(folder, collect())
        path = folder / _STATE_FILE
        if path.exists():
            there = _load(path)
            differing = differences(there["environment"], campaign.environment)
            if differing:
                raise ValueError(f"{folder} holds a campaign of other conditions ({differing}): give another --out")
            campaign.environment, campaign.steps = there["environment"], there["steps"]
        campaign.save()
        return campaign

    def save(self) -> None:
        steps = {name: asdict(step) for name, step in self.steps.items()}
        data = {"schema": SCHEMA, "environment": self.environment, "steps": steps}
        write_json(data, self.folder / _STATE_FILE)

    def result_files(self) -> list[Path]:
        """The result files there are, in the order of their names."""
        return sorted(self.folder.glob("*.json"))

    def is_over(self, step: Step) -> bool:
        done = self.steps.get(step.name)
        return done is not None and done.state == "done"

    def run(
        self,
        steps: Sequence[Step],
        budget: float,
        report: Callable[[str], None],
        grace: float = _GRACE_SECONDS,
        minimum: float = _MIN_SECONDS,
    ) -> None:
        """Runs what is not done yet: first within each step's share, then what was cut while time remains.

        Args:
            steps: in order of value.
            budget: seconds for all of it, the last step's saving included.
            report: told what begins and what became of it.
            grace: seconds for a step to save and end once its time is up.
            minimum: seconds less than which a step is not begun.

        Raises:
            KeyboardInterrupt: passed on after the running step has saved.
        """
        deadline = time.monotonic() + max(budget - grace, 0)
        for capped in (True, False):
            for step in steps:
                if self.is_over(step):
                    continue
                if step.skip:
                    self._note(step, Done("skipped", 0.0, None, step.skip))
                    if capped:
                        report(f"{step.name}: skipped: {step.skip}")
                    continue
                remaining = deadline - time.monotonic()
                limit = min(remaining, step.share * budget) if capped else remaining
                failed = step.name in self.steps and self.steps[step.name].state == "failed"
                if limit < minimum or (failed and not capped):
                    continue
                report(f"{step.name}: up to {limit:.0f} s")
                self._attempt(step, limit, grace)
                done = self.steps[step.name]
                report(f"{step.name}: {done.state} after {done.seconds:.0f} s{': ' if done.note else ''}{done.note}")

    def _attempt(self, step: Step, limit: float, grace: float) -> None:
        """Runs a step for at most ``limit`` seconds; its output goes to its log."""
        result = self.folder / f"{step.name}.json"
        # so that a step's own budget ends it in order, with what is ready timed, before it is cut
        values = {"{json}": str(result), "{seconds}": f"{max(0.85 * limit, 1.0):.0f}s"}
        command = [sys.executable]
        for part in step.command:
            for name, value in values.items():
                part = part.replace(name, value)
            command.append(part)
        log = self.folder / "logs" / f"{step.name}.txt"
        start = time.monotonic()
        cut = False
        with log.open("ab") as output:
            # a group of its own: the terminal's interruption reaches this process, which passes it on
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,  # it would measure on beside the next campaign
            )
            try:
                code = process.wait(timeout=limit)
                _kill_group(process)  # a worker it left behind would measure on beside the next step
            except subprocess.TimeoutExpired:
                cut = True
                code = _stop(process, grace)
            except BaseException:
                self._note(step, Done("cut", time.monotonic() - start, None, "interrupted"))
                _stop(process, grace)
                raise
        seconds = time.monotonic() - start
        fine = code == 0 or code in step.fine
        state: State = _outcome(result) if step.suite and fine else "done"
        if cut or state == "cut":
            done = Done("cut", seconds, code, "its time was up")
        elif fine and state == "done":
            note = "" if code == 0 else f"exit code {code}: see {log.name}"
            done = Done("done", seconds, code, note)
        else:
            done = Done("failed", seconds, code, f"exit code {code}: {_last_line(log)}")
        self._note(step, done)

    def _note(self, step: Step, done: Done) -> None:
        before = self.steps.get(step.name)
        done.seconds += before.seconds if before else 0.0
        self.steps[step.name] = done
        self.save()


def _outcome(path: Path) -> State:
    """What a suite's result file says: complete, ended in order before that, or neither."""
    try:
        results = Results.load(path)
    except (ValueError, OSError):
        return "failed"
    if results.complete:
        return "done"
    return "cut" if results.readings and results.readings[-1].get("when") == "after" else "failed"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _stop(process: subprocess.Popen[bytes], grace: float) -> int:
    """Asks a step to save and end, then ends it and everything it started."""
    # not SIGINT, which a shell's background job has its children ignore; and to the step alone, for a worker of
    # its that died first would be taken for a failure of the provider
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace)
    finally:  # also where a second interruption comes
        _kill_group(process)
    return process.wait()


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
