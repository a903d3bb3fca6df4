"""The sections `optimizer:` and `optimizers:`; one model for each optimizer of torch.optim."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Strict,
    Tag,
    create_model,
    field_validator,
    model_validator,
)

from service.spec.optimizer_options import OPTIMIZERS
from service.spec.part import CUSTOM, IMPORT_STRING, Part, tag_by_name, wrong
from service.spec.schedule import ConstantSpec, Schedules, constant_unless_named


class OptimizerSpec(Part):
    """Keys of every optimizer; the options of each optimizer are on the same level as `lr`."""

    name: str = Field(examples=["sgd"])
    """The name of an optimizer of torch.optim, `package.module:Class` or `./file.py:Class`."""
    lr: Annotated[float, Field(ge=0, examples=[0.1])]
    """The base learning rate, before the schedule's multiplier."""
    no_decay: tuple[Literal["norm", "bias"], ...] = Field(default=(), strict=False)
    """Parameters without weight decay: those of `norm` layers, and `bias` terms."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Each layer's rate is this factor times the rate of the next layer; the last has factor 1."""
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
    """Do not train these parameters."""
    unfreeze_at_step: Annotated[int, Field(ge=1)] | None = None
    """Do not train them for this many optimizer steps, then train them."""
    unfreeze_at_epoch: Annotated[float, Field(gt=0)] | None = None
    """The same in epochs; may be a fraction."""

    @model_validator(mode="after")
    def _unfrozen_once(self) -> Self:
        if self.unfreeze_at_step is not None and self.unfreeze_at_epoch is not None:
            raise wrong("must have unfreeze_at_step or unfreeze_at_epoch, but has both")
        return self

    def options(self) -> dict[str, Any]:
        """The options of the optimizer that the user gave for this group."""
        return _given(self, without={"match", "freeze", "unfreeze_at_step", "unfreeze_at_epoch"})


def _given(part: Part, *, without: set[str]) -> dict[str, Any]:
    """The values that were set; null means the default, but a custom optimizer may accept None."""
    given = part.model_dump(exclude=without, exclude_unset=True)
    extra = part.model_extra or {}
    return {key: value for key, value in given.items() if value is not None or key in extra}


def _optional(kind: Any) -> Any:
    if get_args(kind):  # a pair: YAML only has lists
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
    """The field of every optimizer with its description, for one with a narrower type."""
    of_all = OptimizerSpec.model_fields[key]
    strict = None if default is ... else False
    return Field(default, strict=strict, description=of_all.description, examples=of_all.examples)


class CustomGroupSpec(GroupSpec):
    """A group of a custom optimizer; its options are checked when the optimizer is created."""

    model_config = ConfigDict(extra="allow")


class CustomOptimizerSpec(OptimizerSpec):
    """Any optimizer by import string; its options are checked against its signature on creation."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(pattern=IMPORT_STRING)]
    """The optimizer's class, as `package.module:Class` or `./file.py:Class`."""
    groups: tuple[CustomGroupSpec, ...] = Field(default=(), strict=False)
    """Settings for parameters by their names; the first matching glob wins."""


# Those that can train only some kinds of parameters; a companion trains the others.
PICKY = ("muon", "sparseadam")

Optimizers: Any = Annotated[CustomOptimizerSpec, Tag(CUSTOM)]  # torch's own are added below
for _name in [name for name in OPTIMIZERS if name not in PICKY]:
    Optimizers = Optimizers | Annotated[_optimizer_part(_name), Tag(_name)]
_companion: dict[str, Any] = {
    "companion": (
        Annotated[Optimizers, Discriminator(tag_by_name)],
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
            description="Globs over names of further parameters that the companion trains",
        ),
    ),
}
for _name in PICKY:
    Optimizers = Optimizers | Annotated[_optimizer_part(_name, **_companion), Tag(_name)]


def in_lower_case(optimizer: Any) -> Any:
    """The section with its name, and that of a companion, in lower case as in torch.optim."""
    if not isinstance(optimizer, dict):
        return optimizer
    name = optimizer.get("name")
    if isinstance(name, str) and ":" not in name:
        optimizer = {**optimizer, "name": name.lower()}
    if "companion" in optimizer:
        optimizer = {**optimizer, "companion": in_lower_case(optimizer["companion"])}
    return optimizer


class TurnSpec(Part):
    """One of several optimizers; each trains its own parameters in its own turn."""

    match: tuple[str, ...] = Field(default=(), strict=False, examples=[["critic.*"]])
    """Globs over the names of the parameters that it trains. Default: `NAME.*`, the whole model
    that has the optimizer's name."""
    every: Annotated[int, Field(ge=1)] = 1
    """It takes a step in every step whose number is a multiple of this, counted from 1."""
    optimizer: Annotated[Optimizers, Discriminator(tag_by_name)] = Field(
        examples=[{"name": "sgd", "lr": 0.1}]
    )
    """The optimizer and its options, as in the section `optimizer`."""
    schedule: Annotated[Schedules, Discriminator(tag_by_name)] = ConstantSpec()
    """Multiplier of its learning rate during the run, as in the section `schedule`."""

    _any_case = field_validator("optimizer", mode="before")(in_lower_case)
    _named = field_validator("schedule", mode="before")(constant_unless_named)

    def patterns(self, name: str) -> tuple[str, ...]:
        """The globs over its parameters; `name` is the optimizer's own name."""
        return self.match or (f"{name}.*",)
