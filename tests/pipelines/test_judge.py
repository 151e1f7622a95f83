import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from driftline.pipelines.gate_page import write_gate_page
from driftline.pipelines.judge import judge
from driftline.pipelines.verdict import GateVerdict, verdict_json
from driftline.platform.metrics import FloatArray, roc_auc, sigmoid
from driftline.platform.settings import GateSettings
from driftline.platform.windows import Window

SLICE = Window(datetime(2026, 1, 5, 3, tzinfo=UTC), datetime(2026, 1, 5, 9, tzinfo=UTC))
SOUND: dict[str, bool | float] = {
    "loads": True,
    "answers": True,
    "finite": True,
    "milliseconds": 0.4,
}


class Market:
    """Requests of eight ads with known click probabilities."""

    def __init__(self, *, num_requests: int = 700, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.groups: NDArray[np.int_] = np.repeat(np.arange(num_requests), 8)
        self.logits: FloatArray = rng.normal(-3, 1.2, len(self.groups))
        self.labels = rng.random(len(self.groups)) < sigmoid(self.logits)
        self.noise: FloatArray = rng.normal(0, 1, len(self.groups))

    def predict(self, *, noise: float, shift: float = 0.0) -> FloatArray:
        return sigmoid(self.logits + noise * self.noise + shift)

    def judge(
        self, champion: FloatArray | None, challenger: FloatArray, **more: Any
    ) -> GateVerdict:
        arguments: dict[str, Any] = {
            "groups": self.groups,
            "slices": {},
            "mechanical": SOUND,
            "settings": GateSettings(),
            "seed": 0,
            "window": SLICE,
        }
        return judge(self.labels, champion=champion, challenger=challenger, **arguments | more)


@pytest.fixture(scope="module")
def market() -> Market:
    return Market()


def test_an_equal_challenger_is_promoted(market: Market) -> None:
    same = market.predict(noise=0.3)
    verdict = market.judge(same, same)
    assert verdict.promote
    assert verdict.reasons[0].startswith("AUC rose by 0.0000 [0.0000, 0.0000], a fall of 0.0100")
    assert verdict.reasons[-1] == "all mechanical checks held"


def test_a_clear_fall_of_auc_is_refused_with_numbers_and_slice(market: Market) -> None:
    champion, challenger = market.predict(noise=0.1), market.predict(noise=1.5)
    verdict = market.judge(champion, challenger)
    assert not verdict.promote
    fall = roc_auc(market.labels, champion) - roc_auc(market.labels, challenger)
    clicks = int(market.labels.sum())
    reason = verdict.reasons[0]
    assert reason.startswith(f"AUC fell by {fall:.4f} [")
    assert ", more than the 0.0100 allowed; " in reason
    where = f"slice 2026-01-05T03:00Z..09:00Z, 5,600 rows, {clicks} clicks"
    assert reason.endswith(where)


def test_a_fall_that_may_be_chance_is_promoted_and_said() -> None:
    market = Market(num_requests=60)
    champion, challenger = market.predict(noise=0.0), market.predict(noise=0.9)
    verdict = market.judge(champion, challenger)
    difference = verdict.figures["auc_difference"]
    assert difference is not None
    assert difference < -0.01
    assert verdict.promote
    assert "but not surely more than the 0.0100 allowed" in verdict.reasons[0]


def test_probabilities_that_are_much_too_high_are_refused(market: Market) -> None:
    champion, challenger = market.predict(noise=0.1), market.predict(noise=0.1, shift=1.2)
    verdict = market.judge(champion, challenger)
    assert not verdict.promote
    assert any(reason.startswith("normalised entropy rose by") for reason in verdict.reasons)
    assert any("clicks predicted per click" in reason for reason in verdict.reasons)


def test_of_two_miscalibrated_models_the_nearer_one_serves(market: Market) -> None:
    far, near = market.predict(noise=0.1, shift=1.6), market.predict(noise=0.1, shift=1.2)
    promoted = market.judge(far, near)
    assert promoted.promote
    assert any("nearer to 1 than the champion's" in reason for reason in promoted.reasons)
    assert not market.judge(near, far).promote


def test_without_a_champion_only_mechanics_count_and_calibration_is_reported(
    market: Market,
) -> None:
    fine = market.judge(None, market.predict(noise=0))
    assert fine.promote
    assert fine.reasons[0] == "there is no champion to compare with"
    high = market.judge(None, market.predict(noise=0, shift=2))
    assert high.promote
    (calibration,) = [check for check in high.checks if check.name == "calibration"]
    assert calibration.outcome == "not judged"
    assert "0.60 to 1.60 are allowed" in calibration.sentence
    broken = market.judge(None, market.predict(noise=0), mechanical={"loads": False})
    assert not broken.promote


@pytest.mark.parametrize("num_requests", [0, 3, 24])
def test_too_small_a_slice_promotes_by_default_and_says_so(num_requests: int) -> None:
    market = Market(num_requests=num_requests)
    awful = 1 - market.predict(noise=0)
    verdict = market.judge(market.predict(noise=0), awful)
    assert verdict.promote
    assert verdict.reasons[0].startswith("not enough evidence to refuse: slice 2026-01-05")
    assert "200 rows and 5 clicks are needed to judge" in verdict.reasons[0]
    assert verdict.reasons[1].startswith("promoted by default")


@pytest.mark.parametrize(
    ("mechanical", "reason"),
    [
        ({"loads": False}, "check 'loads' failed"),
        ({"milliseconds": 81.25}, "scoring 100 ads took 81.25 ms, more than the 50 ms allowed"),
        ({"milliseconds": float("nan")}, "scoring 100 ads took nan ms, more than"),
    ],
)
def test_a_failed_mechanical_check_refuses_whatever_the_figures(
    market: Market, mechanical: dict[str, bool | float], reason: str
) -> None:
    better = market.judge(
        market.predict(noise=1), market.predict(noise=0), mechanical=SOUND | mechanical
    )
    assert not better.promote
    assert better.reasons[0].startswith(reason)


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), 1.5, -0.1])
def test_predictions_that_are_no_probabilities_are_refused(market: Market, nonsense: float) -> None:
    challenger = market.predict(noise=0)
    challenger[7] = nonsense
    verdict = market.judge(market.predict(noise=0), challenger)
    assert not verdict.promote
    assert verdict.reasons == ("1 of 5,600 predictions are not between 0 and 1",)


def test_a_champion_that_answers_nonsense_is_no_standard(market: Market) -> None:
    broken = np.full(len(market.labels), np.nan)
    verdict = market.judge(broken, market.predict(noise=0))
    assert verdict.promote
    assert not verdict.has_champion


def test_a_challenger_that_always_says_zero_is_refused(market: Market) -> None:
    verdict = market.judge(market.predict(noise=0), np.zeros(len(market.labels)))
    assert not verdict.promote


def test_a_slice_of_clicks_alone_cannot_be_compared_and_is_not_refused(market: Market) -> None:
    settings = GateSettings(calibration_range=(0.001, 1.6))
    everyone = replace_labels(market)
    p = everyone.predict(noise=0)
    verdict = everyone.judge(p, p, settings=settings)
    assert verdict.promote
    assert verdict.reasons[0].startswith("AUC cannot be compared: too few clicks or non-clicks")


def replace_labels(market: Market) -> Market:
    copy = Market()
    copy.labels = np.ones(len(market.labels), dtype=bool)
    return copy


def test_slices_are_reported_and_do_not_decide(market: Market) -> None:
    new = market.groups < 30
    champion = market.predict(noise=0.2)
    challenger = np.where(new, 1 - champion, champion)
    settings = GateSettings(max_auc_drop=0.3, max_ne_rise=5, calibration_range=(0.1, 10))
    empty = np.zeros(len(new), dtype=bool)
    slices = {"new items": new, "tail": empty}
    verdict = market.judge(champion, challenger, slices=slices, settings=settings)
    (part,) = verdict.slices
    assert verdict.promote
    assert (part.name, part.num_rows) == ("new items", 240)
    assert part.num_clicks == int(market.labels[new].sum())
    assert part.auc_difference is not None
    assert part.auc_difference.high < 0
    assert part.auc_challenger == pytest.approx(roc_auc(market.labels[new], challenger[new]))


def test_the_same_seed_gives_the_same_verdict(market: Market) -> None:
    champion, challenger = market.predict(noise=0.2), market.predict(noise=0.4)
    once, again = (verdict_json(market.judge(champion, challenger)) for _ in range(2))
    assert once == again


def test_rows_are_the_unit_when_there_are_no_requests(market: Market) -> None:
    p = market.predict(noise=0.2)
    assert market.judge(p, p, groups=None).promote


def test_the_page_explains_itself_and_stands_alone(market: Market, tmp_path: Path) -> None:
    champion, challenger = market.predict(noise=0.1), market.predict(noise=1.5)
    slices = {"new <items>": market.groups < 30}
    verdict = market.judge(champion, challenger, slices=slices)
    page = write_gate_page(
        verdict, tmp_path / "gate" / "aa11.html", title="head refresh"
    ).read_text()
    assert "head refresh" in page
    assert "The challenger was refused" in page
    assert verdict.reasons[0] in page
    assert "new &lt;items&gt;" in page
    assert "http" not in page
    assert "<script" not in page
    assert len(page) < 20_000
    beside = json.loads((tmp_path / "gate" / "verdicts" / "aa11.json").read_text())
    assert beside == json.loads(json.dumps(verdict_json(verdict)))
    assert beside["promote"] is False


def test_the_page_of_a_first_or_unjudged_bundle_has_no_gaps(tmp_path: Path) -> None:
    few = Market(num_requests=0)
    page = write_gate_page(few.judge(None, few.predict(noise=0)), tmp_path / "first.html")
    assert "The challenger was promoted" in page.read_text()
    assert "nan" not in page.read_text().lower().replace("finance", "")
    assert "NaN" not in (tmp_path / "verdicts" / "first.json").read_text()


def test_the_window_is_shortened_only_within_a_day(market: Market) -> None:
    night = replace(SLICE, start=datetime(2026, 1, 4, 21, tzinfo=UTC))
    p = market.predict(noise=0)
    assert "2026-01-04T21:00Z..2026-01-05T09:00Z" in market.judge(p, p, window=night).reasons[0]
