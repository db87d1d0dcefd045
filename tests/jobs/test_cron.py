"""`glm-batch cron` as schedulers see it: one line of JSON, exit codes, a webhook, nights without
work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glm_batch.jobs.cron.cron import cron, seconds_until
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.cron.versions import find
from glm_batch.pipelines.job import StorageSection
from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.lease import own
from glm_batch.pipelines.planning.plan import MAX_UNIT_ROWS
from glm_batch.pipelines.storage.storage import LocalStore
from tests.pipelines.cron.cron_world import process_here


@pytest.fixture
def nightly(work: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("glm_batch.pipelines.cron.incremental.process", process_here)
    work.write_job(
        lambda job: job.update(
            {"max_error_rate": 1.0, "input": ["data"], "commit": {"unit_rows": 2}}
        )
    )
    return work


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one line on stdout."""
    line: dict[str, Any] = json.loads(capsys.readouterr().out)
    return line


def test_a_run_says_what_it_did_in_one_line(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cron("job.yaml", []) == 0
    line = said(capsys)
    assert (line["state"], line["exit_code"], line["rows"], line["processed_rows"]) == (
        "finished",
        0,
        8,
        8,
    )
    assert line["files"] == {"new": 2, "changed": 0, "unchanged": 0, "deleted": 0}
    (nightly.root / "data" / "b.jsonl").unlink()
    assert cron("job.yaml", []) == 0
    line = said(capsys)
    assert (line["deleted"], line["deleted_rows"], line["processed_rows"]) == (
        ["data/b.jsonl"],
        3,
        0,
    )
    assert (line["rows"], line["adopted_units"]) == (8, 5)
    manifest = json.loads((nightly.root / "out" / "manifest.json").read_text())
    assert [(each["file"], each["rows"], len(each["parts"])) for each in manifest["deleted"]] == [
        ("data/b.jsonl", 3, 2)
    ]


def test_bounds_end_a_run_and_the_next_goes_on(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cron("job.yaml", [], max_units=2) == 0
    line = said(capsys)
    assert (line["state"], line["processed_units"], line["left_units"], line["version"]) == (
        "bounded",
        2,
        3,
        None,
    )
    assert cron("job.yaml", [], until="0s") == 0
    assert (said(capsys)["state"], (nightly.root / "out" / "manifest.json").exists()) == (
        "bounded",
        False,
    )
    assert cron("job.yaml", []) == 0
    line = said(capsys)
    assert (line["state"], line["processed_units"], line["adopted_units"]) == ("finished", 3, 0)


def test_row_errors_and_another_job_have_the_exit_codes_of_the_contract(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cron("job.yaml", ["max_error_rate=0.0"]) == 3
    assert said(capsys)["exit_code"] == 3
    before = (nightly.root / "out" / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=r"(?s)--changed-job.*task\.prompt"):
        cron("job.yaml", ["task.prompt=Other? {text}"])
    line = said(capsys)
    assert (line["state"], line["exit_code"]) == ("failed", 2)
    assert (nightly.root / "out" / "manifest.json").read_bytes() == before
    assert cron("job.yaml", ["task.prompt=Other? {text}"], changed_job=True) == 0
    assert said(capsys)["processed_rows"] == 8


def test_a_second_run_leaves_the_work_to_the_first(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = LocalStore(nightly.root / "out")
    store.prepare(["versions", "lease", "tmp"])
    with own(store):
        assert cron("job.yaml", []) == 0
    assert said(capsys)["state"] == "busy"


def test_a_failed_run_leaves_the_last_manifest_in_force(
    nightly: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cron("job.yaml", [])
    before = (nightly.root / "out" / "manifest.json").read_bytes()
    (nightly.root / "data" / "c.jsonl").write_text(
        '{"id": 99, "text": "new", "team": "red", "score": 1.0}\n'
    )

    def fail(*_: Any) -> None:
        raise OSError("the device is lost")

    monkeypatch.setattr("glm_batch.pipelines.cron.incremental.process", fail)
    capsys.readouterr()
    with pytest.raises(OSError, match="lost"):
        cron("job.yaml", [])
    assert said(capsys)["message"] == "the device is lost"
    assert (nightly.root / "out" / "manifest.json").read_bytes() == before
    monkeypatch.setattr("glm_batch.pipelines.cron.incremental.process", process_here)
    assert cron("job.yaml", []) == 0
    assert len(list(Output.at("out").iter_tables())) == len(Output.at("out").manifest().parts) == 6


def test_a_signal_before_the_work_ends_the_run_with_its_line(
    nightly: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While input is listed and compared, say, or Ray starts; and the next run need not wait for
    the lease.
    """
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(
            "glm_batch.pipelines.cron.incremental.process",
            lambda *_: os.kill(os.getpid(), signal.SIGTERM),
        )
        assert cron("job.yaml", []) == 128 + signal.SIGTERM
    assert (said(capsys)["state"], signal.getsignal(signal.SIGTERM)) == ("interrupted", before)
    assert cron("job.yaml", []) == 0
    assert said(capsys)["state"] == "finished"


def test_a_pattern_whose_files_are_all_gone_is_reported(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = 'input=["data/*.parquet", "data/b.jsonl"]'
    with pytest.raises(ConfigError, match=r"'data/c\.jsonl' matches no"):
        # before the first version, it is a slip
        cron("job.yaml", [patterns.replace("b.jsonl", "c.jsonl")])
    capsys.readouterr()
    assert cron("job.yaml", [patterns]) == 0
    capsys.readouterr()
    (nightly.root / "data" / "b.jsonl").unlink()
    assert cron("job.yaml", [patterns]) == 0
    line = said(capsys)
    assert (line["deleted"], line["deleted_rows"], line["rows"]) == (["data/b.jsonl"], 3, 8)
    (nightly.root / "data" / "a.parquet").unlink()  # or what holds them is not mounted
    with pytest.raises(ConfigError, match="no file is left of 'data/"):
        cron("job.yaml", [patterns])
    assert said(capsys)["exit_code"] == 2
    assert Output.at("out").manifest().counts.rows == 8


def test_fail_fast_keeps_bad_rows_out_until_their_file_is_mended(
    nightly: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["fail_fast=true", "max_error_rate=0.0"]
    assert cron("job.yaml", fast) == 3
    assert (said(capsys)["state"], (nightly.root / "out" / "manifest.json").exists()) == (
        "too_many_errors",
        False,
    )
    rows = [{"id": number, "text": "hello", "team": "red", "score": 1.0} for number in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), nightly.root / "data" / "a.parquet")
    (nightly.root / "data" / "b.jsonl").write_text(json.dumps(rows[0] | {"id": 9}) + "\n")
    assert cron("job.yaml", fast) == 0
    line = said(capsys)
    assert (line["state"], line["ok"]) == ("finished", 6)


def test_units_are_as_large_as_for_many_rows(nightly: Any) -> None:
    """The first night has few, and all others keep its units."""
    cron("job.yaml", ["commit.unit_rows=auto"])
    assert find("out", StorageSection()).output.standing_plan().unit_rows == MAX_UNIT_ROWS


def test_a_night_without_news_starts_nothing(nightly: Any) -> None:
    """In a process of its own: neither Ray nor torch is imported, and it costs a second."""
    cron("job.yaml", [])
    before = {
        path: path.read_bytes() for path in (nightly.root / "out" / "versions").rglob("*.json")
    }
    done = nightly.run("cron", "job.yaml")
    assert done.code == 0, done.err
    assert json.loads(done.out)["state"] == "unchanged"
    assert not {"ray", "torch", "av"} & done.imported
    assert done.cpu_s < 5
    assert {
        path: path.read_bytes() for path in (nightly.root / "out" / "versions").rglob("*.json")
    } == before


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook's URL, and what it was told. Under /broken it fails."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_line_and_decides_nothing(
    nightly: Any, hook: tuple[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, told = hook
    assert cron("job.yaml", [f"cron.webhook={url}/runs?secret=s3"]) == 0
    out = capsys.readouterr()
    assert told == [json.loads(out.out)]
    for path in Path("out").rglob("*.json"):
        assert "s3" not in path.read_text()
    assert cron("job.yaml", [f"cron.webhook={url}/broken"]) == 0
    assert "cron.webhook was not told (status 500)" in capsys.readouterr().err
    assert cron("job.yaml", ["cron.webhook=http://127.0.0.1:1/"]) == 0
    assert "cron.webhook was not told (ConnectError)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="it is no URL"):
        cron("job.yaml", ["cron.webhook=localhost"])


def test_a_webhook_that_hangs_holds_no_run(
    nightly: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the connection, and sends a byte of its answer now and then: each one in time, and
    never the last.
    """
    monkeypatch.setattr("glm_batch.jobs.cron.cron.WEBHOOK_TIMEOUT_S", 0.3)
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as taken:
                for byte in b"HTTP/1.1 200 OK":
                    taken.sendall(bytes([byte]))
                    if done.wait(0.1):
                        return

        threading.Thread(target=drip, daemon=True).start()
        begun = time.monotonic()
        assert (
            cron("job.yaml", [f"cron.webhook=http://127.0.0.1:{listener.getsockname()[1]}/secret"])
            == 0
        )
        assert time.monotonic() - begun < 5
        done.set()
    out = capsys.readouterr()
    assert json.loads(out.out)["state"] == "finished"
    assert "cron.webhook was not told (no answer within 0.3 s)" in out.err
    assert "secret" not in out.err


def test_times_of_day_and_durations() -> None:
    now = datetime(2026, 11, 20, 22, 30)
    assert seconds_until("23:00", now) == 1800
    assert seconds_until("06:30", now) == 8 * 3600
    assert seconds_until("22:30", now) == 24 * 3600
    assert [seconds_until(text, now) for text in ("90s", "45m", "1h30m")] == [90, 2700, 5400]
    for wrong in ("", "25:00", "6", "1x", "-5m"):
        with pytest.raises(ConfigError, match="--until"):
            seconds_until(wrong, now)
