"""The section `schedule:`, one model for each shape of the learning rate."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Field, Tag, model_validator

from service.spec.extending import UNITS
from service.spec.part import CUSTOM, IMPORT_STRING, TEST_MEASURE, Part, wrong


class ScheduleSpec(Part):
    """Multiplier of the learning rate during the run. Durations: steps, epochs or a fraction."""

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
                raise wrong(f"must have one {word}, but has {' and '.join(given)}")
            if not given and word in self.needed:
                raise wrong(f"must have {names[0]}, {names[1]} or {names[2]}, but has none")
        return self


class ConstantSpec(ScheduleSpec):
    """The base rate during the whole run."""

    name: Literal["constant"] = "constant"
    """The shape after the warmup."""


class LinearSpec(ScheduleSpec):
    """Linear decay to `final`."""

    name: Literal["linear"]
    """The shape after the warmup."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class CosineSpec(ScheduleSpec):
    """Cosine decay to `final`."""

    name: Literal["cosine"]
    """The shape after the warmup."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class CosineRestartsSpec(ScheduleSpec):
    """Cosine decay to `final`, repeated in cycles."""

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
    """Factor by which each cycle is longer than the one before."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end of each cycle."""


class PolynomialSpec(ScheduleSpec):
    """Decay to `final` as (1 - progress) to a power."""

    name: Literal["polynomial"]
    """The shape after the warmup."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """1 is a straight line; more falls faster at first."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class _EverySpec(ScheduleSpec):
    """A multiplication that is repeated at a fixed interval."""

    gamma: Annotated[float, Field(gt=0, le=1, examples=[0.1])]
    """Factor by which the rate is multiplied each time."""
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two multiplications."""
    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    every_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""


class ExponentialSpec(_EverySpec):
    """Smooth decay by `gamma` in each interval, from the end of the warmup on."""

    needed = ("every",)
    name: Literal["exponential"]
    """The shape after the warmup."""


class StepSpec(_EverySpec):
    """Multiplied by `gamma` at the end of each interval, counted from the start of the run."""

    needed = ("every",)
    name: Literal["step"]
    """The shape after the warmup."""


class MultiStepSpec(ScheduleSpec):
    """Multiplied by `gamma` at several given times, counted from the start of the run."""

    needed = ("at",)
    name: Literal["multi_step"]
    """The shape after the warmup."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor by which the rate is multiplied each time."""
    at_steps: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None, strict=False)
    """Optimizer steps after which the rate is multiplied."""
    at_epochs: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, strict=False)
    """The same in epochs."""
    at_fraction: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        default=None, strict=False
    )
    """The same as fractions of the run."""


class OneCycleSpec(ScheduleSpec):
    """Rise from `start` to the base rate, then decay to `final`."""

    name: Literal["one_cycle"]
    """The shape after the warmup."""
    rise_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the rise. Default: 0.3 of the run."""
    rise_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    rise_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same as a fraction of the run."""
    start: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Multiplier at the first step."""
    final: Annotated[float, Field(ge=0, le=1)] = 4e-6
    """Multiplier at the last step."""
    shape: Literal["cosine", "linear"] = "cosine"
    """Shape of the rise and of the decay."""


class InverseSqrtSpec(ScheduleSpec):
    """Decay as one over the square root of the steps; the warmup's length sets the scale."""

    name: Literal["inverse_sqrt"]
    """The shape after the warmup."""
    timescale_steps: Annotated[int, Field(ge=1)] | None = None
    """The rate is half at three times this after the warmup. Default: the warmup, or 1 step."""
    timescale_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    timescale_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""


class WarmupStableDecaySpec(ScheduleSpec):
    """The base rate until near the end of the run, then decay to `final`."""

    name: Literal["warmup_stable_decay"]
    """The shape after the warmup."""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the decay. Default: 0.2 of the run."""
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the run."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay; `sqrt` is 1 - sqrt(progress)."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Multiplier at the end."""


class PlateauSpec(ScheduleSpec):
    """Multiplied by `gamma` each time a test measure stops improving."""

    name: Literal["plateau"]
    """The shape after the warmup."""
    measure: Annotated[str, Field(pattern=TEST_MEASURE, examples=["test/loss"])]
    """A key of the metrics, such as `test/loss`."""
    mode: Annotated[Literal["max", "min"], Field(examples=["min"])]
    """Whether a larger (`max`) or a smaller (`min`) value is better."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor by which the rate is multiplied each time."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Consecutive tests without improvement before the rate is multiplied."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement, in the unit of the measure."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Tests that are ignored after each multiplication."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lower limit of the multiplier."""


class CustomScheduleSpec(ScheduleSpec):
    """A class of torch.optim.lr_scheduler, or a function from an optimizer to a scheduler."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=IMPORT_STRING)]
    """The scheduler's class, as `package.module:Class` or `./file.py:Class`; its options are on the
    same level."""

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
Schedules: Any = Annotated[CustomScheduleSpec, Tag(CUSTOM)]
for _schedule in SCHEDULES:
    Schedules = (
        Schedules
        | Annotated[_schedule, Tag(get_args(_schedule.model_fields["name"].annotation)[0])]
    )


def constant_unless_named(schedule: Any) -> Any:
    """The section; its name may be omitted."""
    return {"name": "constant", **schedule} if isinstance(schedule, dict) else schedule
