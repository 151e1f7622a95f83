"""One market at one moment: which rows and texts are known, and the slices that come after."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from driftline.features.frame_files import KEY, frame_path
from driftline.features.log import ImpressionLog
from driftline.features.texts import known_texts
from driftline.pipelines.laboratory_rows import Source, TextSet
from driftline.pipelines.provenance import NOT_MODEL_SETTINGS
from driftline.pipelines.student import student_tokenizer
from driftline.pipelines.training_sets import TrainingRows, clicks, known_frame, newest, split_rows
from driftline.platform.artefacts import hash_value
from driftline.platform.columns import head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.sampling import part_mask, request_keys, unit_hash
from driftline.platform.settings import DriftlineSettings
from driftline.platform.tabular import TabularEncoder
from driftline.platform.text import Tokenizer
from driftline.platform.windows import HOUR, Window, floor_time, format_time
from driftline.platform.workspace import Workspace

FORMAT: Final = 2  # raise when the same settings would give other rows
MAX_VALIDATION_ROWS: Final = 5_000
MAX_TEST_ROWS: Final = 50_000


@dataclass
class MarketMoment:
    """Rows and texts of a market as they are known at a moment; read when first asked for.

    OOD rows come from the stale window, parted by request: train, validation, and the gate's part
    as test, which nobody trains on. ID rows come from the newest hours before ``as_of``. The *next
    slices* come after it: no student may know them.

    Everything that rows decide follows ``settings.seed``.
    """

    settings: DriftlineSettings
    as_of: datetime
    slice_hours: float

    # --- rows -----------------------------------------------------------------------------

    @cached_property
    def ood_window(self) -> Window:
        """The stale part of the log, as far as it is known."""
        split = ImpressionLog.open(Workspace.of(self.settings).clean, self.settings).split
        return Window(split.ood.start, min(split.ood.end, self.as_of))

    @cached_property
    def id_window(self) -> Window:
        """The newest ``window_hours`` before ``as_of``."""
        length = timedelta(hours=self.settings.student.arms_refresh.window_hours)
        return Window(self.ood_window.start, self.as_of).last(length)

    @cached_property
    def ood_frame(self) -> pa.Table:
        """All known rows of the stale window."""
        return known_frame(self.settings, self.ood_window, as_of=self.as_of)

    @cached_property
    def id_frame(self) -> pa.Table:
        """All known rows of the recent window."""
        return known_frame(self.settings, self.id_window, as_of=self.as_of)

    @cached_property
    def ood(self) -> TrainingRows:
        """Stale rows: training thinned, validation natural."""
        return _bounded(split_rows(self.settings, self.ood_frame))

    @cached_property
    def id(self) -> TrainingRows:
        """Recent rows: training thinned, validation natural."""
        return _bounded(split_rows(self.settings, self.id_frame))

    def training_rows(self, source: Source) -> TrainingRows:
        """Rows to learn from, by name."""
        return self.ood if source == "ood" else self.id

    @cached_property
    def ood_test(self) -> pa.Table:
        """Stale rows on the natural click rate that neither teacher nor student has seen."""
        frame = self.ood_frame
        return _sampled(frame.filter(part_mask(frame, "gate", split=self.settings.split)))

    def next_window(self, number: int = 0) -> Window:
        """The window of a test slice: 0 begins at ``as_of``, 1 where 0 ends."""
        length = timedelta(hours=self.slice_hours)
        start = self.as_of + number * length
        return Window(start, start + length)

    def next_slice(self, number: int = 0) -> pa.Table:
        """Rows after ``as_of`` on the natural click rate, each outcome known (papers.md S0.24)."""
        window = self.next_window(number)
        known_at = window.end + self.settings.labels.maturity
        return _sampled(known_frame(self.settings, window, as_of=known_at))

    def check_judges(self, *, num_slices: int) -> None:
        """Make sure that students can be ranked on the rows that will judge them.

        Args:
            num_slices: How many slices after ``as_of`` judge, beside the stale test rows.

        Raises:
            SettingsError: such rows lack a click or a non-click, so no AUC exists.
        """
        share = "split.gate_share"
        self._check_judge(self.ood_test, f"the stale test rows of {self.ood_window}", share)
        for number in range(num_slices):
            longer = "slice_hours of a search, test_hours of a study, or take another as_of"
            name = f"test slice {number + 1}, {self.next_window(number)},"
            self._check_judge(self.next_slice(number), name, longer)

    def _check_judge(self, frame: pa.Table, name: str, raised: str) -> None:
        num_clicks = int(clicks(frame).sum())
        if not 0 < num_clicks < frame.num_rows:
            raise SettingsError(
                f"students are compared by AUC, which needs a click and a non-click, but {name} "
                f"holds {frame.num_rows} rows with {num_clicks} clicks; raise {raised}"
            )

    @cached_property
    def tabular(self) -> TabularEncoder:
        """Categories and scales of all recent training rows, however few a strategy may use.

        So it is the same for every strategy, and strategies that begin alike share their stages.
        """
        return TabularEncoder.fit(
            self.id.train,
            head_columns(self.settings),
            num_bins=self.settings.student.head.num_bins,
        )

    # --- texts ----------------------------------------------------------------------------

    @property
    def has_text(self) -> bool:
        """Without text there are no arms, only a head."""
        return bool(self.settings.select(kind="text"))

    @cached_property
    def texts(self) -> TextSet:
        """All texts known at ``as_of``."""
        return TextSet(self.key("texts"), lambda: known_texts(self.settings, as_of=self.as_of))

    @cached_property
    def test_texts(self) -> TextSet:
        """Texts up to the end of both test slices; a product is read as it is when it is shown."""
        end = self.next_window(1).end
        key = self.key("texts", format_time(end), self._content(Window(self.as_of, end)))
        return TextSet(key, lambda: known_texts(self.settings, as_of=end))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The student's."""
        return student_tokenizer(self.settings)

    # --- names ----------------------------------------------------------------------------

    def key(self, *parts: object) -> str:
        """A name for what these parts decide, with the rows and settings of this market."""
        return hash_value([self._base, *parts])

    @cached_property
    def _base(self) -> str:
        """Everything that decides rows, texts and scales; strategies and addresses do not.

        The log's content counts up to ``as_of``: a log that grows keeps the names of what was made.
        """
        left_out: dict[str, Any] = dict.fromkeys(NOT_MODEL_SETTINGS, True)
        shaping = self.settings.model_dump(
            mode="json", exclude=left_out | {"student": {"arms_refresh", "head_refresh"}}
        )
        window_hours = self.settings.student.arms_refresh.window_hours
        decided = (window_hours, str(self.ood_window), format_time(self.as_of))
        content = self._content(Window(self.ood_window.start, self.as_of))
        return hash_value([FORMAT, shaping, decided, content])

    def _content(self, window: Window) -> list[str]:
        """Hash of impressions, features and texts known in each hour: the keys of the frames."""
        hours = (floor_time(hour.start, HOUR) for hour in window.hours())
        return [_content_key(frame_path(self.settings, hour)) for hour in hours]


def default_moment(settings: DriftlineSettings, *, slice_hours: float, num_slices: int) -> datetime:
    """The last full hour after which the log still holds so many test slices.

    Between the stale part and that moment there must be recent rows to learn from: as many hours
    as a slice has, or the strategies' whole window where that is shorter; and in any case an hour
    whose outcomes are known. Otherwise rows called recent would be stale ones.

    Raises:
        SettingsError: there are too few.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    ood_end = log.split.ood.end
    moment = floor_time(log.span.end - timedelta(hours=slice_hours * num_slices), HOUR)
    needed = _recent_hours(settings, slice_hours)
    if (moment - ood_end) / HOUR < needed:
        recent = int((log.span.end - ood_end) / HOUR)
        fitting = [
            hours
            for hours in range(1, recent)
            if num_slices * hours + _recent_hours(settings, hours) <= recent
        ]
        smaller = f"set slice_hours to at most {fitting[-1]}, or " if fitting else ""
        raise SettingsError(
            f"the recent part of the log has {recent} h ({log.split.id}), which must hold "
            f"{num_slices} test slices of {slice_hours:g} h (slice_hours of a search, test_hours "
            f"of a study) and before them {needed:g} h of recent rows to learn from; {smaller}take "
            "a smaller split.ood_share (with a new teacher) or a longer log"
        )
    return moment


def check_recent_rows(settings: DriftlineSettings, as_of: datetime, *, slice_hours: float) -> None:
    """Ask of a chosen moment what ``default_moment`` gives: recent rows to learn from before it.

    Raises:
        SettingsError: there are too few.
    """
    log = ImpressionLog.open(Workspace.of(settings).clean, settings)
    start, needed = log.split.ood.end, _recent_hours(settings, slice_hours)
    recent = max(0.0, (as_of - start) / HOUR)
    if recent < needed:
        raise SettingsError(
            f"as_of {format_time(as_of)} leaves {recent:g} h of recent rows to learn from after "
            f"{format_time(start)}, where the stale part ends, and must leave {needed:g} h; set "
            f"as_of to {format_time(start + needed * HOUR)} or later, or take a smaller slice_hours"
        )


def _recent_hours(settings: DriftlineSettings, slice_hours: float) -> float:
    """Length of what must lie between the stale part and the first test slice."""
    known = (settings.labels.maturity + HOUR) / HOUR
    return max(min(slice_hours, settings.student.arms_refresh.window_hours), known)


def _bounded(rows: TrainingRows) -> TrainingRows:
    return replace(rows, validation=newest(rows.validation, MAX_VALIDATION_ROWS))


def _sampled(frame: pa.Table) -> pa.Table:
    """At most about ``MAX_TEST_ROWS``: requests drawn by hash, whole."""
    if frame.num_rows <= MAX_TEST_ROWS:
        return frame
    position = unit_hash(request_keys(frame), salt="driftline-test")
    return frame.filter(pa.array(position < MAX_TEST_ROWS / frame.num_rows))


def _content_key(path: Path) -> str:
    """Key of an hour's frame, read again only when the file changed; empty without a frame."""
    if not path.exists():
        return ""
    status = path.stat()
    return _stored_key(path, status.st_mtime_ns, status.st_size)


@cache
def _stored_key(path: Path, mtime_ns: int, size: int) -> str:
    return (pq.read_schema(path).metadata or {}).get(KEY, b"").decode()
