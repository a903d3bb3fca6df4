"""submit, status, logs and cancel against what a real API server was recorded to say."""

from __future__ import annotations

import copy
import json
import os
import pty
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import BIN, CLEAN, DEADLINE_SECONDS, ROOT, evenstep, start
from kubernetes_server import HANGS_UP, Answer, Request, recorded, serving

from launch.engines.kubernetes import jobs
from launch.engines.kubernetes.api import Api, ClusterError, ClusterUnreachable
from launch.engines.kubernetes.engine import Kubernetes
from service.basics.errors import SpecError
from service.spec.files import load_spec

JOB = "/namespaces/ml-train/jobs/ddp-train"
PODS, EVENTS = "/namespaces/ml-train/pods", "/namespaces/ml-train/events"
NONE = recorded(16)
NONE.body["details"]["name"] = "ddp-train"  # recorded of another name
SPEC = {
    "name": "ddp-train",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 96},
    "length": {"epochs": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "kubernetes": {"image": "registry.example.com/evenstep:0.1.0", "nodes": 2},
}
LOG = Answer(
    200,
    "ddp-train: 2 processes on cuda\n"
    "2026-11-23T06:36:57Z step=10/180 epoch=0.7 loss=1.106 grad_norm=6.4\n"
    "2026-11-23T06:36:57Z step=20/180 epoch=1.4 loss=0.512 grad_norm=2.1\n",
    {"Content-Type": "text/plain"},
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(SPEC))
    return tmp_path


def kubernetes(place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    config = {"KUBECONFIG": str(place / "config"), "HOME": str(place)}
    return evenstep("kubernetes", *words, cwd=place, **config)


def applied(answer: Answer) -> dict[tuple[str, str], list[Answer]]:
    """The answer to the creation of a job; the others were not recorded: the object."""
    made = Answer(201, recorded(5).body, {"Content-Type": "application/json"})
    return {("POST", ""): [answer], ("PATCH", ""): [made]}


def test_submit_applies_every_object_with_strict_validation(place: Path) -> None:
    with serving({("GET", JOB): [NONE], **applied(recorded(5))}, place / "config") as server:
        done = kubernetes(place, "submit", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Job ddp-train is submitted to namespace ml-train.\n"
    (created, *patches, started) = [r for r in server.requests if r.method != "GET"]
    assert (created.method, created.body["kind"]) == ("POST", "Job")
    assert [r.body["kind"] for r in patches][-2:] == ["Secret", "Service"]
    assert len(patches) == 6
    assert {r.content_type for r in patches} == {"application/apply-patch+yaml"}
    assert started.body["spec"] == {"suspend": False}
    assert started.content_type == "application/merge-patch+json"
    assert {r.query["fieldManager"][0] for r in (created, *patches, started)} == {"evenstep"}
    assert {r.query["fieldValidation"][0] for r in (created, *patches, started)} == {"Strict"}


def test_submit_refuses_to_overwrite_a_job_that_runs(place: Path) -> None:
    with serving({("GET", JOB): [recorded(14)]}, place / "config") as server:
        refused = kubernetes(place, "submit", "job.yaml")
    assert refused.returncode == 64
    assert "exists already and has not ended" in refused.stderr
    assert "cancel ddp-train" in refused.stderr
    assert [r.method for r in server.requests] == ["GET"], "nothing was touched"


def test_submit_replaces_a_job_that_has_ended(place: Path) -> None:
    ended = copy.deepcopy(recorded(26))
    for condition in ended.body["status"]["conditions"]:
        if condition["type"] == "FailureTarget":  # what the controller writes a moment later
            condition["type"] = "Failed"
    answers = {("GET", JOB): [ended, ended, NONE], ("DELETE", JOB): [recorded(29)]}
    with serving(answers | applied(recorded(5)), place / "config") as server:
        done = kubernetes(place, "submit", "job.yaml")
    assert done.returncode == 0, done.stderr
    (deleted,) = [r for r in server.requests if r.method == "DELETE"]
    assert deleted.body["propagationPolicy"] == "Foreground"


def test_submit_shows_what_the_server_warns_of(place: Path) -> None:
    with serving({("GET", JOB): [NONE], **applied(recorded(13))}, place / "config"):
        done = kubernetes(place, "submit", "job.yaml")
    assert 'warning: would violate PodSecurity "restricted:latest": seccomp' in done.stderr


def test_submit_waits_for_the_end_where_asked_to(place: Path) -> None:
    failed = copy.deepcopy(recorded(26))
    failed.body["status"]["conditions"][-1]["type"] = "Failed"
    with serving({("GET", JOB): [NONE, failed], **applied(recorded(5))}, place / "config"):
        ended = kubernetes(place, "submit", "job.yaml", "--wait")
    assert ended.returncode == 1
    assert "Failed: PodFailurePolicy: Container trainer for pod" in ended.stdout
    assert "exit code 78" in ended.stdout


def waited(place: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """What `submit --wait` of a job that fails says and complains of; it looks often."""
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    monkeypatch.setenv("KUBECONFIG", str(place / "config"))
    said: list[str] = []
    complained: list[str] = []
    how: dict[str, Any] = {"target": "job", "without_secret": False, "waits": True}
    with pytest.raises(ClusterError, match="See: evenstep kubernetes logs ddp-train"):
        Kubernetes().submit(
            load_spec(place / "job.yaml"), say=said.append, complain=complained.append, **how
        )
    return said, complained


def test_a_cluster_may_be_silent_for_a_while_where_one_waits_for_the_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = copy.deepcopy(recorded(26))
    failed.body["status"]["conditions"][-1]["type"] = "Failed"
    busy = Answer(503, {"message": "etcdserver: leader changed"})
    asked = [NONE, recorded(14), HANGS_UP, busy, recorded(14), failed]
    with serving({("GET", JOB): asked, **applied(recorded(5))}, place / "config"):
        said, complained = waited(place, monkeypatch)
    assert "Failed: PodFailurePolicy" in said[-1]
    (told,) = complained
    assert "does not respond" in told
    assert "retrying for ten minutes" in told
    with serving({("GET", JOB): [busy]}, place / "config"):
        at_once = kubernetes(place, "status", "ddp-train")
    assert at_once.returncode == 1
    assert "The cluster answered 503: etcdserver: leader changed." in at_once.stderr


def test_one_that_stays_silent_is_not_waited_for_for_ever(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(jobs, "_SILENCE_SECONDS", 0.1)
    monkeypatch.setenv("KUBECONFIG", str(place / "config"))
    said: list[str] = []
    with (
        serving({("GET", JOB): [HANGS_UP]}, place / "config"),
        Api(namespace=None, say=print) as api,
        pytest.raises(ClusterUnreachable, match="does not respond"),
    ):
        jobs.wait(api, "Job", "ddp-train", say=said.append)
    assert len(said) == 1


REFUSALS = {
    7: (64, 'The cluster refuses: Job.batch "bad" is invalid: spec.completionMode: Unsupported'),
    22: (64, "can only be modified in tandem with spec.parallelism"),
    3: (1, "The cluster did not accept your credentials (401): sign in again"),
    2: (
        1,
        "kubectl create role evenstep -n ml-train --verb=list --resource=jobs.batch; kubectl "
        "create rolebinding evenstep -n ml-train --role=evenstep --user=system:anonymous",
    ),
}


@pytest.mark.parametrize("number", REFUSALS)
def test_a_refusal_is_reported_with_what_to_do(place: Path, number: int) -> None:
    code, words = REFUSALS[number]
    with serving({("GET", JOB): [NONE], **applied(recorded(number))}, place / "config"):
        ended = kubernetes(place, "submit", "job.yaml")
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_status_shows_pods_step_and_loss(place: Path) -> None:
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods_that(phase="Running")]}
    answers |= {("GET", EVENTS): [recorded(28)], ("GET", "/log"): [LOG]}
    with serving(answers, place / "config"):
        done = kubernetes(place, "status", "ddp-train")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "ddp-train: running (2 active pods)"
    assert lines[1].split() == ["node", "0", "ddp-train-0-4xpdm", "running"]
    assert lines[2].split()[:2] == ["node", "1"]
    assert lines[3] == "  step 20 of 180, loss 0.512"
    assert len(lines) == 4, "Endpoints are not the job's own trouble"


NOW = "2026-11-23T05:21:09Z"  # after the recorded job was made
QUOTA = (
    'Error creating: pods "ddp-train-0-x" is forbidden: exceeded quota: team, requested: '
    "requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=4, limited: "
    "requests.nvidia.com/gpu=8"
)
IMAGE_MISSING = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere/e:1"'}
NO_ROOM = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"} | {
    "message": "0/5 nodes are available: 5 Insufficient nvidia.com/gpu."
}
UNMOUNTED = 'MountVolume.SetUp failed for volume "mount-0" : secret "s3" not found'


def warning(reason: str, message: str, *, of: str = "Job") -> Answer:
    """The recorded list of events, with one of them turned into a warning."""
    events = copy.deepcopy(recorded(28))
    events.body["items"] = events.body["items"][:1]
    events.body["items"][0] |= {"type": "Warning", "reason": reason, "message": message}
    events.body["items"][0] |= {"lastTimestamp": NOW}
    events.body["items"][0]["involvedObject"]["kind"] = of
    return events


def pods_that(**status: object) -> Answer:
    """The recorded pods, in another state."""
    pods = copy.deepcopy(recorded(15))
    for pod in pods.body["items"]:
        pod["status"] |= status
    return pods


def waiting(state: dict[str, str]) -> Answer:
    return pods_that(containerStatuses=[{"name": "trainer", "state": {"waiting": state}}])


NO_PODS = copy.deepcopy(recorded(15))
NO_PODS.body["items"] = []
REASONS = {
    "Pod Security": (
        NO_PODS,
        lambda: warning("FailedCreate", "Error creating: " + _refused_pod()),
        'FailedCreate: Error creating: pods "p" is forbidden: violates PodSec',
    ),
    "quota": (NO_PODS, lambda: warning("FailedCreate", QUOTA), "gpu=8 -> request less (kub"),
    "image": (
        waiting(IMAGE_MISSING),
        lambda: recorded(28),
        'ImagePullBackOff: Back-off pulling image "nowhere/e:1" -> is kubernetes.image correct?',
    ),
    "no machine": (
        pods_that(conditions=[NO_ROOM]),
        lambda: recorded(28),
        "not scheduled: 0/5 nodes are available: 5 Insufficient nvidia.com/gpu -> no node has",
    ),
    "a secret that is not there": (
        recorded(15),
        lambda: warning("FailedMount", UNMOUNTED, of="Pod"),
        'FailedMount: MountVolume.SetUp failed for volume "mount-0" : secret "s3" not found',
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_status_shows_why_a_job_does_not_start(place: Path, reason: str) -> None:
    pods, events, words = REASONS[reason]
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods], ("GET", EVENTS): [events()]}
    with serving(answers | {("GET", "/log"): [recorded(18)]}, place / "config") as server:
        done = kubernetes(place, "status", "ddp-train")
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    asked = [r.query["fieldSelector"][0] for r in server.requests if r.path.endswith(EVENTS)]
    if pods is not NO_PODS:
        assert "involvedObject.name=ddp-train-0-4xpdm" in asked, "of the pods that wait, too"


def test_status_does_not_complain_of_what_an_earlier_job_met(place: Path) -> None:
    events = warning("FailedCreate", QUOTA)
    events.body["items"][0]["lastTimestamp"] = "2026-11-23T04:23:57Z"
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [NO_PODS], ("GET", EVENTS): [events]}
    with serving(answers, place / "config"):
        assert "quota" not in kubernetes(place, "status", "ddp-train").stdout


def test_status_shows_how_often_a_node_was_restarted_and_why(place: Path) -> None:
    pods = pods_that(phase="Running")
    for n, (code, reason) in enumerate(((137, "OOMKilled"), (76, "Error"))):
        before = copy.deepcopy(pods.body["items"][0])
        before["metadata"] |= {"name": f"before-{n}"}
        before["metadata"] |= {"creationTimestamp": f"2026-11-23T0{n}:00:00Z"}
        ended = {"exitCode": code, "reason": reason}
        before["status"] |= {"phase": "Failed"}
        before["status"] |= {"containerStatuses": [{"state": {"terminated": ended}}]}
        pods.body["items"].append(before)
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods]}
    answers |= {("GET", EVENTS): [recorded(28)], ("GET", "/log"): [LOG]}
    with serving(answers, place / "config"):
        lines = kubernetes(place, "status", "ddp-train").stdout.splitlines()
    assert lines[1].strip() == (
        "node 0  ddp-train-0-4xpdm  running; restarted 2 times, the previous pod "
        "ended with 76 (lost a peer)"
    )
    assert lines[2].strip() == "node 1  ddp-train-1-84gxd  running"


def test_status_shows_what_the_queue_says(place: Path) -> None:
    job = copy.deepcopy(recorded(20))
    job.body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
    message = (
        "couldn't assign flavors to pod set main: insufficient unused quota for "
        "nvidia.com/gpu in flavor default, 8 more needed"
    )
    condition = {"type": "QuotaReserved", "status": "False", "reason": "Pending"}
    workload = {"status": {"conditions": [condition | {"message": message}]}}
    answers = {("GET", JOB): [job], ("GET", PODS): [NO_PODS], ("GET", EVENTS): [recorded(28)]}
    answers |= {("GET", "/workloads"): [Answer(200, {"items": [workload]})]}
    with serving(answers, place / "config") as server:
        done = kubernetes(place, "status", "ddp-train")
    assert f"the queue says: {message} -> it starts when" in done.stdout
    (asked,) = [r for r in server.requests if r.path.endswith("/workloads")]
    uid = job.body["metadata"]["uid"]
    assert asked.query["labelSelector"] == [f"kueue.x-k8s.io/job-uid={uid}"]


def test_status_of_a_suspended_and_of_a_failing_job(place: Path) -> None:
    rest = {("GET", PODS): [recorded(15)], ("GET", EVENTS): [recorded(28)], ("GET", "/log"): [LOG]}
    with serving({("GET", JOB): [recorded(20)], **rest}, place / "config"):
        assert "suspended: it waits in its queue" in kubernetes(place, "status", "ddp-train").stdout
    with serving({("GET", JOB): [recorded(26)], **rest}, place / "config"):
        failing = kubernetes(place, "status", "ddp-train").stdout
    assert "failing: Container trainer for pod ml-train/ddp-train-0-xjjz4 failed" in failing


def test_logs_are_of_the_newest_pod_of_a_node_or_the_one_before(place: Path) -> None:
    pods = copy.deepcopy(recorded(15))
    newer = copy.deepcopy(pods.body["items"][0])
    newer["metadata"] |= {"name": "ddp-train-0-newer", "creationTimestamp": "2027-01-01T00:00:00Z"}
    pods.body["items"].insert(0, newer)
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods], ("GET", "/log"): [LOG]}
    with serving(answers, place / "config") as server:
        done = kubernetes(place, "logs", "ddp-train", "--follow")
        before = kubernetes(place, "logs", "ddp-train", "--previous")
        never = kubernetes(place, "logs", "ddp-train", "--node", 1, "--previous")
    assert done.stdout == LOG.body == before.stdout
    read = [r for r in server.requests if r.path.endswith("/log")]
    assert [r.path.split("/")[-2] for r in read] == ["ddp-train-0-newer", "ddp-train-0-4xpdm"]
    assert read[0].query == {"follow": ["true"]}
    assert "has not had an earlier pod of node 1" in never.stderr


def test_logs_of_a_rank_are_those_lines_of_its_nodes_pod(place: Path) -> None:
    pods = copy.deepcopy(recorded(15))
    for pod in pods.body["items"]:
        pod["spec"]["containers"][0]["env"] = [{"name": "PET_NPROC_PER_NODE", "value": "2"}]
    log = replace(LOG, body="Node 1 of 2\n[rank 2] two\n[rank 3] three\n[rank 3] [x] four\n")
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods], ("GET", "/log"): [log]}
    with serving(answers, place / "config") as server:
        third = kubernetes(place, "logs", "ddp-train", "--rank", 3)
        first = kubernetes(place, "logs", "ddp-train")
        whole = kubernetes(place, "logs", "ddp-train", "--node", 1)
        beyond = kubernetes(place, "logs", "ddp-train", "--rank", 9)
    assert third.stdout == "three\n[x] four\n"
    assert first.stdout == "Node 1 of 2\n"
    assert whole.stdout == log.body
    read = [r.path.split("/")[-2] for r in server.requests if r.path.endswith("/log")]
    assert [name.rsplit("-", 1)[0] for name in read] == [
        "ddp-train-1",
        "ddp-train-0",
        "ddp-train-1",
    ]
    assert "has not had a pod of node 4" in beyond.stderr


def test_a_terminal_is_not_controlled_by_a_log(place: Path) -> None:
    """A pod may write codes that hide lines or type words."""
    log = replace(LOG, body="\x1b]0;title\x07step 1\x1b[2J\tloss 0.5\n")
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [recorded(15)], ("GET", "/log"): [log]}
    words = [BIN / "evenstep", "kubernetes", "logs", "ddp-train"]
    config = {"KUBECONFIG": str(place / "config"), "HOME": str(place)}
    ours, theirs = pty.openpty()
    with serving(answers, place / "config"), os.fdopen(ours, "rb", buffering=0) as terminal:
        process = start(words, cwd=place, env=CLEAN | config, stdout=theirs)
        os.close(theirs)
        shown = terminal.read(1000)
        assert process.wait(DEADLINE_SECONDS) == 0
    assert b"\x1b" not in shown
    assert shown.startswith(b"\\x1b]0;title\\x07step 1\\x1b[2J"), shown
    assert shown.rstrip().endswith(b"loss 0.5")


def test_a_log_that_is_not_available_is_reported(place: Path) -> None:
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [recorded(15)]}
    with serving({**answers, ("GET", "/log"): [recorded(18)]}, place / "config"):
        ended = kubernetes(place, "logs", "ddp-train")
    assert ended.returncode == 1
    assert "The cluster answered 500: no preferred addresses found" in ended.stderr


def test_a_pod_that_has_not_started_has_no_log_and_a_state_all_the_same(place: Path) -> None:
    """The words of a kubelet that is still fetching an image, as kubectl shows them."""
    words = 'container "trainer" in pod "ddp-train-0-4xpdm" is waiting to start: ContainerCreating'
    early = Answer(400, {"kind": "Status", "code": 400, "message": words})
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods_that(phase="Running")]}
    answers |= {("GET", EVENTS): [recorded(28)], ("GET", "/log"): [early]}
    with serving(answers, place / "config"):
        done = kubernetes(place, "status", "ddp-train")
        log = kubernetes(place, "logs", "ddp-train")
    assert done.returncode == 0, done.stderr
    assert f"  There is no log yet: {words}." in done.stdout
    assert log.returncode == 1
    assert f"error: There is no log yet: {words}." in log.stderr


NOT_THERE = {
    "the namespace": (
        {"message": 'namespaces "ml-train" not found', "details": {"kind": "namespaces"}},
        64,
        'namespaces "ml-train" not found. Set kubernetes.namespace to one that exists.',
    ),
    "the target's controller": (
        {"message": "the server could not find the requested resource", "details": {}},
        1,
        "the target's controller is not installed. Use --target job.",
    ),
}


@pytest.mark.parametrize("what", NOT_THERE)
def test_what_is_not_there_is_named(place: Path, what: str) -> None:
    body, code, words = NOT_THERE[what]
    answers = {("GET", "/jobsets/ddp-train"): [NONE], ("POST", ""): [Answer(404, body)]}
    with serving(answers, place / "config"):
        ended = kubernetes(place, "submit", "job.yaml", "--target", "jobset")
    assert ended.returncode == code
    assert words in ended.stderr


def test_cancel_lets_the_pods_save(place: Path) -> None:
    with serving({("DELETE", JOB): [recorded(29)]}, place / "config") as server:
        done = kubernetes(place, "cancel", "ddp-train")
    assert "is stopping with a checkpoint" in done.stdout
    assert server.requests[0].body["propagationPolicy"] == "Foreground"
    ended = copy.deepcopy(recorded(26))
    ended.body["status"]["conditions"][-1]["type"] = "Failed"
    with serving({("DELETE", JOB): [ended]}, place / "config"):
        done = kubernetes(place, "cancel", "ddp-train")
    assert "ddp-train had ended already (Failed: PodFailurePolicy" in done.stdout
    with serving({("DELETE", JOB): [NONE]}, place / "config"):
        nobody = kubernetes(place, "cancel", "ddp-train")
    assert nobody.returncode == 1
    assert "There is no Job ddp-train in namespace ml-train. Use the --target" in nobody.stderr


HTML = {"Content-Type": "text/html"}
SIGN_IN = Answer(200, "<html><body><h1>Sign in\x1b[2J</h1> to go on</body></html>", HTML)
NO_CLUSTERS = {
    "a page to sign in": SIGN_IN,
    "a redirect": Answer(302, "", {"Location": "https://sign.in.example.com/"}),
    "a list": Answer(200, "[1, 2]"),
    "another service": Answer(200, {"hello": "world"}),
}


@pytest.mark.parametrize("which", NO_CLUSTERS)
def test_what_is_no_cluster_is_reported(place: Path, which: str) -> None:
    answer = NO_CLUSTERS[which]
    answers = {(method, ""): [answer] for method in ("GET", "PATCH", "DELETE")}
    commands = [("status", "ddp-train"), ("submit", "job.yaml")]
    commands += [("cancel", "ddp-train")] if "service" not in which else []
    with serving(answers, place / "config"):
        for words in commands:
            ended = kubernetes(place, *words)
            assert ended.returncode == 1, ended.stderr
            assert "but not as a cluster: " in ended.stderr
            assert ended.stderr.count("\n") == 1, ended.stderr
    if answer is SIGN_IN:
        assert "answered 200, but not as a cluster: Sign in\\x1b[2J to go on." in ended.stderr


def test_a_log_of_what_is_no_cluster_is_reported(place: Path) -> None:
    answers = {
        ("GET", JOB): [recorded(14)],
        ("GET", PODS): [recorded(15)],
        ("GET", "/log"): [SIGN_IN],
    }
    with serving(answers, place / "config"):
        ended = kubernetes(place, "logs", "ddp-train")
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "answered 200, but not as a cluster: Sign in" in ended.stderr


def test_a_page_to_sign_in_does_not_end_a_wait(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = copy.deepcopy(recorded(26))
    failed.body["status"]["conditions"][-1]["type"] = "Failed"
    asked = [NONE, recorded(14), SIGN_IN, failed]
    with serving({("GET", JOB): asked, **applied(recorded(5))}, place / "config"):
        said, complained = waited(place, monkeypatch)
    assert "Failed: PodFailurePolicy" in said[-1]
    assert ["retrying for ten minutes" in told for told in complained] == [True]


def test_a_job_that_is_deleted_at_its_end_is_not_waited_for(place: Path) -> None:
    with serving({}, place / "config") as server:
        ended = kubernetes(place, "submit", "job.yaml", "kubernetes.keep_seconds=0", "--wait")
    assert ended.returncode == 64, ended.stderr
    assert "kubernetes.keep_seconds: the cluster deletes the job 0 s after its end" in ended.stderr
    assert server.requests == []


def test_a_rank_of_elastic_nodes_has_no_node_of_its_own(place: Path) -> None:
    pods = copy.deepcopy(recorded(15))
    for pod in pods.body["items"]:
        pod["spec"]["containers"][0]["env"] = [
            {"name": "PET_NPROC_PER_NODE", "value": "2"},
            {"name": "PET_NNODES", "value": "1:2"},
        ]
    log = replace(LOG, body="[rank 1] one\n")
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [pods], ("GET", "/log"): [log]}
    with serving(answers, place / "config"):
        first = kubernetes(place, "logs", "ddp-train", "--rank", 1)
        third = kubernetes(place, "logs", "ddp-train", "--rank", 2)
    assert first.stdout == "one\n"
    assert third.returncode == 1
    assert "rank 2 has no fixed node. Use --node, for the log of a node" in third.stderr


@pytest.mark.parametrize("target", ["job", "jobset"])
def test_commands_go_to_the_namespace_of_the_spec(place: Path, target: str) -> None:
    """Also the command that a message prints; in the context's is another job of this name."""
    spec = SPEC | {"kubernetes": {**SPEC["kubernetes"], "namespace": "team-a"}}
    (place / "job.yaml").write_text(yaml.safe_dump(spec))
    path = f"/namespaces/team-a/{target}s/ddp-train"
    answers = {
        ("GET", path): [recorded(14)],
        ("DELETE", path): [recorded(29)],
        ("GET", "/namespaces/team-a/pods"): [recorded(15)],
        ("GET", "/namespaces/team-a/events"): [recorded(28)],
        ("GET", "/log"): [LOG],
    }
    with serving(answers, place / "config") as server:
        for command in ("status", "logs", "cancel"):
            done = kubernetes(place, command, "job.yaml", "--target", target)
            assert done.returncode == 0, done.stderr
        refused = kubernetes(place, "submit", "job.yaml", "--target", target)
        assert refused.returncode == 64, refused.stderr
        told = re.search(r"Stop it with evenstep kubernetes (cancel [^,]*),", refused.stderr)
        assert told is not None, refused.stderr
        stopped = kubernetes(place, *told[1].split())
        assert stopped.returncode == 0, stopped.stderr
    assert {request.path.split("/namespaces/")[1].split("/")[0] for request in server.requests} == {
        "team-a"
    }
    assert [r.path.endswith(path) for r in server.requests if r.method == "DELETE"] == [True] * 2


def test_an_option_goes_before_the_namespace_of_the_spec(place: Path) -> None:
    spec = SPEC | {"kubernetes": {**SPEC["kubernetes"], "namespace": "team-a"}}
    (place / "job.yaml").write_text(yaml.safe_dump(spec))
    with serving({("DELETE", ""): [recorded(29)]}, place / "config") as server:
        for words in (("job.yaml", "-n", "ml-other"), ("ddp-train",)):
            assert kubernetes(place, "cancel", *words).returncode == 0
    assert [request.path for request in server.requests] == [
        "/apis/batch/v1/namespaces/ml-other/jobs/ddp-train",
        "/apis/batch/v1/namespaces/ml-train/jobs/ddp-train",
    ]


def test_a_job_that_failed_is_reported_with_a_command_for_its_log(place: Path) -> None:
    failed = copy.deepcopy(recorded(26))
    failed.body["status"]["conditions"][-1]["type"] = "Failed"
    answers = {("GET", "/namespaces/team-a/jobs/ddp-train"): [NONE, failed]}
    with serving(answers | applied(recorded(5)), place / "config"):
        words = ("submit", "job.yaml", "kubernetes.namespace=team-a", "--wait")
        ended = kubernetes(place, *words)
    assert ended.returncode == 1, ended.stderr
    assert "See: evenstep kubernetes logs ddp-train --namespace team-a\n" in ended.stderr


NO_NAMES = (
    "",
    " ",
    "/",
    "../pods",
    "a/../b",
    "?",
    "a?x=y",
    "%2e%2e",
    "a,b=c",
    "ddp-train\n",
    "x" * 300,
)


@pytest.mark.parametrize(
    ("command", "name"), [("status", ""), ("logs", ""), *(("cancel", name) for name in NO_NAMES)]
)
def test_a_name_that_no_run_can_have_reaches_no_cluster(
    place: Path, command: str, name: str
) -> None:
    """An empty one would be the path of all Jobs: one DELETE ends them all."""
    with serving({("DELETE", ""): [recorded(29)]}, place / "config") as server:
        ended = kubernetes(place, command, name)
    assert ended.returncode == 64, ended.stderr
    assert "NAME|SPEC: must be the name of a run" in ended.stderr
    assert server.requests == []


@pytest.mark.parametrize(
    ("command", "namespace"),
    [
        ("status", ""),
        ("logs", ""),
        *(("cancel", each) for each in ("", "x/../kube-system", "Team", "a?b", "a\n", "x" * 64)),
    ],
)
def test_a_namespace_that_cannot_be_reaches_no_cluster(
    place: Path, command: str, namespace: str
) -> None:
    """An empty one is that of an unset variable: not the one of the context."""
    with serving({("DELETE", ""): [recorded(29)]}, place / "config") as server:
        ended = kubernetes(place, command, "ddp-train", "--namespace", namespace)
    assert ended.returncode == 64, ended.stderr
    assert "--namespace: must be a DNS label" in ended.stderr
    assert server.requests == []


def test_the_namespace_of_a_context_is_checked_too(place: Path) -> None:
    with serving({("DELETE", ""): [recorded(29)]}, place / "config") as server:
        config = json.loads((place / "config").read_text())
        config["contexts"][0]["context"]["namespace"] = "x/../kube-system"
        (place / "config").write_text(json.dumps(config))
        ended = kubernetes(place, "cancel", "ddp-train")
    assert ended.returncode == 64, ended.stderr
    assert "the context c has the namespace 'x/../kube-system'" in ended.stderr
    assert server.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?b", "A", "a\n"])
def test_no_request_leaves_the_path_of_one_object(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(place / "config"))
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
    with (
        serving({("DELETE", ""): [recorded(29)]}, place / "config") as server,
        Api(namespace=None, say=print) as api,
    ):
        requests = (
            lambda: api.delete("Job", name),
            lambda: api.get("Job", name),
            lambda: api.apply(made),
            lambda: list(api.log(name)),
        )
        for request in requests:
            with pytest.raises(SpecError, match=r"The name of a (Job|Pod) must be"):
                request()
    assert server.requests == []


def granted(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def needed(request: Request) -> set[tuple[str, str, str]]:
    """The rights that the server asks for before it answers."""
    found = re.fullmatch(
        r"/apis?/(?:([\w.-]+)/)?v\w+/namespaces/[\w-]+/(\w+)(?:/[\w-]+(/log)?)?", request.path
    )
    assert found is not None, request.path
    group, resource = found[1] or "", found[2] + (found[3] or "")
    verbs = {"GET": ["get"], "POST": ["create"], "PATCH": ["patch"], "DELETE": ["delete"]}[
        request.method
    ]
    if request.content_type == "application/apply-patch+yaml":
        verbs.append("create")
    if request.method == "GET" and request.path.endswith(resource) and not found[3]:
        verbs = ["list"]
    return {(verb, group, resource) for verb in verbs}


def test_the_role_grants_what_the_commands_ask_for_and_no_more(place: Path) -> None:
    role = yaml.safe_load((ROOT / "k8s/role.yaml").read_text())
    asked = set()
    for target, kind, gang, after in (
        ("job", "jobs", "volcano", ("status", "logs", "cancel")),
        ("jobset", "jobsets", "coscheduling", ("cancel",)),
        ("kubeflow", "trainjobs", "", ("cancel",)),
    ):
        queued = copy.deepcopy(recorded(20))
        queued.body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "training"
        path = f"/{kind}/ddp-train"
        answers = {("GET", path): [NONE, queued], ("DELETE", path): [recorded(29)]}
        answers |= {("GET", PODS): [recorded(15)], ("GET", EVENTS): [recorded(28)]}
        answers |= {("GET", "/workloads"): [Answer(200, {"items": []})], ("GET", "/log"): [LOG]}
        orphan = {"metadata": {"name": "ddp-train-0", "uid": "of a submit that died"}}
        answers |= {("GET", "/trainingruntimes"): [Answer(200, {"items": [orphan]})]}
        answers |= {("DELETE", "/trainingruntimes/ddp-train-0"): [recorded(29)]}
        answers |= applied(recorded(5))
        with serving(answers, place / "config") as server:
            submit = ("submit", "job.yaml", f"kubernetes.gang={gang}")
            for words in (submit, *((w, "ddp-train") for w in after)):
                done = kubernetes(place, *words, "--target", target)
                assert done.returncode == 0, done.stderr
        asked |= {right for request in server.requests for right in needed(request)}
    assert asked == granted(role)


def test_without_a_kubeconfig_it_says_where_one_belongs(place: Path) -> None:
    ended = kubernetes(place, "status", "ddp-train")
    assert ended.returncode == 64, ended.stderr
    assert "No cluster can be reached" in ended.stderr
    assert "Set KUBECONFIG" in ended.stderr


def kubeconfig(place: Path, **changes: Any) -> Path:
    """One that leads to a server; `changes` replace its cluster, user or context."""
    named = {"cluster": {"server": "http://127.0.0.1:1"}, "user": {"token": "t"}}
    named |= {"context": {"cluster": "c", "user": "c"}} | changes
    lists = {f"{kind}s": [{"name": "c", kind: content}] for kind, content in named.items()}
    file = place / "config"
    file.write_text(json.dumps({"kind": "Config", "current-context": "c", **lists}))
    return file


def command_to_sign_in(words: str, *, version: str = "v1") -> dict[str, Any]:
    command = {"command": "sh", "args": ["-c", words]}
    return {"exec": command | {"apiVersion": f"client.authentication.k8s.io/{version}"}}


NO_WAYS: dict[str, tuple[dict[str, Any], int, str]] = {
    "a user that is not in it": ({"context": {"cluster": "c", "user": "me"}}, 64, "names 'me', wh"),
    "an authority that is nowhere": (
        {"cluster": {"server": "https://127.0.0.1:1", "certificate-authority": "ca.crt"}},
        64,
        "/ca.crt, which cannot be read",
    ),
    "an authority that is none": (
        {"cluster": {"server": "https://127.0.0.1:1", "certificate-authority": "job.yaml"}},
        64,
        "the context c cannot be used: ",
    ),
    "a certificate that is nowhere": (
        {"user": {"client-certificate": "/nowhere", "client-key": "/nowhere"}},
        64,
        "the context c names /nowhere, which cannot be read",
    ),
    "a way to sign in of long ago": (
        {"user": {"auth-provider": {"name": "gcp"}}},
        64,
        "the context c cannot be used: auth-provider not supported",
    ),
    "a command that fails": (
        {"user": command_to_sign_in("echo expired >&2; exit 3")},
        1,
        "The sign-in to the cluster at http://127.0.0.1:1 failed: Exec sh returned 3: expired",
    ),
    "a command that says nothing": (
        {"user": command_to_sign_in("true")},
        1,
        "Does kubectl get pods work? It uses the same kubeconfig.",
    ),
    "a command that is not there": (
        {"user": command_to_sign_in("true") | {"exec": {"apiVersion": "x/v1", "command": "none"}}},
        1,
        "The sign-in to the cluster",
    ),
    "a context that is a list": (
        {"context": ["c"]},
        64,
        "is not a kubeconfig: each of its contexts",
    ),
    "variables of a command that are none": (
        {"user": {"exec": {"apiVersion": "x/v1", "command": "true", "env": 5}}},
        64,
        "is not a kubeconfig: the env of a sign-in command is no list",
    ),
    "no user at all": ({"context": {"cluster": "c"}}, 1, "does not respond"),
}


@pytest.mark.parametrize("way", NO_WAYS)
def test_an_unusable_kubeconfig_is_reported(
    place: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, code, words = NO_WAYS[way]
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(place, **changes)))
    with pytest.raises((SpecError, ClusterError)) as caught:
        ask()
    assert caught.value.exit_code == code
    assert words in str(caught.value)


def ask() -> None:
    with Api(namespace=None, say=print) as api:
        api.get("Job", "ddp-train")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "}{:", "clusters: 3", "users: [3]", "\0", "users: [{}]", "current-context: [c]"],
)
def test_a_file_that_is_not_a_kubeconfig_is_reported(
    place: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(place / "config"))
    with pytest.raises(SpecError, match=r"No cluster can be reached: .*config .*Set KUBECONFIG"):
        ask()


@pytest.mark.parametrize("version", ["v1", "v1beta1"])
def test_a_command_signs_in_and_is_reported_what_for(
    place: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the large clouds do."""
    words = (
        'echo \'{"status": {"token": "\''
        "$(echo $KUBERNETES_EXEC_INFO | grep -o authentication.k8s.io/v1[a-z0-9]*)'\"}}'"
    )
    user = command_to_sign_in(words, version=version)
    with serving({("GET", JOB): [recorded(14)]}, place / "served") as server:
        served = json.loads((place / "served").read_text())["clusters"][0]["cluster"]
        context = {"cluster": "c", "user": "c", "namespace": "ml-train"}
        file = kubeconfig(place, cluster=served, user=user, context=context)
        monkeypatch.setenv("KUBECONFIG", str(file))
        ask()
    assert server.requests[0].authorization == f"Bearer authentication.k8s.io/{version}"


def test_several_kubeconfigs_are_read_as_one(place: Path) -> None:
    answers = {("GET", JOB): [recorded(14)], ("GET", PODS): [NO_PODS]}
    with serving(answers | {("GET", EVENTS): [recorded(28)]}, place / "served"):
        whole = json.loads((place / "served").read_text())
        for key in ("clusters", "users"):
            (place / key).write_text(json.dumps({key: whole.pop(key)}))
        (place / "rest").write_text(json.dumps(whole))
        files = ":".join(str(place / name) for name in ("none", "clusters", "rest", "users"))
        done = evenstep("kubernetes", "status", "ddp-train", cwd=place, KUBECONFIG=files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ddp-train: running")


def test_submit_waits_for_a_job_that_is_stopping(place: Path) -> None:
    stopping = copy.deepcopy(recorded(14))
    stopping.body["metadata"]["deletionTimestamp"] = NOW
    answers = {("GET", JOB): [stopping, stopping, NONE]}
    with serving(answers | applied(recorded(5)), place / "config") as server:
        done = kubernetes(place, "submit", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Job ddp-train is still stopping; waiting until it is gone.",
        "Job ddp-train is submitted to namespace ml-train.",
    ]
    assert "DELETE" not in [request.method for request in server.requests]


def test_a_cluster_that_does_not_answer_is_reported(place: Path) -> None:
    with serving({}, place / "config"):
        pass
    ended = kubernetes(place, "status", "ddp-train")
    assert ended.returncode == 1
    assert "does not respond" in ended.stderr
    assert "Traceback" not in ended.stderr


def _refused_pod() -> str:
    from kubernetes_server import ANSWERS

    (path,) = ANSWERS.glob("17-*.json")
    return str(json.loads(path.read_text())["response"]["body"]["message"])
