"""The section `slurm:`: the resources of a Slurm job, and the start of its script."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.spec.part import (
    SBATCH_OPTION,
    SLURM_CONSTRAINT,
    SLURM_IMAGE,
    SLURM_MEMORY,
    SLURM_NAME,
    SLURM_PATH,
    SLURM_TIME,
    VARIABLE,
    WORD_OF_A_SHELL,
    Part,
    wrong,
)

Name = Annotated[str, Field(pattern=SLURM_NAME)]
OWN_OPTIONS = {
    "job-name": "name",
    "output": "--runs",
    "error": "--runs",
    "open-mode": "--runs",
    "signal": "slurm.stop_seconds",
    "requeue": "slurm.restarts",
    "no-requeue": "slurm.restarts",
    "array": "--sweep",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.nodes",
    "ntasks-per-node": "slurm.nodes",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus": "slurm.gpus_per_node",
    "gres": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus",
    "mem": "slurm.memory",
    "time": "slurm.time",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "constraint": "slurm.constraint",
}
"""Options of sbatch that the script sets itself, and the keys that control them."""


class SlurmMountSpec(Part):
    """A directory or file of the nodes that is mounted in the container."""

    source: Annotated[str, Field(pattern=SLURM_PATH, examples=["/shared/data"])]
    """The path on the nodes."""
    path: Annotated[str, Field(pattern=SLURM_PATH, examples=["/data"])]
    """The path in the container."""
    read_only: bool = True
    """Whether it is read-only."""


class SlurmContainerSpec(Part):
    """The container in which each task runs."""

    image: Annotated[str, Field(pattern=SLURM_IMAGE, examples=["/shared/evenstep.sqsh"])]
    """A file, or a name that the runtime can pull."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """The runtime: NVIDIA's plugin for srun with enroot (pyxis), or apptainer."""
    mounts: tuple[SlurmMountSpec, ...] = Field(default=(), strict=False)
    """Mounts from the nodes, besides the runs."""


class SlurmSpec(Part):
    """The resources of a Slurm job, and the start of its script; it never changes the result."""

    partition: Name | None = None
    """The partition, or several with commas. Default: the cluster's default."""
    account: Name | None = None
    """The account that is charged."""
    qos: Name | None = None
    """The quality of service."""
    constraint: Annotated[str, Field(pattern=SLURM_CONSTRAINT, examples=["a100"])] | None = None
    """Features that the nodes must have, such as `a100&ib`."""
    time: Annotated[str, Field(pattern=SLURM_TIME, examples=["24:00:00"])] | None = None
    """The time limit of one attempt, as HH:MM:SS or D-HH:MM:SS; a longer run continues in the
    next attempt. Default: that of the partition."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Nodes that train together."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs of each node; with 0 it trains on the CPU."""
    gpu_type: Name | None = None
    """Slurm's name for the type of GPU, such as `a100`. Default: any."""
    processes_per_node: Annotated[int, Field(ge=1)] | None = None
    """Training processes on each node. Default: one for each GPU, or one without GPUs."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores of each node. Default: Slurm's default."""
    memory: Annotated[str, Field(pattern=SLURM_MEMORY, examples=["64G"])] | None = None
    """Memory of each node, such as 64G; `0` is all of it. Default: that of the partition."""
    options: tuple[Annotated[str, Field(pattern=SBATCH_OPTION)], ...] = Field(
        default=(), strict=False, examples=[["--exclusive"]]
    )
    """Additional options of sbatch, such as `--exclusive` or `--mail-type=FAIL`."""
    prolog: tuple[str, ...] = Field(default=(), strict=False, examples=[["module load cuda/12.4"]])
    """Lines of shell at the start of the script, on the first node, such as `module load cuda`."""
    env: dict[Annotated[str, Field(pattern=VARIABLE)], str] = Field(default={})
    """Additional environment variables."""
    command: Annotated[str, Field(pattern=WORD_OF_A_SHELL)] = "evenstep"
    """The command on the nodes: a path if it is not on PATH, or in the container."""
    container: SlurmContainerSpec | None = None
    """The container in which each task runs. Default: none."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often an attempt may crash by itself before the job has failed."""
    stop_seconds: Annotated[int, Field(ge=30)] | Literal["auto"] = "auto"
    """How long before its limit an attempt is asked to save and stop. `auto`: determined from
    the measured saves of this run, and 150 s before the first measurement."""

    @property
    def processes(self) -> int:
        """Training processes of each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def seconds(self) -> int | None:
        """The limit of one attempt."""
        if self.time is None:
            return None
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @field_validator("options")
    @classmethod
    def _none_of_our_own(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = option.removeprefix("--").partition("=")[0]
            if name in OWN_OPTIONS:
                raise wrong(f"--{name} is set by {OWN_OPTIONS[name]}: do not set it here")
        return options

    @field_validator("prolog")
    @classmethod
    def _whole_lines(cls, prolog: tuple[str, ...]) -> tuple[str, ...]:
        for line in prolog:
            if not line.strip() or not line.isprintable():
                raise wrong(f"must be lines of shell, one in each item, but has {line!r}")
        return prolog

    @field_validator("env")
    @classmethod
    def _on_one_line(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if not value.isprintable():
                raise wrong(f"must be text on one line, but {name} is {value!r}")
        return env

    @model_validator(mode="after")
    def _time_to_train(self) -> Self:
        limit, stop = self.seconds, self.stop_seconds
        if limit is not None and stop != "auto" and stop >= limit:
            raise wrong(
                f"stop_seconds ({stop}) must be less than time ({self.time}), which includes it"
            )
        return self
