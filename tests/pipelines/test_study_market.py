"""What is wrong with a variant is found when the study is read, before a market is made."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.tiny_market import tiny_settings

from driftline.pipelines.study_market import cell_settings
from driftline.platform.errors import SettingsError
from driftline.platform.settings import DriftlineSettings
from driftline.platform.study_settings import StudySettings


def settings_of(folder: Path, variant: dict[str, Any]) -> DriftlineSettings:
    study = StudySettings.model_validate(
        {
            "name": "one",
            "title": "One",
            "market": "market.yaml",
            "baseline": "a",
            "columns": ["id_auc"],
            "variants": {"a": variant},
        }
    )
    return cell_settings(
        study, folder / "study.yaml", study.cells["a"], overrides=(), root=folder / "markets"
    )


def test_a_teacher_of_a_variant_must_be_among_the_ensemble(tmp_path: Path) -> None:
    raw = tiny_settings(tmp_path / "workspace").model_dump(mode="json")
    (tmp_path / "market.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(SettingsError, match=r"variant 'a': .*no member 'second'"):
        settings_of(tmp_path, {"teacher": "second"})
    ensemble = {"teacher.ensemble": [{"name": "second", "seed": 7}]}
    found = settings_of(tmp_path, {"teacher": "second", "set": ensemble})
    assert [member.name for member in found.teacher.ensemble] == ["second"]
    assert not (tmp_path / "markets").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: [1", b"- 1", b"a: 1\na: 2"])
def test_a_market_that_is_no_mapping_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "market.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"market .*market\.yaml (cannot be read|must hold)"):
        settings_of(tmp_path, {})
