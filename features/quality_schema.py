"""Make a Parquet file fit a contract schema: whole columns, before any row is judged.

What can be converted without loss or guesswork is converted and noted; anything else is an error
that names the file, the column, the row if it is about a value, and what was expected. All
mistakes in the columns of a file are reported together.
"""

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from driftline.platform.contract import TIME
from driftline.platform.errors import ContractError

ROWS_PER_BATCH: Final = 65_536

OPTIONAL: Final = ("click_time", "request_id", "position", "propensity")
"""Columns of ``impressions`` that a file may lack; they become null."""

REMEDIES: Final = {
    "created_time": "; when a row was known at once, map created_time to the column of event_time",
    "impression_id": "; any value that is unique for each ad shown will do",
}

KEY_COLUMNS: Final = ("page_product_id", "ad_product_id", "product_id")

EXPECTED: Final = {
    "time": "a timestamp, ISO 8601 text, or whole seconds/ms/us/ns since 1970",
    "boolean": "booleans, 0/1, or true/false",
    "int64": "64-bit integers",
    "int32": "whole numbers of 32 bits",
    "double": "numbers",
    "string": "text, whole numbers or booleans",
    "text": "text",
}


@dataclass(frozen=True)
class FilePlan:
    """How each contract column is made from one file."""

    path: Path
    schema: pa.Schema
    """The contract's columns, nullable: rows are judged later."""
    sources: Mapping[str, str]
    """Contract column: column in the file. Absent ones become null."""
    time_zone: str
    notes: tuple[str, ...]
    num_rows: int

    def batches(self) -> Iterator[tuple[int, pa.Table]]:
        """Converted rows in file order, each part with the row number of its first (from 0).

        Raises:
            ContractError: a value that cannot be converted, or bytes that cannot be decoded.
        """
        first = 0
        columns = list(dict.fromkeys(self.sources.values()))
        try:
            source = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
            for batch in source.iter_batches(ROWS_PER_BATCH, columns=columns, use_threads=False):
                yield first, self._convert(batch, first)
                first += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise ContractError(
                f"{self.path}: damaged after row {first} ({error}); write the file again"
            ) from error

    def _convert(self, batch: pa.RecordBatch, first: int) -> pa.Table:
        arrays = []
        for field in self.schema:
            source = self.sources.get(field.name)
            if source is None:
                arrays.append(pa.nulls(batch.num_rows, field.type))
                continue
            column = batch.column(batch.schema.get_field_index(source))
            convert = converter(column.type, field, time_zone=self.time_zone)
            assert convert is not None, (source, column.type, field)
            try:
                arrays.append(convert(column))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                row = _first_failure(column, convert)
                raise ContractError(
                    f"{self.path}: column {source!r}, row {first + row}: "
                    f"got {column[row].as_py()!r}, expected {_expectation(field)}"
                ) from error
        return pa.table(arrays, schema=self.schema)


def parquet_files(source: Path, *, table: str) -> list[Path]:
    """Files of a table given as a file, a folder or a pattern, in order of name.

    Raises:
        ContractError: nothing is there.
    """
    if source.is_file():
        return [source]
    if source.is_dir():
        found = sorted(path for path in source.rglob("*.parquet") if path.is_file())
    else:
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))  # noqa: PTH207
    if not found:
        raise ContractError(
            f"{table}: no Parquet file at {source}; expected a file, a folder with *.parquet, "
            "or a pattern such as log/*.parquet"
        )
    return found


def read_file_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file.

    Raises:
        ContractError: not a Parquet file, or cut short.
    """
    try:
        return pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ContractError(f"{path} is not a complete Parquet file ({error})") from error


def plan_file(
    path: Path,
    schema: pa.Schema,
    *,
    columns: Mapping[str, str],
    time_zone: str = "UTC",
    refuse_extra: bool,
) -> FilePlan:
    """Compare a file with a contract schema.

    Args:
        path: A Parquet file.
        schema: What it must become.
        columns: Contract column: column in the file, where the names differ.
        time_zone: Zone of times written without one.
        refuse_extra: Whether a column that nobody declared is a mistake or is left out with a note.

    Raises:
        ContractError: missing, undeclared or unusable columns, all of them in one message.
    """
    found = read_file_schema(path)
    zone = check_time_zone(time_zone)
    problems: list[str] = []
    notes: list[str] = []
    sources: dict[str, str] = {}
    for field in schema:
        name = columns.get(field.name, field.name)
        if name not in found.names:
            if field.name in OPTIONAL and field.name not in columns:
                notes.append(f"no column {field.name!r}: filled with nulls")
            else:
                remedy = REMEDIES.get(field.name, "")
                problems.append(
                    f"column {name!r} is missing (expected {_expectation(field)}){remedy}"
                )
            continue
        if found.names.count(name) > 1:
            problems.append(f"column {name!r} occurs {found.names.count(name)} times")
            continue
        given = found.field(name).type
        if converter(given, field, time_zone=zone) is None:
            problems.append(
                f"column {name!r} has type {given}, expected {_expectation(field)} ({field.type})"
            )
            continue
        sources[field.name] = name
        if given != field.type:
            notes.append(_conversion_note(name, given, field.type, zone))
    extra = sorted(set(found.names) - set(sources.values()) - set(schema.names))
    if extra and refuse_extra:
        problems.append(
            f"column{'s' * (len(extra) > 1)} {', '.join(map(repr, extra))} not declared; "
            "declare in `features:` or leave out"
        )
    elif extra:
        notes.append(f"columns left out: {', '.join(extra)}")
    if problems:
        raise ContractError(f"{path} does not fit the contract:\n  " + "\n  ".join(problems))
    return FilePlan(
        path=path,
        schema=pa.schema([field.with_nullable(True) for field in schema]),
        sources=sources,
        time_zone=zone,
        notes=tuple(notes),
        num_rows=pq.read_metadata(path).num_rows,
    )


def find_key_type(
    files: Mapping[str, list[Path]], columns: Mapping[str, Mapping[str, str]]
) -> pa.DataType:
    """The one type of all product keys of a log: 64-bit integers or strings.

    Args:
        files: Table: its files.
        columns: Table: contract column: column in the file, where the names differ.

    Raises:
        ContractError: keys of another type, or of different types in different places.
    """
    seen: dict[str, str] = {}
    for table, paths in files.items():
        for path in paths:
            found = read_file_schema(path)
            for contract_name in KEY_COLUMNS:
                name = columns.get(table, {}).get(contract_name, contract_name)
                belongs = (contract_name == "product_id") == (table != "impressions")
                if not belongs or name not in found.names:
                    continue
                where = f"{table} column {name!r} in {path}"
                seen.setdefault(_key_kind(found.field(name).type, where), where)
    if len(seen) > 1:
        places = "; ".join(f"{kind} in {where}" for kind, where in sorted(seen.items()))
        raise ContractError(
            f"product keys must have one type in all tables, integers or text, got {places}"
        )
    return pa.int64() if "integers" in seen else pa.string()


def check_time_zone(name: str) -> str:
    """The name of a time zone.

    Raises:
        ContractError: there is no such zone.
    """
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ContractError(
            f"time_zone {name!r} is not known; expected a name such as UTC or Europe/Berlin"
        ) from error
    return name


Convert = Callable[[pa.Array], pa.Array]


def converter(given: pa.DataType, field: pa.Field, *, time_zone: str) -> Convert | None:
    """A function from arrays of one type to the type of a contract column; none if unsafe."""
    if pt.is_dictionary(given):
        inner = converter(given.value_type, field, time_zone=time_zone)
        return None if inner is None else lambda array: inner(array.dictionary_decode())
    target = field.type
    if given == target:
        return lambda array: array
    if pt.is_null(given):
        return lambda array: pa.nulls(len(array), target)
    if target == TIME:
        return _time_converter(given, time_zone)
    if pt.is_boolean(target):
        return _label_converter(given)
    if pt.is_string(target):
        textual = pt.is_large_string(given) or pt.is_string_view(given)
        plain = pt.is_integer(given) or pt.is_boolean(given)
        usable = textual or (plain and field.name not in KEY_COLUMNS)
        return (lambda array: array.cast(target)) if usable else None
    if pt.is_integer(target):
        whole = pt.is_integer(given) or (pt.is_floating(given) and field.name not in KEY_COLUMNS)
        if not whole:
            return None
        return lambda array: _nan_to_null(array).cast(target)
    numeric = pt.is_integer(given) or pt.is_floating(given) or pt.is_decimal(given)
    if pt.is_float64(target) and (numeric or pt.is_boolean(given)):
        return lambda array: array.cast(target, safe=False)
    return None


def _time_converter(given: pa.DataType, time_zone: str) -> Convert | None:
    if pt.is_timestamp(given) and given.tz is not None:
        return lambda array: array.cast(TIME, safe=False)
    if pt.is_timestamp(given) or pt.is_date(given):
        naive = pa.timestamp("us")
        return lambda array: _place(array.cast(naive, safe=False), time_zone)
    if pt.is_integer(given):
        return _from_epoch
    if pt.is_string(given) or pt.is_large_string(given):
        return lambda array: _from_text(array, time_zone)
    return None


def _place(naive: pa.Array, time_zone: str) -> pa.Array:
    """Read wall-clock times in a zone; a time that a clock change skips or repeats is an error."""
    return pc.assume_timezone(naive, time_zone, ambiguous="raise", nonexistent="raise").cast(TIME)


def _from_epoch(array: pa.Array) -> pa.Array:
    """Whole units since 1970; the magnitude tells the unit (seconds until the year 5138)."""
    value = array.cast(pa.int64())
    size = pc.abs(value)
    micros = pc.case_when(
        pc.make_struct(pc.less(size, 10**11), pc.less(size, 10**14), pc.less(size, 10**17)),
        pc.multiply(pc.if_else(pc.less(size, 10**11), value, 0), 1_000_000),
        pc.multiply(pc.if_else(pc.less(size, 10**14), value, 0), 1_000),
        value,
        pc.divide(value, 1_000),
    )
    return pc.if_else(pc.is_null(value), pa.scalar(None, pa.int64()), micros).cast(TIME)


def _from_text(array: pa.Array, time_zone: str) -> pa.Array:
    """ISO 8601; a text without an offset is read in the declared zone."""
    texts = pc.utf8_trim_whitespace(array.cast(pa.string()))
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    zoned = pc.match_substring_regex(texts, r"(Z|[+-]\d\d(:?\d\d)?)$")
    dated = pc.match_substring_regex(texts, r"^\d{4}-\d\d-\d\d$")
    zoned = pc.and_(zoned, pc.invert(dated))
    missing = pa.scalar(None, pa.string())
    absolute = pc.if_else(zoned, texts, missing).cast(TIME)
    local = pc.if_else(zoned, missing, texts).cast(pa.timestamp("us"))
    return pc.coalesce(absolute, _place(local, time_zone))


def _label_converter(given: pa.DataType) -> Convert | None:
    if pt.is_integer(given) or pt.is_floating(given):
        return _label_from_number
    if pt.is_string(given) or pt.is_large_string(given):
        return _label_from_text
    return None


def _label_from_number(array: pa.Array) -> pa.Array:
    value = _nan_to_null(array)
    usable = pc.or_(pc.equal(value, 0), pc.equal(value, 1))
    if not pc.all(usable, min_count=0).as_py():
        raise pa.ArrowInvalid("label is neither 0 nor 1")
    return pc.equal(value, 1)


def _label_from_text(array: pa.Array) -> pa.Array:
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(array.cast(pa.string())))
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    yes = pc.or_(pc.equal(texts, "true"), pc.equal(texts, "1"))
    no = pc.or_(pc.equal(texts, "false"), pc.equal(texts, "0"))
    if not pc.all(pc.or_(yes, no), min_count=0).as_py():
        raise pa.ArrowInvalid("label is neither true nor false")
    return yes


def _nan_to_null(array: pa.Array) -> pa.Array:
    if not pt.is_floating(array.type):
        return array
    return pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)


def _first_failure(column: pa.Array, convert: Convert) -> int:
    """Number of the first value that cannot be converted, by bisection."""
    low, high = 0, len(column)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(column.slice(low, middle - low))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            high = middle
        else:
            low = middle
    return low


def _key_kind(given: pa.DataType, where: str) -> str:
    if pt.is_dictionary(given):
        given = given.value_type
    if pt.is_integer(given):
        return "integers"
    if pt.is_string(given) or pt.is_large_string(given) or pt.is_string_view(given):
        return "text"
    raise ContractError(f"{where} has type {given}, expected integers or text")


def _expectation(field: pa.Field) -> str:
    if field.type == TIME:
        return EXPECTED["time"]
    if field.type == pa.bool_():
        return EXPECTED["boolean"]
    if pt.is_string(field.type) and field.name in KEY_COLUMNS:
        return EXPECTED["text"]
    return EXPECTED[str(field.type)]


def _conversion_note(name: str, given: pa.DataType, target: pa.DataType, zone: str) -> str:
    naive = (pt.is_timestamp(given) and given.tz is None) or pt.is_date(given)
    placed = f", read in {zone}" if target == TIME and (naive or pt.is_string(given)) else ""
    return f"column {name!r} converted from {given} to {target}{placed}"
