"""Renders a spec as Kubernetes manifests: a pure function."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from launch.engines.kubernetes.pod.monitoring import ingress
from launch.engines.kubernetes.pod.pod_template import KEY, newer_fields, overrides
from launch.engines.kubernetes.pod.pods import (
    MEETING_SECRET,
    Manifest,
    claim_name,
    labels,
    literal,
    meeting_secret_name,
    own_pods,
)
from launch.engines.kubernetes.pod.queues import pod_group
from launch.engines.kubernetes.pod.security import level_of, loosenings
from launch.engines.kubernetes.refusals import check, checked_template
from launch.engines.kubernetes.targets import TARGETS, template_of, with_template
from service.basics.errors import SpecError, printable
from service.runs.failure_reports import line_of_secret
from service.spec.files import code_files, dump_values, plain_values, with_code_files
from service.spec.kubernetes import KubernetesSpec
from service.spec.models import Spec

Target = Literal["job", "jobset", "kubeflow"]

_PRIVATE = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"]
_CREDENTIALS = (("169.254.169.254", 80), ("169.254.169.252", 988), ("169.254.170.23", 80))
"""Where pods get the credentials of their cloud identity: the metadata servers of AWS and of GKE,
and EKS Pod Identity. IRSA and Azure's workload identity use public addresses."""
_SECRET_BYTES = 32
_CONFIG_MAP_BYTES = 1_000_000  # the server's limit is a little more, for the whole object
_FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")  # the key of a ConfigMap
# Text that kubectl parses as a number or a truth value, but PyYAML, with YAML 1.1, does not.
_NO_TEXT_TO_KUBECTL = re.compile(r"[yYnN]|[-+]?(0[oObBxX]\w+|[\d_.]+([eE][-+]?[\d_]+)?)")


def render(
    spec: Spec,
    *,
    target: Target = "job",
    files: Mapping[str, str] | None = None,
    secret: str | None = None,
) -> list[Manifest]:
    """The objects of a job, in the order of their creation.

    Args:
        files: the files next to the spec; see `code_beside`.
        secret: the secret of the nodes, see `new_secret`; None if the user creates the Secret
            with it.
    Raises:
        SpecError: the spec has no `kubernetes` section, or one that no cluster could run.
    """
    cluster = spec.kubernetes
    if cluster is None:
        raise SpecError(
            "kubernetes: missing; add kubernetes: {image: registry.example.com/team/evenstep:0.1.0}"
        )
    check(spec, cluster)
    workload, needs_service = TARGETS[target](spec, cluster)
    if cluster.pod_template:
        workload = with_template(workload, checked_template(cluster, template_of(workload)))
    account = _object(spec, "v1", "ServiceAccount", {"automountServiceAccountToken": False})
    if cluster.service_account_annotations:
        account["metadata"]["annotations"] = dict(cluster.service_account_annotations)
    objects = [
        *([account] if cluster.service_account is None else []),
        _config_map(spec, files or {}),
        _object(
            spec, "networking.k8s.io/v1", "NetworkPolicy", {"spec": _network_policy(spec, cluster)}
        ),
    ]
    if cluster.storage_claim is None and cluster.runs is None:
        claim = _object(spec, "v1", "PersistentVolumeClaim", {"spec": _claim(cluster)})
        claim["metadata"]["name"] = claim_name(spec, cluster)
        objects.append(claim)
    if secret is not None and cluster.most_nodes > 1:
        objects.append(_meeting_secret(spec, secret))
    group = pod_group(cluster)
    if group is not None:
        objects.append(_object(spec, *group))
    if needs_service:
        objects.append(_object(spec, "v1", "Service", {"spec": _service(spec, cluster)}))
    return [*objects, *workload]


def with_words(value: Any, more: Sequence[str]) -> Any:
    """An object, or a part of one, with additional arguments for every `evenstep run` in it."""
    if isinstance(value, list):
        words = [*value, *map(literal, more)] if value[:2] == ["evenstep", "run"] else value
        return [with_words(each, more) for each in words]
    if isinstance(value, dict):
        return {key: with_words(inner, more) for key, inner in value.items()}
    return value


def new_secret() -> str:
    """A secret for the nodes of one run."""
    return secrets.token_hex(_SECRET_BYTES)


def code_beside(spec: Spec) -> dict[str, str]:
    """The code files in the spec, by file name; empty if it only names modules.

    Raises:
        SpecError: a file cannot be read, contains a secret, has the same name as another, or a name
        that is invalid in a ConfigMap.
    """
    found: dict[str, str] = {}
    paths: dict[str, str] = {}
    for steps, path in code_files(spec).items():
        name, key = Path(path).name, ".".join(map(str, steps))
        if paths.setdefault(name, path) != path:
            raise SpecError(
                f"{key}: {path} and {paths[name]} have the same name, and are mounted in one "
                "folder. Give "
                "one of them another name."
            )
        found[name] = _code(path, key)
    return found


def _code(path: str, key: str) -> str:
    """The text of a file, if it may be copied into a ConfigMap."""
    name = Path(path).name
    if not _FILE_NAME.fullmatch(name):
        raise SpecError(
            f"{key}: a ConfigMap cannot contain a file called {name!r}. Use a name of letters "
            f"without "
            "accents, digits, . _ and - only."
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SpecError(f"{key}: {path} cannot be read: {error}.") from error
    line = line_of_secret(text)
    if line is not None:
        raise SpecError(
            f"{key}: {path}:{line} contains an apparent secret, and the file would be copied "
            "into a ConfigMap, which everybody with access to the namespace can read. Keep it in a "
            "Secret, which the pods can read as a file (kubernetes.mounts), and read it from there."
        )
    return text


def how_to_make_the_secret(spec: Spec) -> list[str]:
    """The command that creates the secret of the rendezvous, if there are several nodes."""
    cluster = spec.kubernetes
    if cluster is None or cluster.most_nodes == 1:
        return []
    place = f" -n {cluster.namespace}" if cluster.namespace else ""
    return [
        f"create once: kubectl create secret generic {meeting_secret_name(spec)}{place} "
        f'--from-literal={MEETING_SECRET}="$(openssl rand -hex 32)"'
    ]


def notes(spec: Spec, objects: list[Manifest], *, target: Target) -> list[str]:
    """The fields that the spec's own template overrides, and the exceptions to Pod Security
    `restricted`: one line each, for the user."""
    cluster, made = spec.kubernetes, template_of(objects)
    assert cluster is not None
    lines = []
    if cluster.pod_template:
        rendered = template_of(TARGETS[target](spec, cluster)[0])
        lines = [str(each) for each in overrides(rendered, made)]
        lines += [
            f"{KEY}.{place} is unknown to Kubernetes 1.31: it needs a newer one"
            for place in newer_fields(cluster.pod_template)
        ]
    found = loosenings(made)
    lines += [f"loosened security: {each.place} ({each.name})" for each in found]
    if found:
        lines.append(f"the namespace must accept Pod Security {level_of(found)}")
    return [printable(line) for line in lines]  # a name of the template may have a line end


def to_yaml(documents: list[Any]) -> str:
    """The documents as one YAML stream."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1 << 30)


def _object(spec: Spec, version: str, kind: str, content: Manifest) -> Manifest:
    cluster = spec.kubernetes
    assert cluster is not None
    place = {"namespace": cluster.namespace} if cluster.namespace else {}
    metadata = {"name": spec.name, **place, "labels": labels(spec)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}


def _config_map(spec: Spec, files: Mapping[str, str]) -> Manifest:
    # Next to the spec, as in the user's directory.
    spec = with_code_files(spec, lambda file, at: f"./{Path(file).name}")
    # Only given values, without defaults: so an image of another version can read it too.
    given = plain_values(spec, defaults=False)
    data = {"spec.yaml": dump_values(given), **files}
    size = sum(len(text.encode()) for text in data.values())
    if size > _CONFIG_MAP_BYTES:
        raise SpecError(
            f"The spec and its code files have {size:,} bytes, but a ConfigMap can have only "
            f"{_CONFIG_MAP_BYTES:,}. Put the code into the image: see docs/how-to/image.md."
        )
    return _object(spec, "v1", "ConfigMap", {"data": data})


def _meeting_secret(spec: Spec, secret: str) -> Manifest:
    data = {MEETING_SECRET: base64.b64encode(secret.encode()).decode()}
    made = _object(spec, "v1", "Secret", {"type": "Opaque", "data": data})
    made["metadata"]["name"] = meeting_secret_name(spec)
    return made


def _service(spec: Spec, cluster: KubernetesSpec) -> Manifest:
    port = {"name": "rendezvous", "port": cluster.port, "targetPort": cluster.port}
    return {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": own_pods(spec)["matchLabels"],
        "ports": [{**port, "protocol": "TCP"}],
    }


def _claim(cluster: KubernetesSpec) -> Manifest:
    mode = "ReadWriteMany" if cluster.most_nodes > 1 else "ReadWriteOnce"
    return {
        "accessModes": [mode],
        **({"storageClassName": cluster.storage_class} if cluster.storage_class else {}),
        "resources": {"requests": {"storage": cluster.storage}},
    }


def _network_policy(spec: Spec, cluster: KubernetesSpec) -> Manifest:
    """The run's pods connect to each other, to DNS, to the store of the runs, and to the tracker if
    it is online.

    Others connect to them only to read their metrics, and only if the spec names them.
    """
    own: list[Manifest] = [{"podSelector": own_pods(spec)}] if cluster.most_nodes > 1 else []
    names = [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "169.254.20.10/32"}}]
    ports = [{"port": n, "protocol": p} for n in (53, 5353) for p in ("UDP", "TCP")]
    egress: list[Manifest] = [{"to": names, "ports": ports}]
    if own:
        egress.insert(0, {"to": own})
    wandb = spec.tracking.wandb
    if wandb is not None and wandb.mode in ("auto", "online"):
        egress.append(_to_public(443))
    egress += [rule for rule in _to_store(cluster) if rule not in egress]
    if cluster.egress:
        egress.append({"to": [{"ipBlock": {"cidr": block}} for block in cluster.egress]})
    return {
        "podSelector": own_pods(spec),
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [*([{"from": own}] if own else []), *ingress(spec, cluster)],
        "egress": egress,
    }


def _to_public(port: int) -> Manifest:
    public = {"cidr": "0.0.0.0/0", "except": _PRIVATE}
    return {"to": [{"ipBlock": public}], "ports": [{"port": port, "protocol": "TCP"}]}


def _to_store(cluster: KubernetesSpec) -> list[Manifest]:
    """The way to the object storage with the runs, and to where a cloud gives credentials.

    The cloud's own endpoints are public. An endpoint with a private address and a name of its own
    needs `kubernetes.egress`: a policy knows no names.
    """
    if cluster.runs is None:
        return []
    endpoint = urlsplit(cluster.env.get("AWS_ENDPOINT_URL", ""))
    if not endpoint.hostname:
        metadata = [
            {"to": [{"ipBlock": {"cidr": f"{host}/32"}}], "ports": [{"port": n, "protocol": "TCP"}]}
            for host, n in _CREDENTIALS
        ]
        return [_to_public(443), *metadata]
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        block = {"cidr": str(ip_network(endpoint.hostname))}
        return [{"to": [{"ipBlock": block}], "ports": [{"port": port, "protocol": "TCP"}]}]
    except ValueError:
        pass  # a name
    names = endpoint.hostname.split(".")
    if names[2:3] == ["svc"]:  # of a Service: its pods may listen on another port
        namespace = {"matchLabels": {"kubernetes.io/metadata.name": names[1]}}
        return [{"to": [{"namespaceSelector": namespace}]}]
    return [_to_public(port)]


class _Dumper(yaml.SafeDumper):
    """Writes multi-line text as a block, so that a spec in a ConfigMap is readable, and
    quotes text that another YAML parser would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quote = "'" if _NO_TEXT_TO_KUBECTL.fullmatch(text) else None
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else quote
    )


_Dumper.add_representer(str, _text_node)
