"""Calls of Slurm's own commands, and their answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.basics.errors import EvenstepError, SpecError

_ANSWER_SECONDS = 60.0
_FIELDS = ("%i", "%T", "%M", "%L", "%D", "%N", "%k", "%r")
_SEPARATOR = "\t"


class SlurmError(EvenstepError):
    """Slurm refused a request, or did not respond; with its own message."""


@dataclass(frozen=True)
class QueuedJob:
    """One job in Slurm's queue."""

    number: str
    """Its name in Slurm: `12`, or `12_3` in an array."""
    state: str
    has_run: str
    has_left: str
    nodes: str
    hosts: str
    reason: str

    @property
    def told(self) -> str:
        """Its number, time and nodes."""
        there = f" on {self.hosts}" if self.hosts else ""
        time = f", {self.has_run} so far, {self.has_left} left" if self.state == "RUNNING" else ""
        return f"{self.nodes} {'node' if self.nodes == '1' else 'nodes'}{there}{time}"


def jobs_of(place: Path) -> list[QueuedJob]:
    """The jobs of a run that have not ended, found by the comment in their script.

    Raises:
        SpecError: Slurm is not installed here.
        SlurmError: the controller does not respond.
    """
    shown = _SEPARATOR.join(_FIELDS)
    told = asked("squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--format={shown}")
    return [job for job, comment in _read(told) if comment == str(place)]


def _read(told: str) -> Iterator[tuple[QueuedJob, str]]:
    for line in told.splitlines():
        cells = [cell.strip() for cell in line.split(_SEPARATOR)]
        if len(cells) == len(_FIELDS):
            number, state, has_run, has_left, nodes, hosts, comment, reason = cells
            yield QueuedJob(number, state, has_run, has_left, nodes, hosts, reason), comment


Ends = dict[str, tuple[str, int]]
"""(state, exit code) of jobs that have ended, by their number: `12`, or `12_3` in an array."""


def ends_of(number: str) -> Ends:
    """The ends of a job, or of all jobs of an array, that the controller still has.

    Slurm forgets a job some minutes after its end. Of a job that has not ended, its state now.
    """
    try:
        told = asked("scontrol", "--oneliner", "show", "job", number)
    except SlurmError:
        return {}
    ends: Ends = {}
    for line in told.splitlines():  # of an array: one for each job that has been started
        facts = dict(word.partition("=")[::2] for word in line.split())
        code = facts.get("ExitCode", "").partition(":")[0]
        end = facts.get("JobState", ""), int(code) if code.isdecimal() else 0
        tasks = _tasks_in(facts["ArrayTaskId"]) if "ArrayTaskId" in facts else None
        ends |= {number: end} if tasks is None else {f"{number}_{task}": end for task in tasks}
    return ends


def _tasks_in(text: str) -> Iterator[int]:
    """The indices of an `ArrayTaskId`: `3`, or of all jobs not started, `2-3,7` or `2-8:2%1`."""
    for found in re.finditer(r"(\d+)(?:-(\d+)(?::(\d+))?)?", text.partition("%")[0], re.ASCII):
        first, last, step = found.groups()
        yield from range(int(first), int(last or first) + 1, int(step or 1))


def submitted(script: Path) -> str:
    """The number of the job that Slurm creates from a script.

    Raises:
        SpecError: Slurm is not installed here, or refuses the script's request.
        SlurmError: the controller does not respond.
    """
    return asked("sbatch", "--parsable", str(script)).partition(";")[0]


def asked(*words: str) -> str:
    """The output of one of Slurm's commands.

    Raises:
        SpecError: it is not installed here, or refuses the request.
        SlurmError: the controller does not respond.
    """
    if shutil.which(words[0]) is None:
        raise SpecError(
            f"There is no {words[0]} here. Use a machine from which jobs are submitted, a login "
            "node of the cluster; evenstep slurm render works everywhere."
        )
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # squeue also prints comments of jobs that are not ours
            env=os.environ | {"SLURM_BITSTR_LEN": "0"},  # else scontrol cuts long lists of tasks
            timeout=_ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"{words[0]} has not answered in {_ANSWER_SECONDS:g} s. Is the controller up? See: "
            "scontrol ping"
        ) from error
    except OSError as error:
        raise SlurmError(f"{words[0]} cannot be started: {error.strerror or error}.") from error
    if done.returncode == 0:
        return done.stdout.strip()
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    why = last.removeprefix(f"{words[0]}: ").removeprefix("error: ")
    if "Unable to contact slurm controller" in why or "Connection refused" in why:
        raise SlurmError(f"Slurm's controller does not respond ({why}). See: scontrol ping")
    kind = SpecError if words[0] == "sbatch" else SlurmError
    raise kind(f"Slurm refuses: {why.rstrip('.')}.{_advice(why)}")


_ADVICE = {
    "Invalid account": " See slurm.account, slurm.partition and slurm.qos.",
    "Invalid partition": " See slurm.partition; sinfo lists them.",
    "Requested node configuration": " No node is so large: see slurm.cpus, memory, gpus_per_node.",
    "Invalid generic resource": " See slurm.gpus_per_node and gpu_type; sinfo -o '%N %G' has them.",
    "Node count specification": " See slurm.nodes.",
    "Invalid feature": " See slurm.constraint; sinfo -o '%N %f' has them.",
    "Invalid qos": " See slurm.qos.",
    "time limit": " See slurm.time.",
}


def _advice(why: str) -> str:
    return next((words for sign, words in _ADVICE.items() if sign.lower() in why.lower()), "")
