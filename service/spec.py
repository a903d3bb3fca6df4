"""What the user wants: one frozen, strict model of a job. `spec_file` reads one from a file.

No torch here: a spec is read, checked and printed on machines that have none.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.optimizer_options import OPTIMIZERS


class Part(BaseModel):
    """A section of a spec: an unknown key is an error, a wrong type is not converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _wrong(message: str) -> PydanticCustomError:
    """A fault in our own words, which pydantic reports beside its own."""
    return PydanticCustomError("evenstep", "{message}", {"message": message})


# Patterns, each with the words in which a message tells it.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
IMPORT_STRING = r"^[\w.]+:\w+$"
TEST_MEASURE = r"^test/\S+$"
PATTERNS_IN_WORDS = {
    RUN_NAME: "letters and digits, and after the first one . _ - too",
    IMPORT_STRING: "package.module:Class",
    TEST_MEASURE: "a measure of the test loop, such as test/accuracy",
}


class BatchSpec(Part):
    """How many rows one optimizer step takes, and in pieces of how many they are computed."""

    global_batch: Annotated[int, Field(ge=1)] | Literal["all"] = Field(examples=[128])
    """Rows of one optimizer step over all processes; `all` is the whole data set (full-batch)."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows of one forward pass. It decides the arithmetic, so it belongs to the experiment;
    the number of processes only decides who computes which. Default: 32, or less where the
    global batch is smaller."""

    @model_validator(mode="after")
    def _pieces_of_the_whole(self) -> Self:
        if isinstance(self.global_batch, int) and (self.micro_batch or 0) > self.global_batch:
            raise _wrong(
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
            has = "neither" if self.steps is None else "both"
            raise _wrong(f"must have epochs or steps, but has {has}")
        return self


class ModelSpec(Part):
    """How the model is run."""

    batchnorm: Literal["micro", "sync", "local"] = "micro"
    """`micro`: statistics of each micro-batch, running statistics equal at every number of
    processes. `sync`: statistics over all processes. `local`: each process keeps its own."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights stay in the model's own type."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Lay images out as NHWC, which convolutions on recent GPUs prefer."""
    moving_average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999."""


class OptimizerSpec(Part):
    """What every optimizer has; each one's own options stand beside `lr`."""

    name: str = Field(examples=["sgd"])
    """An optimizer of torch.optim by its own name, or `package.module:Class`."""
    lr: Annotated[float, Field(ge=0, examples=[0.1])]
    """The base learning rate, before the schedule's multiplier."""
    no_decay: tuple[Literal["norm", "bias"], ...] = Field(default=(), strict=False)
    """Parameters that get no weight decay: `norm` layers' and `bias` terms."""
    groups: tuple[Any, ...] = ()
    """Settings for parameters by their names; the first matching glob wins."""

    def options(self) -> dict[str, Any]:
        """The options the user gave, without the name, the groups and the shorthand."""
        return _given(self, without={"name", "groups", "no_decay"})


class GroupSpec(Part):
    """Settings for the parameters whose names match a pattern; the first match wins."""

    match: Annotated[str, Field(examples=["base.*"])]
    """A glob over parameter names, such as `base.*`."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """This group's base learning rate."""
    freeze: bool = False
    """Leave these parameters as they are."""

    def options(self) -> dict[str, Any]:
        """The options the user gave for this group."""
        return _given(self, without={"match", "freeze"})


def _given(part: Part, *, without: set[str]) -> dict[str, Any]:
    """What was set; null is the default, but a custom optimizer may mean something by it."""
    given = part.model_dump(exclude=without, exclude_unset=True)
    extra = part.model_extra or {}
    return {key: value for key, value in given.items() if value is not None or key in extra}


def _optional(kind: Any) -> Any:
    if get_args(kind):  # a pair: YAML has lists only
        kind = Annotated[kind, Strict(False)]
    return (kind | None, None)


def _optimizer_part(name: str) -> Any:
    title = OPTIMIZERS[name].torch_name
    options: dict[str, Any] = {k: _optional(v) for k, v in OPTIMIZERS[name].options.items()}
    group: Any = create_model(
        f"{title}Group", __base__=GroupSpec, __doc__=GroupSpec.__doc__, **options
    )
    fixed: dict[str, Any] = {
        "name": (Literal[name], _like("name", ...)),
        "groups": (tuple[group, ...], _like("groups", ())),
    }
    return create_model(
        title, __base__=OptimizerSpec, __doc__=f"torch.optim.{title}.", **fixed, **options
    )


def _like(key: str, default: Any) -> Any:
    """The field of every optimizer with its words, for one whose type is narrower."""
    of_all = OptimizerSpec.model_fields[key]
    strict = None if default is ... else False
    return Field(default, strict=strict, description=of_all.description, examples=of_all.examples)


class CustomGroupSpec(GroupSpec):
    """A group of an optimizer that is not torch's own; its options are checked when it is made."""

    model_config = ConfigDict(extra="allow")


class CustomOptimizerSpec(OptimizerSpec):
    """Any optimizer by import string; its options are checked against its signature when made."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=IMPORT_STRING)]
    """The optimizer's class, as `package.module:Class`."""
    groups: tuple[CustomGroupSpec, ...] = Field(default=(), strict=False)
    """Settings for parameters by their names; the first matching glob wins."""


CUSTOM = "package.module:Class"


def _optimizer_tag(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and ":" in name:
        return CUSTOM
    return name if isinstance(name, str) else None


_Optimizers: Any = Annotated[CustomOptimizerSpec, Tag(CUSTOM)]  # torch's own join it below
for _name in OPTIMIZERS:
    _Optimizers = _Optimizers | Annotated[_optimizer_part(_name), Tag(_name)]


class ScheduleSpec(Part):
    """Learning-rate multiplier over the run. Durations: give steps, epochs or a fraction."""

    name: str
    """The shape after the warmup."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the rate rises linearly from nearly zero."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """The same in epochs."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a fraction of the run."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        names = ("warmup_steps", "warmup_epochs", "warmup_fraction")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise _wrong(f"must have one warmup, but has {' and '.join(given)}")
        return self


class ConstantSpec(ScheduleSpec):
    """The base rate throughout."""

    name: Literal["constant"] = "constant"
    """The shape after the warmup."""


class LinearSpec(ScheduleSpec):
    """Down a straight line to `final`."""

    name: Literal["linear"]
    """The shape after the warmup."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class CosineSpec(ScheduleSpec):
    """Down half a cosine to `final`."""

    name: Literal["cosine"]
    """The shape after the warmup."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


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


class CheckpointSpec(Part):
    """When a checkpoint is written; one is always written at the end and when stopped."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Write one after every so many optimizer steps."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    keep: Annotated[int, Field(ge=1)] = 3
    """How many of the newest are kept; the best one is kept besides."""
    best: BestSpec | None = None
    """Which checkpoint to keep besides the newest ones."""

    _one_interval = model_validator(mode="after")(lambda self: _at_most_one_interval(self))


def _at_most_one_interval(part: TestSpec | CheckpointSpec) -> TestSpec | CheckpointSpec:
    if part.every_steps is not None and part.every_epochs is not None:
        raise _wrong("must have every_steps or every_epochs, but has both")
    return part


class LoaderSpec(Part):
    """How rows are read."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Reading processes beside each training process; 0 reads in place."""
    stream: Literal["whole", "split"] = "whole"
    """Of data that can only be iterated: every process reads all of it, and the run does not
    depend on their number; or each reads its own part, and it does."""
    prefetch: Annotated[int, Field(ge=1)] = 2
    """Steps each worker reads ahead."""


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


class TrackingSpec(Part):
    """What is recorded and how often."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps from one line of the record to the next."""
    wandb: WandBSpec | None = None
    """Show the run in Weights & Biases as well."""


class FaultsSpec(Part):
    """What happens when something goes wrong."""

    hang_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A process that stands still longer than this is reported and ended."""
    startup_timeout_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """The same before the first step, which may load data and compile."""
    stop_poll_steps: Annotated[int, Field(ge=1)] = 10
    """The processes agree at least this often whether one of them was asked to stop."""
    stop_budget_seconds: Annotated[float, Field(gt=0)] = 120.0
    """What a request to stop may take, the last save included; then the launcher kills."""
    attempts_without_progress: Annotated[int, Field(ge=1)] = 3
    """Give up, with exit code 42, after so many failures in a row without a new checkpoint."""


class Spec(Part):
    """A training job."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=63, examples=["digits"])]
    """Names the run and its directory."""
    task: Annotated[str, Field(examples=["./my_task.py:task"])]
    """`package.module:name` or `./file.py:name`: what is trained."""
    task_args: dict[str, Any] = {}
    """Arguments of the task, when it is a function."""
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
    optimizer: Annotated[_Optimizers, Discriminator(_optimizer_tag)] = Field(
        examples=[{"name": "sgd", "lr": 0.1}]
    )
    """What turns gradients into weights."""
    schedule: Annotated[ConstantSpec | LinearSpec | CosineSpec, Field(discriminator="name")] = (
        ConstantSpec()
    )
    """Learning-rate multiplier over the run."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients longer than this, over all parameters, are scaled down to it."""
    test: TestSpec = TestSpec()
    """When and how the test loop runs."""
    checkpoint: CheckpointSpec = CheckpointSpec()
    """When a checkpoint is written, and how many are kept."""
    loader: LoaderSpec = LoaderSpec()
    """How rows are read."""
    tracking: TrackingSpec = TrackingSpec()
    """What is recorded and how often."""
    faults: FaultsSpec = FaultsSpec()
    """What happens when something goes wrong."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _any_case(cls, optimizer: Any) -> Any:
        name = optimizer.get("name") if isinstance(optimizer, dict) else None
        if isinstance(name, str) and ":" not in name:
            return {**optimizer, "name": name.lower()}
        return optimizer

    @field_validator("schedule", mode="before")
    @classmethod
    def _constant_unless_named(cls, schedule: Any) -> Any:
        return {"name": "constant", **schedule} if isinstance(schedule, dict) else schedule

    @field_validator("task")
    @classmethod
    def _names_a_task(cls, task: str) -> str:
        where, _, name = task.rpartition(":")
        is_file, is_module = where.endswith(".py"), all(map(str.isidentifier, where.split(".")))
        if not (name.isidentifier() and (is_file or is_module)):
            raise _wrong(f"must be package.module:name or ./file.py:name, but is {task!r}")
        return task
