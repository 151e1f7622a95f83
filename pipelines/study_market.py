"""The markets of a study: prepared once, shared by all variants and studies that agree on them.

A market's folder is named after the settings that decide log, features and teachers, so studies of
one market share its simulation, its teacher and every soft label, and a variant that changes the
market itself gets a market of its own without being asked.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from driftline.features.log import ImpressionLog
from driftline.features.quality import check_log
from driftline.features.scales import estimate_scales, resolve_tiers, write_scales
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.run import ingest
from driftline.pipelines.strategy_names import NAMED_STRATEGIES, approach, strategy_of
from driftline.pipelines.teachers import find_member, train_teachers
from driftline.platform.artefacts import hash_value
from driftline.platform.errors import SettingsError
from driftline.platform.settings import (
    ArmsRefreshSettings,
    DriftlineSettings,
    apply_override,
    parse_settings,
)
from driftline.platform.study_parts import StrategyName
from driftline.platform.study_settings import StudyCell, StudySettings
from driftline.platform.workspace import Workspace
from driftline.platform.yaml_text import read_yaml

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
ProgressBar = Callable[[str], AbstractContextManager[Progress]]

DECIDING: Final = frozenset(
    {"source", "seed", "features", "tiers", "counters", "labels", "quality", "split", "tokenizer"}
)
"""Settings that decide what lies in a market's folder, beside the teacher."""


def cell_settings(
    study: StudySettings, path: Path, cell: StudyCell, *, overrides: tuple[str, ...], root: Path
) -> DriftlineSettings:
    """The market's settings with what the cell changes; ``--set`` comes last.

    Raises:
        SettingsError: the market's file, an override of the cell, or one of ``--set`` is wrong, or
            there is no teacher of the cell's name.
    """
    source = path.parent / study.market
    try:
        raw = read_yaml(source.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"study {path}: market {source} cannot be read ({error})") from error
    if not isinstance(raw, dict):
        raise SettingsError(f"study {path}: market {source} must hold a mapping, got {raw!r:.60}")
    try:
        for key, value in cell.overrides:
            set_value(raw, key, value)
        for override in overrides:
            apply_override(raw, override)
        settings = parse_settings(raw, origin=f"{source} as changed by variant {cell.name!r}")
        if cell.teacher is not None:
            find_member(settings, cell.teacher)
    except SettingsError as error:
        raise SettingsError(f"study {path}, variant {cell.name!r}: {error}") from error
    settings = settings.model_copy(update={"workspace": root / market_name(settings)})
    return settings if cell.strategy is None else _with_strategy(study, path, cell, settings)


def _with_strategy(
    study: StudySettings, path: Path, cell: StudyCell, settings: DriftlineSettings
) -> DriftlineSettings:
    assert cell.strategy is not None
    try:
        arms = apply_strategy(settings.student.arms_refresh, cell.strategy)
    except ValueError as error:
        raise SettingsError(f"study {path}, variant {cell.name!r}: {error}") from error
    student = settings.student.model_copy(update={"arms_refresh": arms})
    return settings.model_copy(update={"student": student})


def apply_strategy(base: ArmsRefreshSettings, name: StrategyName) -> ArmsRefreshSettings:
    """The settings with the stages of a strategy; see ``StudyVariant.strategy``.

    Raises:
        ValueError: there is no such strategy.
    """
    if isinstance(name, int):
        return approach(name, base)
    if isinstance(name, tuple):
        start, distillation, finetuning = name
        found = strategy_of(
            ("random" if start == "own" else start, distillation, finetuning),
            base,
        )
        return found.model_copy(update={"init": base.init}) if start == "own" else found
    if name not in NAMED_STRATEGIES:
        raise ValueError(
            f"strategy must be one of {', '.join(NAMED_STRATEGIES)}, a number of Table 3, or "
            f"[start, distillation, fine-tuning], got {name!r}"
        )
    return NAMED_STRATEGIES[name](base)


def set_value(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` to a value, in place."""
    apply_override(raw, f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9)}")


def market_name(settings: DriftlineSettings) -> str:
    """Name and hash of everything that decides the market's folder.

    Members of the ensemble are frozen beside the first teacher, each by its own settings, so they
    do not part markets.
    """
    deciding = settings.model_dump(mode="json", include=set(DECIDING))
    teacher = settings.teacher.model_dump(mode="json", exclude={"ensemble", "features"})
    return f"{settings.name}-{hash_value([deciding, teacher])[:10]}"


def prepare_market(
    settings: DriftlineSettings, *, progress_bar: ProgressBar, needs_teacher: bool = True
) -> DriftlineSettings:
    """Log, check, tiers, features and teachers; what is there already is left alone.

    Returns:
        The settings with every tier known.
    """
    workspace = Workspace.of(settings)
    if not workspace.log.exists():
        with progress_bar(f"{settings.name}: log") as progress:
            ingest(settings, workspace.log, progress=progress)
    if not (workspace.clean / "verdict.json").exists():
        check_log(workspace.log, workspace.clean, settings=settings, now=datetime.now(UTC))
    if not workspace.scales.exists():
        log = ImpressionLog.open(workspace.clean, settings)
        write_scales(estimate_scales(log, settings), workspace.scales)
    settings = resolve_tiers(settings, workspace.scales)
    with progress_bar(f"{settings.name}: features") as progress:
        prepare_features(settings, progress=progress)
    if needs_teacher:
        with progress_bar(f"{settings.name}: teacher") as progress:
            train_teachers(settings, progress=progress)
    return settings
