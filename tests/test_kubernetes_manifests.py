"""What a spec looks like on a cluster: valid, restricted, and the same as what k8s/ holds."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, evenstep
from kubernetes_server import recorded
from pod_security import violations

from launch.engines.kubernetes.kustomize import kustomization
from launch.engines.kubernetes.manifests import (
    code_beside,
    new_secret,
    render,
    to_yaml,
    with_words,
)
from launch.engines.kubernetes.targets import NEVER_AGAIN, NOT_ITS_FAULT
from service.basics.errors import SpecError
from service.spec.files import load_spec
from service.spec.kubernetes import quantity
from service.spec.models import Spec

TARGETS = ("job", "jobset", "kubeflow")
JOB = {
    "name": "digits",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 96, "micro_batch": 16},
    "length": {"epochs": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "tracking": {"wandb": {"project": "p"}},
}
IMAGE = "registry.example.com/evenstep:0.1.0"
EVERY_OPTION = {
    "image": "registry.example.com/evenstep@sha256:" + "0" * 64,
    "nodes": 3,
    "processes_per_node": 2,
    "device": "amd.com/gpu",
    "cpu": "7500m",
    "memory": "12Gi",
    "shared_memory": "512Mi",
    "scratch": "3Gi",
    "storage_claim": "team-runs",
    "namespace": "ml-train",
    "node_selector": {"gpu": "mi300x"},
    "tolerations": [{"key": "team", "operator": "Equal", "value": "ml", "effect": "NoExecute"}],
    "topology": "example.com/rack",
    "queue": "training",
    "priority_class": "batch",
    "image_pull_secret": "registry",
    "env": {"NCCL_SOCKET_IFNAME": "=eth0", "HOME": "/tmp/home"},
    "mounts": [
        {"path": "/data", "claim": "images"},
        {"path": "/out", "claim": "outputs", "read_only": False},
        {"path": "/keys", "secret": "s3"},
        {"path": "/certificates", "config_map": "roots"},
    ],
    "wandb_secret": "wandb-team",
    "egress": ["10.1.2.0/24"],
    "restarts": 1,
    "grace_seconds": 600,
    "deadline_seconds": 3600,
    "keep_seconds": 60,
    "port": 23456,
}


def job(**cluster: Any) -> Spec:
    return load_spec(JOB | {"kubernetes": {"image": IMAGE} | cluster})


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [made for made in objects if made["kind"] == kind]
    return found


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod template's spec, wherever the target keeps it."""
    work = {made["kind"]: made["spec"] for made in objects if "spec" in made}
    if "TrainingRuntime" in work:
        work["JobSet"] = work["TrainingRuntime"]["template"]["spec"]
    if "JobSet" in work:
        (replicated,) = work["JobSet"]["replicatedJobs"]
        work["Job"] = replicated["template"]["spec"]
    pod: dict[str, Any] = work["Job"]["template"]["spec"]
    return pod


KEYS_OF_OBJECTS: dict[str, Any] = {
    "image_pull_secret": "registry",
    "image_pull_secrets": ["mirror", "registry"],
    "env_from": {
        "HF_TOKEN": {"secret": "hub", "key": "token"},
        "HTTPS_PROXY": {"config_map": "proxy", "key": "url", "optional": True},
        "HOME": {"config_map": "paths", "key": ".home"},
    },
    "mounts": [
        {"path": "/data", "claim": "images", "sub_path": "imagenet/2012"},
        {"path": "/etc/ssl/certs/team.crt", "config_map": "roots", "key": "ca.crt"},
        {"path": "/keys/hub", "secret": "hub", "key": "token"},
    ],
    "s3_secret": "s3-keys",
    "gcs_secret": "gcs-key",
}
FABRIC: dict[str, Any] = {
    "nodes": 2,
    "processes_per_node": 2,
    "resources": {"vpc.amazonaws.com/efa": 4, "rdma/hca_shared_devices_a": 1},
    "hugepages": {"2Mi": "5Gi", "1Gi": "2Gi"},
    "fabric": "efa",
    "labels": {"team": "vision"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "fast-a, fast-b"},
    "runtime_class": "nvidia",
    "service_account": "reader",
    "user": 23450,
    "supplemental_groups": [44, 109],
    "topology_spread": [
        {"key": "kubernetes.io/hostname", "required": True},
        {"key": "topology.kubernetes.io/zone", "max_skew": 2},
    ],
    "queue": "training",
    "queue_priority": "high",
    "queue_topology_required": "example.com/rack",
    "scheduler": "own-scheduler",
}
IN_A_BUCKET: dict[str, Any] = {
    "runs": "s3://team-bucket/runs",
    "s3_secret": "s3-keys",
    "service_account_annotations": {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/trainer"
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "the least": {},
    "on the CPU": {"device": "cpu"},
    "several nodes": {"nodes": 3, "processes_per_node": 2},
    "every option": EVERY_OPTION,
    "keys of objects": KEYS_OF_OBJECTS,
    "a fabric": FABRIC,
    "runs in a bucket": IN_A_BUCKET | {"nodes": 2, "processes_per_node": 2},
}
LOOSENED: dict[str, Any] = {
    "nodes": 2,
    "fabric": "infiniband",
    "loosened_security": {"host_network": True, "root": True, "capabilities": ["IPC_LOCK"]},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("way", WAYS)
def test_a_restricted_namespace_takes_the_pods(way: str, target: Any) -> None:
    assert violations(pod_of(render(job(**WAYS[way]), target=target))) == []


def test_the_check_of_pod_security_finds_each_thing() -> None:
    pod = pod_of(render(job()))

    def with_change(where: str, value: Any) -> list[str]:
        changed = copy.deepcopy(pod)
        *path, last = where.split(".")
        place: Any = changed
        for step in path:
            place = place[int(step) if step.isdecimal() else step]
        place[last] = value
        return violations(changed)

    assert with_change("hostNetwork", True) == ["hostNetwork"]
    assert with_change("securityContext.runAsUser", 0) == ["runAsUser=0"]
    assert with_change("securityContext.seccompProfile", {}) == ["seccompProfile"]
    container = "containers.0.securityContext."
    assert with_change(container + "privileged", True) == ["privileged"]
    assert with_change(container + "runAsNonRoot", False) == ["runAsNonRoot != true"]
    assert with_change(container + "capabilities", {"drop": ["ALL"], "add": ["IPC_LOCK"]}) == [
        "added capabilities"
    ]
    assert with_change("volumes", [{"name": "h", "hostPath": {"path": "/"}}]) == [
        "volume h: ['hostPath']"
    ]


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("way", WAYS)
def test_the_objects_are_strictly_valid(way: str, version: str) -> None:
    import kubernetes_validate

    for made in render(job(**WAYS[way])):
        kubernetes_validate.validate(made, version, strict=True)
    misspelt = copy.deepcopy(of_kind(render(job(**WAYS[way])), "Job"))
    misspelt["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, version, strict=True)


@pytest.mark.parametrize("way", WAYS)
def test_jobset_and_trainer_know_every_field(way: str) -> None:
    """Their models drop what they do not know: equal after a round trip is a strict check."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kinds = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    }
    seen = set()
    for target in ("jobset", "kubeflow"):
        for made in render(job(**WAYS[way]), target=target):  # type: ignore[arg-type]
            if made["kind"] in kinds:
                assert kinds[made["kind"]].from_dict(made).to_dict() == made
                seen.add(made["kind"])
    assert seen == kinds.keys()


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a value or an argument of a container.

    Source: k8s.io/kubernetes, third_party/forked/golang/expansion/expand.go
    """
    made, at = "", 0
    while at < len(text):
        if text[at] != "$" or at + 1 == len(text):
            made, at = made + text[at], at + 1
        elif text[at + 1] == "$":
            made, at = made + "$", at + 2
        elif text[at + 1] == "(" and ")" in text[at + 2 :]:
            end = text.index(")", at + 2)
            name = text[at + 2 : end]
            made, at = made + variables.get(name, f"$({name})"), end + 1
        else:
            made, at = made + text[at : at + 2], at + 2
    return made


def test_kubernetes_leaves_values_and_arguments_as_they_are() -> None:
    texts = ["$(HOME)", "a$$b", "$$(HOME)", "$$$(HOME)$", "cost $5", "$(", "$(date)$$", "$(A)(B)"]
    env = {f"V{number}": text for number, text in enumerate(texts)}
    objects = with_words(render(job(env=env)), ["--accept", *texts])
    (container,) = pod_of(objects)["containers"]
    (stored,) = pod_of(render(job(runs="s3://bucket/$(HOME)")))["containers"]
    assert expanded(stored["command"][-1], {"HOME": "/tmp"}) == "s3://bucket/$(HOME)"
    known: dict[str, str] = {}
    for each in container["env"]:
        known[each["name"]] = expanded(each.get("value", ""), known)
    assert {name: known[name] for name in env} == env
    assert [expanded(word, known) for word in container["command"]][-len(texts) :] == texts
    assert expanded("$(HOME)", known) == "/tmp", "as they would be"
    with pytest.raises(SpecError, match="must not contain a NUL character, but WORD does"):
        job(env={"WORD": "a\0b"})


@pytest.mark.parametrize(("text", "number"), [("4194304Ki", 2**32), ("512Mi", 2**29), ("3k", 3e3)])
def test_a_quantity_in_any_unit(text: str, number: float) -> None:
    assert quantity(text) == number
    assert job(memory="32Gi", scratch=text).kubernetes is not None


def test_every_option_arrives() -> None:
    objects = render(job(**EVERY_OPTION))
    work, pod = of_kind(objects, "Job"), pod_of(objects)
    (container,) = pod["containers"]
    assert {made["metadata"]["namespace"] for made in objects} == {"ml-train"}
    assert work["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert work["spec"]["suspend"] is True, "Kueue decides when it starts"
    assert work["spec"]["backoffLimitPerIndex"] == 1
    assert work["spec"]["activeDeadlineSeconds"] == 3600
    assert work["spec"]["ttlSecondsAfterFinished"] == 60
    assert pod["terminationGracePeriodSeconds"] == 600
    assert pod["nodeSelector"] == {"gpu": "mi300x"}
    assert pod["priorityClassName"] == "batch"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert [t["key"] for t in pod["tolerations"]] == ["amd.com/gpu", "team"]
    assert "example.com/rack" in str(pod["affinity"])
    resources = {"cpu": "7500m", "memory": "12Gi", "amd.com/gpu": "2"}
    assert container["resources"] == {"requests": resources, "limits": resources}
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert env["HOME"] == "/tmp/home", "what the user sets wins"
    assert env["OMP_NUM_THREADS"] == "3"
    assert (env["PET_MASTER_ADDR"], env["PET_MASTER_PORT"]) == ("digits-0.digits", "23456")
    assert container["imagePullPolicy"] == "IfNotPresent"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "team-runs"}
    assert volumes["shared-memory"]["emptyDir"]["sizeLimit"] == "512Mi"
    assert volumes["wandb"]["secret"]["secretName"] == "wandb-team"
    assert "readOnly" not in mounts["/out"]
    assert {mounts[path].get("readOnly") for path in ("/data", "/keys", "/certificates")} == {True}
    assert {made["kind"] for made in objects} == {"Job", "ServiceAccount", "Service"} | {
        "NetworkPolicy",
        "ConfigMap",
    }, "no claim is made where one is named"
    assert "10.1.2.0/24" in str(of_kind(objects, "NetworkPolicy"))


def test_exit_codes_mean_to_the_cluster_what_they_mean_here() -> None:
    assert (NEVER_AGAIN, NOT_ITS_FAULT) == ([42, 64], [75, 76])
    rules = of_kind(render(job()), "Job")["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert [rule.get("onExitCodes", {}).get("values") for rule in rules] == [
        [42, 64],
        None,
        [75, 76],
    ]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (42, "FailJobSet"),
        (64, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        (76, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, "RestartJobSet"),
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_a_jobset_makes_of_a_failure_what_a_job_does(code: int | None, action: str) -> None:
    """By the words in which the Job controller was recorded to tell why it failed a Job."""
    told = recorded(26).body["status"]["conditions"][-1]["message"]
    assert "failed with exit code 78 matching FailJob rule" in told
    told = told.replace("78", str(code))
    if code is None:
        told = "Pod ml/digits-node-0-0-x has condition DisruptionTarget matching FailJob rule"
    reason = "BackoffLimitExceeded" if code == 137 else "PodFailurePolicy"  # no rule speaks of it
    policy = of_kind(render(job(nodes=2), target="jobset"), "JobSet")["spec"]["failurePolicy"]
    fits = [
        rule["action"]
        for rule in policy["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(re.match(pattern, told) for pattern in rule["onJobFailureMessagePatterns"])
    ]
    assert (fits or ["RestartJobSet"])[0] == action, "without a rule it restarts, and counts"


@pytest.mark.parametrize("target", TARGETS)
def test_a_queue_decides_when_a_job_starts_under_every_target(target: Any) -> None:
    objects = render(job(queue="training", priority_class="batch"), target=target)
    label = "kueue.x-k8s.io/queue-name"
    queued = [made for made in objects if label in made["metadata"]["labels"]]
    assert [made["kind"] for made in queued] == [objects[-1]["kind"]]
    assert queued[0]["metadata"]["labels"][label] == "training"
    assert queued[0]["spec"]["suspend"] is True
    assert pod_of(objects)["priorityClassName"] == "batch"


@pytest.mark.parametrize("target", TARGETS)
def test_one_label_finds_the_pods_of_this_run_alone(target: Any) -> None:
    objects = render(job(nodes=2), target=target)
    own = {"app.kubernetes.io/instance": "digits"}
    policy = of_kind(objects, "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == own
    assert policy["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    if target == "job":
        service = of_kind(objects, "Service")["spec"]
        assert service["selector"] == own
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True


def test_one_node_needs_no_service_and_accepts_no_connections() -> None:
    objects = render(job())
    assert "Service" not in {made["kind"] for made in objects}
    assert of_kind(objects, "NetworkPolicy")["spec"]["ingress"] == []
    assert of_kind(objects, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_an_offline_tracker_needs_no_way_out() -> None:
    online, offline = (
        of_kind(
            render(load_spec(JOB | {"kubernetes": {"image": IMAGE}}, overrides=[f"tracking={t}"])),
            "NetworkPolicy",
        )["spec"]["egress"]
        for t in ("{wandb: {project: p}}", "{wandb: {project: p, mode: offline}}")
    )
    assert "443" in str(online)
    assert "443" not in str(offline)


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_in_a_bucket_needs_no_claim(target: Any) -> None:
    objects = render(job(**IN_A_BUCKET), target=target)
    assert "persistentVolumeClaim" not in to_yaml(objects)
    assert "PersistentVolumeClaim" not in {made["kind"] for made in objects}
    pod = pod_of(objects)
    command = pod["containers"][0]["command"]
    assert command[-2:] == ["--runs", "s3://team-bucket/runs"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert "runs" not in mounts
    variables = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert variables["EVENSTEP_SCRATCH"].startswith(mounts["scratch"] + "/")
    assert variables["AWS_SHARED_CREDENTIALS_FILE"] == f"{mounts['s3-secret']}/credentials"
    account = of_kind(objects, "ServiceAccount")["metadata"]
    assert account["annotations"] == IN_A_BUCKET["service_account_annotations"]
    assert pod["serviceAccountName"] == account["name"]


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        (None, ("0.0.0.0/0", 443)),
        ("https://storage.example.com:9443", ("0.0.0.0/0", 9443)),
        ("http://10.1.2.3:9000", ("10.1.2.3/32", 9000)),
        ("http://10.1.2.3", ("10.1.2.3/32", 80)),
        ("http://minio.storage.svc.cluster.local:9000", ("storage", None)),
    ],
)
def test_a_policy_lets_the_endpoint_of_the_runs_through(endpoint: Any, expected: Any) -> None:
    env = {"AWS_ENDPOINT_URL": endpoint} if endpoint else {}
    offline = JOB | {"tracking": {}}

    def rules(**options: Any) -> list[tuple[Any, Any]]:
        cluster = {"image": IMAGE, "env": env} | options
        policy = of_kind(render(load_spec(offline | {"kubernetes": cluster})), "NetworkPolicy")
        found = []
        for rule in policy["spec"]["egress"]:
            (to, *_), (port, *_) = rule["to"], rule.get("ports", [{"port": None}])
            named = to.get("namespaceSelector", {}).get("matchLabels", {}).values()
            found.append(
                (to.get("ipBlock", {}).get("cidr") or next(iter(named), None), port["port"])
            )
        return found

    assert expected in rules(**IN_A_BUCKET)
    assert expected not in rules()
    at_metadata = ("169.254.169.254/32", 80) in rules(**IN_A_BUCKET)
    assert at_metadata is (endpoint is None), "a cloud's own store, with the identity of the pod"


def test_the_trainer_of_kubeflow_sets_its_own_five_variables() -> None:
    (container,) = pod_of(render(job(nodes=2), target="kubeflow"))["containers"]
    assert container["name"] == "node", "the name by which the trainer finds it"
    assert not [each for each in container["env"] if each["name"].startswith("PET_")]


def test_a_pod_reads_the_very_spec_that_was_rendered() -> None:
    spec = job(**EVERY_OPTION)
    text = of_kind(render(spec), "ConfigMap")["data"]["spec.yaml"]
    assert load_spec(yaml.safe_load(text)) == spec


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My_Run", "Use --name my-run-"),
        ("7th", "Use --name th-"),
        ("x" * 60, f"Use --name {'x' * 47}-"),
    ],
)
def test_a_name_that_no_host_could_have_is_refused(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        render(job(nodes=2).model_copy(update={"name": name}))


def test_names_that_differ_are_not_given_one_name_in_their_place() -> None:
    told = []
    for name in ("my_run", "my.run", "My-run"):
        with pytest.raises(SpecError) as refused:
            render(job(nodes=2).model_copy(update={"name": name}))
        told.append(str(refused.value).partition("Use --name ")[2].rstrip("."))
        render(job(nodes=2).model_copy(update={"name": told[-1]}))
    assert len(set(told)) == 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"image": ""}, "kubernetes.image: must be a container image, such as reg"),
    "an image with a capital": ({"image": "Team/e:1"}, "kubernetes.image: must be a container"),
    "a device without a vendor": (
        {"device": "gpu"},
        "kubernetes.device: must be cpu, or the cluster's name of a device, such as nvidia.com",
    ),
    "an image by its address": (
        {"image": "https://r.io/e"},
        "kubernetes.image: must be a containe",
    ),
    "nothing to compute on": ({"cpu": "0"}, "kubernetes.cpu: must be more than 0."),
    "a label's value in words": (
        {"node_selector": {"rack": "the second"}},
        "kubernetes.node_selector: must be the value of a Kubernetes label: up to 63 letters",
    ),
    "a class that none can be": (
        {"priority_class": "Batch Jobs"},
        "kubernetes.priority_class: must be a Kubernetes name: lower-case letters, digits",
    ),
    "a taint's value that does not matter": (
        {"tolerations": [{"key": "team", "value": "ml"}]},
        "must have operator: Equal, or no value, but Exists has a value",
    ),
    "a taint's value without its key": (
        {"tolerations": [{"operator": "Equal", "value": "ml"}]},
        "must have a key, whose value is equal, but has none",
    ),
    "a key where everybody reads it": (
        {"env": {"WANDB_API_KEY": "0123456789abcdef"}},
        "kubernetes.env.WANDB_API_KEY contains a secret, which spec.yaml would show",
    ),
    "a password where everybody reads it": (
        {"env": {"STORE": "https://me:word@example.com/data"}},
        "kubernetes.env.STORE contains a secret",
    ),
    "a mount over the image": (
        {"mounts": [{"path": "/data/../usr", "claim": "data"}]},
        "kubernetes.mounts.0.path: /usr is used by the image or by Evenstep. Use another,",
    ),
    "a mount over what holds a mount of ours": (
        {"mounts": [{"path": "//dev", "claim": "data"}]},
        "kubernetes.mounts.0.path: /dev is used by the image",
    ),
    "a mount in what can only be read": (
        {"mounts": [{"path": "/etc/evenstep/data", "claim": "data"}]},
        "kubernetes.mounts.0.path: /etc/evenstep/data is used by the image",
    ),
    "a place for a mount that is taken": (
        {"mounts": [{"path": "/runs/", "claim": "data"}]},
        "kubernetes.mounts.0.path: /runs is Evenstep's own. Use another, such as /mnt/data",
    ),
    "one place for two mounts": (
        {"mounts": [{"path": "/a", "secret": "s"}, {"path": "/a", "claim": "c"}]},
        "kubernetes.mounts.1.path: /a is already used by mounts.0. Use another, such as /mnt/c",
    ),
    "a variable that follows from the nodes": (
        {"env": {"PET_NNODES": "4"}},
        "kubernetes.env.PET_NNODES: it follows from nodes, processes_per_node and port",
    ),
    "a variable that none can be": (
        {"env": {"1 A": "b"}},
        "must be the name of an environment variable, but is '1 A'",
    ),
    "an address that is no block": (
        {"egress": ["10.1.2.3"]},
        "kubernetes.egress: must be address blocks, such as 10.1.2.3/32, but has '10.1.2.3'",
    ),
    "a block with a mask": (
        {"egress": ["10.0.0.0/255.0.0.0"]},
        "kubernetes.egress: must be address blocks, such as 10.0.0.0/32, but has '10.0.0.0/255",
    ),
    "a block that is none": ({"egress": ["10.1.2.3/8"]}, "10.1.2.3/8 has host bits set"),
    "a label in words": (
        {"topology": "rack 1"},
        "kubernetes.topology: must be the key of a Kubernetes label",
    ),
    "two places for the runs": (
        {"runs": "s3://b/runs", "storage_claim": "c"},
        "must have one of runs and storage_claim: at s3://b/runs there is no claim",
    ),
    "a directory as an address": (
        {"runs": "/runs"},
        "kubernetes.runs: must be an address in object storage, SCHEME://BUCKET/PREFIX",
    ),
    "an endpoint that is no address": (
        {"env": {"AWS_ENDPOINT_URL": "http://[::1"}},
        "kubernetes.env.AWS_ENDPOINT_URL: must be the address of a server, such as https://s3.ex",
    ),
    "an endpoint with a port that is none": (
        {"env": {"AWS_ENDPOINT_URL": "http://minio:99999"}},
        "must be the address of a server",
    ),
    "an endpoint without a scheme": (
        {"env": {"AWS_ENDPOINT_URL": "minio:9000"}},
        "must be the address of a server",
    ),
    "a quantity in the digits of another script": (
        {"memory": "\u0663Gi"},
        "kubernetes.memory: must be a Kubernetes quantity",
    ),
    "an address without a bucket": ({"runs": "s3://"}, "kubernetes.runs: must be an address"),
    "an address with a key in it": (
        {"runs": "s3://key:secret@bucket/runs"},
        "kubernetes.runs",
    ),
    "annotations of an account that exists": (
        {"service_account": "own", "service_account_annotations": {"a/b": "c"}},
        "must have one of service_account, which exists, and service_account_annotations",
    ),
    "less time than the save may take": (
        {"grace_seconds": 60},
        "killed 60 s after it is asked to stop, but may take faults.stop_budget_seconds=120",
    ),
    "more processes than micro-batches": (
        {"nodes": 4, "processes_per_node": 2},
        "has 6 micro-batches of 16, too few for 8 processes. Use at most 6 processes, or "
        "batch.micro_ba",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_no_cluster_could_run_is_refused_before_it_is_asked(mistake: str) -> None:
    options, message = REFUSED[mistake]
    with pytest.raises(SpecError, match=re.escape(message)):
        render(job(**options))


NO_NUMBERS = [
    "1e-3",
    "1234e5",
    "0o17",
    "0B11",
    "1_0",
    "y",
    "N",
    ".5",
    "017",
    "1.2.3",
    "",
    "~",
    "no",
]


def test_what_looks_like_a_number_stays_text_to_every_reader() -> None:
    """kubectl reads numbers that YAML 1.1, and so PyYAML, takes for text."""
    env = {f"V{number}": text for number, text in enumerate(NO_NUMBERS)} | {"y": "1e3", "N": "x"}
    options = {"env": env, "storage_claim": "1e3", "node_selector": {"gen": "7e2"}}
    rendered = to_yaml([of_kind(render(job(**options)), "Job")])
    (container,) = pod_of([yaml.safe_load(rendered)])["containers"]
    read = {each["name"]: each.get("value") for each in container["env"]}
    assert {name: read[name] for name in env} == env
    without_quotes = set(re.findall(r"(?m): (\S+)$", rendered))
    assert without_quotes & {*NO_NUMBERS, "1e3", "7e2"} == set()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_reads_the_texts_that_were_given(tmp_path: Path) -> None:
    env = {f"V{number}": text for number, text in enumerate(NO_NUMBERS)} | {"y": "1e3"}
    work = of_kind(render(job(env=env, node_selector={"gen": "7e2"})), "Job")
    (tmp_path / "job.yaml").write_text(to_yaml([work]))
    words = ("kubectl", "label", "--local", "-f", tmp_path / "job.yaml", "a=b", "-o", "json")
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    pod = pod_of([json.loads(done.stdout)])
    read = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}
    assert {name: read[name] for name in env} == env
    assert pod["nodeSelector"] == {"gen": "7e2"}


def test_a_file_that_says_where_a_secret_lies_is_none() -> None:
    env = {"AWS_SHARED_CREDENTIALS_FILE": "/keys/aws", "HF_TOKEN_PATH": "/keys/hf-token"}
    env |= {"GOOGLE_APPLICATION_CREDENTIALS": "/keys/google.json", "TOKENIZERS_PARALLELISM": "no"}
    objects = render(job(env=env, mounts=[{"path": "/keys", "secret": "team.keys"}]))
    read = {each["name"]: each.get("value") for each in pod_of(objects)["containers"][0]["env"]}
    assert {name: read[name] for name in env} == env


FILES = {
    "x y.py": ("a = 1\n", "a ConfigMap cannot contain a file called 'x y.py'"),
    "tâche.py": ("a = 1\n", "a ConfigMap cannot contain a file called 'tâche.py'"),
    "latin.py": (b"a = '\xe9'\n", "cannot be read: 'utf-8' codec can't decode"),
    "big.py": ("#" * 999_900, "bytes, but a ConfigMap can have only 1,000,000. Put the code"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_task_that_cannot_travel_is_refused(tmp_path: Path, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    spec = load_spec(JOB | {"task": f"{tmp_path / name}:task", "kubernetes": {"image": IMAGE}})
    with pytest.raises(SpecError, match=re.escape(message)):
        render(spec, files=code_beside(spec))


def test_render_as_a_command_carries_a_task_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text("task = 3\n")
    spec = yaml.safe_dump(JOB | {"task": "./my_task.py:task", "kubernetes": {"image": IMAGE}})
    (tmp_path / "job.yaml").write_text(spec)
    done = evenstep("kubernetes", "render", "job.yaml", "kubernetes.nodes=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = of_kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")["data"]
    assert data["my_task.py"] == "task = 3\n"
    assert "\ntask: ./my_task.py:task\n" in data["spec.yaml"]
    for target in TARGETS:
        again = evenstep("kubernetes", "render", "job.yaml", "--target", target, cwd=tmp_path)
        assert again.returncode == 0, again.stderr


def test_a_spec_that_does_not_speak_of_a_cluster_is_reported_what_to_add(tmp_path: Path) -> None:
    ended = evenstep("kubernetes", "render", "digits", cwd=tmp_path)
    assert ended.returncode == 64
    assert "kubernetes: missing; add kubernetes: {image: " in ended.stderr


def test_what_k8s_holds_is_what_the_renderer_makes() -> None:
    made = kustomization(ROOT / "k8s/specs")
    held = {
        str(path.relative_to(ROOT / "k8s")): path.read_text()
        for part in ("base", "overlays")
        for path in (ROOT / "k8s" / part).rglob("*.yaml")
    }
    assert held == made, "make it again: python -m launch.engines.kubernetes.kustomize"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", ["single-gpu", "multi-node", "cpu-smoke", "kueue"])
def test_an_overlay_is_its_spec_rendered(overlay: str) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", ROOT / "k8s/overlays" / overlay],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {made["kind"]: made for made in yaml.safe_load_all(built.stdout)}
    spec = load_spec(ROOT / f"k8s/specs/{overlay}.yaml")
    assert found == {made["kind"]: made for made in render(spec)}


def test_nodes_get_a_secret_of_their_own_as_a_file_and_one_node_none() -> None:
    first, second = (render(job(nodes=2), secret=new_secret()) for _ in range(2))
    made = of_kind(first, "Secret")
    assert len(base64.b64decode(made["data"]["secret"])) == 64
    assert made["data"] != of_kind(second, "Secret")["data"], "one for each run"
    pod = pod_of(first)
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["meeting"]["secret"] == {
        "secretName": made["metadata"]["name"],
        "defaultMode": 0o440,
    }
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "meeting"]
    env = {each["name"]: each.get("value") for each in container["env"]}
    assert env["EVENSTEP_SECRET_FILE"] == f"{mount['mountPath']}/secret"
    assert made["data"]["secret"] not in str(of_kind(first, "Job"))
    assert "meeting" not in str(render(job(), secret=new_secret())[-1]["spec"]["template"])


def test_what_lies_in_the_repository_holds_no_secret() -> None:
    held = [yaml.safe_load_all(path.read_text()) for path in (ROOT / "k8s").rglob("*.yaml")]
    kinds = {made.get("kind") for made in itertools.chain(*held) if isinstance(made, dict)}
    assert "Job" in kinds
    assert "Secret" not in kinds


def test_every_field_has_its_reason() -> None:
    """Each key of every object, at the place where k8s/README.md speaks of it."""
    told = re.sub("(?s)```.*?```", "", (ROOT / "k8s/README.md").read_text())
    words = set(re.findall(r"`([^`]+)`", told))
    named = {part for word in words for part in re.split(r"[^A-Za-z0-9]+", word)}
    objects = [made for target in TARGETS for made in render(job(**EVERY_OPTION), target=target)]  # type: ignore[arg-type]
    objects += render(job(storage_class="fast"))  # with a claim of its own
    watched = JOB | {"tracking": {"metrics_port": 9400}}
    monitored = {"scrape_from": {"kubernetes.io/metadata.name": "m"}, "liveness_probe": True}
    objects += render(load_spec(watched | {"kubernetes": {"image": IMAGE} | monitored}))
    objects.append(yaml.safe_load((ROOT / "k8s/overlays/monitored/podmonitor.yaml").read_text()))
    for options in (KEYS_OF_OBJECTS, FABRIC, LOOSENED, IN_A_BUCKET):
        objects += render(job(**options))
    for gang in ({"gang": "volcano", "gang_queue": "q"}, {"gang": "coscheduling"}):
        objects += render(job(**gang, nodes=2, exclusive_topology="a/b"), target="jobset")
    objects += render(job(nodes=2), secret=new_secret())
    keys = set(itertools.chain(*map(_keys, objects)))
    assert keys - named == set()


PLAIN = {"apiVersion", "kind", "metadata", "spec", "name", "labels", "data", "value", "template"}


def _keys(value: Any, *, of: str = "") -> list[str]:
    free = of in (
        "labels",
        "annotations",
        "matchLabels",
        "selector",
        "data",
        "nodeSelector",
        "requests",
        "limits",
    )
    if isinstance(value, list):
        return [key for each in value for key in _keys(each, of=of)]
    if not isinstance(value, dict) or free:
        return []
    return [k for key, v in value.items() for k in [key, *_keys(v, of=key)] if k not in PLAIN]


def test_a_task_file_with_a_key_in_it_is_not_copied(tmp_path):
    (tmp_path / "task.py").write_text('import os\nHUB_TOKEN = "a1b2c3d4e5f6a7b8c9d0e1"\n')
    spec = load_spec(
        {
            "name": "job",
            "task": f"{tmp_path}/task.py:task",
            "batch": {"global_batch": 4},
            "length": {"steps": 9},
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )
    with pytest.raises(SpecError, match=r"task\.py:2 contains an apparent secret") as told:
        code_beside(spec)
    assert "a1b2" not in str(told.value)
