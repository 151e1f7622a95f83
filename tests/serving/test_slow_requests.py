"""Slow requests are kept with where their time went; fast ones cost nothing and leave nothing."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from driftline.platform.observation_settings import SlowRequestSettings
from driftline.serving.observing.slow_requests import LoopLag, SlowRequests


def an_answer(milliseconds: float, name: str = "view") -> Any:
    return SimpleNamespace(
        live=SimpleNamespace(arm="champion", fingerprint="f00d"),
        form="json",
        probabilities=[0.1] * 7,
        request=SimpleNamespace(page=5),
        request_id=name,
        stages={
            "wait": milliseconds / 2e3,
            "fuse": milliseconds / 2e3,
            "total": milliseconds / 1e3,
        },
        tiers={"short": (float("nan"), True), "long": (60.0, False)},
        page_fallback=None,
        ad_fallbacks={1: "neutral_text"},
    )


def made(folder: Path, **changes: Any) -> SlowRequests:
    settings = SlowRequestSettings.model_validate({"threshold_ms": 5.0, **changes})
    return SlowRequests(settings, folder=folder, replica="r")


def test_only_what_took_longer_than_the_threshold_is_kept_slowest_first(tmp_path: Path) -> None:
    slow = made(tmp_path)
    for number, milliseconds in enumerate((1, 6, 4.99, 30, 5)):
        slow.answered(an_answer(milliseconds, str(number)))

    found = slow.to_json()

    assert [entry["request_id"] for entry in found["requests"]] == ["3", "1", "4"]
    assert found["slow_since_start"] == slow.num_slow == 3
    worst = found["requests"][0]
    assert worst["stages_ms"] == {"wait": 15.0, "fuse": 15.0, "total": 30.0}
    assert (worst["bundle"], worst["num_ads"], worst["num_fallbacks"]) == ("f00d", 7, 1)
    assert worst["features"]["short"] == {"age_seconds": None, "stale": True}
    assert json.loads(json.dumps(found)) == found


def test_only_the_newest_are_held_and_only_for_some_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = made(tmp_path, capacity=3, minutes=1)
    for number in range(5):
        slow.answered(an_answer(10 + number, str(number)))
    assert [entry["request_id"] for entry in slow.to_json()["requests"]] == ["4", "3", "2"]

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 61)
    assert slow.to_json()["requests"] == []


def test_the_file_holds_each_request_once_and_stays_bounded(tmp_path: Path) -> None:
    slow = made(tmp_path, max_bytes=8_000)
    for number in range(100):
        slow.answered(an_answer(10, str(number)))
        slow.write()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8_000
    slow.close()

    lines = [
        json.loads(line)
        for path in sorted(tmp_path.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        for line in path.read_text().splitlines()
    ]
    names = [int(line["request_id"]) for line in lines]
    assert names == list(range(names[0], 100))
    assert len(names) > 5


def test_a_folder_that_cannot_be_written_is_said_once_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    slow = made(tmp_path / "file")
    for _ in range(3):
        slow.answered(an_answer(10))
        slow.write()

    assert len(caplog.records) == 1
    assert len(slow.to_json()["requests"]) == 3


def test_the_loop_knows_how_long_it_was_held() -> None:
    async def hold(lag: LoopLag) -> float:
        lag.follow(asyncio.get_running_loop())
        started = time.monotonic()
        await asyncio.sleep(0.05)
        time.sleep(0.3)  # what a request must not do
        await asyncio.sleep(0.01)
        return time.monotonic() - started

    lag = LoopLag()
    seconds = asyncio.run(hold(lag))

    # Due 0.1 s after the start, it came when the loop was free again, 0.35 s after it.
    assert 0.2 < lag.worst_seconds < seconds


def test_a_request_starts_the_measurement_of_its_loop(tmp_path: Path) -> None:
    slow = made(tmp_path)
    slow.answered(an_answer(1))  # no loop: scored without a server
    assert slow.lag.worst_seconds == 0

    async def serve() -> None:
        slow.answered(an_answer(1))
        time.sleep(0.15)
        await asyncio.sleep(0.01)

    asyncio.run(serve())
    assert slow.lag.worst_seconds > 0.02
