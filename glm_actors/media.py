"""MediaLoader: the cells of media columns to uint8 patches, or to the error that a row's record will hold.

Owns the order of things: read or fetch, look up equal content, decode. Knows nothing of rows, prompts or Ray; decoders
run in a process of their own, and neither they nor a network client are imported here.
"""

from __future__ import annotations

from collections.abc import Sequence

from glm_actors.decoder import Decoder
from glm_actors.decoder_child import Setup
from glm_actors.media_source import MediaRules, Url, read_source
from models.byte_cache import ByteCache
from models.errors import RowError
from models.normalization import MediaKind
from models.processing.media_config import ImageProcessorConfig, VideoProcessorConfig
from models.processing.patches import Encoded, MediaPatches, encoded_digest

__all__ = ["CACHE_BYTES", "MediaLoader", "MediaRules"]

CACHE_BYTES = 256 << 20
ERROR_BYTES = 1 << 10  # what an error counts in the cache
# The next item of equal content may fare better: the machine may have been out of memory, or very slow.
NOT_REMEMBERED = ("decoder_crashed", "media_timeout")

Result = MediaPatches | RowError


class MediaLoader:
    """Loads media under one set of rules and one configuration for each kind; what was loaded before is kept."""

    def __init__(self, rules: MediaRules, image: ImageProcessorConfig, video: VideoProcessorConfig) -> None:
        self._rules = rules
        self._configs: dict[MediaKind, ImageProcessorConfig] = {"image": image, "video": video}
        self._decoder = Decoder(
            Setup(image=image, video=video, num_bytes=rules.decode_bytes, timeout_s=rules.decode_timeout_s)
        )
        self._results: ByteCache[Result] = ByteCache(CACHE_BYTES)

    def start(self) -> None:
        """Begins to start the decoding process, which takes a second; otherwise the first item does."""
        self._decoder.start()

    def close(self) -> None:
        """Ends the decoding process."""
        self._decoder.close()

    def load(self, parts: Sequence[tuple[MediaKind, object]]) -> list[Result]:
        """One result for each (kind, cell), in order; equal content gives the same object while it is remembered."""
        return [self._load(kind, value) for kind, value in parts]

    def _load(self, kind: MediaKind, value: object) -> Result:
        try:
            source = read_source(value, self._rules)
            if isinstance(source, Url):
                raise RowError("media_forbidden", "URLs are not read; set media.hosts")
            if isinstance(source, bytes | memoryview):
                return self._decoded(kind, source)
            with source:
                return self._decoded(kind, source)
        except RowError as error:
            return error

    def _decoded(self, kind: MediaKind, data: Encoded) -> Result:
        digest = encoded_digest(kind, data, self._configs[kind])
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
