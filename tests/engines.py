"""What runs the container of a pod: the one interface of the two engines.

tests/pod_containers.py runs real containers of the real image, where podman works;
tests/pod_processes.py plain processes in namespaces, wherever there is root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

NAMESPACE = "ml"
CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Mount:
    """A directory of this machine, or memory, at a place in the container."""

    where: str
    directory: Path | None
    """None is memory, of this size."""
    size_bytes: int = 0
    read_only: bool = False


@dataclass(frozen=True)
class Wanted:
    """A container as the manifest wants it, with every reference resolved.

    All of them are restricted ones: a read-only root, no capabilities and no way to get any.
    """

    name: str
    """Of this attempt, unlike any other on this machine."""
    host: str
    domain: str | None
    """Behind the host name, where the pod has a subdomain."""
    is_public: bool
    """Whether a Service tells the other pods its name."""
    address: str
    image: str
    command: tuple[str, ...]
    variables: dict[str, str]
    mounts: tuple[Mount, ...]
    user: int
    group: int
    memory_bytes: int
    cores: float
    place: Path
    """A directory of its own on this machine."""

    @property
    def full_name(self) -> str:
        return f"{self.host}.{self.domain}" if self.domain else self.host

    def hosts(self) -> str:
        """What the kubelet writes into /etc/hosts."""
        names = f"{self.full_name} {self.host}" if self.domain else self.host
        return f"127.0.0.1 localhost\n::1 localhost\n{self.address} {names}\n"


class Container(ABC):
    """A container that was started; its log is complete once it has ended."""

    def __init__(self, wanted: Wanted, process: subprocess.Popen[bytes]) -> None:
        self.wanted = wanted
        self.process = process

    @property
    def log(self) -> str:
        return (self.wanted.place / "log").read_text(errors="replace")

    @property
    @abstractmethod
    def launcher(self) -> psutil.Process:
        """The container's process 1, as this machine sees it."""

    def ended(self, seconds: float) -> int | None:
        """The exit code, when it comes within that time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def send(self, number: int) -> None:
        """Send a signal to process 1, as the kubelet does; nothing if it has ended."""
        with suppress(IndexError, ProcessLookupError, psutil.NoSuchProcess):
            self.launcher.send_signal(number)

    def freeze(self) -> None:
        """Stop the training processes, and leave the launcher as it is."""
        for process in self.launcher.children(recursive=True):
            process.suspend()


class Engine(ABC):
    """One cluster network, and what runs on it. A context manager, which leaves nothing behind."""

    name: str
    """Unlike any other on this machine."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...

    @abstractmethod
    def address(self, number: int) -> str:
        """The address of the pod that is started as the `number`th."""

    @abstractmethod
    def start(self, wanted: Wanted) -> Container:
        """Start it; once it runs its name is known to the others, if it is public."""

    @abstractmethod
    def forget(self, container: Container) -> None:
        """It has ended: nobody knows its name any more."""


def attached(
    words: list[str], log: Path, variables: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A command that writes into a log and that no signal of a terminal reaches."""
    with open(log, "wb") as output:
        return subprocess.Popen(
            words,
            env=os.environ | (variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
