"""A verified bundle made ready to answer: scorer, request parser, and arms if asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from driftline.features.views import feature_views
from driftline.platform.bundle import Bundle, VectorCache
from driftline.platform.columns import TEXT_ID_COLUMNS, head_columns
from driftline.platform.errors import BundleError
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.serving.arms import ArmsEncoder
from driftline.serving.requests import ContextFeature, KeyType, RequestParser


@dataclass(frozen=True)
class PreparedBundle:
    """Everything one answer needs of a bundle; nothing in it changes but a cache of vectors."""

    bundle: Bundle
    scorer: Scorer
    parser: RequestParser
    encoder: ArmsEncoder | None
    """Encodes texts that the bundle's cache lacks; only with ``unknown_product: encode``."""

    @classmethod
    def of(cls, bundle: Bundle, settings: DriftlineSettings) -> "PreparedBundle":
        """Check that a bundle belongs to these settings, and read it.

        Raises:
            BundleError: it was built from other features, or lacks what the settings ask for.
        """
        check_features(bundle, settings)
        scorer = Scorer.of(bundle)
        encodes = settings.serving.unknown_product == "encode"
        return cls(
            bundle=bundle,
            scorer=scorer,
            parser=request_parser(bundle.contract, settings),
            encoder=ArmsEncoder.of(bundle, settings) if encodes else None,
        )

    def score(self, columns: Mapping[str, Any]) -> "Scored":
        """Probabilities of rows, and which texts had no vector in the cache.

        Args:
            columns: Frame columns as ``Scorer.score`` takes them, text ids as NumPy arrays in
                which 0 stands for no text.
        """
        page, ad = (np.asarray(columns[name]) for name in TEXT_ID_COLUMNS)
        rows_B2 = self.scorer.text_rows(columns)
        uncached = (rows_B2 < 0) & (np.column_stack([page, ad]) > 0)
        scorer, encoded = self.scorer, np.zeros_like(uncached)
        if self.encoder is not None and uncached.any():
            wanted = np.unique(np.concatenate([page[uncached[:, 0]], ad[uncached[:, 1]]]))
            fresh = self.encoder.encode(wanted)
            if fresh is not None:
                few = _only(scorer.vectors, page, ad).merged(fresh)
                scorer = replace(scorer, vectors=few, published=None)
                encoded = uncached & (scorer.text_rows(columns) >= 0)
        return Scored(
            probabilities=scorer.score(columns),
            encoded=encoded,
            neutral=uncached & ~encoded,
        )


@dataclass(frozen=True)
class Scored:
    """Probabilities ``[B]``; whose text, page's and ad's, was encoded or replaced ``[B, 2]``."""

    probabilities: NDArray[np.float64]
    encoded: NDArray[np.bool_]
    neutral: NDArray[np.bool_]


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


def _only(cache: VectorCache, page: NDArray[np.int64], ad: NDArray[np.int64]) -> VectorCache:
    """The part of a cache that one request needs, cheap to extend."""
    rows = cache.rows(np.unique(np.concatenate([page, ad])))
    rows = rows[rows >= 0]
    return VectorCache(cache.text_id[rows], cache.page[rows], cache.ad[rows])
