"""Answer: the protocol of a kind of work, from a request's admission to its completion.

TorchEngine makes an answer's sequences, asks it which rows of a step it wants and what to read off
them (`wanted`, `read`), and hands it the numbers (`take`). VllmEngine asks it for the prompts that
vLLM shall run (`forks`) and hands it what came back. Both end with its `fields` of the Completion.
EchoEngine, which has no model, asks for nothing but `echo`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.checkpoint.model_config import Head, ModelConfig
from glm_batch.models.engine.api.request import Delta, Generate, Request
from glm_batch.models.engine.decoding.constraints import Constraints
from glm_batch.models.engine.scheduling.placeholders import PlacedMedia
from glm_batch.models.engine.scheduling.sequence import Sequence
from glm_batch.models.engine.works.readout import ReadoutBuilder, StepOutput, Wanted
from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import MediaItem
from glm_batch.models.processing.tokenizer import Tokenizer

W = TypeVar("W")
Fields = dict[str, Any]
DIGEST_BYTES = 4  # of each media item's digest, as much as EchoEngine's answers depend on


class Context:
    """What answers must know of the engine that gives them.

    `deltas` collects what streaming requests gain.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, max_model_len: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.deltas: list[Delta] = []

    @cached_property
    def constraints(self) -> Constraints:
        return Constraints(self.tokenizer)


class ForkMaker(Protocol):
    """The ways to ask vLLM: see models.engine.vllm.vllm_forks. A fork is one prompt for it."""

    def sample(self, work: Generate, index: int, max_tokens: int, *, stream: bool) -> Any:
        """Tokens drawn after the prompt, for `decodings[index]` of a GenerateAnswer."""
        ...

    def score(self, suffix: tuple[int, ...], key: int, ids: SequenceOf[int]) -> list[Any]:
        """The log-probabilities of ids after prompt and suffix, for `add_scores(key, ...)`."""
        ...

    def prompt(self, start: int, top: int) -> Any:
        """What is known of the prompt's tokens from `start` on, for the answer's `add_piece`."""
        ...

    def pool(self, task: str, num_tokens: int | None = None) -> Any:
        """A pooling task's rows for the prompt, or its first `num_tokens`: for `add_rows`."""
        ...


class Answer(ABC, Generic[W]):
    """One request's work and what has come back for it so far.

    head: what the checkpoint must have, None where any will do. num_skippable: leading prompt
    tokens that need not be computed when they are cached, because nobody wants their hidden states.
    num_more: tokens that the model must take after the prompt; num_held: those that the cache must
    hold.
    """

    head: Head | None = None
    num_skippable = 0
    num_more = 0
    num_held = 0

    def __init__(self, request: Request, prompt: list[int], context: Context) -> None:
        self.request, self.prompt, self.context = request, prompt, context
        self.work: W = request.work  # type: ignore[assignment]

    def check(self) -> None:
        """Raises RowError for work that no engine could do; see also works.admission."""

    def sequences(self, media: PlacedMedia | None) -> list[Sequence]:
        """What TorchEngine computes. Raises RowError for what cannot be begun."""
        return [self.sequence(media)]

    def sequence(self, media: PlacedMedia | None, **options: Any) -> Sequence:
        """The prompt alone; `options` are further fields of Sequence."""
        return Sequence(
            request=self.request,
            answer=self,
            num_prompt=len(self.prompt),
            media=media,
            **({"tokens": list(self.prompt)} | options),
        )

    @abstractmethod
    def wanted(self, sequence: Sequence, start: int, end: int) -> SequenceOf[int]:
        """The tokens within [start, end) whose final hidden states are needed."""

    @abstractmethod
    def read(
        self, sequence: Sequence, indices: SequenceOf[int], rows: range, readout: ReadoutBuilder
    ) -> Any:
        """Asks for what is read off the rows of the tokens `indices`; returns Wanted.where."""

    @abstractmethod
    def take(self, want: Wanted, output: StepOutput) -> bool:
        """A step's numbers; True where the sequence needs no more. Raises RowError.

        They may come again from the first token on: the sequence may have lost its cache to an
        older one.
        """

    def forks(self, maker: ForkMaker) -> list[Any]:
        """What VllmEngine runs. Raises RowError for what vLLM cannot do."""
        raise RowError(
            "unsupported_work",
            f"{type(self.work).__name__} is not read from vLLM; use engine.kind torch",
        )

    @abstractmethod
    def fields(self, *, aborted: bool) -> Fields:
        """What the Completion says of the work, finish_reason among it."""

    echo: ClassVar[Any]  # a static method (work, EchoPrompt) -> Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoPrompt:
    """What EchoEngine's answers are made of. `decode` gives the text of token ids."""

    ids: list[int]
    items: tuple[MediaItem, ...]
    decode: Any
    hidden_size: int
    num_labels: int

    @property
    def seen(self) -> list[bytes]:
        return [item.digest[:DIGEST_BYTES] for item in self.items]

    @property
    def shift(self) -> int:
        """What the media change."""
        return sum(map(int.from_bytes, self.seen))

    def vector(self, width: int) -> NDArray[np.float32]:
        """One for the whole prompt."""
        phase = (sum(self.ids) + self.shift) % 97
        return np.cos(np.arange(width, dtype=np.float32) + phase).astype(np.float32)

    def vectors(self, width: int) -> NDArray[np.float32]:
        """One for each token."""
        phases = np.array(self.ids, np.float32)[:, None] + self.shift % 97
        waves: NDArray[np.float32] = np.cos(np.arange(width, dtype=np.float32) + phases)
        return waves.astype(np.float32)
