"""One tiny market for all tests of serving."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_market import TinyMarket, tiny_settings

from driftline.platform.bundle import Bundle
from driftline.platform.settings import DriftlineSettings
from driftline.platform.workspace import Workspace


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> TinyMarket:
    """Features online as of ``AS_OF``; no champion."""
    return TinyMarket.make(tiny_settings(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def first(market: TinyMarket) -> Bundle:
    return market.bundle(seed=1)


@pytest.fixture(scope="module")
def second(market: TinyMarket) -> Bundle:
    return market.bundle(seed=2)


@pytest.fixture
def pointer(market: TinyMarket) -> Iterator[Path]:
    """The champion's pointer, removed before and after."""
    path = Workspace.of(market.settings).bundles / "CHAMPION"
    path.unlink(missing_ok=True)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def serving_settings(market: TinyMarket) -> Callable[..., DriftlineSettings]:
    """The market's settings with other serving settings."""

    def change(**serving: Any) -> DriftlineSettings:
        changed = market.settings.serving.model_copy(update=serving)
        return market.settings.model_copy(update={"serving": changed})

    return change


@pytest.fixture
def altered(market: TinyMarket, first: Bundle) -> Iterator[Bundle]:
    """A bundle that someone edited after it was published."""
    victim = market.bundle(seed=3)
    weights = victim.path / "calibration.json"
    kept = weights.read_text()
    weights.unlink()  # a hard link of others must not be written through
    weights.write_text(kept.replace("0.25", "0.5"))
    yield victim
    shutil.rmtree(victim.path)
