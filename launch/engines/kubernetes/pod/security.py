"""The exceptions to Pod Security `restricted` in a pod template, by name. Pure.

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (v1.36).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from launch.engines.kubernetes.pod.pods import Manifest

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "projected"} | {
    "persistentVolumeClaim",
    "secret",
}
_SECCOMP = {"RuntimeDefault", "Localhost"}
_APPARMOR = {"RuntimeDefault", "Localhost"}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_BASELINE_CAPABILITIES = {"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL"} | {
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
}
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HOOKS = ("postStart", "preStop")


class Loosening(NamedTuple):
    """One setting that a namespace with Pod Security `restricted` would refuse."""

    name: str
    """Its name in `kubernetes.loosened_security.pod_template`."""
    place: str
    """The field with this setting."""
    level: str
    """The strictest level of Pod Security that accepts it; empty: every level does."""


def loosenings(template: Manifest) -> list[Loosening]:
    """All exceptions of a template, in the order of its fields."""
    pod = template["spec"]
    found = list(_of_the_pod(pod))
    for kind in ("initContainers", "containers"):
        for container in pod.get(kind) or []:
            place = f"spec.{kind}[{container['name']}]"
            found += _of_a_container(pod, container, place)
    return found


def level_of(found: list[Loosening]) -> str:
    """The strictest level of Pod Security that accepts all of them."""
    levels = {each.level for each in found}
    return next((level for level in ("privileged", "baseline") if level in levels), "restricted")


def _of_the_pod(pod: Manifest) -> Iterator[Loosening]:
    for name, field in (("network", "hostNetwork"), ("pid", "hostPID"), ("ipc", "hostIPC")):
        if pod.get(field):
            yield Loosening(f"host_{name}", f"spec.{field}", "privileged")
    if pod.get("automountServiceAccountToken") is not False:
        yield Loosening("service_account_token", "spec.automountServiceAccountToken", "")
    for volume in pod.get("volumes") or []:
        for kind in volume.keys() - {"name"} - _VOLUMES:
            level = "privileged" if kind == "hostPath" else "baseline"
            yield Loosening("volumes", f"spec.volumes[{volume['name']}].{kind}", level)
        for source in (volume.get("projected") or {}).get("sources") or []:
            if source.get("serviceAccountToken") is not None:
                place = f"spec.volumes[{volume['name']}].projected"
                yield Loosening("service_account_token", place, "")
    context, place = pod.get("securityContext") or {}, "spec.securityContext"
    for sysctl in context.get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield Loosening("sysctls", f"{place}.sysctls[{sysctl['name']}]", "privileged")
    yield from _profiles(context, place)


def _of_a_container(pod: Manifest, container: Manifest, place: str) -> Iterator[Loosening]:
    own = container.get("securityContext") or {}
    both = {**(pod.get("securityContext") or {}), **own}
    at = f"{place}.securityContext"
    if own.get("privileged"):
        yield Loosening("privileged", f"{at}.privileged", "privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        yield Loosening("privilege_escalation", f"{at}.allowPrivilegeEscalation", "baseline")
    yield from _capabilities(own.get("capabilities") or {}, f"{at}.capabilities")
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield Loosening("root", f"{at}.runAsNonRoot", "baseline")
    if (both.get("seccompProfile") or {}).get("type") is None:
        yield Loosening("seccomp", f"{at}.seccompProfile", "baseline")
    if own.get("procMount", "Default") != "Default":
        yield Loosening("proc_mount", f"{at}.procMount", "privileged")
    if own.get("readOnlyRootFilesystem") is not True:
        yield Loosening("writable_root", f"{at}.readOnlyRootFilesystem", "")
    yield from _profiles(own, at)
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield Loosening("host_ports", f"{place}.ports[{port['containerPort']}]", "privileged")
    hooks = container.get("lifecycle") or {}
    asked = {name: container.get(name) for name in _PROBES}
    asked |= {f"lifecycle.{name}": hooks.get(name) for name in _HOOKS}
    for name, action in asked.items():
        if any((action or {}).get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield Loosening("probe_hosts", f"{place}.{name}", "privileged")


def _capabilities(wanted: dict[str, Any], place: str) -> Iterator[Loosening]:
    if "ALL" not in (wanted.get("drop") or []):
        yield Loosening("capabilities", f"{place}.drop", "baseline")
    for name in wanted.get("add") or []:
        if name != "NET_BIND_SERVICE":
            level = "baseline" if name in _BASELINE_CAPABILITIES else "privileged"
            yield Loosening("capabilities", f"{place}.add[{name}]", level)


def _profiles(context: Manifest, place: str) -> Iterator[Loosening]:
    """Profiles that are set, and disable a protection of the kernel."""
    seccomp = (context.get("seccompProfile") or {}).get("type", "RuntimeDefault")
    if seccomp not in _SECCOMP:
        yield Loosening("seccomp", f"{place}.seccompProfile", "privileged")
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in _APPARMOR:
        yield Loosening("apparmor", f"{place}.appArmorProfile", "privileged")
    linux = context.get("seLinuxOptions") or {}
    if linux.get("type", "") not in _SELINUX or linux.get("user") or linux.get("role"):
        yield Loosening("selinux", f"{place}.seLinuxOptions", "privileged")
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield Loosening("privileged", f"{place}.windowsOptions.hostProcess", "privileged")
