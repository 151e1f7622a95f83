"""Features are prepared for the log that is there, and once."""

from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tests.tiny_market import AS_OF, tiny_settings

from driftline.features.frame_files import read_frames
from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.pipelines.prepare import prepare_features
from driftline.platform.artefacts import read_json
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace


def check(settings: DriftlineSettings) -> dict[str, object]:
    """The verdict but for the content's hash."""
    workspace = Workspace.of(settings)
    check_log(workspace.log, workspace.clean, settings=settings, now=AS_OF + 1000 * HOUR)
    verdict: dict[str, object] = read_json(workspace.clean / "verdict.json")
    del verdict["content"]
    return verdict


def swap_ads(path: Path) -> datetime:
    """Let two impressions of one page have each other's ad; the moment of the first."""
    table = pq.read_table(path)
    pages, ads = (table[f"{role}_product_id"].to_pylist() for role in ("page", "ad"))
    first, second = next(
        (one, other)
        for one in range(len(ads))
        for other in range(one + 1, len(ads))
        if pages[one] == pages[other] and ads[one] != ads[other]
    )
    ads[first], ads[second] = ads[second], ads[first]
    place = table.column_names.index("ad_product_id")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, pa.array(ads, field.type)), path)
    moment: datetime = table["event_time"][first].as_py()
    return moment


def test_a_log_edited_in_one_place_is_prepared_anew_and_the_same_one_is_not(
    tmp_path: Path,
) -> None:
    settings = tiny_settings(tmp_path)
    workspace = Workspace.of(settings)
    stamp = workspace.features / "prepared.json"
    simulate(settings, workspace.log)
    verdict = check(settings)
    until = prepare_features(settings, as_of=AS_OF).end
    prepared = stamp.stat().st_mtime_ns

    assert check(settings) == verdict
    prepare_features(settings, as_of=AS_OF)
    assert stamp.stat().st_mtime_ns == prepared

    moment = swap_ads(workspace.log / "impressions" / "0000.parquet")
    hour = Window(moment.replace(minute=0, second=0, microsecond=0), until)
    before = read_frames(settings, hour)["ad_product_id"]
    assert check(settings) == verdict  # nothing that is counted has changed
    prepare_features(settings, as_of=AS_OF)
    assert stamp.stat().st_mtime_ns != prepared
    after = read_frames(settings, hour)["ad_product_id"]
    differing = sum(a != b for a, b in zip(before.to_pylist(), after.to_pylist(), strict=True))
    assert differing == 2
