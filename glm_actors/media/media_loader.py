"""MediaLoader: the cells of media columns to uint8 patches, or to the error that a row's record
will hold; and Decoder, the process apart in which bytes are decoded.

Owns the order of things: read or fetch, look up equal content, decode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from glm_batch.glm_actors.faults.child import Answer, Child, ChildError, Json, serve
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

MODULE = "glm_batch.glm_actors.media.media_loader"  # this one
UNREADABLE = ("bad_image", "bad_video")

Decode = Callable[[MediaKind, Encoded, str], MediaPatches]  # kind, media, digest of encoded_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """`num_bytes` is what decoding an item may take beyond what importing the decoders took."""

    image: ImageProcessorConfig
    video: VideoProcessorConfig
    num_bytes: int
    timeout_s: float


class Decoder:
    """Decodes one item at a time, for any thread. `module` is what the process runs."""

    def __init__(self, setup: Setup, *, module: str = MODULE) -> None:
        configs = {"image": asdict(setup.image), "video": asdict(setup.video)}
        self._timeout_s = setup.timeout_s
        self._child = Child(module, configs, num_bytes=setup.num_bytes, timeout_s=setup.timeout_s)

    @property
    def pid(self) -> int | None:
        """The process that decodes, if one was started."""
        return self._child.pid

    def start(self) -> None:
        """Begins to start the process; the first item waits for it."""
        self._child.start()

    def close(self) -> None:
        """Ends the process; a later decode starts another."""
        self._child.close()

    def decode(self, kind: MediaKind, data: Encoded, digest: str) -> MediaPatches:
        """The patches of encoded media whose encoded_digest is `digest`. Raises RowError.

        Raises EngineError when no decoding process can be started at all.
        """
        try:
            reply, body = self._child.ask({"kind": kind, "digest": digest}, data)
        except ChildError as error:
            raise self._row_error(kind, error) from error
        if "error" in reply:
            raise RowError(*reply["error"])
        return MediaPatches(
            kind=kind,
            patches=np.frombuffer(body, np.uint8).reshape(reply["shape"]),
            grid=tuple(reply["grid"]),
            digest=digest,
            source=tuple(reply["source"]),
            timestamps=tuple(reply["timestamps"]),
        )

    def _row_error(self, kind: MediaKind, error: ChildError) -> RowError:
        if error.why == "time":
            took = f"decoding this {kind} took longer than {self._timeout_s:g} s"
            return RowError("media_timeout", f"{took}; shorten it or raise media.decode_timeout_s")
        if error.why == "memory":
            return RowError(
                "media_too_large",
                "decoding takes more memory than decode_bytes allows; shrink it or raise that "
                f"({error.how})",
            )
        return RowError("decoder_crashed", f"the decoder {error.how} at this {kind}")


def make_decode(image: ImageProcessorConfig, video: VideoProcessorConfig) -> Decode:
    """The processors, with all that they will need imported."""
    from glm_batch.models.processing.images import ImageProcessor
    from glm_batch.models.processing.video import VideoProcessor

    if image.resampling == "torch" or video.resampling == "torch":
        import torch

        torch.set_num_threads(1)
    of_image, of_video = ImageProcessor(image), VideoProcessor(video)

    def decode(kind: MediaKind, data: Encoded, digest: str) -> MediaPatches:
        return (of_image if kind == "image" else of_video).from_bytes(data, digest=digest)

    return decode


def main(make_decode: Callable[..., Decode] = make_decode) -> None:
    """Runs in the process."""

    def build(setup: Json) -> Answer:
        decode = make_decode(
            image=ImageProcessorConfig(**_with_tuples(setup["image"])),
            video=VideoProcessorConfig(**_with_tuples(setup["video"])),
        )

        def answer(request: Json, data: Encoded) -> tuple[Json, Any]:
            try:
                media = decode(request["kind"], data, request["digest"])
            except RowError as error:
                return {"error": [error.code, error.message]}, b""
            names = ("grid", "source", "timestamps")
            header = {"shape": media.patches.shape} | {name: getattr(media, name) for name in names}
            return header, media.patches.data.cast("B")

        return answer

    serve(build, UNREADABLE)


def _with_tuples(values: Json) -> Json:
    """JSON has lists only."""
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


if __name__ == "__main__":
    main()

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
