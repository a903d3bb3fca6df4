"""A Slurm cluster on this machine: a real controller and two nodes, in namespaces of their own.

Debian's packages are all it takes. Host names, addresses and process numbers are the namespaces'
own: nothing of the machine is read or changed, and killing their first process ends everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from commands import BIN, CLEAN

NODES = ("n0", "n1")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
_NEEDED = ("slurmctld", "slurmd", "srun", "munged", "ip", "unshare", "nsenter", "setpriv", "mount")
_NAMESPACES = ("unshare", "--mount", "--net", "--pid", "--uts", "--fork", "--mount-proc")
_DEADLINE_SECONDS = 240.0
# Two devices that every machine has stand for GPUs: Slurm counts them, and nobody opens them.
_GPUS = "NodeName=n[0-1] Name=gpu File=/dev/null,/dev/zero\n"
# sched_interval and the like: a job is looked at every second, not every minute.
_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=n0(10.77.0.10)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool/%n
SlurmctldPidFile={place}/controller.pid
SlurmdPidFile={place}/%n.pid
SlurmctldLogFile={place}/log/controller
SlurmdLogFile={place}/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=1,batch_sched_delay=1
ReturnToService=2
MpiDefault=none
KillWait=30
SlurmdTimeout=10
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[0-1] NodeHostname=n0 NodeAddr=n[0-1] Port=[6820-6821] CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""
# The first process of the namespaces: it waits, and reaps what the daemons leave behind.
_FIRST = """\
set -e
hostname n0
ip link set lo up
for number in 0 1; do ip addr add 10.77.0.1$number/32 dev lo; done
mount --bind {place}/hosts /etc/hosts
touch {place}/ready
while :; do sleep 3600 & wait; done
"""


def why_not() -> str | None:
    """Why there can be no Slurm cluster here, or None."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "needs root, for the controller and for namespaces"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """The controller and its nodes, for as long as it is entered."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> Cluster:
        self._lay_out()
        # Also where pytest itself is killed, nothing of it is left.
        bound = ["setpriv", "--pdeathsig=KILL", *_NAMESPACES, "--kill-child=KILL"]
        self._first = subprocess.Popen(
            [*bound, "bash", "-c", _FIRST.format(place=self.place)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until((self.place / "ready").exists, "the namespaces")
        self._inside = psutil.Process(self._first.pid).children()[0].pid
        munge = self.place / "munge"
        files = ("socket", "key-file", "log-file", "pid-file", "seed-file")
        names = ("socket", "key", "log", "pid", "seed")
        options = [f"--{f}={munge / n}" for f, n in zip(files, names, strict=True)]
        self.done("munged", "--force", *options)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()
        return self

    def __exit__(self, *exception: object) -> None:
        self._first.kill()  # and with it, by the kernel, all that runs in the namespaces
        self._first.wait(_DEADLINE_SECONDS)

    def _lay_out(self) -> None:
        for folder in ("state", "log", "munge", *(f"spool/{node}" for node in NODES)):
            (self.place / folder).mkdir(parents=True)
        (self.place / "munge").chmod(0o755)
        key = self.place / "munge/key"
        key.touch(0o600)
        key.write_bytes(os.urandom(64))
        addresses = [f"10.77.0.1{number} {node}\n" for number, node in enumerate(NODES)]
        (self.place / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))
        (self.place / "slurm.conf").write_text(_CONFIGURATION.format(place=self.place))
        (self.place / "gres.conf").write_text(_GPUS)

    # ---- what is done in it

    def started(self, *words: object, cwd: Path, **environ: str) -> subprocess.Popen[str]:
        """A command on the first node, as a person would give it there."""
        return subprocess.Popen(
            self._entered(words, cwd),
            env=self._environment(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ran(
        self, *words: object, cwd: Path | None = None, timeout: float = 120, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        return subprocess.run(
            self._entered(words, cwd or self.place),
            env=self._environment(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def done(self, *words: object, **rest: Any) -> str:
        """What a command that must succeed prints."""
        ran = self.ran(*words, **rest)
        assert ran.returncode == 0, (words, ran.stdout, ran.stderr)
        return ran.stdout.strip()

    def _entered(self, words: tuple[object, ...], cwd: Path) -> list[str]:
        return ["nsenter", "-t", str(self._inside), "-a", f"--wd={cwd}", *map(str, words)]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        own = {"SLURM_CONF": str(self.place / "slurm.conf"), "EVENSTEP_DEVICE": "cpu"}
        path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
        return {k: v for k, v in CLEAN.items() if not k.startswith("SLURM")} | own | path | more

    # ---- what is asked of it

    def state_of(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED and so on."""
        return self._told_of(job)["JobState"]

    def _told_of(self, job: str) -> dict[str, str]:
        told = self.done("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in told.split())

    def restarts_of(self, job: str) -> int:
        """How often the job was queued again."""
        return int(self._told_of(job)["Restarts"])

    def wait_for(self, job: str, *states: str, seconds: float = _DEADLINE_SECONDS) -> str:
        """Until the job is in one of the states; which one."""
        until(lambda: self.state_of(job) in states, f"job {job} is {' or '.join(states)}", seconds)
        return self.state_of(job)

    def wait_until_idle(self) -> None:
        """Until every node can take a job."""

        def idle() -> bool:
            told = self.ran("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.split("\n")
            return {line for line in told if line} == {f"{node} idle" for node in NODES}

        until(idle, "every node is idle")

    # ---- faults

    def start_controller(self) -> None:
        self.done("slurmctld")

    def kill_controller(self) -> None:
        self._kill(self.place / "controller.pid")

    def start_node(self, node: str) -> None:
        self.done("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Its daemon, and every process of its jobs: as when the machine loses its power."""
        self._kill(self.place / f"{node}.pid")
        lost: dict[int, psutil.Process] = {}
        for process in psutil.Process(self._inside).children(recursive=True):
            try:
                if process.environ().get("SLURMD_NODENAME") == node:
                    ancestors = process.parents()
                    lost |= {each.pid: each for each in [process, *ancestors[:1]]}
            except psutil.NoSuchProcess:
                continue
        lost.pop(self._inside, None)
        # All at once, as without power: a slurmstepd that outlives its script would report it.
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for process in lost.values():
                with suppress(psutil.NoSuchProcess):
                    act(process)

    def _kill(self, file: Path) -> None:
        pid = file.read_text().strip()
        self.done("kill", "-KILL", pid)
        until(lambda: self.ran("kill", "-0", pid).returncode, f"{file.stem} is gone")
        file.unlink()


def until(happened: Callable[[], Any], what: str, seconds: float = _DEADLINE_SECONDS) -> None:
    """Wait for what must happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
