"""Fetcher: the only way to the network for media. Allowed hosts, checked addresses, bounded bytes
and time.

Owns which address may be connected to, redirects and repeated tries. Sends neither cookies nor
credentials, and no proxy of the environment is used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import httpcore
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from glm_batch.glm_actors.media.media_source import (
    DEFAULT_PORTS,
    Endpoint,
    MediaRules,
    ascii_host,
    endpoints,
)
from glm_batch.models.errors import RowError

NUM_THREADS = 16
MAX_REDIRECTS = 3
MAX_TRIES = 3
BACKOFF_S = 0.5  # before the second try; twice that before the third
REDIRECTS = (301, 302, 303, 307, 308)
RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)
HEADERS = [("Accept", "*/*"), ("Accept-Encoding", "identity"), ("User-Agent", "glm-batch")]
SHOWN = 100  # characters of a URL in a message

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_UNRESERVED = "%/:@!$&'()*+,;=~?"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class _TryAgainError(Exception):
    """This try failed in a way in which the next one may not."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL taken apart; from here on nothing parses its text again."""

    scheme: str
    host: str
    port: int
    path: str  # with the query

    @property
    def url(self) -> httpcore.URL:
        return httpcore.URL(scheme=self.scheme, host=self.host, port=self.port, target=self.path)


class Fetcher:
    """Fetches URLs under a job's rules, from several threads; connections are kept."""

    def __init__(self, rules: MediaRules, *, ssl_context: ssl.SSLContext | None = None) -> None:
        self._rules = rules
        private = endpoints(rules.private_hosts)
        self._allowed = private | endpoints(rules.hosts)
        self._clock = _Clock()
        self._network = _GuardedNetwork(private, self._clock)
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context or httpcore.default_ssl_context(),
            max_connections=NUM_THREADS,
            keepalive_expiry=15.0,
            network_backend=self._network,
        )
        self.threads = ThreadPoolExecutor(NUM_THREADS, "media-fetch")

    def close(self) -> None:
        """Closes what is open; fetches under way end first."""
        self.threads.shutdown(cancel_futures=True)
        self._pool.close()
        self._network.close()

    def fetch(self, url: str) -> memoryview:
        """The body at a URL. Raises RowError: media_forbidden, media_not_found, media_too_large,
        media_fetch_failed.
        """
        self._clock.start(self._rules.fetch_timeout_s)
        try:
            return self._try_often(url)
        except _OutOfTime as error:
            limit = f"{self._rules.fetch_timeout_s:g} s"
            raise RowError(
                "media_fetch_failed", f"{shown(url)}: not here after {limit}; {error}"
            ) from error

    def _try_often(self, url: str) -> memoryview:
        retrying = Retrying(
            retry=retry_if_exception_type(_TryAgainError),
            stop=stop_after_attempt(MAX_TRIES),
            wait=wait_exponential(BACKOFF_S) + wait_random(0, BACKOFF_S),
            before_sleep=self._clock.refuse_sleep,
            reraise=True,
        )
        try:
            return retrying(self._follow, url)
        except _TryAgainError as error:
            message = f"{shown(url)}: {error}, {MAX_TRIES} times"
            raise RowError("media_fetch_failed", message) from error

    def _follow(self, url: str) -> memoryview:
        for _ in range(MAX_REDIRECTS + 1):
            found = self._get(self._target(url), url)
            if isinstance(found, memoryview):
                return found
            url = urljoin(url, found)
        raise RowError(
            "media_fetch_failed",
            f"more than {MAX_REDIRECTS} redirects, the last one to {shown(url)}",
        )

    def _target(self, url: str) -> _Target:
        """Where a URL points to. Raises RowError unless the job allows it."""
        try:
            parts = urlsplit(url)
            host, port = (
                ascii_host(parts.hostname or ""),
                parts.port or DEFAULT_PORTS.get(parts.scheme, 0),
            )
        except ValueError as error:
            raise RowError(
                "media_fetch_failed", f"{shown(url)} is no valid URL: {error}"
            ) from error
        if (
            parts.scheme not in DEFAULT_PORTS
            or parts.username is not None
            or parts.password is not None
        ):
            raise RowError(
                "media_forbidden",
                f"{shown(url)}: only http and https URLs without a user are fetched",
            )
        if (host, port) not in self._allowed:
            raise RowError(
                "media_forbidden",
                f"{shown(url)}: {host}:{port} is not allowed; name it in media.hosts",
            )
        return _Target(parts.scheme, host, port, _path_and_query(parts))

    def _get(self, target: _Target, url: str) -> memoryview | str:
        """The body, or the redirect's location."""
        try:
            with self._pool.stream(
                "GET", target.url, headers=_headers(target), extensions=self._clock.limits()
            ) as reply:
                return self._read(reply, url)
        except (
            httpcore.TimeoutException,
            httpcore.NetworkError,
            httpcore.RemoteProtocolError,
        ) as error:
            self._clock.left(f"the last try failed with {_name(error)}")
            raise _TryAgainError(f"the connection failed with {_name(error)}") from error
        except (httpcore.LocalProtocolError, httpcore.UnsupportedProtocol) as error:
            raise RowError(
                "media_fetch_failed", f"{shown(url)} cannot be asked for: {error}"
            ) from error

    def _read(self, reply: httpcore.Response, url: str) -> memoryview | str:
        headers = {name.lower(): value.decode("latin-1") for name, value in reply.headers}
        if reply.status in REDIRECTS and b"location" in headers:
            return headers[b"location"]
        if reply.status in RETRIED_STATUSES:
            raise _TryAgainError(f"the server answered {reply.status}")
        if reply.status in (404, 410):
            raise RowError("media_not_found", f"{shown(url)}: the server answered {reply.status}")
        if reply.status != 200:
            raise RowError(
                "media_fetch_failed", f"{shown(url)}: the server answered {reply.status}"
            )
        if headers.get(b"content-encoding", "identity").lower() != "identity":
            raise RowError(
                "media_fetch_failed",
                f"{shown(url)}: the server sent compressed bytes without being asked",
            )
        length = headers.get(b"content-length", "0")
        self._check_size(int(length) if length.isdecimal() else 0, url)
        body = bytearray()
        for piece in reply.iter_stream():
            body += piece
            self._check_size(len(body), url)
        return memoryview(body)

    def _check_size(self, num_bytes: int, url: str) -> None:
        if num_bytes > self._rules.max_bytes:
            limit = f"{self._rules.max_bytes:,}"
            raise RowError(
                "media_too_large",
                f"{shown(url)} has more than {limit} bytes; raise media.max_bytes",
            )


class FetchAhead:
    """Fetches URLs in order, and holds `ahead` bodies at most that were not asked for."""

    def __init__(self, fetcher: Fetcher, urls: Iterable[str], *, ahead: int = NUM_THREADS) -> None:
        self._fetcher = fetcher
        self._ahead = ahead
        self._left = iter(dict.fromkeys(urls))
        self._begun: dict[str, Future[memoryview]] = {}

    def __enter__(self) -> FetchAhead:
        self._begin(self._ahead)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for future in self._begun.values():
            future.cancel()

    def take(self, url: str) -> memoryview:
        """The body at a URL; asking in order keeps others coming. Raises as Fetcher.fetch does."""
        begun = self._begun.pop(url, None)
        if begun is None:
            return self._fetcher.fetch(url)
        try:
            return begun.result()
        finally:
            self._begin(1)

    def _begin(self, count: int) -> None:
        for url in islice(self._left, count):
            self._begun[url] = self._fetcher.threads.submit(self._fetcher.fetch, url)


class _OutOfTime(Exception):
    """The deadline of this fetch is over."""


class _Clock:
    """The deadline of the fetch that runs on this thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    def start(self, seconds: float) -> None:
        self._local.deadline = time.monotonic() + seconds

    def left(self, doing: str) -> float:
        """Seconds, above 0. Raises _OutOfTime."""
        left: float = self._local.deadline - time.monotonic()
        if left <= 0:
            raise _OutOfTime(doing)
        return left

    def refuse_sleep(self, state: RetryCallState) -> None:
        """Raises _OutOfTime where the next try would come too late."""
        reason = str(state.outcome and state.outcome.exception())
        if state.upcoming_sleep >= self.left(reason):
            raise _OutOfTime(reason)

    def limits(self) -> dict[str, Any]:
        """As httpcore wants to be told; the streams below keep the deadline for all the rest."""
        return {"timeout": {"pool": self.left("no connection was free")}}


class _GuardedNetwork(httpcore.NetworkBackend):
    """Resolves a name once, checks every address that came back, and connects to one of these."""

    def __init__(self, private: frozenset[Endpoint], clock: _Clock) -> None:
        self._private = private
        self._clock = clock
        self._network = httpcore.SyncBackend()
        # a resolver cannot be told a deadline
        self._resolvers = ThreadPoolExecutor(NUM_THREADS, "media-resolve")

    def close(self) -> None:
        """Waits for no look-up that is under way."""
        self._resolvers.shutdown(wait=False)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = self._resolve(host, port)
        if (host, port) not in self._private:
            for address in addresses:
                if not is_global(address):
                    raise RowError(
                        "media_forbidden",
                        f"{host} resolves to {address}, which is not globally routable; if that "
                        "is meant, name it in "
                        "media.private_hosts",
                    )
        return self._connect(addresses, port)

    def _resolve(self, host: str, port: int) -> list[str]:
        future = self._resolvers.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = future.result(self._clock.left(f"looking up {host}"))
        except FutureTimeoutError:
            raise _OutOfTime(f"the look-up of {host} takes too long") from None
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be looked up: {error}") from error
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def _connect(self, addresses: list[str], port: int) -> httpcore.NetworkStream:
        """To the first address that answers; each gets its share of the time left."""
        failure: Exception = httpcore.ConnectError("the name has no address")
        for number, address in enumerate(addresses):
            share = self._clock.left("connecting") / (len(addresses) - number)
            try:
                return _GuardedStream(
                    self._network.connect_tcp(address, port, timeout=share), self._clock
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _GuardedStream(httpcore.NetworkStream):
    """A connection on which every wait ends at the deadline of the fetch that uses it."""

    def __init__(self, stream: httpcore.NetworkStream, clock: _Clock) -> None:
        self._stream = stream
        self._clock = clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._clock.left("the server was still sending"))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._clock.left("sending the request"))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(
            ssl_context, server_hostname, self._clock.left("the TLS handshake")
        )
        return _GuardedStream(secured, self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def is_global(text: str) -> bool:
    """Whether an address, or an IPv4 address inside it, is one of the public internet."""
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif address.sixtofour is not None:
            address = address.sixtofour
        elif address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def shown(url: str) -> str:
    """A URL for a message: short, without the query or user, which may hold a secret."""
    plain = url.partition("?")[0].partition("#")[0]
    scheme, mark, rest = plain.partition("://")
    authority, slash, path = rest.partition("/")
    plain = scheme + mark + authority.rpartition("@")[2] + slash + path
    return repr(plain if len(plain) <= SHOWN else plain[:SHOWN] + "...")


def _path_and_query(parts: SplitResult) -> str:
    query = f"?{parts.query}" if parts.query else ""
    return quote((parts.path or "/") + query, safe=_UNRESERVED)


def _headers(target: _Target) -> list[tuple[str, str]]:
    host = f"[{target.host}]" if ":" in target.host else target.host
    port = "" if target.port == DEFAULT_PORTS[target.scheme] else f":{target.port}"
    return [("Host", host + port), *HEADERS]


def _name(error: Exception) -> str:
    return f"{type(error).__name__} ({error})" if str(error) else type(error).__name__
