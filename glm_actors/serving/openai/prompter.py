"""RequestPrompter: what a request says to prompts for the engine, within limits and allowed hosts.

Blocking; for worker threads.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from glm_batch.glm_actors.media.media_loader import MediaLoader, MediaRules
from glm_batch.glm_actors.media.media_source import url_of
from glm_batch.glm_actors.serving.openai.api_errors import bad
from glm_batch.glm_actors.serving.openai.protocol import PART_HINTS
from glm_batch.glm_actors.serving.openai.tools import check_calls
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.chat import Chat, NoChatTemplateError
from glm_batch.models.processing.messages import MEDIA_PARTS, MediaPart, media_parts
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import Prompt, Prompter, of_part
from glm_batch.models.processing.tool_messages import uses_tools
from glm_batch.models.request_limits import RequestLimits

if TYPE_CHECKING:
    from glm_batch.glm_actors.media.fetcher import Fetcher

FETCHED_AHEAD = 4  # bodies that may wait in memory
ONLY_INLINE = "images and videos are taken as data: URLs alone"
ONLY_ALLOWED = "images and videos are taken as data: URLs, and from hosts that this server allows"
# How PNG, JPEG, GIF, WebP and MP4 begin in base64: a path is never read, so this is none.
BASE64_MEDIA = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "AAAA")
SMALL_PIXELS = 512 * 512  # of an image whose detail is low
LABEL_SETS = 64  # whose tokens are remembered


class RequestPrompter(Prompter):
    """A Prompter that loads media by itself, and refuses what is beyond `limits`."""

    makes_small = True

    def __init__(self, model_dir: str, limits: RequestLimits) -> None:
        """Raises ConfigError for files that cannot be used; a checkpoint may have no chat "
        "template."""
        super().__init__(model_dir)
        self._limits = limits
        with suppress(RowError):
            _ = self.chat
        self._loaders: dict[bool, MediaLoader] = {}  # by whether an image is_small
        self._fetcher: Fetcher | None = None
        self._forbidden = ONLY_INLINE
        self._one_at_a_time = threading.Lock()
        if self.config.vision is not None:
            rules = MediaRules(max_bytes=limits.max_media_bytes, decode_timeout_s=limits.decode_s)
            image = replace(self.media.image, max_source_pixels=limits.max_pixels)
            pixels = SMALL_PIXELS * image.temporal_patch_size  # as many frames an image counts for
            pixels = max(image.min_pixels, min(image.max_pixels, pixels))
            small = replace(image, max_pixels=pixels)
            self._loaders = {
                False: MediaLoader(rules, image, self.media.video),
                True: MediaLoader(rules, small, self.media.video),
            }
            self._allow(limits)
        self._choices = lru_cache(LABEL_SETS)(self._tokenize_labels)

    def _allow(self, caps: RequestLimits) -> None:
        """Opens the way to the network where there are hosts that may be asked."""
        rules = MediaRules(
            hosts=tuple(caps.media_hosts),
            private_hosts=tuple(caps.media_private_hosts),
            max_bytes=caps.max_media_bytes,
            fetch_timeout_s=caps.fetch_s,
        )
        if rules.allows_urls:
            from glm_batch.glm_actors.media.fetcher import Fetcher

            self._fetcher, self._forbidden = Fetcher(rules), ONLY_ALLOWED

    def start(self) -> None:
        """Begins to start the process that decodes images, where the model takes any."""
        if self._loaders:
            self._loaders[False].start()

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
        if self._fetcher:
            self._fetcher.close()

    @cached_property
    def chat(self) -> Chat:
        """Raises RowError for a checkpoint without a chat template."""
        try:
            return super().chat
        except NoChatTemplateError as error:
            raise RowError(
                "unsupported_work", "this model has no chat template; use /v1/completions"
            ) from error

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template tells of functions, and has calls in the form that is read back."""
        if self.tool_form != "glm":
            return False
        tool = {"type": "function", "function": {"name": "probe_tool"}}
        return "probe_tool" in self.chat.render([{"role": "user", "content": "x"}], tools=[tool])

    def raw(self, text: str, param: str = "prompt") -> Prompt:
        """Raw text, between the special tokens that the checkpoint puts around one."""
        self._check_chars(len(text), param)
        return super().raw(text)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        start_answer: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Messages with media, and the functions to call. Raises RowError and ApiError."""
        if (tools or uses_tools(messages)) and not self.takes_tools:
            raise RowError(
                "unsupported_work",
                "this model's chat template has no place for tools: leave them out",
            )
        self._check_chars(_num_json_chars(tools), "tools")
        check_calls(messages)
        messages = [_without_hints(message) for message in messages]
        self._check_chars(sum(map(_num_chars, self.messages(messages))), "messages")
        most = self._limits.max_media
        if (shown := len(media_parts(self.messages(messages)))) > most:
            raise bad("messages", f"they show {shown} images and videos; this server takes {most}")
        draft = self.draft(messages, thinking=thinking, start_answer=start_answer, tools=tools)
        return self.prompt(draft, self._loaded(draft.parts))

    def _loaded(self, parts: Sequence[MediaPart]) -> list[MediaPatches | RowError]:
        if not parts:
            return []
        assert self._loaders, "a model that reads text alone takes no draft with media"
        # first: a slow host holds up nobody else's decoding
        sources = self._fetched(parts)
        loaded: dict[int, MediaPatches | RowError] = {}
        with self._one_at_a_time:
            for is_small, loader in self._loaders.items():
                own = [number for number, part in enumerate(parts) if part.is_small == is_small]
                found = loader.load([(parts[number].kind, sources[number]) for number in own])
                loaded |= zip(own, found, strict=True)
        return [
            self._told(each) if isinstance(each, RowError) else each
            for each in (loaded[number] for number in range(len(parts)))
        ]

    def _fetched(self, parts: Sequence[MediaPart]) -> list[object]:
        """The parts' sources; those at URLs that may be fetched as bodies."""
        sources = [part.source for part in parts]
        urls = [url for source in sources if (url := url_of(source))]
        if self._fetcher is None or not urls:
            return sources
        from glm_batch.glm_actors.media.fetcher import FetchAhead

        bodies: dict[str, memoryview] = {}
        with FetchAhead(self._fetcher, list(dict.fromkeys(urls)), ahead=FETCHED_AHEAD) as ahead:
            for number, source in enumerate(sources):
                url = url_of(source)
                if url and url not in bodies:
                    try:
                        bodies[url] = ahead.take(url)
                    except RowError as error:
                        raise of_part(self._told(error), parts, number) from error
                most = self._limits.max_body_bytes
                if sum(map(len, bodies.values())) > most:
                    raise bad("messages", f"the media have more than {most:,} bytes together")
        return [bodies[url] if (url := url_of(source)) else source for source in sources]

    def _told(self, error: RowError) -> RowError:
        """What a client is told of it: a refused path or host is none of its business."""
        return RowError(error.code, self._forbidden) if error.code == "media_forbidden" else error

    def choices(self, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each label's tokens. Raises ApiError for labels that cannot be scored."""
        return self._choices(tuple(labels))

    def _tokenize_labels(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        try:
            return tuple(self.chat.label_continuations(labels))
        except ConfigError as error:
            raise bad("labels", str(error).removeprefix("task.labels: ")) from error

    def _check_chars(self, num_chars: int, param: str) -> None:
        most = self._limits.max_prompt_chars
        if num_chars > most:
            raise bad(param, f"{num_chars:,} characters; this server takes {most:,}")


def _without_hints(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message whose parts have no hints, and an image of bare base64 as a data: URL."""
    if not isinstance(message.get("content"), list):
        return message
    parts = [
        {
            name: _as_url(value) if name in MEDIA_PARTS else value
            for name, value in part.items()
            if name not in PART_HINTS
        }
        if isinstance(part, Mapping)
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _as_url(value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        return {**value, "url": _as_url(value["url"])}
    if isinstance(value, str) and value.startswith(BASE64_MEDIA):
        return f"data:;base64,{value}"
    return value


def _num_chars(message: Mapping[str, Any]) -> int:
    """Characters that go into the template: all but the media."""
    content = message.get("content")
    if isinstance(content, list):
        return sum(
            len(part["text"])
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return len(content) if isinstance(content, str) else 0


def _num_json_chars(tools: Sequence[Mapping[str, Any]] | None) -> int:
    try:
        return len(json.dumps(tools))
    except (RecursionError, ValueError) as error:
        raise bad("tools", "they are nested too deeply") from error
