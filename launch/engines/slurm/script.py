"""Renders a spec as a script for sbatch: a pure function.

docs/how-to/slurm.md has the reason for every line; a test checks that.
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.engines.settings import Settings
from service.basics.errors import PeerLost, SpecError, Stopped, WillFailAgain, printable
from service.runs.directory import require_no_secret
from service.runs.failure_reports import is_secret
from service.spec.files import dump_values, plain_values
from service.spec.models import Spec
from service.spec.slurm import SlurmSpec
from service.storage.address import Address

_END = "END_OF_SPEC"
_ASSIGNED = re.compile(r"(\w+)=(\S+)")
_SIGNAL_SECONDS = 30
"""Time for Slurm to send a signal, and for the processes to receive it."""
_APART_SECONDS = 300
"""Time for the other tasks to end after the first one. Nodes wait half a minute for each other."""


@dataclass(frozen=True)
class Script:
    """Everything that determines the script."""

    spec: Spec
    runs: Path | Address
    """The runs directory, as seen by the nodes; or their address in an object store."""
    stop_budget_seconds: float
    """The time of a stop of this run, from its saves so far."""
    sweep: Sequence[Settings] = ()
    more: Sequence[str] = ()
    """Additional arguments of `evenstep run`."""
    files: Path = Path("runs")
    """The directory of the script and the logs, as seen by the nodes, of runs at an address."""

    @property
    def place(self) -> Path:
        """The directory of the run's script and logs."""
        return place_of(self.runs, self.spec.name, files=self.files)

    @property
    def shared(self) -> Path:
        """The directory that all nodes see."""
        return self.runs if isinstance(self.runs, Path) else self.files


def place_of(runs: Path | Address, name: str, *, files: Path) -> Path:
    """The directory of the script and the logs of a run: next to the runs, or in `files`."""
    if isinstance(runs, Path):
        return runs / ".slurm" / name
    digest = hashlib.sha256(str(runs / name).encode()).hexdigest()[:8]
    return files / ".slurm" / f"{name}-{digest}"


def render(script: Script) -> str:
    """The script of a job.

    Raises:
        SpecError: the spec has no `slurm` section, or one that no cluster could run.
    """
    asked = script.spec.slurm
    if asked is None:
        raise SpecError("slurm: missing; add slurm: {nodes: 1, gpus_per_node: 1, time: 24:00:00}")
    _check(script, asked)
    sections = [
        _head(script, asked),
        _spec_file(script),
        _surroundings(script, asked),
        _AGAIN.format(restarts=asked.restarts),
        _settings(script),
        _step(script, asked),
        _END_OF_JOB,
    ]
    return "\n".join(section for section in sections if section)


def quoted(text: str) -> str:
    """The text as one word for the shell."""
    if shlex.quote(text) == text:
        return text
    return '"' + re.sub(r'([\\"$`])', r"\\\1", text) + '"'


def stop_seconds(script: Script, asked: SlurmSpec) -> int:
    """How long before its limit an attempt is asked to stop."""
    if asked.stop_seconds != "auto":
        return asked.stop_seconds
    return math.ceil(script.stop_budget_seconds) + _SIGNAL_SECONDS


def _check(script: Script, asked: SlurmSpec) -> None:
    limit, stop = asked.seconds, stop_seconds(script, asked)
    if limit is not None and stop >= limit / 2:
        raise SpecError(
            f"slurm.time: of {asked.time} a stop may take {stop} s, so most of each attempt "
            f"would be spent on stopping. Raise it above {2 * stop} s, or lower slurm.stop_seconds."
        )
    set_here = dict(asked.env)
    for line in asked.prolog:
        set_here |= {name: value.strip("'\"") for name, value in _ASSIGNED.findall(line)}
    if any(is_secret(text, set_here) for text in (*asked.prolog, *asked.env.values())):
        raise SpecError(
            "slurm: prolog or env contains an apparent secret, which would be in the script. "
            "sbatch passes on the environment in which the job is submitted; or keep it in a file "
            "that only you can read."
        )
    require_no_secret(script.spec)
    if any(is_secret(text) for settings in script.sweep for text in settings):
        raise SpecError(
            "--sweep: a value is an apparent secret, which would be in the script. Let the task "
            "read it from the environment."
        )
    _check_directory(script, asked)


def _check_directory(script: Script, asked: SlurmSpec) -> None:
    """Refuse a directory whose name means something else in the script."""
    runs = str(script.shared)
    option = "--runs" if isinstance(script.runs, Path) else "--files"
    # A line's end would begin a line of the shell.
    if re.search(r"[\s\x00-\x1f\x7f%#\"'\\]", runs):
        raise SpecError(
            f"{option}: {printable(runs)} contains a space, a control character, a quote, or one "
            "of % # \\, which sbatch would misinterpret. Use another directory."
        )
    if asked.container is not None and re.search("[,:]", runs):
        raise SpecError(
            f"{option}: {runs} contains a comma or a colon, which separate the mounts of a "
            "container. Use another directory."
        )


# ---- the request to Slurm


def _head(script: Script, asked: SlurmSpec) -> str:
    log = "log-%A_%a" if script.sweep else "log-%j"
    lines = [
        "#!/bin/bash",
        f"# Evenstep's job {script.spec.name}. The reason of every line: docs/how-to/slurm.md",
        f"# Before sbatch by hand: mkdir -p {quoted(str(script.place))}",
        *(
            f"#SBATCH --{option}"
            for option in (
                f"job-name={script.spec.name}",
                f"comment={script.place}",
                f"output={script.place / log}",
                "open-mode=append",
                *_wishes(asked),
                f"signal=B:TERM@{stop_seconds(script, asked)}",
                "requeue",
                *([f"array=0-{len(script.sweep) - 1}"] if script.sweep else []),
                *(option.removeprefix("--") for option in asked.options),
            )
        ),
    ]
    return "\n".join(lines) + "\n"


def _wishes(asked: SlurmSpec) -> Iterator[str]:
    """The options for the resources of a job."""
    for name in ("partition", "account", "qos", "constraint", "time"):
        value = getattr(asked, name)
        if value is not None:
            yield f"{name}={value}"
    yield f"nodes={asked.nodes}"
    yield "ntasks-per-node=1"
    if asked.gpus_per_node:
        kind = f"{asked.gpu_type}:" if asked.gpu_type else ""
        yield f"gpus-per-node={kind}{asked.gpus_per_node}"
    if asked.cpus is not None:
        yield f"cpus-per-task={asked.cpus}"
    if asked.memory is not None:
        yield f"mem={asked.memory}"


# ---- the commands of the script


def _spec_file(script: Script) -> str:
    """The spec, in a file for this job; only given values, without defaults."""
    given = plain_values(script.spec, defaults=False)
    return "\n".join(
        [
            "set -u",
            f"place={quoted(str(script.place))}",
            # In an array, SLURM_JOB_ID of one job is the number of the whole array, and a requeue
            # of that number ends and queues all of its jobs.
            'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
            if script.sweep
            else 'job="$SLURM_JOB_ID"',
            'spec="$place/spec-$SLURM_JOB_ID.yaml"',
            'rm -f "$spec"',
            "set -C # a link that is put there meanwhile is not followed",
            f"cat >\"$spec\" <<'{_END}' || exit",
            f"{dump_values(given).rstrip()}",
            _END,
            "set +C",
            "",
        ]
    )


def _surroundings(script: Script, asked: SlurmSpec) -> str:
    lines = list(asked.prolog)
    lines += [f"export {name}={quoted(value)}" for name, value in asked.env.items()]
    if not asked.gpus_per_node:
        lines.append("export EVENSTEP_DEVICE=cpu")
    lines.append(f"export EVENSTEP_STOP_SECONDS={stop_seconds(script, asked)}")
    lines.append('export EVENSTEP_EXIT_CODES="$place/codes-$SLURM_JOB_ID"')
    lines.append('rm -rf "$EVENSTEP_EXIT_CODES" && mkdir "$EVENSTEP_EXIT_CODES"')
    if isinstance(script.runs, Address) and asked.nodes > 1:
        lines += _SECRET
    return "\n".join([*lines, ""])


_SECRET = (
    'export EVENSTEP_SECRET_FILE="$place/secret-$SLURM_JOB_ID"',
    'rm -f "$EVENSTEP_SECRET_FILE"',
    '(umask 077 && set -C && head -c 32 /dev/urandom | base64 >"$EVENSTEP_SECRET_FILE") || exit',
)
"""The nodes share no runs directory in which the first one could leave a secret."""
_AGAIN = """\
# Until when this attempt may run, in seconds since 1970: without a limit, the year 2286.
ends=$(squeue --noheader --jobs="$job" --format=%e)
ends=$(date --date="${{ends:-no limit}}" +%s 2>/dev/null) || ends=9999999999
export EVENSTEP_ENDS="$ends"

again() {{
    [ "$stopped" = no ] || return
    echo "Ended with $code; queued again, to go on from the newest checkpoint."
    for _ in 1 2 3 4 5 6; do
        # scancel, a preemption or the loss of a node is ending the job already, or has queued it.
        case "$(squeue --noheader --jobs="$job" --format=%T)" in
        COMPLETING | PENDING) return ;;
        esac
        scontrol requeue "$job" && return
        sleep 10
    done
    echo "It could not be queued again: evenstep slurm submit goes on."
}}

again_if_allowed() {{
    failures="$place/failures-$job"
    [ ! -L "$failures" ] || rm -f "$failures"
    echo "$code" >>"$failures"
    [ "$(wc -l <"$failures")" -gt {restarts} ] || again
}}
"""

_END_OF_JOB = f"""\
step=$!
stopped=no
# TERM: the time is nearly up. A second one: it is up, and Slurm would not queue the job again.
# srun hands USR1 on to every task; a TERM would make it kill them.
trap 'kill -USR1 "$step" 2>/dev/null
    [ "$(date +%s)" -lt "$ends" ] || scontrol requeue "$job"' TERM
trap 'stopped=yes; kill -USR1 "$step" 2>/dev/null' USR2 # evenstep slurm cancel

while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
# srun tells the largest code of all tasks: that of one that lost a peer would hide the peer's.
for final in {WillFailAgain.exit_code} {SpecError.exit_code}; do
    grep -qsx "$final" "$EVENSTEP_EXIT_CODES"/* && code=$final
done

case $code in
0 | {WillFailAgain.exit_code} | {SpecError.exit_code}) ;; # done, or it would end so again
{Stopped.exit_code} | {PeerLost.exit_code}) again ;; # its state is saved, or a node is lost
*) again_if_allowed ;;
esac
exit "$code"
"""


def _settings(script: Script) -> str:
    """The settings of each job of an array, and the name of the run."""
    if not script.sweep:
        return f"name={script.spec.name}\nsettings=()\n"
    cases = [
        f"{number}) settings=({' '.join(map(quoted, settings))}) ;;"
        for number, settings in enumerate(script.sweep)
    ]
    lines = [f'name="{script.spec.name}-$SLURM_ARRAY_TASK_ID"']
    lines += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", ""]
    return "\n".join(lines)


def _step(script: Script, asked: SlurmSpec) -> str:
    """The command that trains, on every node."""
    start = ["srun", f"--nodes={asked.nodes}", "--ntasks-per-node=1", f"--wait={_APART_SECONDS}"]
    if asked.cpus is not None:  # srun does not inherit it from sbatch
        start.append(f"--cpus-per-task={asked.cpus}")
    if asked.nodes > 1:
        start.append("--label")
    words = [" ".join([*start, *_contained(script, asked)])]
    words.append(f'{asked.command} run "$spec" "${{settings[@]}}"')
    options = f'--name "$name" --runs {quoted(str(script.runs))}'
    if asked.processes != max(1, asked.gpus_per_node):
        options += f" --processes {asked.processes}"
    options = " ".join([options, *map(quoted, script.more)])
    return " \\\n    ".join([*words, options]) + " &"


def _contained(script: Script, asked: SlurmSpec) -> list[str]:
    """The options that run each task in a container."""
    container = asked.container
    if container is None:
        return []
    binds = [f"{script.shared}:{script.shared}"]
    binds += [
        f"{mount.source}:{mount.path}{':ro' if mount.read_only else ''}"
        for mount in container.mounts
    ]
    image, mounts = quoted(container.image), quoted(",".join(binds))
    if container.runtime == "pyxis":
        return [f"--container-image={image}", f"--container-mounts={mounts}"]
    gpus = ["--nv"] if asked.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", mounts, image]
