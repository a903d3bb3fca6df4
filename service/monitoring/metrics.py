"""The metrics of a launcher: their names, what they mean, and their values in a snapshot.

`python -m service.monitoring.metrics` writes their table into the page of metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from service.health.heartbeat import ORDER
from service.monitoring.snapshot import Snapshot

Kind = Literal["gauge", "counter"]
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
_BEGIN = "<!-- metrics: python -m service.monitoring.metrics -->\n"
_END = "\n<!-- /metrics -->"
STATES = ("new", "running", "done", "stopped", "failed", "gave up", "lost")


class Metric(NamedTuple):
    """One metric, as OpenMetrics describes it."""

    name: str
    """Of a counter without `_total`, which the format adds."""
    kind: Kind
    labels: tuple[str, ...]
    about: str

    @property
    def sample(self) -> str:
        """The name by which a query asks for it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


class Value(NamedTuple):
    """The value of one metric for one set of labels."""

    name: str
    labels: Mapping[str, str]
    value: float


# Keys of metrics.jsonl whose latest value is a metric, the factor to the base unit, and the text.
_LATEST: Mapping[str, tuple[str, float, str]] = {
    "train/loss": ("evenstep_train_loss", 1, "Loss of the last logged step."),
    "train/grad_norm": ("evenstep_gradient_norm", 1, "Norm of all gradients of that step."),
    "train/rows_per_second": ("evenstep_rows_per_second", 1, "Rows trained a second, in all."),
    "train/weight_per_second": (
        "evenstep_weight_per_second",
        1,
        "Weight of these rows, where the task gives weights: for text, tokens a second.",
    ),
    "train/data_wait": ("evenstep_data_wait_ratio", 1, "Part of the time rank 0 waited for data."),
    "system/peak_memory_gib": (
        "evenstep_peak_memory_bytes",
        2**30,
        "Largest peak memory of any process: of its GPU, or of main memory on CPUs.",
    ),
    "system/tflops": ("evenstep_flops_per_second", 1e12, "Floating-point operations a second."),
    "system/flop_utilization": (
        "evenstep_flop_utilization_ratio",
        1,
        "The same, divided by the peak of the devices.",
    ),
    "system/slowest_rank": ("evenstep_slowest_rank", 1, "The rank that the others wait for."),
    "system/slowest_ratio": (
        "evenstep_slowest_rank_ratio",
        1,
        "Its time for a pass, divided by the median of the others.",
    ),
    "save/stall_seconds": (
        "evenstep_save_stall_seconds",
        1,
        "Time for which the last checkpoint stopped training.",
    ),
    "save/durable_seconds": (
        "evenstep_save_durable_seconds",
        1,
        "Time until the last checkpoint was on disk.",
    ),
    "save/failures": ("evenstep_save_failures", 1, "Checkpoints that could not be written."),
}
_OF_A_RUN = ("run",)
_OF_A_RANK = ("run", "rank", "host")

METRICS: tuple[Metric, ...] = (
    Metric("evenstep_state", "gauge", ("run", "state"), "1 for the state the run is in, else 0."),
    Metric("evenstep_step", "gauge", _OF_A_RUN, "Optimizer steps finished."),
    Metric("evenstep_steps", "gauge", _OF_A_RUN, "Steps of the whole run."),
    Metric("evenstep_epoch", "gauge", _OF_A_RUN, "Passes over the training rows, at the last row."),
    *(Metric(name, "gauge", _OF_A_RUN, about) for name, _, about in _LATEST.values()),
    Metric("evenstep_learning_rate", "gauge", ("run", "group"), "Of each parameter group."),
    Metric("evenstep_test", "gauge", ("run", "measure"), "Latest value of each test measure."),
    Metric(
        "evenstep_last_row_timestamp_seconds",
        "gauge",
        _OF_A_RUN,
        "When the last row of metrics.jsonl was written, since 1970.",
    ),
    Metric("evenstep_goodput_ratio", "gauge", _OF_A_RUN, "Time of steps that count, of all time."),
    Metric("evenstep_restarts", "counter", _OF_A_RUN, "Attempts at this run after the first."),
    Metric("evenstep_rank_step", "gauge", _OF_A_RANK, "Optimizer steps that this rank finished."),
    Metric(
        "evenstep_rank_heartbeat_timestamp_seconds",
        "gauge",
        _OF_A_RANK,
        "When its hang watch last wrote its heartbeat, since 1970.",
    ),
    Metric(
        "evenstep_rank_standing_seconds",
        "gauge",
        _OF_A_RANK,
        "For how long it had made no progress then.",
    ),
    Metric(
        "evenstep_rank_work",
        "gauge",
        (*_OF_A_RANK, "work"),
        "1 for the kind of work it is at, else 0.",
    ),
    Metric(
        "evenstep_rank_work_seconds",
        "counter",
        (*_OF_A_RANK, "work"),
        "Seconds that it spent on each kind of work in this attempt.",
    ),
    Metric("evenstep_rank_collectives", "counter", _OF_A_RANK, "Collectives that it has begun."),
    Metric("evenstep_rank_memory_bytes", "gauge", _OF_A_RANK, "Main memory that it holds now."),
    Metric(
        "evenstep_rank_longest_save_seconds",
        "gauge",
        _OF_A_RANK,
        "The longest save of this attempt, from its start to the checkpoint on disk.",
    ),
    Metric("evenstep_healthy", "gauge", _OF_A_RUN, "1 if /healthz answers with 200, else 0."),
)


def values(snapshot: Snapshot, *, healthy: bool) -> Iterator[Value]:
    """Every value that the snapshot knows."""
    run = {"run": snapshot.name}
    yield Value("evenstep_healthy", run, float(healthy))
    yield from _of_the_run(snapshot, run)
    for key, value in snapshot.latest.items():
        if key in _LATEST:
            name, factor, _ = _LATEST[key]
            yield Value(name, run, value * factor)
        elif key == "train/lr" or key.startswith("train/lr/"):
            group = key.removeprefix("train/lr").removeprefix("/")
            yield Value("evenstep_learning_rate", {**run, "group": group or "all"}, value)
        elif key.startswith("test/"):
            yield Value("evenstep_test", {**run, "measure": key.removeprefix("test/")}, value)
    for rank in snapshot.beats:
        yield from _of_a_rank(snapshot, rank, run)


def _of_the_run(snapshot: Snapshot, run: Mapping[str, str]) -> Iterator[Value]:
    history, latest = snapshot.history, snapshot.latest
    if history is None:
        return
    for state in dict.fromkeys((*STATES, history.state)):
        yield Value("evenstep_state", {**run, "state": state}, float(state == history.state))
    beat = snapshot.beats.get(0, {})
    yield Value("evenstep_step", run, max(float(beat.get("step", 0)), latest.get("step", 0.0)))
    steps = history.steps_at(latest)
    if steps is not None:
        yield Value("evenstep_steps", run, float(steps))
    if "epoch" in latest:
        yield Value("evenstep_epoch", run, latest["epoch"])
    if "time" in latest:
        yield Value("evenstep_last_row_timestamp_seconds", run, latest["time"])
    if snapshot.goodput is not None:
        yield Value("evenstep_goodput_ratio", run, snapshot.goodput)
    yield Value("evenstep_restarts", run, float(max(0, len(history.attempts) - 1)))


def _of_a_rank(snapshot: Snapshot, rank: int, run: Mapping[str, str]) -> Iterator[Value]:
    beat = snapshot.beats[rank]
    labels = {**run, "rank": str(rank), "host": str(beat.get("host", ""))}
    for name, key in (
        ("step", "step"),
        ("heartbeat_timestamp_seconds", "time"),
        ("standing_seconds", "standing_seconds"),
        ("longest_save_seconds", "longest_save_seconds"),
        ("collectives", "collectives"),
    ):
        if isinstance(beat.get(key), int | float):
            yield Value(f"evenstep_rank_{name}", labels, float(beat[key]))
    for work in ORDER:
        at_it = float(beat.get("work") == work)
        yield Value("evenstep_rank_work", {**labels, "work": work}, at_it)
    for work, seconds in beat["seconds"].items():
        if work in ORDER and isinstance(seconds, int | float):
            yield Value("evenstep_rank_work_seconds", {**labels, "work": work}, float(seconds))
    if rank in snapshot.memory:
        yield Value("evenstep_rank_memory_bytes", labels, float(snapshot.memory[rank]))


def table() -> str:
    """Every metric: its name in a query, its kind, its labels, what it is."""
    lines = ["| metric | kind | labels | what it is |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.sample}` | {metric.kind} | {labels} | {metric.about} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page with the table between its two marks made anew."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin, f"{PAGE} has no mark {_BEGIN.strip()}"
    assert end, f"{PAGE} has no mark {_END.strip()}"
    return f"{before}{begin}{table()}{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
