"""Vectors that came after a bundle, against a bundle that had them from the beginning."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from driftline.platform.bundle import (
    HEAD,
    VECTORS,
    Bundle,
    BundleParts,
    Calibration,
    VectorCache,
    write_bundle,
)
from driftline.platform.columns import HeadColumn
from driftline.platform.errors import BundleError
from driftline.platform.fused_head import Projected
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import HeadOnlySpec, HeadSpec
from driftline.platform.scorer import Scorer, load_head, student_json
from driftline.platform.tabular import TabularEncoder
from driftline.platform.vector_deltas import (
    DeltaReader,
    VectorDelta,
    deltas_folder,
    grown_scorer,
    known_vectors,
    scorer_with_deltas,
)

WIDTH, NUM_TEXTS, NUM_OLD = 4, 40, 25
TEXTS = np.random.default_rng(0).choice(10**6, NUM_TEXTS, replace=False).astype(np.int64) + 1
PAGES, ADS = np.random.default_rng(1).normal(size=(2, NUM_TEXTS, WIDTH)).astype(np.float32)


def cache(places: Any) -> VectorCache:
    """Vectors of some of the texts."""
    order = np.array(places, int)[np.argsort(TEXTS[places])]
    return VectorCache(TEXTS[order], PAGES[order], ADS[order])


def make(folder: Path, places: Any, *, seed: int = 0, published: bool = True) -> Bundle:
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    frame = pa.table({"ad__clicks_1h": np.arange(9.0, dtype=np.float32)})
    tabular = TabularEncoder.fit(
        frame,
        [HeadColumn("ad__clicks_1h", "numeric", alias="ad", feature="clicks_1h", tier="short")],
    )
    spec = HeadOnlySpec(
        head=HeadSpec(
            vector_size=WIDTH,
            cardinalities=(),
            num_numbers=tabular.num_numbers,
            hidden_sizes=(8,),
        )
    )
    torch.manual_seed(seed)
    (parts / HEAD).unlink(missing_ok=True)
    save_file(build_model(spec).state_dict(), parts / HEAD)
    (parts / VECTORS).unlink(missing_ok=True)
    vectors = cache(places)
    vectors.save(parts / VECTORS)
    head = load_head(spec, parts / HEAD)
    return write_bundle(
        folder / "bundles",
        BundleParts(
            head=parts / HEAD,
            arms=None,
            vectors=parts / VECTORS,
            tokenizer=None,
            tabular=tabular,
            calibration=Calibration(0.25),
            student=student_json(spec, None, tie_arms=True),
            contract={"key_type": "int64"},
            lineage={"kind": "head"},
            projected=Projected.of(head, vectors.page, vectors.ad) if published else None,
        ),
    )


def table(seed: int = 3, num: int = 200) -> pa.Table:
    random = np.random.default_rng(seed)
    ids = np.append(TEXTS, [0, 7_000_000])
    return pa.table(
        {
            "ad__clicks_1h": random.normal(size=num).astype(np.float32),
            "page__text_id": random.choice(ids, num),
            "ad__text_id": random.choice(ids, num),
        }
    )


@pytest.mark.parametrize("published", [True, False])
def test_later_vectors_score_as_if_the_bundle_had_had_them(tmp_path: Path, published: bool) -> None:
    bundle = make(tmp_path / "few", range(NUM_OLD), published=published)
    whole = Scorer.of(make(tmp_path / "all", range(NUM_TEXTS)))
    own = Scorer.of(bundle)
    before = own.score(table())
    reader = DeltaReader(bundle)
    assert not reader.look()
    # Overlapping each other and the bundle: the first that came stays.
    for places in (range(20, 30), range(28, 33), range(33, NUM_TEXTS)):
        path = VectorDelta.of(own, cache(places)).write(bundle)
        assert reader.look()
        assert not reader.look()
    assert path.name == "000003.safetensors"
    grown = grown_scorer(own, bundle, reader.deltas)
    np.testing.assert_allclose(grown.score(table()), whole.score(table()), atol=1e-6)
    np.testing.assert_array_equal(scorer_with_deltas(bundle).score(table()), grown.score(table()))
    ids = np.append(TEXTS, [0, 5])
    assert (grown.vectors.rows(ids) >= 0).tolist() == [True] * NUM_TEXTS + [False] * 2
    part = grown.vectors.part(np.sort(ids))
    assert part.text_id.tolist() == np.sort(TEXTS).tolist()
    np.testing.assert_array_equal(part.page, cache(range(NUM_TEXTS)).page)
    np.testing.assert_array_equal(own.score(table()), before)  # what is held does not change
    known = known_vectors(bundle)
    assert known.text_id.tolist() == np.sort(TEXTS).tolist()
    np.testing.assert_array_equal(known.ad, cache(range(NUM_TEXTS)).ad)
    assert Bundle.open(bundle.path).fingerprint == bundle.fingerprint


def test_a_delta_of_another_bundle_is_refused_and_named(tmp_path: Path) -> None:
    bundle, other = (make(tmp_path, range(NUM_OLD), seed=seed) for seed in (0, 1))
    path = VectorDelta.of(Scorer.of(other), cache(range(30, 35))).write(other)
    with pytest.raises(BundleError, match=f"belongs to bundle {other.fingerprint}, whose arms"):
        VectorDelta.read(path, fingerprint=bundle.fingerprint)
    deltas_folder(bundle).mkdir()
    shutil.copy(path, deltas_folder(bundle))
    reader = DeltaReader(bundle)
    assert not reader.look()
    assert reader.deltas == ()
    good = VectorDelta.of(Scorer.of(bundle), cache(range(30, 35))).write(bundle)
    assert good.name == "000002.safetensors"
    assert reader.look()
    assert len(reader.deltas) == 1


def test_half_a_delta_or_an_altered_one_is_refused(tmp_path: Path) -> None:
    bundle = make(tmp_path, range(NUM_OLD))
    path = VectorDelta.of(Scorer.of(bundle), cache(range(30, 35))).write(bundle)
    content = path.read_bytes()
    for changed in (content[: len(content) // 2], b"", content[:-2] + b"\x01\x01"):
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=r"cannot be read|was altered"):
            VectorDelta.read(path, fingerprint=bundle.fingerprint)


@settings(max_examples=30)
@given(st.data())
def test_a_cache_with_a_directory_finds_the_same_rows(data: st.DataObject) -> None:
    ids = sorted(data.draw(st.sets(st.integers(1, 2**62), max_size=30)))
    asked = np.array([*data.draw(st.lists(st.integers(0, 2**62))), *ids], np.int64)
    vectors = np.zeros((len(ids), 2), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("driftline.platform.key_directory.WORTH_IT", 0)
        from driftline.platform.key_directory import KeyDirectory

        directory = KeyDirectory.of(np.array(ids, np.int64))
    plain = VectorCache(np.array(ids, np.int64), vectors, vectors)
    indexed = VectorCache(plain.text_id, vectors, vectors, directory=directory)
    assert indexed.rows(asked).tolist() == plain.rows(asked).tolist()


def test_a_bundle_of_very_many_texts_is_published_with_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Scorer.of(make(tmp_path / "plain", range(NUM_OLD)))
    monkeypatch.setattr("driftline.platform.key_directory.WORTH_IT", 10)
    bundle = make(tmp_path / "indexed", range(NUM_OLD))
    opened = Bundle.open(bundle.path)
    assert opened.vectors.directory is not None
    assert plain.vectors.directory is None
    np.testing.assert_array_equal(Scorer.of(opened).score(table()), plain.score(table()))


def test_texts_out_of_order_are_not_published(tmp_path: Path) -> None:
    made = make(tmp_path, range(NUM_OLD))
    vectors = VectorCache(TEXTS[:3], PAGES[:3], ADS[:3], trusted=True)
    assert not vectors.is_ascending()
    with pytest.raises(BundleError, match="one row for each ascending text_id"):
        VectorCache(TEXTS[:3], PAGES[:3], ADS[:3])
    (tmp_path / "parts" / VECTORS).unlink()
    vectors.save(tmp_path / "parts" / VECTORS)
    parts = BundleParts(
        head=tmp_path / "parts" / HEAD,
        arms=None,
        vectors=tmp_path / "parts" / VECTORS,
        tokenizer=None,
        tabular=made.tabular,
        calibration=Calibration(0.25),
        student=made.student,
        contract={},
        lineage={},
    )
    with pytest.raises(BundleError, match="the ids of its texts do not ascend"):
        write_bundle(tmp_path / "bundles", parts)
