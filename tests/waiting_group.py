"""`evenstep` in a group that is destroyed as NCCL's is: only when all its processes destroy it.

    RANK=... WORLD_SIZE=... python tests/waiting_group.py run SPEC

A stand-in for what cannot run here.  Its sums are gloo's own; it has another name than gloo, and
`shutdown` waits for every process, as ncclCommFinalize does.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

from launch.__main__ import main

_shut_down: Any = dist.ProcessGroup.shutdown


def _group(store: Any, rank: int, processes: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, processes, timeout=timeout)  # type: ignore[attr-defined]


def _wait_for_all(group: Any) -> None:
    store, key = dist.distributed_c10d._get_default_store(), f"leaving {group.group_name}"
    store.add(key, 1)
    while store.add(key, 0) < group.size():
        time.sleep(0.05)
    _shut_down(group)


dist.Backend.register_backend("waiting", _group, devices=["cpu"])
dist.Backend.default_device_backend_map["cpu"] = "waiting"
dist.ProcessGroup.shutdown = _wait_for_all  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
