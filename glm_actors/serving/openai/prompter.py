"""Prompter: texts and conversations of requests to token ids and media, for one checkpoint and
under one set of caps.

Owns what a prompt may hold: how long, how many images, from where. Blocking; for worker threads.
Knows nothing of what is asked about the prompt.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from glm_batch.glm_actors.media.media_loader import MediaLoader, MediaRules
from glm_batch.glm_actors.media.media_source import url_of
from glm_batch.glm_actors.serving.openai.api_errors import bad
from glm_batch.glm_actors.serving.openai.tools import for_template, takes_tools, uses_tools
from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.engine.api.request import Media
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.chat import Chat
from glm_batch.models.processing.messages import media_parts
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import MediaPrompts
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.models.request_limits import RequestLimits

if TYPE_CHECKING:
    from glm_batch.glm_actors.media.fetcher import Fetcher

FETCHED_AHEAD = 4  # bodies that may wait in memory
ONLY_INLINE = "images and videos are taken as data: URLs alone"
ONLY_ALLOWED = "images and videos are taken as data: URLs, and from hosts that this server allows"
LABEL_SETS = 64  # whose tokens are remembered


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What goes to the engine. `text` is what it was made of, where that was a raw text."""

    input_ids: Sequence[int]
    media: Media | None = None
    text: str | None = None


class Prompter:
    """One checkpoint's way from what a request says to what the engine takes. Several threads may
    use it.
    """

    def __init__(self, model_dir: str, caps: RequestLimits) -> None:
        """Raises ConfigError for a checkpoint whose files cannot be used. One without a chat
        template has no chat.
        """
        self.config = load_config(model_dir)
        self.tokenizer = Tokenizer.from_dir(model_dir)
        self._caps = caps
        self._chat = _chat_of(model_dir, self.tokenizer)
        self._media: MediaPrompts | None = None
        self._loader: MediaLoader | None = None
        self._fetcher: Fetcher | None = None
        self._forbidden = ONLY_INLINE
        self._one_at_a_time = threading.Lock()
        if self.config.vision is not None:
            self._media = MediaPrompts.from_dir(model_dir, self.tokenizer)
            rules = MediaRules(max_bytes=caps.max_media_bytes, decode_timeout_s=caps.decode_s)
            image = replace(self._media.image, max_source_pixels=caps.max_pixels)
            self._loader = MediaLoader(rules, image, self._media.video)
            self._allow(caps)
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
        if self._loader:
            self._loader.start()

    def close(self) -> None:
        if self._loader:
            self._loader.close()
        if self._fetcher:
            self._fetcher.close()

    @property
    def chat(self) -> Chat:
        """Raises RowError for a checkpoint without a chat template."""
        if self._chat is None:
            raise RowError(
                "unsupported_work", "this model has no chat template; use /v1/completions"
            )
        return self._chat

    @cached_property
    def takes_tools(self) -> bool:
        return takes_tools(self.chat)

    def raw(self, text: str, param: str) -> Prompt:
        """Raw text, between the special tokens that the checkpoint puts around one."""
        self._check_chars(len(text), param)
        return Prompt(input_ids=self.tokenizer.encode_raw(text), text=text)

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        start_answer: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Messages with their images and videos, and the functions that may be called. Raises
        RowError and ApiError.
        """
        if (tools or uses_tools(messages)) and not self.takes_tools:
            raise RowError(
                "unsupported_work",
                "this model's chat template has no place for tools: leave them out",
            )
        self._check_chars(_num_json_chars(tools), "tools")
        messages = [_with_known_role(message) for message in for_template(messages)]
        parts = media_parts(messages)
        self._check_chars(sum(map(_num_chars, messages)), "messages")
        if len(parts) > self._caps.max_media:
            raise bad(
                "messages",
                f"they show {len(parts)} images and videos; this server takes {self._caps.max_media}",
            )
        ids = self.chat.prompt_ids(
            messages, thinking=thinking, start_answer=start_answer, tools=tools
        )
        if not parts:
            return Prompt(input_ids=ids)
        if self._media is None or self._loader is None:
            raise RowError(
                "unsupported_media",
                f"{self.config.architecture} reads text only: leave out the media",
            )
        # first: a slow host holds up nobody else's decoding
        sources = self._fetched([part.source for part in parts])
        with self._one_at_a_time:
            loaded = self._loader.load(
                [(part.kind, source) for part, source in zip(parts, sources, strict=True)]
            )
        ids, media = self._media.place(
            ids, [self._checked(i, item, len(loaded)) for i, item in enumerate(loaded)]
        )
        return Prompt(input_ids=ids, media=media)

    def _fetched(self, sources: list[object]) -> list[object]:
        """The sources with the bodies at their URLs in place of these, where any may be fetched."""
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
                        self._checked(number, error, len(sources))
                if sum(map(len, bodies.values())) > self._caps.max_body_bytes:
                    raise bad(
                        "messages",
                        f"the media have more than {self._caps.max_body_bytes:,} bytes together",
                    )
        return [bodies[url] if (url := url_of(source)) else source for source in sources]

    def _checked(self, number: int, item: MediaPatches | RowError, count: int) -> MediaPatches:
        """One of `count` media. Raises RowError for what could not be loaded."""
        if isinstance(item, RowError):
            which = f"medium {number + 1} of {count}: " if count > 1 else ""
            raise RowError(
                item.code,
                which + (self._forbidden if item.code == "media_forbidden" else item.message),
            )
        return item

    def choices(self, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each label's tokens as the model would write it. Raises ApiError for labels that cannot
        be scored.
        """
        return self._choices(tuple(labels))

    def _tokenize_labels(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        try:
            return tuple(self.chat.label_continuations(labels))
        except ConfigError as error:
            raise bad("labels", str(error).removeprefix("task.labels: ")) from error

    def _check_chars(self, num_chars: int, param: str) -> None:
        if num_chars > self._caps.max_prompt_chars:
            raise bad(
                param,
                f"{num_chars:,} characters; this server takes {self._caps.max_prompt_chars:,}",
            )


def _chat_of(model_dir: str, tokenizer: Tokenizer) -> Chat | None:
    try:
        return Chat.from_dir(model_dir, tokenizer)
    except ConfigError as error:
        if "no chat template" in str(error):
            return None
        raise


def _with_known_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's newer name of the system's role, as templates know it."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


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
