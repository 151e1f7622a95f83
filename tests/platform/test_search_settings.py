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


def refusal(stage: str, init: object) -> str | None:
    search = SearchSettings.model_validate({"method": "optuna", "tuning": {"stage": stage}})
    try:
        search.check(ArmsRefreshSettings.model_validate({"init": init}))
    except ValueError as error:
        return str(error)
    return None


DEEPER: dict[str, object] = {"kind": "layers", "layers": [1, 12]}
MLM_DISTIL: dict[str, object] = {"kind": "mlm_distil"}


@pytest.mark.parametrize(
    ("init", "trained"),
    [
        ("random", ()),
        ("mlm", ("mlm",)),
        ("supervised", ("supervised",)),
        ("embeddings", ("mlm",)),
        ("truncation", ("mlm",)),
        (DEEPER, ("mlm",)),
        (DEEPER | {"source": "teacher"}, ()),
        ({"kind": "checkpoint", "path": "weights.safetensors"}, ()),
        ("dual_vocabulary", ()),  # has a recipe of its own
        (MLM_DISTIL, ("mlm",)),
        (MLM_DISTIL | {"stage": {}}, ()),
        (MLM_DISTIL | {"stage": {}, "start": DEEPER}, ("mlm",)),
        (MLM_DISTIL | {"stage": {}, "start": "supervised"}, ("supervised",)),
    ],
    ids=str,
)
def test_only_a_stage_that_the_start_trains_can_be_tuned(
    init: object, trained: tuple[str, ...]
) -> None:
    for stage in ("mlm", "supervised"):
        found = refusal(stage, init)
        assert (found is None) == (stage in trained)
        if found is not None:
            assert f"has no stage {stage!r} to tune" in found
            assert found.endswith("distil, finetune, self_training, head")
