"""ChatTask: a conversation's answer, whole or in chunks, with its reasoning and its calls of
functions apart.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import bad
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import ChatRequest
from glm_batch.glm_actors.serving.openai.tools import CallStream, tools_of
from glm_batch.glm_actors.serving.openai.work import (
    Json,
    asked_format,
    chat_logprobs,
    chat_sampling,
    checked,
    checked_constraint,
    envelope,
    request_of,
    usage_of,
)
from glm_batch.models.engine.api.request import Completion, Delta, Generate, Output, Request
from glm_batch.models.processing.chat import REASONING_TAGS, Chat
from glm_batch.models.request_limits import RequestLimits

NEXT_CALL = "<|assistant|>"  # what a model of 0414 writes between two calls


class ChatTask:
    """POST /v1/chat/completions"""

    first: Sequence[Request] = ()

    def __init__(
        self,
        body: ChatRequest,
        prompter: RequestPrompter,
        schemas: SchemaChecker,
        caps: RequestLimits,
        *,
        thinking: bool,
    ) -> None:
        id = f"chatcmpl-{uuid.uuid4().hex}"
        self._envelope = envelope(
            id, "chat.completion.chunk" if body.stream else "chat.completion", body.model
        )
        self._tokenizer, self._chat = prompter.tokenizer, prompter.chat
        self._gives_ids, self._alternatives = bool(body.return_token_ids), body.top_logprobs or 0
        self._tools = tools_of(body)
        asked = asked_format(body)
        param, constraint = self._tools.held_to(asked, prompter.chat) or asked or ("", None)
        if constraint is not None:
            constraint = checked_constraint(param, constraint, caps, schemas)
        self._thinking = _thinks(body, thinking, constrained=constraint is not None)
        prompt = prompter.conversation(
            body.messages,
            thinking=self._thinking,
            # which a call is not: it follows the prompt at once
            start_answer=asked is not None and constraint == asked[1],
            tools=self._tools.for_template(),
        )
        sampling = chat_sampling(body, caps)
        if self._tools.one_call and NEXT_CALL in self._tokenizer.control_tokens:
            ends = (*sampling.stop_token_ids, *self._tokenizer.encode_control(NEXT_CALL))
            sampling = replace(sampling, stop_token_ids=ends)
        work = Generate(sampling=sampling, constraint=constraint)
        self.requests = [request_of(id, prompt, work, stream=bool(body.stream))]
        self._streams: dict[int, tuple[ReasoningStream, CallStream]] = {}

    def answer(self, completions: Sequence[Completion]) -> Json:
        (completion,) = checked(completions)
        choices = [self._choice(index, output) for index, output in enumerate(completion.outputs)]
        return self._envelope | {"choices": choices, "usage": usage_of(completions)}

    def begin(self, completions: Sequence[Completion]) -> list[Json]:
        return []

    def chunks(self, delta: Delta) -> list[Json]:
        message: Json = {}
        if delta.index not in self._streams:
            streams = ReasoningStream(self._chat, thinking=self._thinking), CallStream(self._tools)
            self._streams[delta.index] = streams
            message = {"role": "assistant", "content": ""}
        of_reasoning, of_calls = self._streams[delta.index]
        last = delta.finish_reason is not None
        reasoning, content = of_reasoning.add(delta.text, last=last)
        content, calls = of_calls.add(content, last=last)
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"content": content} if content else {}
        if calls:
            message["tool_calls"] = [
                {"index": number} | call.shown() for number, call in enumerate(calls)
            ]
        reason = self._tools.finish_reason(calls, delta.finish_reason)
        choice: Json = {
            "index": delta.index,
            "delta": message,
            "finish_reason": reason,
            "logprobs": None,
        }
        if delta.logprobs:
            choice["logprobs"] = chat_logprobs(delta, self._tokenizer, self._alternatives)
        if self._gives_ids:
            choice["token_ids"] = list(delta.token_ids)
        if (
            not message
            and not delta.logprobs
            and not self._gives_ids
            and delta.finish_reason is None
        ):
            return []
        return [self._envelope | {"choices": [choice]}]

    def _choice(self, index: int, output: Output) -> Json:
        reasoning, content = self._chat.split_reasoning(output.text, thinking=self._thinking)
        content, calls = self._tools.read(content)
        is_call = bool(calls or self._tools.must)
        message: Json = {
            "role": "assistant",
            "content": None if is_call and not content else content,
        }
        message |= {"reasoning_content": reasoning} if reasoning else {}
        message |= {"tool_calls": [call.shown() for call in calls]} if calls else {}
        reason = self._tools.finish_reason(calls, output.finish_reason)
        choice: Json = {
            "index": index,
            "message": message,
            "finish_reason": reason,
            "logprobs": None,
        }
        if output.logprobs is not None:
            choice["logprobs"] = chat_logprobs(output, self._tokenizer, self._alternatives)
        if self._gives_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice


def _thinks(body: ChatRequest, default: bool, *, constrained: bool) -> bool:
    """Whether the model reasons before it answers. A constrained answer begins at once."""
    asked = None
    if body.thinking is not None:
        asked = body.thinking.type == "enabled"
    if (
        body.chat_template_kwargs is not None
        and body.chat_template_kwargs.enable_thinking is not None
    ):
        if asked not in (None, body.chat_template_kwargs.enable_thinking):
            raise bad("thinking", "it contradicts chat_template_kwargs.enable_thinking")
        asked = body.chat_template_kwargs.enable_thinking
    if asked is None and body.reasoning_effort is not None:
        return body.reasoning_effort != "none" and not constrained
    if asked and constrained:
        raise bad(
            "thinking",
            "an answer that is held to a schema is written without reasoning; leave one of "
            "them out",
        )
    return (default if asked is None else asked) and not constrained


class ReasoningStream:
    """One output; `add` gives, joined, what Chat.split_reasoning makes of the whole text."""

    def __init__(self, chat: Chat, *, thinking: bool) -> None:
        self._chat = chat
        self._thinking = thinking
        self._text = ""
        self._reasoning = self._answer = ""

    def add(self, piece: str, *, last: bool) -> tuple[str, str]:
        """(reasoning, answer) that became certain with this piece of text."""
        self._text += piece
        certain = (
            self._text
            if last
            else self._text[: len(self._text) - _unfinished(self._text, self._chat.separator)]
        )
        reasoning, answer = self._chat.split_reasoning(certain, thinking=self._thinking)
        if not last:
            reasoning, answer = (reasoning or "").rstrip(), answer.rstrip()
        more_reasoning, self._reasoning = _gain(self._reasoning, reasoning or "")
        more_answer, self._answer = _gain(self._answer, answer)
        return more_reasoning, more_answer


def _gain(known: str, now: str) -> tuple[str, str]:
    """What `now` has beyond what is known already; nothing can be taken back."""
    return (now[len(known) :], now) if now.startswith(known) else ("", known)


def _unfinished(text: str, separator: str) -> int:
    """How many characters at the end may be the beginning of a tag or of the separator."""
    if len(text) < len(separator) and separator.startswith(text):
        return len(text)
    tail = text[-max(map(len, REASONING_TAGS)) :]
    start = tail.rfind("<")
    if start >= 0 and any(
        tag.startswith(tail[start:]) and tag != tail[start:] for tag in REASONING_TAGS
    ):
        return len(tail) - start
    return 0
