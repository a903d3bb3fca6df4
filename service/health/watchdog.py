"""The watchdog: finds a process that makes no progress, reports where it is, and kills it."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from service.basics.atomic_files import without_link
from service.basics.errors import PeerLost
from service.basics.running_time import RunningClock, TimeLimit
from service.health.heartbeat import ORDER, WORDS, WRITER, Heartbeat, Position, Work, group
from service.health.sentinel import sentinel
from service.runs.directory import read_beat
from service.runs.failure_reports import read_failures, write_failure

HUNG = 1
"""Exit code of the process for which the others waited."""
_REPORTS_SECONDS = 2.0  # for the reports of the other ranks, which hang for as long
_MOST_SECONDS_A_LOOK = 1.0
_UNINTERRUPTED_SECONDS = 30.0  # the most that a hook may take beyond its limit
# A thread whose innermost frame is in one of these files waits for another process.
_WAITING = (
    "torch/distributed/",
    "service/distributed/world.py",
    "service/distributed/recursive_doubling.py",
    "torch/autograd/graph.py",
)

# The code where a process waits for its device, which may wait for the devices of others: reading
# a value, a copy, or waiting for an event.  Most of those calls have no Python frame: the line
# tells.  Torch's optimizers that ask for the loss again compare values of the device.
_DEVICE_WAIT = re.compile(
    r"\.(item|tolist|cpu|numpy|to|copy_|synchronize|query)\(|\b(float|int|bool)\(|tensor\("
)
_DEVICE_WAITING = ("torch/cuda/", "torch/xpu/", "torch/npu/", "torch/accelerator/", "torch/_tensor")
_OPTIMIZERS = "torch/optim/"

Leave = Callable[[int, str], NoReturn]


@contextmanager
def watched(
    heartbeat: Heartbeat,
    *,
    processes: int,
    timeout_seconds: float,
    startup_timeout_seconds: float,
    hook_timeout_seconds: float,
    leave: Leave,
    mark: Path | None = None,
) -> Iterator[None]:
    """A context that reports and kills this process when it makes no progress for too long.

    A thread checks its heartbeat. If no thread can run, because the interpreter's lock is held, the
    timer of faulthandler writes the stacks, and the sentinel kills this process. Where there can be
    no sentinel, that timer also exits, with code 1.

    Time in which this process was stopped does not count, so a run whose processes are all stopped
    and continued (SIGSTOP and SIGCONT, a frozen container) goes on.

    Args:
        startup_timeout_seconds, hook_timeout_seconds: the limits before the first step, and of a
            hook of the task.
        leave: ends the process immediately, with a code and a message.
        mark: the file in which the sentinel writes the reason of a kill; by default standard
            error.
    """
    heartbeat.moved()  # the time before is not counted
    ended = threading.Event()
    timeouts: dict[Work, float] = {
        "starting": startup_timeout_seconds,
        # The hook is interrupted at its limit; this is for one that cannot be interrupted.
        "hook": hook_timeout_seconds + min(hook_timeout_seconds, _UNINTERRUPTED_SECONDS),
    }
    watch = _Watch(heartbeat, processes, timeout_seconds, timeouts, leave, ended, mark)
    thread = threading.Thread(target=watch.run, name="hang watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        watch.close()


@dataclass(frozen=True)
class _Awaited:
    """The rank, not ahead of this one, with the latest progress: this one may wait for it."""

    place: Position
    """Of this process."""
    rank: int | None
    """None if all other ranks are ahead."""
    beat_time: float
    until: float
    """The time of the next check, on the clock of the watchdog."""


class _Watch:
    def __init__(
        self,
        heartbeat: Heartbeat,
        processes: int,
        timeout_seconds: float,
        timeouts: Mapping[Work, float],
        leave: Leave,
        ended: threading.Event,
        mark: Path | None,
    ) -> None:
        self._heartbeat = heartbeat
        self._processes = processes
        self._timeout = timeout_seconds
        self._timeouts = timeouts
        self._leave = leave
        self._ended = ended
        self._main = threading.main_thread().ident
        self._look_seconds = min(_MOST_SECONDS_A_LOOK, timeout_seconds / 8)
        # Longer than a check is usually delayed by a busy machine or a held lock, so that this time
        # still counts, and much shorter than the timeout.
        self._most_seconds = max(2 * self._look_seconds, timeout_seconds / 8)
        self._clock = RunningClock(self._most_seconds)
        self._sentinel = sentinel(mark)
        self._stacks: IO[str] | None = None
        self._awaited: _Awaited | None = None

    def run(self) -> None:
        try:
            self._look()  # at once: the first steps may follow within the time of a look
            while not self._ended.wait(self._look_seconds):
                self._look()
        finally:  # also if a check fails: without checks it would kill a healthy process
            faulthandler.cancel_dump_traceback_later()
            if self._sentinel is not None:
                self._sentinel.rest()

    def _look(self) -> None:
        place, standing = self._heartbeat.look(self._most_seconds)
        now = self._clock()
        timeout = self._timeouts.get(place.work, self._timeout)
        self._expect_next_look(timeout + 2 * self._look_seconds)
        self._heartbeat.write()
        if standing > timeout / 2 and (not self._awaited or self._awaited.place != place):
            self._awaited = self._last_moved(place, now, timeout)
        if standing > timeout and place == self._heartbeat.place and not self._may_wait(timeout):
            self._report(standing)

    def _expect_next_look(self, seconds: float) -> None:
        """From now on, if no check follows in time, the process ends, with its stacks in a file."""
        file = self._stacks_file()
        with suppress(OSError):  # a disk error: old stacks are better than no watchdog
            if file is not sys.stderr and os.fstat(file.fileno()).st_size:
                os.ftruncate(file.fileno(), 0)  # written while this process was stopped: not a hang
                os.lseek(file.fileno(), 0, os.SEEK_SET)
        if self._sentinel is not None:
            stacks = None if file is sys.stderr else Path(file.name)
            if not self._sentinel.alive(seconds + 2 * self._look_seconds, stacks=stacks):
                self._sentinel = None
        # Each check restarts the timer, so it fires only if the checks have stopped.
        faulthandler.dump_traceback_later(seconds, exit=self._sentinel is None, file=file)

    def _last_moved(self, place: Position, now: float, timeout: float) -> _Awaited:
        """The rank for which this process may wait, according to the latest heartbeats.

        It has the whole timeout, from its last progress, and at least half of it for its next
        heartbeat: on a busy machine or a slow disk its watchdog may be delayed, and then its
        heartbeat is old.
        """
        ours = (place.step, ORDER.index(place.work))
        behind = [
            beat
            for beat in map(self._beat, range(self._processes))
            if beat and beat["rank"] != self._heartbeat.rank
            if (beat["step"], ORDER.index(beat["work"])) <= ours
        ]
        last = min(behind, key=lambda beat: beat["standing_seconds"], default=None)
        if last is None:
            return _Awaited(place, None, 0.0, now)
        left = max(timeout - last["standing_seconds"], timeout / 2)
        return _Awaited(place, last["rank"], last["time"], now + left)

    def _may_wait(self, timeout: float) -> bool:
        """Whether this process waits for a rank that makes progress.

        Rank 0 may write a checkpoint for longer than the timeout, and report its progress;
        the other ranks, which wait for it, cannot.
        """
        awaited = self._awaited
        if awaited is None or awaited.rank is None or not self._line()[1]:
            return False
        if self._heartbeat.failures and any(
            report.get("group") == group() for report in read_failures(self._heartbeat.failures)
        ):
            return False  # the hang is reported already, and its reporter waits for the others
        now = self._clock()
        if now < awaited.until:
            return True
        beat = self._beat(awaited.rank)
        if not beat or beat["time"] == awaited.beat_time or beat["standing_seconds"] > timeout:
            return False
        self._awaited = self._last_moved(awaited.place, now, timeout)
        return True

    def _beat(self, rank: int) -> dict[str, Any] | None:
        """The last heartbeat of that rank in this attempt, if this version understands it."""
        beat = read_beat(self._heartbeat.scratch, rank) if self._heartbeat.scratch else None
        known = beat and beat.get("group") == group() and beat.get("work") in ORDER
        return beat if known else None

    def close(self) -> None:
        if self._stacks is not None:
            self._stacks.close()

    def _stacks_file(self) -> IO[str]:
        """The file for faulthandler, in the directory of the run as soon as there is one."""
        scratch = self._heartbeat.scratch
        if scratch is None:
            return sys.stderr
        path = scratch / f"rank-{self._heartbeat.rank}.stacks"
        if self._stacks is None or self._stacks.name != str(path):
            self.close()
            try:
                self._stacks = open(path, "w", opener=without_link)  # noqa: SIM115  # open as long as it runs
            except OSError:  # no space: the stacks go to the output instead
                return sys.stderr
        return self._stacks

    def _line(self) -> tuple[str, bool]:
        """(the current line of this process, and whether it waits there for other processes)."""
        frames = sys._current_frames()
        on_device = self._heartbeat.device_waits
        line, waiting = "", False
        if self._main in frames:
            line, waiting = _line_of(frames[self._main], on_device=on_device)
        if self._heartbeat.place.work == "save" and not waiting:
            for thread in threading.enumerate():  # it waits for the writer thread
                if thread.name.startswith(WRITER) and thread.ident in frames:
                    written, for_others = _line_of(frames[thread.ident], on_device=on_device)
                    if "concurrent/futures" not in written:  # otherwise it is idle
                        line, waiting = written, for_others
        return line, waiting

    def _report(self, standing: float) -> None:
        line, waiting = self._line()
        report = self._heartbeat.record() | {
            "kind": "hang",
            "line": line,
            "waits_for_others": waiting,
            "stacks": _stacks(),
        }
        failures = self._heartbeat.failures
        if failures is None:  # started by torchrun, and the run is not open yet
            told = _told(report, self._heartbeat.rank, standing)
            self._leave(HUNG, f"{report['stacks']}\n{told}")
        if write_failure(failures, report) is None:
            print(report["stacks"], file=sys.stderr, flush=True)
        behind = who_is_behind(self._reports(failures))
        mine = behind["rank"] == self._heartbeat.rank
        self._leave(
            HUNG if mine else PeerLost.exit_code, _told(behind, self._heartbeat.rank, standing)
        )

    def _reports(self, failures: Path) -> list[dict[str, Any]]:
        """The report of every rank about this hang, or else its last heartbeat."""
        limit = TimeLimit(_REPORTS_SECONDS)
        found: dict[int, dict[str, Any]] = {}
        while len(found) < self._processes and limit.left:
            reports = list(read_failures(failures))
            found = {r["rank"]: r for r in reports if r.get("group") == group()}
            time.sleep(0.05)
        for rank in range(self._processes):
            if rank not in found:
                found[rank] = {"rank": rank, "silent": True} | (self._beat(rank) or {})
        return list(found.values())


def who_is_behind(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of the rank for which the others wait.

    This is a rank that cannot report; otherwise the one with the least progress; among several at
    the same point, the one that does not wait for another.
    """

    def place(report: dict[str, Any]) -> tuple[bool, int, int, bool, int]:
        work = ORDER.index(report["work"]) if "work" in report else -1
        silent = not report.get("silent", False)
        waiting = bool(report.get("waits_for_others", False))
        return (silent, report.get("step", -1), work, waiting, report["rank"])

    return min(reports, key=place)


def _told(behind: dict[str, Any], rank: int, standing: float) -> str:
    who = "This process" if behind["rank"] == rank else f"Rank {behind['rank']}"
    where = "nowhere yet"
    if "work" in behind:
        micro_batch = behind["micro_batch"]
        where = f"at step {behind['step']}"
        where += f", micro-batch {micro_batch}" if micro_batch >= 0 else ""
        where += f", {WORDS[behind['work']]}"
    if behind.get("silent"):
        return (
            f"{who} has not answered for {standing:.0f} s while the others waited: it is "
            "suspended, or holds the GIL, or its machine is gone. It was last seen "
            f"{where}."
        )
    # A rank that failed has no line: its error message is the reason.
    what = behind.get("line") or behind.get("message", "it has failed")
    return f"{who} has made no progress for {standing:.0f} s {where}: {what}."


def _line_of(frame: FrameType, *, on_device: bool = False) -> tuple[str, bool]:
    """(the innermost line, and whether it waits there for other processes).

    Args:
        on_device: the process computes on a device, so a line that waits for it waits for others.
    """
    summary = traceback.extract_stack(frame)
    innermost = summary[-1]
    file = innermost.filename.replace(os.sep, "/")
    waiting = any(part in file for part in _WAITING)
    if on_device and not waiting:
        waiting = waits_for_device(file, innermost.line or "")
    line = f"{innermost.filename}:{innermost.lineno} in {innermost.name}: {innermost.line}"
    return line, waiting


def waits_for_device(file: str, line: str) -> bool:
    """Whether a process whose innermost frame is at this line may wait there for its device."""
    is_torchs = any(part in file for part in (*_DEVICE_WAITING, _OPTIMIZERS))
    return is_torchs or _DEVICE_WAIT.search(line) is not None


def _stacks() -> str:
    """The stack of every thread, formatted as by Python."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    return "\n".join(parts)
