"""LLM: the few-line Python door to one checkpoint, for one-off use and for tests.

Each call runs until its own requests are done. The caller is trusted: paths in messages are read
wherever they lie, and media are decoded in this process.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.checkpoint.config_reader import load_config
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine import build_engine
from glm_batch.models.engine.api.interface import Engine, EngineConfig
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Embed,
    Generate,
    Inspect,
    Output,
    Request,
    SamplingParams,
    Tag,
    Work,
)
from glm_batch.models.errors import RowError
from glm_batch.models.processing.images import ImageProcessor
from glm_batch.models.processing.messages import MediaPart
from glm_batch.models.processing.patches import Media, MediaPatches
from glm_batch.models.processing.prompt import MediaPrompts, Prompter
from glm_batch.models.processing.scores import class_scores, label_scores, softmax
from glm_batch.models.processing.tokenizer import Tokenizer
from glm_batch.models.processing.video import VideoProcessor

TextOrIds = str | Sequence[int]
Messages = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A label, its probability, all probabilities, and that of saying something else."""

    label: str
    probability: float
    label_probs: dict[str, float]
    off_set_mass: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedToken:
    """One token of a tagged text; `start` and `end` are character offsets into it."""

    text: str
    start: int
    end: int
    label: str
    score: float


class LLM:
    """A loaded checkpoint. Prompts are chat messages (a string is one user message) or, where named
    so, raw text.

    The media that messages show are given as bytes or a local path, an image also as uint8 [height,
    width, 3] in RGB: {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type":
    "text", "text": "Which shape is it?"}]}.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Kind "auto" is torch, which does every kind of work."""
        if config.kind == "auto":
            config = replace(config, kind="torch")
        engine: Any = build_engine(config)
        self.engine: Engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.config: ModelConfig = load_config(config.model)
        self.prompter = Prompter(config.model, self.tokenizer)
        self._ids = itertools.count()

    def chat(self, messages: Messages, *, thinking: bool = False, **options: Any) -> str:
        """The assistant's answer, without its reasoning; `options` are those of `generate`."""
        start_answer = "schema" in options or "regex" in options
        work = _generation(**options, n=1)
        request = self._conversation(messages, work, thinking=thinking, start_answer=start_answer)
        return self.prompter.chat.split_reasoning(
            self.run([request])[0].outputs[0].text, thinking=thinking
        )[1]

    def generate(
        self,
        prompt: TextOrIds,
        *,
        schema: str | None = None,
        regex: str | None = None,
        sampling: SamplingParams | None = None,
        **params: Any,
    ) -> tuple[Output, ...]:
        """Continues raw text or token ids, `n` times; `params` are fields of SamplingParams."""
        work = _generation(schema=schema, regex=regex, sampling=sampling, **params)
        return self.run([self._request(prompt, work)])[0].outputs

    def choose(
        self, messages: Messages, labels: Sequence[str], *, end_of_label: str = "auto"
    ) -> Choice:
        """Probabilities of the labels as answers, without decoding."""
        choices = tuple(self.prompter.chat.label_continuations(list(labels)))
        work = Choose(
            choices=choices, count_end=self.prompter.chat.count_end(choices, end_of_label)
        )
        (completion,) = self.run([self._conversation(messages, work)])
        found = label_scores(completion.choice_logprobs or ())
        return Choice(
            label=labels[found.best],
            probability=found.probabilities[found.best],
            label_probs=dict(zip(labels, found.probabilities, strict=True)),
            off_set_mass=found.off_set_mass,
        )

    def classify(self, text: TextOrIds) -> dict[str, float]:
        """Class probabilities (or the regression value) of raw text by a classification head."""
        logits = self._array(text, Classify()).astype(np.float64)
        names = self.config.id2label
        scores, _ = class_scores(logits, names, self.config.inferred_problem_type)
        return dict(zip(names, scores, strict=True))

    def tag(self, text: str) -> list[TaggedToken]:
        """One label a token of raw text, with character offsets."""
        ids, offsets = self.tokenizer.encode_raw_with_offsets(text)
        probabilities = softmax(self._array(ids, Tag()).astype(np.float64))
        return [
            TaggedToken(
                text=text[start:end],
                start=start,
                end=end,
                label=self.config.id2label[row.argmax()],
                score=row.max(),
            )
            for (start, end), row in zip(offsets, probabilities, strict=True)
            if end > start
        ]

    def embed(
        self, text: TextOrIds, *, pooling: str = "last", normalize: bool = False
    ) -> NDArray[np.float32]:
        """[hidden_size]: the last token's hidden state or the mean over all tokens of raw text."""
        return self._array(text, Embed(pooling=pooling, normalize=normalize))  # type: ignore[arg-type]

    def logits(self, input_ids: Sequence[int]) -> NDArray[np.float32]:
        """[tokens, vocab_size] at every position."""
        return self._array(input_ids, Inspect(what="logits"))

    def hidden_states(self, input_ids: Sequence[int]) -> NDArray[np.float32]:
        """[tokens, hidden_size] after the final norm at every position."""
        return self._array(input_ids, Inspect(what="hidden_states"))

    def run(self, requests: list[Request]) -> list[Completion]:
        """Runs requests together, in their order. Raises the RowError of the first that failed."""
        self.engine.submit(requests)
        done: dict[str, Completion] = {}
        # others may be left of an interrupted call
        while not all(request.id in done for request in requests):
            done |= {completion.id: completion for completion in self.engine.step()}
        completions = [done[request.id] for request in requests]
        for completion in completions:
            if completion.error:
                raise completion.error
        return completions

    def close(self) -> None:
        self.engine.close()

    def _array(self, prompt: TextOrIds, work: Work) -> NDArray[np.float32]:
        array = self.run([self._request(prompt, work)])[0].array
        assert array is not None
        return array

    def _request(self, prompt: TextOrIds, work: Work, media: Media | None = None) -> Request:
        ids = self.tokenizer.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        return Request(id=f"llm-{next(self._ids)}", input_ids=ids, work=work, media=media)

    def _conversation(
        self, messages: Messages, work: Work, *, thinking: bool = False, start_answer: bool = False
    ) -> Request:
        """Raises RowError for messages or media that cannot be used."""
        messages = (
            [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        )
        draft = self.prompter.draft(messages, thinking=thinking, start_answer=start_answer)
        loaded = [_patches(part, self.prompter.media) for part in draft.parts]
        prompt = self.prompter.prompt(draft, loaded)
        return self._request(prompt.input_ids, work, prompt.media)


def _generation(
    *,
    schema: str | None = None,
    regex: str | None = None,
    sampling: SamplingParams | None = None,
    **params: Any,
) -> Generate:
    constraint = None
    if schema is not None or regex is not None:
        constraint = Constraint(
            kind="regex" if schema is None else "json_schema",
            text=str(regex if schema is None else schema),
        )
    return Generate(sampling=replace(sampling or SamplingParams(), **params), constraint=constraint)


def _patches(part: MediaPart, prompts: MediaPrompts) -> MediaPatches:
    source = part.source
    if isinstance(source, MediaPatches):
        return source
    images = ImageProcessor(prompts.image)
    if isinstance(source, np.ndarray) and part.kind == "image":
        return images.from_array(source)
    data = _read(source)
    return (
        images.from_bytes(data)
        if part.kind == "image"
        else VideoProcessor(prompts.video).from_bytes(data)
    )


def _read(source: object) -> bytes:
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str | os.PathLike):
        raise RowError(
            "wrong_type",
            f"{type(source).__name__} is no image or video; give bytes or a local path",
        )
    try:
        return Path(source).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowError(
            "media_not_found", f"{str(source)[:200]}: {reason}; give bytes or a local path"
        ) from error
