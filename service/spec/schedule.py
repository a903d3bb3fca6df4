"""The section `schedule:`, one model for each shape of the learning rate."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Field, Tag, model_validator

from service.spec.part import CUSTOM, IMPORT_STRING, TEST_MEASURE, Part, wrong

UNITS = ("steps", "epochs", "fraction")
"""What a duration of a schedule may be given in: `warmup_steps`, `warmup_epochs`, ..."""


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
                raise wrong(f"must have one {word}, but has {' and '.join(given)}")
            if not given and word in self.needed:
                raise wrong(f"must have {names[0]}, {names[1]} or {names[2]}, but has none")
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
Schedules: Any = Annotated[CustomScheduleSpec, Tag(CUSTOM)]
for _schedule in SCHEDULES:
    Schedules = (
        Schedules
        | Annotated[_schedule, Tag(get_args(_schedule.model_fields["name"].annotation)[0])]
    )
