"""Errors that a cluster would report, found before the cluster is asked."""

from __future__ import annotations

import hashlib
import os.path
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from launch.engines.kubernetes.pod.monitoring import check_monitoring
from launch.engines.kubernetes.pod.pod_template import KEY, merged_template
from launch.engines.kubernetes.pod.pods import Manifest, own_mounts, world_variables
from launch.engines.kubernetes.pod.security import loosenings
from service.basics.errors import SpecError
from service.health.stop_budget import LEAST_SECONDS
from service.plan.plan import make_plan, share_of_process, with_micro_batch
from service.runs.directory import require_no_secret
from service.spec.kubernetes import KubernetesSpec, quantity
from service.spec.models import Spec
from service.storage.address import address_in

_MANY_ROWS = 1 << 60
_QUANTITIES = ("cpu", "memory", "shared_memory", "scratch", "storage")
_OF_THE_IMAGE = ("/bin", "/dev", "/etc", "/lib", "/lib64", "/opt/evenstep", "/proc", "/sys", "/usr")
"""Without these the container cannot run."""


def check(spec: Spec, cluster: KubernetesSpec) -> None:
    """Refuse a spec that no cluster could run.

    Raises:
        SpecError: names the key, and what to write instead.
    """
    require_name(spec.name, cluster.most_nodes)
    require_no_secret(spec)
    _check_runs(cluster)
    _check_quantities(cluster)
    _check_mounts(cluster)
    _check_variables(cluster)
    _check_grace(spec, cluster)
    check_monitoring(spec, cluster)
    # With more rows than can exist, to refuse only what fails with any number of rows.
    share = None
    if not cluster.on_cpu:
        most = cluster.most_nodes * cluster.processes_per_node
        share = share_of_process(spec, processes=most, train_rows=_MANY_ROWS)
    planned = spec if share is None else with_micro_batch(spec, share)
    for nodes in {cluster.least_nodes, cluster.most_nodes}:
        processes = nodes * cluster.processes_per_node
        make_plan(planned, processes=processes, train_rows=_MANY_ROWS, test_rows=1)


def checked_template(cluster: KubernetesSpec, rendered: Manifest) -> Manifest:
    """The rendered template of the pods, merged with the template in the spec.

    Raises:
        SpecError: the template in the spec is wrong, loosens security without permission, or mounts
            a volume over what the image or Evenstep needs.
    """
    made = merged_template(rendered, cluster.pod_template)
    allowed = set(cluster.loosened_security.pod_template)
    before = set(loosenings(rendered))
    for each in loosenings(made):
        if each not in before and each.name not in allowed:
            raise SpecError(
                f"{KEY}: {each.place} weakens the security of the pods. If this is intended, write "
                f"kubernetes.loosened_security.pod_template: [{each.name}]."
            )
    volumes = {volume["name"] for volume in made["spec"].get("volumes") or []}
    for mount in (*_mounts_of(made, "initContainers"), *_mounts_of(made, "containers")):
        if mount["name"] not in volumes:
            raise SpecError(
                f"{KEY}: {mount['mountPath']} mounts the volume {mount['name']}, which is not in "
                f"spec.volumes ({', '.join(sorted(volumes))})."
            )
    known = {mount["mountPath"] for mount in _mounts_of(rendered, "containers")}
    for mount in made["spec"]["containers"][0].get("volumeMounts") or []:
        path = os.path.normpath("/" + mount["mountPath"].lstrip("/"))
        if mount["mountPath"] not in known and _hides_what_is_needed(path, known):
            raise SpecError(f"{KEY}: a mount at {path} hides what the image or Evenstep needs.")
    return made


def _mounts_of(template: Manifest, kind: str) -> list[Manifest]:
    containers = template["spec"].get(kind) or []
    return [mount for each in containers for mount in each.get("volumeMounts") or []]


def require_name(name: str, nodes: int) -> None:
    """Refuse a name that a pod, host or Service cannot have.

    Raises:
        SpecError: says which names are valid.
    """
    longest = 63 - len(f"-node-0-{nodes - 1}")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) or len(name) > longest:
        # With a digest: `my_run` and `my.run` must not become one run.
        mark = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:6]
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        near = near[: longest - len(mark) - 1].strip("-") or "run"
        raise SpecError(
            f"name: on a cluster it is part of host names: up to {longest} lower-case letters, "
            f"digits and -, beginning with a letter; but is {name!r}. Use --name {near}-{mark}."
        )


def _check_runs(cluster: KubernetesSpec) -> None:
    if cluster.runs is None:
        return
    try:
        address_in(cluster.runs)
    except SpecError as error:
        raise SpecError(f"kubernetes.runs: {error}") from error


def _check_quantities(cluster: KubernetesSpec) -> None:
    for name in _QUANTITIES:
        if quantity(getattr(cluster, name)) == 0:
            raise SpecError(f"kubernetes.{name}: must be more than 0.")


def _check_mounts(cluster: KubernetesSpec) -> None:
    taken = {mount["mountPath"]: "Evenstep's own" for mount in own_mounts(cluster)}
    only_read = tuple(
        f"{mount['mountPath']}/" for mount in own_mounts(cluster) if "readOnly" in mount
    )
    for number, mount in enumerate(cluster.mounts):
        path = os.path.normpath("/" + mount.path.lstrip("/"))
        # A mount point cannot be created in a read-only directory.
        if _hides_what_is_needed(path, taken) or path.startswith(only_read):
            whose = taken.get(path, "used by the image or by Evenstep")
            raise SpecError(
                f"kubernetes.mounts.{number}.path: {path} is {whose}. Use another, such as "
                f"/mnt/{mount.claim or mount.secret or mount.config_map}."
            )
        taken[path] = f"already used by mounts.{number}"


def _hides_what_is_needed(path: str, taken: Iterable[str]) -> bool:
    """Whether a mount at `path` would hide required files of the image or of another mount."""
    above = path.rstrip("/") + "/"
    return any(f"{each}/".startswith(above) for each in (*taken, *_OF_THE_IMAGE))


def _check_variables(cluster: KubernetesSpec) -> None:
    own = {each["name"] for each in world_variables(cluster, address="")}
    places = [("env", name) for name in cluster.env]
    places += [("env_from", name) for name in cluster.env_from]
    for key, name in places:
        if name in own:
            raise SpecError(
                f"kubernetes.{key}.{name}: it follows from nodes, processes_per_node and port, "
                "change these instead."
            )
    endpoint = cluster.env.get("AWS_ENDPOINT_URL")
    if endpoint and not _is_address_of_a_server(endpoint):
        raise SpecError(
            "kubernetes.env.AWS_ENDPOINT_URL: must be the address of a server, such as "
            f"https://s3.example.com or http://10.1.2.3:9000, but is {endpoint!r}"
        )


def _is_address_of_a_server(text: str) -> bool:
    try:
        address = urlsplit(text)
        _ = address.port
    except ValueError:  # brackets without an IPv6 address, a port that is none
        return False
    return address.scheme in ("http", "https") and bool(address.hostname)


def _check_grace(spec: Spec, cluster: KubernetesSpec) -> None:
    budget = spec.faults.stop_budget_seconds
    budget = LEAST_SECONDS if budget == "auto" else budget
    if cluster.grace_seconds <= budget:
        raise SpecError(
            f"kubernetes.grace_seconds: a pod is killed {cluster.grace_seconds} s after it is "
            f"asked to stop, but may take faults.stop_budget_seconds={budget:g} to save. Use "
            f"{int(budget) + 60}, or a smaller budget."
        )
