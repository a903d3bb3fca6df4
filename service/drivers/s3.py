"""The requests to S3 that runs and data sets need, by botocore.

The methods are named as those of fsspec's drivers, so they replace fsspec's driver of S3. That one
sends and receives all bytes in one event loop, and asks for the size of an object before it reads
it: docs/explanation/performance.md has the figures.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from io import BytesIO
from typing import Any

_BLOCK_BYTES = 1 << 18
"""What is received by one system call at most: it is still in the cache when it is hashed."""
_SMALL_BYTES = 1 << 17
"""What is sent by one system call. A larger body is sent in blocks, each with its own timeout."""


def s3(*, connections: int, standing_seconds: float) -> S3:
    """A client with the credentials, region and endpoint that botocore finds.

    Args:
        connections: how many are kept open.
        standing_seconds: how long a connection may take no byte, and give none.
    Raises:
        ImportError: botocore is not installed.
        BotoCoreError: its configuration cannot be read.
    """
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    # The setting for stores that do not know the headers of checksums.
    with_hashes = session.get_config_variable("request_checksum_calculation") != "when_required"
    # The signature of a request covers its headers, and so the hash of the body in them. Some
    # buckets demand more, which the user has set then.
    is_set = "payload_signing_enabled" in (session.get_config_variable("s3") or {})
    config = Config(
        connect_timeout=standing_seconds,
        read_timeout=standing_seconds,
        max_pool_connections=connections,
        tcp_keepalive=True,
        # Requests are made again by the caller: a client that does so too would delay a stop.
        retries={"max_attempts": 0},
        # What needs it is compared with its SHA-256 by the caller.
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False} if with_hashes and not is_set else None,
    )
    return S3(session, config, with_hashes=with_hashes)


class S3:
    """A client of one endpoint, which any thread may use. It is made by the first request."""

    def __init__(self, session: Any, config: Any, *, with_hashes: bool) -> None:
        """`with_hashes`: whether the store compares what it gets with its SHA-256."""
        self._session = session
        self._config = config
        self._with_hashes = with_hashes
        self._making = threading.Lock()
        self._made: Any = None

    def pipe_file(
        self,
        path: str,
        content: bytes,
        *,
        mode: str = "overwrite",
        timeout: float,
        sha256: str | None = None,
    ) -> None:
        """Write an object.

        Args:
            mode: `create` writes only if there is no object of this name.
            timeout: how many seconds it may take.
            sha256: of the content, if it is known already.
        Raises:
            FileExistsError: there is one, and `mode` is `create`.
        """
        told: dict[str, Any] = {"IfNoneMatch": "*"} if mode == "create" else {}
        if self._with_hashes:
            digest = bytes.fromhex(sha256) if sha256 else hashlib.sha256(content).digest()
            told["ChecksumSHA256"] = base64.b64encode(digest).decode()
        body = content if len(content) <= _SMALL_BYTES else _Body(content, seconds=timeout)
        self._of_object("put_object", path, Body=body, **told)

    def cat_file(
        self, path: str, *, start: int | None = None, end: int | None = None, timeout: float
    ) -> bytes:
        """The content of an object, or its bytes from `start` to `end`.

        Raises:
            FileNotFoundError: there is none.
            OSError: it ends before `start`.
        """
        if start is not None and end is not None and end <= start:
            return b""
        last = "" if end is None else end - 1
        part = {} if start is None else {"Range": f"bytes={start}-{last}"}
        return b"".join(self.blocks(path, timeout=timeout, **part))

    def blocks(self, path: str, *, timeout: float, **part: str) -> Iterator[bytes]:
        """The content of an object, block by block as it arrives.

        Args:
            timeout: how many seconds it may take, with what the caller does between two blocks.
        Raises:
            FileNotFoundError: there is none.
            ConnectionResetError: only a part of it has arrived.
        """
        over = time.monotonic() + timeout
        answer = self._of_object("get_object", path, **part)
        length, come = answer.get("ContentLength"), 0  # a gateway may send no length
        with answer["Body"] as body:
            # `read` would wait for a whole block, also if each second brings one byte.
            while block := body.read1(_BLOCK_BYTES):
                come += len(block)
                yield block
                _require_before(over)
        if length is not None and come < length:
            raise ConnectionResetError(
                errno.ECONNRESET, f"the answer ended {length - come:,} bytes before its end", path
            )

    def find(self, path: str, *, detail: bool, timeout: float) -> dict[str, dict[str, Any]]:
        """All objects below the directory `path`; if there are none, the object of this name."""
        over = time.monotonic() + timeout
        bucket, _, key = path.partition("/")
        found: dict[str, dict[str, Any]] = {}
        for page in self._pages(path, Prefix=f"{key}/" if key else ""):
            found |= _files_of(page, bucket)
            _require_before(over)
        if found or not key:
            return found
        # The names of a list are in order, so the shortest one with this prefix is the first.
        page = self._ask("list_objects_v2", path, Bucket=bucket, Prefix=key, MaxKeys=1)
        return {name: told for name, told in _files_of(page, bucket).items() if name == path}

    def find_after(self, path: str, *, after: str, timeout: float) -> dict[str, dict[str, Any]]:
        """The objects below the directory `path` whose names come after this one."""
        over = time.monotonic() + timeout
        bucket, _, key = path.partition("/")
        start = after.partition("/")[2]
        found: dict[str, dict[str, Any]] = {}
        for page in self._pages(path, Prefix=f"{key}/" if key else "", StartAfter=start):
            found |= _files_of(page, bucket)
            _require_before(over)
        return found

    def ls(self, path: str, *, detail: bool) -> list[str]:
        """The names one level below a directory."""
        bucket, _, key = path.partition("/")
        names = []
        for page in self._pages(path, Prefix=f"{key}/" if key else "", Delimiter="/"):
            names += [f"{bucket}/{each['Prefix']}" for each in page.get("CommonPrefixes", ())]
            names += _files_of(page, bucket)
        return names

    def modified(self, path: str) -> datetime:
        """When an object was written."""
        written: datetime = self._of_object("head_object", path)["LastModified"]
        return written

    def age(self, path: str) -> float | None:
        """How many seconds ago an object was written, by the clock of the store; None if unknown.

        Raises:
            FileNotFoundError: there is none.
        """
        told = self._of_object("head_object", path)
        try:
            now = parsedate_to_datetime(told["ResponseMetadata"]["HTTPHeaders"]["date"])
            seconds: float = (now - told["LastModified"]).total_seconds()
        except (KeyError, ValueError, TypeError):
            return None
        return max(0.0, seconds)

    def rm_file(self, path: str, *, timeout: float) -> None:
        """Delete an object; one that does not exist counts as deleted."""
        self._of_object("delete_object", path)

    def call_s3(self, method: str, **told: Any) -> Mapping[str, Any]:
        """The answer to any other request."""
        answer: Mapping[str, Any] = getattr(self._client(), method)(**told)
        return answer

    def _pages(self, path: str, **told: Any) -> Iterator[Mapping[str, Any]]:
        """The answers to a list of objects, of a thousand names each."""
        told["Bucket"] = path.partition("/")[0]
        while True:
            page = self._ask("list_objects_v2", path, **told)
            yield page
            if not page.get("IsTruncated"):
                return
            told["ContinuationToken"] = page["NextContinuationToken"]

    def _of_object(self, method: str, path: str, **told: Any) -> Any:
        """The answer to a request for one object."""
        bucket, _, key = path.partition("/")
        return self._ask(method, path, Bucket=bucket, Key=key, **told)

    def _ask(self, method: str, path: str, **told: Any) -> Any:
        """The answer to a request; `path` is for the words of an error."""
        from botocore.exceptions import ClientError

        try:
            return getattr(self._client(), method)(**told)
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(errno.ENOENT, "there is no such object", path) from error
            if code in ("PreconditionFailed", "412"):
                raise FileExistsError(errno.EEXIST, "there is such an object", path) from error
            if code in ("InvalidRange", "416"):
                raise OSError(errno.EINVAL, "the object is shorter", path) from error
            raise

    def _client(self) -> Any:
        with self._making:
            if self._made is None:
                self._made = self._session.create_client("s3", config=self._config)
            return self._made


@cache
def _loader() -> Any:
    """What reads botocore's descriptions of services: 70 ms the first time."""
    from botocore.loaders import create_loader

    return create_loader()


class _Body(BytesIO):
    """Bytes to send, which fail when that takes too long."""

    def __init__(self, content: bytes, *, seconds: float) -> None:
        super().__init__(content)
        self._over = time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        _require_before(self._over)
        return super().read(size)


def _require_before(over: float) -> None:
    if time.monotonic() > over:
        raise TimeoutError(errno.ETIMEDOUT, "the request takes too long")


def _files_of(page: Mapping[str, Any], bucket: str) -> dict[str, dict[str, Any]]:
    """What a list tells of its objects; one whose name ends with a slash stands for a directory."""
    return {
        f"{bucket}/{each['Key']}": {"size": each["Size"], "ETag": each.get("ETag")}
        for each in page.get("Contents", ())
        if not each["Key"].endswith("/")
    }
