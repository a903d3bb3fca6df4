"""An elastic job: real launchers come, are killed and return; rows and losses stay the same."""

from __future__ import annotations

import errno
import json
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its wheel has no types
import pytest
from elastic_nodes import elastic_nodes, ended, require_undisturbed
from injuring import until
from test_kubernetes_manifests import IN_A_BUCKET, job, of_kind, pod_of

from launch.engines.kubernetes.manifests import render
from launch.environment import node_here, range_of_nodes
from launch.nodes.elastic import Roster, _LateJoins, _LocalNode, possible_nodes
from launch.nodes.handshake import JoinRequest
from launch.nodes.node_part import DETECTION_SECONDS, KILL_SECONDS
from launch.nodes.rendezvous import RendezvousServer, enter, listen
from launch.processes.signals import heard
from launch.rank.job import Job
from service.basics.errors import PeerLost, SpecError
from service.spec.files import load_spec

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a killed launcher ends its ranks")
ELASTIC = {"least": 1, "most": 3}


@LINUX
def test_a_node_is_lost_and_returns_and_no_step_is_lost_or_different(tmp_path: Path) -> None:
    with elastic_nodes(tmp_path, "1:3") as nodes:
        first, second, third = (nodes.start(index) for index in range(3))
        nodes.until_said("Generation 1: 3 of 1:3 nodes (0, 1, 2).")
        nodes.until_saved()
        third.kill()
        nodes.until_said("Generation 2: 2 of 1:3 nodes (0, 1).")
        require_no_seat_without_the_secret(nodes.port)
        third = nodes.start(2)
        nodes.until_said("Node 2 can join: the state is saved for a new generation.")
        nodes.until_said("Generation 3: 3 of 1:3 nodes (0, 1, 2).")
        nodes.until_saved()
        second.send_signal(signal.SIGTERM)  # a drain: it saves, and the others go on
        nodes.until_said("Generation 4: 2 of 1:3 nodes (0, 2).")
        nodes.release()
        assert [ended(node) for node in (first, second, third)] == [0, 75, 0], nodes.everything()
        require_undisturbed(nodes)


@LINUX
def test_a_node_that_is_lost_before_the_ranks_start_is_no_endless_wait(tmp_path: Path) -> None:
    with elastic_nodes(tmp_path, "1:2") as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_said("Generation 1: 2 of 1:2 nodes (0, 1).")
        server = fork_server_of(first.pid)
        server.suspend()  # it imports torch, and is as slow as on a busy machine
        second.kill()
        time.sleep(DETECTION_SECONDS + 2 * KILL_SECONDS)  # the first kill finds no rank
        server.resume()
        nodes.until_said("Node 1 (127.0.0.1) is gone.")
        nodes.until_said("Generation 2: 1 of 1:2 nodes (0).")
        nodes.release()
        assert ended(first) == 0, nodes.everything()


@pytest.mark.matrix
@LINUX
def test_a_sharded_job_goes_on_alone_and_with_the_node_that_returns(tmp_path: Path) -> None:
    """Each node holds a part of the parameters and of the optimizer: none is lost with it."""
    with elastic_nodes(tmp_path, "1:2", sections={"exchange": {"mode": "sharded"}}) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_said("Generation 1: 2 of 1:2 nodes (0, 1).")
        nodes.until_saved()
        second.kill()
        nodes.until_said("Generation 2: 1 of 1:2 nodes (0).")
        second = nodes.start(1)
        nodes.until_said("Generation 3: 2 of 1:2 nodes (0, 1).")
        nodes.until_saved()
        nodes.release()
        assert [ended(first), ended(second)] == [0, 0], nodes.everything()
        require_undisturbed(nodes)


def fork_server_of(launcher: int) -> psutil.Process:
    """The process that starts the ranks of a launcher."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        children = psutil.Process(launcher).children()
        found[:] = [each for each in children if "forkserver" in " ".join(each.cmdline())]
        return bool(found)

    until(is_there, "a fork server")
    return found[0]


def require_no_seat_without_the_secret(port: int) -> None:
    """While the job runs: a stranger is sent away, and one with another secret as well."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
        stranger.recv(4096)
        stranger.sendall(b'{"said": "{}", "proof": "00", "nonce": "00"}\n')
        assert stranger.recv(4096) == b""
    own = JoinRequest(1, 3, 1, "digest", 1)
    place: dict[str, Any] = {"address": "127.0.0.1", "port": port, "secret": b"another secret"}
    with pytest.raises(PeerLost, match="has another secret"):
        enter(own, **place, seconds=1, say=print)


@LINUX
@pytest.mark.slow
def test_node_0_is_lost_and_the_cluster_starts_it_again(tmp_path: Path) -> None:
    cluster = {"JOB_COMPLETION_INDEX": "set by an Indexed Job"}
    with elastic_nodes(tmp_path, "1:2", wait_seconds=60, **cluster) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_said("Generation 1: 2 of 1:2 nodes (0, 1).")
        nodes.until_saved()
        first.kill()
        nodes.until_said("Node 0 (127.0.0.1) is gone.", by=1)
        first = nodes.start(0)
        nodes.until_said("Generation 2: 2 of 1:2 nodes (0, 1).")
        nodes.release()
        assert [ended(first), ended(second)] == [0, 0], nodes.everything()
        require_undisturbed(nodes)


@LINUX
def test_without_a_cluster_the_job_ends_when_node_0_does_not_return(tmp_path: Path) -> None:
    with elastic_nodes(tmp_path, "1:2", wait_seconds=2) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_said("of 2 nodes, from 0.", by=1)
        nodes.until_saved()
        first.kill()
        assert ended(second) == PeerLost.exit_code
        assert "After 2 s node 0 does not listen at 127.0.0.1" in nodes.output(1)


# ---- which nodes take part


def roster(*members: int, most: int = 3) -> Roster:
    numbers = frozenset(range(1, most + 1))
    return Roster(numbers, expected=frozenset(members), members=frozenset(members))


LOST, STOPPED = {"end": 76}, {"end": 75}


def test_a_node_that_is_lost_before_a_save_waits_for_the_next_one() -> None:
    """Or one that comes and goes could keep the job from its progress."""
    after = roster(1, 2).ended({1: LOST, 2: None}, saved=False)
    assert after.expected == {1}
    assert after.candidates({1, 2}, least=1) == [1]
    assert after.candidates({1, 2}, least=3) == [1, 2], "then it is needed"
    saved = roster(1, 2).ended({1: LOST, 2: None}, saved=True)
    assert saved.candidates({1, 2}, least=1) == [1, 2]
    still = after.ended({1: LOST}, saved=False)
    assert still.candidates({1, 2}, least=1) == [1]
    assert after.ended({1: STOPPED}, saved=True).candidates({1, 2}, least=1) == [1, 2]


def test_a_node_that_leaves_or_fails_is_not_waited_for() -> None:
    closing_messages: dict[int, dict[str, Any] | None] = {
        1: STOPPED,
        2: {"end": 75, "leaving": True},
        3: {"end": 137},
        4: LOST,
    }
    assert roster(1, 2, 3, 4, most=5).ended(closing_messages, saved=True).expected == {1, 4}


def test_only_possible_numbers_of_nodes_begin() -> None:
    bitwise = Roster(frozenset({1, 2, 4}), expected=frozenset())
    assert bitwise.candidates({1, 2}, least=1) == [1], "3 is no power of two: one is spare"
    assert bitwise.candidates({1, 2, 3}, least=1) == [1, 2, 3]
    assert bitwise.candidates((), least=1) == []


SPEC: dict[str, Any] = {
    "name": "job",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 8, "micro_batch": 2},
    "length": {"steps": 1},
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def test_a_node_that_can_join_at_the_last_moment_does_not_stop_the_next_generation() -> None:
    """Its checkpoint may be complete when the processes of this generation have just ended."""
    own = JoinRequest(0, 2, 1, "digest", 1)
    is_saved = threading.Event()
    looks: list[int] = []

    def saved() -> bool:
        looks.append(len(looks))
        if len(looks) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")  # of a file server, for a moment
        return is_saved.is_set()

    with listen("127.0.0.1", 0) as listener, selectors.DefaultSelector() as events:
        server = RendezvousServer(own, b"", listener, events, print)
        place = {"address": "127.0.0.1", "port": listener.getsockname()[1]}
        told: dict[str, Any] = {**place, "seconds": 60, "say": print}
        wanted = replace(own, index=1)
        node = threading.Thread(target=lambda: enter(wanted, **told)[0].close())
        node.start()
        try:
            with _LateJoins(server, Roster(frozenset({1, 2}), frozenset()), saved) as late:
                until(lambda: looks, "node 1 waits")
                is_saved.set()
                until(lambda: late.asked, "the request to stop")
            assert not heard.requested
        finally:
            heard.regroups = False
            server.close(end=0)
            node.join()


def test_of_two_launchers_of_one_node_the_earlier_is_told_who_replaces_it() -> None:
    """Each of them replaced the other again and again, without a word."""
    own = JoinRequest(0, 2, 1, "digest", 1)
    ends: dict[str, Any] = {}
    said: list[str] = []

    def enters(name: str) -> threading.Thread:
        wanted = replace(own, index=1, launcher=f"process 7 on {name} 0123")

        def work() -> None:
            try:
                peer, ends[name] = enter(wanted, **told)
                peer.close()
            except SpecError as error:
                ends[name] = str(error)

        node = threading.Thread(target=work)
        node.start()
        return node

    with listen("127.0.0.1", 0) as listener, selectors.DefaultSelector() as events:
        server = RendezvousServer(own, b"", listener, events, said.append)
        place = {"address": "127.0.0.1", "port": listener.getsockname()[1]}
        told: dict[str, Any] = {**place, "seconds": 60, "say": said.append}

        def looks_until(happened: Callable[[], Any]) -> None:
            until(lambda: server.look() or happened(), "the nodes connect")

        threads = [enters("first")]
        looks_until(lambda: 1 in server.peers)
        threads.append(enters("second"))
        looks_until(lambda: "first" in ends)
        assert "Another launcher has connected as node 1: process 7 on second" in ends["first"]
        assert "Each node needs its own number" in ends["first"]
        [member] = server.taken([1])
        threads.append(enters("third"))
        looks_until(lambda: any("Node 1 of this job is process 7 on second" in s for s in said))
        member.send({"end": 0})
        member.close()
        server.close(end=75)
        for thread in threads:
            thread.join()
    assert (ends["second"], ends["third"]) == ({"end": 0}, {"end": 75})


def test_a_checkpoint_of_a_run_that_starts_over_is_a_new_one(tmp_path: Path) -> None:
    """Though its step is smaller than those of the run that --fresh has moved aside."""

    def begin(name: str, step: int) -> None:
        (tmp_path / "job/checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        facts = {"format": 1, "id": name, "state": "running", "attempts": []}
        (tmp_path / "job/run.json").write_text(json.dumps(facts))

    begin("first", 24)
    run = Job(load_spec(SPEC), tmp_path, fresh=True)
    local = _LocalNode(run, None, JoinRequest(0, 2, 1, "digest", 1), b"")  # type: ignore[arg-type]
    before = local.newest()
    assert not local.has_saved_since(before)
    (tmp_path / "job").rename(tmp_path / "aside")
    assert not local.has_saved_since(before)
    begin("second", 4)
    assert local.has_saved_since(before)
    assert not local.has_saved_since(local.newest())


def test_the_numbers_of_nodes_follow_from_the_plan() -> None:
    spec = load_spec(SPEC)
    assert possible_nodes(spec, 1, 4, processes=1) == {1, 2, 3, 4}
    with pytest.raises(SpecError, match=r"5 of 1:5 nodes with 1 processes each: .* too few"):
        possible_nodes(spec, 1, 5, processes=1)
    bitwise = load_spec({**SPEC, "exactness": "bitwise"})
    assert possible_nodes(bitwise, 1, 4, processes=1) == {1, 2, 4}
    with pytest.raises(SpecError, match="3 of 1:3 nodes"):
        possible_nodes(bitwise, 1, 3, processes=1)


def test_a_range_of_nodes_is_written_as_for_torchrun() -> None:
    place = {"PET_NODE_RANK": "2", "PET_MASTER_ADDR": "a"}
    node = node_here({"PET_NNODES": "1:3", **place})
    assert node is not None
    assert (node.least, node.nodes, node.returns) == (1, 3, False)
    fixed = node_here({"PET_NNODES": "3:3", **place, "JOB_COMPLETION_INDEX": "2"})
    assert fixed is not None
    assert (fixed.least, fixed.nodes, fixed.returns) == (0, 3, True)
    for wrong in ("0:3", "4:3", "1:", "1:2:3", ":2", "one:two"):
        with pytest.raises(SpecError, match="PET_NNODES"):
            range_of_nodes(wrong, "PET_NNODES")


# ---- on a cluster

MISTAKES = {
    "least above most": ({"least": 4, "most": 2}, "must have least below most"),
    "as many": ({"least": 2, "most": 2}, "for a fixed number write nodes: 2"),
    "none": ({"least": 0, "most": 2}, "kubernetes.nodes.least: must be at least 1"),
    "no most": ({"least": 1}, "kubernetes.nodes.most: missing"),
    "an unknown key": ({"least": 1, "most": 2, "min": 1}, "kubernetes.nodes.min: unknown key"),
    "a text": ("1:2", "kubernetes.nodes: must be a whole number, but is '1:2'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_numbers_that_cannot_be_are_refused(mistake: str) -> None:
    given, message = MISTAKES[mistake]
    with pytest.raises(SpecError, match=message):
        load_spec({**SPEC, "kubernetes": {"image": "e.com/x:1", "nodes": given}})


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("where", [{}, IN_A_BUCKET], ids=["on a claim", "in a bucket"])
def test_an_elastic_job_asks_for_most_and_ends_with_node_0(
    version: str, where: dict[str, Any]
) -> None:
    import kubernetes_validate

    objects = render(job(nodes=ELASTIC, queue="training", **where))
    assert ("PersistentVolumeClaim" in {made["kind"] for made in objects}) is not bool(where)
    for made in objects:
        kubernetes_validate.validate(made, version, strict=True)
    work = of_kind(objects, "Job")
    assert (work["spec"]["completions"], work["spec"]["parallelism"]) == (3, 3)
    assert work["spec"]["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert work["metadata"]["annotations"] == {
        "kueue.x-k8s.io/job-min-parallelism": "1",
        "kueue.x-k8s.io/job-completions-equal-parallelism": "true",
    }
    (container,) = pod_of(objects)["containers"]
    assert {"name": "PET_NNODES", "value": "1:3"} in container["env"]
    assert "annotations" not in of_kind(render(job(nodes=ELASTIC)), "Job")["metadata"]
    assert "successPolicy" not in of_kind(render(job(nodes=3)), "Job")["spec"]
    gang = render(job(nodes=ELASTIC, gang="volcano"))
    assert of_kind(gang, "PodGroup")["spec"]["minMember"] == 1


@pytest.mark.parametrize("target", ["jobset", "kubeflow"])
def test_what_restarts_all_pods_cannot_be_elastic(target: Any) -> None:
    with pytest.raises(SpecError, match=f"--target {target} restarts all pods"):
        render(job(nodes=ELASTIC), target=target)
