"""The comparison's own honesty: complete answers, the right arithmetic, ratios the right way round."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.compare import summarise
from benchmarks.machine import end_tree
from benchmarks.systems.harness import Answer, FirstResult, Plan, measure
from benchmarks.workload import Row, RowSet, arithmetic

LABEL_IDS = [7, 8]


def row_set(name: str, num_rows: int) -> RowSet:
    rows = [Row(id=f"{name}-{i}", text="", input_ids=[1, i]) for i in range(num_rows)]
    return RowSet(work="choose", instruction="", labels=["a", "b"], label_ids=LABEL_IDS, rows=rows)


class FakeSystem:
    """Answers in reverse order; `drop` leaves the last row out, `short` leaves a label out."""

    def __init__(self, first_result: FirstResult = "ask_alone", fault: str = "") -> None:
        self.first_result = first_result
        self.fault = fault
        self.calls: list[list[str]] = []

    def run(self, rows: RowSet) -> list[Answer]:
        self.calls.append([row.id for row in rows.rows])
        answered = rows.rows[:-1] if self.fault == "drop" and len(rows.rows) > 1 else rows.rows
        scores = [-1.0] if self.fault == "short" else [-1.0, -2.0]
        return [Answer(id=row.id, logprobs=scores) for row in reversed(answered)]

    def settings(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def report_of(system: FakeSystem, folder: Path, num_passes: int = 2) -> dict[str, Any]:
    paths = []
    for index in range(num_passes + 1):
        path = folder / f"{index}.json"
        path.write_text(json.dumps(asdict(row_set(f"set{index}", 3))))
        paths.append(str(path))
    plan = Plan(work="choose", model_dir="", row_files=paths, options={})
    return measure(lambda plan, rows: system, plan, time.time() - 5.0)


def test_first_row_goes_alone_and_each_pass_has_rows_of_its_own(tmp_path: Path) -> None:
    system = FakeSystem()
    report = report_of(system, tmp_path)
    assert system.calls[:2] == [["set0-0"], ["set0-1", "set0-2"]]
    assert system.calls[2:] == [[f"set{k}-{i}" for i in range(3)] for k in (1, 2)]
    assert [answer["id"] for answer in report["sample"]] == ["set0-0", "set0-1", "set0-2"]
    assert len(report["steady_s"]) == 2
    assert 5.0 <= report["ready_s"] <= report["first_result_s"] <= report["end_to_end_s"]


def test_a_system_that_cannot_tell_its_first_result_gets_one_pass_and_no_such_time(
    tmp_path: Path,
) -> None:
    system = FakeSystem(first_result="unknown")
    report = report_of(system, tmp_path, num_passes=0)
    assert len(system.calls) == 1
    assert report["first_result_s"] is None
    assert report["steady_s"] == []


@pytest.mark.parametrize(
    ("fault", "message"), [("drop", "not one for each"), ("short", "incomplete answer")]
)
def test_a_system_that_leaves_something_out_fails(tmp_path: Path, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        report_of(FakeSystem(fault=fault), tmp_path)


def test_arithmetic_counts_the_shared_instruction_once() -> None:
    """176,160,768 weights in the layers and 33,554,432 in the head, two FLOPs each."""
    token, head = 2 * 176_160_768, 2 * 33_554_432
    choose = arithmetic("choose", 512)
    assert choose.prefill == (410 + 512 * 84) * token + 512 * head
    assert choose.decode == 0
    generate = arithmetic("generate", 64)
    assert generate.prefill == (128 + 64 * 128) * token + 64 * head
    assert generate.decode == 64 * 63 * (token + head)


def test_summary_puts_ratios_the_right_way_round() -> None:
    def result(steady: list[float], end_to_end: float, logprob: float) -> dict[str, Any]:
        sample = [{"logprobs": [logprob, -2.0], "token_ids": []}]
        return {"steady_s": steady, "end_to_end_s": end_to_end, "sample": sample}

    systems = {
        "torch": result([9.0, 10.0, 30.0], 20.0, -1.25),
        "vllm": result([20.0], 100.0, -1.0),
        "ray": {"absent": "not installed"},
    }
    rates = {"flops_by_rows": {"16": 1e11, "512": 2e11, "1024": 4e11}}
    report = {
        "gemm_before": rates,
        "gemm_after": rates,
        "works": {"choose": {"rows": 512, "systems": systems}},
    }
    summarise(report)
    ours = systems["torch"]
    assert ours["steady_median_s"] == 10.0
    assert ours["times_vllm_steady"] == 2.0
    assert ours["times_vllm_end_to_end"] == 5.0
    assert ours["share_of_gemm_limit"] == pytest.approx(
        arithmetic("choose", 512).prefill / 4e11 / 10.0
    )
    assert systems["vllm"]["agreement"] == "dlogprob 0.250"


def test_a_system_that_overruns_its_time_leaves_no_process_behind() -> None:
    """A killed vLLM once left its engine running, which then disturbed every later measurement."""
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    end_tree(parent)
    parent.stdout.close()
    assert parent.returncode != 0
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
