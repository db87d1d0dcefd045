"""`glm-batch` in forks of one process that has loaded the libraries, without Ray: a job's graph is
done unit by unit, right where the driver is.

Reads lines of JSON: [folder that holds glm_batch, working directory, list of commands]. Writes the
exit code of each fork as a line, and what it printed into `log` in its working directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

# What takes long to import. Nothing of it may have threads before the forks.
import numpy
import PIL.Image
import pyarrow.parquet
import pydantic
import ray.data
import rich.live
import tokenizers
import torch
import typer
import yaml

LIBRARIES = (numpy, PIL, pyarrow, pydantic, ray, rich, tokenizers, torch, typer, yaml)


class Graph:
    """In the place of what pipelines.graph.stages.unit_graph makes."""

    def __init__(self, orders: Any, render: Any, engine: Any, parse: Any, *_: Any) -> None:
        self._orders, self._engine = orders, engine
        self._render, self._parse = render, parse

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        """What the last step leaves of each unit."""
        from glm_batch.glm_actors.units.batches import to_requests, with_completions
        from glm_batch.models.engine import build_engine

        engine, before, behind = build_engine(self._engine), self._render(), self._parse()
        for order in self._orders:
            table = order.to_table()
            for step in before:
                table = step(table, 0, step.num_rows(table))
            engine.submit(to_requests(table))
            done = []
            while engine.has_work():
                done += engine.step()
            table = with_completions(table, done)
            for step in behind:
                table = step(table, 0, step.num_rows(table))
            yield table


def run(commands: list[list[str]]) -> int:
    """The highest exit code of the commands."""
    from glm_batch.jobs.__main__ import app
    from glm_batch.pipelines.cluster.shares import Node, share_out
    from glm_batch.pipelines.graph import stages
    from glm_batch.pipelines.runs import pipeline

    node = Node(cores=2, cpus=2.0, gpus=0)
    changes: dict[Any, dict[str, Any]] = {
        pipeline: {
            "cluster": lambda **_: contextlib.nullcontext(),
            "job_workers": lambda job, **_: share_out(job, (node,)),
        },
        stages: {"start_ledger": lambda _: None, "unit_graph": Graph},
    }
    for module, values in changes.items():
        vars(module).update(values)
    codes = []
    for arguments in commands:
        try:
            app(arguments)
        except SystemExit as end:
            codes.append(end.code)
    return max(codes)


def main() -> None:
    for line in sys.stdin:
        source, folder, commands = json.loads(line)
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        code = 1
        try:
            os.chdir(folder)
            log = os.open("log", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ["PYTHONPATH"] = source
            sys.path.insert(0, source)
            code = run(commands)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
