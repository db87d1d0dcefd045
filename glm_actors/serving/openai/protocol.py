"""The requests of the HTTP interface: OpenAI's fields, those of our own, and the ranges that hold
for any model.

Null is as good as absent, also for fields that are not known. What would change an answer is done
or refused, but for the value that asks for what happens anyway. A hint cannot change an answer: it
is taken, and told by `ignored`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from glm_batch.glm_actors.serving.openai.api_errors import bad, of_problems
from glm_batch.models.request_limits import RequestLimits

MAX_TOOLS = 128
MAX_STOP_IDS = 64
PART_HINTS = ("cache_control", "uuid")  # of the parts of a message's content


class _Hint:
    """Marks a field that cannot change an answer."""


def _whole(value: Any) -> Any:
    """An integer, or a list of them, also where some writer of JSON made them 16.0."""
    if isinstance(value, list) and any(type(each) is float for each in value):
        return [_whole(each) for each in value]
    return int(value) if type(value) is float and value.is_integer() else value


def _all_tokens(top_k: Any) -> Any:
    """vLLM's way to switch the filter off."""
    return 0 if top_k == -1 else top_k


IS_HINT = (_Hint(), Field(description="Taken and not used."))
Hint = Annotated[Any, *IS_HINT]
Whole = Annotated[int, BeforeValidator(_whole)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[Whole, Field(ge=0, le=1 << 31)]
Positive = Annotated[Whole, Field(ge=1, le=1 << 31)]
Alternatives = Annotated[Whole, Field(ge=0, le=20)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Stops = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True), BeforeValidator(_whole)]
Prompts = str | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
NoneOfThem = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]


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

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class Lenient(Strict):
    """Takes what it does not know as hints."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": True})


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, *IS_HINT] = None
    continuous_usage_stats: Annotated[bool | None, *IS_HINT] = None


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


class Function(Lenient):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="Whether its arguments always match `parameters`."
    )


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class FunctionChoice(Strict):
    name: FunctionName


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolChoice], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedToolsChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class StructuredOutputs(Strict):
    """vLLM's: one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = Field(None, description="Lark's form, as llguidance reads it.")
    json_object: bool | None = None


class Sampled(Strict):
    """What chat and completions share; from `top_k` on the fields are not OpenAI's."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Positive | None = None
    stop: str | Stops | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: NoneOfThem | None = None
    user: Annotated[str | None, *IS_HINT] = None
    top_k: Annotated[Count, BeforeValidator(_all_tokens)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_IDS)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="As structured_outputs'.")
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    do_sample: bool | None = Field(None, description="False is temperature 0.")
    return_token_ids: bool | None = None
    # hints of other servers' clients
    cache_salt: Hint = None
    request_id: Hint = None
    user_id: Hint = None
    # other servers' fields, for which there is one value here
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    priority: Annotated[Whole, Field(ge=0, le=0)] | None = None
    bad_words: NoneOfThem | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions"""

    messages: Messages
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    tools: (
        Annotated[list[Tool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(None, description="none: without reasoning; else with it, where the model can.")
    )
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None
    # hints
    metadata: Annotated[dict[str, str] | None, *IS_HINT] = None
    modalities: list[Literal["text"]] | None = None
    prediction: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    safety_identifier: Hint = None
    service_tier: Hint = None
    store: Annotated[bool | None, *IS_HINT] = None
    tool_stream: Annotated[bool | None, *IS_HINT] = None
    verbosity: Hint = None
    # other servers' fields, for which there is one value here
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    echo: Literal[False] | None = None


class CompletionRequest(Sampled):
    """POST /v1/completions"""

    prompt: Prompts
    max_tokens: Count | None = Field(None, description="0 goes with `echo`: nothing is written.")
    logprobs: Alternatives | None = None
    echo: bool | None = Field(
        None, description="Begin with the prompt, and with its log-probabilities."
    )
    best_of: Annotated[Whole, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None


class EmbeddingRequest(Strict):
    """POST /v1/embeddings. Vectors have length 1 unless `normalize` is false."""

    model: Name
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = Field(None, description="As many as the model's vectors have.")
    user: Annotated[str | None, *IS_HINT] = None
    pooling: Literal["last", "mean"] | None = Field(None, description="last by default.")
    normalize: bool | None = Field(None, description="true by default.")


class ScoreRequest(Strict):
    """POST /v1/score: the probabilities of labels as the answer to a prompt or messages."""

    model: Name
    labels: Texts
    prompt: str | None = None
    system: str | None = None
    messages: Messages | None = None
    end_of_label: Literal["auto", "always", "never"] | None = None


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


def ignored(body: Body, limits: RequestLimits) -> list[str]:
    """The hints that a request has, by their places. Raises ApiError for one if it has to be
    `strict`.
    """
    found = list(dict.fromkeys(_hints(body)))
    if found and limits.strict:
        raise bad(found[0], "unknown field; remove it")
    return found


def _hints(part: BaseModel) -> Iterator[str]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if value in (None, False):
            continue
        if any(isinstance(each, _Hint) for each in field.metadata):
            yield name
        elif name == "messages":
            yield from _hints_of_parts(value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from (f"{name}.{each}" for each in _hints(inner))
    if part.model_extra:
        yield "*"  # a client's own words are not for headers and metrics


def _hints_of_parts(messages: list[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if isinstance(part, dict):
                yield from (f"messages.content.{name}" for name in PART_HINTS if part.get(name))
