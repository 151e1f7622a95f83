"""What the command shows: results on stdout, progress and log on stderr."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """Where a command's result goes."""

    as_json: bool

    def show(self, text: str, value: Mapping[str, Any]) -> None:
        """Print the result once: readable text, or one JSON object."""
        print(json.dumps(value, indent=2, default=str) if self.as_json else text)  # noqa: T201


def set_up_logging(*, verbose: bool) -> None:
    """Log of our own packages to stderr, one line an event; others only from warnings up."""
    console = Console(stderr=True)
    handler: logging.Handler = (
        RichHandler(console=console, show_path=False, log_time_format="[%H:%M:%S]")
        if console.is_terminal
        else logging.StreamHandler()
    )
    if not console.is_terminal:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("driftline").setLevel(logging.DEBUG if verbose else logging.INFO)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for noisy in ("mlflow", "alembic", "ray", "feast", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Settings that other libraries read from the environment on import: no calls home, UTC."""
    defaults = {
        "TZ": "UTC",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not spin: ten times faster when shared
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A bar on stderr when it is a terminal; silent otherwise."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
