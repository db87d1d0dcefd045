"""RequestRunner: lines of an OpenAI batch file to engine requests, completions to responses.

What a request means is the server's business: its room checks the body, builds the task and writes
the answer, so that all comes out as over HTTP. A line may ask for several things at once (texts to
embed, prompts to complete). Importing this loads pydantic: name it as text, see models.rooms.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

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
    ignored,
    validated,
)
from glm_batch.models.engine.api.request import Completion
from glm_batch.models.errors import RowError
from glm_batch.models.processing.messages import MEDIA_PARTS
from glm_batch.models.processing.prompt import Prompt
from glm_batch.pipelines.input.values import Row, usable_key
from glm_batch.pipelines.job import Job
from glm_batch.pipelines.tasks.kinds import REQUEST_COLUMNS, TOKEN_COLUMNS
from glm_batch.pipelines.tasks.task import Columns, row_seed
from glm_batch.pipelines.tasks.task_runner import Asked, Prompts, ReadRow

Json = dict[str, Any]
ASSUMED_TOKENS = 256  # that a request writes which does not say how many
ALTERNATIVE_BYTES = 120  # a token among top_logprobs, in the engine's answer and as JSON
NUMBER_BYTES = 24  # a number of a vector, as float32 and as JSON
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


class RequestRunner:
    """One job's requests on one worker; see pipelines.tasks.task_runner.Runner.

    A note's `body` is the request without its media as JSON, as much as an answer needs of it; a
    line that was refused has none, but the response that a client would have got.
    """

    notes: Mapping[str, pa.DataType] = REQUEST_COLUMNS | {"body": pa.string()}

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

    def ask(self, rows: Sequence[ReadRow], prompts: Prompts | None = None) -> Iterator[Asked]:
        """What each line asks for.

        A request without a seed gets one that follows from the custom_id: a rerun draws the same.
        """
        for read in rows:
            note: Json = {"line": read.line}
            try:
                yield self._asked(read, note)
            except RowError as error:
                yield Asked(key=note.get("custom_id") or read.name, error=error, note=note)
            except ApiError as error:
                refused = note | {"status_code": error.status, "response": json_text(error.body())}
                yield Asked(key=note["custom_id"], error=_row_error(error), note=refused)

    def columns(
        self,
        note: Mapping[str, Any],
        completions: Sequence[Completion | RowError],
        lost: RowError | None = None,
    ) -> Columns:
        done = [each for each in completions if isinstance(each, Completion)]
        columns: Columns = {name: note[name] for name in REQUEST_COLUMNS} | {
            name: sum(getattr(each, name) for each in done) if done else None
            for name in TOKEN_COLUMNS
        }
        failed = next((each for each in completions if isinstance(each, RowError)), None)
        if note["body"] is None:
            assert failed is not None, "a line without a body was refused"
            return columns | _failed(failed)
        try:
            if failed := lost or failed:
                raise fault(failed)
            body = self._answer(note["url"], note["body"], done)
        except ApiError as error:
            response = {"status_code": error.status, "response": json_text(error.body())}
            return columns | _failed(_row_error(error)) | response
        # What the answer says: a prompt that is echoed and gone on with is asked about twice and
        # counts once.
        usage = body["usage"]
        return columns | {
            "status": "ok",
            "error_code": None,
            "error_message": None,
            "prompt_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "status_code": 200,
            "response": json_text(body),
        }

    def _asked(self, read: ReadRow, note: Json) -> Asked:
        """Fills in the note as far as it comes.

        A RowError is the line's: there is no request that could have a response. An ApiError is the
        request's.
        """
        if failed := read.error or (read.row if isinstance(read.row, RowError) else None):
            raise failed
        row = cast(Row, read.row)
        note["custom_id"] = _custom_id(row)
        url = row.get("url")
        note["url"] = url if isinstance(url, str) and url in ROUTES else None
        if read.first is not None:
            raise RowError(
                "duplicate_custom_id",
                f"custom_id {note['custom_id']!r} is that of an earlier line (row {read.first}); "
                "give each its own",
            )
        try:
            body = self._checked(row, read.size)
            if isinstance(body, Sampled) and body.seed is None:
                seed = row_seed(self._seed, note["custom_id"])
                body = body.model_copy(update={"seed": seed})
            task = build_task(
                body, self.prompter, self._schemas, self._limits, thinking=self._section.thinking
            )
            kept = json.dumps(_without_media(row["body"]))
        except RowError as error:
            raise of_row(error) from error
        except RecursionError as error:
            raise ApiError(400, "the body is nested too deeply", "invalid_json") from error
        requests = [
            replace(request, id=f"{read.name}#{number}")
            for number, request in enumerate(task.requests)
        ]
        return Asked(key=note["custom_id"], requests=requests, note=note | {"body": kept})

    def _answer(self, url: str, body: str, completions: Sequence[Completion]) -> Json:
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
        """The body of a request. Raises ApiError, in the order in which the server would."""
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
        ignored(body, self._limits)
        if body.model not in self.models:
            raise unknown_model(body.model, self.models)
        return body


def fault(error: RowError) -> ApiError:
    """What befell a row on its way, as the client of a server would hear of it."""
    return ApiError(500, error.message, error.code) if error.code in OWN_FAULTS else of_row(error)


def answer_bytes(row: Row, hidden_size: int) -> int:
    """A guess, from the line alone, at what its answer weighs, for the size of units."""
    body = row.get("body")
    if not isinstance(body, dict):
        return 0
    if row.get("url") == "/v1/embeddings":
        return _count(body.get("input")) * hidden_size * NUMBER_BYTES
    alternatives = max(_number(body.get("top_logprobs")), _number(body.get("logprobs")))
    tokens = (
        _number(body.get("max_completion_tokens"))
        or _number(body.get("max_tokens"))
        or ASSUMED_TOKENS
    )
    choices = _count(body.get("prompt")) * max(_number(body.get("n")), 1)
    return choices * tokens * (8 + alternatives * ALTERNATIVE_BYTES)


def _count(value: Any) -> int:
    """How many texts or token lists stand in a field; token ids by themselves are one."""
    is_many = isinstance(value, list) and value and not isinstance(value[0], int)
    return len(value) if is_many else 1


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def json_text(value: Any) -> str:
    """As the server writes it: plain ASCII."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _row_error(error: ApiError) -> RowError:
    return RowError(error.code or f"http_{error.status}", error.message)


def _failed(error: RowError) -> Columns:
    return {"status": "error", "error_code": error.code, "error_message": error.message}


class _AnsweredPrompter(RequestPrompter):
    """For requests that are answered: their conversations and media are not looked at again."""

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
