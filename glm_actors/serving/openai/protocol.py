"""The requests of the HTTP interface: OpenAI's fields, those of our own, and the ranges that hold
for any model.

Unknown fields are refused, and so are other types than the declared ones: what a client asks for is
done or told.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from glm_batch.glm_actors.serving.openai.api_errors import of_problems

MAX_TOOLS = 128
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Positive = Annotated[int, Field(ge=1, le=1 << 31)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Stops = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]


def _with_names(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a message holds is judged where templates are known; a name is for none of them."""
    for index, message in enumerate(messages):
        if not isinstance(message.get("name"), str | None):
            found = type(message["name"]).__name__
            raise PydanticCustomError(
                "name_type", f"message {index}: its name is {found}; it must be a string"
            )
    return messages


Messages = Annotated[
    list[dict[str, Any]], Field(min_length=1, fail_fast=True), AfterValidator(_with_names)
]


class Strict(BaseModel):
    """Refuses what it does not know, other types than the declared, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Strict):
    name: Name | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(Strict):
    type: Literal["enabled", "disabled"]


class TemplateOptions(Strict):
    enable_thinking: bool | None = None


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Whether its arguments always match `parameters`."
    )


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    name: FunctionName


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionChoice


class Sampled(Strict):
    """What chat and completions share; from `top_k` on the fields are not OpenAI's."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Positive | None = None
    stop: str | Stops | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    user: str | None = Field(None, description="Taken and not used.")
    top_k: Count | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(None, description="Taken and not used.")
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: Prompts
    max_tokens: Count | None = Field(None, description="0 goes with `echo`: nothing is written.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = Field(
        None, description="Begin with the prompt, and with its log-probabilities."
    )
    best_of: Literal[1] | None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. Vectors have length 1 unless `normalize` is false."""

    model: Name
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, description="Taken and not used.")
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True


class ScoreRequest(Strict):
    """POST /v1/score: the probabilities of labels as the answer to a prompt or messages."""

    model: Name
    labels: Texts
    prompt: str | None = None
    system: str | None = None
    messages: Messages | None = None
    end_of_label: Literal["auto", "always", "never"] = "auto"


class ClassifyRequest(Strict):
    """POST /v1/classify: the scores of a classification head for raw texts."""

    model: Name
    input: str | Texts


class TokenizeRequest(Strict):
    """POST /tokenize: token ids of a raw text, or of messages as chat renders them."""

    model: Name
    prompt: str | None = None
    messages: Messages | None = None
    thinking: Thinking | None = None


Body = (
    ChatRequest
    | CompletionRequest
    | EmbeddingRequest
    | ScoreRequest
    | ClassifyRequest
    | TokenizeRequest
)


def validated(model: type[Body], body: Any) -> Body:
    """A JSON value as a request, as FastAPI takes it from HTTP. Raises ApiError."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise of_problems([{**each, "loc": ("body", *each["loc"])} for each in problems]) from error
