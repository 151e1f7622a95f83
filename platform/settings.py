"""One typed YAML drives everything; unknown keys are refused with their path.

The one door to all settings. Their parts live in ``data_settings``, ``model_settings``,
``training_settings``, ``objective_settings``, ``strategy_settings`` and ``operation_settings``.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Self

import yaml
from pydantic import (
    Field,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from driftline.platform.artefacts import hash_value
from driftline.platform.data_settings import (
    CONTRACT_NAMES,
    CounterSettings,
    Feature,
    FeatureName,
    LabelSettings,
    MindSource,
    ParquetSource,
    QualitySettings,
    Settings,
    Share,
    SimulateSource,
    Source,
    SplitSettings,
    Tier,
    TierName,
    Tiers,
)
from driftline.platform.distillation.presets import forget_rivals
from driftline.platform.errors import SettingsError
from driftline.platform.model_settings import (
    CheckpointEncoder,
    ConfigEncoder,
    Encoder,
    HeadRefreshSettings,
    HeadSettings,
    MultiTaskSettings,
    OutcomeSettings,
    StudentSettings,
    TeacherFeatureSettings,
    TeacherMember,
    TeacherSettings,
    TokenizerSettings,
)
from driftline.platform.objective_settings import ObjectiveSettings
from driftline.platform.operation_settings import (
    CadenceSettings,
    GateSettings,
    RaySettings,
    RegistrySettings,
    ReplaySettings,
    ServingSettings,
    StoreSettings,
)
from driftline.platform.search_settings import SearchSettings, TuningSettings
from driftline.platform.strategy_settings import (
    ArmsRefreshSettings,
    ArmsSelfTrainingSettings,
    DistilSettings,
)
from driftline.platform.training_settings import SelfTrainingSettings, StageSettings
from driftline.platform.yaml_text import read_yaml

__all__ = [
    "CONTRACT_NAMES",
    "ArmsRefreshSettings",
    "ArmsSelfTrainingSettings",
    "CadenceSettings",
    "CheckpointEncoder",
    "ConfigEncoder",
    "CounterSettings",
    "DistilSettings",
    "DriftlineSettings",
    "Encoder",
    "Feature",
    "FeatureName",
    "GateSettings",
    "HeadRefreshSettings",
    "HeadSettings",
    "LabelSettings",
    "MindSource",
    "MultiTaskSettings",
    "ObjectiveSettings",
    "OutcomeSettings",
    "ParquetSource",
    "QualitySettings",
    "RaySettings",
    "RegistrySettings",
    "ReplaySettings",
    "SearchSettings",
    "SelfTrainingSettings",
    "ServingSettings",
    "Settings",
    "Share",
    "SimulateSource",
    "Source",
    "SplitSettings",
    "StageSettings",
    "StoreSettings",
    "StudentSettings",
    "TeacherFeatureSettings",
    "TeacherMember",
    "TeacherSettings",
    "Tier",
    "TierName",
    "Tiers",
    "TokenizerSettings",
    "TuningSettings",
    "apply_override",
    "load_settings",
    "parse_settings",
]


OBJECTIVE: Final = "objective"


class DriftlineSettings(Settings):
    """Everything Driftline needs to know about one market."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]
    workspace: Path
    """Folder of all artefacts of this market; created when needed."""
    seed: NonNegativeInt = 0
    source: Source
    features: tuple[Feature, ...]
    tiers: Tiers = Tiers()
    counters: CounterSettings = CounterSettings()
    labels: LabelSettings = LabelSettings()
    quality: QualitySettings = QualitySettings()
    split: SplitSettings = SplitSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    gate: GateSettings = GateSettings()
    serving: ServingSettings = ServingSettings()
    cadence: CadenceSettings = CadenceSettings()
    replay: ReplaySettings = ReplaySettings()
    search: SearchSettings | None = None
    """What `driftline search` tries; the paper's 3 x 3 x 2 strategies when not given."""
    ray: RaySettings = RaySettings()
    store: StoreSettings = StoreSettings()
    registry: RegistrySettings = RegistrySettings()

    @model_validator(mode="after")
    def _features_fit_together(self) -> Self:
        seen: set[str] = set()
        for feature in self.features:
            if feature.name in seen:
                raise ValueError(f"feature {feature.name!r} is declared twice")
            seen.add(feature.name)
            if feature.name in CONTRACT_NAMES:
                raise ValueError(
                    f"feature {feature.name!r} has the name of a fixed column of the contract; "
                    "give it another name"
                )
        category = self.counters.category
        allowed = [f.name for f in self.select(kind="categorical", entity="product")]
        if category is not None and category not in allowed:
            raise ValueError(
                f"counters.category must be a categorical product feature, one of "
                f"{allowed or 'none declared'}, got {category!r}"
            )
        return self

    @model_validator(mode="after")
    def _student_has_the_smaller_vocabulary(self) -> Self:
        small, large = self.student.vocabulary_size, self.tokenizer.vocabulary_size
        own = isinstance(self.teacher.encoder, CheckpointEncoder)
        if small is not None and not own and small >= large:
            raise ValueError(
                f"student.vocabulary_size must be below tokenizer.vocabulary_size {large}, "
                f"got {small}; leave it out to share the teacher's tokeniser"
            )
        return self

    @model_validator(mode="after")
    def _canaries_can_be_judged(self) -> Self:
        if self.gate.promote == "canary" and not self.serving.decision_log.sample_rate:
            raise ValueError(
                "gate.promote 'canary' needs the decision log to judge by: "
                "serving.decision_log.sample_rate must be above 0, got 0"
            )
        return self

    @model_validator(mode="after")
    def _search_tries_strategies(self) -> Self:
        if self.search is not None:
            try:
                self.search.check(self.student.arms_refresh)
            except ValueError as error:
                raise ValueError(f"search.{error}") from error
        return self

    def select(self, *, kind: str | None = None, entity: str | None = None) -> tuple[Feature, ...]:
        """The declared features of a kind and an entity, in declared order.

        Labels are what models learn, not what they read: they are given only when asked for.
        """
        return tuple(
            feature
            for feature in self.features
            if (kind == feature.kind or (kind is None and feature.kind != "label"))
            and entity in (None, feature.entity)
        )

    @property
    def identity(self) -> str:
        """Hash of all values, by which a server tells the settings it was started with."""
        return hash_value(self.model_dump(mode="json"))[:12]


# --- reading ------------------------------------------------------------------------------


def load_settings(path: Path, *, overrides: Sequence[str] = ()) -> DriftlineSettings:
    """Read a YAML file and apply ``a.b=c`` overrides (values are YAML).

    Raises:
        SettingsError: no such file, not YAML, an unknown key, or a value outside its range.
    """
    try:
        raw = read_yaml(path.read_text())
    except OSError as error:
        raise SettingsError(f"settings file {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} is not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise SettingsError(f"settings file {path} must hold a mapping of keys, got {raw!r:.60}")
    for override in overrides:
        apply_override(raw, override)
    return parse_settings(raw, origin=str(path))


def parse_settings(raw: Mapping[str, Any], *, origin: str) -> DriftlineSettings:
    """Check a mapping; all its mistakes are reported at once, each with its path."""
    try:
        return DriftlineSettings.model_validate(dict(raw))
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise SettingsError(f"settings {origin}:\n  " + "\n  ".join(lines)) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in place; ``c`` is YAML. In an objective it wins over what contradicts it.

    Raises:
        SettingsError: no ``=``, or the path leads through something that is not a mapping.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"--set needs the form a.b=value, got {override!r}")
    node: Any = raw
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {path}: value {text!r} is not YAML") from error
    for key, inside in pairwise(keys):
        node = _enter(node, key, path=path)
        if key == OBJECTIVE and isinstance(node, dict) and value is not None:
            forget_rivals(node, inside)
    if isinstance(node, list):
        node[_index(node, keys[-1], path=path)] = value
    else:
        node[keys[-1]] = value


def _enter(node: Any, key: str, *, path: str) -> Any:
    """The section below ``node``, made if there is none."""
    if isinstance(node, list):
        inside = node[_index(node, key, path=path)]
    else:
        if node.get(key) is None:
            node[key] = {}
        inside = node[key]
    if not isinstance(inside, dict | list):
        raise SettingsError(f"--set {path}: {key!r} is a value ({inside!r}), not a section")
    return inside


def _index(node: list[Any], key: str, *, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise SettingsError(f"--set {path}: {key!r} is no index of a list of {len(node)}")
    return int(key)


def _describe(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"]) or "(top level)"
    if detail["type"] in ("missing", "extra_forbidden"):
        return f"{path}: {detail['msg']}"
    return f"{path}: {detail['msg']}, got {detail['input']!r:.80}"
