"""What Prometheus collects from a cluster is what its jobs have committed, and the dashboard asks
for nothing else.
"""

import json
import re
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from glm_batch.pipelines import run
from glm_batch.pipelines.graph.stages import PATIENCE, CountingLedger
from glm_batch.pipelines.metrics.exporter import METRICS, PREFIX, RECOMPUTED
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.state import status_of
from tests.pipelines.runs.test_pipeline import GOOD, make_job, write_input

DASHBOARD = Path(__file__).parents[3] / "jobs" / "deploy" / "grafana.json"
SERIES = re.compile(rf"^ray_{PREFIX}(\w+)\{{(.*)\}} (\S+)$", re.MULTILINE)
DEADLINE_S = 30.0


def collected(job: str) -> dict[tuple[str, str], float]:
    """This node's series of a job: by name and the tag that tells them apart."""
    (node,) = ray.nodes()
    with urlopen(
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ) as answer:
        text = answer.read().decode()
    found = {}
    for name, tags, value in SERIES.findall(text):
        named = dict(re.findall(r'(\w+)="([^"]*)"', tags))
        if named["job"] == job:
            tag = "".join(
                value
                for key, value in named.items()
                if key in ("status", "code", "kind", "stage", "state")
            )
            found[name.removesuffix("_total"), tag] = float(value)
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_tells_what_a_job_has_committed(echo_checkpoint: Path, tmp_path: Path):
    write_input(tmp_path, num_parquet=23, jsonl=("{", GOOD, '{"id": "j2"}'))
    job = make_job(echo_checkpoint, tmp_path)
    result = run(job)
    fingerprint = result.manifest.fingerprint
    ledger = ray.remote(CountingLedger).options(num_cpus=0).remote(fingerprint, PATIENCE)
    ray.get(
        [
            ledger.arrive.remote("w"),
            ledger.begin.remote("w", "unit 0", 7),
            ledger.arrive.remote("w"),
        ]
    )
    deadline = time.monotonic() + DEADLINE_S
    while ("recomputed_rows", "") not in (found := collected(fingerprint)) or (
        "rows",
        "ok",
    ) not in found:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    assert found["rows", "ok"] == 24
    assert found["rows", "error"] == 2
    assert found["errors", "bad_json"] == found["errors", "missing_column"] == 1
    assert found["tokens", "prompt"] == result.summary.counts.prompt_tokens > 0
    assert found["recomputed_rows", ""] == 7
    assert found["engine_seconds", "busy"] > 0
    assert found["stage_seconds", "reading"] > 0
    assert found["stage_seconds", "committing"] > 0
    assert {name for name, _ in found} == {metric.name for metric in METRICS}
    status = status_of(Output.at(job.output))
    assert status.spent["reading"] == pytest.approx(found["stage_seconds", "reading"], rel=0.01)
    assert RECOMPUTED.name in {metric.name for metric in METRICS}


def test_the_dashboard_draws_metrics_that_there_are():
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    asked = {
        name
        for query in queries
        for name in re.findall(rf"ray_{PREFIX}(\w+?)(?:_total)?\b(?=[{{\[])", query)
    }
    assert asked == {metric.name for metric in METRICS}
    assert all(panel["title"] and panel["gridPos"] for panel in dashboard["panels"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
