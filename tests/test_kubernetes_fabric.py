"""Fast networks, devices of any vendor, queues and gangs: what a spec asks for is rendered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, evenstep
from pod_security import violations
from test_kubernetes_manifests import FABRIC, IMAGE, JOB, LOOSENED, TARGETS, job, of_kind, pod_of

from launch.engines.kubernetes.manifests import notes, render
from launch.engines.kubernetes.pod.fabrics import FABRICS
from launch.engines.kubernetes.states import advised
from launch.engines.kubernetes.targets import template_of
from service.basics.errors import SpecError


def variables_of(pod: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}


@pytest.mark.parametrize("target", TARGETS)
def test_a_fabric_arrives(target: Any) -> None:
    objects = render(job(**FABRIC), target=target)
    template, pod = template_of(objects), pod_of(objects)
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert container["resources"]["requests"] == limits
    devices = {"vpc.amazonaws.com/efa": "4", "rdma/hca_shared_devices_a": "1"}
    pages = {"hugepages-2Mi": "5Gi", "hugepages-1Gi": "2Gi"}
    assert limits == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "2"} | devices | pages
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["schedulerName"] == "own-scheduler"
    assert pod["serviceAccountName"] == "reader"
    assert "ServiceAccount" not in {made["kind"] for made in objects}, "it is there already"
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (23450,) * 3
    assert context["supplementalGroups"] == [44, 109]
    own = {"matchLabels": {"app.kubernetes.io/instance": "digits"}}
    hosts, zones = pod["topologySpreadConstraints"]
    assert hosts == {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": own,
    }
    assert (zones["maxSkew"], zones["whenUnsatisfiable"]) == (2, "ScheduleAnyway")
    assert {made["metadata"]["labels"]["team"] for made in objects} == {"vision"}
    assert template["metadata"]["labels"]["team"] == "vision"
    assert template["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-required-topology": "example.com/rack",
        "k8s.v1.cni.cncf.io/networks": "fast-a, fast-b",
    }
    admitted = objects[-1]["metadata"]["labels"]
    assert admitted["kueue.x-k8s.io/queue-name"] == "training"
    assert admitted["kueue.x-k8s.io/priority-class"] == "high"
    assert notes(job(**FABRIC), objects, target=target) == [], "nothing of it loosens the security"


@pytest.mark.parametrize("fabric", FABRICS)
def test_a_fabric_is_its_variables_between_nodes(fabric: str) -> None:
    def set_by(**options: Any) -> dict[str, Any]:
        return variables_of(pod_of(render(job(fabric=fabric, **options))))

    plain = variables_of(pod_of(render(job(nodes=2))))
    assert set_by(nodes=2) == plain | FABRICS[fabric]
    assert not set_by().keys() & FABRICS[fabric].keys(), "one node needs no network"
    assert set_by(nodes=2, env={"NCCL_NET": "mine"})["NCCL_NET"] == "mine", "the user's wins"
    with_pages = set_by(nodes=2, hugepages={"2Mi": "4Mi"})
    assert "FI_EFA_USE_HUGE_PAGE" not in with_pages, "pages that were asked for are used"


def test_the_table_of_the_docs_is_what_is_set() -> None:
    text = (ROOT / "docs/how-to/cluster-options.md").read_text()
    rows = re.findall(r"(?m)^\| `(infiniband|efa|tcp)` \| ([^|]*) \|", text)
    told = {name: dict(re.findall(r"`(\w+)=([^`]*)`", cell)) for name, cell in rows}
    assert told == FABRICS


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_loosened_pods_are_valid_and_only_they_are_loosened(version: str) -> None:
    import kubernetes_validate

    objects = render(job(**LOOSENED))
    for made in objects:
        kubernetes_validate.validate(made, version, strict=True)
    pod = pod_of(objects)
    assert violations(pod) == [
        "hostNetwork",
        "added capabilities",
        "runAsNonRoot != true",
        "runAsUser=0",
    ]
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["securityContext"]["fsGroup"] == 10001, "secrets stay readable by the group"
    (container,) = pod["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert violations(pod_of(render(job(nodes=2, fabric="infiniband")))) == []


def test_what_is_loosened_stands_above_the_manifests(tmp_path: Path) -> None:
    spec = yaml.safe_dump(JOB | {"kubernetes": {"image": IMAGE} | LOOSENED})
    (tmp_path / "job.yaml").write_text(spec)
    done = evenstep("kubernetes", "render", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    container = "spec.containers[trainer].securityContext"
    assert done.stdout.splitlines()[:5] == [
        "# loosened security: spec.hostNetwork (host_network)",
        f"# loosened security: {container}.capabilities.add[IPC_LOCK] (capabilities)",
        f"# loosened security: {container}.runAsNonRoot (root)",
        "# the namespace must accept Pod Security privileged",
        "apiVersion: v1",
    ]
    assert len(list(yaml.safe_load_all(done.stdout))) == 7, "and they can be read"


def test_manifests_for_a_repository_have_no_secret_and_say_how_to_make_it(tmp_path: Path) -> None:
    spec = yaml.safe_dump(JOB | {"kubernetes": {"image": IMAGE, "nodes": 2, "namespace": "ml"}})
    (tmp_path / "job.yaml").write_text(spec)
    first, again = (
        evenstep("kubernetes", "render", "job.yaml", "--without-secret", cwd=tmp_path).stdout
        for _ in range(2)
    )
    assert first == again, "the same bytes each time, as a repository wants them"
    objects = list(yaml.safe_load_all(first))
    assert "Secret" not in {made["kind"] for made in objects}
    volumes = {each["name"]: each for each in pod_of(objects)["volumes"]}
    name = volumes["meeting"]["secret"]["secretName"]
    assert first.splitlines()[0] == (
        f"# create once: kubectl create secret generic {name} -n ml "
        '--from-literal=secret="$(openssl rand -hex 32)"'
    )
    alone = ("job.yaml", "kubernetes.nodes=1", "--without-secret")
    done = evenstep("kubernetes", "render", *alone, cwd=tmp_path)
    assert not done.stdout.startswith("#"), "one node meets nobody"


def test_root_alone_is_accepted_by_a_baseline_namespace() -> None:
    spec = job(loosened_security={"root": True})
    found = notes(spec, render(spec), target="job")
    assert found[-1] == "the namespace must accept Pod Security baseline"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gang", ["volcano", "coscheduling"])
def test_a_gang_starts_all_pods_or_none(gang: str, target: Any) -> None:
    options = {"nodes": 3, "gang": gang, "priority_class": "batch"}
    options |= {"gang_queue": "vision"} if gang == "volcano" else {}
    objects = render(job(**options), target=target)
    kinds = [made["kind"] for made in objects]
    last = objects[-1]["kind"]
    assert kinds.index("PodGroup") < kinds.index(last), "it is there before the pods"
    group, template = of_kind(objects, "PodGroup"), template_of(objects)
    assert group["spec"]["minMember"] == 3
    marks = template["metadata"]
    if gang == "volcano":
        assert group["apiVersion"] == "scheduling.volcano.sh/v1beta1"
        assert (group["spec"]["queue"], group["spec"]["priorityClassName"]) == ("vision", "batch")
        assert marks["annotations"]["scheduling.k8s.io/group-name"] == group["metadata"]["name"]
        assert template["spec"]["schedulerName"] == "volcano"
    else:
        assert group["apiVersion"] == "scheduling.x-k8s.io/v1alpha1"
        assert marks["labels"]["scheduling.x-k8s.io/pod-group"] == group["metadata"]["name"]
        assert template["spec"]["schedulerName"] == "scheduler-plugins-scheduler"
    other = pod_of(render(job(**options, scheduler="mine"), target=target))
    assert other["schedulerName"] == "mine"


@pytest.mark.parametrize("target", ["jobset", "kubeflow"])
def test_a_job_has_its_nodes_to_itself(target: Any) -> None:
    objects = render(job(nodes=2, exclusive_topology="example.com/rack"), target=target)
    work = {made["kind"]: made["spec"] for made in objects if "spec" in made}
    group = work["JobSet"] if target == "jobset" else work["TrainingRuntime"]["template"]["spec"]
    (replicated,) = group["replicatedJobs"]
    assert replicated["template"]["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "example.com/rack"
    }
    models = pytest.importorskip("kubeflow_trainer_api.models")
    known = {"JobSet": models.JobsetV1alpha2JobSet}
    known["TrainingRuntime"] = models.TrainerV1alpha1TrainingRuntime
    for made in objects:
        if made["kind"] in known:
            assert known[made["kind"]].from_dict(made).to_dict() == made


def test_the_status_says_where_a_fabric_is_asked_for() -> None:
    for told in (
        "0/5 nodes are available: 5 Insufficient rdma/hca_shared_devices_a",
        "0/5 nodes are available: 5 node(s) didn't match pod topology spread constraints",
    ):
        assert re.search("resources, hugepages, .*topology_spread", advised(told))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a capability that nobody gets": (
        {"loosened_security": {"capabilities": ["IPC_LOCK"]}},
        "kubernetes.loosened_security: must have root: true for IPC_LOCK, because Kubernetes gives",
    ),
    "a capability by its kernel's name": (
        {"loosened_security": {"capabilities": ["ipc_lock"]}},
        "must be a Linux capability without CAP_, such as IPC_LOCK, but is 'ipc_lock'",
    ),
    "a fabric on CPUs": (
        {"device": "cpu", "fabric": "tcp"},
        "kubernetes: must have a device with fabric, because on CPUs gloo exchanges data over TCP",
    ),
    "the devices twice": (
        {"resources": {"nvidia.com/gpu": 8}},
        "kubernetes: must have nvidia.com/gpu in device, and its number in processes_per_node",
    ),
    "a resource without a vendor": (
        {"resources": {"efa": 4}},
        "kubernetes.resources: must be the cluster's name of a resource, such as rdma/hca_sh",
    ),
    "a part of a device": (
        {"resources": {"rdma/hca": "0.5"}},
        "must be a whole number, but is '0.5'",
    ),
    "half a huge page": (
        {"hugepages": {"2Mi": "3Mi"}},
        "kubernetes.hugepages: must be a multiple of the page size, but 3Mi is not a multiple",
    ),
    "a label that is ours": (
        {"labels": {"app.kubernetes.io/instance": "x"}},
        "kubernetes.labels: must not set app.kubernetes.io/instance, which Evenstep uses",
    ),
    "a priority without a queue": (
        {"queue_priority": "high"},
        "kubernetes: must have queue with queue_priority, which Kueue reads",
    ),
    "two topologies": (
        {"queue": "q", "queue_topology_required": "a/b", "queue_topology_preferred": "a/c"},
        "must have one of queue_topology_required and queue_topology_preferred",
    ),
    "a queue of another scheduler": (
        {"gang": "coscheduling", "gang_queue": "q"},
        "must have gang: volcano with gang_queue; the key for a Kueue queue is queue",
    ),
    "exclusive placement of a Job": (
        {"exclusive_topology": "example.com/rack"},
        "kubernetes.exclusive_topology: a Job has no exclusive placement. Use --target jobset",
    ),
    "root by the back door": ({"user": 0}, "kubernetes.user: must be at least 1, but is 0"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_reported_with_its_place(mistake: str) -> None:
    options, message = REFUSED[mistake]
    with pytest.raises(SpecError, match=re.escape(message)):
        render(job(**options))
