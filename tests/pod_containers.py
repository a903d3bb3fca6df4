"""Pods as real containers of the image built from our Dockerfile: podman, with runc."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import re

import psutil
from containers import SETTINGS, podman
from engines import CLUSTER_DOMAIN, NAMESPACE, Container, Engine, Mount, Wanted, attached

_numbers = itertools.count()


class PodmanContainer(Container):
    """A container made by podman, which stays attached to it."""

    @property
    def launcher(self) -> psutil.Process:
        told = podman("inspect", "--format", "{{.State.Pid}}", self.wanted.name, check=False)
        number = int(told.stdout or 0)
        if number == 0:
            raise psutil.NoSuchProcess(number)
        return psutil.Process(number)


class Podman(Engine):
    """A network with DNS and without a way out."""

    def __init__(self) -> None:
        self.name = f"evenstep-{os.getpid()}-{next(_numbers)}"
        self._running: list[Container] = []

    def __enter__(self) -> Podman:
        _remove_what_others_left()
        podman("network", "create", "--internal", self.name)
        (facts,) = json.loads(podman("network", "inspect", self.name).stdout)
        (subnet,) = facts["subnets"]
        self._gateway = subnet["gateway"]
        self._addresses = list(ipaddress.ip_network(subnet["subnet"]).hosts())
        return self

    def __exit__(self, *exception: object) -> None:
        for container in self._running:
            podman("rm", "--force", "--ignore", container.wanted.name)
            container.process.wait(30)
        podman("network", "rm", "--force", self.name)

    def address(self, number: int) -> str:
        return str(self._addresses[9 + number])

    def start(self, wanted: Wanted) -> Container:
        hosts = wanted.place / "hosts"
        hosts.write_text(wanted.hosts())
        words = [
            *("podman", "run", "--rm", "--name", wanted.name, "--pull", "never"),
            *("--network", self.name, "--ip", wanted.address, "--hostname", wanted.host),
            *("--volume", f"{hosts}:/etc/hosts:ro", *self._names(wanted)),
            *("--user", f"{wanted.user}:{wanted.group}", "--group-add", str(wanted.group)),
            *("--read-only", "--read-only-tmpfs=false"),
            *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--memory", str(wanted.memory_bytes), "--cpus", str(wanted.cores)),
            *(word for mount in wanted.mounts for word in _mounted(mount)),
            *(word for k, v in wanted.variables.items() for word in ("--env", f"{k}={v}")),
            *("--entrypoint", json.dumps(list(wanted.command)), wanted.image),
        ]
        container = PodmanContainer(wanted, attached(words, wanted.place / "log", SETTINGS))
        self._running.append(container)
        return container

    def forget(self, container: Container) -> None:
        """Podman itself has taken its name out of the DNS."""
        self._running = [other for other in self._running if other is not container]

    def _names(self, wanted: Wanted) -> list[str]:
        """What others ask the DNS for, and how this pod completes what it asks for itself."""
        services = f"svc.{CLUSTER_DOMAIN}"
        search = [f"{NAMESPACE}.{services}", services, CLUSTER_DOMAIN]
        words = [word for domain in search for word in ("--dns-search", domain)]
        alias = ["--network-alias", wanted.full_name] if wanted.is_public else []
        return [*alias, "--dns", self._gateway, *words, "--dns-opt", "ndots:5"]


def _mounted(mount: Mount) -> list[str]:
    if mount.directory is not None:
        return ["--volume", f"{mount.directory}:{mount.where}:{'ro' if mount.read_only else 'rw'}"]
    if mount.where == "/dev/shm":
        return ["--shm-size", str(mount.size_bytes)]
    return ["--tmpfs", f"{mount.where}:rw,mode=1777,size={mount.size_bytes}"]


def _remove_what_others_left() -> None:
    """Containers and networks of test sessions that were killed."""
    for list_them, remove in (
        (("ps", "--all", "--format", "{{.Names}}"), ("rm", "--force")),
        (("network", "ls", "--format", "{{.Name}}"), ("network", "rm", "--force")),
    ):
        for name in podman(*list_them).stdout.split():
            owner = re.match(r"evenstep-(\d+)-", name)
            if owner is not None and not psutil.pid_exists(int(owner[1])):
                podman(*remove, name)
