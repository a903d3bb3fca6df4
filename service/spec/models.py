"""The spec: what the user wants, as frozen and strict models. `files` reads one from a file.

No torch here: a spec is read, checked and printed on machines that have none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, field_validator, model_validator

from service.spec.kubernetes import KubernetesSpec
from service.spec.optimizer import Optimizers
from service.spec.part import RUN_NAME, TEST_MEASURE, Part, tag_by_name, wrong
from service.spec.schedule import ConstantSpec, Schedules


class BatchSpec(Part):
    """How many rows one optimizer step takes, and in pieces of how many they are computed."""

    global_batch: Annotated[int, Field(ge=1)] | Literal["all"] = Field(examples=[128])
    """Rows of one optimizer step over all processes; `all` is the whole data set (full-batch)."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows of one forward pass. It decides the arithmetic, so it belongs to the experiment;
    the number of processes only decides who computes which. Default: 32, or less where the
    global batch is smaller. `auto`: the most that fit in memory when the run is begun; its own
    spec.yaml has the number, and it stays so."""

    @model_validator(mode="after")
    def _pieces_of_the_whole(self) -> Self:
        micro_batch = self.micro_batch if isinstance(self.micro_batch, int) else 0
        if isinstance(self.global_batch, int) and micro_batch > self.global_batch:
            raise wrong(
                f"micro_batch must be at most global_batch ({self.global_batch}), "
                f"but is {self.micro_batch}"
            )
        return self


class LengthSpec(Part):
    """How long to train: give `epochs` or `steps`."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; a fraction is fine."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            if self.steps is None:
                raise wrong("must have epochs or steps, but has neither")
            raise wrong(
                "must have epochs or steps, but has both; empty one, such as by length.epochs="
            )
        return self


class ActivationCheckpointingSpec(Part):
    """Which modules compute their activations again in the backward pass, to keep fewer of them."""

    match: Annotated[str, Field(min_length=1, examples=["blocks.*"])]
    """A glob over the names of modules, such as `blocks.*`. Of modules inside one another the
    outermost counts. The result has the same bits as without."""


class ModelSpec(Part):
    """How the model is run."""

    batchnorm: Literal["micro", "sync", "local"] = "micro"
    """`micro`: statistics of each micro-batch, running statistics equal at every number of
    processes. `sync`: statistics over all processes. `local`: each process keeps its own."""
    buffers: Literal["mean", "sum", "first", "local"] = "mean"
    """What buffers that move in training, besides BatchNorm's, become after a step: the `mean` over
    its micro-batches, the `sum` of their changes, what its `first` one leaves; each process's own
    with `local`."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights stay in the model's own type."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Lay images out as NHWC, which convolutions on recent GPUs prefer."""
    moving_average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999."""
    activation_checkpointing: ActivationCheckpointingSpec | None = None
    """Keep less for the backward pass, and compute it a second time there."""


class TestSpec(Part):
    """When and how the test loop runs; it always runs at the end."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Test after every so many optimizer steps."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    micro_batch: Annotated[int, Field(ge=1)] = 256
    """Rows of one forward pass of the test loop."""

    _one_interval = model_validator(mode="after")(lambda self: _at_most_one_interval(self))


class BestSpec(Part):
    """Which test measure says that a checkpoint is the best."""

    measure: Annotated[str, Field(pattern=TEST_MEASURE, examples=["test/accuracy"])]
    """A key of the metrics, such as `test/accuracy`."""
    mode: Annotated[Literal["max", "min"], Field(examples=["max"])]
    """Whether more of it is better, or less."""


class EarlyStoppingSpec(BestSpec):
    """Ends the run, as done, when a test measure has stopped improving."""

    patience: Annotated[int, Field(ge=1, examples=[5])]
    """Tests in a row without improvement that it takes."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Improvement that is too small to count, in the measure's own unit."""


class CheckpointSpec(Part):
    """When a checkpoint is written; one is always written at the end and when stopped."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Write one after every so many optimizer steps."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    keep: Annotated[int, Field(ge=1)] = 3
    """How many of the newest are kept; the best one is kept besides."""
    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Besides the newest ones, keep for good the first at or after each so many steps."""
    best: BestSpec | None = None
    """Which checkpoint to keep besides the newest ones."""
    rename: dict[str, str] = Field(default={})
    """Old names of parameters and modules, and what the model calls them now."""
    asynchronous: bool = True
    """Hold training only while the state is copied, and write it beside the steps that follow.
    It takes main memory for one more copy of weights and optimizer state on the first node."""
    on_failure: Literal["stop", "go_on"] = "stop"
    """What follows when one cannot be written, such as on a full disk. The last one of a run
    must succeed either way."""

    _one_interval = model_validator(mode="after")(lambda self: _at_most_one_interval(self))


def _at_most_one_interval(part: TestSpec | CheckpointSpec) -> TestSpec | CheckpointSpec:
    if part.every_steps is not None and part.every_epochs is not None:
        raise wrong("must have every_steps or every_epochs, but has both")
    return part


class ExchangeSpec(Part):
    """How several processes add up their gradients; one process has nobody to exchange with."""

    precision: Literal["full", "bf16"] = "full"
    """What gradients travel in. `bf16` halves the bytes and rounds each gradient and sum to 8 bits,
    so the result then depends on the number of processes."""
    bucket_mib: Annotated[int, Field(ge=1)] = 25
    """Gradients leave as soon as so many MiB of them are there, beside the backward pass."""
    static_graph: bool = False
    """Promise that every step trains the same parameters in the same order, which then is not
    looked up in each of them."""


class LoaderSpec(Part):
    """How rows are read."""

    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Reading processes beside each training process; 0 reads in place. `auto`: as many as the
    cores that the container gives each training process, without the one that trains."""
    stream: Literal["whole", "split"] = "whole"
    """Of data that can only be iterated: every process reads all of it, and the run does not
    depend on their number; or each reads its own part, and it does."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Steps each worker reads ahead."""
    in_memory: bool = False
    """Read every row once, at the start, and pick them from memory by their index from then on:
    for rows that are the same each time they are read, and fit."""


class WandBSpec(Part):
    """Where Weights & Biases shows the run."""

    project: Annotated[str, Field(examples=["digits"])]
    """The project the run belongs to."""
    entity: str | None = None
    """The user or team that owns the project. Default: the key's own."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where a key is set, and offline otherwise."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: tuple[str, ...] = Field(default=(), strict=False)
    """Words to find the run by."""
    finish_seconds: Annotated[float, Field(gt=0)] = 30.0
    """How long the end of a run may wait for W&B to take what it lacks."""
    artifacts: Literal["none", "reference"] = "none"
    """`reference`: at the end, tell where the newest and the best checkpoint lie. Nothing of them
    is uploaded or copied."""


class TrackioSpec(Part):
    """Where trackio shows the run."""

    project: Annotated[str, Field(examples=["digits"])]
    """The project the run belongs to."""
    space: str | None = None
    """A Hugging Face Space, as `user/name`. Default: this machine, for `trackio show`."""


class TrackingSpec(Part):
    """What is recorded and how often."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps from one line of the record to the next."""
    wandb: WandBSpec | None = None
    """Show the run in Weights & Biases as well."""
    tensorboard: bool = False
    """Write an event file for TensorBoard into the run's directory as well."""
    trackio: TrackioSpec | None = None
    """Show the run in trackio as well."""


class FaultsSpec(Part):
    """What happens when something goes wrong."""

    hang_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A process that stands still longer than this is reported and ended."""
    startup_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """The same before the first step, which may load data and compile."""
    stop_poll_steps: Annotated[int, Field(ge=1)] = 50
    """The processes agree at least this often whether one of them was asked to stop."""
    stop_budget_seconds: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """What a request to stop may take, the last save included; then the launcher kills. `auto`:
    120 s, or more where the saves of this run take longer."""
    attempts_without_progress: Annotated[int, Field(ge=1)] = 3
    """Give up, with exit code 42, after so many failures in a row without a new checkpoint."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or leave out that step."""
    skips_allowed: Annotated[int, Field(ge=0)] = 10
    """With `skip`, how many steps of the run may be left out before it ends."""


class Spec(Part):
    """A training job."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=63, examples=["digits"])]
    """Names the run and its directory."""
    task: Annotated[str, Field(examples=["./my_task.py:task"])]
    """`package.module:name` or `./file.py:name`: what is trained."""
    task_args: dict[str, Any] = Field(default={})
    """Arguments of the task, when it is a function. What begins with `./` or `../` is a path
    relative to the spec's directory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run follows from it."""
    exactness: Literal["rounding", "bitwise"] = "rounding"
    """How equal a run is at another number of processes: up to rounding, or to the bit. Bitwise
    computes each micro-batch alone and sums in a fixed order, at 1, 2, 4, 8, ... processes."""
    batch: BatchSpec = Field(examples=[{"global_batch": 128}])
    """How many rows one optimizer step takes."""
    length: LengthSpec = Field(examples=[{"epochs": 10}])
    """How long to train."""
    model: ModelSpec = ModelSpec()
    """How the model is run."""
    optimizer: Annotated[Optimizers, Discriminator(tag_by_name)] = Field(
        examples=[{"name": "sgd", "lr": 0.1}]
    )
    """What turns gradients into weights."""
    schedule: Annotated[Schedules, Discriminator(tag_by_name)] = ConstantSpec()
    """Learning-rate multiplier over the run."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients longer than this, over all parameters, are scaled down to it."""
    max_grad_value: Annotated[float, Field(gt=0)] | None = None
    """Every number of a gradient is cut to at most this, up and down; before `max_grad_norm`."""
    test: TestSpec = TestSpec()
    """When and how the test loop runs."""
    early_stopping: EarlyStoppingSpec | None = None
    """End the run when a test measure has stopped improving."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When a checkpoint is written, and how many are kept."""
    loader: LoaderSpec = LoaderSpec()
    """How rows are read."""
    exchange: ExchangeSpec = ExchangeSpec()
    """How several processes add up their gradients."""
    tracking: TrackingSpec = TrackingSpec()
    """What is recorded and how often."""
    faults: FaultsSpec = FaultsSpec()
    """What happens when something goes wrong."""
    kubernetes: KubernetesSpec | None = None
    """Where and with what the job runs on a cluster."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _any_case(cls, optimizer: Any) -> Any:
        if not isinstance(optimizer, dict):
            return optimizer
        name = optimizer.get("name")
        if isinstance(name, str) and ":" not in name:
            optimizer = {**optimizer, "name": name.lower()}
        if "companion" in optimizer:
            optimizer = {**optimizer, "companion": cls._any_case(optimizer["companion"])}
        return optimizer

    @field_validator("schedule", mode="before")
    @classmethod
    def _constant_unless_named(cls, schedule: Any) -> Any:
        return {"name": "constant", **schedule} if isinstance(schedule, dict) else schedule

    @model_validator(mode="after")
    def _whole_to_the_bit(self) -> Self:
        if self.exactness == "bitwise" and self.exchange != ExchangeSpec():
            raise wrong(
                "exactness: bitwise adds gradients in an order and a way of its own: "
                "leave exchange out"
            )
        return self

    @model_validator(mode="after")
    def _tests_in_time(self) -> Self:
        waiting = "early_stopping" if self.early_stopping else None
        waiting = waiting or ("schedule plateau" if self.schedule.name == "plateau" else None)
        if waiting and self.test.every_steps is None and self.test.every_epochs is None:
            raise wrong(f"{waiting} waits for tests: add test.every_epochs or test.every_steps")
        return self

    @field_validator("task")
    @classmethod
    def _names_a_task(cls, task: str) -> str:
        where, _, name = task.rpartition(":")
        is_file, is_module = where.endswith(".py"), all(map(str.isidentifier, where.split(".")))
        if not (name.isidentifier() and (is_file or is_module)):
            raise wrong(f"must be package.module:name or ./file.py:name, but is {task!r}")
        return task
