"""Pods as plain processes: the image is this machine's own Python and this source tree.

Each has a network, a host name, mounts, a read-only root, a user and a process 1 of its own, by
Linux namespaces (tests/container.sh); not the image, DNS or limits of memory and cores.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys

import psutil
from commands import BIN, ROOT
from engines import Container, Engine, Wanted, attached

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "chroot", "mount")
_numbers = itertools.count()


def why_not() -> str | None:
    """Why pods cannot run here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    name = f"evenstep-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


class Process(Container):
    """A container made by unshare."""

    killed = False

    @property
    def launcher(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def send(self, number: int) -> None:
        self.killed = self.killed or number == signal.SIGKILL
        super().send(number)

    def ended(self, seconds: float) -> int | None:
        code = super().ended(seconds)
        return (
            128 + signal.SIGKILL if code is not None and self.killed else code
        )  # unshare drops it


class Namespaces(Engine):
    """A bridge in a network of its own, to which every pod is connected."""

    def __init__(self) -> None:
        self.name = f"evenstep-{os.getpid()}-{next(_numbers)}"
        self._running: list[Process] = []
        self._networks: list[str] = []

    def __enter__(self) -> Namespaces:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "br0", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for container in self._running:
            container.send(signal.SIGKILL)
            container.process.wait(10)
        for network in self._networks:
            _ip("netns", "del", network, check=False)
        _ip("netns", "del", self._bridge)

    def address(self, number: int) -> str:
        return f"10.233.{number // 200}.{10 + number % 200}"

    def start(self, wanted: Wanted) -> Container:
        place = wanted.place
        assert wanted.command[0] == "evenstep", "what the image has on its PATH"
        (place / "root").mkdir()
        (place / "hostname").write_text(wanted.host)
        (place / "resolv.conf").write_text("")  # names are in /etc/hosts alone, see _publish
        (place / "hosts").write_text("")
        (place / "mounts").write_text(_mounts(wanted))
        network = self._connected(wanted.address)
        readable = " ".join(dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)]))
        variables = {"PATH": f"{BIN}:/usr/bin:/bin"} | wanted.variables
        words = [
            *("nsenter", f"--net=/run/netns/{network}"),
            *("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL"),
            *(str(ROOT / "tests/container.sh"), str(place), str(wanted.user), readable),
            *("env", "-i", *(f"{k}={v}" for k, v in variables.items())),
            *(str(BIN / "evenstep"), *wanted.command[1:]),
        ]
        container = Process(wanted, attached(words, place / "log"))
        self._running.append(container)
        self._publish()
        return container

    def forget(self, container: Container) -> None:
        self._running = [other for other in self._running if other is not container]
        self._publish()

    def _publish(self) -> None:
        """Write what each pod can resolve: itself, and the others that a Service tells of."""
        wanted = [container.wanted for container in self._running]
        for own in wanted:
            others = [o for o in wanted if o is not own and o.is_public]
            lines = [f"{o.address} {o.full_name} {_short(o.full_name)}\n" for o in others]
            text = own.hosts().replace(own.full_name, f"{own.full_name} {_short(own.full_name)}", 1)
            (own.place / "hosts").write_text(text + "".join(lines))

    @property
    def _bridge(self) -> str:
        return f"{self.name}-bridge"

    def _connected(self, address: str) -> str:
        number = len(self._networks)
        network, port = f"{self.name}-{number}", f"veth{number}"
        _ip("netns", "add", network)
        self._networks.append(network)
        _ip("-n", network, "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", port, "netns", self._bridge)
        _ip("-n", network, "link", "add", "eth0", *pair)
        _ip("-n", self._bridge, "link", "set", port, "master", "br0", "up")
        _ip("-n", network, "addr", "add", f"{address}/16", "dev", "eth0")
        _ip("-n", network, "link", "set", "eth0", "up")
        return network


def _short(full_name: str) -> str:
    """As it is asked for: <host>.<service>, which DNS completes by its search list."""
    return ".".join(full_name.split(".")[:2])


def _mounts(wanted: Wanted) -> str:
    lines = []
    for mount in wanted.mounts:
        if mount.directory is None:
            lines.append(f"{mount.where} memory {mount.size_bytes}\n")
        else:
            lines.append(f"{mount.where} {'ro' if mount.read_only else 'rw'} {mount.directory}\n")
    return "".join(lines)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
