"""A verified bundle made ready to answer: scorer, request parser, and arms if asked for."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, get_args

import numpy as np
from numpy.typing import NDArray

from driftline.features.online_read import OnlineRead
from driftline.features.online_views import OnlineVersion
from driftline.features.views import feature_views
from driftline.platform.bundle import Bundle
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.errors import BundleError
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.vector_deltas import DeltaReader, grown_scorer
from driftline.serving.arms import ArmsEncoder
from driftline.serving.request_scorer import RequestScorer
from driftline.serving.transport.requests import ContextFeature, KeyType, RequestParser

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PreparedBundle:
    """Everything one answer needs of a bundle.

    The bundle never changes. Vectors of texts that came after it do come (``vector_deltas``): then
    ``requests`` is replaced by one that knows them, and an answer takes it once.
    """

    bundle: Bundle
    scorer: Scorer
    """The bundle's own, without later vectors."""
    parser: RequestParser
    requests: RequestScorer
    encoder: ArmsEncoder | None
    """Encodes texts that the bundle's cache lacks; only with ``unknown_product: encode``."""
    deltas: DeltaReader

    @classmethod
    def of(
        cls, bundle: Bundle, settings: DriftlineSettings, *, version: OnlineVersion | None = None
    ) -> "PreparedBundle":
        """Check that a bundle belongs to these settings, and read it.

        Args:
            bundle: The bundle.
            settings: Of the market.
            version: The feature snapshot that it will answer from first.

        Raises:
            BundleError: it was built from other features, or lacks what the settings ask for.
        """
        check_features(bundle, settings)
        scorer = Scorer.of(bundle)
        requests = RequestScorer(scorer, max_folded_bytes=settings.serving.max_folded_bytes)
        if version is not None:
            requests.prepare(version)
        encodes = settings.serving.unknown_product == "encode"
        prepared = cls(
            bundle=bundle,
            scorer=scorer,
            parser=request_parser(bundle.contract, settings),
            requests=requests,
            encoder=ArmsEncoder.of(bundle, settings) if encodes else None,
            deltas=DeltaReader(bundle),
        )
        prepared.refresh()
        return prepared

    def refresh(self) -> None:
        """Take vectors and texts that came since; called in the background."""
        if self.deltas.look():
            try:
                grown = grown_scorer(self.scorer, self.bundle, self.deltas.deltas)
            except (OSError, ValueError) as error:
                logger.warning("new vectors not taken, the old ones stay: %s", error)
                return
            assert grown.fused is not None  # folded here, not in the next request
            self.requests = self.requests.over(grown)
        if self.encoder is not None:
            self.encoder.refresh()

    def score(self, read: OnlineRead) -> "Scored":
        """Probabilities of a request's ads, and which texts had no vector in the cache."""
        requests = self.requests
        found = requests.score(read)
        if found.uncached is None or not found.uncached.any():
            return Scored(found.probabilities, Text.USUAL, {})
        if self.encoder is not None:
            return _score_encoding(read, requests.scorer, self.encoder)
        return Scored(
            probabilities=found.probabilities,
            page=Text.NEUTRAL if found.uncached[0] else Text.USUAL,
            ads=dict.fromkeys(np.flatnonzero(found.uncached[1:]).tolist(), Text.NEUTRAL),
        )


class Text(IntEnum):
    """Where the vector of a product's text came from."""

    USUAL = 0
    """From the cache, or the product has no text."""
    NEUTRAL = 1
    """Not cached: the learned neutral vector was taken."""
    ENCODED = 2
    """Not cached: the arms were run."""


@dataclass(frozen=True)
class Scored:
    """Probabilities ``[B]``; the page's text, and the ads' that were not usual, by place."""

    probabilities: NDArray[np.float64]
    page: Text
    ads: Mapping[int, Text]

    def fallbacks(self, read: OnlineRead) -> tuple[str | None, Mapping[int, str]]:
        """Why the page, and which ads by place, were not scored as usual.

        ``unknown_product``: in no table, all its features are missing and its vector is neutral.
        ``neutral_text`` and ``encoded_text``: see :class:`Text`. ``store_unavailable``: the online
        store did not answer, so that all features are missing.
        """
        if read.store_unavailable:
            return "store_unavailable", dict.fromkeys(range(read.num_ads), "store_unavailable")
        page = "unknown_product" if read.unknown_page else _REASONS.get(self.page)
        ads = {place: _REASONS[text] for place, text in self.ads.items()}
        if np.count_nonzero(read.unknown_ads):
            unknown = np.flatnonzero(read.unknown_ads).tolist()
            ads = dict(sorted((ads | dict.fromkeys(unknown, "unknown_product")).items()))
        return page, ads


_REASONS: Final = {Text.NEUTRAL: "neutral_text", Text.ENCODED: "encoded_text"}


def _score_encoding(read: OnlineRead, scorer: Scorer, encoder: ArmsEncoder) -> "Scored":
    """The slow way: run the arms for texts that the cache lacks and the catalogue has."""
    columns = read.columns
    page, ad = (np.asarray(columns[name]) for name in TEXT_ID_COLUMNS)
    uncached_B2 = (scorer.text_rows(columns) < 0) & (np.column_stack([page, ad]) > 0)
    encoded_B2 = np.zeros_like(uncached_B2)
    wanted = np.unique(np.concatenate([page[uncached_B2[:, 0]], ad[uncached_B2[:, 1]]]))
    fresh = encoder.encode(wanted)
    if fresh is not None:
        few = scorer.vectors.part(np.unique(np.concatenate([page, ad]))).merged(fresh)
        scorer = replace(scorer, vectors=few, published=None)
        encoded_B2 = uncached_B2 & (scorer.text_rows(columns) >= 0)
    kinds = np.where(encoded_B2, Text.ENCODED, np.where(uncached_B2, Text.NEUTRAL, Text.USUAL))
    return Scored(
        probabilities=scorer.score(columns),
        page=Text(kinds[0, 0]) if len(kinds) else Text.USUAL,
        ads={i: Text(kinds[i, 1]) for i in np.flatnonzero(kinds[:, 1]).tolist()},
    )


def request_parser(contract: Mapping[str, Any], settings: DriftlineSettings) -> RequestParser:
    """The parser for a bundle's contract."""
    key_type: KeyType = "int64" if contract["key_type"] == "int64" else "string"
    assert contract["key_type"] in get_args(KeyType), contract["key_type"]
    return RequestParser(
        key_type,
        [ContextFeature(name, kind) for name, kind in contract["context"].items()],
        max_ads=settings.serving.max_ads_per_request,
        accept_time=settings.serving.clock != "wall",
    )


def check_features(bundle: Bundle, settings: DriftlineSettings) -> None:
    """Refuse a bundle that was trained on other features than the store holds.

    Raises:
        BundleError: names the columns or views that differ.
    """
    trained = [column["name"] for column in bundle.contract["columns"]]
    served = [column.name for column in head_columns(settings)]
    if trained != served:
        raise BundleError(
            f"bundle {bundle.fingerprint} was trained on other features than the settings declare "
            f"({_difference(trained, served)}); refresh the arms with these settings"
        )
    versions = {view.name: view.version for view in feature_views(settings)}
    known = bundle.lineage["feature_views"]
    if changed := [name for name, version in versions.items() if known.get(name) != version]:
        raise BundleError(
            f"bundle {bundle.fingerprint} was trained on other definitions of the feature views "
            f"{changed}; refresh the arms with these settings"
        )


def _difference(trained: Sequence[str], served: Sequence[str]) -> str:
    more, less = sorted(set(trained) - set(served)), sorted(set(served) - set(trained))
    return f"only in the bundle: {more[:5]}, only in the settings: {less[:5]}"
