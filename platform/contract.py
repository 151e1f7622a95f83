"""The data contract: three tables, one named Arrow schema each.

Keys (``*_product_id``) are strings or 64-bit integers, the same type in all tables of a log.
Times are UTC microseconds. See the design for what each table means.
"""

from typing import Final

import pyarrow as pa

from driftline.platform.settings import DriftlineSettings

TIME: Final = pa.timestamp("us", tz="UTC")

ARROW_TYPES: Final = {
    "text": pa.string(),
    "categorical": pa.string(),
    "numeric": pa.float64(),
    "label": pa.float64(),
}

OPTIONAL_IMPRESSION_FIELDS: Final = (
    pa.field("request_id", pa.string()),  # groups the ads shown together; the bootstrap unit
    pa.field("position", pa.int32()),
    pa.field("propensity", pa.float64()),
)


def impressions_schema(settings: DriftlineSettings, *, key: pa.DataType) -> pa.Schema:
    """One ad shown on one page. ``impression_id`` is unique; ``click_time`` may be null.

    A clicked row without ``click_time`` counts as clicked at an unknown moment before its label
    matures. Categorical values are strings; a null means "not known". Labels lie in [0, 1].
    """
    return pa.schema(
        [
            pa.field("impression_id", pa.string(), nullable=False),
            pa.field("event_time", TIME, nullable=False),
            pa.field("page_product_id", key, nullable=False),
            pa.field("ad_product_id", key, nullable=False),
            *(
                pa.field(feature.name, ARROW_TYPES[feature.kind])
                for feature in (
                    *settings.select(entity="impression"),
                    *settings.select(kind="label"),
                )
            ),
            pa.field("clicked", pa.bool_(), nullable=False),
            pa.field("click_time", TIME),
            *OPTIONAL_IMPRESSION_FIELDS,
        ]
    )


def catalogue_schema(settings: DriftlineSettings, *, key: pa.DataType) -> pa.Schema:
    """One version of one product: its text and categories from ``event_time`` on."""
    return pa.schema(
        [
            pa.field("product_id", key, nullable=False),
            pa.field("event_time", TIME, nullable=False),
            *(
                pa.field(feature.name, pa.string())
                for feature in settings.select(entity="product")
                if feature.kind != "numeric"
            ),
        ]
    )


def counters_schema(settings: DriftlineSettings, *, key: pa.DataType) -> pa.Schema:
    """One product-hour of the user's own numbers; ``created_time`` is when it became known."""
    return pa.schema(
        [
            pa.field("product_id", key, nullable=False),
            pa.field("event_time", TIME, nullable=False),
            pa.field("created_time", TIME, nullable=False),
            *(
                pa.field(feature.name, pa.float64())
                for feature in settings.select(kind="numeric", entity="product")
            ),
        ]
    )
