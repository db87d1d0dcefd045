"""Jobs over tables: rows in, committed rows out. Importing this loads neither ray nor torch.

job.py is the job as data, which every room may import. The rooms, each of which may import those
before it: `storage`, `input`, `metrics`, `tasks`, `planning`, `output`, `cluster`, `graph`, `runs`;
optional: `evaluation`, `calibration`, `openai_batch`, `shared`, `cron`, `sweep`, `report`. Read
runs/pipeline.py first: it is the whole flow.
"""

from __future__ import annotations

from glm_batch.pipelines.job import Job
from glm_batch.pipelines.runs.pipeline import Result, build_dataset, run

__all__ = ["Job", "Result", "build_dataset", "run"]
