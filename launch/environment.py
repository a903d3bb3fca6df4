"""Rank, world size and node of this process, read once from its environment. No torch."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from service.basics.errors import SpecError, printable
from service.basics.process_starts import start_of
from service.health.stop_budget import GracePeriod

RUN_OF_STORE = "EVENSTEP_RUN_OF_STORE"
"""Set if our launcher has the store: the prefix of this attempt's keys."""
STORE_FILE = "EVENSTEP_STORE_FILE"
"""The path of that store, if it is a file of the launcher's."""
SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable of torchrun's --shutdown-timeout."""
TORCHRUN_BEGAN = "EVENSTEP_TORCHRUN_BEGAN"
"""Set by a process of ours between torchrun and this one: when that torchrun started."""
UNSHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""A variable of torch: with 1, torchrun agrees on a new store in every rendezvous."""
_OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
MOST_PROCESSES = "EVENSTEP_MOST_PROCESSES"
"""Set in a job with elastic nodes: the processes that it has with most nodes."""


@dataclass(frozen=True)
class Environment:
    """The position of one process in its job, as set by torchrun or our own launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    most_processes: int = 0
    """The processes that a job with elastic nodes may have later; 0: its number is fixed."""

    @property
    def is_alone(self) -> bool:
        """Whether this is the only process of the job."""
        return self.world_size == 1


def launched(variables: Mapping[str, str] | None = None) -> Environment | None:
    """The position that torchrun gave this process, or None if no launcher started it.

    Raises:
        SpecError: the variables contradict each other.
    """
    variables = os.environ if variables is None else variables
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in variables]
    if missing:
        raise SpecError(
            f"The environment sets {'RANK' if 'RANK' in variables else 'WORLD_SIZE'} but not "
            f"{', '.join(missing)}. Start the job with torchrun, which sets all of them, or "
            "unset them to run alone."
        )
    try:
        rank, world_size, local_rank, local_world_size = (int(variables[n]) for n in names)
    except ValueError as error:
        raise SpecError(f"{', '.join(names)} must be whole numbers ({error}).") from error
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise SpecError(
            f"RANK={rank} of WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} of "
            f"LOCAL_WORLD_SIZE={local_world_size} contradict each other. Start the job with "
            "torchrun."
        )
    most = variables.get(MOST_PROCESSES, "")
    most_processes = int(most) if most.isdecimal() else 0
    return Environment(rank, world_size, local_rank, local_world_size, most_processes)


@dataclass(frozen=True)
class Node:
    """The position of one machine among those of the job, set by Kubernetes or the user."""

    index: int
    nodes: int
    processes: str
    """Processes on this machine: a number or `auto`."""
    address: str
    """The address of node 0; empty if there is only one node."""
    port: int
    local_index: int = 0
    """The index among the launchers on this machine, if Slurm started one for each GPU."""
    local_nodes: int = 1
    """The number of launchers on this machine."""
    secret_name: str = ""
    """The file in the runs directory in which node 0 writes a secret for the others.
    Empty: there is no such file."""
    least: int = 0
    """The smallest number of nodes with which an elastic job runs; 0: it needs all of them."""
    returns: bool = False
    """Whether a cluster starts a lost node again."""


def node_here(variables: Mapping[str, str] | None = None) -> Node | None:
    """The node that torchrun's five PET_* variables describe, or None without them.

    The index may come from an Indexed Job (JOB_COMPLETION_INDEX), and the address from the name
    that such a Job gives this pod.

    Raises:
        SpecError: they contradict each other, or one is missing.
    """
    variables = os.environ if variables is None else variables
    index = variables.get("PET_NODE_RANK", variables.get("JOB_COMPLETION_INDEX"))
    if "PET_NNODES" not in variables:
        if index is not None:
            raise SpecError(
                f"The environment says that this is node {index}, but not of how many: set "
                "PET_NNODES (1 if every pod trains by itself)."
            )
        return None
    least, nodes = range_of_nodes(variables["PET_NNODES"], "PET_NNODES")
    processes = _processes(variables.get("PET_NPROC_PER_NODE", "1"))
    if nodes > 1 and index is None:
        raise SpecError(
            f"PET_NNODES={nodes}, but PET_NODE_RANK is not set: set it to the index of this node, "
            f"from 0."
        )
    place = _number(index or "0", "PET_NODE_RANK")
    if not place < nodes:
        raise SpecError(
            f"PET_NODE_RANK={place} of PET_NNODES={variables['PET_NNODES']} is not possible: "
            "count from 0."
        )
    address = variables.get("PET_MASTER_ADDR", "")
    if nodes > 1 and not address:
        address = first_address(socket.getfqdn(), place)
    _require_name(address)
    port = port_number(variables.get("PET_MASTER_PORT", "29500"))
    return Node(
        place,
        nodes,
        processes,
        address,
        port,
        least=least if least < nodes else 0,
        returns="JOB_COMPLETION_INDEX" in variables,
    )


def _require_name(address: str) -> None:
    """Check that this may be the name or the address of a machine.

    Raises:
        SpecError: it cannot: Python's sockets would raise an error that is no `OSError`.
    """
    try:
        address.encode("idna")
    except UnicodeError as error:
        raise SpecError(
            f"PET_MASTER_ADDR={address}: is no name of a machine: between two dots are 1 to 63 "
            "characters. Set it to the name or the address of node 0."
        ) from error


def range_of_nodes(text: str, name: str) -> tuple[int, int]:
    """The least and the most nodes in `N` or `LEAST:MOST`, as torchrun writes it.

    Raises:
        SpecError: they are no whole numbers, or not possible.
    """
    first, colon, last = text.partition(":")
    if colon and not (first.isdecimal() and last.isdecimal()):
        raise SpecError(f"{name} must be a whole number or LEAST:MOST, but is {text!r}.")
    least = _number(first, name, least=0 if colon else 1)
    most = _number(last, name) if colon else least
    if colon and not 1 <= least <= most:
        raise SpecError(f"{name}={text} is not possible: LEAST:MOST needs 1 <= LEAST <= MOST.")
    return least, most


def first_address(own: str, index: int) -> str:
    """The name of pod 0 of an Indexed Job, from the full name of pod `index`.

    Raises:
        SpecError: the pod has no full name.
    """
    host, dot, domain = own.partition(".")
    if not (dot and host.endswith(f"-{index}")):
        raise SpecError(
            f"PET_MASTER_ADDR is not set, and cannot be derived from this machine's name, {own}: "
            f"a pod of an Indexed Job with a subdomain is <job>-{index}.<service>.<namespace>..."
        )
    return f"{host.removesuffix(str(index))}0.{domain}"


@dataclass(frozen=True)
class Group:
    """The processes of all nodes, as this node has learned in the rendezvous."""

    index: int
    nodes: int
    processes: int
    """The number of processes on each node."""
    address: str
    """The address of the store on node 0, through which the processes find each other."""
    port: int
    local_index: int = 0
    local_nodes: int = 1
    """As in `Node`."""

    def variables(self, local: Environment) -> dict[str, str]:
        """The environment of a process of this node, from its position on the node."""
        return {
            "RANK": str(self.index * self.processes + local.local_rank),
            "WORLD_SIZE": str(self.nodes * self.processes),
            "LOCAL_RANK": str(self.local_index * self.processes + local.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_nodes * self.processes),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            # The launcher of node 0 has the store, so rank 0 must not start a second one.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": f"nodes-{self.port}",
            RUN_OF_STORE: f"nodes-{self.port}",
            STORE_FILE: "",
        }


def torchrun_grace() -> GracePeriod:
    """The time that the torchrun of this process allows for a stop."""
    given = _option_of(psutil.Process(os.getppid()), "--shutdown-timeout")
    said = given or os.environ.get(SHUTDOWN_TIMEOUT, "30")
    try:
        seconds = float(said)
    except ValueError:
        # torchrun itself has not started with a wrong option, so it is the variable.
        raise SpecError(
            f"{SHUTDOWN_TIMEOUT} must be a number of seconds, but is {said!r}."
        ) from None
    return GracePeriod(seconds, "torchrun's --shutdown-timeout")


def _option_of(process: psutil.Process, name: str) -> str:
    """The value of an option in the command line of a process; empty if it has none."""
    found = ""
    words = [word.partition("=") for word in process.cmdline()]
    for (option, _, value), (following, _, _) in pairwise([*words, ("", "", "")]):
        if option.replace("_", "-") == name:
            found = value or following
    return found


def unshared_store_advice() -> str | None:
    """What to say of a torchrun with MIN:MAX nodes that keeps the address of its first store.

    With torch 2.13 a node that joins, or that becomes the first one, does not write it again where
    the others look for it: all of them end after a minute.
    """
    torchrun = _torchrun()
    if torchrun is None or os.environ.get(UNSHARED_STORE) == "1":
        return None
    nodes = _option_of(torchrun, "--nnodes") or os.environ.get("PET_NNODES", "")
    least, _, most = nodes.partition(":")
    if not most or least == most:
        return None
    return (
        f"WARNING: torchrun --nnodes {nodes}: when a node joins, or the first one is lost, "
        f"torchrun itself may end on all nodes after 60 s. Start each with {UNSHARED_STORE}=1."
    )


def torchrun_began() -> float | None:
    """When the torchrun of this process started, in seconds since 1970; None without torchrun."""
    if told := os.environ.get(TORCHRUN_BEGAN):
        return float(told)
    torchrun = _torchrun()
    return _started(torchrun) if torchrun is not None else None


def launcher_here() -> str:
    """A name that the processes which one torchrun has started on this machine have in common."""
    torchrun = _torchrun() or psutil.Process(os.getppid())
    return f"{torchrun.pid}-{start_of(torchrun.pid) or int(torchrun.create_time())}"


def _torchrun() -> psutil.Process | None:
    """The torchrun of this process; None without it.

    torchrun sets a variable in all processes that it starts, but not in its own: a wrapper or a
    process of ours may be between it and this one.
    """
    if _OF_TORCHRUN not in os.environ:
        return None
    for process in psutil.Process().parents():
        try:
            if _OF_TORCHRUN not in process.environ():
                return process
        except psutil.Error:  # it belongs to another user, so it is above torchrun
            return None
    return None


def _started(process: psutil.Process) -> float:
    """When a process started, in seconds since 1970.

    The kernel tells it in hundredths of a second since boot, but the time of boot in whole seconds,
    so what psutil adds up can be a second too early.
    """
    ticks = start_of(process.pid)
    if ticks is None:
        return float(process.create_time())
    since_boot = int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def read_secrets(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables whose values are in files: WANDB_API_KEY from WANDB_API_KEY_FILE, if it exists.

    Raises:
        SpecError: the file cannot be read.
    """
    variables = os.environ if variables is None else variables
    path = variables.get("WANDB_API_KEY_FILE")
    if not path or "WANDB_API_KEY" in variables or not Path(path).exists():
        return {}
    try:
        return {"WANDB_API_KEY": Path(path).read_text(encoding="utf-8").strip()}
    except (OSError, ValueError) as error:
        raise SpecError(f"WANDB_API_KEY_FILE: {path} cannot be read: {error}.") from error


_SHORTEST_SECRET = 16


def meeting_secret(variables: Mapping[str, str] | None = None) -> bytes:
    """The secret that the nodes of a job share; empty if none is given.

    It is read from the file EVENSTEP_SECRET_FILE or from the variable EVENSTEP_SECRET.

    Raises:
        SpecError: the file cannot be read, or the secret is too short.
    """
    variables = os.environ if variables is None else variables
    path = variables.get("EVENSTEP_SECRET_FILE", "")
    name = "EVENSTEP_SECRET_FILE" if path else "EVENSTEP_SECRET"
    try:
        secret = Path(path).read_bytes() if path else variables.get(name, "").encode()
    except OSError as error:
        raise SpecError(f"{name}: {path} cannot be read: {error}.") from error
    secret = secret.strip()
    if len(secret) < _SHORTEST_SECRET and (path or secret):
        raise SpecError(
            f"{name}: a secret of {len(secret)} bytes can be guessed. Create one of "
            f"{_SHORTEST_SECRET} or more, such as with `openssl rand -hex 32`, for all nodes."
        )
    return secret


def port_number(text: str) -> int:
    """The value of PET_MASTER_PORT.

    Raises:
        SpecError: no port can have it.
    """
    return _number(text, "PET_MASTER_PORT", least=1, most=65535)


def _number(text: str, name: str, *, least: int = 0, most: int = 10**9) -> int:
    if not text.isdecimal():
        raise SpecError(f"{name} must be a whole number, but is {printable(text[:40])!r}.")
    number = int(text) if len(text) < 20 else most + 1
    if not least <= number <= most:
        raise SpecError(f"{name} must be from {least} to {most}, but is {printable(text[:40])}.")
    return number


def _processes(text: str) -> str:
    """The value of PET_NPROC_PER_NODE for `--processes`; words have torchrun's meaning."""
    words = {"auto": "auto", "gpu": "auto", "cpu": str(os.cpu_count() or 1)}
    return words.get(text) or str(_number(text, "PET_NPROC_PER_NODE", least=1))
