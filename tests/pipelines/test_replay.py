"""A replay scores every hour once, with models that cannot have seen it."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from driftline.features.frame_files import read_frames
from driftline.pipelines.replay import log_split, replay
from driftline.platform.bundle import Bundle
from driftline.platform.errors import SettingsError
from driftline.platform.scorer import Scorer
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window, parse_time
from driftline.platform.workspace import Workspace


@pytest.mark.slow
def test_a_replay_scores_each_hour_with_what_was_known_then(market: DriftlineSettings) -> None:
    result = replay(market)
    window = log_split(market).id.last(3 * HOUR)
    frame = read_frames(market, window)
    assert result.scores["impression_id"].to_pylist() == frame["impression_id"].to_pylist()
    policies = {"refreshed", "never", "arms_only", "mlp_never", "mlp_hourly", "lightgbm_hourly"}
    assert policies | {"oracle", "stale_1h"} <= set(result.scores.column_names)
    for policy in policies:
        values = result.scores[policy].to_numpy()
        assert np.isfinite(values).all()
        assert ((values >= 0) & (values <= 1)).all()
    for record in result.summary["refreshes"]:
        lineage = Bundle.open(Workspace.of(market).bundles / record["bundle"]).lineage
        assert parse_time(lineage["as_of"]) == parse_time(record["as_of"])
        assert parse_time(lineage["window"][1]) <= parse_time(record["as_of"])
    _never_column_is_the_first_bundle(market, window)
    _resumes(market, result.scores.num_rows)


def _never_column_is_the_first_bundle(settings: DriftlineSettings, window: Window) -> None:
    folder = Workspace.of(settings).reports / "replay" / "scores"
    last = sorted(folder.glob("*.parquet"))[-1]
    scores = pq.read_table(last)
    first = replay(settings).summary["refreshes"][0]["bundle"]
    frame = read_frames(settings, Window(window.end - HOUR, window.end))
    expected = Scorer.of(Bundle.open(Workspace.of(settings).bundles / first)).score(frame)
    np.testing.assert_allclose(scores["never"].to_numpy(), expected, atol=1e-9)


def _resumes(settings: DriftlineSettings, num_rows: int) -> None:
    """An hour that was lost is played again, the others are kept, and the result is the same."""
    folder = Workspace.of(settings).reports / "replay" / "scores"
    files = sorted(folder.glob("*.parquet"))
    before = pq.read_table(files[1])
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    again = replay(settings)
    assert again.scores.num_rows == num_rows
    assert files[0].stat().st_mtime_ns == kept
    assert pq.read_table(files[1])["refreshed"].equals(before["refreshed"])
    other = settings.model_copy(
        update={"replay": settings.replay.model_copy(update={"num_hours": 2})}
    )
    with pytest.raises(SettingsError, match="begun with other settings"):
        replay(other)


def test_the_oracle_is_joined_by_impression(market: DriftlineSettings, tmp_path: Path) -> None:
    oracle = pq.read_table(Workspace.of(market).log / "oracle")
    frame = read_frames(market, log_split(market).id)
    assert pc.all(pc.is_in(frame["impression_id"], value_set=oracle["impression_id"])).as_py()
