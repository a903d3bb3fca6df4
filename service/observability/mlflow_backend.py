"""The backend of MLflow: a run on a tracking server, or in a local database."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from service.observability.background_writer import TrackerBackend
from service.runs.tracking import LoggedFile, Outcome
from service.spec.models import MLflowSpec

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

# So that a server that does not answer is given up within the time that the end of a run has.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_RUN = "evenstep.run"
"""The tag by which the next attempt finds the run again; the server chooses the run's own id."""
_CHANGED = "evenstep.changed."
_STATUS: Mapping[Outcome, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST_PARAMETER = 6000  # characters, of a value
_PARAMETERS_AT_ONCE = 100  # and the metrics: 1,000
_METRICS_AT_ONCE = 1000
_NOT_IN_A_KEY = re.compile(r"[^\w. /-]")


class MLflow(TrackerBackend):
    """One run of MLflow, the same in every attempt."""

    def __init__(self, client: MlflowClient, run_id: str, *, held_step: int) -> None:
        self._client = client
        self._run_id = run_id
        self.held_step = held_step

    @classmethod
    def open(cls, spec: MLflowSpec, *, run: str, name: str, config: Mapping[str, Any]) -> Self:
        """Create the run, or resume the one of an earlier attempt.

        Args:
            run: the id of the run, the same in every attempt.
            config: what MLflow shows as the run's parameters.
        """
        for variable, value in _SETTINGS.items():
            os.environ.setdefault(variable, value)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(spec.uri)
        experiment = _experiment(client, spec.experiment)
        tag = run.replace("'", "")
        found = client.search_runs([experiment], f"tags.`{_RUN}` = '{tag}'", max_results=1)
        if found:
            opened = found[0]
            client.update_run(opened.info.run_id, status="RUNNING")
        else:
            opened = client.create_run(experiment, run_name=name, tags={_RUN: tag})
        _log_parameters(client, opened, dict(_flat(config)))
        # The latest value of each metric, which has its step, as the server tells it.
        steps = [int(metric.step) for metric in opened.data._metric_objs]
        return cls(client, opened.info.run_id, held_step=max(steps, default=-1))

    def put(
        self,
        step: int,
        time: float,
        values: Mapping[str, float],
        files: Sequence[LoggedFile],
    ) -> None:
        from mlflow.entities import Metric

        moment = int(time * 1000)
        metrics = [Metric(key_of(key), value, moment, step) for key, value in values.items()]
        for file in files:  # first: a row that the run holds has its files
            if file.path.is_file():
                folder = _folder(file)
                self._client.log_artifact(self._run_id, str(file.path), artifact_path=folder)
        for at in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self._run_id, metrics=metrics[at : at + _METRICS_AT_ONCE])

    def close(self, outcome: Outcome) -> None:
        self._client.set_terminated(self._run_id, status=_STATUS[outcome])


def key_of(key: str) -> str:
    """The key as MLflow accepts it: other characters become `_`."""
    return _NOT_IN_A_KEY.sub("_", key)


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name, which is created if there is none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run has just created it
            if found is None:
                raise
    return str(found.experiment_id)


def _log_parameters(client: MlflowClient, run: Run, wanted: Mapping[str, str]) -> None:
    """Log the parameters; what was changed of a run is a tag, as a parameter never changes."""
    from mlflow.entities import Param

    held, run_id = run.data.params, run.info.run_id
    new = [Param(key, value) for key, value in wanted.items() if key not in held]
    for at in range(0, len(new), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=new[at : at + _PARAMETERS_AT_ONCE])
    for key, value in wanted.items():
        if held.get(key, value) != value:
            client.set_tag(run_id, f"{_CHANGED}{key}", value)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a configuration by its dotted key, as text; without what is not given."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if key or name != "git":  # of git the commit alone: a diff is no parameter
                yield from _flat(inner, f"{key}.{name}" if key else str(name))
            else:
                yield from _flat({"commit": inner.get("commit")}, "git")
    elif value is not None:
        text = str(value)
        if len(text) > _LONGEST_PARAMETER:
            text = f"{text[: _LONGEST_PARAMETER - 3]}..."
        yield key_of(key), text


def _folder(file: LoggedFile) -> str:
    """Where the file lies among the artifacts: as in the run's own directory `logged`."""
    parts = file.path.parts
    place = len(parts) - 1 - parts[::-1].index("logged") if "logged" in parts else len(parts) - 2
    return "/".join(parts[place:-1])
