"""A sweep whose runs live in an object store: the settings of its runs, and copies of them.

Below the address of the sweep, each run has its own objects and its own lease. The settings are
objects of their own, `sweep/000001-DIGEST.json`: one for each command that added runs, written once
and never changed, so commands that start together lose nothing of each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from service.basics.errors import EvenstepError, SpecError
from service.observability.sweeps import Setting, Sweep, as_plain, settings_in
from service.storage.address import Address
from service.storage.published import PUBLISHED, SWEEP
from service.storage.reading import copied_runs
from service.storage.scratch import scratch_runs
from service.storage.store import Store, open_store

_NAME = re.compile(r"sweep/(\d{6,})-[0-9a-f]{16}\.json", re.ASCII)


def place_of(address: Address) -> Path:
    """The directory on this machine for the output of the runs of a sweep."""
    return scratch_runs(address) / address.name


def sweep_at(address: Address) -> Mapping[str, Setting] | None:
    """The settings of the runs of the sweep at an address; None if there is no sweep.

    Raises:
        SpecError: they are damaged.
        EvenstepError: the store does not answer.
    """
    store = open_store(address)
    found = _parts(store)
    return _settings(store, found) if found else None


@contextmanager
def copied_sweep(
    address: Address, settings: Mapping[str, Setting], *, with_metrics: bool
) -> Iterator[Sweep]:
    """Copies of the runs of a sweep: their states and specs, and the metrics if they are wanted.

    Raises:
        EvenstepError: one of them cannot be read.
    """
    with copied_runs(address, with_metrics=with_metrics) as (place, unread):
        if unread:
            raise EvenstepError("\n".join(unread))
        yield Sweep(place, settings, str(address))


def add_to_sweep_at(address: Address, settings: Mapping[str, Setting]) -> bool:
    """Write the settings of runs next to those of the sweep's other runs; whether it existed.

    Raises:
        SpecError: a run is at this address, or the store refuses.
        EvenstepError: the store does not take it.
    """
    store = open_store(address)
    if store.sizes(PUBLISHED):
        raise SpecError(f"--name: {address} is a run. Give the sweep another name.")
    parts = _parts(store)
    known = _settings(store, parts)
    if any(known.get(name) != setting for name, setting in settings.items()):
        content = (json.dumps(as_plain(settings), indent=1) + "\n").encode()
        number = max((int(match[1]) for match in map(_NAME.fullmatch, parts) if match), default=0)
        digest = hashlib.sha256(content).hexdigest()[:16]
        store.put(f"{SWEEP}{number + 1:06d}-{digest}.json", content)
    return bool(parts)


def _parts(store: Store) -> list[str]:
    return sorted(name for name in store.sizes(SWEEP) if _NAME.fullmatch(name))


def _settings(store: Store, parts: list[str]) -> dict[str, Setting]:
    settings: dict[str, Setting] = {}
    for name in parts:
        try:
            settings |= settings_in(json.loads(store.get(name)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SpecError(
                f"{store.address}/{name} cannot be read: {error}. Remove it, and run the sweep "
                "again: its runs are kept."
            ) from error
    return settings
