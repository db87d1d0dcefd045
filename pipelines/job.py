"""The job as data: one frozen dataclass for each section of a job file, with every default written
once.

Owns names, types and defaults of the public job contract. Parsing YAML and judging values against
files is the business of jobs.files.job_file; running them, of pipelines.runs.pipeline.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from glm_batch.models.engine.api.request import SamplingParams
from glm_batch.models.request_limits import RequestLimits

Auto = Literal["auto"]
TaskKind = Literal["choose", "generate", "extract", "classify", "tag", "embed", "requests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What is asked of the model for each row; kind "requests" says that each row says so itself.

    `prompt` is a template over columns ("{text}"); `messages` names a column that holds chat
    messages instead. `gold` names a column with the right answer: the summary then prints the
    accuracy. `calibration` is a file that `glm-batch calibrate` has written.
    """

    kind: TaskKind
    system: str | None = None
    prompt: str | None = None
    messages: str | None = None
    image: str | list[str] | None = None
    video: str | list[str] | None = None
    labels: list[str] | None = None
    end_of_label: Literal["auto", "always", "never"] = "auto"
    label_logprobs: bool = False
    gold_logprobs: bool = False
    calibration: str | None = None
    schema: dict[str, Any] | None = None
    thinking: bool = False
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = False
    gold: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSection:
    """The `engine:` section; all but `replicas` goes to models.engine.EngineConfig.

    Two `replicas` are the fewest and the most: the pool grows while units wait, as far as the
    cluster has room.
    """

    kind: Literal["auto", "torch", "vllm", "echo"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    tensor_parallel_size: int = 1
    replicas: int | tuple[int, int] = 1
    max_step_tokens: int | Auto = "auto"
    max_model_len: int | Auto = "auto"

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSection:
    """The `cluster:` section: machines to plan for, each with so many cores and GPUs; "auto" is
    this machine.

    It tells `glm-batch plan` alone: a run takes the cluster that it finds.
    """

    nodes: int | Auto = "auto"
    cpus: int | Auto = "auto"
    gpus: int | Auto = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSection:
    """The `preprocess:` section: CPU workers, and pixel and frame budgets for media; None is the
    checkpoint's own.

    `min_pixels` and `max_pixels` bound height x width of an image after resizing, and frames x
    height x width of a video, all its frames together. `fps` is the number of frames taken of each
    second.
    """

    workers: int | Auto = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSection:
    """The `media:` section: where images and videos may come from, beside the bytes in the rows.

    Paths must lie below `root`; URLs must name one of `hosts`, whose addresses must be public, or
    of `private_hosts`. `max_bytes` bounds an encoded file, `decode_bytes` the memory that decoding
    one may take.
    """

    root: str | None = None
    hosts: list[str] = field(default_factory=list)
    private_hosts: list[str] = field(default_factory=list)
    max_bytes: int = 1 << 30
    fetch_timeout_s: float = 30.0
    decode_timeout_s: float = 600.0
    decode_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSection:
    """The `commit:` section: how much finished work a crash may cost at most."""

    unit_rows: int | Auto = "auto"
    every_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CronSection:
    """The `cron:` section: how many versions of the output are kept, and who is told of each run
    (an http(s) URL).
    """

    keep: int = 7
    webhook: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSection:
    """The `storage:` section: options for s3:// paths."""

    endpoint_url: str | None = None
    anon: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsSection:
    """The `requests:` section: how the requests of an OpenAI batch file are taken, as a server
    would take them.

    `models` are names that they may give the model, beside that of its directory; `thinking` is
    what a request gets that does not say whether the model shall reason before it answers; `limits`
    are those of a server.
    """

    models: list[str] = field(default_factory=list)
    thinking: bool = False
    limits: RequestLimits = field(default_factory=RequestLimits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One job: model, input, output, task. See the README for every key."""

    model: str
    input: list[str]
    output: str
    input_format: Literal["rows", "openai_batch"] = "rows"
    task: TaskConfig = TaskConfig(kind="requests")
    key: str | None = None
    carry: list[str] = field(default_factory=list)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineSection = field(default_factory=EngineSection)
    cluster: ClusterSection = field(default_factory=ClusterSection)
    preprocess: PreprocessSection = field(default_factory=PreprocessSection)
    requests: RequestsSection = field(default_factory=RequestsSection)
    media: MediaSection = field(default_factory=MediaSection)
    commit: CommitSection = field(default_factory=CommitSection)
    max_error_rate: float = 0.0
    fail_fast: bool = False
    cron: CronSection = field(default_factory=CronSection)
    storage: StorageSection = field(default_factory=StorageSection)

    @property
    def asks_by_row(self) -> bool:
        """Whether each row is a request of its own, and not the job's question about the row."""
        return self.input_format == "openai_batch"

    @property
    def key_column(self) -> str | None:
        """The column that names the rows; None where file and row number do."""
        return "custom_id" if self.asks_by_row else self.key


def job_file(job: Job) -> bytes:
    """The job as JSON, to be found beside its output: fit for another current directory, and
    without secrets.
    """
    root = None if job.media.root is None else os.path.abspath(job.media.root)
    calibration = None if job.task.calibration is None else os.path.abspath(job.task.calibration)
    task, media = replace(job.task, calibration=calibration), replace(job.media, root=root)
    found = replace(job, model=os.path.abspath(job.model), task=task, media=media)
    # such URLs let everybody write who has them
    found = replace(found, cron=replace(job.cron, webhook=None))
    return json.dumps(asdict(found), indent=1).encode()
