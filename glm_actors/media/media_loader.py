"""MediaLoader: the cells of media columns to uint8 patches, or to the error that a row's record
will hold.

Owns the order of things: read or fetch, look up equal content, decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from glm_batch.glm_actors.media.decoder import Decoder, Setup
from glm_batch.glm_actors.media.media_source import MediaRules, Url, read_source, url_of
from glm_batch.models.byte_cache import ByteCache
from glm_batch.models.checkpoint.media_config import (
    ImageProcessorConfig,
    MediaKind,
    VideoProcessorConfig,
)
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Encoded, MediaPatches, encoded_digest

if TYPE_CHECKING:
    from glm_batch.glm_actors.media.fetcher import FetchAhead, Fetcher

__all__ = ["CACHE_BYTES", "MediaLoader", "MediaRules"]

CACHE_BYTES = 64 << 20
ERROR_BYTES = 1 << 10  # what an error counts in the cache
FETCHED_AHEAD: dict[MediaKind, int] = {"image": 16, "video": 2}  # bodies that may wait in memory
# The next item of equal content may fare better: the machine may have been out of memory, or very
# slow.
NOT_REMEMBERED = ("decoder_crashed", "media_timeout")

Result = MediaPatches | RowError


class MediaLoader:
    """Loads media under one set of rules; what was loaded before is kept."""

    def __init__(
        self, rules: MediaRules, image: ImageProcessorConfig, video: VideoProcessorConfig
    ) -> None:
        self._rules = rules
        self._configs: dict[MediaKind, ImageProcessorConfig] = {"image": image, "video": video}
        self._decoder = Decoder(
            Setup(
                image=image,
                video=video,
                num_bytes=rules.decode_bytes,
                timeout_s=rules.decode_timeout_s,
            )
        )
        self._fetcher: Fetcher | None = None
        self._results: ByteCache[Result] = ByteCache(CACHE_BYTES)

    def start(self) -> None:
        """Begins to start the decoding process, which else the first item does."""
        self._decoder.start()

    def close(self) -> None:
        """Ends the decoding process and closes connections."""
        self._decoder.close()
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None

    def load(self, parts: Sequence[tuple[MediaKind, object]]) -> list[Result]:
        """One result for each (kind, cell), in order; equal content gives the same object while it
        is remembered.

        URLs are fetched while others are decoded, each once a call. Raises EngineError when no
        decoding process starts.
        """
        urls = [url_of(value) for _, value in parts]
        results: dict[tuple[MediaKind, str], Result] = {}
        with self._fetch_ahead(
            [(kind, url) for (kind, _), url in zip(parts, urls, strict=True) if url]
        ) as bodies:
            return [
                self._load(kind, value, bodies)
                if url is None
                else self._load_once(kind, url, bodies, results)
                for (kind, value), url in zip(parts, urls, strict=True)
            ]

    def _fetch_ahead(
        self, urls: list[tuple[MediaKind, str]]
    ) -> AbstractContextManager[FetchAhead | None]:
        if not urls or not self._rules.allows_urls:
            return nullcontext()
        # a network client, which most jobs do not need
        from glm_batch.glm_actors.media.fetcher import FetchAhead, Fetcher

        self._fetcher = self._fetcher or Fetcher(self._rules)
        ahead = min(FETCHED_AHEAD[kind] for kind, _ in urls)
        return FetchAhead(self._fetcher, [url for _, url in urls], ahead=ahead)

    def _load_once(
        self,
        kind: MediaKind,
        url: str,
        bodies: FetchAhead | None,
        results: dict[tuple[MediaKind, str], Result],
    ) -> Result:
        if (kind, url) not in results:
            results[kind, url] = self._load(kind, url, bodies)
        return results[kind, url]

    def _load(self, kind: MediaKind, value: object, bodies: FetchAhead | None) -> Result:
        try:
            source = read_source(value, self._rules)
            if isinstance(source, Url):
                # read_source lets no URL through that the rules do not allow
                assert bodies is not None
                source = bodies.take(source.text)
            if isinstance(source, bytes | memoryview):
                return self._decoded(kind, source)
            with source:
                return self._decoded(kind, source)
        except RowError as error:
            return error

    def _decoded(self, kind: MediaKind, data: Encoded) -> Result:
        try:
            digest = encoded_digest(kind, data, self._configs[kind])
        except OSError as error:
            raise RowError(
                "media_not_found", f"the file cannot be read: {error.strerror}"
            ) from error
        result = self._results.get(digest)
        if result is None:
            result = self._decode(kind, data, digest)
        return result

    def _decode(self, kind: MediaKind, data: Encoded, digest: str) -> Result:
        try:
            media = self._decoder.decode(kind, data, digest)
        except RowError as error:
            if error.code not in NOT_REMEMBERED:
                self._results.put(digest, error, ERROR_BYTES)
            return error
        self._results.put(digest, media, media.patches.nbytes)
        return media
