"""Frame columns to what the head reads: category numbers and normalised values.

Shape suffixes: B rows, C categorical columns, N numeric columns, K of them with one transform,
P pieces of a column, F everything numeric that the head reads: values, missing flags, pieces.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.platform.columns import HeadColumn
from driftline.platform.errors import BundleError

Columns: TypeAlias = "Mapping[str, pa.Array | pa.ChunkedArray | NDArray[np.generic]] | pa.Table"
Transform = Literal["identity", "log1p", "logit"]

SPARE_SHARE: Final = 0.25
MIN_SPARE: Final = 8
LIMIT: Final = 6.0  # standard deviations; beyond it a value is clipped


@dataclass(frozen=True)
class CategoryVocabulary:
    """Known values of one column; 0 is everything else, missing included."""

    column: str
    values: tuple[str, ...]
    capacity: int
    """Rows of the embedding table; spare rows take values that appear between arms refreshes."""

    def encode(self, values: pa.Array) -> NDArray[np.int32]:
        """Number of each value, 0 when unknown. ``[B]``."""
        if not self.values:
            return np.zeros(len(values), np.int32)
        found = pc.index_in(values, value_set=self._value_set)
        return (pc.fill_null(found, -1).to_numpy(zero_copy_only=False) + 1).astype(np.int32)

    def encode_objects(self, values: NDArray[Any]) -> NDArray[np.int32]:
        """The same for strings in a NumPy array, ``None`` when missing: quick for few rows."""
        known = self._numbers
        return np.fromiter((known.get(value, 0) for value in values), np.int32, len(values))

    def number(self, value: object) -> int:
        """The same for one value."""
        return self._numbers.get(value, 0)  # type: ignore[call-overload]

    @cached_property
    def _value_set(self) -> pa.Array:
        return pa.array(self.values, pa.string())

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {value: number for number, value in enumerate(self.values, start=1)}

    def extended(self, values: pa.Array) -> "CategoryVocabulary":
        """Give spare rows to new values, most frequent first; known values keep their number."""
        room = self.capacity - 1 - len(self.values)
        new = [value for value in _by_frequency(values) if value not in set(self.values)]
        return replace(self, values=self.values + tuple(new[:room]))


@dataclass(frozen=True)
class NumberScaler:
    """How one numeric column is brought to mean 0 and deviation 1."""

    column: str
    transform: Transform
    mean: float
    deviation: float
    edges: tuple[float, ...] = ()
    """Quantiles of the raw value between which it is also given piece by piece, ascending."""

    @property
    def num_pieces(self) -> int:
        """P: pieces of the piecewise-linear form, 0 without one."""
        return max(0, len(self.edges) - 1)

    def pieces(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far each piece between two edges is filled; 0 when missing. ``[B, P]``.

        Source: Gorishniy et al. 2022, "On Embeddings for Numerical Features", equation 1.
        """
        edges = np.array(self.edges)
        low, width = edges[:-1], np.diff(edges)
        return np.nan_to_num(np.clip((values[:, None] - low) / width, 0, 1))


@dataclass(frozen=True)
class TabularEncoder:
    """The tabular half of a student, fitted on one training window and stored in its bundle.

    Source: papers.md S0.12 (log1p, standardise, missing indicator, OOV row). Values inside [0, 1],
    such as click rates, are spread by a logit instead of log1p. Numbers of the impression itself
    (a position, the length of the list) act by thresholds and hardly drift: they are given piece
    by piece as well. Counters are not: measured on MIND, pieces of drifting values overfit.
    """

    categories: tuple[CategoryVocabulary, ...]
    numbers: tuple[NumberScaler, ...]

    @classmethod
    def fit(
        cls, frame: pa.Table, columns: Sequence[HeadColumn], *, num_bins: int = 0
    ) -> "TabularEncoder":
        """Learn vocabularies and scales from a frame.

        Args:
            frame: Training rows.
            columns: What the head reads.
            num_bins: Most pieces of a number of the impression; 0 for none.
        """
        categories, numbers = [], []
        for column in columns:
            values = frame[column.name].combine_chunks()
            if column.kind == "categorical":
                known = tuple(_by_frequency(values))
                spare = max(MIN_SPARE, int(len(known) * SPARE_SHARE))
                categories.append(CategoryVocabulary(column.name, known, 1 + len(known) + spare))
            else:
                floats = _to_float(values)
                edges = _quantiles(floats, num_bins) if column.alias is None else ()
                numbers.append(replace(_fit_scaler(column.name, floats), edges=edges))
        return cls(tuple(categories), tuple(numbers))

    def refitted(self, frame: pa.Table) -> "TabularEncoder":
        """New scales and room for new categories; every known category keeps its number.

        Transforms and edges stay, so that a warm-started head reads inputs of the same shape.
        """
        return TabularEncoder(
            tuple(c.extended(frame[c.column].combine_chunks()) for c in self.categories),
            tuple(
                _refit_scaler(number, _to_float(frame[number.column])) for number in self.numbers
            ),
        )

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Rows of each category's embedding table. ``[C]``."""
        return tuple(category.capacity for category in self.categories)

    @cached_property
    def num_numbers(self) -> int:
        """F: each numeric column gives its value, a missing flag, and its pieces if it has any."""
        return sum(2 + number.num_pieces for number in self.numbers)

    def encode(self, columns: Columns) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Head inputs, ``[B, C]`` and ``[B, F]``.

        Raises:
            BundleError: a column the head was trained on is not there.
        """
        names = [*(c.column for c in self.categories), *(n.column for n in self.numbers)]
        present = set(columns.column_names if isinstance(columns, pa.Table) else columns)
        if missing := [name for name in names if name not in present]:
            raise BundleError(
                f"columns {missing} are missing from the features; the head was trained on them; "
                "build the features with the settings of the bundle"
            )
        if isinstance(columns, pa.Table):
            num_rows = columns.num_rows
        else:
            num_rows = len(columns[names[0]]) if names else 0
        categories_BC = np.empty((num_rows, len(self.categories)), np.int32)
        for index, category in enumerate(self.categories):
            values = columns[category.column]
            categories_BC[:, index] = (
                category.encode_objects(values)
                if isinstance(values, np.ndarray)
                else category.encode(_to_strings(values))
            )
        raw_NB = np.empty((len(self.numbers), num_rows))
        for index, number in enumerate(self.numbers):
            raw_NB[index] = _to_float(columns[number.column])
        return categories_BC, self.normalise(raw_NB)

    def selected(self, columns: Sequence[str]) -> tuple["TabularEncoder", NDArray[np.int64]]:
        """An encoder of some numeric columns alone, and which of the F inputs are theirs."""
        places = {number.column: place for place, number in enumerate(self.numbers)}
        chosen = [places[column] for column in columns]
        num, starts = len(self.numbers), [2 * len(self.numbers)]
        for number in self.numbers:
            starts.append(starts[-1] + number.num_pieces)
        inputs = [*chosen, *(num + place for place in chosen)]
        for place in chosen:
            inputs += range(starts[place], starts[place + 1])
        return TabularEncoder((), tuple(self.numbers[i] for i in chosen)), np.array(inputs, int)

    def normalise(self, raw_NB: NDArray[np.float64]) -> NDArray[np.float32]:
        """Values, missing flags and pieces of every numeric column. ``[N, B]`` to ``[B, F]``."""
        num, num_rows = raw_NB.shape
        numbers_BF = np.empty((num_rows, self.num_numbers), np.float32)
        missing_NB = np.isnan(raw_NB)
        numbers_BF[:, :num] = np.where(missing_NB, 0, self._scaled(raw_NB)).T
        numbers_BF[:, num : 2 * num] = missing_NB.T
        place = 2 * num
        for row, number in self._in_pieces:
            numbers_BF[:, place : place + number.num_pieces] = number.pieces(raw_NB[row])
            place += number.num_pieces
        return numbers_BF

    def _scaled(self, raw_NB: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standardised and clipped, all columns at once.

        A request has few rows: a pass for each column would cost more than its arithmetic.
        """
        scaled_NB = raw_NB.copy()
        for transform, rows_K in self._transformed.items():
            scaled_NB[rows_K] = _apply(raw_NB[rows_K], transform)
        mean_N1, deviation_N1 = self._moments
        scaled_NB -= mean_N1
        scaled_NB /= deviation_N1
        return np.clip(scaled_NB, -LIMIT, LIMIT, out=scaled_NB)

    @cached_property
    def _in_pieces(self) -> list[tuple[int, NumberScaler]]:
        """Columns that are also given piece by piece."""
        return [(row, number) for row, number in enumerate(self.numbers) if number.num_pieces]

    @cached_property
    def _transformed(self) -> dict[Transform, NDArray[np.int64]]:
        """Columns of each transform that changes anything."""
        changed: tuple[Transform, ...] = ("log1p", "logit")
        found = {t: [i for i, n in enumerate(self.numbers) if n.transform == t] for t in changed}
        return {transform: np.array(rows) for transform, rows in found.items() if rows}

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        means = np.array([[number.mean] for number in self.numbers]).reshape(-1, 1)
        deviations = np.array([[number.deviation] for number in self.numbers]).reshape(-1, 1)
        return means, deviations

    def to_json(self) -> str:
        """Readable form, the inverse of ``from_json``."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "TabularEncoder":
        """Read what ``to_json`` wrote."""
        raw = json.loads(text)
        return cls(
            tuple(
                CategoryVocabulary(c["column"], tuple(c["values"]), c["capacity"])
                for c in raw["categories"]
            ),
            tuple(NumberScaler(**n | {"edges": tuple(n["edges"])}) for n in raw["numbers"]),
        )


def _by_frequency(values: pa.Array) -> list[str]:
    counted = pc.value_counts(values.drop_null())
    pairs = zip(
        counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True
    )
    return [value for value, _ in sorted(pairs, key=lambda pair: (-pair[1], pair[0]))]


def _fit_scaler(
    column: str, values: NDArray[np.float64], *, transform: Transform | None = None
) -> NumberScaler:
    finite = values[np.isfinite(values)]
    chosen = transform or _choose_transform(finite)
    moved = _apply(finite, chosen)
    mean = float(moved.mean()) if len(moved) else 0.0
    deviation = float(moved.std()) if len(moved) else 1.0
    return NumberScaler(column, chosen, mean, deviation if deviation > 1e-6 else 1.0)


def _refit_scaler(number: NumberScaler, values: NDArray[np.float64]) -> NumberScaler:
    """Another mean and deviation; the old ones when the window holds no value at all."""
    if not np.isfinite(values).any():
        return number
    fitted = _fit_scaler(number.column, values, transform=number.transform)
    return replace(fitted, edges=number.edges)


def _quantiles(values: NDArray[np.float64], num_bins: int) -> tuple[float, ...]:
    """Distinct quantiles of the present values; none when the column hardly varies."""
    finite = values[np.isfinite(values)]
    if not num_bins or not len(finite):
        return ()
    edges = np.unique(np.quantile(finite, np.linspace(0, 1, num_bins + 1)))
    return tuple(edges.tolist()) if len(edges) > 2 else ()


def _choose_transform(values: NDArray[np.float64]) -> Transform:
    if not len(values) or values.min() < 0:
        return "identity"
    inside = values.max() <= 1 and np.unique(values[:1000]).size > 2
    return "logit" if inside else "log1p"


def _apply(values: NDArray[np.float64], transform: Transform) -> NDArray[np.float64]:
    if transform == "log1p":
        return np.log1p(np.maximum(values, 0))
    if transform == "logit":
        inside = np.clip(values, 1e-4, 1 - 1e-4)
        return np.log(inside) - np.log1p(-inside)
    return values


def _to_float(values: "pa.Array | pa.ChunkedArray | NDArray[np.generic]") -> NDArray[np.float64]:
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    array = pc.fill_null(values.cast(pa.float64()), np.nan)
    floats = array.to_numpy() if isinstance(array, pa.ChunkedArray) else array.to_numpy(False)
    assert isinstance(floats, np.ndarray)
    return floats


def _to_strings(values: "pa.Array | pa.ChunkedArray") -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
