"""The checks of `evenstep doctor`: the machine, from the point of view of a job.

Every problem comes with its fix.  Nothing here needs the job's model; with a spec, the needs of
its data are compared with the machine.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from launch.environment import Environment, Node
from launch.rank.trial import TrialEnd, tried
from service.basics.errors import EvenstepError
from service.basics.limits import limits, workers_each
from service.health.stop_budget import estimated, grace_periods, longest_save, stop_in_words
from service.runs.directory import RunDirectory
from service.spec.models import Spec
from service.storage.address import Address

State = Literal["ok", "skipped", "warning", "failed"]

REDUCED_BYTES = {"cpu": 4 << 20}
REDUCED_BYTES_ON_GPU = 256 << 20
REDUCTION_SECONDS = 90
"""Time for two interpreters to import torch, perhaps from a slow disk."""
REACH_SECONDS = 3
KUBECTL_SECONDS = 20.0
"""Time for kubectl to answer, perhaps after a sign-in by another program."""


@dataclass(frozen=True)
class Finding:
    """One line of the output."""

    name: str
    state: State
    told: str
    fix: str = ""

    def record(self) -> dict[str, str]:
        """The finding as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Asked:
    """The job for which the machine is checked."""

    processes: int = 2
    """On each node, if there are several."""
    node: Node | None = None
    """This machine among those between which the network is measured, and nothing else."""
    place: Environment | None = None
    """This process among those of torchrun: then the same is measured."""
    runs: Path = Path("runs")
    spec: Spec | None = None
    store: Address | None = None
    """Where runs are kept, if it is in an object store; `runs` is the scratch directory then."""

    @property
    def workers(self) -> int:
        """Loader workers of each process."""
        asked = self.spec.loader.workers if self.spec else 0
        return workers_each(self.processes) if asked == "auto" else asked or 0


def examined(asked: Asked) -> Iterator[Finding]:
    """Every finding as soon as it is known; a check that raises is a finding too."""
    between = asked.node is not None or asked.place is not None
    for check in (_rdma, _network) if between else CHECKS:
        try:
            yield from check(asked)
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            if isinstance(error, EvenstepError):  # such as of the task
                fix = "Correct this first: a run would end with the same message."
                yield Finding(name, "failed", str(error), fix)
                continue
            told = f"could not be checked: {type(error).__name__}: {error}"
            yield Finding(name, "failed", told, "Report this as a bug of evenstep.")


def exit_code(findings: list[Finding]) -> int:
    """0 if all is fine, 1 with warnings, 2 with failures."""
    states = {finding.state for finding in findings}
    return 2 if "failed" in states else 1 if "warning" in states else 0


# ---- software


def _packages(asked: Asked) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    found = [f"python {platform.python_version()}"]
    for text in metadata.requires("evenstep") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", "failed", f"{wanted} is missing", f"pip install '{wanted}'")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            told = f"{wanted.name} {version} is not {wanted.specifier}"
            yield Finding("packages", "failed", told, f"pip install '{wanted}'")
        found.append(f"{wanted.name} {version}")
    yield Finding("packages", "ok", ", ".join(found))


def _torch_companions(asked: Asked) -> Iterator[Finding]:
    """Packages built for another torch break the import of transformers and timm."""
    for name in ("torchvision", "torchaudio"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        words = [sys.executable, "-P", "-c", f"import {name}"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=120)
        if done.returncode == 0:
            yield Finding(name, "ok", f"{version} imports with torch {metadata.version('torch')}")
            continue
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            name,
            "failed",
            f"{version} does not import with torch {metadata.version('torch')}: {last}",
            f"Install the {name} that was built for this torch, or: pip uninstall {name}",
        )


# ---- devices


def _devices(asked: Asked) -> Iterator[Finding]:
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        if shutil.which("nvidia-smi"):
            told = f"this machine has nvidia-smi, but torch {torch.__version__} sees no GPU"
            fix = "Install a torch built for CUDA, and check the driver with nvidia-smi."
            yield Finding("devices", "failed", told, fix)
        else:
            yield Finding("devices", "ok", "cpu only")
        return
    count = torch.accelerator.device_count()
    told, named = f"{count} of {accelerator.type}", set[str]()
    module = torch.get_device_module(accelerator)
    if hasattr(module, "get_device_properties"):
        cards = [module.get_device_properties(number) for number in range(count)]
        named = {f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards}
        told += f" ({'; '.join(sorted(named))})"
    if accelerator.type == "cuda" and torch.version.hip is not None:
        told += f", ROCm {torch.version.hip}"
    elif accelerator.type == "cuda":
        told += f", CUDA {torch.version.cuda}, driver {_driver()}"
    if asked.processes > count and asked.processes > 2:
        fix = f"Use at most --processes {count}, or EVENSTEP_DEVICE=cpu."
        if any("MIG" in card.split() for card in named):
            fix += (
                " A process can use one MIG slice, and NCCL cannot connect two slices of one GPU."
            )
        yield Finding("devices", "failed", f"{told} for {asked.processes} processes", fix)
    else:
        yield Finding("devices", "ok", told)


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().partition("\n")[0] or "unknown"


def _rdma(asked: Asked) -> Iterator[Finding]:
    """What the GPUs of several nodes could exchange through."""
    import torch

    from launch.rank.network import rdma_devices

    if not torch.accelerator.is_available() or os.environ.get("EVENSTEP_DEVICE") == "cpu":
        yield Finding("RDMA", "skipped", "no GPU")
    elif found := rdma_devices():
        yield Finding("RDMA", "ok", f"{', '.join(found)} on this machine")
    else:
        told = (
            "no device on this machine: several nodes exchange over TCP. doctor --nodes measures "
            "its bandwidth, as the first line of such a run does"
        )
        yield Finding("RDMA", "ok", told)


def _all_reduce(asked: Asked) -> Iterator[Finding]:
    """A sum over real processes, through the code that a run would use."""
    import torch

    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    on_cpu = gpus < 2 or os.environ.get("EVENSTEP_DEVICE") == "cpu"
    count = max(2, asked.processes if on_cpu else min(asked.processes, gpus))
    end = _reduced(count, on_cpu=on_cpu)
    if end.code is None:
        told = f"{count} processes did not connect within {REDUCTION_SECONDS} s"
        fix = "Check the firewall on loopback; for NCCL, set NCCL_DEBUG=INFO."
        yield Finding("all-reduce", "failed", told, fix)
    elif end.code:
        fix = "Run `python -m launch.commands.reduction` under torchrun to see its complete output."
        yield Finding("all-reduce", "failed", f"{count} processes: {end.last_line}", fix)
    else:
        device, rate = end.said.split()
        backend = (
            "gloo" if device == "cpu" else torch.distributed.get_default_backend_for_device(device)
        )
        told = f"{count} processes on {device} by {backend}: {float(rate) / 1e9:.2f} GB/s each"
        yield Finding("all-reduce", "ok", told)


def _network(asked: Asked) -> Iterator[Finding]:
    """The bandwidth between the nodes, of which this machine is one."""
    fix = "Start doctor on all nodes with the same --nodes, and let them reach each other."
    if asked.place is not None:
        from launch.commands.reduction import between_nodes

        try:
            yield network_finding(**asdict(between_nodes(asked.place)))
        except EvenstepError as error:
            yield Finding("network", "failed", str(error), fix)
        return
    assert asked.node is not None, "otherwise this is not checked"
    from launch.nodes.measuring import TRIAL_SECONDS, measured_by

    try:
        end = measured_by(asked.node, processes=asked.processes, runs=asked.runs.absolute())
    except EvenstepError as error:
        yield Finding("network", "failed", str(error), fix)
        return
    if end.code is None:
        told = f"the processes did not connect within {TRIAL_SECONDS} s"
        fix = "Let the nodes reach each other on all ports."
        yield Finding("network", "failed", told, fix)
    elif end.code:
        fix = "The same in the log of another node may tell more."
        yield Finding("network", "failed", end.last_line, fix)
    else:
        yield network_finding(**json.loads(end.said))


def network_finding(*, told: str, leaves_rdma: bool) -> Finding:
    """What was measured between the nodes, and what to do if they do not use their devices."""
    fix = (
        "Unset NCCL_IB_DISABLE and NCCL_NET; let a container use the devices and lock memory "
        "(on Kubernetes: fabric, resources and IPC_LOCK in docs/how-to/cluster-options.md)."
    )
    state: State = "warning" if leaves_rdma else "ok"
    return Finding("network", state, told, fix if leaves_rdma else "")


def _reduced(count: int, *, on_cpu: bool) -> TrialEnd:
    """How a sum over processes of this machine ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = REDUCED_BYTES["cpu"] if on_cpu else REDUCED_BYTES_ON_GPU
    numbers = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    common = {"MASTER_ADDR": "127.0.0.1"} | ({"EVENSTEP_DEVICE": "cpu"} if on_cpu else {})
    common |= {key: str(value) for key, value in numbers.items()}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return tried(str(size), each, seconds=REDUCTION_SECONDS)


# ---- the network


def _host_name(asked: Asked) -> Iterator[Finding]:
    host = socket.gethostname()
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        told = (
            f"{host} does not resolve ({error.strerror or error}); not needed on a single machine"
        )
        yield Finding("host name", "warning", told, f"Add a line for {host} to /etc/hosts.")
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    yield Finding("host name", "ok", f"{host} is {', '.join(sorted(found))}; port {port} is free")


def _wandb(asked: Asked) -> Iterator[Finding]:
    mode = asked.spec.tracking.wandb.mode if asked.spec and asked.spec.tracking.wandb else "auto"
    if "offline" in (mode, os.environ.get("WANDB_MODE")) or mode == "disabled":
        yield Finding("W&B", "ok", "offline, as requested")
        return
    named = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        url = urlsplit(named)
        place = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    except ValueError as error:
        told = f"WANDB_BASE_URL is no address of a server: {error}"
        yield Finding("W&B", "warning", told, "Correct or unset it.")
        return
    if not _has_wandb_key(place[0]):
        yield Finding("W&B", "ok", "no key is set: runs are kept offline, for `wandb sync`")
        return
    try:
        socket.create_connection(place, timeout=REACH_SECONDS).close()
    except OSError as error:
        told = (
            f"a key is set, but {place[0]}:{place[1]} cannot be reached in {REACH_SECONDS} s: "
            f"{error}"
        )
        fix = (
            "Training is not affected: the run stays offline.  Set WANDB_MODE=offline, or a proxy."
        )
        yield Finding("W&B", "warning", told, fix)
    else:
        yield Finding("W&B", "ok", f"a key is set, and {place[0]} can be reached")


def _has_wandb_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return netrc.is_file() and f"machine {host}" in netrc.read_text(errors="replace")


def _kubectl(asked: Asked) -> Iterator[Finding]:
    if shutil.which("kubectl") is None:
        yield Finding("kubectl", "skipped", "not installed; `evenstep kubernetes` works without it")
        return
    try:
        context = _asked_of_kubectl("config", "current-context")
        if context.returncode:
            without = "no context is set; `evenstep kubernetes` needs one"
            yield Finding("kubectl", "skipped", without)
            return
        name = context.stdout.strip()
        timeout = f"--request-timeout={REACH_SECONDS}s"
        reached = _asked_of_kubectl("get", "--raw", "/version", timeout)
    except subprocess.TimeoutExpired as error:
        asked_for = " ".join(error.cmd[:2])
        fix = "Run it by hand: it may wait for a sign-in, or for a cluster that is not there."
        yield Finding("kubectl", "warning", f"{asked_for} took over {error.timeout:g} s", fix)
        return
    if reached.returncode:
        last = (reached.stderr.strip().splitlines() or ["no message"])[-1]
        fix = "Check `kubectl cluster-info`, or choose another: `kubectl config use-context`."
        yield Finding("kubectl", "warning", f"context {name} does not respond: {last}", fix)
    else:
        yield Finding("kubectl", "ok", f"context {name} answers")


def _asked_of_kubectl(*words: str) -> subprocess.CompletedProcess[str]:
    """What kubectl answers."""
    return subprocess.run(
        ["kubectl", *words],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=KUBECTL_SECONDS,
    )


# ---- cores and memory


def _cores(asked: Asked) -> Iterator[Finding]:
    found = limits()
    busy = asked.processes * (1 + asked.workers)
    quota = "no quota" if found.quota is None else f"a quota of {found.quota:g}"
    told = f"{found.cores} to use: {found.affinity} by affinity, {quota}"
    threads = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, found.cores // asked.processes)
    if threads.isdecimal() and int(threads) > share:
        told += f"; OMP_NUM_THREADS={threads} for each of {asked.processes} processes"
        yield Finding("cores", "warning", told, f"Unset OMP_NUM_THREADS, or set it to {share}.")
    elif busy > found.cores:
        told += f"; {asked.processes} processes with {asked.workers} workers each are {busy}"
        fix = "Use fewer processes or loader.workers, or give the container more CPU."
        yield Finding("cores", "warning", told, fix)
    else:
        yield Finding("cores", "ok", told)


def _memory(asked: Asked) -> Iterator[Finding]:
    limit = limits().memory_bytes
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    available = re.search(r"MemAvailable: +(\d+) kB", text)
    sizes = [limit] if limit else []
    sizes += [int(available[1]) * 1024] if available else []
    if not sizes:
        yield Finding("memory", "skipped", "unknown on this system")
        return
    told = f"{_gib(min(sizes))} to use" + (
        f", limit of the container {_gib(limit)}" if limit else ""
    )
    each = min(sizes) / asked.processes
    if each < 2**30:  # an interpreter with torch needs a third of a GiB
        fix = "Use fewer processes, or raise the memory limit."
        yield Finding("memory", "warning", f"{told}: {_gib(each)} a process", fix)
    else:
        yield Finding("memory", "ok", told)


def _shared_memory(asked: Asked) -> Iterator[Finding]:
    """Workers send batches to the training process through it; if it is full: Bus error."""
    place = Path("/dev/shm")
    if not place.is_dir():
        yield Finding("/dev/shm", "skipped", "this system has none")
        return
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    need = _loader_bytes(asked) if asked.spec and asked.workers else None
    if need is None:
        told = f"{_gib(free)} free"
        told += "" if asked.spec else "; name a spec to compare it with what its loader needs"
        yield Finding("/dev/shm", "ok", told)
        return
    told = f"{_gib(free)} free, {_gib(need)} needed by {asked.processes} x {asked.workers} workers"
    if need > free:
        fix = (
            "Raise it (docker run --shm-size, on Kubernetes an emptyDir with medium: Memory at "
            "/dev/shm), or lower loader.workers or loader.prefetch."
        )
        yield Finding("/dev/shm", "failed", told, fix)
    else:
        yield Finding("/dev/shm", "ok", told)


def _loader_bytes(asked: Asked) -> int:
    """Bytes of all micro-batches that workers may read ahead at the same time."""
    from service.data.task import load_task
    from service.plan.plan import make_plan
    from service.preview.check import row_bytes

    assert asked.spec is not None
    task = load_task(asked.spec.task, asked.spec.task_args, seed=asked.spec.seed)
    rows = task.train_rows
    plan = make_plan(asked.spec, processes=1, train_rows=rows, test_rows=task.test_rows)
    rounds = -(-plan.micro_batches // asked.processes)
    ahead = asked.processes * asked.workers * asked.spec.loader.prefetch * rounds
    return ahead * plan.micro_batch * row_bytes(task)


def _open_files(asked: Asked) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        fix = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
        yield Finding("open files", "warning", f"at most {soft}; workers need more", fix)
    else:
        yield Finding("open files", "ok", f"at most {soft:,}")


# ---- the disk and the clock


def _run_directory(asked: Asked) -> Iterator[Finding]:
    """The requirements of checkpoints on the real disk: space, fsync, atomic rename, locks."""
    place = asked.runs.absolute()
    place = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    free = shutil.disk_usage(place).free
    if free < 2**30:
        fix = "Free some, or choose another directory with --runs."
        yield Finding("disk", "failed" if free < 2**27 else "warning", f"{_gib(free)} free", fix)
    else:
        yield Finding("disk", "ok", f"{_gib(free)} free in {place}")
    try:
        with tempfile.TemporaryDirectory(prefix=".evenstep-doctor-", dir=place) as trial:
            yield from _tried_disk(Path(trial))
    except OSError as error:
        fix = "Choose a directory that you may write to, with --runs."
        yield Finding("disk", "failed", f"{place} cannot be written: {error.strerror}", fix)


def _store(asked: Asked) -> Iterator[Finding]:
    """Whether a run could live in the object store: the credentials, the rights, the rules."""
    if asked.store is None:
        return
    from service.storage.lease import require_rights
    from service.storage.store import open_store

    told: list[str] = []
    try:
        store = open_store(asked.store)
        require_rights(store, say=told.append)
        told += store.rules()
    except EvenstepError as error:
        yield Finding("store", "failed", str(error))
        return
    for each in told:
        yield Finding("store", "warning", each.removeprefix("WARNING: "))
    yield Finding("store", "ok", f"objects of {asked.store} can be written, read and deleted")


def _stop(asked: Asked) -> Iterator[Finding]:
    """Whether the time for a stop is long enough for the last save."""
    if asked.spec is None:
        yield Finding("stop", "skipped", "name a spec to compare the time of a stop with its limit")
        return
    from service.preview.plan import checkpoint_bytes

    runs = asked.runs.absolute()
    takes = longest_save(RunDirectory(runs / asked.spec.name))
    takes = takes or estimated(checkpoint_bytes(asked.spec), runs)
    short = [
        grace for grace in grace_periods(asked.spec) if takes and takes.seconds > grace.seconds
    ]
    raised = " and ".join(f"{grace.name} to {takes.seconds:.0f}" for grace in short if takes)
    fix = f"Raise {raised}, or choose a faster disk with --runs." if short else ""
    told = stop_in_words(asked.spec, takes)
    yield Finding("stop", "warning" if short else "ok", told, fix)


def _tried_disk(place: Path) -> Iterator[Finding]:
    begin, now = time.perf_counter(), time.time()
    with (place / "partial").open("wb") as file:
        file.write(os.urandom(1 << 20) * 8)
        file.flush()
        os.fsync(file.fileno())
    rate = (8 << 20) / (time.perf_counter() - begin)
    (place / "whole").write_text("old")
    os.replace(place / "partial", place / "whole")
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    size = (place / "whole").stat().st_size
    if size != 8 << 20 or (place / "partial").exists():
        fix = "Choose a directory on another file system with --runs."
        yield Finding("rename", "failed", "a file was not replaced atomically", fix)
    told = f"{rate / 1e6:.0f} MB/s written and fsynced; files are replaced atomically"
    slow = rate < 20e6
    fix = "Checkpoints will take long: choose a faster disk with --runs." if slow else ""
    yield Finding("fsync", "warning" if slow else "ok", told, fix)
    yield _lock(place / "lock")
    yield _throughput(now, (place / "whole").stat().st_mtime)


def _lock(path: Path) -> Finding:
    with path.open("w") as mine, path.open("w") as other:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "Mount the file system with locks, or choose another directory with --runs."
            return Finding("lock", "failed", f"no file can be locked: {error.strerror}", fix)
        with suppress(BlockingIOError):  # a lock must prevent this
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fix = "Never start a run twice here, or choose another directory with --runs."
            return Finding("lock", "warning", "a lock has no effect here", fix)
    return Finding("lock", "ok", "a lock allows only one writer")


def _throughput(ours: float, theirs: float) -> Finding:
    year = time.gmtime(ours).tm_year
    fix = "Set the clock with NTP; the times in logs and the order of failures depend on it."
    if year < 2025:
        return Finding("clock", "warning", f"it shows the year {year}", fix)
    if abs(theirs - ours) > 5:
        told = f"the file system is {theirs - ours:+.0f} s from this machine"
        return Finding("clock", "warning", told, fix)
    return Finding("clock", "ok", f"within {abs(theirs - ours):.1f} s of the file system's")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.2g} MiB"


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    _packages,
    _torch_companions,
    _devices,
    _cores,
    _memory,
    _shared_memory,
    _open_files,
    _run_directory,
    _store,
    _stop,
    _host_name,
    _rdma,
    _all_reduce,
    _wandb,
    _kubectl,
)
