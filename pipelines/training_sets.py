"""From frames to the memory-mapped example files that the training stages read."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from driftline.features.frame_files import read_frames
from driftline.features.log import ImpressionLog
from driftline.platform.columns import PRODUCT_ALIASES, TEXT_ID_COLUMNS
from driftline.platform.contract import TIME
from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.examples import PairRows, write_pairs
from driftline.platform.sampling import part_mask, thinned, unit_hash
from driftline.platform.settings import DriftlineSettings
from driftline.platform.tabular import TabularEncoder
from driftline.platform.windows import Window
from driftline.platform.workspace import Workspace


@dataclass(frozen=True)
class TrainingRows:
    """The rows of one stage: training thinned, validation on the natural click rate."""

    train: pa.Table
    validation: pa.Table


def known_frame(
    settings: DriftlineSettings,
    window: Window,
    *,
    as_of: datetime,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Rows of the window whose outcome was known at ``as_of``, in order of time."""
    newest = as_of - settings.labels.maturity
    span = ImpressionLog.open(Workspace.of(settings).clean, settings).span
    start = max(window.start, span.start)
    end = max(start, min(window.end, newest, span.end))
    frame = read_frames(settings, Window(start, end), columns=columns)
    return frame.filter(pc.less_equal(frame["event_time"], pa.scalar(newest, TIME)))


def replayed_frame(
    settings: DriftlineSettings, window: Window, *, as_of: datetime, replay_share: float
) -> pa.Table:
    """Known rows of a window, and older ones drawn by chance so that nothing is forgotten.

    Args:
        settings: ``student.head_refresh.replay_hours`` says how far back the older rows may lie.
        window: The newest rows.
        as_of: What is known; also seeds the draw.
        replay_share: Older rows for each row of the window.
    """
    recent = known_frame(settings, window, as_of=as_of)
    reach = timedelta(hours=settings.student.head_refresh.replay_hours)
    log_start = ImpressionLog.open(Workspace.of(settings).clean, settings).span.start
    before = Window(min(window.start, max(log_start, window.start - reach)), window.start)
    if replay_share == 0 or before.num_hours == 0:
        return recent
    older = known_frame(settings, before, as_of=as_of)
    wanted = round(replay_share * recent.num_rows)
    generator = np.random.default_rng([settings.seed, int(as_of.timestamp())])
    chosen = np.sort(generator.permutation(older.num_rows)[:wanted])
    return pa.concat_tables([older.take(pa.array(chosen)), recent])


def split_rows(
    settings: DriftlineSettings,
    frame: pa.Table,
    *,
    max_rows: int | None = None,
    keep_rate: float | None = None,
) -> TrainingRows:
    """Split by request into train (thinned, newest ``max_rows``) and validation.

    Args:
        settings: Shares of the parts; how negatives are thinned.
        frame: Rows in order of time.
        max_rows: Upper limit of training rows.
        keep_rate: Share of non-clicks to keep; ``labels.negative_keep_rate`` when not given.

    Raises:
        EmptyWindowError: nothing to train on, or only one outcome.
    """
    train = frame.filter(part_mask(frame, "train", split=settings.split))
    keep_rate = keep_rate or settings.labels.negative_keep_rate
    train = train.filter(thinned(train, keep_rate=keep_rate, seed=settings.seed))
    train = newest(train, max_rows)
    if len(np.unique(clicks(train))) < 2:
        raise EmptyWindowError(
            f"training needs clicks and non-clicks, got {train.num_rows} rows of one outcome; "
            "take a longer window or more data"
        )
    validation = frame.filter(part_mask(frame, "validation", split=settings.split))
    return TrainingRows(train, validation)


def newest(frame: pa.Table, max_rows: int | None) -> pa.Table:
    """The last ``max_rows`` rows; all when not given."""
    return frame if max_rows is None else frame.slice(max(0, frame.num_rows - max_rows))


def text_rows(frame: pa.Table, text_ids: NDArray[np.int64]) -> NDArray[np.int32]:
    """Row of the page's and the ad's text among ascending ``text_ids``; -1 none. ``[B, 2]``."""
    rows = np.full((frame.num_rows, 2), -1, np.int32)
    for role, column in enumerate(TEXT_ID_COLUMNS):
        wanted = pc.fill_null(frame[column], 0).to_numpy()
        if len(text_ids):
            at = np.minimum(np.searchsorted(text_ids, wanted), len(text_ids) - 1)
            rows[:, role] = np.where(text_ids[at] == wanted, at, -1)
    return rows


def write_pair_examples(
    destination: Path,
    frame: pa.Table,
    *,
    tabular: TabularEncoder,
    text_ids: NDArray[np.int64],
    teacher_logits: NDArray[np.float32] | None = None,
    teacher_rows: NDArray[np.int64] | None = None,
    product_buckets: int | None = None,
) -> Path:
    """Write the examples of a student: text rows, categories, numbers, label, soft label.

    Args:
        destination: File to write.
        frame: Rows in order of time.
        tabular: Gives categories and numbers.
        text_ids: Ascending ids of the texts or vectors that ``page_text`` and ``ad_text`` index.
        teacher_logits: Soft labels. ``[B, 2]``.
        teacher_rows: Rows of the teacher's features, -1 for none. ``[B]``.
        product_buckets: Also hash both products into so many buckets, for the baseline.
    """
    rows = text_rows(frame, text_ids)
    categories, numbers = tabular.encode(frame)
    hashed = {
        f"{role}_id_hash": (
            unit_hash(frame[f"{role}_product_id"], salt="bucket") * product_buckets
        ).astype(np.int32)
        for role in PRODUCT_ALIASES
        if product_buckets is not None
    }
    examples = PairRows(
        page_text=np.ascontiguousarray(rows[:, 0]),
        ad_text=np.ascontiguousarray(rows[:, 1]),
        categories=categories,
        numbers=numbers,
        clicked=clicks(frame),
        teacher_logits=teacher_logits,
        teacher_rows=teacher_rows,
        **hashed,
    )
    write_pairs(destination, examples)
    return destination


def with_outcome(frame: pa.Table, label: str | None) -> pa.Table:
    """The rows whose label is known, with that label in the place of the click.

    So whatever is made for clicks (thinning, teacher, soft labels, examples) serves other outcomes.

    Args:
        frame: Rows.
        label: A feature of kind ``label``; the click when not given.

    Raises:
        SettingsError: the frame has no such label.
    """
    if label is None:
        return frame
    if label not in frame.column_names:
        raise SettingsError(
            f"label {label!r} is no column of the log; declare it in `features:` with kind: label "
            "and entity: impression"
        )
    known = frame.filter(pc.is_valid(frame[label]))
    place = known.column_names.index("clicked")
    return known.set_column(place, "clicked", known[label])


def clicks(frame: pa.Table) -> NDArray[np.float32]:
    """Labels as floats. ``[B]``."""
    return np.asarray(frame["clicked"].to_numpy(), np.float32)
