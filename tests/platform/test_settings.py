"""Settings: every preset loads; every mistake is named with its path."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftline.platform.errors import SettingsError
from driftline.platform.settings import apply_override, load_settings, parse_settings
from driftline.platform.yaml_text import read_yaml

CONFIGS = sorted(  # studies have settings of their own, their markets have these
    path
    for path in (Path(__file__).parents[2] / "configs").rglob("*.yaml")
    if path.parent.name != "studies"
)
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.mark.parametrize("preset", CONFIGS, ids=lambda path: path.stem)
def test_every_preset_is_valid(preset: Path) -> None:
    assert load_settings(preset).name


MISTAKES = [
    (["student.head.hiden=3"], "student.head.hiden: Extra inputs are not permitted"),
    (["seed=abc"], "seed: Input should be a valid integer.*got 'abc'"),
    (["source.kind=kafka"], "source: Input tag 'kafka'.*'simulate', 'mind', 'parquet'"),
    (["features.0.tier=weekly"], "features.0.tier.*got 'weekly'"),
    (["features.0.entity=impression"], "text must have entity 'product'"),
    (["features.1.name=title"], "'title' is declared twice"),
    (["features.0.name=Bad Name"], "features.0.name.*got 'Bad Name'"),
    (["counters.category=colour"], "counters.category must be a categorical product feature"),
    (["counters.windows_hours=[0]"], "counters.windows_hours.0.*got 0"),
    (["labels.negative_keep_rate=0"], "labels.negative_keep_rate.*got 0"),
    (["labels.maturity_minutes=-5"], "labels.maturity_minutes.*got -5"),
    (["split.ood_share=1.5"], "split.ood_share.*got 1.5"),
    (["split.ood_end=2026-01-01"], "split.ood_end"),
    (["teacher.encoder.hidden_size=100"], "hidden_size must be below 64 or a multiple of 64"),
    (["student.encoder.kind=gpt"], "student.encoder: Input tag 'gpt'"),
    (["student.head_refresh.objective.alpha=2"], "student.head_refresh.objective.alpha.*got 2"),
    (["student.head_refresh.objective.temperature=-1"], "temperature.*got -1"),
    (["student.arms_refresh.objective.tokens=masked"], "objective.tokens concerns masked-langu"),
    (["student.head_refresh.objective.tokens=masked"], "objective.tokens concerns masked-langu"),
    (["student.head_refresh.objective.matches=[pkd]"], "a head over cached vectors has no layers"),
    (["student.arms_refresh.objective.hard_weight=1"], "together .* got only hard_weight"),
    (["serving.port=99999"], "serving.port.*got 99999"),
    (["name=Not Good"], "name.*got 'Not Good'"),
    (["gate.calibration_range=[0,1]"], "gate.calibration_range.0"),
    (["replay.peers=[xgboost]"], "replay.peers.0"),
    (["tiers.long.value_freshness_hours=0"], "tiers.long.value_freshness_hours"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[m[0][0] for m in MISTAKES])
def test_a_mistake_is_named_with_its_path(overrides: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(DEMO, overrides=overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("no-equals", "form a.b=value"),
        ("=3", "form a.b=value"),
        ("a..b=3", "form a.b=value"),
        ("seed.deep=3", "'seed' is a value"),
        ("features.99.name=x", "index"),
        ("seed=[1", "is not YAML"),
    ],
)
def test_a_bad_override_says_what_it_should_be(override: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(DEMO, overrides=[override])


def test_several_mistakes_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(DEMO, overrides=["seed=x", "serving.port=0", "nonsense=1"])
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=r"bad\.yaml"):
        load_settings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml: cannot be read"):
        load_settings(tmp_path / "nowhere.yaml")


def test_an_override_reaches_lists_and_new_sections() -> None:
    raw: dict[str, Any] = yaml.safe_load(DEMO.read_text())
    apply_override(raw, "features.0.name=headline")
    apply_override(raw, "gate.min_rows=7")
    settings = parse_settings(raw, origin="test")
    assert settings.features[0].name == "headline"
    assert settings.gate.min_rows == 7


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "On", "y", "n"])
def test_a_word_is_a_word_and_only_true_and_false_are_booleans(word: str) -> None:
    assert read_yaml(f"{{{word}: {word}}}") == {word: word}
    assert read_yaml(yaml.safe_dump({word: word})) == {word: word}
    assert read_yaml("[true, False, 1, 1.5, null, 2026-01-01]") == [
        *(True, False, 1, 1.5, None, date(2026, 1, 1))
    ]


def test_a_key_that_stands_twice_is_refused_and_not_half_lost(tmp_path: Path) -> None:
    doubled = tmp_path / "doubled.yaml"
    doubled.write_text(DEMO.read_text() + "\nstudent: {tie_arms: false}\n")
    with pytest.raises(SettingsError, match=r"(?s)is not YAML: .*'student' stands twice"):
        load_settings(doubled)
    with pytest.raises(yaml.YAMLError, match="'a' stands twice"):
        read_yaml("[{b: {a: 1, c: 2, a: 3}}]")
    merged = "base: &base {a: 1, b: 2}\nown: {<<: *base, a: 3}\nother: {a: 4, '1': 5, 1: 6}"
    assert read_yaml(merged) == {
        "base": {"a": 1, "b": 2},
        "own": {"a": 3, "b": 2},
        "other": {"a": 4, "1": 5, 1: 6},
    }


def test_settings_may_say_on_and_off(tmp_path: Path) -> None:
    raw = yaml.safe_load(DEMO.read_text())
    del raw["student"]["arms_refresh"]["distil"]
    text = yaml.safe_dump(raw, sort_keys=False)
    (tmp_path / "words.yaml").write_text(
        text.replace("  arms_refresh:\n", "  arms_refresh:\n    distil: {on: id, autocast: off}\n")
    )
    overrides = ["student.arms_refresh.self_training.on=id", "teacher.mlm.sharding=off"]
    settings = load_settings(tmp_path / "words.yaml", overrides=overrides)
    distil = settings.student.arms_refresh.distil
    assert distil is not None
    assert (distil.on, distil.autocast) == ("id", "off")
    assert settings.student.arms_refresh.self_training.on == "id"


@pytest.mark.parametrize(
    ("objective", "overrides", "expected"),
    [
        ("{alpha: 0.1}", ["hard_weight=0.3", "soft_weight=0.9"], (0.3, 0.9, 2.0)),
        ("{hard_weight: 0.3, soft_weight: 0.9}", ["alpha=0.25"], (0.75, 0.25, 2.0)),
        ("{preset: turc}", ["alpha=0.25"], (0.75, 0.25, 1.0)),
        ("{preset: ctrbert}", ["soft_weight=0.9"], (0.5, 0.9, 2.0)),
        ("{alpha: 0.1, temperature: 9}", ["preset=turc"], (0.0, 1.0, 1.0)),
        ("{alpha: 0.1}", ["preset=turc", "temperature=3"], (0.0, 1.0, 3.0)),
        ("{alpha: 0.1}", ["soft_weight.base=0.9", "hard_weight.base=0.3"], (0.3, 0.9, 2.0)),
        ("{alpha: 0.1}", ["soft_weight=null"], (0.9, 0.1, 2.0)),
    ],
)
def test_the_later_word_on_an_objective_wins(
    objective: str, overrides: list[str], expected: tuple[float, float, float]
) -> None:
    path = "student.arms_refresh.objective"
    settings = load_settings(
        DEMO, overrides=[f"{path}={objective}", *(f"{path}.{each}" for each in overrides)]
    )
    found = settings.student.arms_refresh.objective
    assert (*found.weights_at(1), found.temperature) == expected
