"""Processor time and memory of a server, by what its processes do."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from driftline.platform.processes import GONE, family_members

Groups = Mapping[str, float]


@dataclass(frozen=True)
class Usage:
    """What the processes of a family had used at one moment."""

    seconds: Mapping[tuple[int, str], float]
    """Processor time by process and its group."""
    resident_mib: Groups
    """Memory by group; pages that processes share are counted once for each."""
    private_mib: Groups
    """Memory by group without what is shared."""

    @classmethod
    def of(cls, family: str) -> "Usage":
        """Of a family that ``start_serving`` or ``spawn_module`` started."""
        seconds: dict[tuple[int, str], float] = {}
        resident: dict[str, float] = defaultdict(float)
        private: dict[str, float] = defaultdict(float)
        for process in family_members(family):
            try:
                group, times = group_of(process), process.cpu_times()
                memory = process.memory_full_info()
            except GONE:
                continue
            seconds[process.pid, group] = times.user + times.system
            resident[group] += memory.rss / 2**20
            private[group] += memory.uss / 2**20
        return cls(seconds, dict(resident), dict(private))

    def since(self, earlier: "Usage") -> Groups:
        """Processor seconds by group between two moments."""
        spent: dict[str, float] = defaultdict(float)
        for (pid, group), seconds in self.seconds.items():
            spent[group] += seconds - earlier.seconds.get((pid, group), 0.0)
        return dict(spent)


def group_of(process: psutil.Process) -> str:
    """What a process of the server does."""
    title = " ".join(process.cmdline()) or process.name()
    if title.startswith("ray::") and "Replica" in title:
        return "replica"
    if "haproxy" in process.name().lower():
        return "haproxy"
    if title.startswith("ray::ProxyActor"):
        return "proxy"
    return "other"


def replicas(family: str) -> list[psutil.Process]:
    """The processes that score."""
    found = []
    for process in family_members(family):
        try:
            if group_of(process) == "replica":
                found.append(process)
        except GONE:
            continue
    return found
