"""The simulated market's own counters: units sold, a noisy view of demand that arrives late."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from driftline.features.simulate_market import HOURS_A_DAY, Day, Floats
from driftline.platform.contract import TIME

HOUR_MICROS: Final = 3_600_000_000
MINUTE_MICROS: Final = 60_000_000

CORRECTED_SHARE: Final = 0.01
"""Share of the rows that count too little at first and are corrected hours later."""


class SalesLedger:
    """Sums of hourly sales over the last N hours, carried from day to day."""

    def __init__(self, columns: Mapping[str, int], *, num_products: int, seed: int) -> None:
        self.columns = dict(columns)
        """Column: number of hours it sums."""
        self._seed = seed
        length = max(self.columns.values(), default=1)
        self._past: Floats = np.zeros((length, num_products))

    def rows(self, day: Day, *, product_ids: pa.Array, start_micros: int) -> pa.Table:
        """One row a product and hour, known 2 to 20 minutes after the hour, and the corrections.

        Args:
            day: Its ``sales`` are the sales of the hour before each hour.
            product_ids: Key of each product.
            start_micros: Start of the day, in microseconds since 1970.
        """
        rng = np.random.default_rng([self._seed, 5, day.day])
        sold = np.nan_to_num(day.sales, nan=0.0)
        history = np.concatenate([self._past, sold])
        totals = np.concatenate([np.zeros((1, history.shape[1])), np.cumsum(history, axis=0)])
        length = len(self._past)
        ends = length + 1 + np.arange(HOURS_A_DAY)
        values = {name: totals[ends] - totals[ends - span] for name, span in self.columns.items()}
        self._past = history[-length:]
        hours, products = np.nonzero(~np.isnan(day.sales))
        event = start_micros + hours * HOUR_MICROS
        count = event.size
        known = event + rng.integers(2 * MINUTE_MICROS, 20 * MINUTE_MICROS, size=count)
        wrong = rng.random(count) < CORRECTED_SHARE
        factor = np.where(wrong, rng.uniform(0.4, 0.9, size=count), 1.0)
        corrected = event + rng.integers(60 * MINUTE_MICROS, 240 * MINUTE_MICROS, size=count)
        first = self._table(
            product_ids, products, event, known,
            {name: np.floor(value[hours, products] * factor) for name, value in values.items()},
        )  # fmt: skip
        later = self._table(
            product_ids, products[wrong], event[wrong], corrected[wrong],
            {name: value[hours, products][wrong] for name, value in values.items()},
        )  # fmt: skip
        return pa.concat_tables([first, later])

    def _table(
        self,
        product_ids: pa.Array,
        products: np.ndarray[Any, np.dtype[np.int64]],
        event: np.ndarray[Any, np.dtype[np.int64]],
        created: np.ndarray[Any, np.dtype[np.int64]],
        values: Mapping[str, Floats],
    ) -> pa.Table:
        return pa.table(
            {
                "product_id": product_ids.take(pa.array(products)),
                "event_time": pa.array(event).cast(TIME),
                "created_time": pa.array(created).cast(TIME),
                **{name: pa.array(value) for name, value in values.items()},
            }
        )
