"""MediaRules: where a job's media may come from, and what loading one may cost.

Owns the reading of host names and what "the same host" means. Imports nothing heavy; opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from glm_batch.models.errors import ConfigError

DEFAULT_PORTS = {"http": 80, "https": 443}

Endpoint = tuple[str, int]  # a host's name as DNS has it, in lower case, and a port


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaRules:
    """Paths lie below `root`. URLs are read from `hosts`, at globally routable addresses alone, and
    from `private_hosts` at any address.

    A host is a name exactly as URLs have it, without wildcards; it allows the ports 80 and 443, and
    "name:port" that port alone. `max_bytes` is the size of one encoded image or clip,
    `decode_bytes` the memory that decoding one may take. Raises ConfigError.
    """

    root: str | None = None
    hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    max_bytes: int = 1 << 30
    fetch_timeout_s: float = 30.0
    decode_timeout_s: float = 600.0
    decode_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        endpoints([*self.hosts, *self.private_hosts])
        for name in ("max_bytes", "fetch_timeout_s", "decode_timeout_s", "decode_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"media.{name}: {getattr(self, name)!r}; it must be above 0")

    @property
    def allows_urls(self) -> bool:
        return bool(self.hosts or self.private_hosts)


def endpoints(hosts: Iterable[str]) -> frozenset[Endpoint]:
    """What the names of allowed hosts allow. Raises ConfigError for what is no name."""
    found: set[Endpoint] = set()
    for host in hosts:
        try:
            parts = urlsplit(f"//{host}")
            if not parts.hostname or parts.netloc != host or "@" in host or "*" in host:
                raise ValueError("write a name as example.org or example.org:8080")
            ports = DEFAULT_PORTS.values() if parts.port is None else [parts.port]
            found |= {(ascii_host(parts.hostname), port) for port in ports}
        except ValueError as error:
            raise ConfigError(f"media.hosts: {host!r} is no host: {error}") from error
    return frozenset(found)


def ascii_host(name: str) -> str:
    """A host's name as DNS and certificates have it. Raises ValueError for what is none."""
    return name.encode("idna").decode("ascii").lower().removesuffix(".")
