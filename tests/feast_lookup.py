"""The slow and obvious online read: Feast's own, to compare ours with."""

from typing import Any

import numpy as np
import pyarrow as pa
from feast import FeatureStore

from driftline.features.feast_plugins.arranged import code_strings
from driftline.features.feast_plugins.keys import Keys
from driftline.features.online_views import Found, ViewTable, Wanted
from driftline.features.views import NO_TEXT, TEXT_ID


def feast_lookup(wanted: Wanted, keys: Keys, *, store: FeatureStore) -> Found:
    """A table of the requested keys alone, by ``get_online_features``: any store, milliseconds."""
    keys = keys.tolist() if isinstance(keys, np.ndarray) else list(keys)
    names = [*wanted.numbers, *wanted.categories, *((TEXT_ID,) if wanted.text_id else ())]
    present = np.array([key is not None for key in keys], bool)
    found: dict[str, list[Any]] = {name: [None] * len(keys) for name in names}
    event_us = np.zeros(len(keys), np.int64)
    known = np.zeros(len(keys), bool)
    rows = np.flatnonzero(present).tolist()
    if rows and names:
        response = store.get_online_features(
            features=[f"{wanted.view.name}:{name}" for name in names],
            entity_rows=[{wanted.view.join_key: keys[row]} for row in rows],
        ).proto
        # Stores disagree on what they report as present; a row of theirs has an event time.
        for name, result in zip(response.metadata.feature_names.val, response.results, strict=True):
            if name not in found:
                continue
            for row, value, moment in zip(
                rows, result.values, result.event_timestamps, strict=True
            ):
                micros = moment.ToMicroseconds()
                if micros > 0:
                    known[row], event_us[row] = True, micros
                    kind = value.WhichOneof("val")
                    found[name][row] = None if kind is None else getattr(value, kind)
    numbers = np.full((len(keys) + 1, len(wanted.numbers)), np.nan, np.float32)
    for place, name in enumerate(wanted.numbers):
        numbers[:-1, place] = [np.nan if value is None else value for value in found[name]]
    ids = [NO_TEXT if value is None else value for value in found.get(TEXT_ID, [])]
    table = ViewTable(
        event_us=np.append(event_us, 0),
        numbers=numbers,
        categories={
            name: code_strings(pa.chunked_array([pa.array(found[name], pa.string())]))
            for name in wanted.categories
        },
        text_id=np.array([*ids, NO_TEXT], np.int64) if wanted.text_id else None,
    )
    return Found(table, np.where(known, np.arange(len(keys)), -1))
