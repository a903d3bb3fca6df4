"""The states of a job, and the reasons why it waits, as text. Pure."""

from __future__ import annotations

import re

from launch.engines.contract import code_in_words

_STATES = {
    "CONFIGURING": "its nodes are starting",
    "RUNNING": "is running",
    "COMPLETING": "is ending",
    "SUSPENDED": "is suspended",
    "REQUEUED": "is queued again",
    "COMPLETED": "has ended with 0 (done)",
    "CANCELLED": "was cancelled",
    "TIMEOUT": "reached its time limit; submit it again to resume",
    "PREEMPTED": "was preempted; submit it again to resume",
    "NODE_FAIL": "lost a node; submit it again to resume",
    "OUT_OF_MEMORY": "was killed for its memory: raise slurm.memory, or use a smaller "
    "batch.micro_batch",
    "DEADLINE": "reached its deadline",
    "UNKNOWN": "has ended, and Slurm no longer knows how",
    "BOOT_FAIL": "has a node that did not start",
}
# Slurm's reasons, and their meaning or what to do about them. The first match counts.
_REASONS = {
    r"Priority": "other jobs are before it in the queue",
    r"Resources": "it is the next; it starts when enough nodes are free",
    r"BeginTime": "Slurm delays a requeued job for about two minutes",
    r"Dependency|DependencyNeverSatisfied": "it waits for another job (sbatch --dependency)",
    r"JobHeldUser": "you hold it: scontrol release JOB",
    r"JobHeldAdmin": "an administrator holds it: ask why",
    r"JobArrayTaskLimit": "other jobs of its array go first",
    r"PartitionTimeLimit": "slurm.time is more than the partition allows: see sinfo -o '%P %l'",
    r"PartitionNodeLimit": "slurm.nodes is more, or fewer, than the partition allows",
    r"PartitionDown|PartitionInactive": "the partition takes no jobs now: choose another",
    r"ReqNodeNotAvail|UnavailableNodes": "nodes that it needs are down, drained or reserved",
    r"Nodes required for job are DOWN": "nodes that it needs are down, drained or reserved",
    r"BadConstraints": "no node has what it asks for: see slurm.constraint",
    r"InvalidAccount": "slurm.account is not yours here: see sacctmgr show assoc",
    r"InvalidQOS|QOSNotAllowed": "slurm.qos is not allowed here: ask which is",
    r"QOSMax\w*PerUser|QOSMax\w*Limit|MaxJobs\w*|Max\w+Per(User|Account)": (
        "you have reached the limit of the quality of service; it starts when other jobs end"
    ),
    r"Assoc\w+|QOSGrp\w+|Grp\w+": "your group has reached its limit; it starts later",
    r"Licenses": "it waits for a licence",
    r"Reservation": "it waits for its reservation",
    r"Cleaning": "its last attempt is still being cleaned up",
    r"launch failed|RaisedSignal|Prolog": "a node could not start it: ask the administrator",
}


def state_in_words(state: str, reason: str = "", code: int | None = None) -> str:
    """The state of a job, from Slurm's state and reason."""
    word = state.split()[0].rstrip("+") if state else "UNKNOWN"
    if word == "PENDING":
        return (
            f"is pending ({reason}: {reason_in_words(reason)})"
            if reason != "None"
            else "is pending"
        )
    if word == "FAILED" and code is not None:
        return f"has ended with {code_in_words(code)}"
    return _STATES.get(word, word.lower())


def reason_in_words(reason: str) -> str:
    """Why a job waits, and what to do about it if known."""
    for sign, words in _REASONS.items():
        if re.search(sign, reason):
            return words
    return "see man squeue, JOB REASON CODES"
