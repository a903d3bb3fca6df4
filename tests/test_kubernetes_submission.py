"""Two submits of one run at once, and a submit that dies: one whole job, or one clear error."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest
from kubernetes_server import HANGS_UP, Answer, Cluster, Request, storing

from launch.engines.kubernetes import jobs, submission
from launch.engines.kubernetes.api import Api, ClusterError, ClusterUnreachable
from launch.engines.kubernetes.jobs import KINDS
from launch.engines.kubernetes.manifests import new_secret, render
from launch.engines.kubernetes.pod.pods import Manifest
from launch.engines.kubernetes.states import UNFINISHED, state
from launch.engines.kubernetes.targets import template_of
from service.basics.errors import EvenstepError, SpecError
from service.spec.models import Spec

NAME = "ddp-train"


class Submitter:
    """A person with credentials of their own, who submits the run with a block of addresses of
    their own."""

    def __init__(self, token: str, block: str, config: Path) -> None:
        self.block = block
        self.token = token
        content = json.loads(config.read_text())
        content["users"][0]["user"]["token"] = token
        config.write_text(json.dumps(content))
        self.api = Api(namespace=None, say=print)

    def manifests(self, target: str, *, queue: str | None = None) -> list[Manifest]:
        kubernetes = {"image": "registry.example.com/evenstep:0.1.0", "nodes": 2, "queue": queue}
        spec = Spec.model_validate(
            {
                "name": NAME,
                "task": "service.recipes.digits:task",
                "batch": {"global_batch": 96},
                "length": {"epochs": 2},
                "optimizer": {"name": "sgd", "lr": 0.1},
                "kubernetes": {**kubernetes, "egress": [self.block]},
            }
        )
        return render(spec, target=target, secret=new_secret())  # type: ignore[arg-type]

    def sent(self, request: Request) -> bool:
        return request.authorization == f"Bearer {self.token}"


class Submit:
    """One submit, in a thread of its own."""

    def __init__(self, who: Submitter, target: str) -> None:
        self.who = who
        self.objects = who.manifests(target)
        self.error: EvenstepError | None = None
        self.settled = threading.Event()
        """It has ended, or waits for the other."""
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            submission.submit(self.who.api, self.objects, say=self._hear)
        except EvenstepError as error:
            self.error = error
        finally:
            self.settled.set()

    def _hear(self, said: str) -> None:
        if "is being submitted by another command" in said:
            self.settled.set()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0.002)
    with storing(tmp_path / "config") as cluster:
        yield cluster


@pytest.fixture
def two(cluster: Cluster, tmp_path: Path) -> Iterator[tuple[Submitter, Submitter]]:
    first = Submitter("one", "10.1.0.0/16", tmp_path / "config")
    second = Submitter("two", "10.2.0.0/16", tmp_path / "config")
    with first.api, second.api:
        yield first, second


def require_whole(cluster: Cluster, target: str, objects: list[Manifest]) -> None:
    """The cluster has these objects, as one job that has started, and nothing else."""
    cluster.collect()
    made = {each["kind"]: each for each in cluster.objects.values()}
    rendered = {each["kind"]: each for each in objects}
    assert len(cluster.objects) == len(objects), sorted(cluster.objects)
    assert set(made) == set(rendered)
    work = made[KINDS[target]]
    assert work["metadata"]["name"] == NAME
    assert UNFINISHED not in work["metadata"]["annotations"]
    assert work["spec"]["suspend"] is False
    volumes = {each["name"]: each for each in template_of(list(made.values()))["spec"]["volumes"]}
    assert volumes["spec"]["configMap"]["name"] == made["ConfigMap"]["metadata"]["name"]
    assert volumes["meeting"]["secret"]["secretName"] == made["Secret"]["metadata"]["name"]
    if target == "kubeflow":
        runtime = made["TrainingRuntime"]["metadata"]["name"]
        assert work["spec"]["runtimeRef"]["name"] == runtime
    for kind in {"ConfigMap", "Secret", "TrainingRuntime"} & set(made):
        (owner,) = made[kind]["metadata"]["ownerReferences"]
        assert owner["uid"] == work["metadata"]["uid"]
    assert made["ConfigMap"]["data"] == rendered["ConfigMap"]["data"]
    assert made["Secret"]["data"] == rendered["Secret"]["data"]
    assert made["NetworkPolicy"]["spec"] == rendered["NetworkPolicy"]["spec"]


def number_of_requests(cluster: Cluster, who: Submitter, target: str) -> int:
    requests: list[Request] = []
    cluster.before = requests.append
    objects = who.manifests(target)
    submission.submit(who.api, objects, say=print)
    require_whole(cluster, target, objects)
    cluster.objects.clear()
    return len(requests)


@pytest.mark.parametrize("target", KINDS)
def test_of_two_submits_at_once_one_wins_whole(
    cluster: Cluster, two: tuple[Submitter, Submitter], target: str
) -> None:
    """The first pauses before its n-th request until the second has ended or waits for it."""
    for pause in range(number_of_requests(cluster, two[0], target)):
        first, second = (Submit(who, target) for who in two)
        number = itertools.count()

        def meet(request: Request) -> None:
            if first.who.sent(request) and next(number) == pause:  # noqa: B023
                second.start()  # noqa: B023
                second.settled.wait(60)  # noqa: B023

        cluster.before = meet
        first.start()
        first.end()
        second.end()
        winner, loser = (first, second) if second.error else (second, first)
        assert winner.error is None, (pause, winner.error)
        assert isinstance(loser.error, SpecError), (pause, loser.error)
        assert "or give this run its own --name." in str(loser.error)
        require_whole(cluster, target, winner.objects)
        cluster.objects.clear()


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_next_submit_replaces_what_a_dead_one_left(
    cluster: Cluster,
    two: tuple[Submitter, Submitter],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    moment: str,
) -> None:
    """The first hears nothing from its n-th request on, which has had its effect or not."""
    requests = number_of_requests(cluster, two[0], target)
    monkeypatch.setattr(submission, "_UNFINISHED_SECONDS", 0.01)
    for death in range(1, requests):
        first, second = (Submit(who, target) for who in two)
        number = itertools.count(1 if moment == "after" else 0)

        def cut(request: Request) -> Answer | None:
            if first.who.sent(request) and next(number) >= death:  # noqa: B023
                return HANGS_UP
            return None

        cluster.before = (lambda request: None) if moment == "after" else cut
        cluster.after = cut if moment == "after" else lambda request: None
        first.start()
        first.end()
        assert isinstance(first.error, ClusterUnreachable)
        second.start()
        second.end()
        assert second.error is None, (death, second.error)
        require_whole(cluster, target, second.objects)
        cluster.objects.clear()


@pytest.mark.parametrize("target", KINDS)
def test_a_submit_that_was_replaced_changes_nothing_any_more(
    cluster: Cluster,
    two: tuple[Submitter, Submitter],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    """The first is stopped after its n-th request for longer than it may take."""
    requests = number_of_requests(cluster, two[0], target)
    monkeypatch.setattr(submission, "_UNFINISHED_SECONDS", 0.01)
    stopped = [0.0]
    monkeypatch.setattr(submission, "monotonic", lambda: monotonic() + sum(stopped))
    for stop in range(2, requests):
        first, second = (Submit(who, target) for who in two)
        number = itertools.count(1)

        def freeze(request: Request) -> None:
            if first.who.sent(request) and next(number) == stop:  # noqa: B023
                stopped.append(60.0)
                second.start()  # noqa: B023
                second.end()  # noqa: B023

        cluster.after = freeze
        first.start()
        first.end()
        assert second.error is None, (stop, second.error)
        assert isinstance(first.error, ClusterError | SpecError), (stop, first.error)
        require_whole(cluster, target, second.objects)
        cluster.objects.clear()


def test_a_job_that_is_cancelled_during_its_submit_is_not_started(
    cluster: Cluster, two: tuple[Submitter, Submitter]
) -> None:
    who, other = two

    def cancel(request: Request) -> None:
        if request.path.endswith(f"/services/{NAME}"):
            jobs.cancel(other.api, "Job", NAME)

    cluster.after = cancel
    with pytest.raises(ClusterError, match="was deleted by another command during its submit"):
        submission.submit(who.api, who.manifests("job"), say=print)
    cluster.collect()
    assert not {"jobs", "secrets", "configmaps"} & {kind for kind, _ in cluster.objects}


@pytest.mark.parametrize("target", KINDS)
def test_a_refused_submit_leaves_no_job(
    cluster: Cluster, two: tuple[Submitter, Submitter], target: str
) -> None:
    forbidden = Answer(403, {"kind": "Status", "code": 403, "message": "exceeded quota: team"})
    cluster.before = lambda request: forbidden if "/secrets/" in request.path else None
    with pytest.raises(ClusterError, match="exceeded quota: team"):
        submission.submit(two[0].api, two[0].manifests(target), say=print)
    cluster.collect()
    left = {kind for kind, _ in cluster.objects}
    assert not {"jobs", "jobsets", "trainjobs", "trainingruntimes", "configmaps"} & left


def test_a_queue_starts_its_job_by_itself(
    cluster: Cluster, two: tuple[Submitter, Submitter]
) -> None:
    submission.submit(two[0].api, two[0].manifests("job", queue="training"), say=print)
    work = cluster.objects["jobs", NAME]
    assert work["spec"]["suspend"] is True
    assert UNFINISHED not in work["metadata"]["annotations"]


def test_status_tells_of_a_job_whose_submit_is_not_finished(
    cluster: Cluster, two: tuple[Submitter, Submitter]
) -> None:
    who = two[0]
    cluster.before = lambda request: HANGS_UP if "/secrets/" in request.path else None
    said: list[str] = []
    with pytest.raises(ClusterUnreachable):
        submission.submit(who.api, who.manifests("job"), say=said.append)
    assert said == [], "it could still delete the job"
    cut = itertools.count()
    cluster.before = lambda request: HANGS_UP if next(cut) > 1 else None
    with pytest.raises(ClusterUnreachable):
        submission.submit(who.api, who.manifests("job"), say=said.append)
    (told,) = said
    assert told.startswith(f"The unfinished Job {NAME} was not deleted: ")
    assert told.endswith("The next submit deletes it.")
    assert state(cluster.objects["jobs", NAME]).startswith("being submitted")
