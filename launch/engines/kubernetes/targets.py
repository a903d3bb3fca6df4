"""The targets that run the pods: an Indexed Job, a JobSet, or a Kubeflow TrainJob."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from launch.engines.kubernetes.pod.pods import Manifest, labels, pod_template, world_variables
from launch.engines.kubernetes.pod.queues import EXCLUSIVE, queue_annotations, queue_labels
from service.basics.errors import PeerLost, SpecError, Stopped, WillFailAgain
from service.spec.kubernetes import KubernetesSpec
from service.spec.models import Spec

QUEUE_OF = "kueue.x-k8s.io/job-uid"
"""The label by which Kueue's object for a job is found."""
GROUP = "node"
"""The single Job in a JobSet, which is named <run>-node-0."""

_REFERENCES = {
    "configMap": "ConfigMap",
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "secret": "Secret",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
}
"""The keys under which a pod template names an object of another kind."""

NEVER_AGAIN = sorted((WillFailAgain.exit_code, SpecError.exit_code))
NOT_ITS_FAULT = sorted((Stopped.exit_code, PeerLost.exit_code))


def job(spec: Spec, cluster: KubernetesSpec) -> tuple[list[Manifest], bool]:
    """An Indexed Job, which any cluster from 1.31 on can run without additional software."""
    if cluster.exclusive_topology is not None:
        raise SpecError(
            "kubernetes.exclusive_topology: a Job has no exclusive placement. Use --target jobset "
            "or kubeflow, or leave it out."
        )
    several = cluster.most_nodes > 1
    address = f"{spec.name}-0.{spec.name}" if several else None
    world = world_variables(cluster, address=address)
    template = pod_template(spec, cluster, container="trainer", world=world, subdomain=several)
    content = {
        **({"suspend": True} if cluster.queue else {}),
        **_group(cluster),
        **_success(cluster),
        "backoffLimitPerIndex": cluster.restarts,
        "maxFailedIndexes": 0,
        "podReplacementPolicy": "Failed",
        "activeDeadlineSeconds": cluster.deadline_seconds,
        "ttlSecondsAfterFinished": cluster.keep_seconds,
        "podFailurePolicy": {"rules": _rules("trainer")},
        "template": template,
    }
    return [_workload(spec, cluster, "batch/v1", "Job", content)], several


def jobset(spec: Spec, cluster: KubernetesSpec) -> tuple[list[Manifest], bool]:
    """A JobSet: its controller restarts the whole group, and creates the Service."""
    _require_fixed(cluster, "jobset")
    address = f"{spec.name}-{GROUP}-0-0.{spec.name}" if cluster.most_nodes > 1 else None
    world = world_variables(cluster, address=address)
    template = pod_template(spec, cluster, container="trainer", world=world, subdomain=False)
    content = {
        **({"suspend": True} if cluster.queue else {}),
        "ttlSecondsAfterFinished": cluster.keep_seconds,
        **_job_set(cluster, "trainer", template, replicas=True),
    }
    return [_workload(spec, cluster, "jobset.x-k8s.io/v1alpha2", "JobSet", content)], False


def kubeflow(spec: Spec, cluster: KubernetesSpec) -> tuple[list[Manifest], bool]:
    """A TrainJob with its own runtime, because the default ones have no shared memory, no
    securityContext and no failure policy. The trainer sets the five variables itself."""
    _require_fixed(cluster, "kubeflow")
    template = pod_template(spec, cluster, container="node", world=[], subdomain=False)
    group = _job_set(cluster, "node", template, replicas=False)
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    of_the_jobs = group["replicatedJobs"][0]["template"]
    of_the_jobs["metadata"] = {**of_the_jobs.get("metadata", {}), "labels": step}
    ml: Manifest = {"numNodes": cluster.most_nodes, "torch": {}}
    runtime = _workload(
        spec,
        cluster,
        "trainer.kubeflow.org/v1alpha1",
        "TrainingRuntime",
        {"mlPolicy": ml, "template": {"spec": group}},
    )
    runtime["metadata"]["labels"] = {
        **labels(spec),
        "trainer.kubeflow.org/framework": "torch",
    }
    asked = {
        **({"suspend": True} if cluster.queue else {}),
        "runtimeRef": {
            "apiGroup": "trainer.kubeflow.org",
            "kind": "TrainingRuntime",
            "name": spec.name,
        },
        "trainer": {"numNodes": cluster.most_nodes, "numProcPerNode": cluster.processes_per_node},
    }
    train_job = _workload(spec, cluster, "trainer.kubeflow.org/v1alpha1", "TrainJob", asked)
    return [runtime, train_job], False


def with_template(objects: list[Manifest], template: Manifest) -> list[Manifest]:
    """The objects with another pod template."""
    objects = copy.deepcopy(objects)
    template_of(objects).clear()
    template_of(objects).update(template)
    return objects


def with_own_names(objects: list[Manifest], kinds: Sequence[str], mark: str) -> list[Manifest]:
    """The objects, of which those of `kinds` get another name, also where the others use them."""
    named = {(each["kind"], each["metadata"]["name"]) for each in objects if each["kind"] in kinds}

    def renamed(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [renamed(each, key) for each in value]
        if not isinstance(value, dict):
            return value
        kind = value["kind"] if key == "runtimeRef" else _REFERENCES.get(key)
        return {
            inner: f"{each}-{mark}"
            if inner in ("name", "secretName") and (kind, each) in named
            else renamed(each, inner)
            for inner, each in value.items()
        }

    made: list[Manifest] = renamed(objects)
    for each in made:
        if (each["kind"], each["metadata"]["name"]) in named:
            each["metadata"]["name"] += f"-{mark}"
    return made


def template_of(objects: list[Manifest]) -> Manifest:
    """The pod template, wherever the target has it."""
    work = {made["kind"]: made["spec"] for made in objects if "spec" in made}
    if "TrainingRuntime" in work:
        work["JobSet"] = work["TrainingRuntime"]["template"]["spec"]
    if "JobSet" in work:
        (replicated,) = work["JobSet"]["replicatedJobs"]
        work["Job"] = replicated["template"]["spec"]
    template: Manifest = work["Job"]["template"]
    return template


TARGETS: dict[str, Callable[[Spec, KubernetesSpec], tuple[list[Manifest], bool]]] = {
    "job": job,
    "jobset": jobset,
    "kubeflow": kubeflow,
}
"""Each returns the objects that run the pods, and whether they need our own Service."""


def _workload(
    spec: Spec, cluster: KubernetesSpec, version: str, kind: str, content: Manifest
) -> Manifest:
    place = {"namespace": cluster.namespace} if cluster.namespace else {}
    queue = queue_labels(cluster) if kind != "TrainingRuntime" else {}
    metadata: Manifest = {"name": spec.name, **place, "labels": {**labels(spec), **queue}}
    if kind == "Job" and (marks := queue_annotations(cluster)):
        metadata["annotations"] = marks
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": content}


def _group(cluster: KubernetesSpec) -> Manifest:
    return {
        "completionMode": "Indexed",
        "completions": cluster.most_nodes,
        "parallelism": cluster.most_nodes,
    }


def _success(cluster: KubernetesSpec) -> Manifest:
    """An elastic Job is done with its node 0: an index may never have had a pod."""
    if not cluster.is_elastic:
        return {}
    return {"successPolicy": {"rules": [{"succeededIndexes": "0"}]}}


def _require_fixed(cluster: KubernetesSpec, target: str) -> None:
    if cluster.is_elastic:
        raise SpecError(
            f"kubernetes.nodes: --target {target} restarts all pods when one is lost. Use "
            "--target job for least and most, or write a fixed number of nodes."
        )


def _rules(container: str) -> list[Manifest]:
    """The meaning of exit codes for the Job controller; the first matching rule applies."""
    return [
        {"action": "FailJob", "onExitCodes": _codes(container, NEVER_AGAIN)},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _codes(container, NOT_ITS_FAULT)},
    ]


def _codes(container: str, codes: list[int]) -> Manifest:
    return {"containerName": container, "operator": "In", "values": codes}


def _job_set(
    cluster: KubernetesSpec, container: str, template: Manifest, *, replicas: bool
) -> Manifest:
    """One Job of all nodes that fails with its first pod, and the reaction of the set."""
    never, not_its_fault = ("|".join(map(str, c)) for c in (NEVER_AGAIN, NOT_ITS_FAULT))
    failed = [
        {
            "action": "FailJob",
            "onExitCodes": _codes(container, sorted(NEVER_AGAIN + NOT_ITS_FAULT)),
        },
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    group: Manifest = {
        **_group(cluster),
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "activeDeadlineSeconds": cluster.deadline_seconds,
        "podFailurePolicy": {"rules": failed},
        "template": template,
    }
    exclusive = cluster.exclusive_topology
    alone = {"metadata": {"annotations": {EXCLUSIVE: exclusive}}} if exclusive else {}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": cluster.restarts,
            "rules": [
                {
                    "name": "neverAgain",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [f".*exit code ({never}) .*"],
                },
                {
                    "name": "notItsFault",
                    "action": "RestartJobSetAndIgnoreMaxRestarts",
                    "onJobFailureReasons": ["PodFailurePolicy"],
                    "onJobFailureMessagePatterns": [
                        f".*exit code ({not_its_fault}) .*",
                        ".*condition DisruptionTarget .*",
                    ],
                },
            ],
        },
        "replicatedJobs": [
            {
                "name": GROUP,
                **({"replicas": 1} if replicas else {}),
                "template": {**alone, "spec": group},
            }
        ],
    }
