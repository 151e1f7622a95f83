"""Slices of a point-in-time join as Ray tasks: the same rows as in one process."""

from dataclasses import replace

import pyarrow as pa
import ray

from driftline.features.feast_plugins.asof import Int64s
from driftline.features.feast_plugins.joins import (
    JoinPlan,
    in_entity_order,
    join_features,
    key_columns,
    time_slices,
)


def historical_slices(
    entities: pa.Table, at_us: Int64s, plan: JoinPlan, *, num_cpus: float = 1
) -> pa.Table:
    """Do what ``joins.join_features`` does, one Ray task per slice of time.

    Only keys, moments and values travel; a task reads the sources itself, so they must be readable
    from every node. Worth it from a few slices on: every task opens the sources anew and reads the
    whole time to live before its slice, where one process carries it from slice to slice.

    Args:
        entities: Holds at least the key columns that ``plan`` names.
        at_us: Moment of each row in microseconds. ``[N]``.
        plan: Views to join; ``slice_rows`` is the size of a task.
        num_cpus: CPUs that one task reserves, and DuckDB threads that it uses.

    Returns:
        The feature columns alone, in the order of ``entities``.
    """
    keys = pa.table(key_columns(entities, plan))
    threads = max(int(num_cpus), 1)
    plan = replace(plan, duckdb=replace(plan.duckdb, threads=threads))
    task = ray.remote(join_features).options(num_cpus=num_cpus, name="point-in-time slice")
    slices = list(time_slices(at_us, plan.slice_rows))
    parts = ray.get(
        [
            task.remote(part, moments, plan)
            for part, moments in (
                (keys.slice(rows.start, rows.stop - rows.start), at_us[rows])
                if isinstance(rows, slice)
                else (keys.take(pa.array(rows)), at_us[rows])
                for rows in slices
            )
        ]
    )
    return in_entity_order(parts, slices)
