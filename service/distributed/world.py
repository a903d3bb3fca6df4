"""All processes of a job as one. Only this module knows ranks, torch.distributed, accelerate."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from service.basics.errors import EvenstepError, PeerLost, SpecError, WillFailAgain
from service.basics.limits import limits
from service.distributed.devices import generators, ready, synchronize
from service.distributed.generators import Seeded
from service.distributed.messages import from_bytes, to_bytes
from service.distributed.recursive_doubling import (
    MOST_BYTES,
    RecursiveDoubling,
    agreements,
    mean_in_bf16,
    mean_in_pairs,
    meet,
)
from service.health.heartbeat import Trace
from service.spec.models import ExchangeSpec

T = TypeVar("T")

# Operations of a forward and a backward pass: 5 ms on one core.  Measured on two: at 190 million
# two threads take 0.66 of the time of one if they spin while they wait, and 1.0 to 1.1 if
# they sleep because of other programs; at 3.4 billion 0.75 if they spin.
_SHARED_FROM = 2**27
# Of each number of a micro-batch's inputs: they are stacked, and read by the first layer.  Measured
# with photos, 4.8 million numbers (`benchmarks.whole_run`): rows per second rose by 5 %.
_OPERATIONS_A_NUMBER = 32
# The watchdog finds hangs, so torch's own timeouts must not end a run: they compare two clock
# times, and so have expired when a run that was stopped as a whole continues. In milliseconds it
# fits into 32 bits.
_WATCHED = timedelta(days=20)
# The texts with which gloo, NCCL and torch's store report that another process is gone.  Source:
# torch 2.13, torch/csrc/distributed/c10d/NCCLUtils.cpp (getNcclErrorDetailStr); NCCL's from logs.
_LOST = (
    "closed by peer",
    "closed by remote peer",
    "Connection reset",
    "Broken pipe",
    "Connection refused",
    "ncclRemoteError",
    "remote process exited",
    "Connection was likely closed",
    "client socket has timed out",
    "retrieving ncclUniqueId",  # from the first process, by the store
)
# NCCL's reports of a user's error, and the remedy.
_BACKEND_ADVICE = (
    (
        "shared memory segment",
        "/dev/shm is too small: raise it (docker run --shm-size; on Kubernetes an emptyDir with "
        "medium: Memory, which kubernetes.shared_memory sizes).",
    ),
    (
        "Duplicate GPU",
        "Two processes compute on one GPU, or on two slices of one: give each its own GPU "
        "(CUDA_VISIBLE_DEVICES), or start fewer processes.",
    ),
)
BOUNDED = ("gloo", "nccl")
"""The backends whose operation timeout torch can change later."""
CONNECT_SECONDS = 60.0
"""Time for processes that are all running to connect; if somebody deletes their addresses in the
store, this ends the wait."""
_COLLECTIVES = dist.constants.default_pg_timeout
_USUAL_BUCKET_MIB = 25
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


BLOCK_BYTES = 4 << 20
"""The most bytes of a piece that a process sends at once."""
Piece = tuple[int, int, memoryview]
"""The number of a file, a position in it, and the bytes from there on."""
_NO_PIECE = (-1, 0, 0)


class World:
    """The processes that train together.  With one process every sum is the identity.

    Before and after every method that communicates, branch only on values that are equal
    everywhere: the plan, the step, an agreed flag.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        *,
        device: torch.device | None = None,
        precision: str = "fp32",
        may_set_threads: bool = False,
        own_disks: bool = False,
    ) -> None:
        """The processes that torch has connected; a single one if there is no group.

        Args:
            device: of this process; None means accelerate's choice.
            may_set_threads: true if the user has not set the number of threads of this process.
            own_disks: true if the directory of the run is another one on each node.
        """
        self.own_disks = own_disks
        self._may_set_threads = may_set_threads
        # From torch: accelerate counts the processes only on the devices that it knows by name.
        joined = dist.is_initialized()
        self.processes: int = dist.get_world_size() if joined else 1
        self.index: int = dist.get_rank() if joined else 0
        self.device: torch.device = ready(device or accelerator.device)
        """With its index."""
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64
        """The widest dtype in which the device can sum."""
        self.is_lead: bool = self.index == 0
        self.precision = precision
        self.narrow = _AUTOCAST.get(precision)
        """The dtype of a forward pass, if it may be narrower than that of the weights."""
        self.trace = Trace()
        self._own_generators = generators(self.device)
        self._generators: list[Seeded] = list(self._own_generators)
        # Flags and objects are sent between CPUs: reading them from the GPU would wait for the
        # step.
        self._control: dist.ProcessGroup | None = None
        self._pairs: RecursiveDoubling | None = None
        self._gradients: RecursiveDoubling | None = None
        self._writers: dict[bool, Writers] = {}
        self._is_watched = False
        if self.processes > 1:
            if dist.get_backend() != "gloo":
                self._control = _connected(None, self.processes, _COLLECTIVES)
            group = self._control or dist.group.WORLD
            assert group is not None, "several processes need a group"
            self._pairs = agreements(group)
            self._gradients = RecursiveDoubling(group)

    def connect_devices(self) -> None:
        """Let the backend of the devices connect; every process calls it, at about the same time.

        NCCL connects in its first collective, and a process waits there for the first one only for
        the timeout of the store: not long enough if it is still building the model.

        Raises:
            RuntimeError: it cannot, for example because /dev/shm is too small.
        """
        if self._control is not None:
            self.trace.begin("connecting the devices")
            self.sum(torch.zeros(1, device=self.device))
            synchronize(self.device)

    def leave_limits_to_the_watchdog(self) -> None:
        """From now on, torch and gloo wait for the other processes without a time limit."""
        self._is_watched = True
        if self.processes > 1:
            for group in (dist.group.WORLD, self._control):
                if group is not None:
                    self.watch_over(group)

    def watch_over(self, group: dist.ProcessGroup) -> None:
        """The same for one group, also a later one; without a watchdog nothing happens."""
        if self._is_watched and dist.get_backend(group) in BOUNDED:
            be_patient(_WATCHED, group)

    def suit_threads(self, flops: float | None, numbers: float = 0) -> None:
        """Use one thread if a pass has so few operations that parallel execution is slower.

        The number of operations is determined by the spec, so a resumed run computes the same bits.

        Args:
            flops: of products in the pass.
            numbers: in its inputs.
        """
        few = flops is not None and flops + _OPERATIONS_A_NUMBER * numbers < _SHARED_FROM
        if few and self._may_set_threads and self.device.type == "cpu":
            torch.set_num_threads(1)

    def wrap(
        self,
        model: nn.Module,
        *,
        find_unused: bool,
        spec: ExchangeSpec,
    ) -> nn.Module:
        """The model, in DistributedDataParallel if there are several processes.

        Args:
            find_unused: search after each forward pass for parameters on which the loss does not
                depend.
        """
        if self.processes == 1:
            return model  # with the wrapper, a step would take 1.3 times as long
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 has only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # accelerate would select the device by the local rank, but a process that sees only its
            # own device has it as number 0.
            wrapped = DistributedDataParallel(
                model,
                device_ids=None if self.device.type == "cpu" else [self.device.index],
                find_unused_parameters=find_unused and not spec.static_graph,
                static_graph=spec.static_graph,
                # DDP does not handle buffers: `normalization` keeps BatchNorm's equal.
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # By default, torch sends the first bucket of 1 MiB early.
                bucket_cap_mb=None if spec.bucket_mib == _USUAL_BUCKET_MIB else spec.bucket_mib,
            )
        if spec.precision == "bf16":
            wrapped.register_comm_hook(None, mean_in_bf16)
        elif self._gradients is not None and _few_gradients(model):
            wrapped.register_comm_hook(self._gradients, mean_in_pairs)
        return wrapped

    def exchange_on_last(self, model: nn.Module, micro_batches: Sequence[T]) -> Iterable[T]:
        """The micro-batches in order; gradients are exchanged in the backward of the last one."""
        if len(micro_batches) > 1 and isinstance(model, DistributedDataParallel):
            return _exchanged_last(model, micro_batches)
        return micro_batches

    def require_exchanged(self, model: nn.Module) -> None:
        """Check, after a backward pass, that all of its gradients have been exchanged.

        DDP itself would report this only in the next forward pass, and a collective before
        it would receive a gradient.

        Raises:
            WillFailAgain: the loss did not depend on some parameters; names them.
        """
        if not isinstance(model, DistributedDataParallel):
            return
        try:
            model._check_reducer_finalized()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise _left_out(model, error) from error

    def autocast(self) -> AbstractContextManager[Any]:
        """A context for the forward pass in the precision of the spec."""
        if self.narrow is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.narrow)

    def seed_also(self, generators: Sequence[Seeded]) -> None:
        """Also seed these generators, if a pass uses them: seeding costs a small step 5 %."""
        self._generators = [*self._own_generators, *generators]

    def seed(self, key: int) -> None:
        """Seed every generator that a forward pass may use with `key`."""
        for generator in self._generators:
            generator.manual_seed(key)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the processes, as a new tensor."""
        if self._pairs is None:
            return values
        total = values.detach().clone(memory_format=torch.contiguous_format)
        self.trace.begin("sum")
        if self._pairs.fit(total):
            self._pairs.combine(total)
        else:
            dist.all_reduce(total)
        return total

    def sum_in_pairs(self, tensors: list[Tensor]) -> list[Tensor]:
        """Elementwise sums over a power of two of processes, added up in a fixed binary tree.

        Neighbours first: (0 + 1) + (2 + 3).  a + b and b + a have the same bits, so both
        partners of a pair get the same result.
        """
        distance = 1
        self.trace.begin("sum in pairs")
        while distance < self.processes:
            partner = self.index ^ distance
            for kind in {tensor.dtype: None for tensor in tensors}:
                own = [tensor for tensor in tensors if tensor.dtype == kind]
                sent = torch.cat([tensor.reshape(-1) for tensor in own])
                received = torch.empty_like(sent)
                swap = [
                    dist.P2POp(dist.isend, sent, partner),
                    dist.P2POp(dist.irecv, received, partner),
                ]
                for work in dist.batch_isend_irecv(swap):
                    work.wait()
                parts = received.split_with_sizes([tensor.numel() for tensor in own])
                others = [part.view_as(tensor) for part, tensor in zip(parts, own, strict=True)]
                torch._foreach_add_(own, others)
            distance *= 2
        return tensors

    def stack(self, values: Tensor) -> Tensor:
        """Every process's values, in order: [processes, ...]."""
        if self._pairs is None:
            return values[None]
        self.trace.begin("stack")
        rows = values.new_zeros(self.processes, *values.shape)
        if self._pairs.fit(rows):  # each adds its own values to the zeros of the others
            rows[self.index] = values.detach()
            self._pairs.combine(rows)
            return rows
        parts = [torch.empty_like(values) for _ in range(self.processes)]
        dist.all_gather(parts, values.detach())
        return torch.stack(parts)

    def sum_of_integers(self, values: Tensor) -> Tensor:
        """Elementwise sum of int64 on the CPU, modulo 2^64."""
        if self._pairs is None:
            return values
        self.trace.begin("sum of integers")
        total = values.clone(memory_format=torch.contiguous_format)
        self._pairs.combine(total)
        return total

    def highest(self, values: Sequence[int]) -> list[int]:
        """The maximum of each value over the processes; it never waits for the device."""
        if self._pairs is None:
            return list(values)
        self.trace.begin("highest")
        votes = torch.tensor(values)
        self._pairs.combine(votes, torch.maximum)
        highest: list[int] = votes.tolist()
        return highest

    def from_lead(self, value: T) -> T:
        """The value of rank 0, on every process."""
        if self.processes == 1:
            return value
        self.trace.begin("word of the lead")
        return _from_first(value, self._control)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order, on every process."""
        if self.processes == 1:
            return [value]
        self.trace.begin("gathering")
        return _from_each(value, self.processes, self._control)

    def fail_together(self, error: EvenstepError | None) -> None:
        """Raise the first process's error on every process, if any of them has an error.

        An error that can occur on one process only, before a collective, must be raised
        here; otherwise the others would wait for a process that has left.
        """
        for first in self.gather(error):
            if first is not None:
                raise first

    def barrier(self) -> None:
        """Wait until every process has called it."""
        if self._pairs is not None:
            self.trace.begin("barrier")
            meet(self._control or dist.group.WORLD)

    def processes_a_node(self) -> int:
        """The number of processes on each node.

        Raises:
            SpecError: the nodes have different numbers, or their ranks are not adjacent.
        """
        on_node = self.processes_here
        counts = self.gather(on_node)
        if len(set(counts)) > 1 or self.processes % on_node:
            raise SpecError(
                f"exchange.mode: hybrid divides the rows among the processes of each node, but the "
                f"nodes have "
                f"different numbers of processes: {', '.join(map(str, sorted(set(counts))))}. "
                "Start the same number on each, or use exchange.mode: sharded."
            )
        return on_node

    @property
    def processes_here(self) -> int:
        """Processes on this node, according to its launcher."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.processes > 1 else 1

    def writers(self, *, everyone: bool = False) -> Writers:
        """The processes that write a checkpoint together: those on the node of rank 0.

        Args:
            everyone: all processes, if each has a part of the state.
        """
        if everyone not in self._writers:
            here = min(self.processes_here, self.processes)
            count = self.processes if everyone else self.from_lead(here)
            self._writers[everyone] = Writers(self.index, count)
        return self._writers[everyone]


class Writers:
    """The first processes of the job, which communicate in background threads, one per process."""

    def __init__(self, index: int, processes: int) -> None:
        self.processes = processes
        self.index = index
        """Of this process; it is not a writer if its rank is not below `processes`."""
        self._group: dist.ProcessGroup | None = None
        self.have_met = processes == 1

    def meet(self) -> None:
        """Check that they can communicate; every process of the job calls it.

        Also one that is no writer: torch names a group by the number of groups that were created
        before, which would otherwise differ between processes from now on.
        """
        if not self.have_met:
            self._group = _connected(list(range(self.processes)), self.processes, _WATCHED)
            self.have_met = True

    def from_lead(self, value: T) -> T:
        """The value of rank 0, on each of them.

        Raises:
            PeerLost: one of them is gone.
        """
        if self._group is None:
            return value
        with _told_when_lost():
            return _from_first(value, self._group)

    def gather(self, value: T) -> list[T]:
        """The value of each of them, in order, on each of them.

        Raises:
            PeerLost: one of them is gone.
        """
        if self._group is None:
            return [value]
        with _told_when_lost():
            return _from_each(value, self.processes, self._group)

    def send(self, pieces: Iterable[Piece], *, to: int, moved: Callable[[], None]) -> None:
        """Send pieces to one of them, which receives them; returns when it has taken all.

        Args:
            moved: called after each block.
        Raises:
            PeerLost: it is gone.
        """
        with _told_when_lost():
            for number, begin, content in pieces:
                self._send(torch.tensor([number, begin, len(content)]), to)
                for start in range(0, len(content), BLOCK_BYTES):
                    block = content[start : start + BLOCK_BYTES]
                    self._send(torch.frombuffer(block, dtype=torch.uint8), to)
                    moved()
            self._send(torch.tensor(_NO_PIECE), to)

    def receive(self, origin: int) -> Iterator[tuple[int, int, Iterator[memoryview]]]:
        """The pieces that one of them sends, in blocks of a buffer that is used again.

        Take all of them: the other one waits until it has sent the last. Blocks that are not taken
        before the next piece are lost.

        Raises:
            PeerLost: it is gone.
        """
        buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        while True:
            told = torch.zeros(3, dtype=torch.int64)
            self._receive(told, origin)
            number, begin, size = told.tolist()
            if number < 0:
                return
            blocks = self._blocks(buffer, size, origin)
            yield number, begin, blocks
            for _ in blocks:
                pass

    def _blocks(self, buffer: Tensor, size: int, origin: int) -> Iterator[memoryview]:
        for start in range(0, size, BLOCK_BYTES):
            block = buffer[: min(BLOCK_BYTES, size - start)]
            self._receive(block, origin)
            yield block.numpy().data

    def _send(self, numbers: Tensor, to: int) -> None:
        dist.send(numbers, group=self._group, group_dst=to)

    def _receive(self, numbers: Tensor, origin: int) -> None:
        with _told_when_lost():
            dist.recv(numbers, group=self._group, group_src=origin)


def connect_patience(processes: int) -> timedelta:
    """The time for this number of processes to connect, each with each."""
    return timedelta(seconds=CONNECT_SECONDS + processes / 10)


def be_patient(patience: timedelta, group: dist.ProcessGroup | None) -> None:
    """Set the timeout of all further operations of this group."""
    dist.distributed_c10d._set_pg_timeout(patience, group)


def unconnected(error: RuntimeError | ValueError) -> PeerLost | None:
    """The reason why the running processes of a job are not connected, if `error` says so."""
    words = ["connectFullMesh", "timed out", "timeout", "Timed out", "Timeout"]
    words += ["basic_string", "vector"]  # for an invalid address
    of_store = isinstance(error, dist.DistStoreError | dist.DistNetworkError)
    if not of_store and not any(word in str(error) for word in words):
        return None
    return PeerLost(
        f"The processes of this job did not connect to each other within {CONNECT_SECONDS:g} s "
        f"({str(error).splitlines()[0]}). One of them is gone, or another program has changed the "
        "addresses in their store: docs/explanation/reliability.md says who must not reach it."
    )


def _connected(
    ranks: list[int] | None, processes: int, patience: timedelta
) -> dist.ProcessGroup | None:
    """A CPU group of these processes; all of them call it at about the same time."""
    try:
        group: object = dist.new_group(ranks, timeout=connect_patience(processes), backend="gloo")
        if not isinstance(group, dist.ProcessGroup):
            return None  # this process is not in it
        meet(group)  # an impostor does not answer here
    except (RuntimeError, ValueError) as error:
        lost = unconnected(error)
        if lost is None:
            raise
        raise lost from error
    be_patient(patience, group)
    return group


def _from_first(value: T, group: dist.ProcessGroup | None) -> T:
    """The value of the group's first process; never by pickle: see `distributed.messages`."""
    first = dist.get_rank(group) == 0
    said = _as_bytes(to_bytes(value)) if first else None
    size = torch.tensor([said.numel() if said is not None else 0])
    dist.broadcast(size, group=group, group_src=0)
    message = said if said is not None else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, group=group, group_src=0)
    heard: T = from_bytes(message.numpy().tobytes())
    return value if first else heard


def _from_each(value: T, processes: int, group: dist.ProcessGroup | None) -> list[T]:
    """The value of each process of the group, in order; never by pickle."""
    said = _as_bytes(to_bytes(value))
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(processes)]
    dist.all_gather(sizes, torch.tensor([said.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    messages = [torch.empty(longest, dtype=torch.uint8) for _ in range(processes)]
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: said.numel()] = said
    dist.all_gather(messages, padded, group=group)
    return [
        from_bytes(message[: int(size)].numpy().tobytes())
        for message, size in zip(messages, sizes, strict=True)
    ]


def _as_bytes(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


@contextmanager
def _told_when_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        lost = lost_peer(error)
        if lost is None:
            raise
        raise lost from error


def _few_gradients(model: nn.Module) -> bool:
    """Whether all gradients of the model are few enough to be summed in pairs."""
    if any(getattr(module, "sparse", False) for module in model.modules()):  # DDP checks the same
        return False  # sparse gradients have no buffer to add to
    trained = [p for p in model.parameters() if p.requires_grad]
    bytes_each = max((p.element_size() for p in trained), default=0)
    count = sum(p.numel() for p in trained)
    return all(p.device.type == "cpu" for p in trained) and count * bytes_each <= MOST_BYTES


def _exchanged_last(model: DistributedDataParallel, micro_batches: Sequence[T]) -> Iterator[T]:
    with model.no_sync():
        yield from micro_batches[:-1]
    yield micro_batches[-1]


def _left_out(model: DistributedDataParallel, error: RuntimeError) -> WillFailAgain:
    """An error with the names of the parameters for which torch gives only indices."""
    found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    trained = [name for name, p in model.module.named_parameters() if p.requires_grad]
    names = [trained[int(number)] for number in found[1].split()] if found else ["some parameters"]
    return WillFailAgain(
        f"The loss of a micro-batch does not depend on {', '.join(names[:8])}, unlike that of the "
        "first rows. On several processes a parameter is trained in every step or in none: add "
        "`0.0 * parameter.sum()` to the outputs if it is not used, or freeze it."
    )


def graph_changed(error: RuntimeError) -> WillFailAgain | None:
    """`error` as a violation of `exchange.static_graph`, if it is one."""
    if "compatible with static_graph" not in str(error):
        return None
    return graph_grew()


def graph_grew() -> WillFailAgain:
    """A violation of `exchange.static_graph`."""
    return WillFailAgain(
        "exchange.static_graph: the loss of a micro-batch depends on parameters on which the loss "
        "of "
        "the first rows did not depend. Leave static_graph out."
    )


# With these, accelerate connects to processes that nobody started for this one: a shell in a pod,
# in a Slurm step or under mpirun has them.
_PLACES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
)


def accelerator_for(device: str) -> Accelerator:
    """accelerate's view of this process: in the group that torch has connected, or alone.

    The spec decides what else accelerate takes from the environment, such as the precision.

    Args:
        device: its type.
    """
    hidden = () if dist.is_initialized() else _PLACES
    kept = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name in hidden or (name.startswith("ACCELERATE_") and name != "ACCELERATE_TORCH_DEVICE")
    }
    try:
        with warnings.catch_warnings():
            # It warns that it uses the CPU, which is intended here.
            warnings.simplefilter("ignore", UserWarning)
            return Accelerator(cpu=device == "cpu", gradient_accumulation_steps=1)
    finally:
        os.environ.update(kept)


def alone() -> World:
    """A world of this process only, on the CPU: for inspection without training."""
    return World(accelerator_for("cpu"))


def lost_peer(error: BaseException) -> PeerLost | None:
    """`error` as a `PeerLost`, if its text says that another process is gone.

    The type is not sufficient: NCCL's `DistBackendError` also means a small /dev/shm, two processes
    on one GPU, or no memory. Those would occur again after a restart, and are this process's own
    failure.
    """
    if not isinstance(error, RuntimeError) or not any(word in str(error) for word in _LOST):
        return None
    told = str(error).splitlines()[0].partition(". This is typically")[0]
    return PeerLost(f"Another process of this job was lost ({told}).")


def backend_advice(error: BaseException) -> str:
    """Advice for an error of NCCL, as sentences to append; empty for any other error."""
    if not isinstance(error, dist.DistBackendError):
        return ""
    found = [advice for words, advice in _BACKEND_ADVICE if words in str(error)]
    return " ".join(["", *found, "NCCL_DEBUG=INFO shows what NCCL did before."])


def in_place(*, precision: str) -> World:
    """A world of this process only, on the machine's accelerator; EVENSTEP_DEVICE=cpu: on the CPU.

    For a notebook or a script.  `launch` connects the processes that a launcher starts.
    """
    free = "OMP_NUM_THREADS" not in os.environ
    if free:  # in a container torch sees all cores of the node
        torch.set_num_threads(min(torch.get_num_threads(), limits().cores))
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or os.environ.get("EVENSTEP_DEVICE") == "cpu":
        device = torch.device("cpu")
    accelerator = accelerator_for(device.type)
    return World(accelerator, device=device, precision=precision, may_set_threads=free)
