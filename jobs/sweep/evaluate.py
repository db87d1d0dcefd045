"""`glm-batch evaluate`: run a sweep, score its cells, compare them.

The grid lies in sweep_config, the run and the results in pipelines.sweep, how it looks in
sweep_display.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from glm_batch.jobs.commands.label import EXIT_OK, EXIT_ROW_ERRORS, EXIT_SIGNAL
from glm_batch.jobs.display.display import progress_display
from glm_batch.jobs.sweep.sweep_config import check_sweep, load_sweep, sweep_name
from glm_batch.jobs.sweep.sweep_display import comparison_text, results_tables, sweep_summary
from glm_batch.models.errors import ConfigError
from glm_batch.pipelines.runs.watch import InterruptedRunError, Stop


def evaluate(path: str, overrides: Sequence[str], compare: Sequence[str] | None = None) -> int:
    """Runs a sweep file to its end, keeps and prints the results, and gives the exit code.

    With two cells' names in `compare`, only compares the scores that a finished sweep has kept.
    Raises ConfigError before Ray starts for a sweep that cannot run.
    """
    sweep, place = load_sweep(path, overrides)
    if compare:
        from glm_batch.pipelines.sweep.results import compare as compare_cells

        one, other = compare
        print(comparison_text(one, other, compare_cells(sweep.output, one, other, sweep)))
        return EXIT_OK
    _require_scikit_learn()
    checked = check_sweep(sweep, place)
    from glm_batch.pipelines.sweep.results import evaluate as score_cells
    from glm_batch.pipelines.sweep.results import keep
    from glm_batch.pipelines.sweep.sweep_run import run_sweep

    name = sweep_name(path)
    try:
        with progress_display(name, Console(file=sys.stderr)) as show:
            ran = run_sweep(sweep, show, checked=checked, stop=Stop())
    except InterruptedRunError as error:
        print(f"glm-batch: {error}", file=sys.stderr)
        return EXIT_SIGNAL + error.signum
    results = score_cells(sweep, ran.cells)
    keep(sweep, results)
    console = Console(highlight=False)
    for table in results_tables(results):
        console.print(table)
    console.print(sweep_summary(sweep, ran, results))
    failed = max(each.error_rate for each in results.cells)
    return EXIT_OK if failed <= sweep.max_error_rate else EXIT_ROW_ERRORS


def _require_scikit_learn() -> None:
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise ConfigError(
            "evaluate computes its metrics with scikit-learn, which is not installed: "
            "pip install scikit-learn"
        )
