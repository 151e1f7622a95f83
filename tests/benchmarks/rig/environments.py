"""Environments for peers: with packages that are no dependency of ours."""

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.rig.report import say

CONSTRAINTS = Path(__file__).parents[3] / "constraints.txt"


def borrowing_environment(
    folder: Path, packages: Sequence[str], *, constrained: bool = False
) -> Path:
    """Interpreter of an environment with ``packages``; all else it borrows from this one.

    So both sides run the same kernels. An environment that is there already is used again;
    ``constrained`` holds what the packages need to our pinned versions.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        say(f"building {folder}")
        venv.create(folder, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = folder / "lib" / version / "site-packages" / "borrowed.pth"
    here = next(path for path in sys.path if path.endswith("site-packages"))
    borrowed.write_text(f"{here}\n")
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if constrained:
        install += ["--constraint", str(CONSTRAINTS)]
    subprocess.run([*install, *packages], check=True)
    return python
