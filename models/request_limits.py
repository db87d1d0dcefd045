"""What one request may ask for, whether a server's client or a line of a batch file makes it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The `limits:` section: what one request may ask for, and how many may be about.

    `max_tokens` bounds what a request may write and is also the default of chat.
    `max_prompt_logprobs` counts those of all prompt tokens and alternatives in an answer,
    `max_pixels` an image's pixels before decoding. URLs are fetched from `media_hosts`, where they
    lead to public addresses, and from `media_private_hosts`, wherever they lead; from nowhere else,
    and all of one request's together have no more than `max_body_bytes`. `fetch_s` is how long one
    may take, `schema_s` is how long a JSON schema may take to compile. `max_queue` counts the
    requests that wait or run in one replica; what comes beyond is told to come again. Times are
    seconds; `drain_s` is how long requests may take to end once the server shall stop.
    """

    max_body_bytes: int = 32 << 20
    max_prompt_chars: int = 1_000_000
    max_tokens: int = 4096
    max_n: int = 8
    max_stop: int = 16
    max_logprobs: int = 20
    max_prompt_logprobs: int = 1_000_000
    max_inputs: int = 256
    max_labels: int = 256
    max_schema_bytes: int = 64 << 10
    max_media: int = 16
    max_media_bytes: int = 24 << 20
    max_pixels: int = 50_000_000
    media_hosts: list[str] = field(default_factory=list)
    media_private_hosts: list[str] = field(default_factory=list)
    max_queue: int = 512
    request_s: float = 600.0
    body_s: float = 30.0
    fetch_s: float = 10.0
    decode_s: float = 30.0
    schema_s: float = 2.0
    drain_s: float = 60.0
