"""The manifest of a finished output: what its readers open, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.metrics.counts import Counts
from glm_batch.pipelines.output.parts import (
    FORMAT,
    PART_NAME,
    PARTS,
    PartFile,
    Parts,
    damage,
    part_of,
)
from glm_batch.pipelines.planning.plan import Identity, Plan
from glm_batch.pipelines.storage.storage import reach

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A finished output: its rows stand in `parts`, in the order of the input."""

    fingerprint: str
    counts: Counts
    schema: pa.Schema
    parts: tuple[PartFile, ...]
    facts: dict[str, Any]
    job: Identity


def write_manifest(output: Parts, plan: Plan, schema: pa.Schema, facts: dict[str, Any]) -> Manifest:
    """Writes the manifest, after every unit is committed. One that says the same is left as it is.

    Raises ConfigError for a part that is gone, StorageError when the store fails.
    """
    parts, counts = list[dict[str, Any]](), Counts()
    sizes = {entry.name: entry.size for page in output.store.pages(PARTS) for entry in page}
    for record in output.records(plan):
        part = part_of(record)
        if sizes.get(part.name) != part.num_bytes:
            raise ConfigError(f"output: {damage(output.place, part)}")
        size = {"rows": part.rows, "bytes": part.num_bytes}
        parts.append({"part": part.name} | size | {"sha256": part.checksum})
        counts += record.counts
    if len(parts) != plan.num_units or counts.rows != plan.num_rows:
        raise RuntimeError(
            f"{output.place}: {len(parts)} of {plan.num_units} units with {counts.rows} of "
            f"{plan.num_rows} rows are committed: the manifest must wait for all of them"
        )
    content = {
        "format": FORMAT,
        "fingerprint": plan.fingerprint,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": counts.rows,
        "counts": counts.to_json(),
        "schema": [{"name": field.name, "type": str(field.type)} for field in schema],
        "task": facts,
        "job": plan.identity,
        "parts": parts,
    } | _kept_of_deleted(plan, [part["part"] for part in parts])
    if not _says_the_same(manifest_content(output), content):
        reach("before_manifest")
        with output.writable():
            output.store.write(MANIFEST, json.dumps(content, indent=1).encode())
        reach("after_manifest")
    return read_manifest(output)


def read_manifest(output: Parts) -> Manifest:
    """Raises ConfigError when the output is not finished, or is none."""
    content = manifest_content(output)
    if content is None:
        raise ConfigError(
            f"output: {output.place} has no {MANIFEST}: its job is not finished; run it again"
        )
    parts = tuple(
        PartFile(
            name=each["part"], rows=each["rows"], num_bytes=each["bytes"], checksum=each["sha256"]
        )
        for each in content["parts"]
    )
    return Manifest(
        fingerprint=content["fingerprint"],
        counts=Counts.from_json(content["counts"]),
        schema=output.read_part(parts[0]).schema if parts else pa.schema([]),
        parts=parts,
        facts=content["task"],
        job=content["job"],
    )


def is_finished(output: Parts, plan: Plan) -> bool:
    """Whether the manifest says what this plan and the commit records say."""
    content = manifest_content(output)
    if content is None or content["fingerprint"] != plan.fingerprint:
        return False
    named = (PART_NAME.fullmatch(each["part"]) for each in content["parts"])
    found = {int(match["unit"]): int(match["generation"]) for match in named if match}
    return len(found) == plan.num_units and found == output.generations()


def named_parts(output: Parts) -> dict[str, str]:
    """The names of the parts that readers of the manifest open, with their checksums."""
    content = manifest_content(output)
    return {each["part"]: each["sha256"] for each in content["parts"]} if content else {}


def manifest_content(output: Parts) -> dict[str, Any] | None:
    """What stands in the manifest, None where there is none."""
    try:
        content: dict[str, Any] = json.loads(output.store.read(MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return content


def _kept_of_deleted(plan: Plan, parts: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of files that left the input: the last parts are theirs."""
    entries, rest = [], list(parts)
    for planned in reversed(plan.deleted):
        first = len(rest) - -(-planned.num_rows // plan.unit_rows)
        entries.append({"file": planned.file.name, "rows": planned.num_rows, "parts": rest[first:]})
        del rest[first:]
    return {"deleted": entries[::-1]} if entries else {}


def _says_the_same(standing: dict[str, Any] | None, content: dict[str, Any]) -> bool:
    names = ("fingerprint", "counts", "parts")
    return standing is not None and all(standing[name] == content[name] for name in names)
