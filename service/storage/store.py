"""The door to an object store: all requests are made here, and tried again while they may succeed.

fsspec has a driver for each kind of store. It is imported only when a store is opened.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from service.basics.errors import EvenstepError, SpecError, did_you_mean
from service.basics.running_time import TimeLimit
from service.storage.address import Address
from service.storage.troubles import (
    NO_BUCKET,
    Verb,
    is_beyond_end,
    is_no_bucket,
    trouble_of,
)

AT_ONCE = 8
"""Requests at the same time."""
PATIENCE_SECONDS = 20.0
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_EXTRAS |= {"az": "azure", "abfs": "azure", "abfss": "azure"}
_SETTINGS: dict[str, dict[str, Any]] = {
    # Requests are made again here: a driver that does so too would delay a stop, and what is said.
    "s3": {"config_kwargs": {"retries": {"max_attempts": 0}}},
}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0

Result = TypeVar("Result")


class StoreFailed(EvenstepError):
    """A request did not succeed, but may succeed later."""


class StoreRefused(SpecError):
    """A request cannot succeed: the address, the credentials, the rights or the clock are wrong."""


class NoObject(Exception):
    """There is no object of this name."""


class Listed(NamedTuple):
    """An object in a list."""

    size: int
    version: str
    """Changes when the object is replaced, where the driver tells something like that."""


class Store:
    """The objects below one address, by their names relative to it; used by any thread."""

    def __init__(
        self, driver: Any, address: Address, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """`patience_seconds`: how long a request that fails is made again."""
        self.address = address
        self._driver = driver
        self._patience_seconds = patience_seconds
        self._over = threading.Event()
        # Its own: Python's generator belongs to the task, in whose process data are read.
        self._random = random.Random()
        self.succeeded = time.monotonic()
        """When the last request succeeded, by the monotonic clock."""

    def below(self, name: str) -> Store:
        """The same store, at an address below."""
        address = self.address / name
        return Store(self._driver, address, patience_seconds=self._patience_seconds)

    def put(self, name: str, content: bytes) -> None:
        """Write an object; an earlier one of this name is replaced."""
        self._ask("write", name, lambda path: self._driver.pipe_file(path, content))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one of this name; whether it was written.

        It is one atomic request where the store has conditional writes, as S3, GCS and Azure do.
        `content` is like no other writer's, so that it is recognized after a lost answer.
        """

        def written(path: str) -> bool:
            try:
                self._driver.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True

        if self._ask("write", name, written):
            return True
        try:
            return self.get(name) == content  # the answer to an earlier try may have been lost
        except NoObject:
            return False

    def get(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            NoObject: there is none.
        """
        content = self._ask("read", name, lambda path: self._driver.cat_file(path))
        assert isinstance(content, bytes)
        return content

    def get_range(self, name: str, begin: int, end: int) -> bytes:
        """The bytes of an object from `begin` to `end`; fewer if it is shorter.

        Raises:
            NoObject: there is none.
        """

        def ranged(path: str) -> bytes:
            try:
                content: bytes = self._driver.cat_file(path, start=begin, end=end)
            except OSError as error:
                if not is_beyond_end(error):
                    raise
                return b""
            return content

        return self._ask("read", name, ranged)

    def sizes(self, prefix: str) -> dict[str, int]:
        """The names of all objects below a prefix, which ends with a slash, and their sizes."""
        return {name: each.size for name, each in self.listing(prefix).items()}

    def listing(self, prefix: str) -> dict[str, Listed]:
        """All objects whose name is the prefix, or begins with it as a directory."""
        at = f"{self.address.path}/"

        def listed(path: str) -> Mapping[str, Mapping[str, Any]]:
            try:
                found: Mapping[str, Mapping[str, Any]] = self._driver.find(path, detail=True)
            except FileNotFoundError as error:
                if is_no_bucket(error):
                    raise
                return {}
            return found

        found = self._ask("list", prefix, listed)
        names = ((key.lstrip("/").removeprefix(at), told) for key, told in found.items())
        return {
            name: Listed(int(told["size"]), _version_of(told))
            for name, told in names
            if name.startswith(prefix)
        }

    def children(self) -> list[str]:
        """The names one level below the address."""

        def listed(path: str) -> list[str]:
            try:
                return [str(each) for each in self._driver.ls(path, detail=False)]
            except FileNotFoundError as error:
                if is_no_bucket(error):
                    raise
                return []

        found = self._ask("list", "", listed)
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found})

    def modified(self, name: str) -> datetime | None:
        """When an object was written, by the store's clock; None where the driver cannot tell."""

        def asked(path: str) -> datetime | None:
            try:
                told: datetime = self._driver.modified(path)
            except NotImplementedError:
                return None
            return told

        return self._ask("read", name, asked)

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; those that are gone already count as deleted."""

        def removed(name: str) -> None:
            try:
                self._ask("delete", name, lambda path: self._driver.rm_file(path))
            except NoObject:
                return

        in_parallel(removed, names)

    def give_up(self) -> None:
        """Fail the requests that are being tried again, and all that follow, at their next try."""
        self._over.set()

    def _ask(self, verb: Verb, name: str, request: Callable[[str], Result]) -> Result:
        """Make a request until it succeeds, cannot succeed, or the patience is over."""
        path = f"{self.address.path}/{name}".rstrip("/")
        limit, pause = TimeLimit(self._patience_seconds), _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = request(path)
                self.succeeded = time.monotonic()
                return result
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not is_no_bucket(error):
                    if verb != "write":
                        raise NoObject(name) from error
                    raise StoreRefused(f"{self.address}: {NO_BUCKET}.") from error
                trouble = trouble_of(error, verb)
                if trouble is None:
                    raise
                told = f"{self.address}: {trouble.told}."
                if not trouble.is_passing:
                    raise StoreRefused(told) from error
                if not limit.left or self._over.is_set():
                    raise StoreFailed(told) from error
            self._over.wait(pause * (0.5 + self._random.random()))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def open_store(address: Address, *, patience_seconds: float = PATIENCE_SECONDS) -> Store:
    """The store of an address; no request is made yet.

    Args:
        patience_seconds: see `Store`.

    Raises:
        SpecError: its driver is not installed, or there is none.
    """
    extra = _EXTRAS.get(address.scheme)
    install = f"pip install 'evenstep[{extra}]'" if extra else "pip install fsspec and a driver"
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(address.scheme)
    except ImportError as error:
        raise SpecError(
            f"{address}: the driver for {address.scheme}:// is not installed ({error}). {install}"
        ) from error
    except ValueError as error:
        known = did_you_mean(address.scheme, [*_EXTRAS, "memory"])
        raise SpecError(f"{address}: there is no driver for {address.scheme}://{known}") from error
    # Listings are never cached: other machines write there too.
    settings = _SETTINGS.get(_EXTRAS.get(address.scheme, ""), {})
    driver = kind(use_listings_cache=False, skip_instance_cache=True, **settings)
    if hasattr(driver, "retries"):
        driver.retries = 1
    return Store(driver, address, patience_seconds=patience_seconds)


def _version_of(told: Mapping[str, Any]) -> str:
    """What a driver tells of an object that changes when it is replaced."""
    names = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime")
    return str(next((told[name] for name in names if told.get(name)), ""))


Item = TypeVar("Item")


def in_parallel(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `act` gives for each item, several at a time; after a failure no further one begins."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="store") as threads:
        pending = [threads.submit(act, item) for item in items]
        try:
            return [each.result() for each in pending]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
