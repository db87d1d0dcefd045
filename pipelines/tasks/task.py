"""What a kind of task is: which keys it takes, what it asks the engine, and what answers become.

Each kind is a subclass in a file of its own; pipelines.tasks.kinds lists them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from glm_batch.models import rooms
from glm_batch.models.checkpoint.directory import model_digest
from glm_batch.models.checkpoint.model_config import ModelConfig
from glm_batch.models.engine.api.interface import Task as EngineTask
from glm_batch.models.engine.api.request import Completion, Generate, Request, Work
from glm_batch.models.errors import ConfigError, RowError
from glm_batch.models.processing.prompt import Prompt, Prompter
from glm_batch.models.processing.scores import Scaling
from glm_batch.pipelines.input.values import Row
from glm_batch.pipelines.job import Job, TaskConfig

Columns = dict[str, Any]


class Task(ABC):
    """One job's task in one process. A row's columns are null where it failed.

    `keys` are the keys of the task section that not every kind takes; a job that sets another is
    refused. `head` is what the checkpoint must end in, None for any. `engine_task` is what an
    engine is told that all requests will ask for. Prompts of `chats` kinds go through the chat
    template; others take raw text where the job makes no conversation. `notes` are the columns that
    travel beside a row's requests, for `answer`.
    """

    keys: ClassVar[tuple[str, ...]]
    head: ClassVar[str | None] = "causal_lm"
    engine_task: ClassVar[EngineTask]
    chats: ClassVar[bool] = True
    start_answer: ClassVar[bool] = False  # see Chat.prompt_ids
    sampling: ClassVar[frozenset[str]] = frozenset()  # keys of that section which have an effect
    has_right_answer: ClassVar[bool] = False
    notes: ClassVar[Mapping[str, pa.DataType]] = {}

    def __init__(self, job: Job, prompter: Prompter, scaling: Scaling | None = None) -> None:
        """Raises ConfigError for what the checkpoint cannot do.

        `scaling` is what the file held that task.calibration names; without it, that is read.
        """
        self.job, self.config = job, job.task
        self.prompter, self.model = prompter, prompter.config
        self.scaling = scaling
        self.calibration: Any = None  # a Calibration, where one was read here
        if scaling is None and self.config.calibration is not None:
            self.calibration = self._read_calibration(self.config.calibration)
            self.scaling = self.calibration.scaling(self.labels)
        self.work: Work = self._work()

    @staticmethod
    @abstractmethod
    def columns(job: Job, model: ModelConfig) -> dict[str, pa.DataType]:
        """The task's own output columns."""

    @staticmethod
    def problems(job: Job) -> Iterator[tuple[str, str]]:
        """(key, what is wrong with it) where the job's keys do not make a task of this kind."""
        return iter(())

    @staticmethod
    def checkpoint_problems(job: Job, model: ModelConfig) -> Iterator[str]:
        """Why a checkpoint with the right head cannot do it all the same."""
        return iter(())

    @abstractmethod
    def _work(self) -> Work:
        """What is asked about each row's prompt."""

    @property
    def labels(self) -> Sequence[str]:
        """The answers of which each has a probability."""
        return ()

    @property
    def num_answer_tokens(self) -> int:
        """Tokens for which there must be room behind a prompt."""
        return 0

    @property
    def facts(self) -> dict[str, Any]:
        """What was decided for this job and belongs into its manifest."""
        found = {"calibration": self.calibration.to_json()} if self.calibration else {}
        return self._facts() | found

    def _facts(self) -> dict[str, Any]:
        return {}

    def preview(self, row: Row, prompt: str) -> str:
        """What the model reads of a row, for people; `prompt` is the rendered prompt."""
        return prompt

    def requests(self, key: str, row: Row, prompt: Prompt) -> list[Request]:
        """What the engine is asked about a row; the first request's id is its key.

        Sampling draws from a seed of the row's own. Raises RowError.
        """
        work = self.work
        if isinstance(work, Generate) and work.sampling.temperature > 0:
            seed = row_seed(work.sampling.seed, key)
            work = replace(work, sampling=replace(work.sampling, seed=seed))
        return [Request(id=key, input_ids=prompt.input_ids, work=work, media=prompt.media)]

    def note(self, row: Row, requests: Sequence[Request]) -> dict[str, Any]:
        """What `answer` will be told of the row, by the columns of `notes`."""
        return {}

    @abstractmethod
    def answer(self, completions: Sequence[Completion], note: Mapping[str, Any]) -> Columns:
        """The row's own columns, of completions without an error. Raises RowError."""

    def is_right(self, columns: Columns, gold: object) -> bool:
        """Whether a row's columns agree with its gold answer."""
        raise ConfigError(
            f"task.gold: task.kind {self.config.kind} has no single right answer to compare with"
        )

    def _read_calibration(self, path: str) -> Any:
        module = rooms.load("pipelines.calibration.calibration")
        found = module.read_calibration(path)
        found.check(self.config, self.labels, model_digest(self.prompter.model_dir))
        return found


def unsupported_keys(task: TaskConfig, kinds: Mapping[str, type[Task]]) -> dict[str, list[str]]:
    """The keys that the job sets and its kind does not take -> the kinds that do."""
    named = dict.fromkeys(key for kind in kinds.values() for key in kind.keys)
    default = TaskConfig(kind=task.kind)
    return {
        key: [name for name, kind in kinds.items() if key in kind.keys]
        for key in named
        if key not in kinds[task.kind].keys and getattr(task, key) != getattr(default, key)
    }


def row_seed(seed: int, row_key: str) -> int:
    """A row's own seed in [0, 2^63): rows draw independently, and a rerun draws the same."""
    digest = hashlib.blake2b(f"{seed}:{row_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def finite(array: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """An engine's array as float64. Raises RowError for another shape, NaN or infinity."""
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
