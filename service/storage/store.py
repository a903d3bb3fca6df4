"""The door to an object store: all requests are made here, and tried again while they may succeed.

S3 has a driver of its own, fsspec one for each other kind of store. A driver is imported only when
a store is opened.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from service.basics.atomic_files import write_at
from service.basics.errors import EvenstepError, SpecError, Stopped, did_you_mean
from service.basics.multipart import PART_BYTES
from service.basics.running_time import RunningClock
from service.drivers.s3 import S3, s3
from service.drivers.troubles import (
    NO_BUCKET,
    Verb,
    deletes,
    is_beyond_end,
    is_no_bucket,
    trouble_of,
)
from service.storage.address import Address

AT_ONCE = 8
"""Requests at the same time."""
PATIENCE_SECONDS = 20.0
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_EXTRAS |= {"az": "azure", "abfs": "azure", "abfss": "azure"}
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_LOOK_SECONDS = 0.5
_STANDING_SECONDS = 20.0
"""How long a connection may take no byte of what is sent, and give none of an answer."""
_ANSWER_SECONDS, _LEAST_BYTES_PER_SECOND = 60.0, 50_000
"""The longest time of one request, and how much longer it may be for its content."""
_CLOCKS_DIFFER_SECONDS = 900.0
"""How much clocks differ at most: S3 refuses what is signed by one that differs more."""
_LIST_SECONDS = 600.0  # thousands of requests, of a thousand names each
_LONGEST_REQUEST_SECONDS = 1000.0

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


class Copied(NamedTuple):
    """What an object contained."""

    size: int
    sha256: str


class Store:
    """The objects below one address, by their names relative to it; used by any thread."""

    def __init__(
        self, driver: Any, address: Address, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        """`patience_seconds`: how long a request that fails is made again."""
        self.address = address
        self._driver = driver
        # Ours, and drivers whose requests run in an event loop, can end a request after a time.
        self._limits = isinstance(driver, S3) or getattr(driver, "async_impl", None) is True
        self._patience_seconds = patience_seconds
        # Its own: Python's generator belongs to the task, in whose process data are read.
        self._random = random.Random()
        self._is_stopped: Callable[[], bool] = lambda: False

    def below(self, name: str) -> Store:
        """The same store, at an address below."""
        address = self.address / name
        return Store(self._driver, address, patience_seconds=self._patience_seconds)

    def until(self, is_stopped: Callable[[], bool]) -> Store:
        """The same store, whose requests and waits raise `Stopped` as soon as this is true."""
        stopping = self.below("")
        stopping.address, stopping._is_stopped = self.address, is_stopped
        return stopping

    def put(self, name: str, content: bytes, *, sha256: str | None = None) -> None:
        """Write an object; an earlier one of this name is replaced.

        Args:
            sha256: of the content, if it is known: S3 compares what it gets with it.
        """
        told = self._limit(len(content))
        if isinstance(self._driver, S3):
            told["sha256"] = sha256
        self._ask("write", name, lambda path: self._driver.pipe_file(path, content, **told))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one of this name; whether it was written.

        It is one atomic request where the store has conditional writes, as S3, GCS and Azure do.
        `content` is like no other writer's, so that it is recognized after a lost answer.
        """
        limit = self._limit(len(content))

        def written(path: str) -> bool:
            try:
                self._driver.pipe_file(path, content, mode="create", **limit)
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
        limit = self._limit(PART_BYTES)
        content = self._ask("read", name, lambda path: self._driver.cat_file(path, **limit))
        assert isinstance(content, bytes)
        return content

    def copy(self, name: str, descriptor: int, *, begin: int, end: int) -> Copied:
        """Write the content of an object to a file between two positions, and hash it.

        What is longer than this place is hashed, but not written.

        Raises:
            NoObject: there is none.
            OSError: the file cannot be written.
        """
        limit = self._limit(PART_BYTES)

        def copied(path: str) -> Copied | OSError:
            digest, size = hashlib.sha256(), 0
            for block in self._blocks(path, limit):
                try:
                    write_at(descriptor, block[: max(0, end - begin - size)], begin + size)
                except OSError as error:
                    return error  # of this disk: another request would not help
                digest.update(block)
                size += len(block)
            return Copied(size, digest.hexdigest())

        done = self._ask("read", name, copied)
        if isinstance(done, OSError):
            raise done
        return done

    def _blocks(self, path: str, limit: Mapping[str, Any]) -> Iterable[bytes]:
        if isinstance(self._driver, S3):
            return self._driver.blocks(path, **limit)
        return (self._driver.cat_file(path, **limit),)

    def get_range(self, name: str, begin: int, end: int) -> bytes:
        """The bytes of an object from `begin` to `end`; fewer if it is shorter.

        Raises:
            NoObject: there is none.
        """
        limit = self._limit(end - begin)
        if begin >= end:
            return b""  # drivers differ in what they request then

        def ranged(path: str) -> bytes:
            try:
                content: bytes = self._driver.cat_file(path, start=begin, end=end, **limit)
            except Exception as error:  # of any driver; adlfs lets errors of azure through
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
        at, limit = f"{self.address.path}/", {"timeout": _LIST_SECONDS} if self._limits else {}

        def listed(path: str) -> Mapping[str, Mapping[str, Any]]:
            try:
                found: Any = self._driver.find(path, detail=True, **limit)
                if isinstance(found, list):  # adlfs: an object has this name, so no more is told
                    directory, _, start = path.rpartition("/")
                    found = self._driver.find(directory, prefix=start, detail=True, **limit)
            except FileNotFoundError as error:
                if is_no_bucket(error):
                    raise
                return {}
            named = ((key.lstrip("/"), told) for key, told in found.items())
            return {key: told for key, told in named if f"{key}/".startswith(f"{path}/")}

        found = self._ask("list", prefix, listed)
        names = ((key.removeprefix(at), told) for key, told in found.items())
        return {
            name: Listed(int(told["size"]), _version_of(told))
            for name, told in names
            if name.startswith(prefix)
        }

    def listing_of(self, *prefixes: str) -> dict[str, Listed]:
        """The objects below several prefixes, each ending with a slash, in the order of the names.

        One request for S3, unless there are more than a thousand, if no other name lies between.
        """
        if not isinstance(self._driver, S3):
            found = [self.listing(prefix) for prefix in prefixes]
            return {name: each for one in found for name, each in one.items()}
        driver = self._driver

        def listed(path: str) -> Mapping[str, Mapping[str, Any]]:
            after = f"{path}/{prefixes[0]}"
            return driver.find_after(path, after=after, timeout=_LIST_SECONDS)

        named = self._ask("list", "", listed)
        at = f"{self.address.path}/"
        names = ((key.removeprefix(at), told) for key, told in named.items())
        return {
            name: Listed(int(told["size"]), _version_of(told))
            for name, told in names
            if name.startswith(prefixes)
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

    def age(self, name: str) -> float:
        """How many seconds ago an object was written; 0 if that is not known.

        By the store's clock, where the driver tells it; otherwise by the clock of this machine, as
        far as it cannot be the difference of the two.

        Raises:
            NoObject: there is none.
        """
        if isinstance(driver := self._driver, S3):
            age = self._ask("read", name, driver.age)
            if age is not None:
                return age
        moment = self.modified(name)
        ago = time.time() - moment.timestamp() if moment is not None else 0.0
        return max(0.0, ago - _CLOCKS_DIFFER_SECONDS)

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; those that are gone already count as deleted."""
        limit = self._limit()

        def removed(name: str) -> None:
            try:
                self._ask("delete", name, lambda path: self._driver.rm_file(path, **limit))
            except NoObject:
                return

        in_parallel(removed, names)

    def rules(self) -> Iterator[str]:
        """What the bucket does by itself, and a user should know; of S3 only, as far as it tells.

        Credentials need no right to ask for it.
        """
        bucket, _, prefix = self.address.path.partition("/")

        def asked(about: str) -> Mapping[str, Any]:
            try:
                told: Mapping[str, Any] = self._driver.call_s3(f"get_bucket_{about}", Bucket=bucket)
            except Exception:  # no right, no such setting, or a store that does not know it
                return {}
            return told

        if hasattr(self._driver, "call_s3"):
            if asked("versioning").get("Status") == "Enabled":
                yield (
                    f"{self.address}: the bucket keeps versions: what a run deletes stays there, "
                    "and is paid for. A lifecycle rule for noncurrent versions limits that."
                )
            for rule in asked("lifecycle_configuration").get("Rules", ()):
                if deletes(rule, f"{prefix}/"):
                    yield (
                        f"WARNING: {self.address}: the lifecycle rule {rule.get('ID', '')!r} of "
                        "the bucket deletes objects here after some time, also those that a run "
                        "still needs. Restrict it to another prefix."
                    )

    def wait(self, seconds: float) -> None:
        """Wait this long.

        Raises:
            Stopped: see `until`.
        """
        over = time.monotonic() + seconds
        while (left := over - time.monotonic()) > 0:
            self._require_not_stopped()
            time.sleep(min(left, _LOOK_SECONDS))

    def _require_not_stopped(self) -> None:
        if self._is_stopped():
            raise Stopped("Stopped before the run was brought here.")

    def _limit(self, size_bytes: int = 0) -> dict[str, Any]:
        """The argument of a driver that ends a request which takes too long."""
        seconds = _ANSWER_SECONDS + size_bytes / _LEAST_BYTES_PER_SECOND
        return {"timeout": seconds} if self._limits else {}

    def _ask(self, verb: Verb, name: str, request: Callable[[str], Result]) -> Result:
        """Make a request until it succeeds, cannot succeed, or the patience is over."""
        path = f"{self.address.path}/{name}".rstrip("/")
        # A request that is not answered counts with all of its time.
        waited, pause = RunningClock(_LONGEST_REQUEST_SECONDS), _FIRST_PAUSE_SECONDS
        while True:
            self._require_not_stopped()
            try:
                return request(path)
            except Exception as error:
                if isinstance(error, FileNotFoundError) and not is_no_bucket(error):
                    if verb != "write":
                        raise NoObject(name) from error
                    raise StoreRefused(f"{self.address}: {NO_BUCKET}.") from error
                trouble = trouble_of(error, verb)
                told = f"{self.address}: {trouble.told}."
                if not trouble.is_passing:
                    raise StoreRefused(told) from error
                if waited() >= self._patience_seconds:
                    raise StoreFailed(told) from error
            self.wait(pause * (0.5 + self._random.random()))
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
        driver = _of_s3() if extra == "s3" else _of_fsspec(address.scheme)
    except ImportError as error:
        raise SpecError(
            f"{address}: the driver for {address.scheme}:// is not installed ({error}). {install}"
        ) from error
    except _NoDriver as error:
        known = did_you_mean(address.scheme, [*_EXTRAS, "memory"])
        raise SpecError(f"{address}: there is no driver for {address.scheme}://{known}") from error
    except Exception as error:  # a driver that looks for credentials before the first request
        raise SpecError(
            f"{address}: the driver for {address.scheme}:// cannot be used: {error}. Check its "
            "credentials."
        ) from error
    return Store(driver, address, patience_seconds=patience_seconds)


class _NoDriver(Exception):
    """fsspec knows no driver of this name."""


def _of_s3() -> S3:
    # Beside the requests of a group there are those of the lease.
    return s3(connections=AT_ONCE + 2, standing_seconds=_STANDING_SECONDS)


def _of_fsspec(scheme: str) -> Any:
    """The driver that fsspec has for a scheme."""
    import fsspec

    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ValueError as error:
        raise _NoDriver from error
    if _EXTRAS.get(scheme) == "gcs":
        # It logs each error with its traceback, and raises it: it is told here, in words.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if _EXTRAS.get(scheme) == "gcs" and os.environ.get("STORAGE_EMULATOR_HOST"):
        # The other one asks Google, by gRPC and before each request, of which kind the bucket is.
        kind = importlib.import_module("gcsfs.core").GCSFileSystem
    # Listings are never cached: other machines write there too.
    driver = kind(use_listings_cache=False, skip_instance_cache=True)
    if hasattr(driver, "retries"):
        driver.retries = 1  # requests are made again here, where a stop is seen
    return driver


def _version_of(told: Mapping[str, Any]) -> str:
    """What a driver tells of an object that changes when it is replaced."""
    names = ("ETag", "etag", "generation", "md5Hash", "LastModified", "last_modified", "mtime")
    return str(next((told[name] for name in names if told.get(name)), ""))


Item = TypeVar("Item")


def in_parallel(act: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `act` gives for each item, several at a time; after a failure no further one begins.

    An interrupt of the caller waits for none of them: a store that stands still holds a request for
    many seconds. So the threads are not those of an executor, for which the interpreter waits.
    """
    given = [(item, Future[Result]()) for item in items]
    left, over = deque(given), threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                item, result = left.popleft()
            except IndexError:
                return
            try:
                result.set_result(act(item))
            except BaseException as error:
                result.set_exception(error)
                over.set()

    threads = [
        threading.Thread(target=work, name=f"store_{number}", daemon=True)
        for number in range(min(AT_ONCE, len(given)))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        over.set()
    return [result.result() for _, result in given]  # a failure is before those that did not begin
