"""`glm-batch export`: a finished output as table files. Starts no Ray."""

from __future__ import annotations

import os

from glm_batch.jobs.commands.outputs import opened
from glm_batch.jobs.report.report import kept_job
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.export.table_files import FORMATS, Target, write_tables


def export(
    path: str,
    to: str,
    *,
    with_input: bool = False,
    form: str = "parquet",
    file_rows: int = 1_000_000,
    endpoint_url: str | None = None,
) -> None:
    """Writes the files and prints what they hold. Raises ConfigError for what cannot be exported.

    `to` is a file whose suffix names its format, or a directory that gets files of `form`.
    """
    output = opened(path, endpoint_url).output
    suffix = os.path.splitext(to)[1].removeprefix(".")
    known = ", ".join(FORMATS)
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is none; known: {known}")
    if suffix and suffix not in FORMATS and not os.path.isdir(to):
        raise ConfigError(f"--to: {to} names no format; end it in one of these: {known}")
    is_file = suffix in FORMATS and not os.path.isdir(to)
    target = Target(
        path=to.rstrip("/"),
        form=suffix if is_file else form,
        file_rows=None if is_file else file_rows,
        endpoint_url=endpoint_url,
    )
    made = write_tables(output, kept_job(output) if with_input else None, target)
    print(f"{to}: {made.rows:,} rows, {made.files:,} file{'s' * (made.files != 1)}")
    if made.without_input:
        print(f"{made.without_input:,} rows without input columns: their files were deleted")
