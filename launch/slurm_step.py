"""The position of this process in a step that Slurm's `srun` started. No torch.

Slurm's variables leak: into the shell of `salloc`, into jobs that `sbatch` starts from there, into
tmux. So they are used only in a process that descends from a task of a step, and not in a shell
that `srun --pty` opened for a user.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its wheel has no types

from launch.environment import Node, node_here, port_number
from service.basics.atomic_files import without_link
from service.basics.errors import SpecError
from service.health.stop_budget import GracePeriod
from service.spec.models import Spec

_FIRST_PORT, _PORTS = 15_000, 15_000
"""Below the ports that systems assign automatically, from 32768 on."""


@dataclass(frozen=True)
class Step:
    """The position of one task among the tasks of a step."""

    job: int
    number: int
    restart: int
    """How often the job was requeued."""
    task: int
    tasks: int
    local_task: int
    """The index of this task on its machine."""
    tasks_each: int
    """The number of tasks on each machine."""
    gpus_each: int
    """The GPUs of each machine; 0 if Slurm allocates none."""
    hosts: tuple[str, ...]
    """The names of the step's machines, in the order of their numbers."""


def step_here(variables: Mapping[str, str] | None = None) -> Step | None:
    """The step of which this process is a task, or None.

    Raises:
        SpecError: the step has tasks of both kinds, one for each machine and one for each GPU.
    """
    variables = os.environ if variables is None else variables
    if "SLURM_STEP_ID" not in variables or not _is_task(variables):
        return None
    return step_of(variables)


def step_of(variables: Mapping[str, str]) -> Step:
    """The step that the variables of one of its tasks describe.

    Raises:
        SpecError: see `step_here`; or a variable is missing.
    """
    try:
        each = tasks_of(variables["SLURM_STEP_TASKS_PER_NODE"])
        hosts = tuple(hosts_of(variables["SLURM_STEP_NODELIST"]))
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")
        job, number, task, local_task = (int(variables[name]) for name in names)
        restart = int(variables.get("SLURM_RESTART_COUNT", "0"))
        gpus = int(variables.get("SLURM_GPUS_ON_NODE") or 0)
    except (KeyError, ValueError) as error:
        raise SpecError(
            f"SLURM_STEP_ID says that this is a task of Slurm, but its variables do not tell "
            f"which one ({error}). Start it with srun, or unset SLURM_STEP_ID."
        ) from error
    gpus = 0 if variables.get("EVENSTEP_DEVICE") == "cpu" else gpus
    _check_tasks(each, gpus)
    return Step(job, number, restart, task, sum(each), local_task, each[0], gpus, hosts)


def _check_tasks(each: list[int], gpus: int) -> None:
    """Refuse anything but one task for each machine or one for each GPU."""
    ways = (
        "Start one task on each machine (srun --ntasks-per-node=1), and evenstep starts a process "
        "for each GPU; or one task for each GPU"
    )
    if len(set(each)) > 1:
        counts = ", ".join(map(str, each[:8])) + (", ..." if len(each) > 8 else "")
        raise SpecError(
            f"Slurm started {counts} tasks on the machines of this step: they must be equal. "
            f"{ways}, the same number on each machine."
        )
    if gpus and each[0] not in (1, gpus):
        raise SpecError(
            f"Slurm started {each[0]} tasks on a machine with {gpus} GPUs. {ways} "
            f"(srun --ntasks-per-node={gpus})."
        )


def node_of(step: Step, *, processes: str | None, variables: Mapping[str, str]) -> Node:
    """The node with its processes that this task is for a launcher.

    With several tasks on a machine, each is a node of one process.

    Args:
        processes: the command's number of processes on each machine; by default one for each GPU.
    Raises:
        SpecError: the command sets the number of processes, but Slurm has already started them.
    """
    if step.tasks_each > 1 and processes is not None:
        raise SpecError(
            f"--processes: Slurm has started {step.tasks_each} tasks on each machine, each of them "
            "one process; leave it out, or use srun --ntasks-per-node=1."
        )
    count = "1" if step.tasks_each > 1 else processes or str(max(1, step.gpus_each))
    first = "127.0.0.1" if len(step.hosts) == 1 else step.hosts[0]
    port = _FIRST_PORT + (7 * step.job + step.number) % _PORTS
    return Node(
        index=step.task,
        nodes=step.tasks,
        processes=count,
        address=variables.get("PET_MASTER_ADDR") or first,
        port=port_number(variables.get("PET_MASTER_PORT") or str(port)),
        local_index=step.local_task,
        local_nodes=step.tasks_each,
        secret_name=f"slurm-{step.job}.{step.number}-{step.restart}",
    )


def node_asked(processes: str | None, nodes: str | None) -> Node | None:
    """The node that this command launches, if the environment describes one.

    Args:
        processes: the option `--processes` of the command.
        nodes: its option `--nodes`.
    Raises:
        SpecError: the environment contradicts itself or an option.
    """
    if nodes is not None and "PET_NNODES" in os.environ:
        raise SpecError("--nodes: PET_NNODES already sets it; leave it out.")
    node = node_here({**os.environ, "PET_NNODES": nodes} if nodes is not None else None)
    if node is not None and processes is not None:
        if "PET_NPROC_PER_NODE" in os.environ:
            raise SpecError("--processes: PET_NPROC_PER_NODE already sets it; leave it out.")
        return replace(node, processes=processes)
    step = step_here() if node is None else None
    return node if step is None else node_of(step, processes=processes, variables=os.environ)


def note_exit_code(code: int, variables: Mapping[str, str] | None = None) -> int:
    """Write the exit code of this task for the script of the job; return the code.

    srun alone returns only the largest code of all tasks.
    """
    variables = os.environ if variables is None else variables
    folder, task = variables.get("EVENSTEP_EXIT_CODES"), variables.get("SLURM_PROCID", "")
    if folder and task.isdecimal():
        with (
            suppress(OSError),  # the script then uses srun's exit code
            open(Path(folder, task), "w", opener=without_link) as file,
        ):
            file.write(f"{code}\n")
    return code


def slurm_grace(spec: Spec, variables: Mapping[str, str] | None = None) -> GracePeriod | None:
    """The script's limit for a stop, if it is shorter than that of our launcher."""
    variables = os.environ if variables is None else variables
    told = variables.get("EVENSTEP_STOP_SECONDS", "")
    budget = spec.faults.stop_budget_seconds
    if not told.isdecimal() or (budget != "auto" and budget <= int(told)):
        return None
    return GracePeriod(float(told), "slurm.stop_seconds")


# ---- whether this is a task


def _is_task(variables: Mapping[str, str]) -> bool:
    """Whether this process descends from the task of the step that the variables describe."""
    told = variables.get("SLURM_TASK_PID", "")
    if not told.isdecimal():
        return False
    own = os.getpid()
    task = int(told)
    if task != own:
        ancestors = {parent.pid for parent in psutil.Process(own).parents()}
        if task not in ancestors or (sys.stdin is not None and sys.stdin.isatty()):
            return False
    return not _is_batch_script(task)


def _is_batch_script(task: int) -> bool:
    """Whether Slurm started the process as a job's script, from the title of its parent."""
    with suppress(psutil.Error):  # the process belongs to root and may be hidden
        keeper = psutil.Process(task).parent()
        title = " ".join(keeper.cmdline()) if keeper is not None else ""
        return title.startswith("slurmstepd") and ".batch]" in title
    return False


# ---- lists in Slurm's short form


def hosts_of(text: str) -> Iterator[str]:
    """The names in a Slurm list, in order: `gpu[08-10,12],login1` has five.

    Raises:
        ValueError: it is not such a list.
    """
    for name in _split(text):
        parts = re.split(r"\[([^\]]*)\]", name)
        if not name or any(c in part for part in parts[::2] for c in "[]"):
            raise ValueError(f"{text!r} is not a list of machines")
        choices = [[part] if at % 2 == 0 else _numbers(part) for at, part in enumerate(parts)]
        yield from map("".join, itertools.product(*choices))


def _split(text: str) -> list[str]:
    """At the commas that are not in brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _numbers(text: str) -> list[str]:
    """`08-10,12` as 08, 09, 10, 12."""
    found = []
    for piece in text.split(","):
        first, dash, last = piece.partition("-")
        end = int(last) if dash else int(first)
        if end < int(first):
            raise ValueError(f"{piece!r} is not a range of machines")
        found += [str(n).zfill(len(first)) for n in range(int(first), end + 1)]
    return found


def tasks_of(text: str) -> list[int]:
    """The number of tasks on each machine: `2(x3),1` is 2, 2, 2, 1.

    Raises:
        ValueError: it is not such a list.
    """
    found = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece)
        if match is None:
            raise ValueError(f"{text!r} is not a list of tasks")
        found += [int(match[1])] * int(match[2] or 1)
    return found
