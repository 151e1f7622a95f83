"""A tiny simulated market with features, and bundles of random weights for it.

Everything is made by the real steps but the training: what a bundle answers is not the matter of
the tests that use it, only that it always answers the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
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
from driftline.platform.inputs import frame_texts
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import HeadOnlySpec, TwinSpec, encoder_spec, head_spec
from driftline.platform.models.student import AD, PAGE, TwinStudent
from driftline.platform.registry import POINTER
from driftline.platform.scorer import student_json
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

AS_OF = datetime(2026, 1, 2, 12, tzinfo=UTC)
"""Until when features are known and online."""


def tiny_settings(workspace: Path, **changes: Any) -> DriftlineSettings:
    """Settings of the market; ``changes`` replace whole sections."""
    features = [
        ("title", "text", "product", "long"),
        ("description", "text", "product", "long"),
        ("category", "categorical", "product", "medium"),
        ("advertiser", "categorical", "product", "medium"),
        ("application", "categorical", "impression", "medium"),
        ("hour_of_week", "categorical", "impression", "medium"),
        ("sales_1h", "numeric", "product", "short"),
        ("sales_24h", "numeric", "product", "short"),
    ]
    raw: dict[str, Any] = {
        "name": "tiny",
        "workspace": str(workspace),
        "source": {
            "kind": "simulate",
            "start": "2026-01-01T00:00:00Z",
            "num_days": 2,
            "impressions_per_day": 3_000,
            "num_products": 60,
            "new_products_per_day": 10,
            "num_categories": 4,
            "num_advertisers": 5,
            "ads_per_page": 5,
        },
        "features": [
            {"name": name, "kind": kind, "entity": entity, "tier": tier}
            for name, kind, entity, tier in features
        ],
        "counters": {"category": "category", "windows_hours": [1, 24]},
        "store": {"threads": 1, "memory_limit": "1GB"},
        "serving": {"clock": "snapshot", "poll_seconds": 0.1, "ingress": "proxy"},
    }
    return parse_settings(raw | changes, origin="test")


@dataclass(frozen=True)
class TinyMarket:
    """Settings of a market whose features are computed and online as of ``AS_OF``."""

    settings: DriftlineSettings

    @classmethod
    def make(cls, settings: DriftlineSettings) -> TinyMarket:
        """Simulate, check, compute features, bring them online."""
        workspace = Workspace.of(settings)
        simulate(settings, workspace.log)
        check_log(workspace.log, workspace.clean, settings=settings, now=AS_OF + 1000 * HOUR)
        prepare_features(settings, as_of=AS_OF + 2 * HOUR)
        materialize(settings, as_of=AS_OF)
        return cls(settings)

    def frame(self, num_hours: int = 1) -> pa.Table:
        """Offline rows of the hours after ``AS_OF``: what a server is asked then."""
        return read_frames(self.settings, Window(AS_OF, AS_OF + num_hours * HOUR))

    def bundle(
        self, *, seed: int, num_uncached: int = 0, kind: Literal["arms", "head"] = "arms"
    ) -> Bundle:
        """A bundle of random weights.

        Args:
            seed: Of the weights.
            num_uncached: So many of the texts have no vector in the cache.
            kind: Of the refresh that it says it comes from.
        """
        settings, scratch = self.settings, Workspace.of(self.settings).scratch / f"tiny-{seed}"
        scratch.mkdir(parents=True, exist_ok=True)
        seen = Window(AS_OF - 6 * HOUR, AS_OF)
        tabular = TabularEncoder.fit(read_frames(settings, seen), head_columns(settings))
        texts = read_texts(settings).sort_by("text_id")
        rows = texts.drop_columns(["text_id"]).to_pylist()
        strings = [serialise_row(row) for row in rows]
        tokenizer_path = scratch / "tokenizer.model"
        train_tokenizer(
            strings, tokenizer_path, settings=TokenizerSettings(vocabulary_size=400), seed=0
        )
        tokenizer = Tokenizer(tokenizer_path)
        encoder = encoder_spec(
            ConfigEncoder(num_layers=1, hidden_size=16, max_tokens=16),
            vocabulary_size=tokenizer.vocabulary_size,
        )
        head = head_spec(
            HeadSettings(hidden_sizes=(16,), category_embedding_size=4),
            vector_size=encoder.hidden_size,
            cardinalities=tabular.cardinalities,
            num_numbers=tabular.num_numbers,
        )
        torch.manual_seed(seed)
        student = build_model(TwinSpec(encoder=encoder, head=head))
        assert isinstance(student, TwinStudent)
        student.eval()
        weights = {name: value.contiguous() for name, value in student.state_dict().items()}
        for part in ("head", "arms"):
            own = {name: value for name, value in weights.items() if name.startswith(f"{part}.")}
            save_file(own, scratch / f"{part}.safetensors")
        tokens = Ragged.of(tokenizer.encode(strings, max_tokens=encoder.max_tokens))
        vectors = []
        with torch.inference_mode():
            for role in (PAGE, AD):
                ids, mask = frame_texts(encoder, tokens, np.arange(len(strings)), role=role)
                vectors.append(student.arms.encode(ids, mask, role).numpy())
        kept = slice(num_uncached, None)
        VectorCache(texts["text_id"].to_numpy()[kept], vectors[PAGE][kept], vectors[AD][kept]).save(
            scratch / "vectors.safetensors"
        )
        return write_bundle(
            Workspace.of(settings).bundles,
            BundleParts(
                head=scratch / "head.safetensors",
                arms=scratch / "arms.safetensors",
                vectors=scratch / "vectors.safetensors",
                tokenizer=tokenizer_path,
                tabular=tabular,
                calibration=Calibration(keep_rate=0.25),
                student=student_json(
                    HeadOnlySpec(head=head), encoder.model_dump(mode="json"), tie_arms=True
                ),
                contract=bundle_contract(settings),
                lineage=lineage(
                    settings,
                    kind=kind,
                    as_of=AS_OF,
                    window=seen,
                    num_rows=0,
                    teacher="none",
                    arms=f"tiny-{seed}",
                    parent=None,
                ),
            ),
        )

    def promote(self, bundle: Bundle, *, version: int = 1) -> None:
        """Make a bundle champion, as ``Registry.promote`` tells the servers."""
        bundles = Workspace.of(self.settings).bundles
        write_json(
            bundles / POINTER,
            {
                "version": version,
                "fingerprint": bundle.fingerprint,
                "bundle": bundle.path.name,
                "promoted_at": format_time(AS_OF),
            },
        )

    def requests(self, frame: pa.Table) -> list[Request]:
        """The rows of a frame as the requests that they were."""
        rows = frame.to_pylist()
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row["request_id"], []).append(place)
        names = [feature.name for feature in self.settings.select(entity="impression")]
        return [
            Request(
                page=rows[at[0]]["page_product_id"],
                ads=[rows[place]["ad_product_id"] for place in at],
                context={name: rows[at[0]][name] for name in names},
                time=rows[at[0]]["event_time"],
                rows=at,
            )
            for at in places.values()
        ]


@dataclass(frozen=True)
class Request:
    """One page and its ads, and where their rows stand in the frame."""

    page: int
    ads: list[int]
    context: dict[str, Any]
    time: datetime
    rows: list[int]
