"""Feast's Redis layout read by its bytes, against Feast's own functions and protobuf."""

import socket
import threading
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from driftline.features.feast_plugins.errors import FeatureStoreError
from driftline.features.feast_plugins.redis_connection import (
    FAILURES_TO_OPEN,
    PAUSE_SECONDS,
    Breaker,
    RedisAddress,
    RedisConnection,
    RedisUnavailableError,
)
from driftline.features.feast_plugins.redis_wire import (
    HashKeys,
    command,
    event_us,
    field_name,
    floats,
    integers,
    text,
)
from driftline.platform.errors import SettingsError

int64 = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(codec="utf-8"), max_size=200)


@given(key=int64 | texts, join_key=st.text(min_size=1, max_size=30), project=st.text(max_size=9))
def test_hashes_have_the_names_that_feast_gives_them(
    key: int | str, join_key: str, project: str
) -> None:
    value = Value(string_val=key) if isinstance(key, str) else Value(int64_val=key)
    expected = _redis_key(project, EntityKey(join_keys=[join_key], entity_values=[value]))
    assert HashKeys(join_key, project).name(key) == expected


@given(view=texts, feature=texts)
def test_fields_have_the_names_that_feast_gives_them(view: str, feature: str) -> None:
    assert field_name(view, feature) == _mmh3(f"{view}:{feature}")


def cells(values: list[Any], kind: str) -> list[bytes | None]:
    """Half of the missing values as nulls, half as fields that were never written."""
    return [
        Value(**{kind: value}).SerializeToString()
        if value is not None
        else (None if place % 2 else Value().SerializeToString())
        for place, value in enumerate(values)
    ]


@given(st.lists(st.none() | st.floats(width=32)))
def test_numbers_are_those_of_protobuf(values: list[float | None]) -> None:
    expected = np.array([np.nan if value is None else value for value in values], np.float32)
    np.testing.assert_array_equal(floats(cells(values, "float_val")), expected)


@given(st.lists(st.none() | int64, max_size=20))
def test_integers_are_those_of_protobuf(values: list[int | None]) -> None:
    found = integers(cells(values, "int64_val"), missing=-7)
    assert found.tolist() == [-7 if value is None else value for value in values]


@given(st.none() | texts)
def test_strings_are_those_of_protobuf(value: str | None) -> None:
    for cell in cells([value, value], "string_val"):
        assert text(cell) == value


@given(st.integers(-(10**15), 4 * 10**15))
def test_event_times_are_those_of_protobuf(us: int) -> None:
    stamp = Timestamp()
    stamp.FromMicroseconds(us)
    assert event_us(stamp.SerializeToString()) == us


def test_a_feature_of_another_type_is_not_taken_for_a_number() -> None:
    for wrong in (Value(double_val=1.0), Value(int64_val=4_000_000_000)):
        with pytest.raises(FeatureStoreError, match=r"no number|should be a number"):
            floats([Value(float_val=1.0).SerializeToString(), wrong.SerializeToString()])
    with pytest.raises(FeatureStoreError, match="no integer"):
        integers([Value(string_val="7").SerializeToString()], missing=0)
    with pytest.raises(FeatureStoreError, match="no string"):
        text(Value(int64_val=7).SerializeToString())


def test_an_address_is_read_as_feast_writes_it() -> None:
    found = RedisAddress.parse("cache.example:6380,db=2,password=a=b,ssl=true,username=reader")
    assert found == RedisAddress("cache.example", 6380, 2, "reader", "a=b", ssl=True)
    for wrong in ("localhost", "a:1,b:2", "localhost:6379,socket_timeout=3", ""):
        with pytest.raises(SettingsError, match="must be HOST:PORT and any of db, username"):
            RedisAddress.parse(wrong)


def test_a_server_that_says_nothing_or_little_is_unavailable() -> None:
    for said in (b"", b"*2\r\n$1\r\na\r\n", b"-LOADING Redis is loading\r\n", b"nonsense"):
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer(server: socket.socket = server, said: bytes = said) -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(said)
                    connection.recv(1)  # until the client gives up

            thread = threading.Thread(target=answer)
            thread.start()
            connection = RedisConnection(RedisAddress("127.0.0.1", server.getsockname()[1]))
            with pytest.raises(RedisUnavailableError):
                connection.ask(command(b"PING"), num=1, timeout_seconds=0.1)
            thread.join()


def test_a_breaker_opens_after_failures_in_a_row_and_lets_one_through_after_a_pause() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    moment = [now]
    breaker = Breaker(clock=lambda: moment[0])
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed("slow")
    breaker.succeeded()
    for number in range(FAILURES_TO_OPEN):
        assert breaker.allows(), number
        breaker.failed("slow")
    assert not breaker.allows()
    moment[0] += PAUSE_SECONDS
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.succeeded()
    assert breaker.allows()
    assert not breaker.is_open
