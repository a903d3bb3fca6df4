"""The description of a run or test that a launcher passes to its processes. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import Group
from service.basics.errors import SpecError
from service.health.stop_budget import GracePeriod
from service.plan.changing import NOTHING_ACCEPTED, Accepted
from service.runs.directory import RunDirectory
from service.spec.files import Override, load_spec, plain_values
from service.spec.models import Spec

if TYPE_CHECKING:
    from service.plan.plan import Window


@dataclass(frozen=True)
class Job:
    """The description of a run for its processes."""

    spec: Spec
    runs: Path
    fresh: bool = False
    stop_at: int | None = None
    group: Group | None = None
    """The processes of all nodes, if there are several nodes."""
    profile: Window | None = None
    """The steps to profile."""
    grace: GracePeriod | None = None
    """The time limit of a stop, if it is not that of our launcher."""
    accepted: Accepted = NOTHING_ACCEPTED
    """The changes that are accepted in a run that has begun."""
    own_disks: bool = False
    """Whether `runs` is another directory on each node."""
    place: str = ""
    """The place of the runs as it was given."""

    def again(self, before: str | None) -> Job:
        """The job for a restart after a failure: `fresh` moves an earlier run aside only once.

        Args:
            before: the id of the run when the job was started.
        """
        return replace(self, fresh=self.fresh and self.run_id() == before)

    def directory(self) -> RunDirectory:
        """Where the run is kept."""
        return RunDirectory(self.runs / self.spec.name)

    @property
    def options(self) -> dict[str, str]:
        """The options of the command that must be equal on all nodes, as far as they were given."""
        window = self.profile
        told = {
            "--stop-at": self.stop_at and str(self.stop_at),
            "--profile": window and f"{window.first}:{window.steps}",
        }
        return {name: text for name, text in told.items() if text}

    @property
    def settings(self) -> dict[str, str]:
        """What must be equal on all processes besides the spec.

        `--fresh` is not among it: rank 0 decides for all.
        """
        return {"command": "run", "--runs": self.place, **self.options}

    def run_id(self) -> str | None:
        """The id of the run that is at its path now; None if none can be read."""
        try:
            return str(self.directory().read_facts()["id"])
        except SpecError:
            return None  # opening the run decides whether this is an error

    def __reduce__(self) -> tuple[Any, ...]:
        # The optimizer classes of a spec are created at import time and have no name by which
        # a pickle could find them.  Plain values are sent instead, as in a file.
        values = plain_values(self.spec)
        rest = (self.fresh, self.stop_at, self.group, self.profile, self.grace, self.accepted)
        return _received, (values, self.runs, *rest, self.own_disks, self.place)


def _received(spec: dict[str, Any], *rest: Any) -> Job:
    return Job(load_spec(spec), *rest)


@dataclass(frozen=True)
class TestJob:
    """The description of a test for its processes."""

    run: Path
    checkpoint: str
    predictions: Path | None = None
    overrides: tuple[Override, ...] = ()
    """Of the run's spec, `key=value`."""
    data: str | None = None
    """The test set, if there are several."""
    place: str = ""
    """RUN as it was given."""

    @property
    def settings(self) -> dict[str, str]:
        """What must be equal on all processes besides the spec."""
        told = {"--predictions": self.predictions and str(self.predictions), "--data": self.data}
        given = {name: text for name, text in told.items() if text}
        return {"command": "test", "RUN": self.place, "--checkpoint": self.checkpoint, **given}

    def directory(self) -> RunDirectory:
        """Where the run is kept."""
        return RunDirectory(self.run)

    @property
    def spec(self) -> Spec:
        """The spec of the run, with the overrides of the test."""
        return RunDirectory(self.run).read_spec(self.overrides)
