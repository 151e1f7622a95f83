"""The market that the serving benchmarks ask about, and bundles of random weights for it.

All steps are the real ones but the training: what an answer says is not the matter here, only what
it costs and that it is always the same.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from driftline.features.frame_files import read_frames
from driftline.features.quality import check_log
from driftline.features.simulate import simulate
from driftline.features.store import materialize
from driftline.features.texts import read_texts
from driftline.pipelines.prepare import prepare_features
from driftline.pipelines.student import bundle_contract, lineage
from driftline.platform.artefacts import write_json
from driftline.platform.bundle import Bundle, BundleParts, Calibration, VectorCache, write_bundle
from driftline.platform.columns import head_columns
from driftline.platform.examples import Ragged
from driftline.platform.fused_head import Projected
from driftline.platform.inputs import frame_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import EncoderSpec, HeadOnlySpec, TwinSpec, encoder_spec
from driftline.platform.models.spec import head_spec as make_head_spec
from driftline.platform.models.student import AD, PAGE, TextArms, TwinStudent
from driftline.platform.registry import POINTER, read_champion
from driftline.platform.scorer import load_head, student_json
from driftline.platform.settings import (
    ConfigEncoder,
    DriftlineSettings,
    HeadSettings,
    TokenizerSettings,
    parse_settings,
)
from driftline.platform.tabular import TabularEncoder
from driftline.platform.text import Tokenizer, serialise_row, train_tokenizer
from driftline.platform.windows import HOUR, Window, format_time
from driftline.platform.workspace import Workspace

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
AS_OF: Final = START + timedelta(hours=36)
"""Until when features are online."""
TEXTS_AT_ONCE: Final = 512


@dataclass(frozen=True)
class MarketSizes:
    """How large the market and its model are."""

    num_products: int = 20_000
    impressions_per_day: int = 60_000
    vector_size: int = 256
    num_layers: int = 2
    max_tokens: int = 32
    hidden_sizes: tuple[int, ...] = (128, 64)
    """Of the head; those of the presets. The paper's reading is (512, 256)."""


QUICK: Final = MarketSizes(num_products=2_000, impressions_per_day=10_000, vector_size=128)


def market_settings(workspace: Path, sizes: MarketSizes) -> DriftlineSettings:
    """7 categorical columns, 60 numbers, two texts; the snapshot's moment is the clock."""
    product = [("title", "text", "long"), ("description", "text", "long")]
    product += [("category", "categorical", "medium"), ("advertiser", "categorical", "medium")]
    product += [(f"sales_{hours}h", "numeric", "short") for hours in (1, 24, 168)]
    context = ("application", "hour_of_week", "hour_of_day")
    raw: dict[str, Any] = {
        "name": "bench",
        "workspace": str(workspace),
        "source": {
            "kind": "simulate",
            "start": format_time(START),
            "num_days": 2,
            "impressions_per_day": sizes.impressions_per_day,
            "num_products": sizes.num_products,
            "new_products_per_day": 0,
        },
        "features": [
            {"name": name, "kind": kind, "entity": "product", "tier": tier}
            for name, kind, tier in product
        ]
        + [
            {"name": name, "kind": "categorical", "entity": "impression", "tier": "medium"}
            for name in context
        ],
        "counters": {"category": "category", "windows_hours": [1, 24, 168]},
        "serving": {"clock": "snapshot", "poll_seconds": 0.5},
    }
    return parse_settings(raw, origin="of the benchmark")


@dataclass(frozen=True)
class BenchMarket:
    """A prepared market with two bundles, neither of them champion yet."""

    settings: DriftlineSettings
    sizes: MarketSizes
    bundles: tuple[Bundle, Bundle]

    @classmethod
    def build(cls, folder: Path, sizes: MarketSizes) -> "BenchMarket":
        """Simulate, prepare and publish; what is already there is taken as it is."""
        settings = market_settings(folder, sizes)
        workspace, stamp = Workspace.of(settings), _stamp(settings, sizes)
        note = workspace.root / "bench.json"
        if note.exists() and (known := json.loads(note.read_text()))["stamp"] == stamp:
            opened = [Bundle.open(workspace.bundles / name) for name in known["bundles"]]
            return cls(settings, sizes, (opened[0], opened[1]))
        if workspace.root.exists() and any(workspace.root.iterdir()):
            raise SystemExit(f"{folder} holds something else; give an empty folder or remove it")
        simulate(settings, workspace.log)
        check_log(workspace.log, workspace.clean, settings=settings, now=AS_OF + 1000 * HOUR)
        shutil.rmtree(workspace.log)
        prepare_features(settings, as_of=AS_OF + 2 * HOUR)
        materialize(settings, as_of=AS_OF)
        one = _publish(settings, sizes, seed=1, arms_of=None)
        two = _publish(settings, sizes, seed=2, arms_of=one)
        write_json(note, {"stamp": stamp, "bundles": [one.path.name, two.path.name]})
        return cls(settings, sizes, (one, two))

    def promote(self, bundle: Bundle, *, version: int) -> None:
        """Make a bundle champion, as ``Registry.promote`` tells the servers."""
        pointer = {
            "version": version,
            "fingerprint": bundle.fingerprint,
            "bundle": bundle.path.name,
            "promoted_at": format_time(AS_OF),
        }
        write_json(Workspace.of(self.settings).bundles / POINTER, pointer)

    def champion(self) -> str | None:
        """Fingerprint of the bundle that was promoted last."""
        pointer = read_champion(Workspace.of(self.settings).bundles)
        return None if pointer is None else pointer.fingerprint

    def serving(self, **changes: Any) -> DriftlineSettings:
        """The settings with other serving settings."""
        changed = self.settings.serving.model_dump() | changes
        raw = self.settings.model_dump() | {"serving": changed}
        return DriftlineSettings.model_validate(raw)

    def asked(self, num_ads: int, number: int, *, seed: int = 0) -> list["Asked"]:
        """So many page views of the log, each with ``num_ads`` ads drawn from the catalogue."""
        frame = read_frames(self.settings, Window(AS_OF, AS_OF + 2 * HOUR))
        random = np.random.default_rng([seed, num_ads])
        rows = random.integers(0, frame.num_rows, number)
        names = [feature.name for feature in self.settings.select(entity="impression")]
        views = frame.select(["page_product_id", *names]).take(rows).to_pylist()
        catalogue = np.unique(frame["ad_product_id"].to_numpy())
        asked = []
        for view in views:
            ads = random.choice(catalogue, num_ads, replace=len(catalogue) < num_ads)
            context = {name: view[name] for name in names}
            asked.append(Asked(view["page_product_id"], ads.tolist(), context))
        return asked


@dataclass(frozen=True)
class Asked:
    """One request."""

    page: int
    ads: list[int]
    context: dict[str, Any]

    @property
    def json(self) -> bytes:
        """Its body."""
        return orjson.dumps(
            {
                "page_product_id": self.page,
                "ad_product_ids": self.ads,
                "context": self.context,
            }
        )


@contextmanager
def bench_market(folder: Path | None, sizes: MarketSizes) -> Iterator[BenchMarket]:
    """A market in a folder that is kept, or in one that goes away."""
    import tempfile

    if folder is not None:
        yield BenchMarket.build(folder.resolve(), sizes)
        return
    with tempfile.TemporaryDirectory(prefix="driftline-benchmark-") as temporary:
        yield BenchMarket.build(Path(temporary).resolve(), sizes)


def _stamp(settings: DriftlineSettings, sizes: MarketSizes) -> str:
    facts = [settings.model_dump(mode="json"), asdict(sizes)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _publish(
    settings: DriftlineSettings, sizes: MarketSizes, *, seed: int, arms_of: Bundle | None
) -> Bundle:
    """A bundle of random weights; with the arms and vectors of another, as a head refresh does."""
    workspace = Workspace.of(settings)
    scratch = workspace.scratch / f"bench-{seed}"
    scratch.mkdir(parents=True, exist_ok=True)
    seen = Window(AS_OF - 6 * HOUR, AS_OF)
    tabular = TabularEncoder.fit(read_frames(settings, seen), head_columns(settings))
    texts = read_texts(settings).sort_by("text_id")
    strings = [serialise_row(row) for row in texts.drop_columns(["text_id"]).to_pylist()]
    tokenizer_path = scratch / "tokenizer.model"
    if arms_of is None:
        asked = TokenizerSettings(vocabulary_size=2_000)
        train_tokenizer(strings[:5_000], tokenizer_path, settings=asked, seed=0)
    else:
        shutil.copy(arms_of.path / "tokenizer.model", tokenizer_path)
    tokenizer = Tokenizer(tokenizer_path)
    encoder = encoder_spec(
        ConfigEncoder(
            num_layers=sizes.num_layers,
            hidden_size=sizes.vector_size,
            max_tokens=sizes.max_tokens,
        ),
        vocabulary_size=tokenizer.vocabulary_size,
    )
    head = make_head_spec(
        HeadSettings(hidden_sizes=sizes.hidden_sizes, category_embedding_size=8),
        vector_size=encoder.hidden_size,
        cardinalities=tabular.cardinalities,
        num_numbers=tabular.num_numbers,
    )
    torch.manual_seed(seed)
    student = build_model(TwinSpec(encoder=encoder, head=head))
    assert isinstance(student, TwinStudent)
    weights = {name: value.contiguous() for name, value in student.eval().state_dict().items()}
    for part in ("head", "arms"):
        own = {name: value for name, value in weights.items() if name.startswith(f"{part}.")}
        save_file(own, scratch / f"{part}.safetensors")
    arms, vectors = scratch / "arms.safetensors", scratch / "vectors.safetensors"
    if arms_of is None:
        page, ad = _encode(
            student.arms, encoder, tokenizer.encode(strings, max_tokens=encoder.max_tokens)
        )
        VectorCache(texts["text_id"].to_numpy(), page, ad).save(vectors)
    else:
        arms, vectors = arms_of.path / "arms.safetensors", arms_of.path / "vectors.safetensors"
    cache = VectorCache.load(vectors)
    only = HeadOnlySpec(head=head)
    return write_bundle(
        workspace.bundles,
        BundleParts(
            head=scratch / "head.safetensors",
            arms=arms,
            vectors=vectors,
            tokenizer=tokenizer_path,
            tabular=tabular,
            calibration=Calibration(keep_rate=0.25),
            student=student_json(only, encoder.model_dump(mode="json"), tie_arms=True),
            contract=bundle_contract(settings),
            lineage=lineage(
                settings,
                kind="arms" if arms_of is None else "head",
                as_of=AS_OF,
                window=seen,
                num_rows=0,
                teacher="none",
                arms="bench-1",
                parent=None if arms_of is None else arms_of.fingerprint,
            ),
            projected=Projected.of(
                load_head(only, scratch / "head.safetensors"), cache.page, cache.ad
            ),
        ),
    )


def _encode(
    arms: TextArms, encoder: EncoderSpec, tokens: Sequence[NDArray[Any]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of all texts as pages and as ads, texts of similar length together."""
    ragged = Ragged.of(tokens)
    order = np.argsort([len(row) for row in tokens], kind="stable")
    found = [np.empty((len(tokens), encoder.hidden_size), np.float32) for _ in (PAGE, AD)]
    with torch.inference_mode():
        for start in range(0, len(order), TEXTS_AT_ONCE):
            rows = order[start : start + TEXTS_AT_ONCE]
            for role in (PAGE, AD):
                ids, mask = frame_texts(encoder, ragged, rows, role=role)
                found[role][rows] = arms.encode(ids, mask, role).numpy()
    return found[PAGE], found[AD]
