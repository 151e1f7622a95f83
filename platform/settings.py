"""One typed YAML drives everything; unknown keys are refused with their path."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from driftline.platform.errors import SettingsError

TierName = Literal["long", "medium", "short"]
Share = Annotated[float, Field(gt=0, lt=1)]
FeatureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$", max_length=60)]

CONTRACT_NAMES = frozenset(
    {
        "impression_id",
        "event_time",
        "page_product_id",
        "ad_product_id",
        "clicked",
        "click_time",
        "request_id",
        "position",
        "propensity",
        "product_id",
        "created_time",
    }
)
"""Columns that every log has; no feature may take their names."""


class Settings(BaseModel):
    """Base of all settings: frozen, unknown keys refused."""

    # Defaults are validated so that 60 and 60.0 are one value however the settings were read:
    # hashes of settings name features and artefacts.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


# --- data ---------------------------------------------------------------------------------


class Feature(Settings):
    """One column of the log and the speed at which it drifts (papers.md S0.2)."""

    name: FeatureName
    kind: Literal["text", "categorical", "numeric"]
    entity: Literal["product", "impression"]
    """``product`` columns come from the catalogue (text, categorical) or from the counters table
    (numeric); ``impression`` columns stand in the impression itself."""
    tier: TierName | Literal["auto"]

    @model_validator(mode="after")
    def _text_belongs_to_products(self) -> Self:
        if self.kind == "text" and self.entity == "impression":
            raise ValueError(
                f"feature {self.name!r}: text must have entity 'product', got 'impression'; "
                "the arms encode products"
            )
        return self


class Tier(Settings):
    """One drift time scale with its two clocks."""

    value_freshness_hours: PositiveFloat
    """How old a served value may be; becomes Feast's TTL when stale values are not used."""
    parameter_freshness_hours: PositiveFloat
    """How old the weights that read these values may be; becomes a refresh cadence."""
    on_stale: Literal["use", "default"] = "use"
    """``use`` serves an older value and flags it; ``default`` treats it as missing."""


class Tiers(Settings):
    """The three drift tiers. Defaults: month, week, hour (papers.md S0.2, S0.4)."""

    long: Tier = Tier(value_freshness_hours=720, parameter_freshness_hours=720)
    medium: Tier = Tier(value_freshness_hours=168, parameter_freshness_hours=1)
    short: Tier = Tier(value_freshness_hours=2, parameter_freshness_hours=1, on_stale="default")

    def __getitem__(self, name: TierName) -> Tier:
        """The tier of that name."""
        tier = getattr(self, name)
        assert isinstance(tier, Tier)
        return tier


class CounterSettings(Settings):
    """Hourly counters derived from the log itself."""

    windows_hours: tuple[PositiveInt, ...] = (1, 6, 24, 168)
    category: FeatureName | None = None
    """Categorical product feature that is counted beside the product, alone and as a
    (page, ad) pair; without one, only products are counted."""
    prior_strength: PositiveFloat = 20.0
    """Impressions' worth of the overall click rate mixed into each smoothed click rate."""


class SplitSettings(Settings):
    """Where the stale part of the log (OOD) ends and the replayed part (ID) begins."""

    ood_share: Share = 0.5
    ood_end: AwareDatetime | None = None
    """Overrides ``ood_share`` with a moment."""
    validation_share: Share = 0.1
    """Share of requests kept for early stopping and calibration, natural balance."""
    gate_share: Share = 0.1
    """Share of requests no student trains on, so that a refresh can be judged on its newest
    hours and still learn from them."""


class LabelSettings(Settings):
    """When the outcome of an impression counts as known, and how negatives are thinned."""

    maturity_minutes: NonNegativeFloat = 60
    """A label is believed this long after the impression; clicks after that are lost."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of non-clicks kept in training; undone exactly at inference (papers.md S0.25, T.2)."""
    soft_label_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of training rows, drawn by hash, that the teacher is asked about; the others are
    learned from their clicks alone."""

    @property
    def maturity(self) -> timedelta:
        """The same as a duration."""
        return timedelta(minutes=self.maturity_minutes)


class SimulateSource(Settings):
    """A drifting market with known click probabilities."""

    kind: Literal["simulate"]
    num_days: PositiveInt = 8
    impressions_per_day: PositiveInt = 24_000
    num_products: PositiveInt = 2_000
    """Products on the first day."""
    new_products_per_day: NonNegativeInt = 60
    num_categories: PositiveInt = 12
    num_advertisers: PositiveInt = 40
    num_applications: PositiveInt = 4
    ads_per_page: PositiveInt = 10
    click_rate: Share = 0.05
    campaign_days: PositiveFloat = 14.0
    """How long a campaign of an advertiser lasts on average; applications drift as fast."""
    start: AwareDatetime
    """First moment of the market."""


class MindSource(Settings):
    """The published MIND layout: ``behaviors.tsv`` and ``news.tsv``."""

    kind: Literal["mind"]
    path: Path | None = None
    """Folder with the two files; usually given as ``--set source.path=DIR``."""


class ParquetSource(Settings):
    """Anyone's own log, with a column mapping."""

    kind: Literal["parquet"]
    impressions: Path
    catalogue: Path | None = None
    counters: Path | None = None
    columns: dict[str, str] = {}
    """Contract column: column in the file. Columns of the same name need no entry."""
    time_zone: str = "UTC"
    """Zone of times written without one."""


Source = Annotated[SimulateSource | MindSource | ParquetSource, Field(discriminator="kind")]


class QualitySettings(Settings):
    """When a whole log is refused rather than some of its rows."""

    max_quarantine_share: Share = 0.2
    """Refuse the log when more of its impressions than this must be put aside."""
    max_future_minutes: NonNegativeFloat = 5
    """Rows further in the future than this, seen from the clock passed in, are put aside."""


# --- models -------------------------------------------------------------------------------


class ConfigEncoder(Settings):
    """A BERT encoder from a size: heads = H/64, feed-forward = 4H (papers.md S1.6)."""

    kind: Literal["config"] = "config"
    num_layers: PositiveInt = 2
    hidden_size: PositiveInt = 128
    max_tokens: PositiveInt = 64

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size > 64 and self.hidden_size % 64:
            raise ValueError(
                f"hidden_size must be below 64 or a multiple of 64, got {self.hidden_size}"
            )
        return self

    @property
    def num_heads(self) -> int:
        """Attention heads, one for each 64 units."""
        return max(1, self.hidden_size // 64)


class CheckpointEncoder(Settings):
    """An encoder from a local ``transformers`` checkpoint folder, with its own tokeniser."""

    kind: Literal["checkpoint"]
    path: Path
    max_tokens: PositiveInt = 64


Encoder = Annotated[ConfigEncoder | CheckpointEncoder, Field(discriminator="kind")]


class TokenizerSettings(Settings):
    """SentencePiece BPE with byte fallback (papers.md S0.26, A0.13)."""

    vocabulary_size: Annotated[int, Field(ge=300)] = 32_000
    max_sentences: PositiveInt = 200_000
    """Sentences sampled for training the tokeniser."""


class StageSettings(Settings):
    """One training stage (papers.md S0.9, S0.21)."""

    num_epochs: PositiveFloat = 1.0
    """Passes over the rows; fractions allowed."""
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 3e-4
    weight_decay: NonNegativeFloat = 0.01
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip_norm: PositiveFloat = 1.0
    evaluations_per_epoch: PositiveInt = 2
    patience: PositiveInt = 3
    """Evaluations without improvement before the stage stops; the best weights are kept."""
    max_rows: PositiveInt | None = None
    """Upper limit of rows, newest first."""
    autocast: Literal["off", "bfloat16"] = "off"


class ObjectiveSettings(Settings):
    """(1-a) CE + a t^2 KL(teacher || student), equation (1) (papers.md S0.16, A0.10)."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the frozen teacher's soft labels; 1 ignores the clicks."""
    temperature: PositiveFloat = 2.0
    tau_squared: bool = True
    """Multiply the soft loss by t^2, so that its gradient does not fade with t."""
    divergence: Literal["kl", "reverse_kl", "logit_mse"] = "kl"
    """``kl`` is KL(teacher || student); ``reverse_kl`` the paper's literal order of arguments."""


class SelfTrainingSettings(StageSettings):
    """The last round: learn from the student's own labels (papers.md S0.20)."""

    enabled: bool = True
    start: Literal["distilled", "finetuned"] = "distilled"
    """Weights the round starts from."""
    true_label_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the true click beside the student's own soft label."""

    @property
    def stage(self) -> StageSettings:
        """The training part alone."""
        return StageSettings(**{name: getattr(self, name) for name in StageSettings.model_fields})

    @property
    def objective(self) -> ObjectiveSettings:
        """The student's own labels take the teacher's place, as they are."""
        return ObjectiveSettings(alpha=1 - self.true_label_share, temperature=1.0)


class TeacherSettings(Settings):
    """One tower over every feature as ``name: value``; trained once (papers.md S0.5-S0.8)."""

    encoder: Encoder = ConfigEncoder()
    columns: tuple[str, ...] | None = None
    """Frame columns it reads beside the text, such as ``ad__ctr_24h``; all when not given."""
    negative_keep_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of non-clicks it learns from; ``labels.negative_keep_rate`` when not given."""
    mlm: StageSettings | None = StageSettings()
    supervised: StageSettings = StageSettings(num_epochs=2)


class HeadSettings(Settings):
    """The fusion MLP over both vectors and the tabular part (papers.md S0.12)."""

    hidden_sizes: tuple[PositiveInt, ...] = (512, 256)
    category_embedding_size: PositiveInt = 16
    num_bins: NonNegativeInt = 24
    """Pieces in which a number of the impression is also given; 0 for none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1


class ArmsRefreshSettings(Settings):
    """The slow refresh: MLM, distillation, fine-tuning, self-training (papers.md S0.33).

    At its end the head is trained once more, over the finished vectors and all recent rows.
    """

    window_hours: PositiveInt = 168
    """Length of the window of recent rows for fine-tuning."""
    mlm: StageSettings | None = StageSettings()
    distil: StageSettings | None = StageSettings(num_epochs=2)
    objective: ObjectiveSettings = ObjectiveSettings()
    finetune: StageSettings = StageSettings()
    self_training: SelfTrainingSettings = SelfTrainingSettings()
    head: StageSettings = StageSettings(num_epochs=3, batch_size=1024, learning_rate=1e-3)
    """The head alone over the finished vectors: cheap, so it may see every row several times."""
    num_workers: NonNegativeInt = 0
    """Size of the worker group; 0 trains in a warm actor, right for one machine."""


class HeadRefreshSettings(Settings):
    """The fast refresh: the fusion MLP alone, on cached vectors (papers.md A0.17)."""

    window_hours: PositiveInt = 24
    """Length of the training window."""
    replay_share: Annotated[float, Field(ge=0)] = 1.0
    """Rows drawn from before the window, as a multiple of the window's rows."""
    replay_hours: PositiveInt = 168
    """How far before the window those rows may lie."""
    warm_start: bool = True
    """Continue from the champion's head; else start from the arms refresh's head."""
    objective: ObjectiveSettings = ObjectiveSettings(alpha=0.1)
    finetune: StageSettings = StageSettings(learning_rate=1e-3)
    self_training: SelfTrainingSettings = SelfTrainingSettings(enabled=False)
    num_workers: NonNegativeInt = 0
    """0 trains in a warm actor without a worker group (Ray Train's local mode)."""


class StudentSettings(Settings):
    """Twin arms and a head; the part that is kept fresh (papers.md S0.10-S0.14)."""

    encoder: Encoder = ConfigEncoder(max_tokens=32)
    tie_arms: bool = True
    """One backbone for both roles, told apart by a role marker (papers.md S0.14)."""
    head: HeadSettings = HeadSettings()
    arms_refresh: ArmsRefreshSettings = ArmsRefreshSettings()
    head_refresh: HeadRefreshSettings = HeadRefreshSettings()


# --- operation ----------------------------------------------------------------------------


class GateSettings(Settings):
    """A challenger is promoted only within these bounds, on the newest matured slice."""

    slice_hours: PositiveInt = 24
    """Length of the newest matured slice; only requests of the gate part are judged."""
    min_rows: PositiveInt = 200
    min_clicks: PositiveInt = 5
    max_auc_drop: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Refuse when the paired interval of AUC lies wholly below minus this."""
    max_ne_rise: Annotated[float, Field(ge=0)] = 0.02
    """Refuse when the paired interval of normalised entropy lies wholly above this."""
    calibration_range: tuple[PositiveFloat, PositiveFloat] = (0.6, 1.6)
    """Allowed mean prediction / click rate, once the slice has ``min_clicks`` clicks."""
    max_milliseconds: PositiveFloat = 50.0
    """Mechanical check: time to score 100 ads in process."""
    num_bootstrap: PositiveInt = 200


class ServingSettings(Settings):
    """The Ray Serve application."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(gt=0, lt=65536)] = 8700
    num_replicas: PositiveInt = 1
    num_cpus_per_replica: NonNegativeFloat = 0
    """CPUs that Ray reserves for each replica; raise it on a cluster so that replicas spread."""
    max_ads_per_request: PositiveInt = 1_000
    unknown_product: Literal["encode", "neutral"] = "neutral"
    """``encode`` runs the arms for a product of the catalogue that the cache lacks; ``neutral``
    takes the mean vector. A product in no table is always neutral. Both are flagged."""
    poll_seconds: PositiveFloat = 1.0
    """How often a replica looks for a newer champion or snapshot."""
    clock: Literal["wall", "snapshot"] | AwareDatetime = "wall"
    """The time at which features are read and hours are counted. ``wall`` is now; ``snapshot`` is
    the moment of the newest materialisation, for logs of the past and simulated markets; a moment
    stands still. Only with the last two may a request bring a ``time`` of its own."""
    ingress: Literal["haproxy", "proxy"] = "haproxy"
    """``haproxy`` puts the bundled HAProxy (Linux) in front of the replicas and turns on Ray
    Serve's throughput flags; ``proxy`` is Ray Serve's own Python proxy, slower but everywhere."""
    max_request_bytes: PositiveInt = 1_000_000
    """A larger body is refused unread (HTTP 413)."""


class CadenceSettings(Settings):
    """When ``driftline up`` runs what; the intervals themselves follow from the tiers."""

    clock: Literal["wall", "event"] = "wall"
    """``wall`` refreshes as of now. ``event`` replays the recent part of the log, from what the
    champion knows on: an hour of it passes in ``seconds_per_hour``; for demonstrations."""
    seconds_per_hour: PositiveFloat = 10.0
    """Wall seconds that stand for one hour of event time; only with the event clock."""
    start: AwareDatetime | None = None
    """First moment of the event clock; what the champion knows up to when not given, or the start
    of the log's recent part."""
    restart_seconds: PositiveFloat = 1.0
    """Pause before a crashed service is started again; doubles with each crash, up to 60 s."""


class ReplaySettings(Settings):
    """Which policies are replayed beside the refreshed student."""

    num_hours: PositiveInt | None = None
    """Replay only the last so many hours of the ID part; all of it when not given."""
    peers: tuple[
        Literal["never", "arms_only", "mlp_never", "mlp_hourly", "lightgbm_hourly"], ...
    ] = ("never", "arms_only", "mlp_never", "mlp_hourly", "lightgbm_hourly")
    last_hours: PositiveInt = 72
    """The verdict is given on the last so many hours."""
    num_bootstrap: PositiveInt = 500


class RaySettings(Settings):
    """Where Ray runs. Nothing given: a private local Ray on this machine."""

    address: str | None = None
    num_cpus: PositiveInt | None = None
    num_cpus_per_worker: PositiveFloat | None = None
    """Processors of one training worker; an even share of the largest node when not given."""
    num_gpus_per_worker: NonNegativeFloat = 0
    teacher_workers: NonNegativeInt = 0
    """Size of the teacher's worker group; 0 trains in a warm actor, right for one machine."""


class StoreSettings(Settings):
    """Where Feast keeps things; embedded by default."""

    registry: str | None = None
    """SQLAlchemy address of the registry; a SQLite file in the workspace when not given."""
    online: Literal["snapshot", "redis"] = "snapshot"
    redis_address: str = "localhost:6379"
    memory_limit: str = "4GB"
    threads: PositiveInt = 2


class RegistrySettings(Settings):
    """MLflow model registry and tracking."""

    tracking_uri: str | None = None
    """Any MLflow tracking address; a SQLite file in the workspace when not given."""


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

    def select(self, *, kind: str | None = None, entity: str | None = None) -> tuple[Feature, ...]:
        """The declared features of a kind and an entity, in declared order."""
        return tuple(
            feature
            for feature in self.features
            if kind in (None, feature.kind) and entity in (None, feature.entity)
        )


# --- reading ------------------------------------------------------------------------------


def load_settings(path: Path, *, overrides: Sequence[str] = ()) -> DriftlineSettings:
    """Read a YAML file and apply ``a.b=c`` overrides (values are YAML).

    Raises:
        SettingsError: no such file, not YAML, an unknown key, or a value outside its range.
    """
    try:
        raw = yaml.safe_load(path.read_text())
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
    """Set ``a.b=c`` in place; ``c`` is YAML.

    Raises:
        SettingsError: no ``=``, or the path leads through something that is not a mapping.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"--set needs the form a.b=value, got {override!r}")
    node: Any = raw
    for key in keys[:-1]:
        node = _enter(node, key, path=path)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {path}: value {text!r} is not YAML") from error
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
