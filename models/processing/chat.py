"""Conversations to prompts: a checkpoint's chat template, thinking blocks, and labels in it.

A template gets what transformers gives it: messages, tools, documents, and the tokenizer's special
tokens by name. Only the template writes control tokens: "<|user|>" in a message is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm_batch.models.checkpoint.directory import read_json
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.messages import Message, check_messages, plain_value
from glm_batch.models.processing.tokenizer import Tokenizer

ThinkingForm = Literal["none", "open", "tags", "switch"]

PLACEHOLDERS = {"image": "<|image|>", "video": "<|video|>"}
REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_RENDERED_CHARS = 1 << 24
# What a template written for a checkpoint may raise while it reads data of an unexpected shape.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)

_CLOSING = {"none": "", "switch": "", "open": "</think>", "tags": "<think></think><answer>"}
_PROBE = [{"role": "user", "content": "x"}]
_TAG_PATTERN = re.compile("(" + "|".join(REASONING_TAGS) + ")")
# Egyptian hieroglyphs: printable, caseless, and rare in what people label
_STAND_INS = range(0x13000, 0x13430)


class NoChatTemplateError(ConfigError):
    """The checkpoint has no chat template: its texts can be completed, scored and embedded."""


class Chat:
    """A checkpoint's chat template together with its tokenizer. Build it with `from_dir`.

    `thinking_form` is how the checkpoint reasons before it answers: "open" when the generation
    prompt ends in `<think>` (GLM-Z1), "tags" for `<think>..</think><answer>..</answer>` (GLM-4.1V),
    "switch" when the template takes enable_thinking, else "none". `separator` is what the model
    writes between a prompt without thinking and its answer (a line break after GLM-4's
    `<|assistant|>`).
    """

    def __init__(
        self, template: str, tokenizer: Tokenizer, *, tool_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self._template = _compile(template)
        self._tool_template = self._template if tool_template is None else _compile(tool_template)
        self._source = template + (tool_template or "")
        named = tokenizer.named_tokens.values()
        self._source_characters = frozenset(self._source).union(*named)
        # Content can only turn into a control token if it holds the character that the token begins
        # with.
        self._first_characters = sorted({token[0] for token in tokenizer.control_tokens})
        self._opens_thinking = self._run(_PROBE, True, True).rstrip().endswith("<think>")
        self.thinking_form: ThinkingForm = self._detect_thinking()
        self.separator: str = self._detect_separator()

    @classmethod
    def from_dir(cls, path: str, tokenizer: Tokenizer | None = None) -> Chat:
        """Reads chat_template.jinja, else tokenizer_config.json, else chat_template.json.

        Raises ConfigError when there is none or it is no valid template.
        """
        template, tool_template, source = _read_templates(Path(path))
        tokenizer = Tokenizer.from_dir(path) if tokenizer is None else tokenizer
        try:
            return cls(template, tokenizer, tool_template=tool_template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"{source}, line {error.lineno} of the chat template: {error}; correct it"
            ) from error
        except RowError as error:
            raise ConfigError(
                f"{source}: the chat template fails on a one-word message: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for people: control tokens of template and content look the same in it.

        With thinking=False the generation prompt closes the thinking block where the checkpoint has
        one. Raises RowError for messages or a result that cannot be used.
        """
        text, restore = self._render(messages, thinking, add_generation_prompt, tools, documents)
        return _replace(text, restore)

    def prompt_ids(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        start_answer: bool = False,
    ) -> list[int]:
        """The prompt's token ids; control-token strings in content arrive as plain text.

        `start_answer` puts `separator` at the end: for a constrained answer, whose grammar would
        forbid the model to write it itself. It goes with thinking=False.
        """
        text, restore = self._render(messages, thinking, True, tools, documents)
        return self._encode(text + self.separator if start_answer else text, restore)

    def label_continuations(
        self, labels: Sequence[str], *, thinking: bool = False
    ) -> list[tuple[int, ...]]:
        """Token ids of each label as the model would write it, the separator included.

        Raises ConfigError for labels that are empty, the same or not separable from the prompt, and
        for thinking=True where the checkpoint would reason first.
        """
        if thinking and self.thinking_form != "none":
            raise ConfigError(
                "task.thinking: labels are scored right after the prompt, where this checkpoint "
                "would begin to reason; set thinking: false, or kind: generate"
            )
        continuations = [self._continuation(label, *self._probe) for label in labels]
        _refuse_duplicates(labels, continuations)
        return continuations

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of one answer after a prompt with thinking=False, as those of a label.

        Raises RowError for one that is empty or not separable from the prompt.
        """
        try:
            return self._continuation(answer, *self._probe)
        except ConfigError as error:
            raise RowError("bad_gold", str(error).removeprefix("task.labels: ")) from error

    @staticmethod
    def count_end(label_continuations: Sequence[tuple[int, ...]], end_of_label: str) -> bool:
        """Whether a label's probability includes its end (`auto`: when one is a prefix)."""
        if end_of_label != "auto":
            return end_of_label == "always"
        return any(
            longer[: len(shorter)] == shorter
            for shorter, longer in pairwise(sorted(label_continuations))
        )

    def split_reasoning(self, text: str, *, thinking: bool) -> tuple[str | None, str]:
        """(reasoning, answer) of a text; reasoning is None where there was room for none.

        An unclosed thinking block is all reasoning and no answer.
        """
        if not thinking or self.thinking_form == "none":
            answer = text.removeprefix(self.separator)
            return None, answer.split("</answer>", 1)[
                0
            ].strip() if self.thinking_form == "tags" else answer
        if not self._opens_thinking:
            return _split_tags(text)
        reasoning, _, answer = text.partition("</think>")
        return reasoning.strip(), answer.strip()

    def _detect_thinking(self) -> ThinkingForm:
        if re.search(r"\benable_thinking\b", self._source):
            return "switch"
        if self._opens_thinking:
            return "open"
        return "tags" if {"<think>", "<answer>"} <= self.tokenizer.control_tokens else "none"

    def _detect_separator(self) -> str:
        if self.thinking_form in ("open", "tags"):
            # no turn in the history has a closed block, and the answer follows the one in the
            # prompt
            return ""
        prompt, _ = self._render(_PROBE, False, True, None)
        around = self._around_answer(prompt)
        return "" if around is None else around[0]

    def _render(
        self,
        messages: Sequence[Message],
        thinking: bool,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[str, dict[str, str]]:
        """The rendered text with stand-ins, and the table that puts the originals back."""
        try:
            conversation = check_messages(messages)
            shown = self._shown(conversation)
            beside = [
                plain_value(where, list(given)) if given else None
                for where, given in (("tools", tools), ("documents", documents))
            ]
            protect, restore = self._stand_ins(conversation, beside)
            if protect:
                conversation = [_protect_message(message, protect) for message in conversation]
                beside = _replace_all(beside, protect)
            text = self._run(conversation, thinking, add_generation_prompt, *beside)
            if shown:
                self._check_placeholders(text, shown)
        except RecursionError as error:
            raise RowError(
                "template_error", "the messages or tools are nested too deeply to be rendered"
            ) from error
        closing = _CLOSING[self.thinking_form] if add_generation_prompt and not thinking else ""
        return text + closing, restore

    def _shown(self, conversation: Sequence[Message]) -> list[str]:
        """The kinds of the media that the conversation shows, in order."""
        contents = [
            message["content"] for message in conversation if isinstance(message["content"], list)
        ]
        shown = [
            part["type"] for content in contents for part in content if part["type"] in PLACEHOLDERS
        ]
        for kind in shown:
            if PLACEHOLDERS[kind] not in self.tokenizer.control_tokens:
                raise RowError(
                    "unsupported_media",
                    f"the messages show {', '.join(shown)}, but this checkpoint reads text: its "
                    f"tokenizer has no {PLACEHOLDERS[kind]}",
                )
        return shown

    def _check_placeholders(self, text: str, shown: list[str]) -> None:
        """Each image and video must stand in the prompt once and in order."""
        kinds = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}
        controls = (
            piece.strip() for piece, id in self.tokenizer.split_control(text) if id is not None
        )
        found = [kinds[control] for control in controls if control in kinds]
        if found != shown:
            raise RowError(
                "template_error",
                f"the messages show {', '.join(shown)}, the chat template writes "
                f"{', '.join(found) or 'nothing of it'}",
            )

    def _stand_ins(self, *values: Any) -> tuple[dict[str, str], dict[str, str]]:
        """Replacements there and back for the characters with which control tokens begin.

        Both are empty when no value holds one: such content cannot become a control token, not even
        across the seams between two pieces of it. The stand-ins are characters that occur neither
        in the values nor in the template.
        """
        texts = list(_strings(values))
        wanted = [
            character
            for character in self._first_characters
            if any(character in text for text in texts)
        ]
        if not wanted:
            return {}, {}
        used = self._source_characters.union(*texts)
        stand_ins = list(
            islice((chr(code) for code in _STAND_INS if chr(code) not in used), len(wanted))
        )
        if len(stand_ins) < len(wanted):
            raise RowError(
                "bad_messages",
                "the conversation uses every Egyptian hieroglyph; none is left to stand in",
            )
        pairs = list(zip(wanted, stand_ins, strict=True))
        return dict(pairs), {b: a for a, b in pairs}

    def _run(
        self,
        messages: Sequence[Message],
        thinking: bool,
        add_generation_prompt: bool,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
    ) -> str:
        template = self._tool_template if tools else self._template
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(
                self.tokenizer.named_tokens,
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=thinking,
            ):
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise RowError(
                        "template_error",
                        f"the prompt is longer than {MAX_RENDERED_CHARS:,} characters",
                    )
                pieces.append(piece)
        except TEMPLATE_FAILURES as error:
            raise RowError(
                "template_error", f"the chat template refuses this conversation: {error}"
            ) from error
        return "".join(pieces)

    def _encode(self, text: str, restore: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        for piece, control_id in self.tokenizer.split_control(text):
            if control_id is None:
                ids += self.tokenizer.encode(_replace(piece, restore))
            else:
                ids.append(control_id)
        return ids

    @cached_property
    def _probe(self) -> tuple[str, list[int]]:
        """A prompt, as text and ids: what matters here is how prompts end."""
        prompt, restore = self._render(_PROBE, False, True, None)
        return prompt, self._encode(prompt, restore)

    def _continuation(self, label: str, prompt: str, prompt_ids: list[int]) -> tuple[int, ...]:
        protect, restore = self._stand_ins(label)
        written = self._label_text(_replace(label, protect), prompt)
        try:
            if self.thinking_form == "open":
                # The prompt's `</think>` is plain text there, whose last token a label could merge
                # with. It is fixed before the model goes on, so the label's tokens begin anew.
                return tuple(self._encode(written, restore))
            ids = self._encode(prompt + written, restore)
        except RowError as error:
            raise ConfigError(f"task.labels: {label!r}: {error.message}") from error
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ConfigError(
                f"task.labels: {label!r} merges with the end of the prompt {prompt[-20:]!r} into "
                "other tokens, so that it cannot be scored after it; begin it otherwise"
            )
        return tuple(ids[len(prompt_ids) :])

    def _label_text(self, label: str, prompt: str) -> str:
        """What an assistant's turn that says `label` has between prompt and end."""
        if not label.strip():
            raise ConfigError(f"task.labels: {label!r} is empty; give it some text")
        if self.thinking_form in ("open", "tags"):
            return label
        turn = self._answered(label)
        around = self._around_answer(prompt)
        if around is None or not turn.startswith(prompt):
            raise ConfigError(
                f"task.labels: this checkpoint's template writes an assistant's turn as {turn!r}, "
                f"which does not continue its generation prompt {prompt!r}; labels cannot be "
                "scored with it, use kind: generate"
            )
        return turn[len(prompt) : len(turn) - len(around[1])]

    def _around_answer(self, prompt: str) -> tuple[str, str] | None:
        """What stands around an assistant's content, if its turn continues the prompt."""
        marker = chr(_STAND_INS[-1])
        before, found, after = self._answered(marker).partition(marker)
        return (before[len(prompt) :], after) if found and before.startswith(prompt) else None

    def _answered(self, content: str) -> str:
        return self._run([*_PROBE, {"role": "assistant", "content": content}], False, False)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training: its body is shown."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja that reaches no interpreter, changes nothing, and makes no `"x" * 10**9`."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if _size_of_binop(operator, left, right) > MAX_RENDERED_CHARS:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _size_of_binop(operator: str, left: Any, right: Any) -> int:
    """At most so many characters or bits result; 0 where nothing can grow."""
    if operator == "**":
        return (
            left.bit_length() * abs(right)
            if isinstance(left, int) and isinstance(right, int)
            else 0
        )
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    return 0


def _compile(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_templates(folder: Path) -> tuple[str, str | None, Path]:
    """(template, that for conversations with tools or None, the file they came from)."""
    named, file = _named_templates(folder)
    if not named:
        raise NoChatTemplateError(
            f"{folder}: no chat template in chat_template.jinja, tokenizer_config.json or "
            "chat_template.json; add the checkpoint's own, or use a task without chat"
        )
    if "default" not in named:
        raise ConfigError(f"{file}: chat_template has no entry named default, only {sorted(named)}")
    return named["default"], named.get("tool_use"), file


def _named_templates(folder: Path) -> tuple[dict[str, str], Path]:
    """The templates by name and where they lie. Files of their own go before those in JSON."""
    file, more = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = {path.stem: path for path in sorted(more.glob("*.jinja"))}
    if file.is_file():
        files["default"] = file
    if files:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        return found, files.get("default", more)
    for name in ("tokenizer_config.json", "chat_template.json"):
        file = folder / name
        match read_json(file, optional=True).get("chat_template"):
            case str(template):
                return {"default": template}, file
            case list(entries):
                return {entry["name"]: entry["template"] for entry in entries}, file
            case dict(named):
                return named, file
    return {}, folder


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _replace(text: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():  # ten times as fast as str.translate
        text = text.replace(old, new)
    return text


def _replace_all(value: Any, table: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return _replace(value, table)
    if isinstance(value, dict):
        return {_replace(key, table): _replace_all(item, table) for key, item in value.items()}
    return [_replace_all(item, table) for item in value] if isinstance(value, list) else value


def _protect_message(message: dict[str, Any], table: Mapping[str, str]) -> dict[str, Any]:
    """Stand-ins everywhere but in the role and in an assistant's reasoning tags."""
    protected = {
        key: value if key == "role" else _replace_all(value, table)
        for key, value in message.items()
    }
    if isinstance(message["content"], list):
        protected["content"] = [
            {**part, "text": _replace(part["text"], table)} if "text" in part else part
            for part in message["content"]
        ]
    elif message["role"] == "assistant":
        pieces = _TAG_PATTERN.split(message["content"])
        protected["content"] = "".join(
            p if p in REASONING_TAGS else _replace(p, table) for p in pieces
        )
    return protected


def _refuse_duplicates(labels: Sequence[str], continuations: list[tuple[int, ...]]) -> None:
    first: dict[tuple[int, ...], str] = {}
    for label, continuation in zip(labels, continuations, strict=True):
        if continuation in first:
            raise ConfigError(
                f"task.labels: {first[continuation]!r} and {label!r} are the same tokens to the "
                "model; remove one"
            )
        first[continuation] = label


def _split_tags(text: str) -> tuple[str | None, str]:
    """Both blocks may be open-ended, and text without tags is the answer."""
    head, answer_tag, tail = text.partition("<answer>")
    before, think_tag, rest = head.rpartition("<think>") if "<think>" in head else ("", "", head)
    reasoning, closed, after = rest.partition("</think>")
    if not think_tag and not closed:
        return None, (tail if answer_tag else text).split("</answer>", 1)[0].strip()
    answer = tail if answer_tag else after
    return (before + reasoning).strip(), answer.split("</answer>", 1)[0].strip()
