"""Sharded data parallelism (torch's FSDP2): each process has some rows of every parameter.

A *unit* is a module whose parameters are gathered for its forward pass and again for its
backward pass, and released afterwards.  The blocks of a model are units, and the model itself is
one, with the parameters outside all blocks.  So a process needs memory for its rows of weights,
gradients and optimizer state, and for one whole unit at a time.

Source: Rajbhandari et al., arXiv:1910.02054 (ZeRO, stage 3); Zhao et al., arXiv:2304.11277.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from service.basics.errors import SpecError, WillFailAgain
from service.distributed.gradient_sync import GradientSync, Seed, per_weight
from service.distributed.stragglers import Stopwatch
from service.distributed.world import World
from service.health.heartbeat import Trace
from service.sharding.cpu_exchange import (
    GatheredInPages,
    GatherInPlace,
    ReduceScatterInPlace,
    fill_with_own,
)
from service.sharding.deferred_init import Deferring
from service.sharding.heap import ON_LINUX, Heap, keep_blocks
from service.spec.models import ExchangeSpec

T = TypeVar("T")

ROOT = "(the rest)"
"""The unit of all parameters that are in no other unit."""


# ---- units


def units_of(model: nn.Module, patterns: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The units of `model` by name, without the model itself.

    Without patterns: the members of every list of modules (nn.ModuleList, nn.Sequential) that have
    submodules and whose class occurs at least twice in the list; the outermost ones.

    Args:
        patterns: globs over the names of modules, which replace this rule.
    Raises:
        SpecError: a pattern matches nothing.
    """
    chosen: dict[str, nn.Module] = {}
    repeated = {id(module) for module in _repeated(model)}
    for name, module in model.named_modules():  # a module comes before its children
        if not name or _only_holds(module) or next(module.parameters(), None) is None:
            continue
        is_unit = id(module) in repeated
        if patterns:
            is_unit = any(fnmatchcase(name, pattern) for pattern in patterns)
        if is_unit and not any(name.startswith(f"{outer}.") for outer in chosen):
            chosen[name] = module
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in chosen):
            raise SpecError(
                f"exchange.units: {pattern!r} matches no module that has parameters and is in no "
                "other unit."
            )
    return chosen


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            classes = Counter(type(child) for child in parent)
            for child in parent:
                if classes[type(child)] > 1 and next(child.children(), None) is not None:
                    yield child


def _only_holds(module: nn.Module) -> bool:
    """Whether it is never called: a list or a dictionary of modules."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def parameters_by_unit(
    model: nn.Module, units: Mapping[str, nn.Module]
) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each unit by name, those of the model itself last.

    Raises:
        SpecError: a parameter cannot be sharded; names it.
    """
    found: dict[str, dict[str, nn.Parameter]] = {name: {} for name in [*units, ROOT]}
    home: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((u for u in units if name.startswith(f"{u}.")), ROOT)
        first = home.setdefault(id(parameter), (name, unit))
        if first[1] != unit:
            raise SpecError(
                f"exchange.mode: sharded cannot gather {name} with its unit {unit}, because it "
                f"is the same parameter as {first[0]} of {first[1]}. Choose exchange.units "
                "so that both are in one unit, or in none."
            )
        if parameter.dim() == 0:
            raise SpecError(
                f"exchange.mode: sharded splits parameters by rows, and {name} has no dimension. "
                "Give it the shape [1]."
            )
        if not parameter.is_contiguous():
            raise SpecError(
                f"exchange.mode: sharded splits parameters by rows, and those of {name} are not "
                "contiguous in memory. Make it contiguous()."
            )
        if first[0] == name:
            found[unit][name] = parameter
    return found


def rows_of_first(rows: int, processes: int) -> int:
    """The number of rows of the first process; no other process has more."""
    return -(-rows // processes)


def held_bytes(parameter: nn.Parameter, processes: int) -> int:
    """Bytes of a parameter on the first process."""
    rows = rows_of_first(parameter.shape[0], processes)
    return parameter[:rows].nbytes


def shard(
    model: nn.Module,
    world: World,
    *,
    spec: ExchangeSpec,
    root: nn.Module | None = None,
    deferred: Deferring | None = None,
    filled: bool = True,
) -> None:
    """Keep only this process's rows of every parameter; on the device, unit by unit.

    All processes get the weights and buffers of rank 0, as with DistributedDataParallel.

    Args:
        root: a module around the model, which training calls instead of it: a task's own step.
        deferred: creates the values of deferred parameters.
        filled: whether the values matter; otherwise deferred parameters have arbitrary values.
    Raises:
        SpecError: the model or this torch version does not support sharding, or the model is
            different on another process.
    """
    # Imported here, because it takes a second at the start of a run that does not need it.
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        OffloadPolicy,
        fully_shard,
    )

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise SpecError(
            f"exchange.mode: sharded needs torch 2.13 or newer, but this is {torch.__version__}."
        )

    units = units_of(model, spec.units)
    parameters_by_unit(model, units)
    _require_alike(model, world)
    mesh = _mesh_of(world, spec)
    root = root or model
    kept = CPUOffloadPolicy() if spec.offload else OffloadPolicy()
    for unit in [*units.values(), root]:
        _make(unit, deferred if filled and world.is_lead else None)
        _move_all(unit, world.device)
        if filled:
            _give_all(unit)
        # Parameters outside all blocks are needed last in the forward and first in the backward
        # pass.
        goes = spec.reshard_after_forward and unit is not root
        fully_shard(unit, mesh=mesh, reshard_after_forward=goes, offload_policy=kept)
    for module in _sharded_modules(root):
        # Sums, already divided by the weight of the step: not means over processes.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if world.device.type == "cpu":
        heap = Heap() if spec.return_memory else None
        _exchange_on_cpus(_sharded_modules(root), heap, mesh.size(mesh.ndim - 1))
    _hook_into_passes(root, units, world.trace)
    if root is not model:
        _InnerBackward(root, units)


def _hook_into_passes(root: nn.Module, units: Mapping[str, nn.Module], trace: Trace) -> None:
    for name, unit in {ROOT: root, **units}.items():
        _name_its_collective(name, unit, trace)
    root.register_forward_hook(_let_go_after_a_test)


def _exchange_on_cpus(modules: Sequence[Any], heap: Heap | None, processes: int) -> None:
    gather, scatter = GatherInPlace(heap), ReduceScatterInPlace(heap)
    for module in modules:
        module.set_custom_all_gather(gather)
        module.set_custom_reduce_scatter(scatter)
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if processes > 1 and ON_LINUX:  # FSDP2 treats a single process differently
                GatheredInPages(group.fsdp_params, processes)
        # By default FSDP2 gathers the next unit before it computes the backward pass of this one.
        # On a CPU the gathering blocks: it saves no time and needs memory for one more unit. With
        # the unit itself as the one to prefetch, no other is.
        module.set_modules_to_backward_prefetch([module])


def stand_alone(root: nn.Module) -> None:
    """Exchange nothing from now on: a pass takes as much memory as usual, and waits for nobody.

    The rows of the others are replaced by copies of this process's own. Such a model serves for
    trials only, in which one process may run out of memory while others do not.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
        DefaultAllGather,
        DefaultReduceScatter,
    )

    class Gather(DefaultAllGather):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
        ) -> None:
            fill_with_own(output_tensor, input_tensor, group)

    class Scatter(DefaultReduceScatter):
        def __call__(  # type: ignore[override]  # torch ignores what it returns
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **_: Any
        ) -> None:
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    for module in _sharded_modules(root):
        module.set_requires_all_reduce(False)  # between the nodes in hybrid mode
        for group in module._get_fsdp_state()._fsdp_param_groups:
            gather, scatter = group._all_gather_comm, group._reduce_scatter_comm
            if isinstance(gather, GatherInPlace):
                gather.alone = scatter.alone = True
            else:
                module.set_custom_all_gather(Gather())
                module.set_custom_reduce_scatter(Scatter())


def keep_freed_blocks(world: World) -> None:
    """Keep the memory of activations and gradients for later ones, if the device is a CPU."""
    if world.device.type == "cpu":
        keep_blocks()


def _mesh_of(world: World, spec: ExchangeSpec) -> Any:
    """The processes, or in hybrid mode a mesh of nodes and of processes of a node."""
    # Imported here, because it takes a second at the start of a run that does not need it.
    from torch.distributed.device_mesh import init_device_mesh

    sizes = _sizes_of_mesh(world, spec)
    names = ("nodes", "processes of a node")[-len(sizes) :]
    mesh = init_device_mesh(world.device.type, sizes, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # of a mesh of two dimensions they are new
        world.watch_over(group)
    return mesh


def _sizes_of_mesh(world: World, spec: ExchangeSpec) -> tuple[int, ...]:
    """(processes that share the rows), preceded in hybrid mode by (sets of such processes)."""
    if spec.mode != "hybrid":
        return (world.processes,)
    on_node = world.processes_a_node()
    return (on_node,) if on_node == world.processes else (world.processes // on_node, on_node)


def _name_its_collective(name: str, unit: nn.Module, trace: Trace) -> None:
    """Let a hang report name the unit whose parameters a forward pass waits for."""

    def begin(module: nn.Module, inputs: Any) -> None:
        trace.begin(f"parameters of {name}")

    unit.register_forward_pre_hook(begin, prepend=True)  # before torch's own hook, which waits


class _InnerBackward:
    """Refuses a task's own step that runs a backward pass through a unit.

    The derivative of that pass (as of a penalty on a gradient) needs the parameters of the unit
    again, and no hook of FSDP2 gathers them for it.
    """

    def __init__(self, root: nn.Module, units: Mapping[str, nn.Module]) -> None:
        self._step_runs = False
        root.register_forward_pre_hook(lambda *_: self._runs(True))
        root.register_forward_hook(lambda *_: self._runs(False), always_call=True)
        for name, unit in units.items():
            unit.register_forward_hook(partial(self._watch, name))

    def _runs(self, runs: bool) -> None:
        self._step_runs = runs

    def _watch(self, name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            for value in tree_leaves(outputs):
                if isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(partial(self._refuse, name))  # type: ignore[no-untyped-call]

    def _refuse(self, name: str, grad: Tensor) -> None:
        if self._step_runs:
            raise SpecError(
                f"exchange.mode: sharded: task.step runs a backward pass (torch.autograd.grad) "
                f"through {name}, whose parameters are released after its forward pass. Let "
                "exchange.units name only modules that no such pass goes through, such as another "
                "model: the parameters of all others are gathered for the whole step."
            )


def _require_alike(model: nn.Module, world: World) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    own = [f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors]
    theirs = world.from_lead(own)
    error = None
    if own != theirs:
        [differs, *_] = sorted({*own} ^ {*theirs}) or ["the order of its parameters"]
        error = SpecError(
            f"task: process {world.index} has a different model than rank 0: "
            f"{differs}. Create the same model on every process."
        )
    world.fail_together(error)


def _make(unit: nn.Module, deferred: Deferring | None) -> None:
    """Replace deferred parameters by parameters in main memory.

    Args:
        deferred: creates their values; None leaves the memory uninitialized.
    """
    # Only of this unit: torch frees a whole parameter with its last reference. By id, so that a
    # shared one is created once; no two units share one.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in unit.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or is_sharded(parameter) or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = (parameter, _made(parameter, deferred))
            module._parameters[key] = made[id(parameter)][1]


def _made(parameter: nn.Parameter, deferred: Deferring | None) -> nn.Parameter:
    value = torch.empty_like(parameter, device="cpu", requires_grad=False)
    if deferred is not None:
        value = deferred.value(parameter)
    real = nn.Parameter(value, requires_grad=parameter.requires_grad)
    real.__dict__.update(parameter.__dict__)
    return real


@torch.no_grad()
def _give_all(unit: nn.Module) -> None:
    """Send rank 0's tensors to all processes, one by one, except those that are already sharded."""
    for tensor in [*unit.parameters(), *unit.buffers()]:
        if not is_sharded(tensor):
            dist.broadcast(tensor.data, src=0)


@torch.no_grad()
def _move_all(unit: nn.Module, device: torch.device) -> None:
    """Move all tensors that are not sharded; a shared one stays shared.

    `Module.to` gives each module a parameter of its own, if those of the device are of a class of
    their own, as of a vendor's device in Python.
    """
    for tensor in [*unit.parameters(), *unit.buffers()]:
        if is_sharded(tensor):
            continue
        there = tensor.to(device)
        if there is tensor:
            continue
        if torch._has_compatible_shallow_copy_type(tensor, there):
            tensor.data = there
            continue
        if isinstance(tensor, nn.Parameter):
            there = nn.Parameter(there, requires_grad=tensor.requires_grad)
        swap: Any = torch.utils.swap_tensors  # it has no type annotations
        swap(tensor, there)


def _let_go_after_a_test(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """After a pass without gradients: release the parameters, as no backward pass will."""
    if not torch.is_grad_enabled():
        release(model)


def release(model: nn.Module) -> None:
    """Keep only this process's rows of all parameters that are gathered now."""
    for module in _sharded_modules(model):
        module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def require_one_type(model: nn.Module, spec: ExchangeSpec) -> None:
    """Check that the trained parameters of each unit have one type; called before the first pass.

    Raises:
        SpecError: they do not; FSDP2 sums the gradients of a unit in one buffer.
    """
    for unit, named in parameters_by_unit(model, units_of(model, spec.units)).items():
        trained = [(name, p) for name, p in named.items() if p.requires_grad]
        for name, parameter in trained:
            if parameter.dtype != trained[0][1].dtype:
                kinds = [str(p.dtype).removeprefix("torch.") for p in (trained[0][1], parameter)]
                raise SpecError(
                    f"exchange.mode: sharded needs the trained parameters of a unit to be of one "
                    f"type, but {trained[0][0]} has {kinds[0]} and {name} {kinds[1]}, both in the "
                    f"unit {unit}. Convert one, or choose exchange.units so that they are apart."
                )


# ---- tensors of which each process has some rows


def is_sharded(tensor: Any) -> bool:
    """Whether each process has only some of its rows."""
    found = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor exists
    return found is not None and isinstance(tensor, found.DTensor)


def holds_rows(model: nn.Module) -> bool:
    """Whether the parameters of `model` are sharded."""
    return is_sharded(next(model.parameters(), None))


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor on this process, not a copy; any other tensor completely."""
    if not is_sharded(tensor):
        return tensor
    # As to_local() without gradients, which takes three times as long to say so.
    rows: Tensor = tensor._local_tensor.detach()  # type: ignore[attr-defined]
    return rows


def computing_device(tensor: Tensor) -> torch.device:
    """The device on which the passes of a sharded tensor are computed, wherever its rows are."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return torch.device(mesh.device_type)


def first_row(tensor: Tensor) -> int:
    """The index of the first of `own_rows` in a sharded tensor; arbitrary if there are none."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    last = mesh.ndim - 1  # the dimension over which rows are divided
    return int(rows_of_first(tensor.shape[0], mesh.size(last)) * mesh.get_local_rank(last))


def copies_of_rows(model: nn.Module) -> int:
    """How many processes have the same rows: the number of nodes in hybrid mode."""
    first: Any = next(model.parameters(), None)
    if not is_sharded(first):
        return 1
    mesh: Any = first.device_mesh
    return int(mesh.size() // mesh.size(mesh.ndim - 1))


def writes_rows(tensor: Tensor) -> bool:
    """Whether this process is the first one with its rows of a sharded tensor."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return bool(mesh.ndim == 1 or mesh.get_local_rank(0) == 0)


def rows_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """The part of `whole`, a tensor of the same shape, at the rows of `tensor`; not a copy."""
    if not is_sharded(tensor):
        return whole
    rows = own_rows(tensor)
    first = first_row(tensor) if rows.numel() else 0
    return whole[first : first + len(rows)]


def sharded_like(tensor: Tensor, whole: Tensor) -> Tensor:
    """A tensor sharded like `tensor`, of which each process takes its rows from `whole`."""
    if not is_sharded(tensor):
        return whole
    return _of_rows(tensor, rows_like(tensor, whole).to(own_rows(tensor).device))


def empty_like_rows(tensor: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor with the layout and the sharding of `tensor`."""
    if not is_sharded(tensor):
        return torch.empty_like(tensor, dtype=dtype, device=device, requires_grad=False)
    return _of_rows(tensor, torch.empty_like(own_rows(tensor), dtype=dtype, device=device))


def _of_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """The tensor of which each process has these rows, sharded like `tensor`.

    As FSDP2 itself makes one: `from_local` takes twenty times as long, and moves offloaded rows to
    the device.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    like: Any = tensor
    spec = like._spec
    if rows.dtype != tensor.dtype:
        meta = TensorMeta(like.shape, like.stride(), rows.dtype)
        spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    made: Tensor = DTensor(rows, spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True)
class OwnRows:
    """A sharded parameter for gradient clipping: the rows of this process."""

    parameter: nn.Parameter

    @property
    def grad(self) -> Tensor | None:
        grad = self.parameter.grad
        return None if grad is None else own_rows(grad)


# ---- gradient synchronization


class ShardedSync(GradientSync):
    """Each process gets the sums of the gradients of its own rows, during the backward pass.

    Every forward and backward pass is a collective, so all processes need the same number.  One
    with fewer micro-batches repeats its first one, with weight zero.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        micro_batches: int,
        each: bool = False,
        unreached: Sequence[str] = (),
        gathered: Sequence[Tensor] = (),
        telling: bool = False,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """Exchange the gradients of a sharded model that has run a backward pass.

        Args:
            model: the root of its units.
            micro_batches: of a step, over all processes.
            each: exchange gradients after each micro-batch, not only with the last of a step.
            unreached: names of the parameters on which no loss depends; they get no gradient.
            gathered: tensors to which forward passes add, such as BatchNorm's statistics.
            telling, stopwatch: as for `OverlappedSync`.
        """
        self.model = model
        self._sharded = cast(Any, model)  # fully_shard has added methods
        self._world = world
        self._count = micro_batches
        self._each = each
        self._gathered = list(gathered)
        self._seed = Seed(telling)
        self._stopwatch = stopwatch
        self._counts = True
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._expected = {name for name, _ in trained if name not in unreached}
        self._unreached = [p for name, p in trained if name in unreached]
        self._reached: set[str] = set()
        # A gradient that exists only on other processes is sent as zeros.
        self._sharded.set_reduce_scatter_unused_params(True)
        for module in _sharded_modules(model):
            self._watch(module)

    def _watch(self, module: Any) -> None:
        """Record each parameter of a unit that gets a gradient."""
        module.unshard()  # the tensors with gradients exist only now
        whole: Any
        for name, whole in self.model.named_parameters():
            if whole.requires_grad and not is_sharded(whole):
                whole.register_post_accumulate_grad_hook(
                    lambda _, name=name: self._reached.add(name)
                )
        module.reshard()

    def over(self, micro_batches: Sequence[T]) -> Iterator[T]:
        passes = self._passes(micro_batches)
        return passes if self._stopwatch is None else self._stopwatch.over(passes)

    def _passes(self, micro_batches: Sequence[T]) -> Iterator[T]:
        for place, batch in enumerate(micro_batches, start=1):
            if place in (1, len(micro_batches)):
                self._exchange_now(last=place == len(micro_batches))
            self._counts = getattr(batch, "number", 0) < self._count
            before = [] if self._counts else [tensor.clone() for tensor in self._gathered]
            yield batch
            if before:
                torch._foreach_copy_(self._gathered, before)
        self._require_reached()
        for parameter in self._unreached:  # an optimizer would apply weight decay to zeros
            parameter.grad = None

    def _exchange_now(self, *, last: bool) -> None:
        """Set whether the next backward passes exchange gradients or add them up."""
        self._sharded.set_requires_gradient_sync(last or self._each)
        if self._each:  # in hybrid mode, between nodes still once a step
            self._sharded.set_requires_all_reduce(last)

    def backward(self, loss_sum: Tensor, step_weight: float | Tensor) -> None:
        if self._stopwatch is not None:
            self._stopwatch.end()
        self._world.trace.begin("parameters and gradients of a backward pass")
        self._seed.backward(loss_sum, per_weight(1.0, step_weight) if self._counts else 0.0)

    def _require_reached(self) -> None:
        """Check that the loss depended on the same parameters as at the start.

        Raises:
            WillFailAgain: names the parameters that differ.
        """
        differs = sorted(self._reached ^ self._expected)
        self._reached.clear()
        if differs:
            raise WillFailAgain(
                f"The losses of a step depend on other parameters than those of the first rows: "
                f"{', '.join(differs[:8])}. With exchange.mode: sharded a parameter is trained in "
                "every step or in none: add `0.0 * parameter.sum()` to the outputs if it is "
                "not used, or freeze it."
            )


@contextmanager
def told_as_used_outside(model: nn.Module) -> Iterator[None]:
    """A context that names a parameter that is used while its unit does not run.

    Raises:
        SpecError: one was used.
    """
    seen = _LastSharded()
    try:
        with seen:
            yield
    except (SpecError, RuntimeError) as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        names = [name for name, p in model.named_parameters() if p is seen.parameter]
        raise SpecError(
            f"exchange.mode: sharded: the parameter {', '.join(names) or 'of a unit'} is used "
            "outside the forward pass of its unit, where this process has only some of its rows. "
            "Choose exchange.units so that the module that uses it is in the same unit."
        ) from error


class _LastSharded(TorchFunctionMode):
    """Remembers the sharded parameter of the last function call."""

    parameter: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, nn.Parameter) and is_sharded(value):
                self.parameter = value
        return func(*args, **(kwargs or {}))
