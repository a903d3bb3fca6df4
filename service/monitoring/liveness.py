"""Whether the hang watch of each rank still works, for a liveness probe. No torch.

The hang watch decides whether a rank hangs, and ends it. What is left for a probe is a rank whose
watch itself has stopped and which nobody has ended. So a save, a test or a start that takes long is
healthy for as long as the watch writes its heartbeat. In doubt a rank is healthy: where its
heartbeat cannot be read, where the disk takes no writes, where its process is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

from service.basics.running_time import RunningClock
from service.monitoring.snapshot import is_there

SPARE_SECONDS = 60.0
"""Beyond twice the limit of a hang, by which the watch or its sentinel have ended the process."""
LOOK_SECONDS = 5.0
"""The longest time between two looks."""
_PROBE_BYTES = 8192


class _Seen(NamedTuple):
    beat: tuple[object, ...]
    """The process, when it started, and the time that it wrote."""
    since: float
    """When this was first seen, on the clock of this object."""


class Liveness:
    """What was seen of the heartbeats of some ranks."""

    def __init__(
        self,
        logs: Path,
        *,
        timeouts: Mapping[str, float],
        timeout_seconds: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`timeouts` are the limits of a hang of kinds of work, `timeout_seconds` of all others.

        `logs` is where the heartbeats are. `clock` is by default one that stands still while this
        process is stopped: a frozen container is no hang.
        """
        self._logs = logs
        self._timeouts = timeouts
        self._timeout_seconds = timeout_seconds
        self._clock = clock or RunningClock(2 * LOOK_SECONDS)
        self._seen: dict[int, _Seen] = {}

    def look(self, beats: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """What is wrong, a line for each rank; empty: nothing."""
        now = self._clock()
        wrong = []
        for rank in self._seen.keys() - beats.keys():
            del self._seen[rank]  # it cannot be read: nothing is known
        for rank, beat in beats.items():
            told = (beat.get("process"), beat.get("process_start"), beat.get("time"))
            if rank not in self._seen or self._seen[rank].beat != told:
                self._seen[rank] = _Seen(told, now)
            silent = now - self._seen[rank].since
            if silent > self.limit_of(beat) and is_there(beat) and self._disk_takes_writes():
                wrong.append(
                    f"rank {rank} (process {beat.get('process')}): its hang watch has written no "
                    f"heartbeat for {silent:.0f} s; the last one was at step {beat.get('step')}, "
                    f"{beat.get('work')}"
                )
        return wrong

    def limit_of(self, beat: Mapping[str, Any]) -> float:
        """For how many seconds the watch of a rank may be silent."""
        timeout = self._timeouts.get(str(beat.get("work")), self._timeout_seconds)
        return 2 * timeout + SPARE_SECONDS

    def _disk_takes_writes(self) -> bool:
        """Whether a heartbeat could be written: on a full disk a run goes on without."""
        with suppress(OSError), TemporaryFile(dir=self._logs, buffering=0) as file:
            return file.write(bytes(_PROBE_BYTES)) == _PROBE_BYTES
        return False
