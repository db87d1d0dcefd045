"""ApiError: a refusal or failure as a client sees it, in OpenAI's form, without internals.

Owns the HTTP status of each of the engine's error codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glm_batch.models.errors import RowError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
# Whatever else is wrong with a row is wrong with what was asked.
STATUS_OF_CODE = {"not_finite": 500, "wrong_shape": 500, "out_of_memory": 503}
CODES = {"prompt_too_long": "context_length_exceeded"}  # where OpenAI has a name of its own
RETRY_AFTER_S = 1
HEAD_BYTES = 64 << 10
MAX_MESSAGE = 500  # characters of what is wrong with a field


class ApiError(Exception):
    """`status` is HTTP's, `code` a short stable name, `param` the field. Can be pickled."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(status, message, code, param, retry_after)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}"""
        type_ = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": type_,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def of_row(error: RowError) -> ApiError:
    """What a client hears of a row's error."""
    status, message = STATUS_OF_CODE.get(error.code, 400), error.message
    if error.code == "prompt_too_long":  # clients look for these words
        message = f"This model's maximum context length is exceeded: {message}"
    return ApiError(status, message, CODES.get(error.code, error.code))


def bad(param: str, message: str) -> ApiError:
    """A field of the request that cannot be used."""
    return ApiError(400, f"{param}: {message}", "invalid_value", param)


def of_problems(problems: Sequence[Any]) -> ApiError:
    """The first of pydantic's problems with a body, with its place; no values are shown."""
    kind, path = (
        problems[0]["type"],
        [str(part)[:80] for part in problems[0]["loc"] if part != "body"],
    )
    if kind == "json_invalid":
        return ApiError(400, "the body is not valid JSON", "invalid_json")
    if not path:
        return ApiError(
            400,
            "the body must be a JSON object, sent as Content-Type: application/json",
            "invalid_json",
        )
    if len(problems) > 1 and all(
        len(each["loc"]) > 2 and each["loc"][:2] == ("body", path[0]) for each in problems
    ):
        return bad(path[0], "it has none of the forms that it may have; the API's page shows them")
    message = "unknown field; remove it" if kind == "extra_forbidden" else str(problems[0]["msg"])
    return bad(".".join(path), message[:MAX_MESSAGE])


def unknown_model(model: str, known: Iterable[str]) -> ApiError:
    message = f"there is no model {model[:80]!r} here; there is {', '.join(known)}"
    return ApiError(404, message, "model_not_found", "model")


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most:,} bytes", "body_too_large")


def busy() -> ApiError:
    return ApiError(429, "the queue is full; try again", "queue_full", None, RETRY_AFTER_S)


def unavailable() -> ApiError:
    return ApiError(
        503,
        "the model is not available at the moment; try again",
        "unavailable",
        None,
        RETRY_AFTER_S,
    )


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than {seconds:g} s and was ended", "timeout")


def internal() -> ApiError:
    return ApiError(500, "the server failed to answer; its log says more", "internal_error")


def head_too_large() -> ApiError:
    return ApiError(
        431, f"the request's headers have more than {HEAD_BYTES:,} bytes", "headers_too_large"
    )
