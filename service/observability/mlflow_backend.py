"""The backend of MLflow: a run on a tracking server, or in a local database."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from service.observability.background_writer import TrackerBackend
from service.runs.tracking import LoggedFile, Outcome
from service.spec.models import MLflowSpec

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

# So that a server that does not answer is given up within the time that the end of a run has.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 10,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1,
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": 1,
}
_is_ours: ContextVar[bool] = ContextVar("_is_ours", default=False)
"""Whether this thread is the one that logs for us."""
_RUN = "evenstep.run"
"""The tag by which the next attempt finds the run again; the server chooses the run's own id."""
_CHANGED = "evenstep.changed."
_STATUS: Mapping[Outcome, str] = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_LONGEST_KEY = 250
_LONGEST_PARAMETER = 6000  # characters, of a value
_LONGEST_TAG = 5000  # in servers before MLflow 2.13; then 8000
_NOT_GIVEN = "(not given)"
_PARAMETERS_AT_ONCE = 100  # and the metrics: 1,000
_METRICS_AT_ONCE = 1000
_NOT_IN_A_KEY = re.compile(r"[^\w. /-]")
_DIGEST_CHARACTERS = 8


class MLflow(TrackerBackend):
    """One run of MLflow, the same in every attempt."""

    def __init__(self, client: MlflowClient, run_id: str, *, held_step: int) -> None:
        self._client = client
        self._run_id = run_id
        self.held_step = held_step

    @classmethod
    def open(
        cls,
        spec: MLflowSpec,
        *,
        run: str,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> Self:
        """Create the run, or resume the one of an earlier attempt.

        Args:
            run: the id of the run, the same in every attempt.
            config: what MLflow shows as the run's parameters.
        """
        # A task that uses MLflow itself sends its maker no more than without us.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        _limit_this_thread()
        client = MlflowClient(spec.uri)
        experiment = _experiment(client, spec.experiment)
        tag = run.replace("'", "")
        found = client.search_runs([experiment], f"tags.`{_RUN}` = '{tag}'", max_results=1)
        if found:
            opened = found[0]
            client.update_run(opened.info.run_id, status="RUNNING")
        else:
            opened = client.create_run(experiment, run_name=name, tags={_RUN: tag})
        try:
            _log_parameters(client, opened, config)
        except MlflowException as error:  # such as a limit of this server; the rows matter more
            words = " ".join(str(error).split())[:200]
            say(f"MLflow lacks some parameters of the run: {words}")
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


def _limit_this_thread() -> None:
    """Let the requests of this thread end within `_LIMITS`, unless the user has set other limits.

    MLflow has them only as variables of the process, which would then hold for a task that uses
    MLflow itself, in its own threads and its loader's workers.
    """
    from mlflow import environment_variables

    _is_ours.set(True)
    for name, limit in _LIMITS.items():
        variable = getattr(environment_variables, name)
        if not isinstance(variable.get, partial):  # of an earlier run of this process
            variable.get = partial(_limit, variable.get, variable.is_set, limit)


def _limit(get: Callable[[], object], is_set: Callable[[], bool], limit: int) -> object:
    return limit if _is_ours.get() and not is_set() else get()


def key_of(key: str, *, most: int = _LONGEST_KEY) -> str:
    """The key as MLflow accepts it: other characters become `_`.

    A key that had to be changed ends with a digest of itself, so that two keys never become one.
    """
    accepted = _NOT_IN_A_KEY.sub("_", key)
    is_plain = posixpath.normpath(key) == key and not key.startswith(("/", "."))
    if accepted == key and is_plain and len(key) <= most:
        return key
    digest = sha256(key.encode(errors="backslashreplace")).hexdigest()[:_DIGEST_CHARACTERS]
    kept = "/".join(part for part in accepted.split("/") if part.strip("."))
    return f"{kept[: most - _DIGEST_CHARACTERS - 1]}-{digest}"


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


def _log_parameters(client: MlflowClient, run: Run, config: Mapping[str, Any]) -> None:
    """Log the parameters; what differs from the first attempt is a tag, as they never change."""
    from mlflow.entities import Param, RunTag

    wanted = {key_of(key): text for key, text in _flat(config)}
    held, run_id = run.data.params, run.info.run_id
    new = [
        Param(key, _cut(text, _LONGEST_PARAMETER))
        for key, text in wanted.items()
        if key not in held
    ]
    for at in range(0, len(new), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=new[at : at + _PARAMETERS_AT_ONCE])
    changed = {
        key: wanted.get(key, _NOT_GIVEN)
        for key, value in held.items()
        if _cut(wanted.get(key, _NOT_GIVEN), _LONGEST_PARAMETER) != value
        and (key in wanted or key.partition(".")[0] in config)  # others were logged by the task
    }
    most = _LONGEST_KEY - len(_CHANGED)
    tags = {f"{_CHANGED}{key_of(k, most=most)}": _cut(v, _LONGEST_TAG) for k, v in changed.items()}
    before = {key: value for key, value in run.data.tags.items() if key.startswith(_CHANGED)}
    for tag in before.keys() - tags.keys():  # it is again as in the first attempt
        client.delete_tag(run_id, tag)
    added = [RunTag(key, value) for key, value in tags.items() if before.get(key) != value]
    for at in range(0, len(added), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, tags=added[at : at + _PARAMETERS_AT_ONCE])


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every value of a configuration by its dotted key, as text; without what is not given."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not key and name == "git":  # of git the commit alone: a diff is no parameter
                yield from _flat({"commit": inner.get("commit")}, "git")
                continue
            part = f'"{name}"' if "." in str(name) else str(name)
            yield from _flat(inner, f"{key}.{part}" if key else part)
    elif value is not None:
        yield key, str(value)


def _folder(file: LoggedFile) -> str:
    """Where the file lies among the artifacts: as in the run's own directory `logged`."""
    parts = file.path.parts
    place = len(parts) - 1 - parts[::-1].index("logged") if "logged" in parts else len(parts) - 2
    return "/".join(parts[place:-1])
