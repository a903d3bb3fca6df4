"""The one stand-in for a cluster: runs the pods of a rendered Indexed Job as plain processes.

Each pod has a network, a host name, mounts, a read-only root, a user and a process 1 of its own,
by Linux namespaces; the environment, volumes and command are the manifest's. What the Job
controller does is done as the one of Kubernetes 1.36 was seen to do it: podFailurePolicy, the
back-off of each index, podReplacementPolicy. Not the image, memory limits or the NetworkPolicy.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from commands import BIN, ROOT

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "chroot", "mount")
_RANK = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_NAMESPACE = "ml"
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


@dataclass
class Pod:
    """One attempt at one index."""

    index: int
    attempt: int
    address: str
    place: Path
    process: subprocess.Popen[bytes]
    disrupted: bool = False
    killed: bool = False
    kill_at: float = float("inf")

    @property
    def log(self) -> str:
        return (self.place / "log").read_text(errors="replace")

    def send(self, number: int) -> None:
        """Send a signal to the container's process 1, as the kubelet does."""
        self.killed = self.killed or number == signal.SIGKILL
        with suppress(IndexError, ProcessLookupError, psutil.NoSuchProcess):
            psutil.Process(self.process.pid).children()[0].send_signal(number)


@dataclass
class Cluster:
    """The controller of one Job, and the machines its pods run on."""

    objects: list[dict[str, Any]]
    directory: Path
    backoff: float = 0.05
    """Seconds here for one of the controller's."""
    running: dict[int, Pod] = field(default_factory=dict)
    ended: list[tuple[int, int, str]] = field(default_factory=list)
    """(index, exit code, what the policy makes of it) of each pod that has ended."""
    pods: list[Pod] = field(default_factory=list)
    condition: str | None = None
    done: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        kinds = {made["kind"]: made for made in self.objects}
        self.job = kinds["Job"]["spec"]
        self.files = kinds["ConfigMap"]["data"]
        self.service = kinds.get("Service")
        self.name = kinds["Job"]["metadata"]["name"]
        self.pod = self.job["template"]["spec"]
        (self.container,) = self.pod["containers"]
        self.nodes = self.job["completions"]
        self.due = dict.fromkeys(range(self.nodes), 0.0)
        self.failures = [0] * self.nodes
        self.attempts = [0] * self.nodes
        self.prefix = f"ev{os.getpid()}-{next(_numbers)}"
        self.directory.mkdir(parents=True)
        (self.directory / "runs").mkdir()
        os.chown(self.directory / "runs", self.user, self.user)

    @property
    def user(self) -> int:
        user: int = self.pod["securityContext"]["runAsUser"]
        return user

    @property
    def runs(self) -> Path:
        return self.directory / "runs"

    def __enter__(self) -> Cluster:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "br0", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for pod in self.running.values():
            pod.send(signal.SIGKILL)
            pod.process.wait(10)
        for pod in self.pods:
            _ip("netns", "del", self._network(pod), check=False)
        _ip("netns", "del", self._bridge)

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
            if len(self.done) == self.nodes:
                self.condition = "Complete"
        for pod in list(self.running.values()):  # a Job that has failed ends what still runs
            self.stop(pod.index)
        while self.running:
            assert time.monotonic() < deadline + 60, self.logs()
            self._wait()
        return self.condition

    def start(self, index: int) -> None:
        """Start a pod of this index, at an address that no pod has had."""
        attempt = self.attempts[index]
        self.attempts[index] += 1
        place = self.directory / f"pod-{index}-{attempt}"
        (place / "root").mkdir(parents=True)
        address = f"10.233.{attempt}.{10 + index}"
        variables = self._variables(index)
        command = [_expanded(word, variables) for word in self.container["command"]]
        assert command[0] == "evenstep", "what the image has on its PATH"
        command[0] = str(BIN / "evenstep")
        (place / "hostname").write_text(f"{self.name}-{index}")
        (place / "resolv.conf").write_text("")  # names are in /etc/hosts alone, see _publish
        (place / "hosts").write_text("")
        self._mounts(place)
        network = f"{self.prefix}-{index}-{attempt}"
        self._connect(network, f"v{index}x{attempt}", address)
        readable = " ".join(dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)]))
        words = [
            *("nsenter", f"--net=/run/netns/{network}"),
            *("unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child=KILL"),
            *(str(ROOT / "tests/container.sh"), place, self.user, readable),
            *("env", "-i", *(f"{k}={v}" for k, v in variables.items()), *command),
        ]
        with open(place / "log", "wb") as log:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
            )
        pod = Pod(index, attempt, address, place, process)
        self.running[index] = pod
        self.pods.append(pod)
        self._publish()

    def stop(self, index: int, *, disruption: bool = False) -> None:
        """Delete or evict a pod: SIGTERM, the grace period, SIGKILL."""
        pod = self.running[index]
        pod.disrupted = pod.disrupted or disruption
        if pod.kill_at == float("inf"):
            pod.kill_at = time.monotonic() + self.pod["terminationGracePeriodSeconds"]
            pod.send(signal.SIGTERM)

    def kill(self, index: int) -> None:
        """End a pod's container without a word, as when it runs out of memory."""
        self.running[index].send(signal.SIGKILL)

    def freeze(self, index: int) -> None:
        """Stop the training processes of a pod, and leave its launcher as it is."""
        launcher = psutil.Process(self.running[index].process.pid).children()[0]
        for process in launcher.children(recursive=True):
            process.suspend()

    def step(self) -> int:
        """The newest step that the run has recorded."""
        metrics = self.runs / self.name / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def logs(self) -> str:
        return "\n".join(f"---- pod {p.index}, attempt {p.attempt}\n{p.log}" for p in self.pods)

    # ---- the controller

    def _wait(self) -> None:
        """Wait a moment for a pod to end, and do what the controller does about it."""
        for pod in list(self.running.values()):
            with suppress(subprocess.TimeoutExpired):
                self._ended(pod, pod.process.wait(0.05))
            if pod.index in self.running and time.monotonic() > pod.kill_at:
                pod.send(signal.SIGKILL)

    def _ended(self, pod: Pod, status: int) -> None:
        code = 128 + signal.SIGKILL if pod.killed else status  # unshare does not hand it on
        del self.running[pod.index]
        self._publish()
        action = "Complete" if code == 0 else self._action(pod, code)
        self.ended.append((pod.index, code, action))
        if self.condition is not None:
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

    def _variables(self, index: int) -> dict[str, str]:
        """The manifest's, with what an image sets besides, and what the controller adds."""
        variables = {"PATH": f"{BIN}:/usr/bin:/bin"}
        for each in self.container["env"]:
            source = each.get("valueFrom")
            if source is not None:
                assert source == {"fieldRef": {"fieldPath": _RANK}}
            variables[each["name"]] = each.get("value", str(index))
        return variables | {"JOB_COMPLETION_INDEX": str(index)}

    def _mounts(self, place: Path) -> None:
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        lines = []
        for mount in self.container["volumeMounts"]:
            mode = "ro" if mount.get("readOnly") else "rw"
            volume = volumes[mount["name"]]
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                size = volume["emptyDir"]["sizeLimit"].removesuffix("i")
                lines.append(f"{mount['mountPath']} memory {size}")
                continue
            source = self._volume(volume, place / mount["name"])
            if source is not None:
                lines.append(f"{mount['mountPath']} {mode} {source}")
        (place / "mounts").write_text("\n".join(lines) + "\n")

    def _volume(self, volume: dict[str, Any], own: Path) -> Path | None:
        if "persistentVolumeClaim" in volume:
            return self.runs
        if "secret" in volume:
            assert volume["secret"]["optional"], "there is none here"
            return None
        own.mkdir()
        if "configMap" in volume:
            for name, text in self.files.items():
                (own / name).write_text(text)
        else:
            assert "emptyDir" in volume
            os.chown(own, -1, self.pod["securityContext"]["fsGroup"])
            own.chmod(0o2777)
        return own

    def _publish(self) -> None:
        """What the pods can resolve: their own name, and through the Service the other pods'."""
        names = {}
        if self.service is not None and self.pod.get("subdomain"):
            domain = f"{self.service['metadata']['name']}.{_NAMESPACE}.svc.cluster.local"
            for pod in self.running.values():
                host = f"{self.name}-{pod.index}"
                names[pod.index] = f"{host}.{domain} {host}.{self.pod['subdomain']}"
        for pod in self.running.values():
            own = f"{self.name}-{pod.index}"
            lines = ["127.0.0.1 localhost", f"{pod.address} {names.get(pod.index, '')} {own}"]
            others = [p for p in self.running.values() if p is not pod and p.index in names]
            lines += [f"{other.address} {names[other.index]}" for other in others]
            (pod.place / "hosts").write_text("\n".join(lines) + "\n")

    @property
    def _bridge(self) -> str:
        return f"{self.prefix}-bridge"

    def _network(self, pod: Pod) -> str:
        return f"{self.prefix}-{pod.index}-{pod.attempt}"

    def _connect(self, network: str, port: str, address: str) -> None:
        _ip("netns", "add", network)
        _ip("-n", network, "link", "set", "lo", "up")
        pair = ("type", "veth", "peer", "name", port, "netns", self._bridge)
        _ip("-n", network, "link", "add", "eth0", *pair)
        _ip("-n", self._bridge, "link", "set", port, "master", "br0", "up")
        _ip("-n", network, "addr", "add", f"{address}/16", "dev", "eth0")
        _ip("-n", network, "link", "set", "eth0", "up")


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _expanded(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), word)
