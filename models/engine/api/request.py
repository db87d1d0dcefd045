"""The engine's vocabulary: what is asked (Request) and what comes back (Completion)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from glm_batch.models.errors import RowError
from glm_batch.models.processing.patches import Media

FinishReason = Literal["stop", "length", "scored", "error", "abort"]
Priority = Literal[0, 1]
ONLINE: Priority = 0  # somebody waits for it
BATCH: Priority = 1  # may take what the others leave
GREEDY_BELOW = 1e-5  # temperature: in float32 one token has all the probability anyway
MAX_TOP = 100  # alternatives that are reported at one position


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen."""

    temperature: float = 0.0  # 0 is greedy; otherwise each request draws from `seed`
    top_p: float = 1.0  # the likeliest tokens up to this probability; 1 is all
    top_k: int = 0  # so many of the likeliest tokens; 0 is all
    min_p: float = 0.0  # tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # of prompt and output; 1 is none
    presence_penalty: float = 0.0  # of the output alone
    frequency_penalty: float = 0.0  # of the output alone
    max_tokens: int = 64  # of the output
    min_tokens: int = 0  # before the output may end
    seed: int = 0  # in a job, each row has one of its own that follows from it
    n: int = 1  # outputs for a prompt
    stop: tuple[str, ...] = ()  # strings that end an output
    stop_token_ids: tuple[int, ...] = ()  # tokens that end an output
    ignore_eos: bool = False  # go on after the model would have ended
    # alternatives to report at each output token; from 1 on, the chosen one's, too
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, wrong, rule in (
            ("temperature", not 0.0 <= self.temperature < float("inf"), ">= 0"),
            ("top_p", not 0.0 < self.top_p <= 1.0, "in (0, 1]"),
            ("top_k", self.top_k < 0, ">= 0 (0 switches it off)"),
            ("min_p", not 0.0 <= self.min_p <= 1.0, "in [0, 1]"),
            (
                "repetition_penalty",
                not 0.0 < self.repetition_penalty < float("inf"),
                "> 0 (1 switches it off)",
            ),
            ("presence_penalty", not -10.0 <= self.presence_penalty <= 10.0, "in [-10, 10]"),
            ("frequency_penalty", not -10.0 <= self.frequency_penalty <= 10.0, "in [-10, 10]"),
            ("max_tokens", self.max_tokens < 1, ">= 1"),
            ("min_tokens", not 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("n", self.n < 1, ">= 1"),
            ("stop", "" in self.stop, "without empty strings"),
            ("logprobs", not 0 <= self.logprobs <= MAX_TOP, f"in [0, {MAX_TOP}]"),
        ):
            if wrong:
                raise ValueError(f"sampling.{name}={getattr(self, name)!r}: it must be {rule}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """What the output must match: a JSON schema as text, a regular expression, a Lark grammar."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Decode tokens, optionally under a constraint."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choose:
    """Score whole continuations of the prompt without decoding.

    `choices` are the continuations' token ids. With `count_end`, a choice's log-probability
    includes that of the model ending right after it (all EOS ids summed).
    """

    choices: tuple[tuple[int, ...], ...]
    count_end: bool = False

    def __post_init__(self) -> None:
        if not self.choices or not all(self.choices):
            raise ValueError("Choose.choices: at least one choice, and none of them empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Classify:
    """Class logits of a sequence-classification head at the pooled token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """Class logits of a token-classification head at every prompt token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embed:
    """A vector for the prompt from the hidden states after the final norm."""

    pooling: Literal["last", "mean"] = "last"
    normalize: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """Vocabulary logits or hidden states at every prompt position, for tests and inspection."""

    what: Literal["logits", "hidden_states"] = "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The log-probability of each prompt token from `start` on, and of the `top` likeliest."""

    top: int = 0
    start: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.top <= MAX_TOP:
            raise ValueError(f"Score.top={self.top}: it must be in [0, {MAX_TOP}]")
        if self.start < 1:
            raise ValueError(f"Score.start={self.start}: nothing stands before the first token")


Work = Generate | Choose | Classify | Tag | Embed | Inspect | Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and the work to do on it. `id` is unique among the requests in flight.

    In a prompt with media each feature of an image or of a video's frame has a placeholder token of
    its own. With `stream` the engine hands out what Generate writes while it is written: see Delta.
    `priority`: see Engine.
    """

    id: str
    input_ids: SequenceOf[int]
    work: Work
    media: Media | None = None
    stream: bool = False
    priority: Priority = ONLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    """One alternative at one output position."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """`text` ends before the stop string or EOS; `token_ids` hold every sampled id."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a streaming request's output number `index` has gained.

    Joined in order, the deltas of an output make its Output: the texts its `text`, and so on. Half
    a character, and what may yet become a stop string, waits for a later delta. The last one, and
    no other, has a finish_reason; an output that is ended early (abort, error) has none.
    """

    id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptScores:
    """What Score gives: a row for each token that it scores, natural logarithms, likeliest first.

    logprobs: float32 [tokens]; top_ids: int64 [tokens, top]; top_logprobs: float32 [tokens, top].
    """

    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    top_logprobs: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request; every request ends in exactly one of these.

    `outputs` belongs to Generate (n of them), `choice_logprobs` (joint natural logarithms, in the
    order of the choices) to Choose, `scores` to Score, `array` to the rest: float32 [num_labels]
    for Classify, [tokens, num_labels] for Tag, [hidden_size] for Embed, [tokens, vocab_size |
    hidden_size] for Inspect. `error` is set when finish_reason is "error". `num_preemptions` counts
    how often the request lost its KV cache to an older one and was recomputed. `media_tokens` are
    those of the prompt's tokens that stand for images and videos.
    """

    id: str
    finish_reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    outputs: tuple[Output, ...] = ()
    choice_logprobs: tuple[float, ...] | None = None
    array: NDArray[np.float32] | None = None
    scores: PromptScores | None = None
    error: RowError | None = None
    num_preemptions: int = 0
    media_tokens: int = 0


def refuse_known_ids(requests: SequenceOf[Request], in_flight: Iterable[str]) -> None:
    """Raises ValueError for an id that is in flight already, or that two of the requests have."""
    known = set(in_flight)
    for request in requests:
        if request.id in known:
            raise ValueError(f"request id {request.id!r} is in flight already")
        known.add(request.id)
