"""Further outcomes beside the click travel with the impressions, and no model reads them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.tiny_market import AS_OF, tiny_settings

from driftline.features.frame_files import read_frames
from driftline.features.frame_keys import frame_keys
from driftline.features.log import ImpressionLog
from driftline.features.mind import check_columns as check_mind
from driftline.features.parquet_log import ingest_parquet
from driftline.features.quality import check_log
from driftline.features.scales import estimate_scales
from driftline.features.simulate import simulate
from driftline.pipelines.plan import make_plan
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.student import bundle_contract
from driftline.pipelines.teacher_input import teacher_columns
from driftline.pipelines.training_sets import with_outcome
from driftline.platform.artefacts import hash_files, hash_value, read_json
from driftline.platform.columns import head_columns
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings, ParquetSource
from driftline.platform.windows import HOUR, Window
from driftline.platform.workspace import Workspace

PURCHASED = {"name": "purchased", "kind": "label", "entity": "impression"}


def market_settings(
    workspace: Path, *, labels: tuple[dict[str, str], ...] = (PURCHASED,), **source: Any
) -> DriftlineSettings:
    plain = tiny_settings(workspace)
    features = [*plain.model_dump(mode="json")["features"], *labels]
    rates = {"purchase_rate": 0.3} if labels else {}
    return tiny_settings(
        workspace,
        source=plain.source.model_dump(mode="json") | rates | source,
        features=features,
    )


@pytest.fixture(scope="module")
def bought(tmp_path_factory: pytest.TempPathFactory) -> DriftlineSettings:
    """A market of two days with purchases, checked and joined."""
    settings = market_settings(tmp_path_factory.mktemp("bought") / "market")
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=AS_OF + 1000 * HOUR)
    prepare_features(settings)
    return settings


def impressions(settings: DriftlineSettings) -> pa.Table:
    return ImpressionLog.open(Workspace.of(settings).log, settings).impressions()


def test_purchases_change_nothing_else_in_a_log(bought: DriftlineSettings, tmp_path: Path) -> None:
    plain = market_settings(tmp_path / "plain", labels=())
    simulate(plain, Workspace.of(plain).log)
    assert impressions(bought).drop_columns(["purchased"]).equals(impressions(plain))
    others = {
        name: hash_
        for name, hash_ in hash_files(Workspace.of(plain).log).items()
        if name.split("/")[0] in ("catalogue", "counters", "oracle")
    }
    assert others.items() <= hash_files(Workspace.of(bought).log).items()


def test_a_purchase_follows_a_click_at_the_wanted_rate(bought: DriftlineSettings) -> None:
    rows = impressions(bought)
    clicked, purchased = rows["clicked"], rows["purchased"]
    assert pc.is_valid(purchased).equals(clicked)
    values = purchased.drop_null().to_numpy()
    assert set(values.tolist()) == {0.0, 1.0}
    spread = np.sqrt(0.3 * 0.7 / len(values))
    assert abs(values.mean() - 0.3) < 4 * spread


def test_purchases_drift_and_follow_what_a_click_is_worth(tmp_path: Path) -> None:
    """Advertisers differ in how often their clicks end in a purchase, and change places."""
    settings = market_settings(
        tmp_path / "long",
        num_days=12,
        impressions_per_day=20_000,
        click_rate=0.2,
        campaign_days=4,
    )
    simulate(settings, Workspace.of(settings).log)
    rows = impressions(settings)
    rows = rows.filter(rows["clicked"])
    log = ImpressionLog.open(Workspace.of(settings).log, settings)
    owner = dict(
        zip(*(log.catalogue()[n].to_pylist() for n in ("product_id", "advertiser")), strict=True)
    )
    owners = np.array([owner[i] for i in rows["ad_product_id"].to_pylist()])
    bought = rows["purchased"].to_numpy()
    day = np.arange(len(bought)) * 12 // len(bought)
    names = np.unique(owners)
    rates = np.array(
        [[bought[(owners == n) & (day // 3 == part)].mean() for n in names] for part in (0, 3)]
    )
    spread = np.sqrt(0.21 / 200)
    assert rates.std(axis=1).min() > 2 * spread
    assert np.abs(rates[1] - rates[0]).max() > 4 * spread


def test_a_label_reaches_the_frames_and_nothing_that_is_read(bought: DriftlineSettings) -> None:
    frame = read_frames(bought, Window(AS_OF, AS_OF + 3 * HOUR))
    assert frame.schema.field("purchased").type == pa.float32()
    at = impressions(bought)
    known = dict(zip(at["impression_id"].to_pylist(), at["purchased"].to_pylist(), strict=True))
    assert frame["purchased"].to_pylist() == [known[i] for i in frame["impression_id"].to_pylist()]
    assert "purchased" not in {column.name for column in head_columns(bought)}
    assert "purchased" not in bundle_contract(bought)["context"]
    assert "purchased" not in str(make_plan(bought))
    log = ImpressionLog.open(Workspace.of(bought).clean, bought)
    assert "purchased" not in {scale.name for scale in estimate_scales(log, bought).features}


def test_declaring_a_label_makes_frames_anew(bought: DriftlineSettings) -> None:
    log = ImpressionLog.open(Workspace.of(bought).clean, bought)
    plain = market_settings(bought.workspace, labels=())
    assert frame_keys(log, bought, hours=[AS_OF]) != frame_keys(log, plain, hours=[AS_OF])


def test_an_outcome_takes_the_place_of_the_click(bought: DriftlineSettings) -> None:
    frame = read_frames(bought, Window(AS_OF, AS_OF + 6 * HOUR))
    assert with_outcome(frame, None) is frame
    found = with_outcome(frame, "purchased")
    rows = [row for row in frame.to_pylist() if row["purchased"] is not None]
    assert found["impression_id"].to_pylist() == [row["impression_id"] for row in rows]
    assert found["clicked"].to_pylist() == [row["purchased"] for row in rows]
    assert found.column_names == frame.column_names
    with pytest.raises(SettingsError, match="'dwell' is no column of the log; declare it"):
        with_outcome(frame, "dwell")


def test_labels_outside_0_and_1_are_put_aside(bought: DriftlineSettings, tmp_path: Path) -> None:
    shutil.copytree(Workspace.of(bought).log, tmp_path / "log")
    path = sorted((tmp_path / "log" / "impressions").glob("*.parquet"))[0]
    table = pq.read_table(path)
    values = table["purchased"].to_pylist()
    values[:4] = [1.5, -0.1, 0.5, float("nan")]
    at = table.column_names.index("purchased")
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values)), path)
    verdict = check_log(
        tmp_path / "log", tmp_path / "clean", settings=bought, now=AS_OF + 1000 * HOUR
    )
    assert verdict.impressions.reasons == {
        "purchased is not finite": 1,
        "purchased outside [0, 1]": 2,
    }


def test_labels_of_a_log_of_ones_own_may_be_truths_or_numbers(
    bought: DriftlineSettings, tmp_path: Path
) -> None:
    rows = impressions(bought).slice(0, 6)
    at = rows.column_names.index("purchased")
    for name, column in (
        ("bool", pa.array([True, False, None, True, False, None])),
        ("int", pa.array([1, 0, None, 1, 0, None], pa.int8())),
    ):
        pq.write_table(rows.set_column(at, "bought", column), tmp_path / f"{name}.parquet")
        source = ParquetSource(
            kind="parquet",
            impressions=tmp_path / f"{name}.parquet",
            columns={"purchased": "bought"},
        )
        plain = [f for f in bought.features if f.entity == "impression"]
        settings = bought.model_copy(update={"source": source, "features": tuple(plain)})
        ingest_parquet(source, tmp_path / name, settings=settings)
        found = ImpressionLog.open(tmp_path / name, settings).impressions()
        assert found["purchased"].to_pylist() == [1.0, 0.0, None, 1.0, 0.0, None]


def test_an_impossible_label_is_refused_when_the_settings_are_read(tmp_path: Path) -> None:
    for change, message in (
        ({"entity": "product"}, "a label must have entity 'impression', got 'product'"),
        ({"tier": "long"}, "a label has no tier, got 'long'; leave it out"),
    ):
        with pytest.raises(SettingsError, match=message):
            market_settings(tmp_path, labels=(PURCHASED | change,))
    settings = market_settings(tmp_path)
    again = type(settings).model_validate(settings.model_dump(mode="json"))
    assert again == settings
    off = market_settings(tmp_path, purchase_rate=None)
    with pytest.raises(SettingsError, match=r"no purchased \(label.*where source.purchase_rate"):
        simulate(off, tmp_path / "log")
    with pytest.raises(SettingsError, match=r"MIND has no.* purchased \(label, impression\)"):
        check_mind(settings)
    chosen = settings.teacher.model_copy(update={"columns": ("purchased",)})
    with pytest.raises(SettingsError, match=r"teacher.columns: \['purchased'\] are no columns"):
        teacher_columns(settings.model_copy(update={"teacher": chosen}))


def test_an_oracle_without_purchases_keeps_its_hash(tmp_path: Path) -> None:
    """The hash of a log from before there were purchases: its settings have no such key."""
    settings = market_settings(tmp_path, labels=())
    simulate(settings, tmp_path / "log")
    raw = settings.model_dump(mode="json")
    described = {name: raw[name] for name in ("seed", "source", "features")}
    del described["source"]["purchase_rate"]
    assert read_json(tmp_path / "log" / "oracle.json")["settings_hash"] == hash_value(described)
