"""Tasks: what a row becomes for the model, and what the model's answer becomes for the reader.

Owns the Request of each task kind and the typed output columns of its Completion. Rows are plain
dicts. Knows nothing of Ray, files or where an engine runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_batch.glm_actors.faults.schema_check import SchemaChecker
from glm_batch.glm_actors.faults.spent import MEDIA, timed
from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.models.checkpoint.digest import model_digest
from glm_batch.models.engine.api.request import (
    Choose,
    Classify,
    Completion,
    Constraint,
    Embed,
    Generate,
    Output,
    Request,
    Tag,
    Work,
)
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import Draft, Prompt, Prompter
from glm_batch.models.processing.scores import Scaling, class_scores, label_scores, softmax
from glm_batch.pipelines.calibration.calibration import Calibration, read_calibration
from glm_batch.pipelines.input.values import json_or_text, same_json
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.job_media import (
    media_budgets,
    media_loader,
    media_rules,
    reads_media,
)
from glm_batch.pipelines.tasks.prompts import Message, PromptTemplate, Row, conversation, uses_chat

TASK_COLUMNS: dict[str, tuple[str, ...]] = {
    "choose": ("label", "probability", "label_probs", "off_set_mass"),
    "generate": ("text", "reasoning", "finish_reason", "logprobs"),
    "extract": ("json",),
    "classify": ("scores", "label"),
    "tag": ("tokens",),
    "embed": ("vector",),
    "requests": ("custom_id", "line", "url", "status_code", "response"),
}

Columns = dict[str, Any]


def columns_on_demand(task: TaskConfig) -> tuple[str, ...]:
    """What the task's own output columns have beyond TASK_COLUMNS."""
    labels = ("label_logprobs",) if task.label_logprobs else ()
    return (*labels, *(("gold_logprob", "gold_num_tokens") if task.gold_logprobs else ()))


class TaskRunner:
    """One job's task on one worker: built once from the job and its checkpoint, then asked unit by
    unit.

    The labels' continuations, the constraint and the token limit are computed here, once. Media are
    decoded in a process of their own, which starts with `start` or when the first is asked for;
    runners that are given the same `loaders` share it where they load media in the same way. The
    file that `task.calibration` names is read and checked here, unless what it holds is given as
    `scaling`.
    """

    def __init__(
        self,
        job: Job,
        model_dir: str,
        loaders: dict[str, MediaLoader] | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        self._job = job
        self._loaders = {} if loaders is None else loaders
        self._task = job.task
        self.prompter = Prompter(model_dir)
        self._config = self.prompter.config
        self._problem_type = self._config.inferred_problem_type
        self._template = (
            PromptTemplate.parse(job.task.prompt) if job.task.prompt is not None else None
        )
        self._chat = self.prompter.chat if uses_chat(job.task) else None
        self._tokenizer = self.prompter.tokenizer
        self._model_dir = model_dir
        self.reads_media = reads_media(job, model_dir)
        if self.reads_media:
            # what is wrong with either should be known before rows come
            _ = self.prompter.media, self._loader
        if self._task.gold_logprobs:
            self._check_gold_logprobs()
        self.work: Work = self._build_work()
        self.calibration = (
            self._read_calibration()
            if scaling is None and job.task.calibration is not None
            else None
        )
        self._scaling = (
            scaling if self.calibration is None else self.calibration.scaling(self._labels)
        )
        limit = job.engine.max_model_len
        self._max_model_len = self._config.longest_context if limit == "auto" else limit
        self._reserved = self._tokens_after_prompt()
        self._null_columns: Columns = dict.fromkeys(
            (*TASK_COLUMNS[job.task.kind], *columns_on_demand(job.task), *TOKEN_COLUMNS)
        )

    def start(self) -> None:
        """Begins to start the process that decodes media, where the job names any."""
        if self.reads_media:
            self._loader.start()

    def close(self) -> None:
        """Ends that process."""
        if "_loader" in self.__dict__:
            self._loader.close()

    @property
    def prompt_key(self) -> str:
        """Runners of one checkpoint in which this is equal make equal prompts of a row."""
        task = replace(
            self._task, gold=None, label_logprobs=False, gold_logprobs=False, calibration=None
        )
        return repr((task, self._job.preprocess, self._job.media, self._max_model_len))

    def text(self, row: Row) -> str:
        """The row's filled-in prompt template. Raises RowError."""
        if self._template is None:
            raise ConfigError(
                "task.prompt is not set: this task takes its conversation from task.messages"
            )
        return self._template.format(row)

    def messages(self, row: Row) -> list[Message]:
        """The row's conversation as the chat template gets it. Raises RowError."""
        return conversation(self._task, self._template, row)

    def render(self, row: Row) -> str:
        """What the model reads, as text for people; one placeholder stands for each image. Raises
        RowError.
        """
        if self._chat is None:
            return self.text(row)
        return self.prompter.render(self.messages(row), thinking=self._task.thinking)

    def unprinted(self, row: Row) -> list[str]:
        """What the row's messages say and the chat template leaves out: see Prompter.unprinted."""
        return [] if self._task.messages is None else self.prompter.unprinted(self.messages(row))

    def prompts(self, rows: Sequence[Row]) -> list[Prompt | RowError]:
        """Each row's prompt, checked against the model's limit, or what is wrong with the row.

        The media of all rows are loaded together, so that those behind URLs come at once.
        """
        drafts = [self._draft(row) for row in rows]
        parts = [part for draft in drafts if isinstance(draft, Draft) for part in draft.parts]
        with timed(MEDIA):
            loaded = iter(
                self._loader.load([(part.kind, part.source) for part in parts]) if parts else ()
            )
        return [
            self._prompt(draft, list(islice(loaded, len(draft.parts))))
            if isinstance(draft, Draft)
            else draft
            for draft in drafts
        ]

    def request(self, row_key: str, prompt: Prompt) -> Request:
        """The request for a prompt. Sampling draws from a seed of the row's own: see `row_seed`."""
        work = self.work
        if isinstance(work, Generate) and work.sampling.temperature > 0:
            work = replace(
                work, sampling=replace(work.sampling, seed=row_seed(work.sampling.seed, row_key))
            )
        return Request(id=row_key, input_ids=prompt.input_ids, work=work, media=prompt.media)

    def gold_ids(self, row: Row, prompt: Prompt) -> tuple[int, ...] | None:
        """What `task.gold_logprobs` scores after the prompt: the gold answer's token ids, None
        where there is none.

        An answer of white space is none. Raises RowError for one that does not fit behind the
        prompt.
        """
        gold = (
            row.get(self._task.gold)
            if self._task.gold_logprobs and self._task.gold is not None
            else None
        )
        if gold is None or not str(gold).strip():
            return None
        assert self._chat is not None
        ids = self._chat.answer_ids(str(gold))
        if len(prompt.input_ids) + len(ids) > self._max_model_len:
            raise RowError(
                "gold_too_long",
                f"the prompt has {len(prompt.input_ids)} tokens and the gold answer {len(ids)}; at most "
                f"{self._max_model_len} fit together: shorten one of them, or leave task.gold_logprobs out",
            )
        return ids

    def to_columns(
        self, completion: Completion, row: Row, gold_tokens: int | None = None
    ) -> Columns:
        """The row's output: status, error, task columns and token counts. Never raises RowError: it
        records it.

        `row` is read by tag alone, whose tokens carry the prompt's text and offsets. `gold_tokens`
        counts `gold_ids`.
        """
        counts = {
            "prompt_tokens": completion.prompt_tokens,
            "cached_tokens": completion.cached_tokens,
            "output_tokens": completion.output_tokens,
            "media_tokens": completion.media_tokens,
        }
        try:
            columns = self._answer(completion, row, gold_tokens)
        except RowError as error:
            return {**self.error_columns(error), **counts}
        return {"status": "ok", "error_code": None, "error_message": None, **columns, **counts}

    def error_columns(self, error: RowError) -> Columns:
        """The record of a row that failed: the same columns as a good one, null but for the error."""
        return {
            "status": "error",
            "error_code": error.code,
            "error_message": error.message,
            **self._null_columns,
        }

    def is_right(self, columns: Columns, gold: object) -> bool | None:
        """Whether an output agrees with the gold value; a failed row does not. None where there is
        no gold value.
        """
        if gold is None:
            return None
        if columns["status"] != "ok":
            return False
        match self._task.kind:
            case "choose":
                return bool(columns["label"] == str(gold))
            case "generate":
                texts = columns["text"] if isinstance(columns["text"], list) else [columns["text"]]
                return bool(texts[0].strip() == str(gold).strip())
            case "extract":
                return same_json(json.loads(columns["json"]), json_or_text(gold))
            case "classify" if self._problem_type == "multi_label_classification":
                golds = gold if isinstance(gold, list | tuple) else [gold]
                return set(columns["label"]) == {str(label) for label in golds}
            case "classify" if self._problem_type == "single_label_classification":
                return bool(columns["label"] == str(gold))
        raise ConfigError(
            f"task.gold: task.kind {self._task.kind} has no single right answer to compare with"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What was decided for this job and belongs into its manifest."""
        found: dict[str, Any] = {}
        if isinstance(self.work, Choose):
            found = {
                "label_token_ids": [list(ids) for ids in self.work.choices],
                "end_counted": self.work.count_end,
            }
        if self._task.kind == "classify":
            found = {"problem_type": self._problem_type, "label_names": list(self._config.id2label)}
        return (
            found
            if self.calibration is None
            else found | {"calibration": self.calibration.to_json()}
        )

    @property
    def _labels(self) -> Sequence[str]:
        return self._task.labels or self._config.id2label

    def _read_calibration(self) -> Calibration:
        """Raises ConfigError for a file that was not fitted for this."""
        if self._task.kind == "classify" and self._problem_type != "single_label_classification":
            raise ConfigError(
                f"task.calibration: a {self._problem_type} has no probabilities that add up to 1; remove it"
            )
        found = read_calibration(self._task.calibration or "")
        found.check(self._task, self._labels, model_digest(self._model_dir))
        return found

    def _check_gold_logprobs(self) -> None:
        """Raises ConfigError where this checkpoint writes no answer right after a prompt."""
        assert self._chat is not None
        if self._task.thinking and self._chat.thinking_form != "none":
            raise ConfigError(
                "task.gold_logprobs: gold answers are scored right after the prompt, where this checkpoint would begin "
                "to reason; set task.thinking: false, or leave it out"
            )
        try:
            self._chat.answer_ids("a")
        except RowError as error:
            raise ConfigError(f"task.gold_logprobs: {error.message}") from error

    def _build_work(self) -> Work:
        task = self._task
        match task.kind:
            case "choose":
                assert self._chat is not None
                choices = self._chat.label_continuations(
                    list(task.labels or ()), thinking=task.thinking
                )
                return Choose(
                    choices=tuple(choices),
                    count_end=self._chat.count_end(choices, task.end_of_label),
                )
            case "generate":
                return Generate(sampling=self._job.sampling)
            case "extract":
                if not self._tokenizer.eos_token_ids:
                    raise ConfigError(
                        "model: generation_config.json and config.json name no eos_token_id, so that the end of a JSON "
                        "text cannot be told; add it"
                    )
                constraint = Constraint(kind="json_schema", text=json.dumps(task.schema))
                return Generate(sampling=self._job.sampling, constraint=constraint)
            case "classify":
                return Classify()
            case "tag":
                return Tag()
            case "embed":
                return Embed(pooling=task.pooling, normalize=task.normalize)
            case "requests":
                raise ConfigError(
                    "task: it is missing; every job needs one, but for input_format: openai_batch"
                )

    def _tokens_after_prompt(self) -> int:
        match self.work:
            case Generate():
                return 1
            case Choose(choices=choices):
                return max(len(choice) for choice in choices)
        return 0

    @cached_property
    def _loader(self) -> MediaLoader:
        way = repr((media_rules(self._job), media_budgets(self._job.preprocess, self._model_dir)))
        if way not in self._loaders:
            self._loaders[way] = media_loader(self._job, self._model_dir)
        return self._loaders[way]

    def _draft(self, row: Row) -> Draft | RowError:
        try:
            if self._chat is None:
                return Draft(input_ids=self._tokenizer.encode_raw(self.text(row)), parts=[])
            # The grammar of a JSON text begins at "{": what the template puts before an answer must
            # stand already.
            return self.prompter.draft(
                self.messages(row),
                thinking=self._task.thinking,
                start_answer=self._task.kind == "extract",
            )
        except RowError as error:
            return error

    def _prompt(self, draft: Draft, loaded: list[MediaPatches | RowError]) -> Prompt | RowError:
        try:
            prompt = self.prompter.prompt(draft, loaded)
            of_media = self.prompter.media.num_tokens(prompt.patches) if prompt.patches else 0
            self._check_length(len(prompt.input_ids), of_media)
            return prompt
        except RowError as error:
            return error

    def _check_length(self, num_tokens: int, of_media: int = 0) -> None:
        most = self._max_model_len - self._reserved
        if num_tokens > most:
            kept = f", {self._reserved} of them kept for the answer" if self._reserved else ""
            media = (
                f", {of_media} of them for media: lower preprocess.max_pixels" if of_media else ""
            )
            raise RowError(
                "prompt_too_long",
                f"the prompt has {num_tokens} tokens{media}; at most {most} fit "
                f"(the limit is {self._max_model_len} tokens{kept})",
            )

    def _answer(self, completion: Completion, row: Row, gold_tokens: int | None) -> Columns:
        if completion.error is not None:
            raise completion.error
        if completion.finish_reason == "abort":
            raise RowError("aborted", "the request was ended before it was answered")
        match self._task.kind:
            case "choose":
                return self._choose_columns(completion)
            case "generate":
                return self._generate_columns(completion.outputs) | self._gold_columns(
                    completion, gold_tokens
                )
            case "extract":
                return self._extract_columns(completion.outputs[0])
            case "classify":
                return self._classify_columns(
                    _finite(completion.array, (len(self._config.id2label),))
                )
            case "tag":
                return self._tag_columns(completion, row)
            case "embed":
                return {"vector": _finite(completion.array, (self._config.hidden_size,))}
        raise AssertionError(f"a task of kind {self._task.kind} is no TaskRunner's")

    def _choose_columns(self, completion: Completion) -> Columns:
        """The formulas of the public contract: softmax over the labels' joint log-probabilities, 1
        - their sum.
        """
        found = label_scores(completion.choice_logprobs or (), self._scaling)
        columns: Columns = {
            "label": (self._task.labels or [])[found.best],
            "probability": found.probabilities[found.best],
            "label_probs": found.probabilities,
            "off_set_mass": found.off_set_mass,
        }
        if self._task.label_logprobs:
            columns["label_logprobs"] = list(completion.choice_logprobs or ())
        return columns

    def _generate_columns(self, outputs: tuple[Output, ...]) -> Columns:
        assert self._chat is not None
        parts = [
            self._chat.split_reasoning(output.text, thinking=self._task.thinking)
            for output in outputs
        ]
        columns: dict[str, list[Any]] = {
            "text": [answer for _, answer in parts],
            "reasoning": [reasoning for reasoning, _ in parts],
            "finish_reason": [output.finish_reason for output in outputs],
            "logprobs": [
                None if output.logprobs is None else list(output.logprobs) for output in outputs
            ],
        }
        if self._job.sampling.n > 1:
            return columns
        return {name: values[0] for name, values in columns.items()}

    def _gold_columns(self, completion: Completion, gold_tokens: int | None) -> Columns:
        if not self._task.gold_logprobs:
            return {}
        if gold_tokens is None:
            return {"gold_logprob": None, "gold_num_tokens": None}
        if completion.choice_logprobs is None:
            raise RowError(
                "not_scored", "the scoring of the gold answer was ended before it was done"
            )
        (logprob,) = completion.choice_logprobs
        if not math.isfinite(logprob):
            raise RowError(
                "not_finite",
                f"the gold answer's log-probability is {logprob}: try engine.dtype float32",
            )
        return {"gold_logprob": logprob, "gold_num_tokens": gold_tokens}

    def _extract_columns(self, output: Output) -> Columns:
        text = output.text.strip()
        if output.finish_reason == "length":
            raise RowError(
                "output_truncated",
                f"the JSON was cut off after {len(output.token_ids)} tokens: raise sampling.max_tokens "
                f"(now {self._job.sampling.max_tokens}) or allow shorter values in task.schema; it began {text[:80]!r}",
            )
        self._json_validator.check(text)
        return {"json": text}

    def _classify_columns(self, logits: NDArray[np.float64]) -> Columns:
        scores, label = class_scores(
            logits, self._config.id2label, self._problem_type, self._scaling
        )
        return {"scores": scores, "label": label}

    def _tag_columns(self, completion: Completion, row: Row) -> Columns:
        """One entry for each token of the text; the tokenizer's own special tokens are no part of
        the text.
        """
        text = self.text(row)
        ids, offsets = self._tokenizer.encode_raw_with_offsets(text)
        names = self._config.id2label
        scores = softmax(_finite(completion.array, (len(ids), len(names))))  # [tokens, num_labels]
        best = scores.argmax(axis=-1)
        special = self._tokenizer.special_ids
        tokens = [
            {
                "text": text[start:end],
                "start": start,
                "end": end,
                "label": names[label],
                "score": float(row_scores[label]),
            }
            for token_id, (start, end), label, row_scores in zip(
                ids, offsets, best.tolist(), scores, strict=True
            )
            if token_id not in special
        ]
        return {"tokens": tokens}

    @cached_property
    def _json_validator(self) -> JsonValidator:
        return JsonValidator(self._task.schema or {})


SCHEMA_S = 60.0  # that task.schema may take to compile
TOKEN_COLUMNS = ("prompt_tokens", "cached_tokens", "output_tokens", "media_tokens")


class JsonValidator:
    """Checks a text against a JSON schema, byte by byte, with the library that constrains the
    decoding.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        import llguidance

        self._grammar = llguidance.grammar_from("json_schema", json.dumps(schema))
        self._tokenizer = llguidance.LLTokenizer("byte")

    def check(self, text: str) -> None:
        """Raises RowError("invalid_json") with the place where the text leaves JSON or the schema."""
        import llguidance

        try:
            json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RowError(
                "invalid_json", f"the output is not JSON: {error}; it began {text[:80]!r}"
            ) from error
        matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        # which the library takes for a control character
        spelled = text.replace("\x7f", "\\u007f").encode()
        data = list(spelled)
        accepted = matcher.validate_tokens(data)
        if accepted < len(data):
            place = spelled[:accepted].decode(errors="replace")
            raise RowError("invalid_json", f"the output leaves task.schema after {place[-80:]!r}")
        matcher.consume_tokens(data)
        if not matcher.is_accepting():
            raise RowError(
                "invalid_json", f"the output ends before task.schema is satisfied: {text[-80:]!r}"
            )


def check_schema(schema: dict[str, Any], timeout_s: float = SCHEMA_S) -> None:
    """Raises ConfigError when the constrained decoder cannot follow this JSON schema, or compile it
    in time.
    """
    checker = SchemaChecker(timeout_s)
    try:
        problem = checker.problem(json.dumps(schema))
    finally:
        checker.close()
    if problem:
        raise ConfigError(f"task.schema: not a JSON schema that decoding can follow: {problem}")


def row_seed(seed: int, row_key: str) -> int:
    """A row's own seed in [0, 2^63): rows draw independently, and a rerun draws the same."""
    digest = hashlib.blake2b(f"{seed}:{row_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _finite(array: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if array is None or array.shape != shape:
        got = None if array is None else array.shape
        raise RowError(
            "wrong_shape",
            f"the engine answered with shape {got} where the checkpoint's head has {shape}",
        )
    if not np.isfinite(array).all():
        raise RowError(
            "not_finite", "the model's output holds NaN or infinity: try engine.dtype float32"
        )
    return array.astype(np.float64)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
