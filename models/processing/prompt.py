"""From a prompt with placeholders and the patches of its media to what an engine's Request needs.

Owns the agreement of a checkpoint's files about media: the ids of the model and of the tokenizer,
the patches of the processors and of the vision tower. Knows nothing of messages, bytes, rows or
engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import ModelConfig, VisionConfig
from glm_batch.models.engine.api.request import Media
from glm_batch.models.errors import ConfigError
from glm_batch.models.processing.budget import num_media_tokens
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.positions import (
    MediaTokens,
    VideoSpan,
    expand_placeholders,
    media_token_types,
    rope_positions,
)
from glm_batch.models.processing.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPrompts:
    """How one checkpoint takes media into a prompt. Build it with `from_dir`.

    `image` and `video` are the processors' configurations; a budget of one's own goes in with
    dataclasses.replace.
    """

    image: ImageProcessorConfig
    video: VideoProcessorConfig
    tokens: MediaTokens
    tokenizer: Tokenizer

    @classmethod
    def from_dir(cls, model_dir: str, tokenizer: Tokenizer) -> MediaPrompts:
        """Raises ConfigError for a model that reads text alone, and where the checkpoint's files
        contradict.
        """
        config = load_config(model_dir)
        if config.vision is None:
            raise ConfigError(
                f"{model_dir}: {config.architecture} reads text alone; images and videos need a GLM-4.1V checkpoint"
            )
        tokens = MediaTokens.from_tokenizer(tokenizer)
        _check_ids(model_dir, config, tokens)
        image, video = (
            ImageProcessorConfig.from_dir(model_dir),
            VideoProcessorConfig.from_dir(model_dir),
        )
        for name, processor in (("image", image), ("video", video)):
            _check_patches(f"{model_dir}: the {name} processor", processor, config.vision)
        return cls(image=image, video=video, tokens=tokens, tokenizer=tokenizer)

    def place(
        self, ids: Sequence[int], media: Sequence[MediaPatches]
    ) -> tuple[list[int], Media | None]:
        """The prompt with a token for each feature, and its media with rotary positions int64 [3,
        tokens].

        `ids` hold one placeholder for each of `media`, which stand in the prompt's order. Without
        any, no Media. Raises RowError media_mismatch when there are not as many placeholders of a
        kind as media.
        """
        merge = self.image.merge_size
        images = [item.grid for item in media if item.kind == "image"]
        videos = [
            VideoSpan(grid=item.grid, timestamps=item.timestamps)
            for item in media
            if item.kind == "video"
        ]
        encode = self.tokenizer.encode
        expanded = expand_placeholders(
            ids, tokens=self.tokens, merge_size=merge, images=images, videos=videos, encode=encode
        )
        if not media:
            return expanded, None
        types = media_token_types(expanded, self.tokens)
        grids = [video.grid for video in videos]
        positions, _ = rope_positions(types, merge_size=merge, images=images, videos=grids)
        return expanded, Media(items=tuple(item.item for item in media), positions=positions)

    def num_tokens(self, media: Sequence[MediaPatches]) -> int:
        """Tokens that stand for the media themselves, without the markers and timestamps around
        them.
        """
        return sum(num_media_tokens(item.grid, self.image.merge_size) for item in media)


def _check_ids(model_dir: str, config: ModelConfig, tokens: MediaTokens) -> None:
    for field in fields(tokens):
        name = f"{field.name}_token_id"
        wanted, found = getattr(config.media_tokens, name), getattr(tokens, field.name)
        if wanted != found:
            raise ConfigError(
                f"{Path(model_dir) / 'config.json'}: {name} is {wanted}, in tokenizer.json that token is {found}; "
                "restore the file that does not belong to this checkpoint"
            )


def _check_patches(where: str, processor: ImageProcessorConfig, vision: VisionConfig) -> None:
    for name, own, models in (
        ("patch_size", processor.patch_size, vision.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size),
        ("merge_size", processor.merge_size, vision.spatial_merge_size),
    ):
        if own != models:
            raise ConfigError(
                f"{where} has {name} {own}, config.json's vision_config {models}; they must be equal: restore the "
                "checkpoint's preprocessor_config.json"
            )
