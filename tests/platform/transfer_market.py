"""A log of a few requests, written by hand, for the tests of transfer sets."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from driftline.platform.contract import TIME
from driftline.platform.settings import TokenizerSettings
from driftline.platform.text import Tokenizer, train_tokenizer
from driftline.platform.transfer import TransferSource

CATEGORIES = ("toys", "books", "shoes")
WORDS = {
    "toys": ["red", "teddy", "bear", "soft", "small", "wooden", "train"],
    "books": ["novel", "paper", "history", "of", "the", "world", "illustrated"],
    "shoes": ["leather", "boot", "warm", "winter", "size", "brown", "sole"],
}
NUM_PRODUCTS = 30

MakeSource = Callable[..., TransferSource]


def write_tokenizer(path: Path) -> Tokenizer:
    sentences = [f"{a} {b} {c}" for w in WORDS.values() for a in w for b in w for c in w[:3]]
    train_tokenizer(sentences, path, settings=TokenizerSettings(vocabulary_size=380), seed=0)
    return Tokenizer(path)


def make_source(
    tokenizer: Tokenizer,
    *,
    num_requests: int = 60,
    seed: int = 0,
    named_requests: bool = True,
    with_text: bool = True,
    num_products: int = NUM_PRODUCTS,
) -> TransferSource:
    """Requests of one to six ads over two days; some texts, fields and numbers are missing."""
    random = np.random.default_rng(seed)
    categories = [CATEGORIES[n % 3] for n in range(num_products)]
    products = [f"p{n}" for n in range(num_products)]
    ids = np.sort(random.choice(10**9, size=num_products, replace=False)) + 1
    texts = pa.table(
        {
            "text_id": pa.array(ids, pa.int64()),
            "title": pa.array([_words(random, c, 2, 6) for c in categories], pa.string()),
            "about": pa.array(
                [None if random.random() < 0.2 else _words(random, c, 1, 9) for c in categories],
                pa.string(),
            ),
        }
    )
    rows = []
    for request in range(num_requests):
        time = int(random.integers(0, 2 * 86_400)) * 1_000_000
        page = int(random.integers(num_products) * random.random())
        for _ in range(int(random.integers(1, 7))):
            ad = int(random.integers(num_products))
            rows.append((time, request, page, ad))
    rows.sort()
    frame = pa.table(
        {
            "impression_id": [f"i{n:05d}" for n in range(len(rows))],
            "request_id": pa.array(
                [f"r{request}" if named_requests else None for _, request, _, _ in rows],
                pa.string(),
            ),
            "event_time": pa.array([time for time, *_ in rows], TIME),
            "page_product_id": [products[page] for *_, page, _ in rows],
            "ad_product_id": [products[ad] for *_, ad in rows],
            "clicked": random.random(len(rows)) < 0.3,
            "page__text_id": _text_ids(ids, [page for *_, page, _ in rows], with_text=with_text),
            "ad__text_id": _text_ids(ids, [ad for *_, ad in rows], with_text=with_text),
            "page__category": [categories[page] for *_, page, _ in rows],
            "ad__category": [categories[ad] for *_, ad in rows],
            "place": [["top", "side", None][int(random.integers(3))] for _ in rows],
            "ad__ctr_24h": pa.array(random.random(len(rows)), pa.float32()),
            "ad_category__ctr_24h": pa.array(random.random(len(rows)), pa.float32()),
            "page__sales": pa.array(
                random.exponential(size=len(rows)),
                pa.float32(),
                mask=random.random(len(rows)) < 0.2,
            ),
            "category_pair__ctr_24h": pa.array(
                [_pair_rate(categories[page], categories[ad]) for *_, page, ad in rows],
                pa.float32(),
            ),
        }
    )
    place = frame.schema.get_field_index("impression_id")
    field = pa.field("impression_id", pa.string(), nullable=False)
    frame = frame.set_column(place, field, frame["impression_id"].cast(pa.string()))
    return TransferSource(frame, texts, tokenizer)


def _pair_rate(page: str, ad: str) -> float:
    """A number that tells the pair of categories."""
    return CATEGORIES.index(page) + CATEGORIES.index(ad) / 10


def _words(random: np.random.Generator, category: str, low: int, high: int) -> str:
    return " ".join(random.choice(WORDS[category], size=int(random.integers(low, high))))


def _text_ids(ids: np.ndarray, places: list[int], *, with_text: bool) -> pa.Array:
    """Product 7 has no text."""
    if not with_text:
        return pa.nulls(len(places), pa.int64())
    return pa.array([None if place == 7 else int(ids[place]) for place in places], pa.int64())
