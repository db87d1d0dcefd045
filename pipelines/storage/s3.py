"""Objects of an S3 store: whole and ranged reads, writes, conditional creation, listing in pages,
deletion.

Owns the retries: a call that a store or a network failed is repeated with growing pauses, each with
its reason in the log, and what came back is measured before it is believed. The connection is made
in the process that uses it, so that a description travels to workers. Every failure that stays is
an OSError.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random_exponential,
)

from glm_batch.pipelines.job import StorageSection

TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
CONNECTIONS = 32
READ_AHEAD_BYTES = 1 << 20
PART_BYTES = 16 << 20  # of an object that is written piece by piece; a store takes 10,000 of them
PAGE_KEYS = 1000
PASSING = {
    "SlowDown", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict",
    "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "RequestLimitExceeded",
    "Throttling",
}  # fmt: skip
"""Error codes below status 500 after which another try may go better."""

log = logging.getLogger(__name__)
T = TypeVar("T")


class ChangedError(OSError):
    """An object is not the one that was asked for: it was replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """What a listing or a look at one object says; `etag` changes when the content does."""

    url: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class S3:
    """A store by its options. Objects are named by s3://bucket/key."""

    storage: StorageSection

    def read(
        self, url: str, start: int | None = None, stop: int | None = None, etag: str | None = None
    ) -> bytes:
        """The object, or its bytes [start, stop). Raises ChangedError for another `etag`."""
        if start is not None and start == stop:
            return b""
        wanted = (
            {} if start is None else {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}
        )
        wanted |= {} if etag is None else {"IfMatch": f'"{etag}"'}
        data: bytes = self._call("GET", url, _read_body, **wanted)
        return data

    def write(self, url: str, data: bytes) -> None:
        """Makes or replaces the object, whole or not at all."""
        self.call("PUT", url, "put_object", Body=data)
        self.check_size(url, len(data))

    def check_size(self, url: str, size: int) -> None:
        """Raises OSError when the object that was just written has another one."""
        held = self.look(url).size
        if held != size:
            raise OSError(
                f"{url} has {held} bytes after {size} were written; is someone else writing there?"
            )

    @contextmanager
    def replacing(self, url: str) -> Iterator[Upload]:
        """As `write`, piece by piece; the object stands when the context ends without an error."""
        upload = Upload(self, url)
        try:
            yield upload
            upload.complete()
        except BaseException:
            upload.abort()
            raise

    def create(self, url: str, data: bytes) -> bool:
        """Makes the object unless one stands there. True when it holds `data` because of this call.

        A reply that was lost looks like another writer's work, so what stands there is read: let
        `data` be unique.
        """
        try:
            _patiently(f"PUT {url}", lambda: self._files.pipe_file(url, data, mode="create"))
        except FileExistsError:
            return self.read(url) == data
        return True

    def look(self, url: str) -> Object:
        """Raises FileNotFoundError."""
        reply = self.call("HEAD", url, "head_object")
        return Object(url=url, size=int(reply["ContentLength"]), etag=str(reply["ETag"]).strip('"'))

    def copy(self, source: str, url: str) -> None:
        """Makes the object of another one's bytes, inside the store. Raises FileNotFoundError."""
        bucket, key = _split(source)
        self.call("COPY", url, "copy_object", CopySource={"Bucket": bucket, "Key": key})

    def delete(self, url: str) -> None:
        self.call("DELETE", url, "delete_object")

    def pages(self, prefix: str, *, deep: bool) -> Iterator[tuple[list[Object], list[str]]]:
        """Pages of objects whose name begins with `prefix`, by name, and the folders among them.

        With `deep`, objects in folders are listed themselves.
        """
        token: dict[str, str] = {}
        bucket, _ = _split(prefix)
        while True:
            reply = self._call(
                "LIST",
                prefix,
                _list,
                MaxKeys=PAGE_KEYS,
                **token,
                **({} if deep else {"Delimiter": "/"}),
            )
            found = [
                Object(
                    url=f"s3://{bucket}/{each['Key']}",
                    size=int(each["Size"]),
                    etag=each["ETag"].strip('"'),
                )
                for each in reply.get("Contents", [])
            ]
            folders = [
                f"s3://{bucket}/{each['Prefix']}" for each in reply.get("CommonPrefixes", [])
            ]
            yield found, folders
            if not reply.get("IsTruncated"):
                return
            token = {"ContinuationToken": reply["NextContinuationToken"]}

    def open(self, url: str, size: int, etag: str | None = None) -> ObjectFile:
        """A seekable binary file over ranged reads."""
        return ObjectFile(self, url, size, etag)

    def call(self, verb: str, url: str, method: str, **options: Any) -> Any:
        """One of the store's own methods on an object, by its name there."""
        return self._call(verb, url, _do, method=method, **options)

    def _call(self, verb: str, url: str, call: Callable[..., Any], **options: Any) -> Any:
        from fsspec.asyn import sync

        bucket, key = _split(url)

        def attempt() -> Any:
            files = self._files
            return sync(files.loop, call, files, Bucket=bucket, key=key, **options)

        return _patiently(f"{verb} {url}", attempt)

    @property
    def _files(self) -> Any:
        return _files(self.storage, os.getpid())


class Upload:
    """An object written piece by piece: in one call if small, else in PART_BYTES at a time."""

    def __init__(self, store: S3, url: str) -> None:
        self._store, self._url = store, url
        self._held = bytearray()
        self._size = 0
        self._id: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        self._held += data
        self._size += len(data)
        while len(self._held) >= PART_BYTES:
            self._send(bytes(self._held[:PART_BYTES]))
            del self._held[:PART_BYTES]

    def complete(self) -> None:
        """Makes the object of what was written."""
        if self._id is None:
            self._store.write(self._url, bytes(self._held))
            return
        if self._held:
            self._send(bytes(self._held))
        with suppress(FileNotFoundError):  # a call whose answer was lost has ended the upload
            self._call("complete_multipart_upload", MultipartUpload={"Parts": self._parts})
        self._store.check_size(self._url, self._size)

    def abort(self) -> None:
        """Frees the parts, if the store answers."""
        if self._id is not None:
            with suppress(OSError):
                self._call("abort_multipart_upload")

    def _send(self, data: bytes) -> None:
        if self._id is None:
            self._id = str(
                self._store.call("POST", self._url, "create_multipart_upload")["UploadId"]
            )
        number = len(self._parts) + 1
        reply = self._call("upload_part", PartNumber=number, Body=data)
        self._parts.append({"PartNumber": number, "ETag": reply["ETag"]})

    def _call(self, method: str, **options: Any) -> Any:
        return self._store.call("POST", self._url, method, UploadId=self._id, **options)


class ObjectFile(io.RawIOBase):
    """An object as a file, with some read ahead: readers of Parquet take small steps."""

    def __init__(self, store: S3, url: str, size: int, etag: str | None) -> None:
        self._store, self._url, self._size, self._etag = store, url, size, etag
        self._at = self._begin = 0
        self._held = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if stop <= self._at:
            return b""
        if not self._begin <= self._at <= stop <= self._begin + len(self._held):
            ahead = min(max(stop, self._at + READ_AHEAD_BYTES), self._size)
            self._begin, self._held = (
                self._at,
                self._store.read(self._url, self._at, ahead, self._etag),
            )
        data = self._held[self._at - self._begin : stop - self._begin]
        self._at = stop
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@lru_cache(maxsize=4)
def _files(storage: StorageSection, process: int) -> Any:
    """This process's connection, without retries of its own: they are blind to short reads."""
    from s3fs import S3FileSystem

    files = S3FileSystem(
        anon=storage.anon,
        endpoint_url=storage.endpoint_url,
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "max_pool_connections": CONNECTIONS,
        },
    )
    files.retries = 1
    return files


async def _read_body(files: Any, key: str, **options: Any) -> bytes:
    reply = await files._call_s3("get_object", Key=key, **options)
    async with reply["Body"] as body:
        data: bytes = await body.read()
    if len(data) != reply["ContentLength"]:
        raise ConnectionError(f"{len(data)} of {reply['ContentLength']} bytes came")
    return data


async def _do(files: Any, key: str, method: str, **options: Any) -> Any:
    return await files._call_s3(method, Key=key, **options)


async def _list(files: Any, key: str, **options: Any) -> Any:
    return await files._call_s3("list_objects_v2", Prefix=key, **options)


def _patiently(what: str, attempt: Callable[[], T]) -> T:
    """Calls until it goes well, TRIES times at most. Every error that gets out is an OSError."""

    def try_once() -> T:
        try:
            return attempt()
        except Exception as raised:  # whatever the layers below may raise: told apart here
            error = _translated(what, raised)
            raise error from error.__cause__

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        reason, number = _reason(state.outcome.exception()), state.attempt_number
        told = f"{what}: try {number} of {TRIES} failed ({reason}); again in"
        log.warning("%s %.1f s", told, state.upcoming_sleep)

    half = {"multiplier": FIRST_PAUSE_S / 2, "max": LONGEST_PAUSE_S / 2}
    return Retrying(
        stop=stop_after_attempt(TRIES),
        wait=wait_exponential(**half) + wait_random_exponential(**half),
        retry=retry_if_exception(_may_pass),
        before_sleep=tell,
        reraise=True,
    )(try_once)


def _translated(what: str, error: Exception) -> OSError:
    from botocore.exceptions import NoCredentialsError

    code, status = _reply(error)
    if code == "PreconditionFailed" and what.startswith("GET"):
        return _caused(ChangedError(f"{what[4:]} is no longer what it was"), error)
    if code == "PreconditionFailed":
        return _caused(FileExistsError(f"{what}: it exists"), error)
    if status == 404 or isinstance(error, FileNotFoundError):
        return _caused(FileNotFoundError(f"{what}: there is none"), error)
    if isinstance(error, NoCredentialsError):
        return _caused(
            PermissionError(
                f"{what}: no credentials; set AWS_ACCESS_KEY_ID and such, or storage.anon"
            ),
            error,
        )
    if isinstance(error, OSError):
        return error
    return _caused(OSError(f"{what}: {type(error).__name__}: {error}"), error)


def _caused(error: OSError, cause: Exception) -> OSError:
    error.__cause__ = cause
    return error


def _response(error: BaseException | None) -> Any:
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return {}


def _reply(error: BaseException | None) -> tuple[str, int]:
    """Error code and HTTP status of the store's answer; ("", 0) when there was none."""
    response = _response(error)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _may_pass(error: BaseException) -> bool:
    """Whether another try may go better: the store said so, or no whole answer came."""
    code, status = _reply(error)
    if status:
        return code in PASSING or status in (408, 429) or (status >= 500 and status != 501)
    return not isinstance(error, PermissionError) and _is_of_transport(error)


def _is_of_transport(error: BaseException | None) -> bool:
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError
    from urllib3.exceptions import IncompleteRead

    kinds = (
        ConnectionError, TimeoutError, asyncio.TimeoutError, asyncio.IncompleteReadError,
        HTTPClientError, BotoConnectionError, ClientError, ResponseParserError, FSTimeoutError,
        IncompleteRead,
    )  # fmt: skip
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__
    return False


def _reason(error: BaseException | None) -> str:
    code, status = _reply(error)
    cause = error.__cause__ if error is not None and error.__cause__ is not None else error
    return f"{status} {code}" if status else type(cause).__name__


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key
