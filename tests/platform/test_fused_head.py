"""The folded head answers as the head does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from driftline.platform.artefacts import map_tensors
from driftline.platform.errors import BundleError
from driftline.platform.fused_head import FusedHead, Projected
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import HeadOnlySpec, HeadSpec
from driftline.platform.models.student import HeadOnly

NUM_TEXTS = 7


def random_head(
    *, vector_size: int, cardinalities: tuple[int, ...], num_numbers: int, seed: int
) -> HeadOnly:
    torch.manual_seed(seed)
    spec = HeadSpec(
        vector_size=vector_size,
        cardinalities=cardinalities,
        num_numbers=num_numbers,
        hidden_sizes=(12, 5),
        category_embedding_size=3,
    )
    model = build_model(HeadOnlySpec(head=spec))
    assert isinstance(model, HeadOnly)
    torch.nn.init.normal_(model.head.neutral_page)
    torch.nn.init.normal_(model.head.neutral_ad)
    return model.eval()


@given(
    vector_size=st.sampled_from([0, 1, 8]),
    cardinalities=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    num_numbers=st.integers(0, 4),
    num_rows=st.integers(0, 9),
    one_page=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_folded_head_gives_the_logits_of_the_head(
    vector_size: int,
    cardinalities: tuple[int, ...],
    num_numbers: int,
    num_rows: int,
    one_page: bool,
    seed: int,
) -> None:
    if vector_size + len(cardinalities) + num_numbers == 0:
        num_numbers = 1
    model = random_head(
        vector_size=vector_size, cardinalities=cardinalities, num_numbers=num_numbers, seed=seed
    )
    random = np.random.default_rng(seed)
    page, ad = random.standard_normal((2, NUM_TEXTS, vector_size)).astype(np.float32)
    rows = random.integers(-1, NUM_TEXTS, (num_rows, 2))
    if one_page:
        rows[:, 0] = rows[:1, 0]
    categories = np.column_stack(
        [random.integers(0, size, num_rows) for size in cardinalities]
        or [np.empty((num_rows, 0), np.int64)]
    ).astype(np.int64)
    numbers = random.standard_normal((num_rows, num_numbers)).astype(np.float32)
    with torch.inference_mode():
        expected = model(
            torch.from_numpy(page[rows[:, 0]]),
            torch.from_numpy(ad[rows[:, 1]]),
            torch.from_numpy(rows < 0),
            torch.from_numpy(categories),
            torch.from_numpy(numbers),
        ).numpy()
    folded = FusedHead.of(model).logits(Projected.of(model, page, ad), rows, categories, numbers)
    np.testing.assert_allclose(folded, expected, atol=1e-5)


def test_mapped_tables_are_the_saved_ones(tmp_path: Path) -> None:
    model = random_head(vector_size=4, cardinalities=(), num_numbers=1, seed=1)
    vectors = np.random.default_rng(1).standard_normal((2, NUM_TEXTS, 4)).astype(np.float32)
    projected = Projected.of(model, *vectors)
    projected.save(tmp_path)
    mapped = Projected.open(tmp_path)
    assert isinstance(mapped.page.base, np.memmap)
    np.testing.assert_array_equal(mapped.page, projected.page)
    np.testing.assert_array_equal(mapped.ad, projected.ad)


def test_mapped_tensors_are_those_that_safetensors_loads(tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    tensors = {
        "text_id": np.arange(5),
        "page": np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32),
        "half": np.ones((2, 2), np.float16),
        "none": np.empty((0, 3), np.float32),
    }
    save_file(tensors, path)
    mapped, loaded = map_tensors(path), load_file(path)
    assert mapped.keys() == loaded.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(mapped[name], value)
        assert mapped[name].dtype == value.dtype
    with pytest.raises(ValueError, match="read-only"):
        mapped["page"][0, 0] = 1


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "vectors.safetensors"
    save_file({"page": np.ones((9, 9), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"vectors\.safetensors"):
        map_tensors(path)
