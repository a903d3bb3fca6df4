"""The pods of a rendered Job, running: two nodes of two processes, and what can happen to them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import containers
import pod_processes
import pytest
import torch
from commands import evenstep
from elastic_pods import attempts_by_processes, elastic_job, lose, release, require_run_of_one_pod
from engines import Engine
from pod_containers import Podman
from pod_processes import Namespaces
from pods import Cluster, as_its_controllers_make_it
from safetensors.torch import load_file

from launch.engines.kubernetes.manifests import Target, new_secret, render
from service.recipes import find_recipe
from service.runs.tracking import read_metrics
from service.spec.files import load_spec

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("pods")]
STEPS = 60
OVERRIDES = (
    f"length={{steps: {STEPS}}}",
    "schedule={name: cosine, warmup_steps: 5}",
    "checkpoint={every_steps: 10, keep: 2}",
    "tracking={log_every_steps: 2}",
    "faults={stop_poll_steps: 2}",
    "test={every_steps: 30}",
    "exactness=bitwise",
)
CLUSTER = {"nodes": 2, "processes_per_node": 2, "device": "cpu"} | {
    "image": containers.IMAGE,
    "cpu": "2",
    "memory": "3Gi",
    "shared_memory": "64Mi",
    "env": {"WANDB_MODE": "offline"},
}


def chosen() -> str:
    """Real containers of the real image where they run, else plain processes in namespaces.

    The variable chooses: EVENSTEP_PODS=processes make test-slow
    """
    default = "processes" if containers.why_not() else "containers"
    return os.environ.get("EVENSTEP_PODS", default)


@pytest.fixture(scope="module")
def pods(request: pytest.FixtureRequest) -> None:
    """Pods can run here, and the image of the containers is built."""
    if chosen() == "containers":
        request.getfixturevalue("image")
    elif pod_processes.why_not() is not None:
        pytest.skip(f"processes cannot run here: {pod_processes.why_not()}")


def new_engine() -> Engine:
    return Podman() if chosen() == "containers" else Namespaces()


def start(directory: Path, *overrides: str, target: Target = "job", **cluster: Any) -> Cluster:
    section = json.dumps(CLUSTER | cluster)
    words = (*OVERRIDES, f"kubernetes={section}", *overrides)
    spec = load_spec(find_recipe("digits"), overrides=words)
    objects = render(spec, target=target, secret=new_secret())
    if target != "job":
        objects = as_its_controllers_make_it(objects)
    return Cluster(objects, directory, new_engine())


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / f"digits/checkpoints/step-{STEPS:08d}/model.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def once_at(step: int, act: Callable[[Cluster], None]) -> Callable[[Cluster], None]:
    """Do it the first time that the run has recorded this step."""
    acted = False

    def each(cluster: Cluster) -> None:
        nonlocal acted
        if not acted and cluster.step() >= step:
            acted = True
            act(cluster)

    return each


@pytest.fixture(scope="module")
def undisturbed(pods: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with start(tmp_path_factory.mktemp("undisturbed") / "job") as cluster:
        assert cluster.run(seconds=400) == "Complete", cluster.logs()
        yield cluster


def test_two_pods_of_two_processes_train_what_one_process_trains(
    undisturbed: Cluster, tmp_path: Path
) -> None:
    assert sorted(undisturbed.ended) == [(0, 0, "Complete"), (1, 0, "Complete")]
    assert "4 processes on cpu" in undisturbed.pods[0].log
    alone = evenstep("run", "digits", *OVERRIDES, cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert same_bits(weights(tmp_path / "runs"), weights(undisturbed.runs))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["jobset", "kubeflow"])
def test_the_pods_of_another_target_find_each_other_and_train_the_same(
    undisturbed: Cluster, tmp_path: Path, target: Target
) -> None:
    with start(tmp_path / "job", target=target) as cluster:
        assert cluster.run(seconds=400) == "Complete", cluster.logs()
        assert "rendezvous at digits-node-0-0.digits:29500" in cluster.logs()
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


def test_what_a_pod_may_and_may_not(undisturbed: Cluster) -> None:
    run = undisturbed.runs / "digits"
    assert run.stat().st_uid == 10001, "it ran as the manifest's user"
    assert not list(undisturbed.directory.glob("pod-*/root/*")), "and its root is gone with it"
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_killed_worker_pod_is_replaced_and_the_run_ends_in_the_same_bits(
    undisturbed: Cluster, tmp_path: Path
) -> None:
    with start(tmp_path / "job") as cluster:
        ended = cluster.run(seconds=400, each=once_at(24, lambda c: c.kill(1)))
        assert ended == "Complete", cluster.logs()
        assert (1, 137, "Count") in cluster.ended, cluster.ended
        assert (0, 76, "Ignore") in cluster.ended, cluster.ended
        assert "Resuming after step" in cluster.logs()
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


def test_a_killed_index_0_is_replaced_and_the_run_ends_in_the_same_bits(
    undisturbed: Cluster, tmp_path: Path
) -> None:
    with start(tmp_path / "job") as cluster:
        ended = cluster.run(seconds=400, each=once_at(24, lambda c: c.kill(0)))
        assert ended == "Complete", cluster.logs()
        assert (0, 137, "Count") in cluster.ended, cluster.ended
        assert (1, 76, "Ignore") in cluster.ended, cluster.ended
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


@pytest.mark.slow
def test_a_node_whose_processes_notice_nothing_leaves_all_the_same(
    undisturbed: Cluster, tmp_path: Path
) -> None:
    def freeze_and_kill(cluster: Cluster) -> None:
        cluster.freeze(1)  # as a GPU library does that waits for a peer
        cluster.kill(0)

    with start(tmp_path / "job") as cluster:
        ended = cluster.run(seconds=400, each=once_at(24, freeze_and_kill))
        assert ended == "Complete", cluster.logs()
        assert (1, 76, "Ignore") in cluster.ended, cluster.ended
        assert "Node 0 (digits-0.digits) is gone." in cluster.logs()
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


@pytest.mark.slow
@pytest.mark.parametrize("indexes", [(1,), (0,), (0, 1)], ids=["worker", "index 0", "all"])
def test_an_evicted_pod_saves_and_the_run_continues(
    undisturbed: Cluster, tmp_path: Path, indexes: tuple[int, ...]
) -> None:
    def evict(cluster: Cluster) -> None:
        for index in indexes:
            cluster.stop(index, disruption=True)

    with start(tmp_path / "job") as cluster:
        ended = cluster.run(seconds=400, each=once_at(24, evict))
        assert ended == "Complete", cluster.logs()
        assert sorted(cluster.ended[:2]) == [(0, 75, "Ignore"), (1, 75, "Ignore")], cluster.logs()
        assert cluster.failures == [0, 0], "no budget is spent on it"
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


@pytest.mark.slow
def test_a_job_that_its_queue_suspends_saves_and_continues_later(
    undisturbed: Cluster, tmp_path: Path
) -> None:
    suspended_at = 0

    def each(cluster: Cluster) -> None:
        nonlocal suspended_at
        if not suspended_at and cluster.step() >= 24:
            cluster.suspend()
            suspended_at = cluster.step()
        if cluster.suspended and not cluster.running:
            assert not (cluster.runs / "digits/checkpoints/step-00000060").exists()
            cluster.resume()

    with start(tmp_path / "job") as cluster:
        assert cluster.run(seconds=400, each=each) == "Complete", cluster.logs()
        assert sorted(cluster.ended[:2]) == [(0, 75, "deleted"), (1, 75, "deleted")]
        assert "Resuming after step" in cluster.pods[2].log + cluster.pods[3].log
        assert cluster.failures == [0, 0]
        assert same_bits(weights(cluster.runs), weights(undisturbed.runs))


def test_a_pod_that_comes_late_finds_the_run_done(undisturbed: Cluster) -> None:
    undisturbed.condition, undisturbed.done = None, {0}
    undisturbed.due = {1: 0.0}
    assert undisturbed.run(seconds=200) == "Complete", undisturbed.logs()
    assert undisturbed.ended[-1] == (1, 0, "Complete")
    assert "Nothing to do" in undisturbed.pods[-1].log


def test_a_mistake_in_the_spec_fails_the_job_immediately(tmp_path: Path) -> None:
    with start(tmp_path / "job", "task=service.recipes.digits:tusk") as cluster:
        assert cluster.run(seconds=300) == "Failed: PodFailurePolicy", cluster.logs()
        assert cluster.ended[0][1:] == (64, "FailJob"), cluster.logs()
        assert "has no 'tusk'; did you mean 'task'" in cluster.logs()
        assert not (cluster.runs / "digits").exists(), "nothing half-written"


def test_an_interface_that_a_pod_does_not_have_fails_the_job_immediately(tmp_path: Path) -> None:
    with start(tmp_path / "job", env={"GLOO_SOCKET_IFNAME": "eth77"}) as cluster:
        assert cluster.run(seconds=300) == "Failed: PodFailurePolicy", cluster.logs()
        assert "GLOO_SOCKET_IFNAME=eth77: this machine has no such network" in cluster.logs()
        assert "eth0, lo. Without it" in cluster.logs()


def test_elastic_pods_are_lost_drained_and_return_and_no_step_is_lost_or_different(
    tmp_path: Path,
) -> None:
    """The machine of one pod is lost, another is drained, and then that of index 0 is lost."""

    def lose_late(cluster: Cluster) -> None:
        cluster.backoff = 1.0  # its machine is away for 10 s
        lose(cluster, 2)

    events: list[tuple[int, Callable[[Cluster], None]]] = [  # the number of nodes, and then
        (3, lose_late),
        (3, lambda c: c.stop(1, disruption=True)),
        (1, lambda c: lose(c, 0)),
        (1, release),
    ]
    seen, since = (0, 0), 0

    def each(cluster: Cluster) -> None:
        """Each in a later generation of so many nodes or more, after steps with a checkpoint."""
        nonlocal seen, since
        leader = cluster.running.get(0)
        begun = re.findall(r"Generation (\d+): (\d) of", leader.log) if leader else []
        if not events or leader is None or not begun:
            return
        generation, nodes = map(int, begun[-1])
        if (leader.attempt, generation) <= seen or nodes < events[0][0]:
            since = cluster.step()
        elif cluster.step() > since + 5:
            seen = leader.attempt, generation
            events.pop(0)[1](cluster)

    with elastic_job(tmp_path / "job", new_engine(), most=3, steps=240, bitwise=False) as cluster:
        assert cluster.run(seconds=400, each=each) == "Complete", cluster.logs()
    assert not events, cluster.logs()
    assert [code for index, code, _ in cluster.ended if index == 0] == [137, 0], cluster.ended
    assert {(2, 137, "Ignore"), (1, 75, "Ignore")} <= {*cluster.ended}, cluster.ended
    assert len(attempts_by_processes(cluster)) > 1, "as many nodes as there were"
    require_run_of_one_pod(cluster, tmp_path / "alone", new_engine, steps=240, bitwise=False)


@pytest.mark.slow
def test_nodes_that_are_lost_again_and_again_end_the_job_when_nothing_is_gained(
    tmp_path: Path,
) -> None:
    """No exit code of it counts: not that of a lost machine, and not that of its peer."""
    trains = once_every_attempt(lambda c: lose(c, 1), sign="processes on cpu", node=0)
    with start(tmp_path / "job", "checkpoint.every_steps=1000") as cluster:
        ended = cluster.run(seconds=600, each=trains)
        assert ended == "Failed: PodFailurePolicy", cluster.logs()
        assert cluster.failures == [0, 0], "nothing was counted"
        assert (1, 137, "Ignore") in cluster.ended
        assert 42 in {code for _, code, _ in cluster.ended}, cluster.ended
        assert "3 consecutive attempts failed without a new checkpoint" in cluster.logs()


@pytest.mark.slow
def test_a_crash_that_comes_again_ends_the_job_when_its_budget_is_spent(tmp_path: Path) -> None:
    crash = once_every_attempt(lambda c: c.kill(1))
    with start(tmp_path / "job", restarts=1) as cluster:
        ended = cluster.run(seconds=400, each=crash)
        assert ended == "Failed: MaxFailedIndexesExceeded", cluster.logs()
        assert cluster.failures[1] == 2


def once_every_attempt(
    act: Callable[[Cluster], None], *, sign: str = "rendezvous at", node: int = 1
) -> Callable[[Cluster], None]:
    """Do it once in every attempt, when a node's log shows the sign."""
    acted: set[int] = set()

    def each(cluster: Cluster) -> None:
        pod = cluster.running.get(node)
        if pod is None or 1 not in cluster.running or pod.attempt in acted:
            return
        if sign in pod.log:
            acted.add(pod.attempt)
            act(cluster)

    return each


@pytest.mark.slow
def test_pods_without_a_service_say_which_name_is_missing(tmp_path: Path) -> None:
    with start(tmp_path / "job", meeting_seconds=12) as cluster:
        cluster.service = None

        def give_up(cluster: Cluster) -> None:
            if any(index == 1 for index, _, _ in cluster.ended):
                cluster.condition = "as far as this test goes"

        cluster.run(seconds=200, each=give_up)
        assert (1, 76, "Ignore") in cluster.ended, cluster.logs()
        log = next(pod.log for pod in cluster.pods if pod.index == 1)
        assert "name digits-0.digits cannot be resolved" in log
        assert "headless Service" in log
