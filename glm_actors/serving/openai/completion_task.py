"""CompletionTask: what follows raw prompts, whole or in chunks, on request after the prompts
themselves.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import bad, of_row
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import CompletionRequest
from glm_batch.glm_actors.serving.openai.work import (
    Json,
    asked_format,
    checked,
    checked_constraint,
    completion_logprobs,
    completion_sampling,
    envelope,
    prompt_logprobs,
    raw_prompts,
    request_of,
    usage_of,
)
from glm_batch.models.engine.api.request import Completion, Delta, Generate, Output, Request, Score
from glm_batch.models.errors import RowError
from glm_batch.models.processing.prompt import Prompt
from glm_batch.models.request_limits import RequestLimits

Lists = dict[str, list[Any]]
NOTHING = Delta(id="", index=0, token_ids=(), text="", finish_reason="length")


class CompletionTask:
    """POST /v1/completions: each of the prompts has n choices, in the prompts' order.

    With `echo` a choice begins with its prompt, and so does its stream. The engine scores the
    prompt's tokens in a request of its own; the one that writes comes after it and finds the prompt
    in the cache.
    """

    def __init__(
        self,
        body: CompletionRequest,
        prompter: RequestPrompter,
        schemas: SchemaChecker,
        caps: RequestLimits,
    ) -> None:
        id = f"cmpl-{uuid.uuid4().hex}"
        self._envelope = envelope(id, "text_completion", body.model)
        self._tokenizer = prompter.tokenizer
        self._gives_ids, self._alternatives = bool(body.return_token_ids), body.logprobs or 0
        self._echo, self._writes = bool(body.echo), body.max_tokens != 0
        self._scores = self._echo and (body.logprobs is not None or not self._writes)
        sampling = completion_sampling(body, caps)
        self._gives_logprobs = body.logprobs is not None
        self._prompts = raw_prompts(body.prompt, prompter, caps, "prompt")
        self._n = sampling.n
        if self._scores:
            self._check_size(caps)
        asked = asked_format(body)
        constraint = checked_constraint(*asked, caps, schemas) if asked else None
        work = Generate(sampling=sampling, constraint=constraint)
        self.requests = [
            request
            for number, prompt in enumerate(self._prompts)
            for request in self._requests(f"{id}-{number}", prompt, work, stream=bool(body.stream))
        ]
        self.first = [request for request in self.requests if isinstance(request.work, Score)]
        writing = [request for request in self.requests if isinstance(request.work, Generate)]
        self._number = {request.id: number for number, request in enumerate(writing)}
        self._shown: dict[int, int] = {}  # characters that a choice's chunks have shown

    def _check_size(self, caps: RequestLimits) -> None:
        """Bounds the answer, which has some numbers for each prompt token and choice."""
        count = (
            sum(len(prompt.input_ids) for prompt in self._prompts)
            * (1 + self._alternatives)
            * self._n
        )
        if count > caps.max_prompt_logprobs:
            most = f"{caps.max_prompt_logprobs:,}"
            raise bad(
                "logprobs",
                f"the answer would hold {count:,} of the prompts' tokens; this server gives {most}",
            )

    def _requests(
        self, id: str, prompt: Prompt, work: Generate, *, stream: bool
    ) -> Iterator[Request]:
        if self._scores:
            yield request_of(f"{id}-prompt", prompt, Score(top=self._alternatives))
        if self._writes:
            yield request_of(id, prompt, work, stream=stream)

    def answer(self, completions: Sequence[Completion]) -> Json:
        done = list(zip(self.requests, checked(completions), strict=True))
        scored = [completion for request, completion in done if isinstance(request.work, Score)]
        written = [completion for request, completion in done if isinstance(request.work, Generate)]
        choices: list[Json] = []
        for number, prompt in enumerate(self._prompts):
            echo = self._prompt_text(prompt) if self._echo else ""
            logprobs = self._prompt_logprobs(prompt, scored[number]) if self._scores else None
            for output in written[number].outputs if written else [NOTHING] * self._n:
                choices.append(self._choice(len(choices), output, len(echo), echo, logprobs))
        return self._envelope | {"choices": choices, "usage": self._usage(scored, written)}

    def begin(self, completions: Sequence[Completion]) -> list[Json]:
        """A chunk for each choice: its prompt, which is all of it where nothing is written."""
        chunks: list[Json] = []
        nothing = replace(NOTHING, finish_reason=None) if self._writes else NOTHING
        for prompt, completion in zip(self._prompts, checked(completions), strict=True):
            echo, logprobs = self._prompt_text(prompt), self._prompt_logprobs(prompt, completion)
            for _ in range(self._n):
                self._shown[len(chunks)] = len(echo)
                choice = self._choice(len(chunks), nothing, len(echo), echo, logprobs)
                chunks.append(self._envelope | {"choices": [choice]})
        return chunks

    def chunks(self, delta: Delta) -> list[Json]:
        number = self._number[delta.id]
        index = number * self._n + delta.index
        echo = (
            self._prompt_text(self._prompts[number])
            if self._echo and index not in self._shown
            else ""
        )
        if not (echo or delta.text or delta.logprobs or self._gives_ids or delta.finish_reason):
            return []
        start = self._shown.get(index, len(echo))
        self._shown[index] = start + len(delta.text)
        return [self._envelope | {"choices": [self._choice(index, delta, start, echo, None)]}]

    def _choice(
        self,
        index: int,
        output: Output | Delta,
        start: int,
        echo: str,
        prompt_logprobs: Lists | None,
    ) -> Json:
        """`echo`, with its log-probabilities, comes before the output, which begins at `start`."""
        text, reason = echo + output.text, output.finish_reason
        choice: Json = {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        if output.logprobs or prompt_logprobs:
            own = completion_logprobs(output, self._tokenizer, self._alternatives, start)
            before = prompt_logprobs or {}
            choice["logprobs"] = {
                name: [*before.get(name, []), *values] for name, values in own.items()
            }
        if self._gives_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.input_ids, skip_special_tokens=False)

    def _prompt_logprobs(self, prompt: Prompt, completion: Completion) -> Lists | None:
        if not self._gives_logprobs:
            return None
        scores = completion.scores
        if scores is None or not np.isfinite(scores.logprobs).all():
            raise of_row(
                RowError("not_finite", "the log-probabilities of the prompt are not finite")
            )
        return prompt_logprobs(
            prompt.input_ids, scores, self._tokenizer, shows_special=prompt.text is None
        )

    def _usage(self, scored: list[Completion], written: list[Completion]) -> Json:
        """The prompt counts once, as what was asked first found it."""
        usage = usage_of(scored or written)
        usage["completion_tokens"] = sum(completion.output_tokens for completion in written)
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        return usage
