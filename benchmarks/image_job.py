"""`python -m benchmarks.image_job`: many photos through a whole job with the shipped tiny GLM-4.1V.

Shows images per second, how many cores the job keeps busy and with what, the bytes that an image
takes between two stages, and whether memory stays flat. Owns the photos' shards, the job file and
the report.
"""

from __future__ import annotations

import json
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import BUILD, ROOT
from benchmarks.machine import describe
from benchmarks.photos import photos
from benchmarks.watched_job import MIB, WORKERS, WatchedJob, run_watched
from glm_batch.glm_actors.units.batches import request_table
from glm_batch.jobs.files.sections import load_job
from glm_batch.models.engine.api.request import Request
from glm_batch.pipelines.tasks.task_runner import ReadRow, TaskRunner

MARKS = (0.1, 0.5, 1.0)
ROWS_PER_FILE = 1000
PRODUCTIVE = ("decoders", "engine")  # the rest of the CPU seconds moves rows about


def main(
    rows: Annotated[int, typer.Option(min=32)] = 2000,
    width: Annotated[int, typer.Option(min=28)] = 640,
    height: Annotated[int, typer.Option(min=28)] = 480,
    model: Annotated[str, typer.Option(help="a GLM-4.1V checkpoint")] = str(
        ROOT / "examples" / "tiny_glm"
    ),
    workers: Annotated[int, typer.Option(help="preprocess.workers; 0 is auto")] = 0,
    timeout: Annotated[float, typer.Option(help="seconds the job may take")] = 3000.0,
) -> None:
    """Runs the job and prints its speed, its CPU seconds by kind of process and its memory."""
    console = Console()
    folder = BUILD / "image_job"
    job_path = _write_job(folder, rows, width, height, model, workers)
    job = run_watched(job_path, folder / "out", timeout)
    if job.num_rows != rows:
        raise SystemExit(f"{rows} rows went in, {job.num_rows} are committed in {folder / 'out'}")
    report = _report(job, _bytes_between_stages(job_path, folder), f"{width}x{height}")
    report_path = BUILD / f"image-job-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report_path.write_text(json.dumps(report, indent=1))
    _show(console, report)
    console.print(f"written to {report_path}")


def _write_job(folder: Path, rows: int, width: int, height: int, model: str, workers: int) -> Path:
    shutil.rmtree(folder / "out", ignore_errors=True)
    shards = folder / f"{rows}-{width}x{height}"
    if not shards.is_dir():
        _write_shards(shards, rows, width, height)
    job: dict[str, Any] = {
        "model": model,
        "input": [str(shards / "*.parquet")],
        "output": str(folder / "out"),
        "key": "id",
        "task": {
            "kind": "choose",
            "image": "image",
            "prompt": "Which shape is it?",
            "labels": ["circle", "square", "triangle"],
        },
    }
    if workers:
        job["preprocess"] = {"workers": workers}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def _write_shards(folder: Path, rows: int, width: int, height: int) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    stream = photos(rows, width, height)
    for start in range(0, rows, ROWS_PER_FILE):
        images = list(islice(stream, min(ROWS_PER_FILE, rows - start)))
        table = pa.table(
            {"id": list(range(start, start + len(images))), "image": pa.array(images, pa.binary())}
        )
        pq.write_table(
            table, partial / f"{start:07d}.parquet", row_group_size=100, compression="none"
        )
    partial.rename(folder)


def _bytes_between_stages(job_path: Path, folder: Path) -> dict[str, float]:
    """Bytes of an image as it is read, and of its row between preprocessing and the engine."""
    job, _ = load_job(str(job_path))
    shard = pq.read_table(next(iter(sorted(folder.glob("*/*.parquet"))))).slice(0, 32)
    runner = TaskRunner(job, job.model)
    rows = [{"image": image} for image in shard["image"].to_pylist()]
    read = [ReadRow(name=str(number), row=row) for number, row in enumerate(rows)]
    requests: list[Request] = []
    for asked in runner.ask(read):
        if asked.error is not None:
            raise asked.error
        requests += asked.requests
    runner.close()
    table = request_table([request.id for request in requests], requests)
    return {
        "encoded": sum(map(len, shard["image"].to_pylist())) / len(requests),
        "between_stages": table.nbytes / len(requests),
        "prompt_tokens": sum(len(request.input_ids) for request in requests) / len(requests),
    }


def _report(job: WatchedJob, sizes: dict[str, float], photo: str) -> dict[str, Any]:
    """CPU seconds once over everything and once from the first committed unit to the last
    (`steady`).
    """
    first, last = job.working[0], job.working[-1]
    steady = {kind: last.cpu_s[kind] - first.cpu_s.get(kind, 0.0) for kind in last.cpu_s}
    seconds = last.at_s - first.at_s
    whole = job.samples[-1].cpu_s
    return {
        "machine": describe(),
        "photo": photo,
        "rows": job.num_rows,
        "units": job.num_units,
        "end_to_end_s": job.total_s,
        "first_commit_s": first.at_s,
        "images_per_s": job.num_rows / job.total_s,
        "steady_images_per_s": job.steady_rows_per_s,
        "steady_cores_busy": sum(steady.values()) / seconds if seconds else None,
        "steady_cpu_s": steady,
        "steady_other_share": _other_share(steady),
        "cpu_s": whole,
        "other_share": _other_share(whole),
        "bytes": sizes,
        "memory": {
            f"{mark:.0%}": {"at_s": job.at(mark).at_s, **job.at(mark).memory} for mark in MARKS
        },
        "peak": {
            "driver": job.peak(["driver"]),
            "workers": job.peak(WORKERS),
            "decoders": job.peak(["decoders"]),
        },
    }


def _other_share(seconds: dict[str, float]) -> float:
    return 1 - sum(seconds.get(kind, 0.0) for kind in PRODUCTIVE) / sum(seconds.values())


def _show(console: Console, report: dict[str, Any]) -> None:
    sizes = report["bytes"]
    console.print(
        f"{report['rows']} JPEGs of {report['photo']} ({sizes['encoded'] / 1e3:.0f} kB each) in "
        f"{report['end_to_end_s']:.1f} s: {report['images_per_s']:.1f} images/s end to end, "
        f"{report['steady_images_per_s'] or 0:.1f} from the first commit (after "
        f"{report['first_commit_s']:.1f} s) on, "
        f"{report['steady_cores_busy'] or 0:.2f} cores busy; {sizes['prompt_tokens']:.0f} "
        f"prompt tokens and "
        f"{sizes['between_stages'] / 1e3:.0f} kB an image between stages"
    )
    table = Table(title="CPU seconds by kind of process")
    for heading in ("", *report["cpu_s"], "neither decoders nor engine"):
        table.add_column(heading, justify="right")
    for name, prefix in (("whole job", ""), ("steady", "steady_")):
        cells = [f"{seconds:.1f}" for seconds in report[f"{prefix}cpu_s"].values()]
        table.add_row(name, *cells, f"{report[f'{prefix}other_share']:.1%}")
    console.print(table)
    memory = Table(title="memory of its own (MiB)")
    kinds = list(report["cpu_s"])
    for heading in ("committed", "seconds", *kinds):
        memory.add_column(heading, justify="right")
    for mark, sample in report["memory"].items():
        memory.add_row(
            mark, f"{sample['at_s']:.1f}", *[f"{sample.get(kind, 0) / MIB:.0f}" for kind in kinds]
        )
    console.print(memory)


if __name__ == "__main__":
    typer.run(main)
