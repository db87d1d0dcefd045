"""RequestRunner: a line of an OpenAI batch file to engine requests, and their completions to the
body of a response.

What a request means is the server's business: glm_actors.serving checks the body, builds its task
and writes the answer, so that all comes out as over HTTP. Owns the line around it (custom_id,
method, url) and whose errors are whose. Importing this loads pydantic: do it inside functions.
Knows nothing of tables, files or Ray.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.serving.openai.api_errors import (
    ApiError,
    bad,
    of_row,
    too_large,
    unknown_model,
)
from glm_batch.glm_actors.serving.openai.api_tasks import build_task
from glm_batch.glm_actors.serving.openai.prompter import RequestPrompter
from glm_batch.glm_actors.serving.openai.protocol import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    EmbeddingRequest,
    Sampled,
    ScoreRequest,
    validated,
)
from glm_batch.models.engine.api.request import Completion, Request
from glm_batch.models.errors import RowError
from glm_batch.models.processing.messages import MEDIA_PARTS
from glm_batch.models.processing.prompt import Prompt
from glm_batch.pipelines.input.values import Row, usable_key
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.tasks import row_seed

Json = dict[str, Any]
ROUTES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/score": ScoreRequest,
    "/v1/classify": ClassifyRequest,
}
MAX_SHOWN = 80
# What befell a row and was no fault of its request.
OWN_FAULTS = ("worker_died", "internal_error", "aborted")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What a line asks for: requests for the engine, or an error.

    A RowError is the line's: there is no request that could have a response. An ApiError is the
    request's. `body` is the request without its media as JSON, as much as `answer` needs of it.
    """

    custom_id: str | None = None
    url: str | None = None
    body: str | None = None
    requests: list[Request] = field(default_factory=list)
    error: RowError | ApiError | None = None


class RequestRunner:
    """One job's requests on one worker. Built once from the job and its checkpoint."""

    def __init__(self, job: Job, model_dir: str) -> None:
        """Raises ConfigError for a checkpoint whose files cannot be used."""
        self._section, self._seed = job.requests, job.sampling.seed
        self.models = [Path(model_dir).name, *job.requests.models]
        self._limits = job.requests.limits
        self.prompter = RequestPrompter(model_dir, self._limits)
        self._schemas = SchemaChecker(self._limits.schema_s)
        self._model_dir = model_dir

    def start(self) -> None:
        """Begins to start the process that decodes media, where the model takes any."""
        self.prompter.start()

    def close(self) -> None:
        """Ends the processes that this has started."""
        self.prompter.close()
        self._schemas.close()

    @property
    def facts(self) -> Json:
        """What was decided for this job and belongs into its manifest."""
        return {"models": self.models}

    def ask(self, row: Row | RowError, num_bytes: int, name: str) -> Asked:
        """What a line of `num_bytes` asks for. `name` is a text that no other row of the input has.

        Requests are named after it, and a request without a seed gets one that follows from the
        custom_id: a rerun draws the same.
        """
        if isinstance(row, RowError):
            return Asked(error=row)
        try:
            custom_id = _custom_id(row)
        except RowError as error:
            return Asked(error=error)
        url = row.get("url")
        known = Asked(
            custom_id=custom_id, url=url if isinstance(url, str) and url in ROUTES else None
        )
        try:
            body = self._checked(row, num_bytes)
            if isinstance(body, Sampled) and body.seed is None:
                body = body.model_copy(update={"seed": row_seed(self._seed, custom_id)})
            task = build_task(
                body, self.prompter, self._schemas, self._limits, thinking=self._section.thinking
            )
            kept = json.dumps(_without_media(row["body"]))
        except RowError as error:
            return replace(known, error=of_row(error))
        except ApiError as error:
            return replace(known, error=error)
        except RecursionError:
            return replace(
                known, error=ApiError(400, "the body is nested too deeply", "invalid_json")
            )
        requests = [
            replace(request, id=f"{name}#{number}") for number, request in enumerate(task.requests)
        ]
        return replace(known, body=kept, requests=requests)

    def answer(self, url: str, body: str, completions: Sequence[Completion]) -> Json:
        """The body of the response. Raises ApiError where the engine could not do the work."""
        for completion in completions:
            if completion.error is not None and completion.error.code in OWN_FAULTS:
                raise fault(completion.error)
        request = validated(ROUTES[url], json.loads(body))
        task = build_task(
            request, self._again, _Passed(0.0), self._limits, thinking=self._section.thinking
        )
        # Ids are new in each task, and the order is theirs.
        named = zip(task.requests, completions, strict=True)
        return task.answer([replace(completion, id=each.id) for each, completion in named])

    @cached_property
    def _again(self) -> _AnsweredPrompter:
        return _AnsweredPrompter(self._model_dir, self._limits)

    def _checked(self, row: Row, num_bytes: int) -> Body:
        """The body of a request that this job can answer. Raises ApiError, in the order in which
        the server would.
        """
        method, url = row.get("method"), row.get("url")
        if method != "POST":
            raise bad("method", f"it is {_shown(method)}; a line asks with POST")
        if not isinstance(url, str) or url not in ROUTES:
            raise bad("url", f"it is {_shown(url)}; a line asks for one of {', '.join(ROUTES)}")
        if num_bytes > self._limits.max_body_bytes:
            raise too_large(self._limits.max_body_bytes)
        body = validated(ROUTES[url], row.get("body"))
        if isinstance(body, Sampled):
            if body.stream:
                raise bad("stream", "a line of a batch file gets its answer at once; leave it out")
            if body.stream_options is not None:
                raise bad("stream_options", "it goes with stream: true")
        if body.model not in self.models:
            raise unknown_model(body.model, self.models)
        return body


def fault(error: RowError) -> ApiError:
    """What befell a row on its way, as the client of a server would hear of it."""
    return ApiError(500, error.message, error.code) if error.code in OWN_FAULTS else of_row(error)


class _AnsweredPrompter(RequestPrompter):
    """For requests that the engine has answered: their conversations, and so their media, are not
    looked at again.
    """

    def conversation(self, messages: Sequence[Any], **options: Any) -> Prompt:
        return Prompt(input_ids=())


class _Passed(SchemaChecker):
    """For schemas that have been checked."""

    def problem(self, text: str, kind: str = "") -> str:
        return ""


def _custom_id(row: Row) -> str:
    given = row.get("custom_id")
    if given is None:
        raise RowError("missing_custom_id", "custom_id is missing; give each line one of its own")
    if not isinstance(given, str) or not given or usable_key(given) is None:
        raise RowError(
            "bad_custom_id", f"custom_id is {_shown(given)}; it must be a text that is not empty"
        )
    return given


def _without_media(body: Json) -> Json:
    """The body with its messages' texts alone."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return body
    return {**body, "messages": [_text_alone(message) for message in messages]}


def _text_alone(message: Json) -> Json:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [part for part in content if part.get("type") not in MEDIA_PARTS]}


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)[:MAX_SHOWN]
