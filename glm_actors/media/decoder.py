"""Decoder: media decoded in a process apart, so that a crash, a hang or a bomb costs one item.

The process runs this module too; decoders are imported there alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from glm_batch.glm_actors.faults.child import Answer, Child, ChildError, Json, serve
from glm_batch.models.checkpoint.media_config import (
    ImageProcessorConfig,
    MediaKind,
    VideoProcessorConfig,
)
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Encoded, MediaPatches

MODULE = "glm_batch.glm_actors.media.decoder"  # this one
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
