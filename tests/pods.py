"""The one stand-in for a cluster: runs the pods of a rendered Indexed Job on this machine.

A pod's container has the command, environment, volumes, user, limits and grace period of the
manifest; an engine (tests/engines.py) runs it. What the Job controller does is done as the one of
Kubernetes 1.36 was seen to do it: podFailurePolicy, the back-off of each index,
podReplacementPolicy; and its successPolicy as documented. Not the NetworkPolicy: the pods' network
has no way out at all.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import CLUSTER_DOMAIN, NAMESPACE, Container, Engine, Mount, Wanted

from service.spec.kubernetes import quantity

_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass
class Pod:
    """One attempt at one index."""

    index: int
    attempt: int
    container: Container
    disrupted: bool = False
    kill_at: float = float("inf")

    @property
    def log(self) -> str:
        return self.container.log


@dataclass
class Cluster:
    """The controller of one Job, and the machines its pods run on."""

    objects: list[dict[str, Any]]
    directory: Path
    engine: Engine
    backoff: float = 0.05
    """Seconds here for one of the controller's."""
    running: dict[int, Pod] = field(default_factory=dict)
    ended: list[tuple[int, int, str]] = field(default_factory=list)
    """(index, exit code, what the policy makes of it) of each pod that has ended."""
    pods: list[Pod] = field(default_factory=list)
    condition: str | None = None
    suspended: bool = False
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        kinds = {made["kind"]: made for made in self.objects}
        self.job = kinds["Job"]["spec"]
        self.files = kinds["ConfigMap"]["data"]
        made = [each for each in self.objects if each["kind"] == "Secret"]
        self.secrets = {each["metadata"]["name"]: each["data"] for each in made}
        self.service = kinds.get("Service")
        self.name = kinds["Job"]["metadata"]["name"]
        self.run_name = kinds["ConfigMap"]["metadata"]["name"]
        self.pod = self.job["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self.nodes = self.job["completions"]
        self.due = dict.fromkeys(range(self.nodes), 0.0)
        self.failures = [0] * self.nodes
        self.attempts = [0] * self.nodes
        self.directory.mkdir(parents=True)
        self.runs.mkdir()
        self._give_to_the_group(self.runs)

    @property
    def runs(self) -> Path:
        """The one volume that outlives its pods."""
        return self.directory / "runs"

    def __enter__(self) -> Cluster:
        self.engine.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.__exit__(*exception)

    def run(self, *, seconds: float, each: Callable[[Cluster], None] = lambda _: None) -> str:
        """Run the Job to its end: Complete or Failed, with the reason."""
        deadline = time.monotonic() + seconds
        while self.condition is None:
            assert time.monotonic() < deadline, f"no end in {seconds} s\n{self.logs()}"
            for index in [i for i, due in self.due.items() if due <= time.monotonic()]:
                del self.due[index]
                self.start(index)
            self._wait()
            each(self)
            if len(self.done) == self.nodes or self._is_met():
                self.condition = "Complete"
        for pod in list(self.running.values()):  # a Job that is at its end ends what still runs
            self.stop(pod.index)
        while self.running:
            assert time.monotonic() < deadline + 60, self.logs()
            self._wait()
        return self.condition

    def start(self, index: int) -> None:
        """Start a pod of this index, at an address that no pod has had."""
        attempt = self.attempts[index]
        self.attempts[index] += 1
        pod = Pod(index, attempt, self.engine.start(self._wanted(index, attempt)))
        self.running[index] = pod
        self.pods.append(pod)

    def stop(self, index: int, *, disruption: bool = False) -> None:
        """Delete or evict a pod: SIGTERM, the grace period, SIGKILL."""
        pod = self.running[index]
        pod.disrupted = pod.disrupted or disruption
        if pod.kill_at == float("inf"):
            pod.kill_at = time.monotonic() + self.pod["terminationGracePeriodSeconds"]
            pod.container.send(signal.SIGTERM)

    def suspend(self) -> None:
        """What Kueue does to let another job go first: the controller deletes the pods."""
        self.suspended = True
        self.due.clear()
        for index in list(self.running):
            self.stop(index)

    def resume(self) -> None:
        """Let it go on; the pods that are not gone yet are waited for."""
        self.suspended = False
        self.due = dict.fromkeys(set(range(self.nodes)) - self.done - self.running.keys(), 0.0)

    def kill(self, index: int) -> None:
        """End a pod's container without a word, as when it runs out of memory."""
        self.running[index].container.send(signal.SIGKILL)

    def freeze(self, index: int) -> None:
        """Stop the training processes of a pod, and leave its launcher as it is."""
        self.running[index].container.freeze()

    def step(self) -> int:
        """The newest step that the run has recorded."""
        metrics = self.runs / self.run_name / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def logs(self) -> str:
        return "\n".join(f"---- pod {p.index}, attempt {p.attempt}\n{p.log}" for p in self.pods)

    # ---- the controller

    def _is_met(self) -> bool:
        """Whether the Job is done by its successPolicy, whatever the other pods do."""
        rules = self.job.get("successPolicy", {}).get("rules", ())
        return any(self.done >= {int(rule["succeededIndexes"])} for rule in rules)

    def _wait(self) -> None:
        """Wait a moment for a pod to end, and do what the controller does about it."""
        for pod in list(self.running.values()):
            code = pod.container.ended(0.05)
            if code is not None:
                self._ended(pod, code)
            elif time.monotonic() > pod.kill_at:
                pod.container.send(signal.SIGKILL)

    def _ended(self, pod: Pod, code: int) -> None:
        del self.running[pod.index]
        self.engine.forget(pod.container)
        action = "Complete" if code == 0 else self._action(pod, code)
        if self.suspended and code != 0:
            action = "deleted"  # which is no failure
        self.ended.append((pod.index, code, action))
        if self.condition is not None or action == "deleted":
            return
        if action == "Complete":
            self.done.add(pod.index)
            return
        if action == "FailJob":
            self.condition = "Failed: PodFailurePolicy"
            return
        if action == "Count":
            self.failures[pod.index] += 1
            if self.failures[pod.index] > self.job["backoffLimitPerIndex"]:
                self.condition = "Failed: MaxFailedIndexesExceeded"
                return
        delay = 10 * 2 ** max(0, self.failures[pod.index] - 1) * self.backoff
        assert self.job["podReplacementPolicy"] == "Failed", "and so only now, when it has ended"
        self.due[pod.index] = time.monotonic() + delay

    def _action(self, pod: Pod, code: int) -> str:
        for rule in self.job["podFailurePolicy"]["rules"]:
            codes = rule.get("onExitCodes")
            if codes is not None:
                assert codes["operator"] == "In"
                if code in codes["values"]:
                    return str(rule["action"])
            elif pod.disrupted:
                assert rule["onPodConditions"][0]["type"] == "DisruptionTarget"
                return str(rule["action"])
        return "Count"

    # ---- the kubelet

    def _wanted(self, index: int, attempt: int) -> Wanted:
        context, limits = self.container["securityContext"], self.container["resources"]["limits"]
        assert context["readOnlyRootFilesystem"], "the one kind of container that engines know"
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        user = self.pod["securityContext"]["runAsUser"]
        assert user != 0, "runAsNonRoot: CreateContainerConfigError"
        place = self.directory / f"pod-{index}-{attempt}"
        place.mkdir()
        variables = self._variables(index)
        subdomain = self.pod.get("subdomain")
        return Wanted(
            name=f"{self.engine.name}-{index}-{attempt}",
            host=f"{self.name}-{index}",
            domain=f"{subdomain}.{NAMESPACE}.svc.{CLUSTER_DOMAIN}" if subdomain else None,
            is_public=subdomain is not None and self.service is not None,
            address=self.engine.address(sum(self.attempts) - 1),
            image=self.container["image"],
            command=tuple(_expanded(word, variables) for word in self.container["command"]),
            variables=variables,
            mounts=tuple(self._mounts(place)),
            user=user,
            group=self.pod["securityContext"]["runAsGroup"],
            memory_bytes=int(quantity(limits["memory"])),
            cores=quantity(limits["cpu"]),
            place=place,
        )

    def _variables(self, index: int) -> dict[str, str]:
        """The manifest's, and what the controller adds."""
        variables = {}
        for each in self.container["env"]:
            source = each.get("valueFrom")
            if source is not None:
                assert source == {"fieldRef": {"fieldPath": _RANK}}
            variables[each["name"]] = each.get("value", str(index))
        return variables | {"JOB_COMPLETION_INDEX": str(index)}

    def _mounts(self, place: Path) -> Iterator[Mount]:
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        for mount in self.container["volumeMounts"]:
            where, volume = mount["mountPath"], volumes[mount["name"]]
            memory = volume.get("emptyDir", {})
            if memory.get("medium") == "Memory":
                yield Mount(where, None, size_bytes=int(quantity(memory["sizeLimit"])))
                continue
            directory = self._volume(volume, place / mount["name"])
            if directory is not None:
                yield Mount(where, directory, read_only=mount.get("readOnly", False))

    def _volume(self, volume: dict[str, Any], own: Path) -> Path | None:
        if "persistentVolumeClaim" in volume:
            return self.runs
        if "secret" in volume:
            asked = volume["secret"]
            found = self.secrets.get(asked["secretName"])
            if found is None:
                assert asked.get("optional"), f"there is no secret {asked['secretName']}"
                return None
            own.mkdir()
            self._give_to_the_group(own)
            for name, text in found.items():
                (own / name).write_bytes(base64.b64decode(text))
                os.chown(own / name, 0, self.pod["securityContext"]["fsGroup"])
                (own / name).chmod(asked["defaultMode"])
            return own
        own.mkdir()
        if "configMap" in volume:
            for name, text in self.files.items():
                (own / name).write_text(text)
        else:
            assert "emptyDir" in volume
            self._give_to_the_group(own)
        return own

    def _give_to_the_group(self, directory: Path) -> None:
        """What fsGroup means: root's still, and the group may write."""
        os.chown(directory, 0, self.pod["securityContext"]["fsGroup"])
        directory.chmod(0o2775)


def as_its_controllers_make_it(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Job and the Service that a JobSet becomes, or a TrainJob through its runtime.

    Not the failurePolicy of the set; it is read from the sources of JobSet v0.13 and of the torch
    plug-in of Kubeflow Trainer (August 2026), neither of which runs here.
    """
    kinds = {made["kind"]: made for made in objects}
    name = objects[-1]["metadata"]["name"]
    of_a_runtime = "TrainingRuntime" in kinds
    of_a_set = kinds["TrainingRuntime"]["spec"]["template"] if of_a_runtime else kinds["JobSet"]
    (replicated,) = copy.deepcopy(of_a_set["spec"]["replicatedJobs"])
    job = replicated["template"]["spec"]
    job["template"]["spec"]["subdomain"] = name
    if of_a_runtime:
        trainer = kinds["TrainJob"]["spec"]["trainer"]
        first = f"{name}-{replicated['name']}-0-0.{name}"
        job["template"]["spec"]["containers"][0]["env"] += [
            {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
            {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _RANK}}},
            {"name": "PET_MASTER_ADDR", "value": first},
            {"name": "PET_MASTER_PORT", "value": "29500"},
        ]
    made_name = {"name": f"{name}-{replicated['name']}-0"}
    made = [{"kind": "Job", "metadata": made_name, "spec": job}]
    return [*objects, *made, {"kind": "Service", "metadata": {"name": name}}]


def _expanded(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word)
