"""The spec: what the user wants, as frozen and strict models. `files` reads one from a file.

No torch here: a spec is read, checked and printed on machines that have none.
"""

from __future__ import annotations

import math
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.spec.optimizer_options import OPTIMIZERS

MOST = 10**15
"""What any count in a spec may be at most: it stays exact, and sums of them do."""


class Part(BaseModel):
    """A section of a spec: an unknown key is an error, a wrong type is not converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_counted(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        counts = type(value) is int or (type(value) is float and name.endswith("epochs"))
        if counts and name != "seed" and MOST < value < math.inf:
            raise _wrong(f"must be at most {MOST:.0e}")
        return value


def _wrong(message: str) -> PydanticCustomError:
    """A fault in our own words, which pydantic reports beside its own."""
    return PydanticCustomError("evenstep", "{message}", {"message": message})


UNITS = ("steps", "epochs", "fraction")
"""What a duration of a schedule may be given in: `warmup_steps`, `warmup_epochs`, ..."""

# Patterns, each with the words in which a message tells it.
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
IMPORT_STRING = r"^[\w.]+:\w+$"
TEST_MEASURE = r"^test/\S+$"
QUANTITY = r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
ABSOLUTE_PATH = r"^/[^\s:]+$"
IMAGE = r"^[a-z0-9][a-z0-9.-]*(:\d+)?(/[a-z0-9._-]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
DEVICE = r"^(cpu|[a-z0-9][a-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9._-]*)$"
LABEL = r"^([a-z0-9][a-z0-9.-]*/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
LABEL_VALUE = r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
PATTERNS_IN_WORDS = {
    RUN_NAME: "letters and digits, and after the first one . _ - too",
    IMPORT_STRING: "package.module:Class",
    TEST_MEASURE: "a measure of the test loop, such as test/accuracy",
    QUANTITY: "a quantity of Kubernetes, such as 500m, 4 or 16Gi",
    DNS_LABEL: "a DNS label: up to 63 lower-case letters, digits and -",
    DNS_NAME: "a name of Kubernetes: lower-case letters, digits, - and .",
    ABSOLUTE_PATH: "an absolute path without spaces and :",
    IMAGE: "a container image, such as registry.example.com/team/evenstep:0.1.0",
    DEVICE: "cpu, or a device as the cluster calls it, such as nvidia.com/gpu",
    LABEL: "the key of a Kubernetes label, such as topology.kubernetes.io/zone",
    LABEL_VALUE: "the value of a Kubernetes label: up to 63 letters, digits, ., _ and -",
    VARIABLE: "the name of an environment variable",
}


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
            if self.steps is None:
                raise _wrong("must have epochs or steps, but has neither")
            raise _wrong(
                "must have epochs or steps, but has both; empty one, such as by length.epochs="
            )
        return self


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


class OptimizerSpec(Part):
    """What every optimizer has; each one's own options stand beside `lr`."""

    name: str = Field(examples=["sgd"])
    """An optimizer of torch.optim by its own name, or `package.module:Class`."""
    lr: Annotated[float, Field(ge=0, examples=[0.1])]
    """The base learning rate, before the schedule's multiplier."""
    no_decay: tuple[Literal["norm", "bias"], ...] = Field(default=(), strict=False)
    """Parameters that get no weight decay: `norm` layers' and `bias` terms."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer's rate is this many times that of the layer after it; the last has it whole."""
    groups: tuple[Any, ...] = ()
    """Settings for parameters by their names; the first matching glob wins."""

    def options(self) -> dict[str, Any]:
        """The options of the optimizer itself that the user gave."""
        of_ours = {*OptimizerSpec.model_fields, "companion", "companion_takes"} - {"lr"}
        return _given(self, without=of_ours)


class GroupSpec(Part):
    """Settings for the parameters whose names match a pattern; the first match wins."""

    match: Annotated[str, Field(examples=["base.*"])]
    """A glob over parameter names, such as `base.*`."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """This group's base learning rate."""
    freeze: bool = False
    """Leave these parameters as they are."""
    unfreeze_at_step: Annotated[int, Field(ge=1)] | None = None
    """Leave them as they are for so many optimizer steps, and train them from then on."""

    def options(self) -> dict[str, Any]:
        """The options of the optimizer that the user gave for this group."""
        return _given(self, without={"match", "freeze", "unfreeze_at_step"})


def _given(part: Part, *, without: set[str]) -> dict[str, Any]:
    """What was set; null is the default, but a custom optimizer may mean something by it."""
    given = part.model_dump(exclude=without, exclude_unset=True)
    extra = part.model_extra or {}
    return {key: value for key, value in given.items() if value is not None or key in extra}


def _optional(kind: Any) -> Any:
    if get_args(kind):  # a pair: YAML has lists only
        kind = Annotated[kind, Strict(False)]
    return (kind | None, None)


def _optimizer_part(name: str, **more: Any) -> Any:
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
        title, __base__=OptimizerSpec, __doc__=f"torch.optim.{title}.", **fixed, **options, **more
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


def _tag_by_name(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    if isinstance(name, str) and ":" in name:
        return CUSTOM
    return name if isinstance(name, str) else None


# Those that can train some kinds of parameter only; a companion trains the others.
PICKY = ("muon", "sparseadam")

_Optimizers: Any = Annotated[CustomOptimizerSpec, Tag(CUSTOM)]  # torch's own join it below
for _name in [name for name in OPTIMIZERS if name not in PICKY]:
    _Optimizers = _Optimizers | Annotated[_optimizer_part(_name), Tag(_name)]
_companion: dict[str, Any] = {
    "companion": (
        Annotated[_Optimizers, Discriminator(_tag_by_name)],
        Field(
            None,
            description="The optimizer of the parameters that this one cannot train.",
            examples=[{"name": "adamw", "lr": 0.001}],
        ),
    ),
    "companion_takes": (
        tuple[str, ...],
        Field(
            (),
            strict=False,
            description="Globs over the names of parameters that the companion trains all the same",
        ),
    ),
}
for _name in PICKY:
    _Optimizers = _Optimizers | Annotated[_optimizer_part(_name, **_companion), Tag(_name)]


class ScheduleSpec(Part):
    """Learning-rate multiplier over the run. Durations: give steps, epochs or a fraction."""

    needed: ClassVar[tuple[str, ...]] = ()
    """Durations without a default."""

    name: str
    """The shape after the warmup."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the rate rises linearly from nearly zero."""
    warmup_epochs: Annotated[float, Field(ge=0)] | None = None
    """The same in epochs."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """The same as a fraction of the run."""

    @model_validator(mode="after")
    def _each_duration_once(self) -> Self:
        fields = type(self).model_fields
        for word in [name.removesuffix("_steps") for name in fields if name.endswith("_steps")]:
            names = [name for unit in UNITS if (name := f"{word}_{unit}") in fields]
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) > 1:
                raise _wrong(f"must have one {word}, but has {' and '.join(given)}")
            if not given and word in self.needed:
                raise _wrong(f"must have {names[0]}, {names[1]} or {names[2]}, but has none")
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


class CosineRestartsSpec(ScheduleSpec):
    """Down half a cosine to `final`, again and again."""

    needed = ("cycle",)
    name: Literal["cosine_restarts"]
    """The shape after the warmup."""
    cycle_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the first cycle."""
    cycle_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    cycle_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""
    growth: Annotated[int, Field(ge=1)] = 1
    """Each cycle is this many times as long as the one before."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end of each cycle."""


class PolynomialSpec(ScheduleSpec):
    """Down to `final` along (1 - progress) to a power."""

    name: Literal["polynomial"]
    """The shape after the warmup."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """1 is a straight line; more falls faster at first."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class _EverySpec(ScheduleSpec):
    """What happens again and again."""

    gamma: Annotated[float, Field(gt=0, le=1, examples=[0.1])]
    """What the rate is multiplied by each time."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Time from one multiplication to the next."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    every_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""


class ExponentialSpec(_EverySpec):
    """Times `gamma` over each stretch, smoothly, from the end of the warmup on."""

    needed = ("every",)
    name: Literal["exponential"]
    """The shape after the warmup."""


class StepSpec(_EverySpec):
    """Times `gamma` at the end of each stretch, counted from the beginning of the run."""

    needed = ("every",)
    name: Literal["step"]
    """The shape after the warmup."""


class MultiStepSpec(ScheduleSpec):
    """Times `gamma` at each of several moments, counted from the beginning of the run."""

    needed = ("at",)
    name: Literal["multi_step"]
    """The shape after the warmup."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What the rate is multiplied by each time."""
    at_steps: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, strict=False)
    """After how many optimizer steps."""
    at_epochs: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, strict=False)
    """The same in epochs."""
    at_fraction: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        default=None, strict=False
    )
    """The same as fractions of the run."""


class OneCycleSpec(ScheduleSpec):
    """Up from `start` to the whole rate, and down from there to `final`."""

    name: Literal["one_cycle"]
    """The shape after the warmup."""
    rise_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the way up. Default: 0.3 of the run."""
    rise_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    rise_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same as a fraction of the run."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Multiplier at the first step."""
    final: Annotated[float, Field(ge=0, le=1)] = 4e-6
    """Multiplier at the last step."""
    shape: Literal["cosine", "linear"] = "cosine"
    """How both ways are bent."""


class InverseSqrtSpec(ScheduleSpec):
    """Down as one over the root of the steps taken; the warmup's length sets the scale."""

    name: Literal["inverse_sqrt"]
    """The shape after the warmup."""
    timescale_steps: Annotated[int, Field(ge=1)] | None = None
    """Three times this long after the warmup, the rate is half. Default: the warmup, or 1 step."""
    timescale_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    timescale_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""


class WarmupStableDecaySpec(ScheduleSpec):
    """The whole rate until shortly before the end, then down to `final`."""

    name: Literal["warmup_stable_decay"]
    """The shape after the warmup."""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the way down. Default: 0.2 of the run."""
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How the way down is bent; `sqrt` is 1 - sqrt(progress)."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class PlateauSpec(ScheduleSpec):
    """Times `gamma` whenever a test measure has stopped improving."""

    name: Literal["plateau"]
    """The shape after the warmup."""
    measure: Annotated[str, Field(pattern=TEST_MEASURE, examples=["test/loss"])]
    """A key of the metrics, such as `test/loss`."""
    mode: Annotated[Literal["max", "min"], Field(examples=["min"])]
    """Whether more of it is better, or less."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """What the rate is multiplied by each time."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Tests in a row without improvement that it takes."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Improvement that is too small to count, in the measure's own unit."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Tests after each time that are not counted."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier below which it never goes."""


class CustomScheduleSpec(ScheduleSpec):
    """Any of torch.optim.lr_scheduler, or a function of an optimizer that makes one."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=IMPORT_STRING)]
    """The scheduler's class, as `package.module:Class`; its options stand beside it."""

    def options(self) -> dict[str, Any]:
        """The scheduler's own options."""
        return dict(self.model_extra or {})


SCHEDULES: tuple[type[ScheduleSpec], ...] = (
    ConstantSpec,
    LinearSpec,
    CosineSpec,
    CosineRestartsSpec,
    PolynomialSpec,
    ExponentialSpec,
    StepSpec,
    MultiStepSpec,
    OneCycleSpec,
    InverseSqrtSpec,
    WarmupStableDecaySpec,
    PlateauSpec,
)
_Schedules: Any = Annotated[CustomScheduleSpec, Tag(CUSTOM)]
for _schedule in SCHEDULES:
    _Schedules = (
        _Schedules
        | Annotated[_schedule, Tag(get_args(_schedule.model_fields["name"].annotation)[0])]
    )


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
    rename: dict[str, str] = {}
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
        raise _wrong("must have every_steps or every_epochs, but has both")
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


Quantity = Annotated[str, Field(pattern=QUANTITY)]
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
DnsName = Annotated[str, Field(pattern=DNS_NAME)]


class TolerationSpec(Part):
    """A taint of cluster nodes that the pods put up with."""

    key: str | None = None
    """The taint's key; without one, every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    """Whether the taint's value matters."""
    value: str | None = None
    """The taint's value, where it does."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; without one, every effect."""

    @model_validator(mode="after")
    def _value_where_it_matters(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise _wrong("must have operator: Equal, or no value, but Exists has a value")
        if self.operator == "Equal" and self.key is None:
            raise _wrong("must have a key, whose value is equal, but has none")
        return self


class MountSpec(Part):
    """Something of the namespace that the pods see as files: give claim, secret or config_map."""

    path: Annotated[str, Field(pattern=ABSOLUTE_PATH, examples=["/data"])]
    """Where it is seen."""
    claim: DnsName | None = None
    """A PersistentVolumeClaim."""
    secret: DnsName | None = None
    """A Secret."""
    config_map: DnsName | None = None
    """A ConfigMap."""
    read_only: bool = True
    """Whether a claim can only be read; the others always can only be read."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [k for k in ("claim", "secret", "config_map") if getattr(self, k) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise _wrong(f"must have one of claim, secret and config_map, but has {has}")
        return self


class KubernetesSpec(Part):
    """Where and with what the job runs on a cluster; it never changes the result."""

    image: Annotated[
        str, Field(pattern=IMAGE, examples=["registry.example.com/team/evenstep:0.1.0"])
    ]
    """The container image, best by its digest."""
    nodes: Annotated[int, Field(ge=1)] = 1
    """Pods that train together."""
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    """Training processes of each pod, and so its devices."""
    device: Annotated[str, Field(pattern=DEVICE)] = "nvidia.com/gpu"
    """What the cluster calls a device, such as amd.com/gpu; `cpu` trains without one."""
    cpu: Quantity = "4"
    """Cores of each pod."""
    memory: Quantity = "16Gi"
    """Memory of each pod, with `shared_memory` in it."""
    shared_memory: Quantity = "2Gi"
    """Size of /dev/shm, through which loader workers and NCCL hand their data."""
    scratch: Quantity = "10Gi"
    """Size of /tmp, the one other place a pod can write to."""
    storage_claim: DnsName | None = None
    """A PersistentVolumeClaim that is there and holds the runs. Default: one is made."""
    storage: Quantity = "50Gi"
    """Size of the claim that is made."""
    storage_class: DnsName | None = None
    """Its storage class; with several nodes it must offer ReadWriteMany."""
    namespace: DnsLabel | None = None
    """The namespace. Default: the one of whoever applies it."""
    node_selector: dict[
        Annotated[str, Field(pattern=LABEL)], Annotated[str, Field(pattern=LABEL_VALUE)]
    ] = {}
    """Labels that the cluster's nodes must have."""
    tolerations: tuple[TolerationSpec, ...] = Field(default=(), strict=False)
    """Taints to put up with, besides the one of the devices."""
    topology: Annotated[str, Field(pattern=LABEL)] = "topology.kubernetes.io/zone"
    """Pods prefer nodes with one value of this label; `none` has no preference."""
    queue: DnsLabel | None = None
    """Kueue's LocalQueue; it then decides when the job starts."""
    priority_class: DnsName | None = None
    """Which jobs go first when there is not room for all."""
    image_pull_secret: DnsName | None = None
    """The Secret with which the image is fetched."""
    env: dict[Annotated[str, Field(pattern=VARIABLE)], str] = {}
    """Further environment variables."""
    mounts: tuple[MountSpec, ...] = Field(default=(), strict=False)
    """Further files: data sets, certificates, credentials."""
    wandb_secret: DnsName = "wandb"
    """The Secret whose `api-key` is the key of Weights & Biases; W&B is offline without it."""
    egress: tuple[str, ...] = Field(default=(), strict=False)
    """Address blocks the pods may speak to besides each other and DNS, such as 10.1.2.0/24."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often one node may fail on its own account before the job has failed."""
    grace_seconds: Annotated[int, Field(ge=30)] = 180
    """What a pod is given to save its state when it has to go."""
    deadline_seconds: Annotated[int, Field(ge=1)] = 604_800
    """The job has failed when it takes longer."""
    keep_seconds: Annotated[int, Field(ge=0)] = 86_400
    """How long a finished job is kept to be looked at; the runs stay."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    """Where the nodes meet."""
    meeting_seconds: Annotated[int, Field(ge=1)] = 600
    """How long a node waits there for the others before it starts again."""

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @field_validator("egress")
    @classmethod
    def _blocks_of_addresses(cls, egress: tuple[str, ...]) -> tuple[str, ...]:
        for block in egress:
            try:
                if "/" in block and ip_network(block):
                    continue
            except ValueError as error:
                raise _wrong(f"must be blocks of addresses, but {error}") from error
            raise _wrong(f"must be blocks of addresses, such as {block}/32, but has {block!r}")
        return egress

    @model_validator(mode="after")
    def _memory_holds_what_is_shared(self) -> Self:
        if quantity(self.shared_memory) >= quantity(self.memory):
            raise _wrong(
                f"memory must be more than shared_memory ({self.shared_memory}), which is in it, "
                f"but is {self.memory}"
            )
        return self


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number: bytes of a size, cores of a cpu."""
    number = text.rstrip("mkMGTi")
    unit = text.removeprefix(number)
    powers = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    binary = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * (powers | binary)[unit]


class Spec(Part):
    """A training job."""

    name: Annotated[str, Field(pattern=RUN_NAME, max_length=63, examples=["digits"])]
    """Names the run and its directory."""
    task: Annotated[str, Field(examples=["./my_task.py:task"])]
    """`package.module:name` or `./file.py:name`: what is trained."""
    task_args: dict[str, Any] = {}
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
    optimizer: Annotated[_Optimizers, Discriminator(_tag_by_name)] = Field(
        examples=[{"name": "sgd", "lr": 0.1}]
    )
    """What turns gradients into weights."""
    schedule: Annotated[_Schedules, Discriminator(_tag_by_name)] = ConstantSpec()
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
            raise _wrong(
                "exactness: bitwise adds gradients in an order and a way of its own: "
                "leave exchange out"
            )
        return self

    @model_validator(mode="after")
    def _tests_in_time(self) -> Self:
        waiting = "early_stopping" if self.early_stopping else None
        waiting = waiting or ("schedule plateau" if self.schedule.name == "plateau" else None)
        if waiting and self.test.every_steps is None and self.test.every_epochs is None:
            raise _wrong(f"{waiting} waits for tests: add test.every_epochs or test.every_steps")
        return self

    @field_validator("task")
    @classmethod
    def _names_a_task(cls, task: str) -> str:
        where, _, name = task.rpartition(":")
        is_file, is_module = where.endswith(".py"), all(map(str.isidentifier, where.split(".")))
        if not (name.isidentifier() and (is_file or is_module)):
            raise _wrong(f"must be package.module:name or ./file.py:name, but is {task!r}")
        return task
