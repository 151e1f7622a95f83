"""Where a number comes from: code, machine, settings."""

import os
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from driftline.platform.artefacts import hash_value
from driftline.platform.settings import DriftlineSettings

NOT_MODEL_SETTINGS = frozenset(
    {"workspace", "serving", "cadence", "ray", "registry", "replay", "gate", "search"}
)


@cache
def code_version() -> str:
    """Commit of the checkout (``+`` when it has changes), else the installed version."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return version("driftline")
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit or version("driftline")


def machine() -> dict[str, Any]:
    """Cores, processor, memory and load of this machine."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "model": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
    }


def settings_hash(settings: DriftlineSettings) -> str:
    """Hash of all settings that shape data or models; addresses and paths left out."""
    return hash_value(settings.model_dump(mode="json", exclude=set(NOT_MODEL_SETTINGS)))[:12]


def _git(root: Path, *arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
