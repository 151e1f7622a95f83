"""A transfer set is checked, put in order of time, and told where it comes from."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from driftline.platform.errors import EmptyWindowError
from driftline.platform.transfer.sets import MadeRows, TransferRows, TransferSet, TransferSource
from driftline.platform.transfer.similarity import corpus_similarity, frame_words
from driftline.platform.transfer.texts import text_tokens, used_texts


def check_source(source: TransferSource) -> None:
    """Refuse what no set can be made from.

    Raises:
        EmptyWindowError: there is no row.
        ValueError: text ids do not ascend.
    """
    if source.frame.num_rows == 0:
        raise EmptyWindowError(
            "a transfer set needs rows to be made from, and there are none; take a longer window"
        )
    ids = source.texts["text_id"].to_numpy()
    if (np.diff(ids) <= 0).any():
        raise ValueError("texts of a transfer source must ascend by text_id; sort them")


def finished(
    kind: TransferSet, made: MadeRows, *, source: TransferSource, seed: int
) -> TransferRows:
    """The rows in order of time, with their provenance.

    Raises:
        EmptyWindowError: the set holds no row.
        ValueError: a kind of the user's own gave other columns than the source has.
        ContractError: a row points to a text that is not there.
    """
    if made.frame.num_rows == 0:
        raise EmptyWindowError(
            f"transfer set {kind.kind} holds no row of {source.frame.num_rows}; "
            "take a longer window or another choice"
        )
    if not made.frame.schema.equals(source.frame.schema):
        raise ValueError(
            f"transfer set {kind.kind} must keep the columns and types of the source's frame"
        )
    made = _in_order(made)
    provenance = {
        "kind": kind.kind,
        "settings": kind.model_dump(mode="json"),
        "seed": seed,
        "source": {"span": _span(source.frame), "num_rows": source.frame.num_rows},
        **_counts(made, source),
        "share_made_up": float(made.made_up.mean()),
        "similarity_to_source": _similarity(made, source),
        **made.notes,
        "content": content_hash(made),
    }
    return TransferRows(
        frame=made.frame,
        texts=made.texts,
        has_clicks=not made.made_up.any(),
        provenance=provenance,
        made_up=made.made_up,
    )


def content_hash(rows: MadeRows | TransferRows) -> str:
    """A hash of the rows and of the texts they point to, in hex."""
    digest = hashlib.sha256()
    used, _ = used_texts(rows.frame, rows.texts)
    for table in (rows.frame, used):
        digest.update(repr(table.column_names).encode())
        for column in table.columns:
            values = column.to_pandas()
            digest.update(pd.util.hash_pandas_object(values, index=False).to_numpy().tobytes())
    return digest.hexdigest()


def _in_order(made: MadeRows) -> MadeRows:
    times = made.frame["event_time"].cast(pa.int64()).to_numpy()
    if (np.diff(times) >= 0).all():
        return made
    keys = [("event_time", "ascending"), ("impression_id", "ascending")]
    order = pc.sort_indices(made.frame, sort_keys=keys)
    return replace(made, frame=made.frame.take(order), made_up=made.made_up[order.to_numpy()])


def _counts(made: MadeRows, source: TransferSource) -> Mapping[str, Any]:
    """Sizes as in the thesis' tables 5.1 and 5.4: a text counts once for each row it is in."""
    used, uses = used_texts(made.frame, made.texts)
    lengths = text_tokens(used, source.tokenizer).lengths
    names = [name for name in used.column_names if name != "text_id"]
    sizes = sum(
        (pc.fill_null(pc.binary_length(used[name]), 0).to_numpy() for name in names),
        start=np.zeros(used.num_rows, np.int64),
    )
    num_tokens = int(lengths @ uses)
    return {
        "num_rows": made.frame.num_rows,
        "num_texts": used.num_rows,
        "num_tokens": num_tokens,
        "mean_tokens": num_tokens / max(int(uses.sum()), 1),
        "text_bytes": int(np.dot(sizes, uses)),
    }


def _similarity(made: MadeRows, source: TransferSource) -> float | None:
    """Word similarity to the source's rows; None where there are no two words."""
    own, other = frame_words(made.frame, made.texts), frame_words(source.frame, source.texts)
    return corpus_similarity(own, other) if own and other and len(own | other) > 1 else None


def _span(frame: pa.Table) -> list[str]:
    ends = pc.min_max(frame["event_time"])
    return [ends[name].as_py().isoformat() for name in ("min", "max")]
