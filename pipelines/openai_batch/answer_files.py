"""The answers of a batch file as OpenAI gives them: output.jsonl and errors.jsonl beside the parts.

    OUTPUT/output.jsonl   a line for each request that was answered, in the order of the input
    OUTPUT/errors.jsonl   a line for each one that was not
    OUTPUT/export.json    written last: of which parts these two were made, and how large they are

Made from the committed parts, one in memory at a time, when a job is finished; made again when the
parts are others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from glm_batch.pipelines.output.commit import Output
from glm_batch.pipelines.output.manifest import Manifest
from glm_batch.pipelines.storage.storage import reach

ANSWERS, ERRORS, EXPORT = "output.jsonl", "errors.jsonl", "export.json"


def export(output: Output, manifest: Manifest) -> None:
    """Writes the three files. Raises StorageError when the store fails."""
    counts = {ANSWERS: 0, ERRORS: 0}
    reach("before_export")
    with output.writable():
        with ExitStack() as stack:
            files = {name: stack.enter_context(output.store.replacing(name)) for name in counts}
            for position, row in enumerate(_rows(output, manifest)):
                name = ANSWERS if row["status"] == "ok" else ERRORS
                files[name].write(_line(row, _number(manifest, position)).encode())
                counts[name] += 1
        reach("after_export")
        made = {
            name: {"lines": lines, "bytes": output.store.size(name)}
            for name, lines in counts.items()
        }
        output.store.write(
            EXPORT, json.dumps({"parts": _digest(manifest), "files": made}, indent=1).encode()
        )


def is_exported(output: Output, manifest: Manifest) -> bool:
    """Whether the files stand and were made of the parts that count now."""
    try:
        content = json.loads(output.store.read(EXPORT))
    except FileNotFoundError:
        return False
    sizes = {name: output.store.size(name) for name in (ANSWERS, ERRORS)}
    made = {name: file["bytes"] for name, file in content["files"].items()}
    return bool(content["parts"] == _digest(manifest) and made == sizes)


def exported_note(output: Output) -> str:
    """What stands there, for people."""
    files = json.loads(output.store.read(EXPORT))["files"]
    return ", ".join(f"{file['lines']:,} lines in {name}" for name, file in files.items())


def _rows(output: Output, manifest: Manifest) -> Iterator[dict[str, Any]]:
    for part in manifest.parts:
        table = output.read_part(part)
        for batch in table.to_batches(max_chunksize=64):
            yield from batch.to_pylist()


def _number(manifest: Manifest, position: int) -> str:
    """What tells a row from all others: it follows from the job and the row's place in the "
    "input."""
    return hashlib.sha256(f"{manifest.fingerprint}:{position}".encode()).hexdigest()[:32]


def _line(row: dict[str, Any], number: str) -> str:
    """A line in OpenAI's form. The response's body is written as it stands."""
    response, error = "null", "null"
    if row["response"] is not None:
        request = json.dumps(f"req_{number}")
        body, status = row["response"], row["status_code"]
        response = f'{{"status_code":{status},"request_id":{request},"body":{body}}}'
    else:
        told = {"code": row["error_code"], "message": row["error_message"], "line": row["line"]}
        error = json.dumps(told, separators=(",", ":"))
    ids = f'"id":"batch_req_{number}","custom_id":{json.dumps(row["custom_id"])}'
    return f'{{{ids},"response":{response},"error":{error}}}\n'


def _digest(manifest: Manifest) -> str:
    named = [[part.name, part.checksum] for part in manifest.parts]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()
