"""Who waits for a turn, and who is turned away."""

import asyncio
import time

import pytest

from driftline.serving.transport.limits import HeldBytes, WaitingLine, poll
from driftline.serving.transport.requests import RefusedRequestError


def test_turns_come_in_the_order_of_arrival_one_a_round_of_the_loop() -> None:
    line, order = WaitingLine(max_waiting=10, max_seconds=9), []
    rounds = 0

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def ask(number: int) -> None:
        await line.turn()
        order.append((number, rounds))

    async def main() -> None:
        counter = asyncio.create_task(count())
        await asyncio.gather(*(ask(number) for number in range(5)))
        counter.cancel()

    asyncio.run(main())

    assert [number for number, _ in order] == list(range(5))
    assert len({when for _, when in order}) == 5


def test_nobody_waits_when_nobody_is_there() -> None:
    line = WaitingLine(max_waiting=1, max_seconds=9)

    async def main() -> None:
        for _ in range(3):
            assert poll(line.turn) is None  # its coroutine ended without waiting
            assert len(line) == 0
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main())


def test_one_more_than_may_wait_is_turned_away_at_once() -> None:
    line = WaitingLine(max_waiting=3, max_seconds=9)

    async def main() -> list[object]:
        asked = [line.turn() for _ in range(6)]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    outcomes = asyncio.run(main())

    refused = [outcome for outcome in outcomes if isinstance(outcome, RefusedRequestError)]
    assert outcomes[:4] == [None] * 4
    assert [(error.status, error.code) for error in refused] == [(503, "overloaded")] * 2
    assert "3 requests wait already" in str(refused[0])


def test_a_turn_that_comes_too_late_is_not_taken() -> None:
    line = WaitingLine(max_waiting=3, max_seconds=0.01)

    async def block() -> None:
        time.sleep(0.02)  # somebody's turn takes long

    async def main() -> list[object]:
        asked = (line.turn(), line.turn(), block())
        return list(await asyncio.gather(*asked, return_exceptions=True))

    first, late, _ = asyncio.run(main())

    assert first is None
    assert isinstance(late, RefusedRequestError)
    assert (late.status, late.code) == (503, "timed_out")
    assert "for its turn, 0.01 s are allowed" in str(late)


def test_who_gives_up_does_not_hold_up_the_line() -> None:
    line = WaitingLine(max_waiting=10, max_seconds=9)

    async def main() -> None:
        await line.turn()
        waiting = [asyncio.create_task(line.turn()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        waiting[1].cancel()
        async with asyncio.timeout(5):
            await waiting[2]
            await line.turn()

    asyncio.run(main())


def test_held_bytes_are_bounded_and_given_back() -> None:
    held = HeldBytes(max_bytes=10)
    held.take(6)
    with pytest.raises(RefusedRequestError, match="too many unfinished requests"):
        held.take(5)

    held.give_back(6)

    held.take(10)
    assert held.held == 10


def test_looking_for_a_message_takes_none_away() -> None:
    async def main() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()
        for _ in range(3):
            assert poll(queue.get) is None
        queue.put_nowait(1)
        queue.put_nowait(2)
        assert poll(queue.get) == 1
        assert await queue.get() == 2

    asyncio.run(main())
