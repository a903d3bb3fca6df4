"""Optimizers by name, and parameter groups by pattern: every parameter is in exactly one."""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase, translate
from fractions import Fraction
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from service.basics.errors import SpecError, did_you_mean
from service.data.task import Task, WithStep, imported
from service.plan.plan import Plan
from service.sharding.sharding import is_sharded
from service.spec.models import Spec
from service.spec.optimizer import GroupSpec, OptimizerSpec, TurnSpec
from service.spec.optimizer_options import OPTIMIZERS

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)

# Options that choose an implementation; torch accepts one at a time.
_LAYOUT = {"fused", "foreach", "differentiable"}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with the same settings."""

    match: str
    """The pattern that they match; `*` if there are no patterns."""
    names: tuple[str, ...]
    options: dict[str, Any]
    """Options that differ from those of the optimizer."""
    frozen: bool = False
    """Never trained."""
    frozen_until_step: int = 0
    """Trained from this step on."""
    frozen_until_epoch: float = 0.0
    """Trained from the end of this epoch on."""
    companion: bool = False
    """Trained by the optimizer's companion."""
    optimizer: str = ""
    """The name of its optimizer, if there are several."""


@dataclass(frozen=True)
class Frozen:
    """Parameters that are frozen until `until_step` steps are finished."""

    until_step: int
    parameters: tuple[nn.Parameter, ...]


# ---- one optimizer, or several


@dataclass(frozen=True)
class Trained:
    """The trained parameters of a model, and their optimizer."""

    groups: Sequence[ParameterGroup]
    optimizer: torch.optim.Optimizer
    """`Turns`, if there are several."""


def trained_by(model: nn.Module, spec: Spec, task: Task) -> Trained:
    """The optimizer of the spec, or its several optimizers, over their parameters of the model.

    Parameters that none of several optimizers trains are frozen.

    Raises:
        SpecError: the spec and the model do not match, or the task does not support turns.
    """
    if spec.optimizer is not None:
        groups = parameter_groups(model, spec.optimizer)
        return Trained(groups, make_optimizer(model, spec.optimizer, groups))
    if not isinstance(task, WithStep):
        raise SpecError(
            "optimizers: a task with one loss cannot train with several optimizers. Give it its "
            "own "
            "step (service.task.custom), in which context.optimizer is the optimizer whose turn "
            "it is; or use the section optimizer, with groups."
        )
    taken = names_by_optimizer(model, spec.optimizers)
    trained = {name for names in taken.values() for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    all_groups: list[ParameterGroup] = []
    made: dict[str, torch.optim.Optimizer] = {}
    for name, turn in spec.optimizers.items():
        with told_of_turn(name):
            groups = parameter_groups(model, turn.optimizer, taken[name])
            made[name] = make_optimizer(model, turn.optimizer, groups)
            if needs_closure(optimizer_class(turn.optimizer.name)):
                raise SpecError(
                    f"optimizer.name: {turn.optimizer.name} evaluates a step several times, so "
                    "it must be the only optimizer. Use another one, such as adamw."
                )
        all_groups += [replace(group, optimizer=name) for group in groups]
    return Trained(all_groups, Turns(made))


@contextmanager
def told_of_turn(name: str) -> Iterator[None]:
    """Add the name of the optimizer to an error, if there are several."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"optimizers.{name}: {error}") from error


def names_by_optimizer(
    model: nn.Module, optimizers: Mapping[str, TurnSpec]
) -> dict[str, list[str]]:
    """The names of the parameters that each of several optimizers trains.

    A model, or a module at its top level, that no optimizer trains at all is frozen.

    Raises:
        SpecError: a pattern matches nothing, or two match the same parameter; or only some
            parameters of a model are trained, and the others would keep their initial values.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    home: dict[str, str] = {}
    for optimizer, turn in optimizers.items():
        for pattern in turn.patterns(optimizer):
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found:
                tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
                raise SpecError(
                    f"optimizers.{optimizer}.match: {pattern!r} matches no trainable parameter. "
                    f"They are in {', '.join(tops)}."
                )
            twice = [name for name in found if home.get(name, optimizer) != optimizer]
            if twice:
                raise SpecError(
                    f"optimizers.{optimizer}.match: {pattern!r} matches {twice[0]}, which "
                    f"{home[twice[0]]} trains already. Each parameter has one optimizer."
                )
            home |= dict.fromkeys(found, optimizer)
    owner = {name.partition(".")[0]: optimizer for name, optimizer in home.items()}
    left = [name for name in names if name not in home and name.partition(".")[0] in owner]
    if left:
        other = owner[left[0].partition(".")[0]]
        raise SpecError(
            f"optimizers: {_listed(left)} trained by none, while {other} trains others of "
            "the same model. Add them to a match; or freeze them in the model with "
            "requires_grad_(False)."
        )
    return {name: [n for n in names if home.get(n) == name] for name in optimizers}


# ---- groups


def parameter_groups(
    model: nn.Module, spec: OptimizerSpec, among: Sequence[str] | None = None
) -> list[ParameterGroup]:
    """Every trainable parameter of the model in exactly one group; the first match wins.

    A spec without groups has one group, `*`.  With groups, every parameter must match one.

    Args:
        among: names of the parameters that this optimizer trains; None for all.
    Raises:
        SpecError: a pattern matches nothing, a parameter is in no group, or in one that
            the optimizer cannot train; lists the names.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if among is not None:
        names = list(among)
    if not names:
        raise SpecError("task: the model has no trainable parameter.")
    companion = getattr(spec, "companion", None)
    if companion is None:
        groups = _groups_of(model, spec, names, "optimizer", among)
        _require_trainable(model, spec, groups)
    else:
        others = _for_companion(model, spec, names)
        own = [name for name in names if name not in others]
        groups = _groups_of(model, spec, own, "optimizer", among) if own else []
        where = "optimizer.companion"
        for group in _groups_of(model, companion, others, where, among) if others else []:
            groups.append(replace(group, companion=True))
    counted = Counter(name for group in groups for name in group.names)
    assert counted == Counter(names), "every trainable parameter is in exactly one group"
    return groups


def _groups_of(
    model: nn.Module,
    spec: OptimizerSpec,
    names: Sequence[str],
    where: str,
    within: Sequence[str] | None,
) -> list[ParameterGroup]:
    patterns: Sequence[GroupSpec] = spec.groups or (GroupSpec(match="*"),)
    chosen = _chosen(patterns, names, where)
    spared, layers = _without_decay(model, spec), layer_of_parameter(model)
    last = max(layers.values() if within is None else [layers[name] for name in within])
    parts: dict[tuple[int, bool, int], list[str]] = {}
    for number, found in enumerate(chosen):
        for name in found:
            layer = layers[name] if spec.layer_decay is not None else 0
            parts.setdefault((number, name in spared, layer), []).append(name)
    groups = []
    for (number, spare, layer), found in sorted(parts.items()):
        pattern = patterns[number]
        options = pattern.options()
        if spec.layer_decay is not None:
            options["lr"] = options.get("lr", spec.lr) * spec.layer_decay ** (last - layer)
        if spare:
            options["weight_decay"] = 0.0
        step, epoch = pattern.unfreeze_at_step or 0, pattern.unfreeze_at_epoch or 0.0
        frozen = pattern.freeze and not (step or epoch)
        groups.append(ParameterGroup(pattern.match, tuple(found), options, frozen, step, epoch))
    return groups


def _chosen(patterns: Sequence[GroupSpec], names: Sequence[str], where: str) -> list[list[str]]:
    """The names that each pattern matches, without those of earlier patterns."""
    chosen: list[list[str]] = [[] for _ in patterns]
    left_out: list[str] = []
    home_of = _first_of([group.match for group in patterns])
    for name in names:
        home = home_of(name)
        (left_out if home is None else chosen[home]).append(name)
    if left_out:
        raise SpecError(
            f"{where}.groups: {_listed(left_out)} in no group. "
            "Add a group, or end with {match: '*'}."
        )
    for number, (pattern, found) in enumerate(zip(patterns, chosen, strict=True)):
        if not found:
            raise SpecError(
                f"{where}.groups.{number}.match: {pattern.match!r} matches no parameter that is "
                f"not already in an earlier group. There {_listed(names, verb=('is', 'are'))}."
            )
    return chosen


def _first_of(patterns: Sequence[str]) -> Callable[[str], int | None]:
    """A function that returns the number of the first glob that matches a name.

    With thousands of globs a name is compared only with those that have the same beginning.
    """
    alike: dict[str, list[int]] = {}
    for number, pattern in enumerate(patterns):
        alike.setdefault(re.split(r"[*?\[]", pattern, maxsplit=1)[0], []).append(number)
    # One regular expression for all with the same beginning, which tries them in their order.
    compiled = {
        begin: (re.compile("|".join(f"({translate(patterns[n])})" for n in numbers)), numbers)
        for begin, numbers in alike.items()
    }
    lengths = sorted({len(begin) for begin in alike})

    def first(name: str) -> int | None:
        found = []
        for length in lengths:
            any_of, numbers = compiled.get(name[:length], (None, ()))
            match = any_of.match(name) if any_of is not None else None
            if match is not None and match.lastindex is not None:
                found.append(numbers[match.lastindex - 1])
        return min(found, default=None)

    return first


def layer_of_parameter(model: nn.Module) -> dict[str, int]:
    """The number of the layer of each parameter, from 0 in the order of the model's definition.

    A layer is the path up to its first number, `encoder.blocks.3`, or otherwise the module of
    the parameter; so a block of a transformer is one layer, and so is each module of an
    nn.Sequential.
    """
    numbers: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, _ in model.named_parameters():
        path = name.split(".")[:-1]
        first = next((n + 1 for n, part in enumerate(path) if part.isdecimal()), len(path))
        layers[name] = numbers.setdefault(".".join(path[:first]), len(numbers))
    return layers


def _without_decay(model: nn.Module, spec: OptimizerSpec) -> set[str]:
    """Names of the parameters without weight decay, according to `no_decay`."""
    if spec.no_decay and "weight_decay" not in _signature(optimizer_class(spec.name)):
        raise SpecError(f"optimizer.no_decay: {spec.name} has no weight_decay.")
    spared = set()
    if "bias" in spec.no_decay:
        spared |= {n for n, _ in model.named_parameters() if n.rpartition(".")[2] == "bias"}
    if "norm" in spec.no_decay:
        for prefix, module in model.named_modules():
            if isinstance(module, NORMS) or type(module).__name__.endswith("Norm"):
                dot = f"{prefix}." if prefix else ""
                spared |= {dot + n for n, _ in module.named_parameters(recurse=False)}
    return spared


def _listed(names: Sequence[str], most: int = 8, verb: tuple[str, str] = ("is", "are")) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more + " " + verb[len(names) != 1]


# ---- parameters that some optimizers cannot train


def _for_companion(model: nn.Module, spec: OptimizerSpec, names: Sequence[str]) -> list[str]:
    """The names for the companion: those that the optimizer cannot train, and `companion_takes`."""
    can = _trainable_by(model, spec.name)
    given: tuple[str, ...] = getattr(spec, "companion_takes", ())
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SpecError(f"optimizer.companion_takes: {pattern!r} matches no parameter.")
    return [n for n in names if not can(n) or any(fnmatchcase(n, pattern) for pattern in given)]


def _require_trainable(
    model: nn.Module, spec: OptimizerSpec, groups: Sequence[ParameterGroup]
) -> None:
    can, parameters = _trainable_by(model, spec.name), dict(model.named_parameters())
    wrong = [n for g in groups if not g.frozen for n in g.names if not can(n)]
    if wrong:
        what = {"muon": "matrices", "sparseadam": "embeddings with sparse=True"}[spec.name]
        told = [f"{name} {list(parameters[name].shape)}" for name in wrong]
        raise SpecError(
            f"optimizer.name: {spec.name} trains only {what}, but {_listed(told)} "
            "in the model too. Add companion: {name: adamw, lr: 0.001}, which trains the others."
        )


def _trainable_by(model: nn.Module, name: str) -> Callable[[str], bool]:
    """A function that returns whether the optimizer `name` can train a parameter, by its name."""
    if name == "muon":
        matrices = {n for n, p in model.named_parameters() if p.dim() == 2}
        return matrices.__contains__
    if name == "sparseadam":
        return set(sparse_parameters(model)).__contains__
    return lambda parameter: True


def sparse_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are sparse."""
    found = [n for n, m in model.named_modules() if getattr(m, "sparse", False) is True]
    tables = {id(model.get_submodule(n).weight) for n in found}
    return [n for n, p in model.named_parameters() if id(p) in tables]


def require_sparse_can_travel(model: nn.Module, spec: Spec, *, device: str, many: bool) -> None:
    """Check that sparse gradients, if there are any, can be summed over the processes.

    Raises:
        SpecError: the synchronization of this run supports dense gradients only.
    """
    sparse = sparse_parameters(model)
    if not sparse or (spec.exactness != "bitwise" and (device == "cpu" or not many)):
        return
    by = "exactness: bitwise" if spec.exactness == "bitwise" else f"several processes on {device}"
    raise SpecError(
        f"task: {_listed(sparse)} sparse in the gradient, and {by} can sum only dense ones. "
        "Make the embeddings with sparse=False, or train in one process or on CPUs."
    )


# ---- the optimizer


def make_optimizer(
    model: nn.Module, spec: OptimizerSpec, groups: Sequence[ParameterGroup]
) -> torch.optim.Optimizer:
    """The optimizer over `groups`, without frozen groups.

    Raises:
        SpecError: its class does not have an option, or does not accept its value.
    """
    parameters = dict(model.named_parameters())
    for name in [name for group in groups if group.frozen for name in group.names]:
        parameters[name].requires_grad_(False)
    trained = [group for group in groups if not group.frozen]
    if not trained:
        raise SpecError("optimizer.groups: every group is frozen, so there is nothing to train.")
    own = [group for group in trained if not group.companion]
    others = [group for group in trained if group.companion]
    sparse = set(sparse_parameters(model))
    made = [_made(parameters, spec, own, "optimizer", sparse=sparse)] if own else []
    if others:
        companion: OptimizerSpec = spec.companion  # type: ignore[attr-defined]  # it has groups
        made.append(_made(parameters, companion, others, "optimizer.companion", sparse=sparse))
        if needs_closure(optimizer_class(companion.name)):  # for some known only after creation
            raise SpecError(
                f"optimizer.companion.name: {companion.name} evaluates a step several times, so "
                "it cannot be a companion. Use another, such as adamw."
            )
    return made[0] if len(made) == 1 else Together(made)


def _made(
    parameters: dict[str, nn.Parameter],
    spec: OptimizerSpec,
    groups: Sequence[ParameterGroup],
    where: str,
    *,
    sparse: Set[str],
) -> torch.optim.Optimizer:
    make = optimizer_class(spec.name)
    if _must_have_closure(make) and len(groups) > 1 and not getattr(make, "takes_groups", False):
        raise SpecError(
            f"{where}.groups: {make.__name__} changes all parameters along one search direction, "
            f"so "
            "it supports only one group. Freeze the others, or leave out groups, no_decay and "
            "layer_decay."
        )
    _check_options(make, {o: v for g in groups for o, v in g.options.items()}, f"{where}.groups")
    trained = [
        {"params": [parameters[name] for name in group.names], **group.options} for group in groups
    ]
    options = spec.options()
    _check_options(make, options, where)
    members = [parameter for group in trained for parameter in group["params"]]
    given = {option for group in groups for option in group.options} | set(options)
    kinds = {name in sparse for group in groups for name in group.names}
    if _fused_pays(make, members) and kinds == {False} and not _LAYOUT & given:
        options["fused"] = True  # which does not support sparse gradients
    try:
        if ":" not in spec.name:
            for settings in _distinct([{**options, **group.options} for group in groups]):
                for is_sparse in kinds:
                    _try_out(make, settings, like=members[0], sparse=is_sparse)
        made = _constructed(make, trained, options)
        if ":" in spec.name:
            _find_out_closure(make, options, like=members[0])
    except Exception as error:  # the user must see any error of the class about its options
        told = str(error).rstrip(".")
        raise SpecError(f"{where}: {make.__module__}.{make.__name__} says: {told}.") from error
    require_one_state(made, where)
    return made


def _constructed(
    make: type[torch.optim.Optimizer], groups: Sequence[dict[str, Any]], options: dict[str, Any]
) -> torch.optim.Optimizer:
    """`make(groups, **options)`, for groups of parameters of which each is in one group only.

    torch's `add_param_group` compares each group with all before it: of 2,000 groups, two seconds.
    And its first call imports torch's compiler, which takes a second.
    """
    if not make.__module__.startswith("torch.optim."):
        return make(groups, **options)
    made = make.__new__(make)
    vars(made)["add_param_group"] = partial(_add_group, made)
    make.__init__(made, groups, **options)
    del vars(made)["add_param_group"]
    return made


def _add_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """What torch's `add_param_group` does with a list of parameters that no other group has."""
    optimizer.param_groups.append(
        {
            **group,
            **{
                option: value for option, value in optimizer.defaults.items() if option not in group
            },
        }
    )


def require_one_state(optimizer: torch.optim.Optimizer, where: str = "optimizer") -> None:
    """Check that an optimizer inside another has the same groups and the same state.

    Otherwise no checkpoint would contain its state, and no schedule would set its learning rates.

    Raises:
        SpecError: they are different.
    """
    kind, own = type(optimizer).__name__, {id(group) for group in optimizer.param_groups}
    for name, inner in vars(optimizer).items():
        if not isinstance(inner, torch.optim.Optimizer):
            continue
        if inner.state is not optimizer.state or {id(g) for g in inner.param_groups} - own:
            raise SpecError(
                f"{where}.name: {kind} keeps another optimizer, {name}, whose state would be in no "
                f"checkpoint, and whose learning rates no schedule would set. End {kind}.__init__ "
                f"and {kind}.load_state_dict with self.{name}.param_groups = self.param_groups "
                f"and self.{name}.state = self.state."
            )


def _distinct(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One of each kind: no class makes a difference between two learning rates from 0 up."""
    kinds = {repr(sorted({**one, "lr": 0.0}.items())): one for one in settings}
    return list(kinds.values())


def _try_out(
    make: type[torch.optim.Optimizer], options: dict[str, Any], *, like: nn.Parameter, sparse: bool
) -> None:
    """Take one step on a test parameter of four numbers, with the dtype and device of `like`.

    torch checks some options only in the first step (`differentiable`, `line_search_fn`),
    those of a group never, and only then reports whether it accepts sparse gradients.
    """
    optimizer = _four_numbers(make, options, like=like, sparse=sparse)
    if needs_closure(make):
        optimizer.step(lambda: 0.0)
    else:
        step_of(optimizer)()


def _four_numbers(
    make: type[torch.optim.Optimizer],
    options: dict[str, Any],
    *,
    like: nn.Parameter,
    sparse: bool = False,
) -> torch.optim.Optimizer:
    """An optimizer for a test parameter that has a gradient."""
    probe = nn.Parameter(torch.zeros(2, 2, dtype=like.dtype, device=like.device))
    probe.grad = torch.ones_like(probe)
    if sparse:
        probe.grad = probe.grad.to_sparse(1)
    return _constructed(make, [{"params": [probe]}], options)


def frozen_for_now(model: nn.Module, groups: Sequence[ParameterGroup], plan: Plan) -> list[Frozen]:
    """The groups that are frozen until a later step.

    Raises:
        SpecError: an epoch is given, but the training data is a stream.
    """
    parameters = dict(model.named_parameters())
    return [
        Frozen(until, tuple(parameters[name] for name in group.names))
        for group in groups
        if (until := frozen_until(group, plan))
    ]


def frozen_until(group: ParameterGroup, plan: Plan) -> int:
    """The number of steps for which a group is not trained; 0 if it is trained from the start.

    Raises:
        SpecError: it is given in epochs, but the training data is a stream.
    """
    if not group.frozen_until_epoch:
        return group.frozen_until_step
    if plan.steps_per_epoch is None:
        raise SpecError(
            f"optimizer.groups: {group.match!r} has unfreeze_at_epoch, but the training data is a "
            "stream, which has no epochs. Use unfreeze_at_step."
        )
    # The decimal number as written; a step with rows of both epochs belongs to the earlier
    # one.
    return math.ceil(Fraction(str(group.frozen_until_epoch)) * plan.steps_per_epoch)


def plain_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any] | None:
    """`step` as its class defines it, without torch's wrappers; None if it cannot be found.

    The wrapper adds a label for torch's profiler and calls hooks: a tenth of the time of a
    fused AdamW on a small model.  A torch scheduler may have replaced both.
    A second, inner wrapper marks graph breaks for the compiler, and imports the compiler for that.
    """
    step = type(optimizer).step
    if "step" in vars(optimizer) or not getattr(step, "hooked", False):
        return None
    within: Callable[[torch.optim.Optimizer], Any] | None = getattr(step, "__wrapped__", None)
    bare = getattr(within, "__wrapped__", None)
    is_cut = getattr(within, "__globals__", {}).get("__name__") == "torch.optim.optimizer"
    if bare is None or not is_cut or optimizer.defaults.get("differentiable"):
        return within
    return partial(_without_gradients, bare)


def step_of(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The step of the optimizer, without the wrapper if possible."""
    plain = plain_step(optimizer)
    return optimizer.step if plain is None else partial(plain, optimizer)


def _without_gradients(step: Callable[[Any], Any], optimizer: torch.optim.Optimizer) -> Any:
    with torch.no_grad():
        return step(optimizer)


def step_hooks(optimizer: torch.optim.Optimizer) -> tuple[Mapping[int, Any], ...]:
    """The containers of the hooks of its step: for this optimizer, and for all."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return (*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def modal(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The optimizers in it that use different weights for training and testing: by the contract
    of `train()` and `eval()`, which convert the parameters from one to the other.

    Source of the contract: Defazio et al., arXiv:2405.15682, and their `schedulefree`.
    """
    members = _members(optimizer)
    ways = ("train", "eval")
    return [m for m in members if all(callable(getattr(m, way, None)) for way in ways)]


def may_draw(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step may draw random numbers: those of torch.optim draw none."""
    return any(not type(m).__module__.startswith("torch.") for m in _members(optimizer))


def _members(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers in it that are not a combination of others."""
    if not isinstance(optimizer, Together):
        return [optimizer]
    return [inner for member in optimizer.members for inner in _members(member)]


def stepped_by(optimizer: torch.optim.Optimizer) -> dict[int, torch.optim.Optimizer]:
    """The optimizer that steps each parameter, by the `id` of the parameter."""
    members = _members(optimizer)
    return {id(p): m for m in members for group in m.param_groups for p in group["params"]}


_REFUSES_WITHOUT: WeakSet[type[torch.optim.Optimizer]] = WeakSet()
"""Classes whose step raises without a closure, although its signature does not require one."""


def needs_closure(make: type[torch.optim.Optimizer]) -> bool:
    """Whether a step of this class evaluates the loss several times, through a closure.

    For a class that does not declare it in its signature this is known after `make_optimizer`.
    """
    return _must_have_closure(make) or make in _REFUSES_WITHOUT


def _must_have_closure(make: type[torch.optim.Optimizer]) -> bool:
    """Whether its step needs a closure according to its signature."""
    closure = inspect.signature(make.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def asks_before_it_moves(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step first calls the closure at the current weights.

    A class declares it with `asks_before_it_moves = True`.  Otherwise that point is computed again.
    """
    says_so = getattr(optimizer, "asks_before_it_moves", False)
    return isinstance(optimizer, torch.optim.LBFGS) or says_so is True


def _find_out_closure(
    make: type[torch.optim.Optimizer], options: dict[str, Any], *, like: nn.Parameter
) -> None:
    """Test with two steps on test parameters whether a class raises only without a closure.

    SAM does: `def step(self, closure=None): assert closure is not None`.
    """
    if "closure" not in inspect.signature(make.step).parameters or needs_closure(make):
        return
    try:
        _four_numbers(make, options, like=like).step()
    except Exception:  # of any kind; the second step, with a closure, decides
        optimizer = _four_numbers(make, options, like=like)
        try:
            optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]  # as a loss
        except Exception:  # another problem, which the first step of the run reports
            return
        _REFUSES_WITHOUT.add(make)


def require_its_loss(optimizer: torch.optim.Optimizer, spec: Spec) -> None:
    """Check that an optimizer that compares losses gets the gradients of these losses.

    Raises:
        SpecError: the spec changes the gradients between the loss and the optimizer.
    """
    if not needs_closure(type(optimizer)):
        return
    name = type(optimizer).__name__
    if spec.max_grad_norm is not None:
        raise SpecError(
            f"max_grad_norm: {name} compares losses along the unclipped gradient. Leave it out."
        )
    if spec.model.precision == "fp16":
        raise SpecError(f"model.precision: {name} cannot work with scaled losses; use bf16.")


class Together(torch.optim.Optimizer):
    """Several optimizers as one, each over its own parameters.

    Their groups are in one list and their state in one mapping, so that code that sets a rate,
    unscales a gradient or writes a checkpoint sees a single optimizer.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = list(members)
        super().__init__([group for member in members for group in member.param_groups], {})
        for member in self.members:
            self.state.update(member.state)  # what its constructor made, as Adagrad's does
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for member in self.members:
            member.param_groups = [next(groups) for _ in member.param_groups]
            member.state = self.state
            if isinstance(member, Together):
                member._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no member needs one
        """Take the step of each optimizer."""
        for member in self.members:
            member.step()


class Turns(Together):
    """Several optimizers that step in turn, each over its own parameters."""

    def __init__(self, by_name: Mapping[str, torch.optim.Optimizer]) -> None:
        self.by_name = dict(by_name)
        self.turn = next(iter(self.by_name))
        """The optimizer whose turn it is."""
        super().__init__(list(self.by_name.values()))

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no member needs one
        """Take the step of the optimizer whose turn it is."""
        self.by_name[self.turn].step()

    def begin(self, name: str) -> None:
        """Let only the parameters of this optimizer get gradients, until the next turn.

        The gradients of the others are then neither computed nor exchanged.
        """
        self.turn = name
        for each, optimizer in self.by_name.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(each == name)

    def end(self) -> None:
        """Let the parameters of all optimizers get gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_()


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class with the name `sgd`, `package.module:Class` or `path/to/file.py:Class`.

    Raises:
        SpecError: it cannot be imported or is not an optimizer.
    """
    if ":" not in name:
        known = OPTIMIZERS[name].torch_name
        if not hasattr(torch.optim, known):
            raise SpecError(
                f"optimizer.name: torch {torch.__version__} has no {known}; use a newer torch."
            )
        found = getattr(torch.optim, known)
    else:
        found = imported(name, "optimizer.name")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise SpecError(f"optimizer.name: {name} is not a torch.optim.Optimizer.")
    return found


def _signature(make: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(make.__init__).parameters)


def _check_options(make: type[torch.optim.Optimizer], options: dict[str, Any], where: str) -> None:
    signature = _signature(make)
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        return
    known = [n for n in signature if n not in ("self", "params")]
    for option in options:
        if option not in known:
            near = did_you_mean(option, known)
            raise SpecError(f"{where}.{option}: {make.__name__} has no such option{near}")


def _fused_pays(make: type[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> bool:
    """Whether torch's fused implementation, which is faster, supports these parameters."""
    if is_sharded(parameters[0]) and make not in (torch.optim.Adam, torch.optim.AdamW):
        return False  # torch has only this one for sharded tensors
    return "fused" in inspect.signature(make.__init__).parameters and all(
        p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu") for p in parameters
    )
