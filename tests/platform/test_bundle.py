"""A bundle is whole, known by its content, and refuses to be altered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from driftline.platform.bundle import (
    CALIBRATION,
    HEAD,
    MANIFEST,
    TABULAR,
    VECTORS,
    Bundle,
    BundleParts,
    Calibration,
    VectorCache,
    write_bundle,
)
from driftline.platform.columns import HeadColumn
from driftline.platform.errors import BundleError
from driftline.platform.metrics import prior_correct
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import HeadOnlySpec, HeadSpec
from driftline.platform.scorer import Scorer, student_json
from driftline.platform.tabular import TabularEncoder

COLUMNS = (
    HeadColumn("ad__category", "categorical", "medium", "category", "ad"),
    HeadColumn("ad__clicks_1h", "numeric", "short", "clicks_1h", "ad"),
)
TEXTS = np.array([3, 8, 21], np.int64)
WIDTH = 4


def rows(num: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "ad__category": random.choice(["a", "b", "new"], num),
            "ad__clicks_1h": random.integers(0, 50, num).astype(np.float32),
            "page__text_id": random.choice([3, 8, 21, 5, 0], num),
            "ad__text_id": pa.array(random.choice([3, 8, 21], num), mask=random.random(num) < 0.2),
        }
    )


def parts(folder: Path, **changes: Any) -> BundleParts:
    folder.mkdir(parents=True, exist_ok=True)
    tabular = TabularEncoder.fit(rows(50, 1), COLUMNS)
    spec = HeadOnlySpec(
        head=HeadSpec(
            vector_size=WIDTH,
            cardinalities=tabular.cardinalities,
            num_numbers=tabular.num_numbers,
            hidden_sizes=(8,),
        )
    )
    torch.manual_seed(0)
    save_file(build_model(spec).state_dict(), folder / HEAD)
    random = np.random.default_rng(0)
    page, ad = (random.normal(size=(3, WIDTH)).astype(np.float32) for _ in range(2))
    VectorCache(TEXTS, page, ad).save(folder / VECTORS)
    values: dict[str, Any] = {
        "head": folder / HEAD,
        "arms": None,
        "vectors": folder / VECTORS,
        "tokenizer": None,
        "tabular": tabular,
        "calibration": Calibration(0.25, 0.9, 0.1),
        "student": student_json(spec, None, tie_arms=True),
        "contract": {"key_type": "string"},
        "lineage": {"kind": "head", "as_of": "2026-01-01T00:00:00Z"},
    }
    return BundleParts(**values | changes)


def test_the_same_parts_give_the_same_bundle(tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "one", parts(tmp_path / "p1"))
    second = write_bundle(tmp_path / "two", parts(tmp_path / "p2"))
    assert first.fingerprint == second.fingerprint == first.path.name
    again = write_bundle(tmp_path / "one", parts(tmp_path / "p1"))
    assert again.path == first.path
    assert [path.name for path in (tmp_path / "one").iterdir()] == [first.fingerprint]


@pytest.mark.parametrize(
    "changes",
    [
        {"calibration": Calibration(0.25, 0.9, 0.2)},
        {"lineage": {"kind": "head", "as_of": "2026-01-01T01:00:00Z"}},
        {"contract": {"key_type": "int64"}},
    ],
)
def test_any_change_gives_another_bundle(tmp_path: Path, changes: dict[str, Any]) -> None:
    first = write_bundle(tmp_path, parts(tmp_path / "p1"))
    assert write_bundle(tmp_path, parts(tmp_path / "p1", **changes)).path != first.path


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink()  # parts are hard links: change this copy alone
    path.write_bytes(content)


def _lie(path: Path) -> None:
    raw = json.loads(path.read_text())
    raw["lineage"]["as_of"] = "2030-01-01T00:00:00Z"
    path.write_text(json.dumps(raw))


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (HEAD, _flip, "head.safetensors was altered"),
    (VECTORS, _flip, "vectors.safetensors was altered"),
    (TABULAR, lambda path: path.write_text("{}"), "tabular.json was altered"),
    (CALIBRATION, Path.unlink, "calibration.json is missing"),
    (MANIFEST, _lie, "manifest was altered"),
    (MANIFEST, Path.unlink, "has no manifest.json"),
    (MANIFEST, lambda path: path.write_text("{"), "is not JSON"),
    (MANIFEST, lambda path: path.write_text('{"format": 99}'), "format must be 1, got 99"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGE, ids=[m for _, _, m in DAMAGE])
def test_a_damaged_bundle_is_refused_with_the_reason(
    tmp_path: Path, name: str, harm: Callable[[Path], object], message: str
) -> None:
    bundle = write_bundle(tmp_path / "bundles", parts(tmp_path / "parts"))
    harm(bundle.path / name)
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle.path)


def test_rows_of_unknown_texts_are_minus_one() -> None:
    vectors = np.zeros((3, 2), np.float32)
    cache = VectorCache(TEXTS, vectors, vectors)
    assert cache.rows(np.array([8, 5, 3, 99, 0, 21])).tolist() == [1, -1, 0, -1, -1, 2]
    empty = VectorCache(TEXTS[:0], vectors[:0], vectors[:0])
    assert empty.rows(np.array([8, 0])).tolist() == [-1, -1]


def test_merged_caches_keep_every_vector() -> None:
    left, right = np.arange(6, dtype=np.float32).reshape(3, 2), np.full((2, 2), 9, np.float32)
    merged = VectorCache(TEXTS, left, left).merged(VectorCache(np.array([1, 10]), right, right))
    assert merged.text_id.tolist() == [1, 3, 8, 10, 21]
    np.testing.assert_array_equal(merged.page[merged.rows(TEXTS)], left)


def test_a_cache_with_a_row_too_few_is_refused() -> None:
    with pytest.raises(BundleError, match="one row for each ascending text_id"):
        VectorCache(TEXTS, np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32))


@given(keep_rate=st.floats(0.01, 1), logit=st.floats(-8, 8))
def test_calibration_undoes_thinning_exactly(keep_rate: float, logit: float) -> None:
    """Slope 1 and intercept 0 leave the published correction, q / (q + (1 - q) / w)."""
    thinned = 1 / (1 + np.exp(-logit))
    (found,) = Calibration(keep_rate).probabilities(np.array([logit]))
    (expected,) = prior_correct([thinned], keep_rate=keep_rate)
    assert found == pytest.approx(expected, rel=1e-9)


@given(num=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_saved_bundle_scores_as_before_and_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, num: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    bundle = write_bundle(folder, parts(folder / "parts"))
    table = rows(num, seed)
    together = Scorer.of(Bundle.open(bundle.path)).score(table)
    assert ((together > 0) & (together < 1)).all()
    scorer = Scorer.of(bundle)
    alone = [scorer.score(table.slice(row, 1))[0] for row in range(num)]
    np.testing.assert_allclose(alone, together, rtol=1e-5)
    arrays = {name: table[name].combine_chunks() for name in table.column_names}
    np.testing.assert_array_equal(scorer.score(arrays), together)
