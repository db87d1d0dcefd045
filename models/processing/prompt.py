"""Prompter: texts and conversations to what an engine's Request needs, for jobs, server and Python.

Media are loaded by whoever may read them, between `draft` and `prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.media_config import ImageProcessorConfig, VideoProcessorConfig
from glm_batch.models.checkpoint.model_config import MediaTokens, ModelConfig, VisionConfig
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.budget import num_media_tokens
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.messages import MediaPart, Message, media_parts
from glm_batch.models.processing.patches import Media, MediaPatches
from glm_batch.models.processing.positions import (
    VideoSpan,
    expand_placeholders,
    media_token_types,
    rope_positions,
    tokenizer_media_tokens,
)
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.models.processing.tool_messages import ToolForm, in_form, tool_form, uses_tools


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What goes to the engine: token ids, and the media that they show, in the prompt's order.

    `patches` are those media as they were loaded; `text` is what a prompt of raw text was made of.
    """

    input_ids: Sequence[int]
    media: Media | None = None
    patches: tuple[MediaPatches, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draft:
    """A conversation whose media are not loaded yet: one placeholder stands for each of `parts`."""

    input_ids: list[int]
    parts: list[MediaPart]


class Prompter:
    """One checkpoint's way from what is said to what the engine takes. Threads may share it."""

    makes_small = False  # whether images of `detail: low` have a budget of their own

    def __init__(self, model_dir: str, tokenizer: Tokenizer | None = None) -> None:
        self.model_dir = model_dir
        self.config = load_config(model_dir)
        self.tokenizer = tokenizer or Tokenizer.from_dir(model_dir)

    @cached_property
    def chat(self) -> Chat:
        """Raises ConfigError for a checkpoint without a chat template that can be used."""
        return Chat.from_dir(self.model_dir, self.tokenizer)

    @cached_property
    def media(self) -> MediaPrompts:
        """Raises ConfigError for a model that reads text alone, or whose files contradict."""
        return MediaPrompts.from_dir(self.model_dir, self.tokenizer)

    @cached_property
    def tool_form(self) -> ToolForm:
        """How the chat template reads calls of functions and their results."""
        return tool_form(self.chat)

    def raw(self, text: str) -> Prompt:
        """Raw text, between the special tokens that the checkpoint puts around one."""
        return Prompt(input_ids=self.tokenizer.encode_raw(text), text=text)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation as the template reads it: tool calls in its form, developers as system.

        Raises RowError for calls and results that make no sense.
        """
        known = [
            {**message, "role": "system"}
            if isinstance(message, Mapping) and message.get("role") == "developer"
            else message
            for message in messages
        ]
        return in_form(known, self.tool_form) if uses_tools(known) else known

    def draft(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = False,
        start_answer: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Draft:
        """The options are those of Chat.prompt_ids. Raises RowError for messages of no use."""
        messages = self.messages(messages)
        parts = media_parts(messages)
        if parts and self.config.vision is None:
            architecture = self.config.architecture
            raise RowError(
                "unsupported_media", f"{architecture} reads text only: leave out its media"
            )
        if any(part.is_small for part in parts) and not self.makes_small:
            problem = "detail 'low' cannot be asked for; one pixel budget holds for all images"
            raise RowError("bad_messages", problem)
        ids = self.chat.prompt_ids(
            messages, thinking=thinking, start_answer=start_answer, tools=tools
        )
        return Draft(input_ids=ids, parts=parts)

    def prompt(self, draft: Draft, loaded: Sequence[MediaPatches | RowError]) -> Prompt:
        """`loaded` are the media of the draft's parts. Raises the RowError of the first without."""
        assert len(loaded) == len(draft.parts)
        patches = []
        for number, media in enumerate(loaded):
            if isinstance(media, RowError):
                raise of_part(media, draft.parts, number)
            patches.append(media)
        if not patches:
            return Prompt(input_ids=draft.input_ids)
        ids, placed = self.media.place(draft.input_ids, patches)
        return Prompt(input_ids=ids, media=placed, patches=tuple(patches))

    def render(self, messages: Sequence[Message], *, thinking: bool = False) -> str:
        """The prompt as text for people. Raises RowError."""
        return self.chat.render(self.messages(messages), thinking=thinking)

    def unprinted(self, messages: Sequence[Message]) -> list[str]:
        """What the messages say and the template leaves out: fields, and roles of whole messages.

        Each is taken out of the conversation to see whether its prompt stays as it was.
        """
        whole = self.render(messages)
        fields = (name for each in messages for name, value in each.items() if value is not None)
        without: dict[str, list[Message]] = {
            # a message may say nothing else
            name: [
                {key: each[key] for key in each if key != name}
                | ({"content": ""} if each.get("content") is None else {})
                for each in messages
            ]
            for name in dict.fromkeys(fields)
            if name not in ("role", "content", "tool_call_id")
        }
        for role in dict.fromkeys(each["role"] for each in messages):
            without[f"role {role}"] = [each for each in messages if each["role"] != role]
        return [name for name, fewer in without.items() if fewer and self._is(whole, fewer)]

    def _is(self, text: str, messages: Sequence[Message]) -> bool:
        try:
            return self.render(messages) == text
        except RowError:
            return False


def of_part(error: RowError, parts: Sequence[MediaPart], number: int) -> RowError:
    """The error of one of a prompt's media, saying which it is where there are several."""
    which = f"{parts[number].kind} {number + 1} of {len(parts)}: " if len(parts) > 1 else ""
    return RowError(error.code, which + error.message)


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
        """Raises ConfigError for a model that reads text alone, or whose files contradict."""
        config = load_config(model_dir)
        if config.vision is None:
            raise ConfigError(
                f"{model_dir}: {config.architecture} reads text alone; images and videos need a "
                "GLM-4.1V checkpoint"
            )
        tokens = tokenizer_media_tokens(tokenizer)
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
        """The prompt with a token for each feature, and its media with their positions.

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
        """Tokens that stand for the media themselves, without what is around them."""
        return sum(num_media_tokens(item.grid, self.image.merge_size) for item in media)


def _check_ids(model_dir: str, config: ModelConfig, tokens: MediaTokens) -> None:
    for field in fields(tokens):
        name = f"{field.name}_token_id"
        wanted, found = getattr(config.media_tokens, field.name), getattr(tokens, field.name)
        if wanted != found:
            raise ConfigError(
                f"{Path(model_dir) / 'config.json'}: {name} is {wanted}, in tokenizer.json that "
                f"token is {found}; "
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
                f"{where} has {name} {own}, config.json's vision_config {models}; they must be "
                "equal: restore the "
                "checkpoint's preprocessor_config.json"
            )
