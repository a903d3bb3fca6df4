"""The spec's own pod template: merged as kubectl merges, checked, and told line by line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pod_fields
import pytest
import yaml
from commands import evenstep
from pod_security import violations
from test_kubernetes_manifests import IMAGE, JOB, TARGETS, job, of_kind, pod_of

from launch.engines.kubernetes.manifests import notes, render, to_yaml
from launch.engines.kubernetes.targets import template_of
from service.basics.errors import SpecError
from service.spec.files import load_spec
from service.spec.kubernetes import Loosening

TEMPLATE: dict[str, Any] = yaml.safe_load("""
metadata:
  annotations: {team.example.com/owner: vision}
  labels: {team: vision}
spec:
  priorityClassName: urgent
  enableServiceLinks: null
  tolerations: [{key: team, operator: Exists}]
  dnsConfig: {options: [{name: ndots, value: "1"}]}
  securityContext: {supplementalGroups: [7]}
  initContainers:
    - name: warm
      image: busybox
      command: [cp, a, /cache]
      securityContext: &restricted
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
  containers:
    - name: trainer
      env:
        - {name: USER, value: me}
        - {name: NEW, value: "1"}
        - {name: PYTHONUNBUFFERED, $patch: delete}
      resources: {limits: {memory: 17Gi}}
      volumeMounts:
        - {mountPath: /cache, name: cache}
        - {mountPath: /tmp, name: scratch, subPath: here}
    - {name: side, image: busybox, securityContext: *restricted}
  volumes:
    - {name: cache, emptyDir: {}}
    - {name: scratch, emptyDir: {sizeLimit: 9Gi}}
""")
OPTIONS: dict[str, Any] = {"nodes": 2, "pod_template": TEMPLATE, "priority_class": "low"}


def by_key(value: Any) -> Any:
    """Lists whose items have a key as mappings: in what order they stand means nothing."""
    if isinstance(value, dict):
        return {key: by_key(inner) for key, inner in value.items()}
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        for key in ("mountPath", "name"):
            if all(key in each for each in value):
                return {each[key]: by_key(each) for each in value}
    return value


def test_the_table_of_fields_is_that_of_kubernetes() -> None:
    assert pod_fields.FILE.read_text() == pod_fields.as_text(), "python tests/pod_fields.py"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_it_is_merged_as_kubectl_merges(tmp_path: Path) -> None:
    plain = of_kind(render(job(**OPTIONS | {"pod_template": {}})), "Job")
    (tmp_path / "job.yaml").write_text(to_yaml([plain]))
    patch = json.dumps({"spec": {"template": TEMPLATE}})
    words = ["kubectl", "patch", "--local", "-f", tmp_path / "job.yaml", "--type", "strategic"]
    done = subprocess.run(
        [*words, "-p", patch, "-o", "json"], capture_output=True, text=True, check=True
    )
    by_kubectl = json.loads(done.stdout)["spec"]["template"]
    ours = of_kind(render(job(**OPTIONS)), "Job")["spec"]["template"]
    assert by_key(ours) == by_key(by_kubectl)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_result_is_strictly_valid_and_restricted(version: str) -> None:
    import kubernetes_validate

    objects = render(job(**OPTIONS))
    for made in objects:
        kubernetes_validate.validate(made, version, strict=True)
    assert violations(pod_of(objects)) == []


@pytest.mark.parametrize("target", TARGETS)
def test_each_field_that_it_overrides_is_reported(target: Any) -> None:
    spec = job(**OPTIONS)
    objects = render(spec, target=target)
    trainer = "spec.containers[trainer]"
    taint = "[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedu..."
    assert sorted(notes(spec, objects, target=target)) == sorted(
        f"kubernetes.pod_template {line}"
        for line in (
            "removes spec.enableServiceLinks: false",
            f"overrides spec.tolerations: {taint} -> [{{key: team, operator: Exists}}]",
            "overrides spec.priorityClassName: low -> urgent",
            f"overrides {trainer}.env[USER].value: evenstep -> me",
            f'removes {trainer}.env[PYTHONUNBUFFERED]: {{name: PYTHONUNBUFFERED, value: "1"}}',
            f"overrides {trainer}.resources.limits[memory]: 16Gi -> 17Gi",
            "overrides spec.volumes[scratch].emptyDir.sizeLimit: 10Gi -> 9Gi",
        )
    ), "and nothing of what it adds"
    first, second = pod_of(objects)["containers"]
    own = "node" if target == "kubeflow" else "trainer"
    assert (first["name"], second["name"]) == (own, "side")
    assert template_of(objects)["metadata"]["labels"]["team"] == "vision"


def test_another_source_replaces_the_one_that_was_there() -> None:
    template = yaml.safe_load("""
spec:
  volumes: [{name: scratch, ephemeral: {volumeClaimTemplate: {spec: {accessModes: [a]}}}}]
  containers:
    - name: trainer
      env: [{name: USER, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
""")
    pod = pod_of(render(job(pod_template=template)))
    (scratch,) = [each for each in pod["volumes"] if each["name"] == "scratch"]
    assert scratch.keys() == {"name", "ephemeral"}
    (user,) = [each for each in pod["containers"][0]["env"] if each["name"] == "USER"]
    assert user.keys() == {"name", "valueFrom"}


def test_a_field_that_1_31_does_not_know_is_reported() -> None:
    spec = job(pod_template={"spec": {"hostnameOverride": "a"}})
    assert notes(spec, render(spec), target="job") == [
        "kubernetes.pod_template.spec.hostnameOverride is unknown to Kubernetes 1.31: it needs a "
        "newer one"
    ]


def test_a_token_in_a_projected_volume_is_a_token_too() -> None:
    token = {"sources": [{"serviceAccountToken": {"path": "token"}}]}
    template = {"spec": {"volumes": [{"name": "own", "projected": token}]}}
    with pytest.raises(SpecError, match=r"spec.volumes\[own\].projected weakens the security"):
        render(job(pod_template=template))
    allowed = {"pod_template": ["service_account_token"]}
    spec = job(pod_template=template, loosened_security=allowed)
    assert notes(spec, render(spec), target="job") == [
        "loosened security: spec.volumes[own].projected (service_account_token)",
        "the namespace must accept Pod Security restricted",
    ]


def test_no_name_of_a_template_ends_the_line_above_the_manifests() -> None:
    """It would be the start of another object, for who applies what was rendered."""
    volume = {"name": "a\nkind: Secret\nb", "hostPath": {"path": "/opt"}}
    options = {"pod_template": {"spec": {"volumes": [volume]}}}
    spec = job(**options, loosened_security={"pod_template": ["volumes"]})
    told = notes(spec, render(spec), target="job")
    assert "spec.volumes[a\\nkind: Secret\\nb].hostPath" in told[0]
    assert not [line for line in told if "\n" in line]


def test_the_lines_stand_above_the_manifests_and_the_pod_reads_the_same_spec(
    tmp_path: Path,
) -> None:
    spec = JOB | {"kubernetes": {"image": IMAGE} | OPTIONS}
    (tmp_path / "job.yaml").write_text(json.dumps(spec))
    done = evenstep("kubernetes", "render", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# kubernetes.pod_template ")
    text = of_kind(list(yaml.safe_load_all(done.stdout)), "ConfigMap")["data"]["spec.yaml"]
    assert load_spec(yaml.safe_load(text)) == load_spec(spec)


def in_trainer(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "trainer", **fields}]}}


LOOSENS: dict[str, dict[str, Any]] = {
    "apparmor": {"spec": {"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}},
    "capabilities": in_trainer(securityContext={"capabilities": {"add": ["SYS_PTRACE"]}}),
    "host_ipc": {"spec": {"hostIPC": True}},
    "host_network": {"spec": {"hostNetwork": True}},
    "host_pid": {"spec": {"hostPID": True}},
    "host_ports": in_trainer(ports=[{"containerPort": 80, "hostPort": 80}]),
    "privilege_escalation": in_trainer(securityContext={"allowPrivilegeEscalation": True}),
    "privileged": in_trainer(securityContext={"privileged": True}),
    "probe_hosts": in_trainer(livenessProbe={"tcpSocket": {"port": 80, "host": "10.0.0.1"}}),
    "proc_mount": in_trainer(securityContext={"procMount": "Unmasked"}),
    "root": {"spec": {"securityContext": {"runAsUser": 0}}},
    "seccomp": {"spec": {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}},
    "selinux": {"spec": {"securityContext": {"seLinuxOptions": {"type": "spc_t"}}}},
    "service_account_token": {"spec": {"automountServiceAccountToken": True}},
    "sysctls": {"spec": {"securityContext": {"sysctls": [{"name": "net.core.a", "value": "1"}]}}},
    "volumes": {"spec": {"volumes": [{"name": "h", "hostPath": {"path": "/opt"}}]}},
    "writable_root": in_trainer(securityContext={"readOnlyRootFilesystem": False}),
}
NOT_OF_POD_SECURITY = {"service_account_token", "writable_root"}
NOT_IN_THE_LIST_OF_THE_TESTS = {"apparmor", "probe_hosts", "selinux"}


@pytest.mark.parametrize("name", get_args(Loosening))
def test_nothing_is_loosened_but_by_its_name(name: Any) -> None:
    template = LOOSENS[name]
    asked = f"write kubernetes.loosened_security.pod_template: [{name}]"
    with pytest.raises(SpecError, match=re.escape(asked)):
        render(job(pod_template=template))
    others = [each for each in get_args(Loosening) if each != name]
    with pytest.raises(SpecError, match=re.escape(asked)):
        render(job(pod_template=template, loosened_security={"pod_template": others}))
    spec = job(pod_template=template, loosened_security={"pod_template": [name]})
    objects = render(spec)
    told = [line for line in notes(spec, objects, target="job") if f"({name})" in line]
    assert len(told) == 1
    seen_by_the_tests = name not in NOT_OF_POD_SECURITY | NOT_IN_THE_LIST_OF_THE_TESTS
    assert bool(violations(pod_of(objects))) == seen_by_the_tests


REFUSED: dict[str, tuple[str, str]] = {
    "a field that is none": (
        "spec: {contaners: []}",
        ".spec.contaners: unknown field; did you mean 'containers'?",
    ),
    "a text that is a number": (
        "spec: {containers: [{name: trainer, env: [{name: A, value: 3}]}]}",
        ".spec.containers.0.env.0.value: must be text, in quotes, but is 3",
    ),
    "a list that is none": (
        "spec: {tolerations: {key: a}}",
        ".spec.tolerations: must be a list, but is {key: a}",
    ),
    "an item without its name": (
        "spec: {volumes: [{emptyDir: {}}]}",
        ".spec.volumes.0.name: missing; it identifies the item",
    ),
    "an item whose name is null": (
        "spec: {imagePullSecrets: [{name: null}]}",
        ".spec.imagePullSecrets.0.name: missing; it identifies the item",
    ),
    "the removal of what has no name": (
        "spec: {volumes: [{name: {}, $patch: delete}]}",
        ".spec.volumes.0.name: must be text, in quotes, but is {}",
    ),
    "a port without its number": (
        "spec: {containers: [{name: trainer, livenessProbe: {tcpSocket: {host: a}}}]}",
        ".spec.containers[trainer].livenessProbe.tcpSocket.port: missing; Kubernetes requires it",
    ),
    "a directive that means nothing there": (
        "spec: {securityContext: {$patch: delete}}",
        ".spec.securityContext.$patch: unknown field",
    ),
    "no container": (
        "spec: {containers: [{name: trainer, $patch: delete}]}",
        ": spec.containers[trainer] cannot be changed here: it trains.",
    ),
    "no containers": ("spec: {containers: null}", ".spec.containers: missing; Kubernetes requires"),
    "no pods": ("spec: null", ": spec cannot be changed here: without it there are no pods."),
    "no labels": ("metadata: {labels: null}", ": metadata.labels cannot be changed here"),
    "a label that none can be": (
        f"metadata: {{labels: {{team: {'x' * 64}}}}}",
        ".metadata.labels.team: must be the value of a Kubernetes label: up to 63 letters",
    ),
    "another run's label": (
        "metadata: {labels: {app.kubernetes.io/instance: x}}",
        ": metadata.labels[app.kubernetes.io/instance] cannot be changed here: the run's objects",
    ),
    "one name for all pods": ("spec: {hostname: a}", ": spec.hostname cannot be changed here"),
    "another end of a pod": (
        "spec: {restartPolicy: OnFailure}",
        ": spec.restartPolicy cannot be changed here: a Job with rules for exit codes needs Never",
    ),
    "less time than the job thinks": (
        "spec: {terminationGracePeriodSeconds: 30}",
        ": spec.terminationGracePeriodSeconds cannot be changed here: set kubernetes.grace_seconds",
    ),
    "another number of nodes": (
        "spec: {containers: [{name: trainer, env: [{name: PET_NNODES, value: '3'}]}]}",
        ": spec.containers[trainer].env[PET_NNODES].value cannot be changed here: it follows from",
    ),
    "the value of a secret": (
        "spec: {containers: [{name: a, env: [{name: HF_TOKEN, value: a1b2c3d4e5f6a7b8}]}]}",
        ".spec.containers[0].env[0].value contains a secret",
    ),
    "a secret as an argument": (
        "spec: {initContainers: [{name: a, image: b, args: [--api-key=a1b2c3d4e5]}]}",
        ".spec.initContainers[0].args[0] contains a secret",
    ),
    "a mount of no volume": (
        "spec: {containers: [{name: trainer, volumeMounts: [{name: q, mountPath: /q}]}]}",
        ": /q mounts the volume q, which is not in spec.volumes (meeting, runs, scratch, shared-m",
    ),
    "a mount over the image": (
        "spec: {containers: [{name: trainer, volumeMounts: [{name: runs, mountPath: /usr}]}]}",
        ": a mount at /usr hides what the image or Evenstep needs.",
    ),
    "a second container that is not restricted": (
        "spec: {containers: [{name: side, image: a}]}",
        ": spec.containers[side].securityContext.allowPrivilegeEscalation weakens the security",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_would_break_the_job_is_refused(mistake: str) -> None:
    template, message = REFUSED[mistake]
    with pytest.raises(SpecError, match=re.escape(f"kubernetes.pod_template{message}")) as told:
        render(job(nodes=2, pod_template=yaml.safe_load(template)))
    assert "a1b2" not in str(told.value)
