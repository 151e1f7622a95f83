"""Which cores threads keep to, on real threads and processes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import pytest

from driftline.platform.priority import OwnCore, roam

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores, and a system that lets threads keep to one",
)

HOLD = """
import sys
from pathlib import Path
from driftline.platform.priority import OwnCore
core = OwnCore(Path(sys.argv[1]))
core.look()
print(core.core, flush=True)
sys.stdin.read()
"""


@contextmanager
def busy_process(core: int) -> Iterator[None]:
    """Somebody else who uses a core all the time."""
    script = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def on_a_thread(act: Callable[[], object]) -> None:
    """So that the thread of the tests stays free."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_each_thread_gets_a_core_of_its_own_while_there_are_any(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    held: list[OwnCore] = []

    def take() -> None:
        core = OwnCore(tmp_path)
        core.look()
        core.look()  # changes nothing
        held.append(core)
        assert os.sched_getaffinity(0) == ({core.core} if core.core is not None else every)

    for _ in range(len(every) + 1):
        on_a_thread(take)

    assert {core.core for core in held[:-1]} == every
    assert held[-1].core is None
    held[0].give_back()
    on_a_thread(take)
    assert held[-1].core in every


def spin(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_who_waits_for_its_core_longer_than_it_runs_takes_another(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    cores: list[int | None] = []

    def keep() -> None:
        core = OwnCore(tmp_path, chooser=Random(1))
        core.look()
        cores.append(core.core)
        spin(0.2)
        core.look()
        cores.append(core.core)
        assert core.core is not None
        with ExitStack() as busy:
            for _ in range(4):
                busy.enter_context(busy_process(core.core))
            spin(0.2)  # takes a second, most of it waiting
        core.look()
        cores.append(core.core)
        assert os.sched_getaffinity(0) == {core.core}
        core.give_back()
        assert os.sched_getaffinity(0) == every

    on_a_thread(keep)

    assert cores[0] == cores[1]
    assert cores[2] not in (None, cores[1])


def test_a_process_that_dies_leaves_its_core(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        kept = int(process.stdout.readline())
        found: list[int | None] = []

        def take() -> None:
            core = OwnCore(tmp_path)
            core.look()
            found.append(core.core)
            core.give_back()

        on_a_thread(take)
        process.kill()
        process.wait()
        on_a_thread(take)

    assert found[0] != kept
    assert found[1] == kept


def test_threads_of_a_thread_that_keeps_a_core_may_roam_again(tmp_path: Path) -> None:
    every = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def child() -> None:
        seen.append(os.sched_getaffinity(0))
        roam()
        seen.append(os.sched_getaffinity(0))

    def parent() -> None:
        OwnCore(tmp_path).look()
        on_a_thread(child)

    on_a_thread(parent)

    assert len(seen[0]) == 1
    assert seen[1] == every
