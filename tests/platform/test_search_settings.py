"""What an axis of a search says is what is tried."""

import pytest

from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.settings import ArmsRefreshSettings, SearchSettings


def tried(option: dict[str, object], base: ArmsRefreshSettings) -> ArmsRefreshSettings:
    search = SearchSettings.model_validate({"axes": {"distil": {"one": option}}})
    return search.strategy(("mlm", "one", "vanilla"), base)


@pytest.mark.parametrize("preset", ["ctrbert", "turc", "textbrewer", "thesis"])
def test_a_preset_in_an_axis_is_the_preset_whatever_the_settings_say(preset: str) -> None:
    written_out = ObjectiveSettings(alpha=0.9, temperature=3, soft="mse", tau_squared=False)
    base = ArmsRefreshSettings(objective=written_out)
    found = tried({"objective": {"preset": preset}}, base).objective
    assert found == ObjectiveSettings.model_validate({"preset": preset})
    warmer = tried({"objective": {"preset": preset, "temperature": 5}}, base).objective
    assert warmer == found.model_copy(update={"temperature": 5.0})


def test_a_mapping_without_a_preset_changes_only_what_it_names() -> None:
    base = ArmsRefreshSettings(objective=ObjectiveSettings(alpha=0.9, temperature=3))
    found = tried({"objective": {"temperature": 5}}, base).objective
    assert (found.alpha, found.temperature) == (0.9, 5)
