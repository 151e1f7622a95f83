"""Whose turn it is on a processor: requests first.

Ray starts its workers with niceness 15, so that they yield to everything else on their machine. For
a replica that answers within milliseconds this is wrong: any busy process beside it makes its
slowest answers tens of times slower. On a Ray of ours workers begin at 0, and those that train step
back by themselves.
"""

import os
from typing import Final

FOREGROUND: Final = {"RAY_worker_niceness": "0"}
"""Environment of the process that starts a Ray on which requests are answered."""
BACKGROUND_NICENESS: Final = 10


def step_back() -> None:
    """Let this process yield to those that answer requests; for good."""
    now = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(now, BACKGROUND_NICENESS))
