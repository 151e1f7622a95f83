"""Knows a plain good request by its types, in about half the time that the model takes.

The model of ``requests.py`` says what a request may look like and why one is refused. Most requests
are fine, and to see that they are takes less: what is recognised here is exactly what the model
would have accepted, and everything else is left to it.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Ads = NDArray[np.int64] | tuple[str, ...]
Plain = tuple[int | str, Ads, dict[str, str | float | None], None, str | None, str | None]

FIELDS: Final = frozenset(
    ("page_product_id", "ad_product_ids", "context", "request_id", "request_key")
)
"""Without ``time``, which is rare and needs a calendar."""
INT64: Final = range(-(2**63), 2**63)


class PlainRequests:
    """Recognises requests of one contract.

    Args:
        integers: Whether products are integers; else strings.
        context: Name of each feature of the impression, and whether it is a number.
        max_ads: Largest number of ads.
        max_length: Of strings that name a product, a request or who asks.
    """

    def __init__(
        self, *, integers: bool, context: Mapping[str, bool], max_ads: int, max_length: int
    ) -> None:
        self._integers = integers
        self._context = dict(context)
        self._unknown: dict[str, str | float | None] = dict.fromkeys(context)
        self._max_ads = max_ads
        self._max_length = max_length

    def read(self, values: Any) -> Plain | None:
        """The fields of a ``ScoreRequest`` in their order; ``None`` for what is not plain."""
        if type(values) is not dict or not FIELDS.issuperset(values):
            return None
        page, ads = values.get("page_product_id"), self._ads(values.get("ad_product_ids"))
        context = self._features(values.get("context"))
        request_id, key = values.get("request_id"), values.get("request_key")
        if ads is None or context is None or not self._names(request_id) or not self._names(key):
            return None
        if self._integers:
            if type(page) is not int or page not in INT64:
                return None
        elif page is None or not self._names(page):
            return None
        return page, ads, context, None, request_id, key

    def _ads(self, ads: Any) -> Ads | None:
        if type(ads) is np.ndarray:
            return ads if self._integers and 0 < len(ads) <= self._max_ads else None
        if type(ads) is not list or not 0 < len(ads) <= self._max_ads:
            return None
        kinds = set(map(type, ads))  # by type, because True is an int to isinstance
        if self._integers:
            try:
                return np.fromiter(ads, np.int64, len(ads)) if kinds == {int} else None
            except OverflowError:
                return None
        if kinds != {str} or not min(map(len, ads)) or max(map(len, ads)) > self._max_length:
            return None
        return tuple(ads)

    def _features(self, given: Any) -> dict[str, str | float | None] | None:
        if given is None:
            return self._unknown.copy()
        if type(given) is not dict:
            return None
        context = self._unknown.copy()
        for name, value in given.items():
            is_number = self._context.get(name)
            if is_number is None:
                return None
            if value is not None:
                kind = type(value)
                if is_number:
                    if kind is not float and kind is not int:
                        return None
                    value = float(value)
                    if not isfinite(value):
                        return None
                elif kind is not str:
                    return None
            context[name] = value
        return context

    def _names(self, value: Any) -> bool:
        return value is None or (type(value) is str and 0 < len(value) <= self._max_length)
