"""What happens after a step, as planned: test, log, save, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.basics.errors import SpecError
from service.checkpoints.checkpoints import Checkpoints
from service.data.batches import Batch
from service.data.task import Task, TestSet
from service.distributed.agreed_stop import StopPoll, TestInterrupted
from service.distributed.stragglers import StragglerDetector
from service.distributed.world import World
from service.evaluation.hooks import Hooked, Hooks, failed
from service.evaluation.test_loop import test_each
from service.health.heartbeat import Heartbeat
from service.health.stop_request import StopRequest
from service.health.throughput import Throughput
from service.optimization.compilation import compiled_graphs
from service.optimization.train_state import TrainState, require_measured
from service.optimization.updates import Updates
from service.plan.plan import Plan
from service.runs.tracking import Tracker
from service.training.receipts import Receipt


@dataclass(frozen=True)
class AfterStep:
    """Tests, logs, saves and stops between two steps, as the plan says."""

    task: Task
    world: World
    plan: Plan
    tests: Sequence[TestSet]
    updates: Updates
    named: Callable[[], dict[str, float]]
    """The values that the task's own step reported in the latest step; called on every process."""
    hooks: Hooks
    tracker: Tracker
    receipt: Receipt
    checkpoints: Checkpoints
    stop: StopRequest
    poll: StopPoll
    heartbeat: Heartbeat
    throughput: Throughput
    stragglers: StragglerDetector

    def next_due(self, step: int) -> int:
        """The first step after `step` after which something is due."""
        due = min(self.plan.next_due(step), self.poll.next_step)
        return min(due, self.hooks.next_due(step)) if self.hooks.has_epochs else due

    def measured(self, state: TrainState) -> dict[str, float]:
        """The values of training to log after this step; empty if no log is due."""
        if not self.plan.logs_at(state.step):
            return {}
        self.heartbeat.enter("log", state.step)
        values = self.updates.look(self.stragglers)
        values |= state.schedule.used()
        rows, weight = self.plan.global_batch, self.updates.weight
        values |= self.throughput.reading(rows_per_step=rows, weight=weight)
        values |= self.checkpoints.timings()
        if self.plan.spec.model.compile:
            values["train/compiled_graphs"] = compiled_graphs()
        return values | self._named(values)

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        named = self.named()
        taken = sorted(set(named) & set(values))
        if taken:
            raise SpecError(
                f"task.step: {taken[0]} is a name that Evenstep logs itself. Use another name for "
                f"the "
                "loss or the context.log value."
            )
        return named

    def conclude(self, state: TrainState, values: dict[str, float]) -> bool:
        """Test, call hooks, log and save if they are due after this step; whether to stop.

        Args:
            values: the values of training; the measures of the test are added.
        Raises:
            HookFailed: a hook failed, and the spec says that the run ends then; the state is saved.
        """
        state.untested = None
        testing = self.plan.tests_at(state.step)
        if testing:
            self._test(state, values)
        hooked = Hooked()
        if state.untested is None:
            hooked = self.hooks.call(state, values, self.tests if testing else ())
        self.heartbeat.enter("agree", state.step)
        stopping = state.untested is not None or self.poll.agreed(state.step, self._wanted())
        stopping |= self.plan.stops_at(state.step)
        kept = self.plan.spec.checkpoint
        best = state.improves(values, kept.best, among=kept.keep_best)
        state.learn(values if self.plan.counts_at(state.step) else {})
        stopping |= state.ended_early or self.hooks.ends(hooked.failure)
        saving = self.plan.saves_at(state.step) or best or stopping
        self._record(state, values, hooked, saving=saving)
        if saving:
            self._save(state)
        self._end_for(hooked)
        if testing or saving or hooked.called:
            self.throughput.restart()
        return stopping

    def _end_for(self, hooked: Hooked) -> None:
        if self.hooks.ends(hooked.failure):
            self.checkpoints.finish()
            raise failed(hooked.failure, saved=True)

    def _wanted(self) -> bool:
        return self.stop.requested or self.tracker.stop_requested

    def _test(self, state: TrainState, values: dict[str, float]) -> None:
        """Add the measures of the test to `values`, unless all agree to abandon the test."""
        self.updates.look()  # a diverged model is neither tested nor saved
        try:
            values |= self._tested(state)
        except TestInterrupted:
            state.untested = {name: float(value) for name, value in values.items()}
        else:
            require_measured(self.plan.spec, values)

    def _tested(self, state: TrainState) -> dict[str, float]:
        task, world, plan = self.task, self.world, self.plan
        with state.evaluated(), self.updates.buffers_ignored():
            return test_each(
                state.tested,
                self.tests,
                task=task,
                plan=plan,
                world=world,
                step=state.step,
                over=self._leaving,
            )

    def _leaving(self, batches: Iterable[Batch], plan: Plan) -> Iterable[Batch]:
        """The micro-batches of a test set, until all agree to abandon the test."""
        batches = self.heartbeat.during("test", batches)
        return self.poll.within(batches, rounds=plan.test_rounds, wanted=self._wanted)

    def begin(self, state: TrainState) -> bool:
        """Test before the first step, if the spec says so; whether all stop in this test.

        It affects neither the best checkpoint nor the end of the run.
        """
        if state.step > 0 or not self.plan.spec.test.at_start or self.plan.test_rows == 0:
            return False
        try:
            values = self._tested(state)
        except TestInterrupted:
            return True
        require_measured(self.plan.spec, values)
        hooked = self.hooks.call(state, values, self.tests)
        self.heartbeat.enter("log")
        self.tracker.log(0, {**values, **hooked.values}, hooked.files)
        if self.hooks.ends(hooked.failure):
            raise failed(hooked.failure, saved=False)
        return False

    def _record(
        self, state: TrainState, values: dict[str, float], hooked: Hooked, *, saving: bool
    ) -> None:
        self.heartbeat.enter("log")
        if saving:
            self.updates.look()
        if values or saving or hooked.called:
            self.receipt.write(state.step)
        # One row per step: if the test is still due, the row is written after it.
        if (values or hooked.called) and state.untested is None:
            self.tracker.log(state.step, {**values, **hooked.values}, hooked.files)

    def _save(self, state: TrainState) -> None:
        self.heartbeat.enter("save")
        records = (self.tracker, self.receipt)
        self.checkpoints.save(state, records=records, seal=self.receipt.seal)
        self.heartbeat.write()
