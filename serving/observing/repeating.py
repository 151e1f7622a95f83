"""A thread that does one thing again and again, beside the requests."""

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Repeating:
    """Calls ``action`` every so often on a thread of its own, and once more when it is closed.

    Args:
        name: Of the thread.
        seconds: Pause between two calls.
        action: What to do. An error that it raises is logged, once for each text, and the next call
            comes as usual: it stands beside requests that must be answered whatever happens here.
    """

    def __init__(self, name: str, *, seconds: float, action: Callable[[], None]) -> None:
        self._name = name
        self._seconds = seconds
        self._action = action
        self._stop = threading.Event()
        self._known: set[str] = set()
        self.num_errors = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, *, timeout_seconds: float = 3.0) -> bool:
        """End the thread after a last call; harmless when it never started or has ended.

        Returns:
            Whether it has ended; not when the action hangs.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self._call()
        self._call()

    def _call(self) -> None:
        try:
            self._action()
        except Exception as error:  # the last place that could take note of it
            self.num_errors += 1
            text = f"{type(error).__name__}: {error}"
            if text not in self._known and len(self._known) < 100:
                self._known.add(text)
                logger.exception("%s goes on after an error", self._name)
