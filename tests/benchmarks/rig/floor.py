"""What a request costs with nothing around it, measured beside every load.

On a machine that is shared with others, the same work takes twice as long a minute later. So each
load stands beside the time of the same request in process, a moment before: reading it, looking up
its features, scoring and writing the answer, in a loop and with warm caches.
"""

import statistics
import time
from typing import Final

from tests.benchmarks.rig.forms import Form
from tests.benchmarks.rig.market import BenchMarket

from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm, WireForm
from driftline.serving.transport.wire_protobuf import ProtobufForm

FORMS: Final[tuple[WireForm, ...]] = (JsonForm(), ProtobufForm())
NUM_ROUNDS: Final = 9
NUM_REQUESTS: Final = 200


class Floor:
    """The service alone, in this process."""

    def __init__(self, market: BenchMarket) -> None:
        self._service = BundleService(market.settings, replica="floor")
        self._service.look()

    def milliseconds(self, form: Form, bodies: list[bytes]) -> float:
        """Of one request, the median of rounds over many."""
        wire = next(one for one in FORMS if one.content_type == form.content_type)
        rounds = []
        for _ in range(NUM_ROUNDS):
            begun = time.perf_counter()
            for number in range(NUM_REQUESTS):
                wire.write(self._service.answer(bodies[number % len(bodies)], wire))
            rounds.append(1e3 * (time.perf_counter() - begun) / NUM_REQUESTS)
        return statistics.median(rounds)
