"""The skew check finds nothing where there is nothing, and every value that someone bent."""

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.tiny_market import AS_OF, TinyMarket, tiny_settings
from typer.testing import CliRunner

from driftline.features.store import materialize
from driftline.pipelines.cli import app
from driftline.pipelines.skew import SkewReport, check_skew, skew_text
from driftline.pipelines.skew_causes import CAUSES
from driftline.platform.bundle import Bundle
from driftline.platform.errors import MissingArtefactError
from driftline.platform.observation_settings import DecisionLogSettings
from driftline.platform.processes import free_port
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace
from driftline.serving.observing.decision_log import DecisionLog
from driftline.serving.service import BundleService
from driftline.serving.transport.wire import JsonForm


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    settings = tiny_settings(tmp_path_factory.mktemp("tiny"))
    log = DecisionLogSettings(sample_rate=1.0)
    serving = settings.serving.model_copy(update={"decision_log": log})
    return TinyMarket.make(settings.model_copy(update={"serving": serving}))


@pytest.fixture(scope="module")
def bundle(market: TinyMarket) -> Bundle:
    made = market.bundle(seed=1)
    market.promote(made)
    return made


@pytest.fixture
def empty_log(market: TinyMarket) -> Iterator[Path]:
    folder = Workspace.of(market.settings).decisions
    shutil.rmtree(folder, ignore_errors=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def serve(
    market: TinyMarket,
    *,
    every: int,
    fresh: bool,
    delay: timedelta = 0 * HOUR,
    store_is_away: bool = False,
) -> int:
    """Answer some requests of the hour after ``AS_OF``; gives the number of rows.

    Args:
        market: Its champion answers.
        every: Only each so-manieth request.
        fresh: Whether the features are brought up to date before each request.
        delay: So much later than the log says.
        store_is_away: Whether the online store is a Redis that does not run.
    """
    materialize(market.settings, as_of=AS_OF)
    settings, replica = market.settings, "r"
    if store_is_away:
        address = {"online": "redis", "redis_address": f"localhost:{free_port()}"}
        store = settings.store.model_copy(update=address)
        settings, replica = settings.model_copy(update={"store": store}), "away"
    log = DecisionLog(settings, replica=replica)
    service = BundleService(settings, observers=[log])
    service.look()
    form, num_rows = JsonForm(), 0
    for number, request in enumerate(market.requests(market.frame())[::every]):
        if fresh:
            materialize(market.settings, as_of=request.time)
            service.look()
        body = {
            "page_product_id": request.page,
            "ad_product_ids": request.ads,
            "context": request.context,
            "time": (request.time + delay).isoformat(),
            "request_id": f"{replica}-{number}",
        }
        service.sent(service.answer(orjson.dumps(body), form))
        num_rows += len(request.ads)
    log.close()
    return num_rows


def bend(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Alter the log on disk."""
    for path in folder.rglob("*.parquet"):
        pq.write_table(change(pq.read_table(path)), path)


def replaced(table: pa.Table, name: str, row: int, value: object) -> pa.Table:
    values = table.column(name).to_pylist()
    values[row] = value
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table[name].type))


def differing(report: SkewReport) -> dict[str, dict[str, int]]:
    found = {name: f.causes.items() for name, f in report.features.items() if f.causes}
    return {name: {str(cause): number for cause, number in items} for name, items in found.items()}


def test_fresh_features_agree_in_every_value_and_every_probability(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    num_rows = serve(market, every=6, fresh=True)

    report = check_skew(market.settings)

    assert report.num_decisions == report.num_in_log == report.probability.num_compared == num_rows
    assert num_rows >= 15
    assert len(report.features) > 30
    assert differing(report) == {}
    assert report.probability.num_different == report.num_unexplained == 0
    assert report.examples == ()
    assert json.loads(json.dumps(report.to_json())) == report.to_json()


def test_a_snapshot_behind_the_clock_explains_all_that_differs(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    num_rows = serve(market, every=1, fresh=False)

    report = check_skew(market.settings)

    assert report.num_decisions == num_rows
    assert report.num_unexplained == 0
    found = differing(report)
    # Sales of the hour before AS_OF become known 2 to 20 minutes after it; all else is settled.
    assert set(found) == {f"{a}__sales_{h}h" for a in ("page", "ad") for h in (1, 24)}
    assert {cause for causes in found.values() for cause in causes} == {"late_counter"}
    assert set(report.probability.causes) == {"late_counter"}
    assert 0 < report.probability.rate <= 1
    text = skew_text(report)
    assert "0 unexplained" in text
    assert "late_counter: " in text


def test_a_missed_materialisation_is_a_stale_snapshot(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    serve(market, every=5, fresh=False, delay=timedelta(hours=1))

    report = check_skew(market.settings)

    assert report.num_unexplained == 0
    found = differing(report)
    assert "stale_snapshot" in found["ad__impressions_1h"]
    assert "stale_snapshot" in report.probability.causes


def test_values_that_expired_since_the_snapshot_are_explained(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    serve(market, every=10, fresh=False, delay=timedelta(hours=2))

    report = check_skew(market.settings)

    expired = report.features["ad__impressions_1h"]
    assert expired.causes.get("stale_snapshot", 0) > 0
    assert report.num_unexplained == 0


def test_an_online_store_that_was_away_explains_what_was_not_served(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    num_here = serve(market, every=16, fresh=True)
    num_away = serve(market, every=10, fresh=False, store_is_away=True)

    report = check_skew(market.settings)

    assert report.num_decisions == num_here + num_away
    assert report.num_unexplained == 0
    found = differing(report)
    assert found["ad__category"] == found["page__text_id"] == {"store_unavailable": num_away}
    assert {cause for causes in found.values() for cause in causes} == {"store_unavailable"}
    assert set(report.probability.causes) == {"store_unavailable"}

    def change(table: pa.Table) -> pa.Table:
        return replaced(table, "served__ad__category", 0, "elsewhere")

    bend(empty_log / "2026-01-02T12", change)
    bent = differing(check_skew(market.settings))["ad__category"]
    assert bent == {"store_unavailable": num_away - 1, "unexplained": 2}


def test_a_bent_value_is_found_and_nothing_else(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    serve(market, every=16, fresh=True)
    name = "served__ad__hours_since_first"

    def change(table: pa.Table) -> pa.Table:
        row = int(np.flatnonzero(np.asarray(table[name].is_valid()))[0])
        return replaced(table, name, row, table[name][row].as_py() + 1)

    bend(empty_log, change)

    report = check_skew(market.settings)

    assert differing(report) == {"ad__hours_since_first": {"unexplained": 1}}
    assert report.num_unexplained == 1
    (example,) = report.examples
    assert (example.name, example.cause) == ("ad__hours_since_first", "unexplained")
    assert example.served == pytest.approx(example.offline + 1)


def test_a_bent_probability_is_found(market: TinyMarket, bundle: Bundle, empty_log: Path) -> None:
    serve(market, every=16, fresh=True)
    bend(empty_log, lambda t: replaced(t, "probability", 2, t["probability"][2].as_py() * 1.01))

    report = check_skew(market.settings)

    assert report.probability.causes == {"unexplained": 1}
    assert differing(report) == {}
    (example,) = report.examples
    assert (example.name, example.cause) == ("probability", "unexplained")
    assert example.served == pytest.approx(example.offline * 1.01, rel=1e-3)


def test_counters_of_another_category_are_blamed_on_the_category(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    serve(market, every=16, fresh=True)

    def change(table: pa.Table) -> pa.Table:
        table = replaced(table, "served__ad__category", 0, "elsewhere")
        counts = pc.add(table["served__ad_category__impressions_24h"], 5)
        return replaced(table, "served__ad_category__impressions_24h", 0, counts[0].as_py())

    bend(empty_log, change)

    report = check_skew(market.settings)

    assert differing(report) == {
        "ad__category": {"unexplained": 1},
        "ad_category__impressions_24h": {"different_category": 1},
    }


def test_a_sample_is_of_whole_requests_and_the_same_each_time(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    num_rows = serve(market, every=2, fresh=False)

    reports = [check_skew(market.settings, sample=20) for _ in range(2)]

    assert reports[0] == reports[1]
    assert 20 <= reports[0].num_decisions < 26
    assert reports[0].num_in_log == num_rows


def test_a_bundle_that_is_gone_is_said_and_its_features_still_compared(
    market: TinyMarket, bundle: Bundle, empty_log: Path
) -> None:
    num_rows = serve(market, every=20, fresh=True)
    gone = pa.array(["gone"] * num_rows)
    bend(
        empty_log,
        lambda t: t.set_column(t.schema.get_field_index("bundle"), t.schema.field("bundle"), gone),
    )

    report = check_skew(market.settings)

    assert (report.num_without_bundle, report.probability.num_compared) == (num_rows, 0)
    assert f"{num_rows} decisions of bundles that are gone" in skew_text(report)


def test_without_a_log_the_check_says_how_to_get_one(market: TinyMarket, empty_log: Path) -> None:
    with pytest.raises(
        MissingArtefactError, match=r"no decision; serving\.decision_log\.sample_rate"
    ):
        check_skew(market.settings)


def test_the_command_prints_what_the_check_found(
    market: TinyMarket, bundle: Bundle, empty_log: Path, tmp_path: Path
) -> None:
    serve(market, every=20, fresh=True)
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps(market.settings.model_dump(mode="json")))  # JSON is YAML

    text = CliRunner().invoke(app, ["skew", str(config), "--hours", "1"])
    found = CliRunner().invoke(app, ["skew", str(config), "--sample", "1", "--json"])

    assert text.exit_code == 0, text.output
    assert "0 unexplained" in text.stdout
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["num_unexplained"] == 0


def test_causes_are_ordered_from_harmless_to_worst() -> None:
    assert (CAUSES[0], CAUSES[-1]) == ("stale_snapshot", "unexplained")
