"""RowPrompts: rows to prompts by the job's template, its media rules and the model's limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice

from glm_batch.glm_actors.faults.spent import MEDIA, timed
from glm_batch.glm_actors.media.media_loader import MediaLoader
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.patches import MediaPatches
from glm_batch.models.processing.prompt import Draft, Prompt
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.tasks.job_media import (
    media_budgets,
    media_loader,
    media_rules,
    reads_media,
)
from glm_batch.pipelines.tasks.kinds import uses_chat
from glm_batch.pipelines.tasks.prompts import Message, PromptTemplate, conversation
from glm_batch.pipelines.tasks.task import Task


class RowPrompts:
    """What a job's rows say to the model.

    Media are decoded in a process of their own, which starts with `start` or when the first is
    asked for; those that are given the same `loaders` share it where they load in the same way.
    """

    def __init__(self, task: Task, loaders: dict[str, MediaLoader]) -> None:
        """Raises ConfigError for a template or media that the checkpoint does not take."""
        self._task, self._loaders = task, loaders
        self._job, self._config, self._prompter = task.job, task.config, task.prompter
        prompt = self._config.prompt
        self._template = PromptTemplate.parse(prompt) if prompt is not None else None
        self._is_chat = uses_chat(self._config)
        limit = self._job.engine.max_model_len
        self._max_model_len = task.model.longest_context if limit == "auto" else limit
        self.reads_media = reads_media(self._job, self._prompter.model_dir)
        # what is wrong with these should be known before rows come
        if self._is_chat:
            _ = self._prompter.chat
        if self.reads_media:
            _ = self._prompter.media, self._loader

    def start(self) -> None:
        """Begins to start the process that decodes media, where the job names any."""
        if self.reads_media:
            self._loader.start()

    def close(self) -> None:
        """Ends that process."""
        if "_loader" in self.__dict__:
            self._loader.close()

    @property
    def key(self) -> str:
        """Where this is equal for one checkpoint, equal prompts are made of a row."""
        task = replace(
            self._config, gold=None, label_logprobs=False, gold_logprobs=False, calibration=None
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
        """The row's conversation. Raises RowError."""
        return conversation(self._config, self._template, row)

    def render(self, row: Row) -> str:
        """What the model reads, for people; one placeholder an image. Raises RowError."""
        if not self._is_chat:
            return self.text(row)
        return self._prompter.render(self.messages(row), thinking=self._config.thinking)

    def unprinted(self, row: Row) -> list[str]:
        """What the row's messages say and the chat template leaves out: see Prompter.unprinted."""
        if self._config.messages is None:
            return []
        return self._prompter.unprinted(self.messages(row))

    def __call__(self, rows: Sequence[Row]) -> list[Prompt | RowError]:
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

    @cached_property
    def _loader(self) -> MediaLoader:
        job, model_dir = self._job, self._prompter.model_dir
        way = repr((media_rules(job), media_budgets(job.preprocess, model_dir)))
        if way not in self._loaders:
            self._loaders[way] = media_loader(job, model_dir)
        return self._loaders[way]

    def _draft(self, row: Row) -> Draft | RowError:
        try:
            if not self._is_chat:
                ids = self._prompter.tokenizer.encode_raw(self.text(row))
                return Draft(input_ids=ids, parts=[])
            return self._prompter.draft(
                self.messages(row),
                thinking=self._config.thinking,
                start_answer=self._task.start_answer,
            )
        except RowError as error:
            return error

    def _prompt(self, draft: Draft, loaded: list[MediaPatches | RowError]) -> Prompt | RowError:
        try:
            prompt = self._prompter.prompt(draft, loaded)
        except RowError as error:
            return error
        reserved = self._task.num_answer_tokens
        most = self._max_model_len - reserved
        if len(prompt.input_ids) <= most:
            return prompt
        kept = f", {reserved} of them kept for the answer" if reserved else ""
        shown = self._prompter.media.num_tokens(prompt.patches) if prompt.patches else 0
        media = f", {shown} of them for media: lower preprocess.max_pixels" if shown else ""
        return RowError(
            "prompt_too_long",
            f"the prompt has {len(prompt.input_ids)} tokens{media}; at most {most} fit "
            f"(the limit is {self._max_model_len} tokens{kept})",
        )
