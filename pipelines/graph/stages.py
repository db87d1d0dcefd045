"""The stages of the pipeline, each a function from Dataset to Dataset over whole units.

Owns what Ray must be told so that units stay whole and processes do not starve each other. Imports
ray: load it inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from glm_batch.glm_actors import ray_private
from glm_batch.glm_actors.faults.suspects import Ledger, Patience
from glm_batch.glm_actors.faults.watchdog import HangLimits
from glm_batch.glm_actors.units.model_actor import EngineSource, Journal, ModelActor
from glm_batch.glm_actors.units.row_worker import RowWorker, Step
from glm_batch.models.engine.api.interface import EngineConfig
from glm_batch.pipelines.cluster.shares import Workers
from glm_batch.pipelines.graph.steps import committed_records
from glm_batch.pipelines.metrics.exporter import RECOMPUTED, Exporter
from glm_batch.pipelines.output.parts import CommitRecord
from glm_batch.pipelines.planning.plan import Plan
from glm_batch.pipelines.tasks.affinity import Affinity, prefix_key
from glm_batch.pipelines.tasks.rows import UNIT

UNITS_IN_ENGINE = 4  # so that the tail of one unit never idles the engine
PATIENCE = Patience()
HANG_LIMITS = HangLimits()

Build = Callable[[], Sequence[Step]]


class AnyOrder(Protocol):
    """What is to be read, as a table of one row."""

    def to_table(self) -> pa.Table: ...


class Preprocessor(RowWorker):
    what = "a preprocessing worker"


class Parser(RowWorker):
    what = "a parsing worker"


class Committer(RowWorker):
    what = "a committing worker"


class ByAffinity(ray_private.ExecutionCallback):
    """Gives units to replicas by affinity, or to the least busy one as Ray Data has it.

    Ray Data makes one for each execution of a dataset whose context names the class.
    """

    def before_execution_starts(self, executor: Any) -> None:
        # the class' name is part of the name of the operator that runs it
        ray_private.choose_actors(executor, ModelActor.__name__, _affine)


def _affine() -> ray_private.Choose:
    affinity: Affinity[Any] = Affinity()

    def choose(schema: Any, units: Mapping[Any, int], most: int) -> Any:
        key = prefix_key(schema)
        return NotImplemented if key is None else affinity.choose(key, units, most)

    return choose


class UnitDatasource(Datasource):
    """One read task for each order, so that a unit is one block from beginning to end."""

    def __init__(self, orders: Sequence[AnyOrder]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._orders = orders

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_name(self) -> str:
        return "Units"

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(partial(_order_tables, each), metadata, per_task_row_limit=per_task_row_limit)
            for each in self._orders
        ]


def unit_graph(
    orders: Sequence[AnyOrder],
    render: Build,
    engine: EngineConfig | EngineSource,
    parse: Build,
    workers: Workers,
    ledger: Any,
    journal: Journal | None = None,
    *,
    commits: bool = True,
) -> Dataset:
    """The whole graph: orders -> requests -> completions -> what the steps of `parse` leave.

    `render` and `parse` build the steps of CPU workers, whose last one commits as a rule.
    """
    dataset = _blocks(orders, workers)
    dataset = _rows(dataset, Preprocessor, render, workers.preprocessors, workers, ledger)
    dataset = _infer(dataset, engine, workers, ledger, journal)
    last = Committer if commits else Parser
    return _rows(dataset, last, parse, workers.committers, workers, ledger)


def without_own_columns(dataset: Dataset, schema: pa.Schema, workers: Workers) -> Dataset:
    """Output columns alone, for those who go on with the rows instead of committing them."""
    return dataset.map_batches(
        partial(_select, list(schema.names)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=workers.cpus_each,
    )


def _blocks(orders: Sequence[AnyOrder], workers: Workers) -> Dataset:
    """Each order as a block of its own."""
    dataset: Dataset = ray.data.read_datasource(
        UnitDatasource(orders), override_num_blocks=len(orders), num_cpus=workers.cpus_each
    )
    context = dataset.context
    # Ray would split blocks over 128 MiB; a unit must stay whole
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # so that ours arrive as what they are
    context.enable_rich_progress_bars = False
    return dataset


class CountingLedger(Ledger):
    """A Ledger that exports how many rows the deaths of a job's workers have cost."""

    def __init__(self, job: str, patience: Patience) -> None:
        super().__init__(patience)
        self._exporter = Exporter(job)

    def lose(self, num_rows: int) -> None:
        self._exporter.add(RECOMPUTED, num_rows)


def start_ledger(plan: Plan) -> Any:
    """The actor that knows what workers are at, until its last handle is gone."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": here,
    }
    return ray.remote(CountingLedger).options(**options).remote(plan.fingerprint, PATIENCE)


def _infer(
    dataset: Dataset,
    engine: EngineConfig | EngineSource,
    workers: Workers,
    ledger: Any,
    journal: Journal | None,
) -> Dataset:
    """Requests -> completions, on model actors that each keep several units in flight.

    A model actor asks for what all its ranks need: see glm_actors.engines.worker_group.
    """
    can_grow = workers.replicas > workers.min_replicas
    if workers.replicas > 1:
        dataset.context.custom_execution_callback_classes = [ByAffinity]  # type: ignore[list-item]
    # The public method refuses whole blocks on GPUs, for fear of their size; ours are bounded by
    # the plan.
    map_units = dataset.map_batches_internal if workers.gpus_per_replica else dataset.map_batches
    return map_units(
        ModelActor,
        fn_constructor_args=(engine, workers.threads_per_rank, ledger, UNIT, HANG_LIMITS, journal),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=workers.min_replicas,
            max_size=workers.replicas,
            initial_size=workers.min_replicas,
            max_concurrent_calls_per_actor=UNITS_IN_ENGINE,
            # Ray Data starts another replica once those it has are given 1.75 times what they work
            # at.
            max_tasks_in_flight_per_actor=UNITS_IN_ENGINE * 2 if can_grow else UNITS_IN_ENGINE + 2,
            enable_true_multi_threading=True,
        ),
        num_cpus=None if workers.gpus_per_replica else workers.cpus_each,
        num_gpus=workers.gpus_per_replica,
    )


def records(dataset: Dataset) -> Iterable[CommitRecord]:
    """Runs the graph; gives each commit record as it arrives. Rows stay away."""
    batches: Iterable[Any] = dataset.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    for batch in batches:
        yield from committed_records(batch)


def _rows(
    dataset: Dataset,
    worker: type[RowWorker],
    build: Build,
    num_workers: int,
    workers: Workers,
    ledger: Any,
) -> Dataset:
    # Actors, because a task's process would start only when the first unit is ready.
    return dataset.map_batches(
        worker,
        fn_constructor_args=(build, ledger, UNIT),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=num_workers),
        num_cpus=workers.cpus_each,
    )


def _order_tables(order: AnyOrder) -> list[pa.Table]:
    return [order.to_table()]


def _select(names: list[str], table: pa.Table) -> pa.Table:
    return table.select(names)
