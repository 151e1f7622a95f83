"""From a request to an answer: look up, fuse, say how fresh it was.

One answer uses one bundle and one feature snapshot, whatever is swapped meanwhile: both references
are taken once, at its beginning.
"""

import gc
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from driftline.features.online import OnlineFeatures
from driftline.features.online_freshness import StaleTier
from driftline.features.online_read import OnlineRead
from driftline.features.online_views import OnlineVersion
from driftline.platform.bundle import Bundle
from driftline.platform.errors import BundleError, DriftlineError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.traffic import BundleRef
from driftline.platform.windows import format_time
from driftline.platform.workspace import Workspace
from driftline.serving.answers import Answer, Observer
from driftline.serving.prepared import PreparedBundle
from driftline.serving.rollout.arm_counts import ArmCounter
from driftline.serving.rollout.holder import UNUSABLE, RouteHolder
from driftline.serving.rollout.routes import LiveBundle, Routes
from driftline.serving.rollout.shadow import ShadowScorer
from driftline.serving.transport.requests import (
    Key,
    RefusedRequestError,
    ScoreRequest,
    made_up_ids,
    refuse,
)
from driftline.serving.transport.wire import JsonForm, WireForm

logger = logging.getLogger(__name__)

WARM_UP_ADS: Final = 100
NUM_RECENT: Final = 64
"""Answered requests that are remembered, to be replayed by a bundle before it goes live."""


class BundleService:
    """Scores requests with the champion, and follows it.

    Args:
        settings: ``serving`` says how requests are checked and which clock counts.
        replica: Name of this copy, shown in the status.
        observers: Told of every request after it was answered.

    A background thread, between :meth:`start` and :meth:`stop`, looks for a new champion and new
    features; :meth:`look` does the same once.
    """

    def __init__(
        self,
        settings: DriftlineSettings,
        *,
        replica: str = "local",
        observers: Sequence[Observer] = (),
    ) -> None:
        self._settings = settings
        self._replica = replica
        self._arms = ArmCounter(settings, replica=replica)
        self._shadows = ShadowScorer(settings.serving.delivery)
        self._observers = (*observers, self._arms, self._shadows)
        self._features = OnlineFeatures.open(settings)
        self._holder = RouteHolder(
            Workspace.of(settings).bundles, prepare=self._prepare, warm_up=self._warm_up
        )
        self._made_up_ids = made_up_ids()
        self._recent: deque[ScoreRequest] = deque(maxlen=NUM_RECENT)
        self._froze = False
        self._started_at = datetime.now(UTC)
        self._num_answers = 0
        self._num_refused = 0
        self._feature_error: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-champion", daemon=True)

    # --- following ------------------------------------------------------------------------

    def start(self) -> None:
        """Look once, then keep looking in the background."""
        self._arms.remove_old(now=time.time())
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the background thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        for observer in self._observers:
            observer.close()

    @property
    def is_following(self) -> bool:
        """Whether the background thread lives."""
        return self._thread.is_alive()

    def look(self) -> None:
        """Take newer features and a newer champion, if there are any."""
        try:
            self._features.refresh(prepare=self._prepare_version)
            self._feature_error = None
        except (DriftlineError, OSError) as error:
            if self._feature_error != str(error):
                logger.warning("features not refreshed, the old ones stay: %s", error)
            self._feature_error = str(error)
        if self._holder.look():
            gc.collect()
            if not self._froze:  # what lives now lives long: the collector need not walk it again
                gc.freeze()  # but later bundles come and go, and what they leave must be found
                self._froze = True
        self._shadows.follow(self._holder.routes.shadows)
        self._arms.write()
        for live in self._holder.routes.all():
            live.prepared.refresh()

    def _prepare_version(self, version: OnlineVersion) -> None:
        for live in self._holder.routes.all():
            live.prepared.requests.prepare(version)

    def _follow(self) -> None:
        while not self._stop.wait(self._settings.serving.poll_seconds):
            self.look()

    def try_out(self, ref: BundleRef) -> LiveBundle:
        """Open, verify, prepare and warm up a bundle without making it live.

        Raises:
            BundleError: it cannot be used; the message says why.
        """
        try:
            return self._holder.load(ref)
        except UNUSABLE as error:
            raise BundleError(
                f"version {ref.version} ({ref.fingerprint}) cannot be served: {error}"
            ) from error

    def _prepare(self, bundle: Bundle) -> PreparedBundle:
        return PreparedBundle.of(bundle, self._settings, version=self._features.version)

    def _warm_up(self, live: LiveBundle) -> None:
        """Score the newest good requests once more, or a made-up one before there are any."""
        contract = live.prepared.bundle.contract
        key: Key = 0 if contract["key_type"] == "int64" else "-"
        context = dict.fromkeys(contract["context"])
        made_up = ScoreRequest(page=key, ads=(key,) * WARM_UP_ADS, context=context)
        for request in (made_up, *tuple(self._recent)):
            answer = self._answer(live, request, parse_seconds=0.0, takes_stale=True)
            if not _is_number(answer):
                raise ValueError(f"bundle {live.fingerprint} answers {answer.probabilities}")
            time.sleep(0)  # let go of the interpreter: requests come first

    # --- answering ------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether there is a bundle to score with."""
        return self._holder.live is not None

    @property
    def routes(self) -> Routes:
        """The bundles that are live now."""
        return self._holder.routes

    @property
    def contract(self) -> Mapping[str, Any] | None:
        """Key type and context features of the bundle that answers now."""
        live = self._holder.live
        return None if live is None else live.prepared.bundle.contract

    def answer(self, body: bytes, form: WireForm) -> Answer:
        """Parse and score one request.

        Where the canary fails, the champion answers.

        Raises:
            RefusedRequestError: the request breaks the contract, or there is no champion yet.
        """
        started = time.perf_counter()
        try:
            routes = self._routes()
            request = form.read(body, routes.parser)
            parse_seconds = time.perf_counter() - started
            answer = self._route(routes, request, parse_seconds=parse_seconds, form=form.name)
            self._recent.append(request)
            return answer
        except RefusedRequestError as error:
            self.refused(error)
            raise

    def refused(self, error: RefusedRequestError) -> None:
        """A request was refused, here or by a face: count it and tell the observers, once."""
        if not error.told:
            error.told = True
            self._num_refused += 1
            for observer in self._observers:
                observer.refused(error)

    def sent(self, answer: Answer) -> None:
        """The answer has been handed to the client: count it, and tell the observers."""
        self._num_answers += 1
        for observer in self._observers:
            observer.answered(answer)

    def score(self, body: bytes) -> bytes:
        """The JSON answer to a JSON request."""
        form = JsonForm()
        answer = self.answer(body, form)
        self.sent(answer)
        return form.write(answer)

    def _routes(self) -> Routes:
        routes = self._holder.routes
        if routes.champion is None:
            raise refuse(
                f"{self._settings.name} has no champion yet",
                status=503,
                code="no_champion",
                hint="`driftline refresh arms CONFIG` trains and promotes one; see /v1/status",
            )
        return routes

    def _route(
        self, routes: Routes, request: ScoreRequest, *, parse_seconds: float, form: str
    ) -> Answer:
        """Choose a bundle and score; where the canary cannot, its stand-in does."""
        live = routes.choose(request)
        if live is routes.canary:
            try:
                answer = self._answer(live, request, parse_seconds=parse_seconds, form=form)
                if _is_number(answer):
                    return answer
            except RefusedRequestError:
                raise
            except UNUSABLE:
                logger.debug("the canary failed", exc_info=True)
            self._arms.failed(live)
            assert routes.stand_in is not None
            live = routes.stand_in
        try:
            return self._answer(live, request, parse_seconds=parse_seconds, form=form)
        except RefusedRequestError:
            raise
        except Exception:
            self._arms.failed(live)
            raise

    def _answer(
        self,
        live: LiveBundle,
        request: ScoreRequest,
        *,
        parse_seconds: float,
        form: str = "json",
        takes_stale: bool = False,
    ) -> Answer:
        started = time.perf_counter()
        now, read = self._read(request)
        have_read = time.perf_counter()
        if read.refusal is not None and not takes_stale:
            raise stale_features(read.refusal)
        scored = live.prepared.score(read)
        page, ads = scored.fallbacks(read)
        return Answer(
            request=request,
            request_id=request.request_id or next(self._made_up_ids),
            live=live,
            now=now,
            probabilities=scored.probabilities,
            tiers=read.tiers,
            page_fallback=page,
            ad_fallbacks=ads,
            read=read,
            stages={
                "parse": parse_seconds,
                "features": have_read - started,
                "fuse": time.perf_counter() - have_read,
            },
            features_as_of=read.as_of,
            form=form,
        )

    def _read(self, request: ScoreRequest) -> tuple[datetime, OnlineRead]:
        """Features of a request, and the moment they stand for."""
        while True:
            as_of = self._features.as_of
            now = self._now(request)
            read = self._features.read(request.page, request.ads, context=request.context, now=now)
            if self._features.as_of == as_of:  # else the snapshot was swapped in between
                return now, read

    def _now(self, request: ScoreRequest | None = None) -> datetime:
        """The moment at which features are read."""
        if request is not None and request.time is not None:
            return request.time
        clock = self._settings.serving.clock
        if isinstance(clock, datetime):
            return clock
        newest = self._features.as_of if clock == "snapshot" else None
        return newest or datetime.now(UTC)

    # --- status ---------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What is served, how fresh it is, and since when."""
        live = self._holder.live
        now = self._now()
        clock = self._settings.serving.clock
        return {
            "name": self._settings.name,
            "settings": self._settings.identity,
            "ready": live is not None,
            "bundle": None if live is None else live.fingerprint,
            "version": None if live is None else live.version,
            "lineage": None if live is None else dict(live.prepared.bundle.lineage),
            "promoted_at": _time(live.promoted_at) if live else None,
            "loaded_at": _time(live.loaded_at) if live else None,
            "load_seconds": live.load_seconds if live else None,
            "clock": format_time(clock) if isinstance(clock, datetime) else clock,
            "now": format_time(now),
            "features": {**self._features.status(now=now), "error": self._feature_error},
            "replica": self._replica,
            "following": self.is_following,
            "started_at": format_time(self._started_at),
            "uptime_seconds": round((datetime.now(UTC) - self._started_at).total_seconds(), 1),
            "answers": self._num_answers,
            "refused_requests": self._num_refused,
            **self._holder.status(),
            "shadows": self._shadows.status(),
        }


def stale_features(stale: StaleTier) -> RefusedRequestError:
    """The error for a request whose features are older than a tier with ``on_stale: refuse``."""
    return refuse(
        f"features of tier {stale.tier} are {stale.age_seconds:.0f} s old, and may be at most "
        f"{stale.limit_seconds:.0f} s ({stale.num_values} values of this request are older)",
        status=503,
        code="stale_features",
        field=stale.tier,
        allowed={"age_seconds": stale.limit_seconds},
        hint="materialise the features (`driftline features materialize CONFIG`; is `driftline up` "
        f"running?), or set tiers.{stale.tier}.on_stale to use or default",
    )


def _is_number(answer: Answer) -> bool:
    """Whether every probability is one."""
    return math.isfinite(float(answer.probabilities.sum()))


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)
