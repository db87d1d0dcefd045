"""`python -m benchmarks.evaluate_compare`: one multiple-choice evaluation by `glm-batch evaluate`
and by `lm_eval`.

Owns the rows (a few-shot header that all share, then a text of their own), the files both sides
read, and the comparison of what they say: log-likelihoods of every label, accuracy, wall time of
the whole process. Both compute in float32 on the CPU, each in a process of its own, with all cores.
Needs `pip install lm_eval[hf]`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.make_mid_model import LABELS, make_mid_model, make_words
from glm_batch.pipelines.job import Job, TaskConfig
from glm_batch.pipelines.tasks.task_runner import TaskRunner

TASK = "local_route"
PROMPT = "{header}Text: {text}\nTeam:"
SHOT_WORDS = ROW_WORDS = 30
TARGET = 3.0  # times as fast as lm_eval


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a side said: [rows, labels] joint log-probabilities, accuracies, seconds of its whole
    process.

    `working_s` leaves out loading, where the side tells.
    """

    logprobs: list[list[float]]
    accuracy: float
    accuracy_norm: float
    wall_s: float
    working_s: float | None = None


def main(
    rows: Annotated[int, typer.Option(help="Rows, each scored for four labels.")] = 48,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint; the 243 M one by default.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where files of both go; emptied outputs.")] = Path(
        "build/evaluate_compare"
    ),
    shots: Annotated[int, typer.Option(help="Examples in the header that all rows share.")] = 10,
    batch_size: Annotated[int, typer.Option(help="lm_eval's.")] = 8,
) -> None:
    """Runs both sides one after the other and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = model or make_mid_model(folder / "mid")
    write_rows(folder, checkpoint, rows, shots)
    ours = run_ours(folder, checkpoint)
    theirs = run_lm_eval(folder, checkpoint, batch_size)
    Console(highlight=False).print(comparison(ours, theirs))
    furthest = max(
        abs(a - b)
        for x, y in zip(ours.logprobs, theirs.logprobs, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    equal = all(
        abs(getattr(ours, name) - getattr(theirs, name)) < 1e-4
        for name in ("accuracy", "accuracy_norm")
    )
    print(
        f"largest difference of a log-likelihood: {furthest:.2e} (of "
        f"{len(ours.logprobs) * len(LABELS)})"
    )
    print(
        f"accuracies {'equal' if equal else 'DIFFER'}; {theirs.wall_s / ours.wall_s:.1f} x "
        f"as fast (wanted: {TARGET:g})"
    )
    raise typer.Exit(0 if equal and furthest < 1e-4 else 1)


def write_rows(folder: Path, checkpoint: Path, num_rows: int, shots: int) -> None:
    """The same prompts for both: columns for our template, the rendered context for lm_eval's."""
    rng, words = random.Random(5), make_words(4000)
    header = "".join(
        f"Text: {' '.join(rng.choices(words, k=SHOT_WORDS))}\nTeam: {rng.choice(LABELS)}\n\n"
        for _ in range(shots)
    )
    rows = [
        {
            "id": str(n),
            "header": header,
            "text": " ".join(rng.choices(words, k=ROW_WORDS)),
            "gold": rng.choice(LABELS),
        }
        for n in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    task = TaskConfig(kind="choose", prompt=PROMPT, labels=list(LABELS))
    runner = TaskRunner(Job(model=str(checkpoint), input=[], output="", task=task), str(checkpoint))
    lines = [
        {"context": runner.prompts.render(row), "gold": LABELS.index(row["gold"])} for row in rows
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_ours(folder: Path, checkpoint: Path) -> Outcome:
    sweep: dict[str, Any] = {
        "output": str(folder / "ours"),
        "models": {
            "mid": {"model": str(checkpoint), "engine": {"dtype": "float32", "device": "cpu"}}
        },
        "datasets": {"rows": {"input": [str(folder / "rows.parquet")], "key": "id"}},
        "tasks": {
            "route": {
                "task": {"kind": "choose", "prompt": PROMPT, "labels": list(LABELS), "gold": "gold"}
            }
        },
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    shutil.rmtree(folder / "ours", ignore_errors=True)
    wall_s, told = timed(
        [sys.executable, "-m", "glm_batch.jobs", "evaluate", str(folder / "sweep.yaml")]
    )
    working = re.search(r"the engines had rows for ([\d.,]+) s", " ".join(told.split()))
    (cell,) = json.loads((folder / "ours" / "results.json").read_bytes())["cells"]
    output = Path(cell["output"])
    parts = json.loads((output / "manifest.json").read_bytes())["parts"]
    table = pa.concat_tables([pq.read_table(output / part["part"]) for part in parts])
    metrics = cell["metrics"]
    return Outcome(
        logprobs=table["label_logprobs"].to_pylist(),
        accuracy=metrics["accuracy"]["value"],
        accuracy_norm=metrics["accuracy_norm"]["value"],
        wall_s=wall_s,
        working_s=float(working[1].replace(",", "")) if working else None,
    )


def run_lm_eval(folder: Path, checkpoint: Path, batch_size: int) -> Outcome:
    """The same label texts after the same contexts: the template's line feed is lm_eval's
    delimiter.
    """
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "rows.jsonl").absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "gold",
        "doc_to_choice": list(LABELS),
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{TASK}.yaml").write_text(yaml.safe_dump(task))
    shutil.rmtree(folder / "theirs", ignore_errors=True)
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", TASK,
        "--model_args", f"pretrained={checkpoint},dtype=float32,add_bos_token=False",
        "--include_path", str(folder / "tasks"), "--batch_size", str(batch_size), "--log_samples",
        "--output_path", str(folder / "theirs"),
    ]  # fmt: skip
    wall_s, _ = timed(command)
    (samples,) = (folder / "theirs").rglob("samples_*.jsonl")
    (results,) = (folder / "theirs").rglob("results_*.json")
    content = json.loads(results.read_bytes())
    found = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()),
        key=lambda each: each["doc_id"],
    )
    metrics = content["results"][TASK]
    return Outcome(
        logprobs=[[float(response[0]) for response in each["filtered_resps"]] for each in found],
        accuracy=metrics["acc,none"],
        accuracy_norm=metrics["acc_norm,none"],
        wall_s=wall_s,
    )


def timed(command: Sequence[str]) -> tuple[float, str]:
    """Seconds of the whole process and what it printed; its own words where it fails."""
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "200",
    }
    begun = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return time.monotonic() - begun, done.stdout


def comparison(ours: Outcome, theirs: Outcome) -> Table:
    table = Table("", "wall s", "working s", "acc", "acc_norm", box=None, padding=(0, 2, 0, 0))
    for name, each in (("glm-batch evaluate", ours), ("lm_eval", theirs)):
        working = "-" if each.working_s is None else f"{each.working_s:.1f}"
        table.add_row(
            name, f"{each.wall_s:.1f}", working, f"{each.accuracy:.4f}", f"{each.accuracy_norm:.4f}"
        )
    return table


if __name__ == "__main__":
    typer.run(main)
