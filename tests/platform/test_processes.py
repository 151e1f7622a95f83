"""Families of processes, on real ones."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from driftline.platform.errors import ResourceError
from driftline.platform.processes import (
    MARK,
    ProcessIdentity,
    check_port,
    family_members,
    free_port,
    new_family,
    stop_family,
    wait_for,
)

SLEEP = "import time; time.sleep(60)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
WITH_DETACHED_CHILD = (
    "import subprocess, sys, time; "
    f"subprocess.Popen([sys.executable, '-c', {DEAF!r}], start_new_session=True); "
    "time.sleep(60)"
)


class Starter:
    """Starts Python programs and forgets none."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def __call__(self, program: str, *, family: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, MARK: family}
        process = subprocess.Popen([sys.executable, "-c", program], env=environment)
        self.started.append(process)
        return process


@pytest.fixture
def start() -> Iterator[Starter]:
    starter = Starter()
    yield starter
    for process in starter.started:
        process.kill()
        process.wait()


def wait_until_there_are(number: int, family: str) -> None:
    deadline = time.monotonic() + 120
    while len(family_members(family)) != number:
        assert time.monotonic() < deadline, family_members(family)
        time.sleep(0.02)


def test_a_family_is_stopped_with_detached_descendants_and_nobody_else(start: Starter) -> None:
    family = new_family()
    head = start(WITH_DETACHED_CHILD, family=family)
    stranger = start(SLEEP, family=new_family())
    wait_until_there_are(2, family)

    identity = ProcessIdentity.of(head.pid)
    assert identity is not None
    num_stopped = stop_family(family, first=[identity], patience_seconds=2)

    assert num_stopped == 2
    assert family_members(family) == []
    assert stranger.poll() is None


def test_stopping_twice_stops_nothing_more(start: Starter) -> None:
    family = new_family()
    start(SLEEP, family=family)
    wait_until_there_are(1, family)

    assert stop_family(family) == 1
    assert stop_family(family) == 0


def test_an_identity_is_not_fooled_by_a_number_used_again(start: Starter) -> None:
    process = start(SLEEP, family=new_family())
    identity = ProcessIdentity.of(process.pid)
    assert identity is not None
    assert identity.is_alive

    assert not ProcessIdentity(process.pid, started=identity.started - 60).is_alive
    process.kill()
    psutil.Process(process.pid).wait(60)
    assert not identity.is_alive
    assert ProcessIdentity.from_json(identity.to_json()) == identity


def test_a_taken_port_is_refused_with_the_setting_to_change() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"serving.port: cannot listen on 127.0.0.1:{port}"
        ):
            check_port("127.0.0.1", port, setting="serving.port")

    check_port("127.0.0.1", free_port(), setting="serving.port")


def test_waiting_for_a_child_that_dies_shows_the_end_of_its_log(
    start: Starter, tmp_path: Path
) -> None:
    log = tmp_path / "child.log"
    log.write_text("one\nthe reason\n")
    process = start("raise SystemExit(3)", family=new_family())

    with pytest.raises(ResourceError, match=r"the child ended with code 3(.|\n)*the reason"):
        wait_for(tmp_path / "ready", process=process, log=log, seconds=20, name="the child")
