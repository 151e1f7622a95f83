"""A market of two days with a trained teacher and a champion, made once by the real steps."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.refresh_arms import refresh_arms
from driftline.pipelines.replay import log_split
from driftline.pipelines.teacher import train_teacher
from driftline.platform.settings import DriftlineSettings, parse_settings
from driftline.platform.workspace import Workspace

TEXT = [
    {"name": "title", "kind": "text", "entity": "product", "tier": "long"},
    {"name": "description", "kind": "text", "entity": "product", "tier": "long"},
]
REST = [
    {"name": "category", "kind": "categorical", "entity": "product", "tier": "medium"},
    {"name": "application", "kind": "categorical", "entity": "impression", "tier": "medium"},
    {"name": "sales_24h", "kind": "numeric", "entity": "product", "tier": "short"},
]
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def small_settings(workspace: Path, *, num_days: int = 2, **changes: Any) -> DriftlineSettings:
    """A whole loop in seconds: one-layer encoders of width 16, few rows.

    ``changes`` replace whole sections, but for the teacher's, whose keys are replaced.
    """
    stage = {"num_epochs": 1, "batch_size": 128, "learning_rate": 0.003, "max_rows": 600}
    encoder = {"kind": "config", "num_layers": 1, "hidden_size": 16, "max_tokens": 16}
    raw: dict[str, Any] = {
        "name": "small",
        "workspace": str(workspace),
        "seed": 3,
        "source": {
            "kind": "simulate",
            "start": "2026-01-01T00:00:00Z",
            "num_days": num_days,
            "impressions_per_day": 4_000,
            "num_products": 60,
            "new_products_per_day": 20,
            "num_categories": 4,
            "ads_per_page": 5,
        },
        "features": TEXT + REST,
        "counters": {"category": "category", "windows_hours": [1, 24]},
        "labels": {"maturity_minutes": 30, "negative_keep_rate": 0.5},
        "split": {"ood_share": 0.75},
        "tiers": {"long": {"value_freshness_hours": 720, "parameter_freshness_hours": 6}},
        "tokenizer": {"vocabulary_size": 400},
        "teacher": {
            "encoder": encoder | {"max_tokens": 32},
            "columns": ["ad__category", "ad__ctr_24h"],
            "mlm": stage,
            "supervised": stage,
        },
        "student": {
            "encoder": encoder,
            "head": {"hidden_sizes": [16], "category_embedding_size": 4},
            "arms_refresh": {
                "mlm": stage,
                "distil": stage,
                "finetune": stage,
                "self_training": stage,
            },
            "head_refresh": {"window_hours": 6, "replay_share": 1, "finetune": stage},
        },
        "store": {"threads": 1, "memory_limit": "1GB"},
        "replay": {"num_hours": 3, "last_hours": 3, "num_bootstrap": 50},
        "gate": {"num_bootstrap": 50},
    }
    teacher = raw["teacher"] | changes.pop("teacher", {})
    return parse_settings(raw | changes | {"teacher": teacher}, origin="test")


@pytest.fixture
def make_settings() -> Callable[..., DriftlineSettings]:
    """See ``small_settings``."""
    return small_settings


def prepare_market(settings: DriftlineSettings) -> DriftlineSettings:
    """Data, check, features, teacher, first champion."""
    workspace = Workspace.of(settings)
    simulate(settings, workspace.log)
    check_log(workspace.log, workspace.clean, settings=settings, now=NOW)
    prepare_features(settings)
    train_teacher(settings)
    refresh_arms(settings, as_of=log_split(settings).id.start)
    return settings


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> DriftlineSettings:
    """Never changed by a test; see ``market``."""
    return prepare_market(small_settings(tmp_path_factory.mktemp("prepared") / "market"))


@pytest.fixture
def copy_market(prepared: DriftlineSettings, tmp_path: Path) -> Callable[[str], DriftlineSettings]:
    """Makes independent copies of the prepared market."""

    def copy(name: str) -> DriftlineSettings:
        shutil.copytree(Workspace.of(prepared).root, tmp_path / name)
        return prepared.model_copy(update={"workspace": tmp_path / name})

    return copy


@pytest.fixture
def market(copy_market: Callable[[str], DriftlineSettings]) -> DriftlineSettings:
    """A copy of the prepared market for one test."""
    return copy_market("market")
