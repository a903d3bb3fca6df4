"""One attempt at a run: opens its directory, starts its records, and records its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from service.basics.atomic_files import told_when_unwritten
from service.basics.errors import EvenstepError
from service.checkpoints.checkpoints import Checkpoints
from service.data.task import source_digests
from service.distributed.devices import name_of
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.health.stop_budget import StopBudget, estimated, measured_in
from service.observability.console import LeadOutput, console
from service.observability.logged_files import LoggedFiles
from service.observability.other_writers import second_writers
from service.observability.wandb_writer import WandB
from service.optimization.flops import cost_of_fp32
from service.optimization.train_state import TrainState
from service.plan.plan import Plan
from service.runs.directory import OpenRun, RunDirectory, changes_in, open_run, versions
from service.runs.tracking import MetricsFile, Outcome, Tracker, Writer
from service.spec.files import fingerprint, shown_values
from service.training.receipts import Receipt
from service.training.setup import Prepared, together


@dataclass(frozen=True)
class Attempt:
    """The open directory of a run in this process."""

    plan: Plan
    world: World
    directory: RunDirectory
    opened: OpenRun | None
    """The open run, on rank 0."""
    heartbeat: Heartbeat
    say: LeadOutput

    def begin(self, *, step: int, way: str) -> None:
        """Record the attempt, unless too many made no progress; `way` describes the data path.

        Raises:
            NoProgress: the limit is reached; on every process.
        """
        opened = self.opened
        most = self.plan.spec.faults.attempts_without_progress
        if opened is not None:
            files = source_digests(self.plan.spec.task)
            changed = opened.changed_files(files) if step else []
            if changed:
                self.say(
                    f"WARNING: the task's code has changed since the last attempt of this run: "
                    f"{', '.join(changed[:8])}. The steps up to {step} were taken with the old "
                    "code. To start over with the new code, use --fresh or another --name."
                )
            opened.enter_changes(self.plan.spec, step=step)
            opened.start_attempt(
                processes=self.plan.processes,
                device=str(self.world.device),
                step=step,
                started=self.heartbeat.started,
                data=way,
                most_failures=most,
                task_files=files,
            )

    def enter_done(self) -> None:
        """Record that the run was already done before this attempt."""
        if self.opened is not None:
            self.opened.enter_done()

    def require_never_saved(self) -> None:
        """If no checkpoint was found, check that none can have been lost."""
        if self.opened is not None:
            self.opened.require_never_saved()

    def end(self, outcome: Outcome, *, step: int) -> EvenstepError | None:
        """Record how the attempt ended; return the error if that failed.

        It is not raised: the state is already saved, or a more important error is being raised.
        """
        if self.opened is None:
            return None
        try:
            self.opened.end_attempt(
                outcome,
                step=step,
                seconds=self.heartbeat.seconds(),
                longest_save_seconds=self.heartbeat.longest_save_seconds,
            )
        except EvenstepError as error:
            what = "The run is done and saved" if outcome == "done" else f"This attempt {outcome}"
            unentered = type(error)(f"{error} {what}; run the same command again to record this.")
            if outcome != "done":
                print(f"WARNING: {unentered}", file=sys.stderr, flush=True)
            return unentered
        return None


@contextmanager
def opened_attempt(
    runs: Path, plan: Plan, world: World, *, fresh: bool, heartbeat: Heartbeat, say: LeadOutput
) -> Iterator[Attempt]:
    """The directory of the run, locked in this context; on rank 0.

    Raises:
        SpecError: it belongs to another run, or is in use; on every process.
    """
    spec = plan.spec
    opened = together(
        world,
        lambda: (
            open_run(runs, spec, fresh=fresh, accepted=plan.accepted) if world.is_lead else None
        ),
    )
    try:
        directory = RunDirectory(runs / spec.name)
        together(world, lambda: heartbeat.settle(directory))
        yield Attempt(plan, world, directory, opened, heartbeat, say)
    finally:
        if opened is not None:
            opened.close()


def make_checkpoints(attempt: Attempt, stopping: StopBudget) -> Checkpoints:
    """The checkpoints of the run; they report the time of each save to `stopping`."""
    plan, spec = attempt.plan, attempt.plan.spec
    return Checkpoints(
        attempt.directory.checkpoints,
        world=attempt.world,
        spec=spec.checkpoint,
        heartbeat=attempt.heartbeat,
        facts={
            "processes": plan.processes,
            "sampling": plan.sampling.digest() if plan.sampling is not None else None,
            "train_rows": plan.train_rows,
            "spec_sha256": fingerprint(spec),
            "versions": versions(),
        },
        say=attempt.say,
        stopping=stopping,
    )


def learn_save_time(attempt: Attempt, stopping: StopBudget, saved_bytes: int | None) -> None:
    """Estimate for `stopping` the time of a save: from earlier saves, or from a disk test."""
    if attempt.opened is None or not stopping.is_bounded:
        return
    attempts = attempt.opened.facts["attempts"]
    takes = measured_in(attempts) or estimated(saved_bytes, attempt.directory.path)
    if takes is not None:
        stopping.learned(takes.save_seconds, takes.how)


@dataclass(frozen=True)
class Records:
    """The files to which each step appends."""

    receipt: Receipt
    tracker: Tracker
    logged: LoggedFiles | None
    """Stores what hooks log, on rank 0."""

    def close(self, outcome: Outcome) -> None:
        """Close them; nothing is written afterwards."""
        self.receipt.close()
        self.tracker.close(outcome)


def begin_records(attempt: Attempt, prepared: Prepared) -> Records:
    """Record the attempt, and start or continue the receipt and the metrics.

    Raises:
        EvenstepError: one of them cannot be written; on every process.
    """
    world, state, directory = attempt.world, prepared.state, attempt.directory
    together(world, lambda: attempt.begin(step=state.step, way=prepared.rows.way))
    receipt = together(
        world,
        lambda: Receipt(
            directory.receipt,
            world=world,
            step=state.step,
            say=attempt.say,
            changes=changes_in(attempt.opened.facts) if attempt.opened is not None else (),
        ),
    )
    logged = together(world, lambda: _logged(attempt, step=state.recorded_step))
    tracker = together(world, lambda: _tracker(attempt, step=state.recorded_step))
    return Records(receipt, tracker, logged)


def _logged(attempt: Attempt, *, step: int) -> LoggedFiles | None:
    if attempt.opened is None:
        return None
    directory = attempt.directory.logged
    with told_when_unwritten(directory):
        return LoggedFiles(directory, resume_step=step or None)


def _tracker(attempt: Attempt, *, step: int) -> Tracker:
    """The writers on rank 0, the metrics file first; none on other ranks."""
    plan, opened, say = attempt.plan, attempt.opened, attempt.say
    resume_step = step if step else None
    if opened is None:
        return Tracker(epoch_at=plan.epoch, resume_step=resume_step)
    directory, wandb = opened.directory, plan.spec.tracking.wandb
    config = _config(plan, opened)
    screen = console(plan.steps, resume_step=resume_step)
    say.speak_through(screen)
    metrics = MetricsFile(directory.metrics, resume_step=resume_step, say=say)
    writers: list[Writer] = [metrics, screen]
    if wandb is not None:
        writers.append(
            WandB(
                wandb,
                run_id=opened.id,
                name=plan.spec.name,
                directory=directory.path,
                config=config,
                say=screen.say,
                resume_step=resume_step,
            ).start()
        )
    writers += second_writers(
        plan.spec.tracking,
        directory=directory.path,
        name=plan.spec.name,
        run_id=opened.id,
        config=config,
        resume_step=resume_step,
        say=screen.say,
    )
    return Tracker(writers, epoch_at=plan.epoch, resume_step=resume_step)


def _config(plan: Plan, opened: OpenRun) -> dict[str, Any]:
    """The configuration for trackers: the resolved spec, and the machine."""
    return {
        **shown_values(plan.spec),
        "spec_sha256": fingerprint(plan.spec),
        "processes": plan.processes,
        "versions": opened.facts["versions"],
        "git": opened.facts["git"],
    }


def opening(
    attempt: Attempt, model: nn.Module, unreached: Sequence[str], resumed_at: int | None
) -> str:
    """A summary for the user before the first step."""
    plan, world = attempt.plan, attempt.world
    parameters = sum(p.numel() for p in model.parameters())
    many = "process" if world.processes == 1 else "processes"
    lines = [
        f"{plan.spec.name}: {world.processes} {many} on {world.device.type} | "
        f"{parameters:,} parameters | {_rows(plan)} training and {plan.test_rows:,} test rows"
        f" | {plan.steps:,} steps of {plan.global_batch} rows in micro-batches of "
        f"{plan.micro_batch} | {attempt.directory.path}"
    ]
    given_up = cost_of_fp32(name_of(world.device)) if plan.spec.model.precision == "fp32" else None
    if given_up is not None:
        lines.append(given_up)
    if unreached:
        lines.append(f"The loss does not depend on {', '.join(unreached[:8])}: never trained.")
    if resumed_at is not None:
        lines.append(f"Resuming after step {resumed_at} (epoch {plan.epoch(resumed_at):.2f}).")
    return "\n".join(lines)


def _rows(plan: Plan) -> str:
    return "a stream of" if plan.train_rows is None else f"{plan.train_rows:,}"


def closing(state: TrainState, last: dict[str, float], directory: RunDirectory) -> str:
    """The results, and the path of the run."""
    tested = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k.startswith("test/"))
    line = f"Done after step {state.step:,}: {tested or 'no test'}."
    if state.best is not None:
        line += f" Best {state.best.measure} {state.best.value:.4g} at step {state.best.step:,}."
    if state.early_stopping is not None and state.ended_early:
        waited = state.early_stopping
        line += f" Ended early: {waited.spec.measure} did not improve in {waited.waited} tests."
    return f"{line} Everything is in {directory.path}"
