"""The job as data: a frozen dataclass for each section of a job file, every default written once.

The names, types and defaults are the public job contract; jobs.files reads YAML into them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from glm_batch.models.engine.api.interface import EngineOptions
from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.request_limits import RequestLimits

Auto = Literal["auto"]
TaskKind = Literal[
    "choose", "generate", "extract", "classify", "tag", "embed", "loglikelihood", "requests"
]
COLUMN = {"names": "columns of the input"}  # metadata of keys


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What is asked of the model for each row."""

    kind: TaskKind  # "requests": each row asks for itself (input_format openai_batch)
    system: str | None = None  # a system message
    prompt: str | None = None  # a template over columns: "{text}"; {{ and }} are literal braces
    # or: a column of chat messages (structs, or JSON text) instead of prompt
    messages: str | None = field(default=None, metadata=COLUMN)
    # column(s): bytes, path, URL or data URL; a list column gives several images
    image: str | list[str] | None = field(default=None, metadata=COLUMN)
    # the same for clips; media come before the prompt's text, images first
    video: str | list[str] | None = field(default=None, metadata=COLUMN)
    labels: list[str] | None = None  # choose: any strings, of one or many tokens each
    # choose: count the label's end? auto: if one label begins another
    end_of_label: Literal["auto", "always", "never"] = "auto"
    label_logprobs: bool = False  # choose: a column with each label's joint log-probability
    # generate: columns with the gold answer's log-probability after the prompt
    gold_logprobs: bool = False
    calibration: str | None = None  # choose, classify: a file of `glm-batch calibrate`
    schema: dict[str, Any] | None = None  # extract: a JSON schema
    thinking: bool = False  # generate: let the model reason first, into the column `reasoning`
    pooling: Literal["last", "mean"] = "last"  # embed: the last token's state, or the mean
    normalize: bool = False  # embed: vectors of length 1
    # loglikelihood: a column with the text that is scored after the prompt, not the prompt itself
    completion: str | None = field(default=None, metadata=COLUMN)
    # a column with the right answer: the summary then tells the accuracy
    gold: str | None = field(default=None, metadata=COLUMN)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection(EngineOptions):
    """The `engine:` section: how the model is run, and on how many engines."""

    # engines that share the rows; [fewest, most] grows while rows wait
    replicas: int | tuple[int, int] = 1

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSection:
    """The `cluster:` section: machines for `glm-batch plan` to plan for.

    It tells `plan` alone: a run takes the cluster that it finds.
    """

    nodes: int | Auto = "auto"  # how many; auto: this machine
    cpus: int | Auto = "auto"  # cores of each
    gpus: int | Auto = "auto"  # GPUs of each


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSection:
    """The `preprocess:` section: CPU workers, and budgets for media; null is a checkpoint's."""

    workers: int | Auto = "auto"  # CPU actors that render and tokenize
    min_pixels: int | None = None  # height x width of an image after resizing
    # the same from above, for a video over all its frames; fewer pixels, fewer tokens
    max_pixels: int | None = None
    fps: float | None = None  # frames taken of each second of a video


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSection:
    """The `media:` section: where images and videos may come from, beside the bytes in the rows."""

    root: str | None = None  # the directory below which paths must lie; null: paths are refused
    # hosts whose URLs may be fetched, if their addresses are public; empty: none
    hosts: list[str] = field(default_factory=list)
    private_hosts: list[str] = field(default_factory=list)  # hosts that may have private addresses
    max_bytes: int = 1 << 30  # a larger file is that row's error
    fetch_timeout_s: float = 30.0  # for one URL, redirects and retries included
    decode_timeout_s: float = 600.0  # for one image or video
    decode_bytes: int = 1 << 30  # memory that decoding one may take


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSection:
    """The `commit:` section: how much finished work a crash may cost at most."""

    unit_rows: int | Auto = "auto"  # rows that are committed together
    every_seconds: float = 30.0  # finished rows are safe after at most so many seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CronSection:
    """The `cron:` section, for `glm-batch cron` alone."""

    keep: int = 7  # versions of the output that stay
    webhook: str | None = None  # an http(s) URL that is told of each run


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSection:
    """The `storage:` section: options for s3:// paths."""

    endpoint_url: str | None = None  # a store other than AWS, such as http://localhost:9000
    anon: bool = False  # true: without credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsSection:
    """The `requests:` section: how the requests of an OpenAI batch file are taken."""

    # names they may give the model, beside that of its directory
    models: list[str] = field(default_factory=list)
    thinking: bool = False  # unless a request says otherwise
    limits: RequestLimits = field(default_factory=RequestLimits)  # a server's


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job: model, input, output, task."""

    model: str  # a checkpoint directory
    input: list[str]  # Parquet or JSONL: files, globs, directories, s3:// objects and prefixes
    output: str  # a directory or s3:// prefix; one job each
    # openai_batch: without task, key and carry
    input_format: Literal["rows", "openai_batch"] = "rows"
    task: TaskConfig = TaskConfig(kind="requests")
    key: str | None = None  # a unique column; without it, rows are named by file and row number
    carry: list[str] = field(default_factory=list)  # input columns to copy into the output
    sampling: SamplingParams = field(default_factory=SamplingParams)  # for generate and extract
    engine: EngineSection = field(default_factory=EngineSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    preprocess: PreprocessSection = field(default_factory=PreprocessSection)
    requests: RequestsSection = field(default_factory=RequestsSection)
    # where images and videos may come from
    media: MediaSection = field(default_factory=MediaSection)
    commit: CommitSection = field(default_factory=CommitSection)
    max_error_rate: float = 0.0  # the fraction of rows that may fail before the exit code is 3
    # stop as soon as more rows failed than that; a rerun without it goes on
    fail_fast: bool = False
    cron: CronSection = field(default_factory=CronSection)
    storage: StorageSection = field(default_factory=StorageSection)  # for s3:// paths

    @property
    def asks_by_row(self) -> bool:
        """Whether each row is a request of its own, and not the job's question about the row."""
        return self.input_format == "openai_batch"

    @property
    def key_column(self) -> str | None:
        """The column that names the rows; None where file and row number do."""
        return "custom_id" if self.asks_by_row else self.key


def job_file(job: Job) -> bytes:
    """The job as JSON, fit for another current directory and without secrets."""
    root = None if job.media.root is None else os.path.abspath(job.media.root)
    calibration = None if job.task.calibration is None else os.path.abspath(job.task.calibration)
    task, media = replace(job.task, calibration=calibration), replace(job.media, root=root)
    found = replace(job, model=os.path.abspath(job.model), task=task, media=media)
    # such URLs let everybody write who has them
    found = replace(found, cron=replace(job.cron, webhook=None))
    return json.dumps(asdict(found), indent=1).encode()


# Keys of the task section since the first version. Later ones stand in a job's identity where they
# are set, so that outputs begun before go on.
FIRST_KEYS = (
    "kind", "system", "prompt", "messages", "image", "video", "labels", "end_of_label", "schema",
    "thinking", "pooling", "normalize", "gold",
)  # fmt: skip


def task_identity(task: TaskConfig) -> dict[str, Any]:
    """What of a task decides what rows come out as, but for what its calibration holds."""
    default = TaskConfig(kind=task.kind)
    return {
        name: value
        for name, value in asdict(replace(task, calibration=None)).items()
        if name in FIRST_KEYS or value != getattr(default, name)
    }
