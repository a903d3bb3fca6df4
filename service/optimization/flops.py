"""Floating-point operations: how many a pass takes, and how many a device can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from service.distributed.devices import name_of

# Dense matrix products, in TFLOP/s, from the makers' data sheets; the first matching name counts.
# Columns: fp16 and bf16, tf32, fp32.
_PEAKS: dict[str, tuple[float | None, float | None, float | None]] = {
    "B200": (2250, 1125, 75),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 417, 60),
    "H100": (989, 494, 67),
    "H200": (989, 494, 67),
    "GH200": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "V100": (125, None, 15.7),
    "T4": (65, None, 8.1),
    "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "MI300X": (1307, 653, 163),
}
_COLUMN = {"fp16": 0, "bf16": 0, "tf32": 1, "fp32": 2}


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the operations of everything that runs in this context.

    It uses torch's own formulas, as `torch.utils.flop_counter.FlopCounterMode`, but without its
    hooks on every module, which some models do not support.
    """

    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while it counts, so torch need not import its compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not _uncounted:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


_uncounted: list[None] = []


@contextmanager
def uncounted() -> Iterator[None]:
    """A context in which nothing is counted: recomputed operations count only once."""
    _uncounted.append(None)
    try:
        yield
    finally:
        _uncounted.pop()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak operations per second of the device, or None if unknown."""
    return known_peak(name_of(device), precision)


def known_peak(name: str, precision: str) -> float | None:
    """Nominal peak of a device of this name, such as `NVIDIA L4`, in operations per second.

    For a MIG slice (`NVIDIA H100 80GB HBM3 MIG 1g.10gb`) the peak is unknown.
    """
    if "MIG" in name.split():
        return None
    found = next((peaks for known, peaks in _PEAKS.items() if _fits(known, name)), None)
    column = None if found is None else found[_COLUMN[precision]]
    return None if column is None else column * 1e12


def cost_of_fp32(name: str) -> str | None:
    """A sentence on the peak that a device of this name does not reach in float32."""
    sold = {precision: known_peak(name, precision) for precision in ("fp32", "tf32", "bf16")}
    if sold["fp32"] is None or sold["bf16"] is None:
        return None
    told = {precision: f"{value / 1e12:g}" for precision, value in sold.items() if value}
    tf32 = f"{told['tf32']} in tf32, " if "tf32" in told else ""
    return (
        f"model.precision: fp32 (TF32 is off): the nominal peak of this device is {told['fp32']} "
        "TFLOP/s of "
        f"float32 products, {tf32}{told['bf16']} in bf16."
    )


def _fits(known: str, name: str) -> bool:
    """Whether all words of one name are in the other: `A100` in `A100-SXM4-80GB`."""
    words = name.upper().replace("-", " ").split()
    return all(word in words for word in known.upper().split())
