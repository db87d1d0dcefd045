"""What one request may ask for, whether a server's client or a line of a batch file makes it."""

from __future__ import annotations

from dataclasses import dataclass, field

CHAT_TOKENS = 4096  # that chat writes at most where neither a request nor `max_tokens` says it


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """The `limits:` section: what one request may ask for, and how many may be about."""

    # of a request; all that its URLs lead to together has no more either
    max_body_bytes: int = 32 << 20
    max_prompt_chars: int = 1_000_000  # characters of a prompt
    # refuses hints that cannot change an answer, which are else taken and told
    strict: bool = False
    max_tokens: int | None = None  # what a request may write; by default up to the context
    max_n: int = 8  # outputs for one prompt
    max_stop: int = 16  # stop strings
    max_logprobs: int = 20  # alternatives at each token
    max_prompt_logprobs: int = 1_000_000  # of all prompt tokens and alternatives in an answer
    max_inputs: int = 2048  # prompts or texts in one request
    max_labels: int = 256  # labels of /v1/score
    max_schema_bytes: int = 64 << 10  # of a JSON schema
    max_media: int = 16  # images and videos in one request
    max_media_bytes: int = 24 << 20  # of each
    max_pixels: int = 50_000_000  # an image's, before decoding
    # hosts that URLs are fetched from, where they lead to public addresses
    media_hosts: list[str] = field(default_factory=list)
    # hosts that URLs are fetched from, wherever they lead
    media_private_hosts: list[str] = field(default_factory=list)
    max_queue: int = 512  # requests that wait or run in one replica; more are told to come again
    request_s: float = 600.0  # seconds for a request
    body_s: float = 30.0  # seconds for a body to arrive
    fetch_s: float = 10.0  # seconds for a URL
    decode_s: float = 30.0  # seconds for an image or video
    schema_s: float = 2.0  # seconds for a JSON schema to compile
    drain_s: float = 60.0  # seconds for requests to end once the server shall stop
