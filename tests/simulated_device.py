"""A device in Python, `sim`, that holds a program to what a GPU demands of it; no GPU is needed.

It is registered as a vendor registers a device of its own (torch's key PrivateUse1, found by torch
through the entry point `torch.backends`), so the unmodified `evenstep` command trains on it. It
computes with torch's CPU kernels, and like a GPU it

- refuses to mix its tensors with those of the CPU, where CUDA does, and has no `numpy()`;
- lets a copy marked `non_blocking` arrive late: until somebody waits for it, the host reads NaN;
  a copy from pinned memory is read from there late, so that an overwritten buffer is seen;
- notes in `WAITS`, and in the trace of a profiler, every time the host waits for the device;
- has streams and events: what one stream wrote may be read by another only after a wait, and memory
  that another stream still reads may be given back only with `record_stream`, unless its own
  stream waits for the other before it uses memory again. Else: `Race`;
- has no deterministic implementation of some operations that have none on CUDA;
- draws random numbers from generators of its own;
- has so much memory (`SIM_BYTES`), says how much of it was used, and how it is out of memory;
- has several devices (`SIM_DEVICES`), and notes on which of them a thread has opened a context;
- says on which bus of the PCI each of them is, where it is told (`SIM_BUSES`);
- exchanges by a backend of its own, `simccl`, that refuses tensors of the CPU, as NCCL does.

What it cannot show: speed, NCCL, TF32, fused kernels (a GRU's, SyncBatchNorm's), CUDA graphs,
whether kernels are deterministic, and whatever happens inside a driver. Work is done at once: a
stream is an order that is checked, and not a queue. A process computes on one of the devices, and
its tensors call themselves `sim:0` whichever it is: torch's autograd engine knows one device of
such a kind.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_INDEXING = (
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default),
    *(aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index_put.default),
)
# What has no deterministic implementation on CUDA, and how torch calls it.
_UNORDERED = {
    "adaptive_max_pool2d_backward": "adaptive_max_pool2d_backward_cuda",
    "_adaptive_avg_pool2d_backward": "adaptive_avg_pool2d_backward_cuda",
    "_adaptive_avg_pool3d_backward": "adaptive_avg_pool3d_backward_cuda",
    "avg_pool3d_backward": "avg_pool3d_backward_cuda",
    "reflection_pad1d_backward": "reflection_pad1d_backward_out_cuda",
    "reflection_pad2d_backward": "reflection_pad2d_backward_cuda",
    "grid_sampler_2d_backward": "grid_sampler_2d_backward_cuda",
    "histc": "_histc_cuda",
}
# Beside torch's pointwise ones, these take a number from the host.
_TAKES_A_NUMBER = ("fill", "masked_fill", "index_fill")
WAITS: list[str] = []
"""Why the host waited for the device, in order."""
WAITED_AT: set[tuple[str, int]] = set()
"""The file and line of the innermost frame outside of this module where it did."""
PAGEABLE: list[int] = []
"""Bytes of each copy to the device that was to arrive late, but came from memory not pinned."""
EXCHANGED: list[str] = []
"""What this process exchanged with others by the backend of the device, in order."""
CONTEXTS: set[int] = set()
"""Devices on which a thread of this process has opened a context: some memory of each is gone."""
BYTES = int(os.environ.get("SIM_BYTES", 2**30))
"""Memory of each device."""
OTHERS = 0
"""What the driver says that other processes hold of it."""
CACHED = 0
"""What torch holds of it for later tensors."""


PENDING: list[Exception] = []
"""What was found where nothing can be raised; the next operator, or wait of the host, raises it."""
ASSERTED: list[str] = []
"""Why the device has stopped: an index was out of range. It is told to who waits for the device."""
SOON: list[bool] = []
"""With something in it, already the next operator is told: the device was faster than the host."""


class Race(RuntimeError):
    """Two streams use the same memory in no order."""


def _raise(error: Exception) -> None:
    """At once, or a little later from a thread of the autograd engine, which may raise nothing.

    There torch calls back into Python while it unwinds, and would end the process.
    """
    if isinstance(threading.current_thread(), threading._DummyThread):
        # The pass goes on until somebody is told, and must not run out of memory twice.
        if not any(isinstance(error, torch.OutOfMemoryError) for error in PENDING):
            PENDING.append(error)
    else:
        raise error


def _raise_pending() -> None:
    if PENDING and not isinstance(threading.current_thread(), threading._DummyThread):
        raise PENDING.pop(0)


# ---- streams and events


class Stream:
    """Work in the order in which it was asked for."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.now = 0
        """Counts its work."""
        self.seen: dict[Stream, int] = {}
        """Up to where it has waited for others."""

    def wait_stream(self, other: Stream) -> None:
        _learn(self.seen, {**other.seen, other: other.now})

    def wait_event(self, event: Event) -> None:
        _learn(self.seen, event.seen)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _host_waits("stream", {**self.seen, self: self.now})

    def query(self) -> bool:
        return self.seen.items() <= _HOST.items() and _HOST.get(self, 0) >= self.now

    def follows(self, other: Stream, work: int) -> bool:
        """Whether it comes after that work of another."""
        return other is self or self.seen.get(other, 0) >= work


class Event:
    """A point in the work of a stream."""

    def __init__(self, device: Any = None, enable_timing: bool = False, **_: Any) -> None:
        self.seen: dict[Stream, int] = {}
        self._time = 0.0
        self._is_timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        _open_context()
        stream = stream or current_stream()
        self.seen, self._time = {**stream.seen, stream: stream.now}, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        _open_context()
        _host_waits("event", self.seen)

    def query(self) -> bool:
        return all(_HOST.get(stream, 0) >= work for stream, work in self.seen.items())

    def elapsed_time(self, end: Event) -> float:
        """Source of what it refuses: torch's ATen/cuda/CUDAEvent.h."""
        if not (self._is_timed and end._is_timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.seen and end.seen):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self.query() and end.query()):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return 1e3 * (end._time - self._time)


_HOST: dict[Stream, int] = {}  # up to where the host has waited for each
_late: list[tuple[Stream, int, Callable[[], object]]] = []  # copies to the host under way
_to_come: list[_Home] = []  # memory into which copies of the host are under way
_arrival = threading.RLock()  # so that a thread finds a copy still to come, or made
# (stream of free memory, another stream, the work of it that may still use this memory)
_given_back: list[tuple[Stream, Stream, int]] = []


def _learn(known: dict[Stream, int], told: dict[Stream, int]) -> None:
    for stream, work in told.items():
        known[stream] = max(work, known.get(stream, 0))


def _host_waits(why: str, told: dict[Stream, int]) -> None:
    WAITS.append(why)
    WAITED_AT.add(_place_of_caller())
    _raise_pending()
    if ASSERTED:
        raise _assertion()
    with torch.profiler.record_function(f"the host waits for sim: {why}"), _arrival:
        _learn(_HOST, told)
        while _to_come:
            _to_come[0].receive()
        for copy in [copy for copy in _late if _HOST.get(copy[0], 0) >= copy[1]]:
            _late.remove(copy)
            copy[2]()


def _place_of_caller() -> tuple[str, int]:
    """Where a GPU would wait: its functions have no frames of Python's."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in (__file__, tree_map_only.__code__.co_filename):
        # A thread of the autograd engine has no other frame; the main one waits for it.
        frame = frame.f_back or sys._current_frames()[threading.main_thread().ident or 0]
    return frame.f_code.co_filename, frame.f_lineno


def _assertion() -> RuntimeError:
    return RuntimeError(f"sim error: device-side assert triggered\n{ASSERTED[0]}")


def _wait(why: str) -> None:
    """The host waits for all that it has asked of the current stream."""
    stream = current_stream()
    _host_waits(why, {**stream.seen, stream: stream.now})


# ---- devices of a process


class _Thread(threading.local):
    index = 0
    stream: Stream | None = None


_thread = _Thread()
_DEFAULT = Stream()
_memory = {"held": 0, "peak": 0, "device": 0}
_generators: list[torch.Generator] = []


def _index_of(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return _thread.index if index is None else index


def _open_context() -> None:
    CONTEXTS.add(_thread.index)


def current_stream(device: Any = None) -> Stream:
    return _thread.stream or _DEFAULT


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    before = _thread.stream
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def device_count() -> int:
    return int(os.environ.get("SIM_DEVICES", "4"))


def set_device(device: Any) -> None:
    _thread.index = _memory["device"] = _index_of(device)


def synchronize(device: Any = None) -> None:
    _host_waits("device", {stream: stream.now for stream in (_DEFAULT, current_stream())})


def max_memory_allocated(device: Any = None) -> int:
    return _memory["peak"]


def memory_allocated(device: Any = None) -> int:
    return _memory["held"]


def reset_peak_memory_stats(device: Any = None) -> None:
    _memory["peak"] = _memory["held"]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    return BYTES - memory_reserved(device) - OTHERS, BYTES


def memory_reserved(device: Any = None) -> int:
    return memory_allocated(device) + CACHED


def manual_seed_all(seed: int) -> None:
    for generator in _generators:
        generator.manual_seed(seed)


def get_rng_state(device: Any = None) -> torch.Tensor:
    return _generators[_memory["device"]].get_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    _generators[_memory["device"]].set_state(state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators]


def set_rng_state_all(states: list[torch.Tensor]) -> None:
    for generator, state in zip(_generators, states, strict=True):
        generator.set_state(state)


class _Properties:
    name = "Simulated device"
    total_memory = BYTES


class _OnPci(_Properties):
    """Also where it is on the machine's PCI, as NVIDIA's and AMD's tell."""

    pci_domain_id = pci_device_id = 0

    def __init__(self, bus: str) -> None:
        self.pci_bus_id = int(bus, 16)


def get_device_properties(device: Any = None) -> _Properties:
    buses = os.environ.get("SIM_BUSES", "").split()
    return _OnPci(buses[_index_of(device)]) if buses else _Properties()


def _module() -> ModuleType:
    """What `torch.get_device_module("sim")` gives, with the names that other vendors' have."""
    module: Any = ModuleType("torch.sim")
    module.Stream, module.Event, module.current_stream = Stream, Event, current_stream
    module.stream = _on_stream
    module.is_available = module.is_initialized = lambda: True
    module.is_built = lambda: True
    module._is_in_bad_fork = lambda: False
    module.current_device = lambda: _thread.index
    module.device_count, module.set_device, module.synchronize = (
        device_count,
        set_device,
        synchronize,
    )
    module.get_device_name = lambda device=None: _Properties.name
    module.get_device_properties = get_device_properties
    module.max_memory_allocated, module.memory_allocated = max_memory_allocated, memory_allocated
    module.reset_peak_memory_stats, module.mem_get_info = reset_peak_memory_stats, mem_get_info
    module.memory_reserved = memory_reserved
    module.empty_cache = lambda: None
    module.manual_seed_all = manual_seed_all
    module.manual_seed = lambda seed: _generators[_thread.index].manual_seed(seed)
    module.default_generators = _generators
    module._initialized = True  # asked by checkpoints, which then restore the generators
    module.get_rng_state, module.set_rng_state = get_rng_state, set_rng_state
    module.get_rng_state_all, module.set_rng_state_all = get_rng_state_all, set_rng_state_all
    module.device = lambda device: nullcontext()  # a tensor does not tell on which one it is
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


# ---- memory and tensors


class _Home:
    """One allocation: an attribute of its storage, with which it goes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = 0
        self.stream = current_stream()
        self.written = (self.stream, self.stream.now)
        self.used: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        self.given_back = _given_back
        self.due: list[Callable[[], object]] = []
        if _memory["held"] + size_bytes > BYTES:
            told = (
                f"sim out of memory. Tried to allocate {size_bytes / 2**20:.2f} MiB. The device "
                f"has a total capacity of {BYTES / 2**20:.2f} MiB."
            )
            _raise(torch.OutOfMemoryError(told))
        _require_unused(self.stream)
        self.resize(size_bytes)

    def resize(self, size_bytes: int) -> None:
        """Another size of the same allocation, such as none while nobody needs its values."""
        _memory["held"] += size_bytes - self.size_bytes
        _memory["peak"] = max(_memory["held"], _memory["peak"])
        self.size_bytes = size_bytes

    def receive(self) -> None:
        """Let what is under way to it arrive."""
        with _arrival:
            due, self.due = self.due, []
            if due:
                _to_come.remove(self)
            for copy in due:
                copy()

    def use(self, stream: Stream) -> None:
        if not stream.follows(*self.written):
            _raise(Race("a stream uses what another one wrote, and has not waited for it"))
        self.used[stream] = stream.now

    def write(self, stream: Stream) -> None:
        if not all(stream.follows(*use) for use in self.used.items()):
            _raise(Race("a stream writes over what another one still reads"))
        self.written = (stream, stream.now)

    def __del__(self, memory: dict[str, int] = _memory) -> None:
        memory["held"] -= self.size_bytes
        for stream, work in self.used.items():
            if stream not in self.recorded and not self.stream.follows(stream, work):
                self.given_back.append((self.stream, stream, work))


def _require_unused(stream: Stream) -> None:
    """What was given back to this stream is used again by it: others must be done with it."""
    late = [given for given in _given_back if given[0] is stream]
    _given_back[:] = [given for given in _given_back if given[0] is not stream]
    if not all(stream.follows(other, work) for _, other, work in late):
        _raise(Race("given back while another stream used it: no record_stream"))


class Sim(torch.Tensor):
    """A tensor on the device, around one of the CPU."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Sim:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device("sim", 0),
        )

    def __init__(self, raw: torch.Tensor) -> None:
        self.raw = raw
        storage: Any = raw.untyped_storage()
        if not hasattr(storage, "home"):
            storage.home = _Home(storage.nbytes())
        self.home: _Home = storage.home

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        storage: Any = self.raw.untyped_storage()
        storage.resize_ = partial(_resized, weakref.ref(storage))
        return storage

    def record_stream(self, stream: Stream) -> None:
        self.home.recorded.add(stream)

    def tolist(self) -> Any:
        _read(self, "tolist")
        return self.raw.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy.")

    def __repr__(self, **_: Any) -> str:
        return f"tensor(..., device='{self.device}', size={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Sim:
        new = Sim(self.raw.clone()).requires_grad_(self.requires_grad)
        new._is_param = getattr(self, "_is_param", False)  # type: ignore[attr-defined]
        memo[id(self)] = new
        return new

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return _exchange(func, args, kwargs)
        if func.overloadpacket is aten.to:  # arrives here inside of a dispatch mode
            return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default:
            return _moved(args[0], kwargs)
        if func is aten.copy_.default:
            late = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return _copied(args[0], args[1], late)
        if func is aten._local_scalar_dense.default:
            _read(args[0], "item")
            return func(args[0].raw)
        return _computed(func, args, kwargs)


def _resized(storage: Any, size_bytes: int) -> Any:
    """`UntypedStorage.resize_`, with which FSDP2 frees parameters; the device notes it."""
    storage().home.resize(size_bytes)
    return torch.UntypedStorage.resize_(storage(), size_bytes)


def _bare(value: Any) -> Any:
    return tree_map_only(Sim, lambda tensor: tensor.raw, value)


def _read(tensor: Sim, why: str) -> None:
    """The host waits for a value that it wants to see."""
    tensor.home.receive()
    tensor.home.use(current_stream())
    _wait(why)


def _ready(tensors: list[Sim]) -> None:
    """The current stream goes on by one, with what these hold."""
    _raise_pending()
    if ASSERTED and SOON:
        raise _assertion()
    stream = current_stream()
    stream.now += 1
    for tensor in tensors:
        tensor.home.receive()
        tensor.home.use(stream)


def _moved(tensor: Sim, kwargs: dict[str, Any]) -> torch.Tensor:
    """`_to_copy`: to another type, to the host or to another device."""
    to = torch.device(kwargs.pop("device", None) or tensor.device)
    late = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    _ready([tensor])
    value = aten._to_copy.default(tensor.raw, **kwargs)
    if to.type == "sim":
        return Sim(value)
    return _arrives(torch.empty_like(value), value, late)


def _copied(into: torch.Tensor, of: torch.Tensor, late: bool) -> torch.Tensor:
    if not isinstance(into, Sim):
        assert isinstance(of, Sim)
        _ready([of])
        return _arrives(into, of.raw.clone(), late)
    _ready([tensor for tensor in (into, of) if isinstance(tensor, Sim)])
    into.home.write(current_stream())
    bare = _bare(of)
    # What an exchange of gradients hands over is bare, and lies on the device all the same.
    if hasattr(bare.untyped_storage(), "home"):
        into.raw.copy_(bare)
    else:
        _sent(into, of, late)
    return into


def _sent(into: Sim, of: torch.Tensor, late: bool) -> None:
    """From the host to the device."""
    if late and _is_pinned(of):
        with _arrival:
            _spoil(into.raw)
            if not into.home.due:
                _to_come.append(into.home)
            into.home.due.append(lambda raw=into.raw: raw.copy_(of))
        return
    if late:
        PAGEABLE.append(of.nbytes)
    else:
        _wait("copy to the device")
    into.raw.copy_(of)


def _arrives(into: torch.Tensor, value: torch.Tensor, late: bool) -> torch.Tensor:
    """From the device to the host: at once and waited for, or late."""
    if not late:
        _wait("copy to the host")
        return into.copy_(value)
    _spoil(into)
    stream = current_stream()
    with _arrival:
        _late.append((stream, stream.now, lambda: into.copy_(value)))
    return into


@torch.no_grad()
def _spoil(memory: torch.Tensor) -> None:
    """What a reader sees who did not wait."""
    if memory.is_floating_point() or memory.is_complex():
        memory.fill_(float("nan"))
    else:
        memory.fill_(True if memory.dtype == torch.bool else 0x5A)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    ours = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Sim)]
    _require_one_device(func, args, kwargs)
    if func.overloadpacket.__name__ in _UNORDERED:
        _alert_unordered(_UNORDERED[func.overloadpacket.__name__])
    _ready(ours)
    if _asks_host(func, args):
        _wait(str(func))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    draws = any(argument.name == "generator" for argument in func._schema.arguments)
    if draws and kwargs.get("generator") is None:
        kwargs["generator"] = _generators[_memory["device"]]
    if func is aten.native_dropout.default:
        return _dropped(*args)
    results = _result_of(func, args, kwargs)
    own: dict[int, torch.Tensor] = {id(tensor.raw): tensor for tensor in ours}
    if func in _INDEXING and not isinstance(args[0], Sim):
        own[id(args[0])] = args[0]  # in place: the same object again
    stream = current_stream()

    def wrapped(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in own:
            return own[id(tensor)]
        return Sim(tensor)

    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.is_write:
            for tensor in tree_leaves(given):
                if isinstance(tensor, Sim):
                    tensor.home.write(stream)
    return tree_map_only(torch.Tensor, wrapped, results)


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse tensors of the host where CUDA refuses them, in its words.

    Source: TensorIterator.cpp (`compute_types`), TensorAdvancedIndexing.cpp, and the device checks
    of torchgen (`wrapper_CUDA_...`) in torch 2.13. A list of tensors (`_foreach_`) is computed one
    by one where it is mixed.
    """
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = {argument.name for argument in func._schema.arguments if argument.is_write}
    tensors = [
        (name, tensor)
        for name, value in given.items()
        for tensor in tree_leaves(value)
        if isinstance(tensor, torch.Tensor)
    ]
    of_host = [(name, tensor) for name, tensor in tensors if not isinstance(tensor, Sim)]
    operator = func.overloadpacket.__name__
    if not of_host or (operator.startswith("_foreach_") and not any(t.dim() for _, t in of_host)):
        return
    if func in _INDEXING:
        if not isinstance(args[0], Sim) and any(isinstance(i, Sim) for i in args[1]):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        values = args[2] if len(args) > 2 else args[0]
        if not values.dim() or isinstance(values, Sim) == isinstance(args[0], Sim):
            return
    elif operator.strip("_") == "masked_fill" and not isinstance(args[1], Sim):
        raise RuntimeError(
            "expected self and mask to be on the same device, but got mask on cpu and self on "
            f"{args[0].device}"
        )
    elif torch.Tag.pointwise not in func.tags and operator.strip("_") not in _TAKES_A_NUMBER:
        common = tensors[0][1].device
        name, other = next((n, t.device) for n, t in tensors if t.device != common)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got {name} is on {other}, "
            f"different from other tensors on {common} (when checking argument in method "
            f"wrapper_SIM_{func._schema.overload_name}_{operator})"
        )
    elif not any(tensor.dim() or name in written for name, tensor in of_host):
        if len(of_host) > 1 and func is not aten.where.self:
            raise RuntimeError("Trying to pass too many CPU scalars to non-CPU kernel!")
        return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        "sim:0 and cpu!"
    )


def _alert_unordered(name: str) -> None:
    """As torch does of an operation on CUDA: by what it says of one on the CPU, if it minds."""
    try:
        torch.zeros(1).put_(torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    except RuntimeError as error:
        _raise(RuntimeError(str(error).replace("put_", name, 1)))


def _result_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What it comes to; from an index out of range on, nothing is computed and nobody is told."""
    try:
        if not ASSERTED:
            return func(*_bare(args), **_bare(kwargs))
    except IndexError as error:
        ASSERTED.append(str(error))
    written = [a for a, s in zip(args, func._schema.arguments, strict=False) if s.is_write]
    if written:
        return _bare(written[0])
    shapes = tree_map_only(torch.Tensor, lambda t: t.to("meta"), _bare((args, kwargs)))
    made = func(*shapes[0], **shapes[1])
    return tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), made)


def _asks_host(func: Any, args: Any) -> bool:
    """Whether the host has to know a value of the device to go on."""
    if func in (*_INDEXING, aten.where.self):
        operands = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if not all(isinstance(t, Sim) for t in operands):  # a kernel takes no tensor of the host
            return True
    if func in _INDEXING:
        masks = (torch.bool, torch.uint8)
        return any(t is not None and t.dtype in masks for t in args[1])
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(func.tags))


def _dropped(values: Sim, p: float, train: bool | None) -> tuple[Sim, Sim]:
    """Dropout, in one operator as on a GPU: by the device's generator."""
    kept = torch.empty_like(values.raw).bernoulli_(1 - p, generator=_generators[_memory["device"]])
    return Sim(values.raw * kept.div(1 - p)), Sim(kept.bool())


# ---- pinned memory


def _is_pinned(tensor: torch.Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "is_pinned_for_sim")


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    _open_context()  # CUDA's is a call to the current device
    storage: Any = tensor.untyped_storage()
    storage.is_pinned_for_sim = True
    return tensor


def _teach_pinning() -> None:
    """`torch.empty(..., pin_memory=True)` asks an allocator that no device in Python can bring.

    It is the one function of torch that is replaced.
    """
    plain = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = plain(*size, **options)
        return _pinned(made) if pin_memory else made

    torch.empty = empty  # type: ignore[assignment]
    _LIBRARY.impl("is_pinned", lambda tensor, device=None: _is_pinned(tensor), "CPU")
    _LIBRARY.impl("_pin_memory", lambda tensor, device=None: _pinned(tensor.clone()), "CPU")


# ---- processes


def _group_of(store: Any, rank: int, size: int, timeout: Any) -> Any:
    """A backend whose work gloo does; `_exchange` hands it what is inside of the tensors."""
    import torch.distributed as dist

    gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
    inner = dist.ProcessGroup(store, rank, size)
    kind = dist.ProcessGroup.BackendType.GLOO
    inner._register_backend(torch.device("cpu"), kind, gloo)
    inner._set_default_backend(kind)
    _groups[id(gloo)] = (gloo, inner)
    return gloo


_groups: dict[int, tuple[Any, Any]] = {}


def _exchange(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    import torch.distributed as dist

    def inner(value: Any) -> Any:
        if not isinstance(value, torch.ScriptObject) or "ProcessGroup" not in str(value._type()):
            return value
        group = dist.ProcessGroup.unbox(value)
        backend = group._get_backend(torch.device("sim"))
        return _groups[id(backend)][1].boxed() if id(backend) in _groups else value

    EXCHANGED.append(str(func))
    _ready([tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Sim)])
    args = tree_map_only(torch.ScriptObject, inner, args)
    return func(*_bare(args), **_bare(kwargs))


# ---- what torch is told

_LIBRARY: torch.library.Library
_FALLTHROUGH: torch.library.Library
# As on CUDA, by the same lists (torch/_C autocast_mode.h); those that the tests' models use.
_NARROW = ("linear", "conv2d", "matmul", "mm", "addmm", "bmm", "baddbmm")
_WIDE = ("log_softmax.int", "softmax.int", "layer_norm", "cross_entropy_loss", "mse_loss")


def _teach_autocast() -> None:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def casting(name: str, kind: Callable[[], torch.dtype]) -> None:
        operator, _, overload = name.partition(".")
        target = getattr(getattr(aten, operator), overload or "default")

        def cast(*args: Any, **kwargs: Any) -> Any:
            def to(tensor: torch.Tensor) -> torch.Tensor:
                return tensor.to(kind()) if tensor.is_floating_point() else tensor

            args, kwargs = tree_map_only(torch.Tensor, to, (args, kwargs))
            with torch._C._ExcludeDispatchKeyGuard(key):
                return target(*args, **kwargs)

        _LIBRARY.impl(name, cast, "AutocastPrivateUse1")

    for name in _NARROW:
        casting(name, lambda: torch.get_autocast_dtype("sim"))
    for name in _WIDE:
        casting(name, lambda: torch.float32)
    _FALLTHROUGH.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


def _made(make: Callable[..., torch.Tensor], size: Any, options: Any) -> Sim:
    _ready([])
    known = {k: v for k, v in options.items() if k in ("dtype", "memory_format") and v is not None}
    return Sim(make(size, **known))


def register() -> None:
    """Make the device known to torch, once; torch calls it where it finds the entry point."""
    global _LIBRARY, _FALLTHROUGH
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if hasattr(torch, "sim"):
        return
    _setup_privateuseone_for_python_backend("sim", backend_module=_module())
    _generators.extend(torch.Generator() for _ in range(device_count()))
    _LIBRARY = torch.library.Library("aten", "IMPL")
    _FALLTHROUGH = torch.library.Library("_", "IMPL")

    def empty(size: Any, **options: Any) -> Sim:
        return _made(torch.empty, size, options)

    def empty_strided(size: Any, stride: Any, **options: Any) -> Sim:
        return _made(partial(torch.empty_strided, size), stride, options)

    def arange(*limits: Any, **options: Any) -> Sim:
        return _made(lambda of, **known: torch.arange(*of, **known), limits, options)

    _LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
    for overload in ("arange", "arange.start", "arange.start_step"):
        _LIBRARY.impl(overload, arange, "PrivateUse1")
    _LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
    _LIBRARY.impl("_copy_from", lambda of, into, late=False: _copied(into, of, late), "PrivateUse1")
    _teach_autocast()
    _teach_pinning()
    import torch.distributed as dist

    dist.Backend.register_backend("simccl", _group_of, devices=["sim"])
