"""The command line `glm-batch`: one function for each command, its options, and the exit code.

Owns nothing but the words of the command line. Each command lives in a file of its own, imported
when it is called, so that `--help` and refusals come at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from glm_batch.models import rooms
from glm_batch.models.errors import ConfigError, GlmBatchError

EXIT_OK = 0  # all rows ok, or no more errors than max_error_rate allows
EXIT_FAILED = 1  # the job failed; the same command goes on with it
EXIT_BAD_CONFIG = 2  # bad configuration: nothing was started
EXIT_ROW_ERRORS = 3  # more row errors than max_error_rate, finished or stopped by fail_fast
SHOWN_LINES = 6

app = typer.Typer(
    help="Run GLM models over large tables: one committed record for every input row.",
    epilog="Exit codes: 0 all rows ok, 1 the job failed, 2 bad configuration, 3 more row errors "
    "than max_error_rate, "
    "130 and 143 stopped by Ctrl-C and SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="The job file (YAML).", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the job file; repeatable.",
        show_default=False,
    ),
]
OutputArgument = Annotated[
    str,
    typer.Argument(
        metavar="OUTPUT", help="A job's output: a directory or s3:// prefix.", show_default=False
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url",
        metavar="URL",
        help="The s3:// store, if it is not AWS.",
        show_default=False,
    ),
]
AppOption = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="NAME",
        help=(
            "Let the replicas of this live application do the model's work: online requests go "
            "first."
        ),
        show_default=False,
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def plan(job: JobArgument, overrides: SetOption = None, debug: DebugOption = False) -> None:
    """Show what a job or sweep would do: files, units, three prompts, tokens, an estimate. Loads no
    model.
    """
    with errors_for_people(debug):
        from glm_batch.jobs.files.sections import is_sweep

        if is_sweep(job):
            rooms.load("jobs.sweep.evaluate").plan_sweep(job, overrides or [])
            return
        from glm_batch.jobs.plans.job_plan import plan as run_plan

        run_plan(job, overrides or [])


@app.command()
def label(
    job: JobArgument,
    overrides: SetOption = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Take up input files that were added.")
    ] = False,
    app_name: AppOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a job. A rerun goes on where the last one stopped."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.label import label as run_label

        code = run_label(job, overrides or [], extend=extend, app=app_name)
    raise typer.Exit(code)


@app.command(hidden=not rooms.is_here("evaluation"))
def evaluate(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP", help="The sweep file (YAML).", show_default=False)
    ],
    overrides: SetOption = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="CELL CELL",
            help="Compare two cells of a finished sweep.",
            show_default=False,
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Run a grid of jobs over rows with gold answers and score them. A rerun goes on where the last
    one stopped.
    """
    with errors_for_people(debug):
        command = rooms.load("jobs.sweep.evaluate")
        code = command.evaluate(sweep, overrides or [], compare)
    raise typer.Exit(code)


@app.command(hidden=not rooms.is_here("cron"))
def cron(
    job: JobArgument,
    overrides: SetOption = None,
    max_units: Annotated[
        int | None,
        typer.Option(
            "--max-units",
            min=1,
            help="Process at most so many units; the next run goes on.",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            "--until",
            metavar="TIME",
            help="Stop at HH:MM, or after 90m or 1h30m; the next run goes on.",
        ),
    ] = None,
    drop_deleted: Annotated[
        bool, typer.Option("--drop-deleted", help="Give up the rows of input files that are gone.")
    ] = False,
    changed_job: Annotated[
        bool, typer.Option("--changed-job", help="The job was changed: process every row again.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Process what is new or changed since the last run, as a new version of the output. For
    schedulers.
    """
    with errors_for_people(debug):
        code = rooms.load("jobs.cron.cron").cron(
            job,
            overrides or [],
            max_units=max_units,
            until=until,
            drop_deleted=drop_deleted,
            changed_job=changed_job,
        )
    raise typer.Exit(code)


@app.command()
def status(
    output: OutputArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every part and compare checksums.")
    ] = False,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Show how far an output is: units, rows by status and error code, tokens, accuracy."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.outputs import status as run_status

        is_sound = run_status(output, verify=verify, endpoint_url=endpoint_url)
    if not is_sound:
        raise typer.Exit(EXIT_FAILED)


@app.command(hidden=not rooms.is_here("report"))
def report(
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT|SWEEP",
            help="An output, a sweep's, or its YAML file.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="DIR", help="Write there instead of into OUTPUT.", show_default=False
        ),
    ] = None,
    review: Annotated[
        int | None,
        typer.Option(
            "--review",
            metavar="K",
            min=1,
            help="Also write the K rows most worth a look.",
            show_default=False,
        ),
    ] = None,
    pred_probs: Annotated[
        str | None,
        typer.Option(
            "--pred-probs",
            metavar="FILE.npy",
            help="Also write all label probabilities.",
            show_default=False,
        ),
    ] = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a page (report.html) about an output or a sweep: quality, errors, time, tokens, rows.
    Loads no model.
    """
    with errors_for_people(debug):
        command = rooms.load("jobs.report.report")
        wanted = command.Wanted(to=to, review=review, pred_probs=pred_probs)
        command.report(output, wanted, endpoint_url=endpoint_url)


@app.command(hidden=not rooms.is_here("export"))
def export(
    output: OutputArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FILE|DIR",
            help="FILE.parquet, .arrow, .csv or .jsonl; or a new directory of such files.",
            show_default=False,
        ),
    ],
    with_input: Annotated[
        bool, typer.Option("--with-input", help="Add all columns of the input.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="In a directory: parquet, arrow, csv or jsonl.")
    ] = "parquet",
    file_rows: Annotated[
        int, typer.Option("--file-rows", min=1, help="In a directory: rows of a file.")
    ] = 1_000_000,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a finished output as table files, in the order of its input, each row once."""
    with errors_for_people(debug):
        command = rooms.load("jobs.export.export")
        command.export(
            output, to, with_input=with_input, form=form, file_rows=file_rows,
            endpoint_url=endpoint_url,
        )  # fmt: skip


@app.command(hidden=not rooms.is_here("calibration"))
def calibrate(
    output: OutputArgument,
    bias: Annotated[bool, typer.Option("--bias", help="Fit a bias for each label too.")] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE.json",
            help="Write there, not beside the model.",
            show_default=False,
        ),
    ] = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Fit probabilities to a job's gold answers; other jobs apply the file as task.calibration.
    Loads no model.
    """
    with errors_for_people(debug):
        command = rooms.load("jobs.calibration.calibrate")
        command.calibrate(output, to=to, bias=bias, endpoint_url=endpoint_url)


@app.command()
def retry(
    output: OutputArgument,
    codes: Annotated[
        list[str] | None,
        typer.Option(
            "--code", help="Only rows with this error code; repeatable.", show_default=False
        ),
    ] = None,
    overrides: SetOption = None,
    app_name: AppOption = None,
    endpoint_url: EndpointOption = None,
    debug: DebugOption = False,
) -> None:
    """Process the failed rows of an output again, and replace their records."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.outputs import retry as run_retry

        code = run_retry(
            output, codes or [], overrides or [], endpoint_url=endpoint_url, app=app_name
        )
    raise typer.Exit(code)


@app.command()
def gc(
    output: OutputArgument, endpoint_url: EndpointOption = None, debug: DebugOption = False
) -> None:
    """Remove what crashes and retries left in an output."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.outputs import gc as run_gc

        run_gc(output, endpoint_url=endpoint_url)


@app.command(hidden=not rooms.is_here("serving"))
def serve(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="What to serve (YAML).", show_default=False)
    ],
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let everybody in, without a token.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Answer requests over HTTP with an OpenAI-compatible interface, until Ctrl-C or SIGTERM."""
    with errors_for_people(debug):
        rooms.load("jobs.serving.serve").serve(config, insecure=insecure)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint directory.", show_default=False)
    ],
    debug: DebugOption = False,
) -> None:
    """Show what a checkpoint resolves to, and from which file each value comes."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.inspect import inspect as run_inspect

        run_inspect(model)


@app.command(hidden=not rooms.is_here("demo"))
def demo(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JOB]...", help="Some of the jobs.", show_default=False),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Label the tickets, pictures and clips that ship with glm-batch, laid out in ./examples."""
    with errors_for_people(debug):
        code = rooms.load("jobs.demo.demo").demo(jobs or [])
    raise typer.Exit(code)


@app.command()
def doctor(debug: DebugOption = False) -> None:
    """Show what this machine has: Python, libraries, CPU, GPU, memory, disk."""
    with errors_for_people(debug):
        from glm_batch.jobs.commands.doctor import doctor as run_doctor

        healthy = run_doctor()
    if not healthy:
        raise typer.Exit(EXIT_FAILED)


@contextmanager
def errors_for_people(debug: bool) -> Iterator[None]:
    """The process border: what was raised becomes short text on stderr and an exit code."""
    try:
        yield
    except ConfigError as error:
        _fail("bad configuration", error, EXIT_BAD_CONFIG, debug)
    except GlmBatchError as error:
        _fail("the job failed", error, EXIT_FAILED, debug)
    except KeyboardInterrupt:
        print(
            "interrupted: what is committed stays; the same command goes on from there",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except Exception as error:
        _fail(f"the job failed: {type(error).__name__}", error, EXIT_FAILED, debug)


def _fail(what: str, error: Exception, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    lines = str(error).splitlines() or [""]
    if code == EXIT_FAILED and not debug:
        lines = [*_shortened(lines), "(--debug shows the traceback)"]
    print(f"glm-batch: {what}:", *lines, sep="\n  ", file=sys.stderr)
    raise SystemExit(code)


def _shortened(lines: list[str]) -> list[str]:
    """A worker's error may carry its whole traceback: its first line says where, its last ones
    what.
    """
    if len(lines) <= SHOWN_LINES:
        return lines
    return [
        lines[0],
        f"... {len(lines) - SHOWN_LINES + 1} lines more ...",
        *lines[2 - SHOWN_LINES :],
    ]


def main() -> NoReturn:
    """The command line as a process of its own.

    It ends without the interpreter's tidying: by then all is committed and Ray is shut down, and a
    native thread of Ray's that is still about could only abort it, with another exit code.
    """
    code = EXIT_OK
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else EXIT_OK
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
