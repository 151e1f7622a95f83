"""Every kind of transfer set on a small log with gaps in it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.platform.transfer_market import CATEGORIES, make_source, write_tokenizer

from driftline.platform.errors import ContractError, EmptyWindowError, SettingsError
from driftline.platform.text import Tokenizer
from driftline.platform.transfer import (
    Natural,
    TransferRows,
    TransferSet,
    TransferSource,
)
from driftline.platform.transfer.distributions import transfer_distributions
from driftline.platform.transfer.rows import column_groups
from driftline.platform.transfer.samples import with_replacement
from driftline.platform.transfer.similarity import corpus_similarity, frame_words

MakeSource = Callable[..., TransferSource]
SMALL = {"kind": "natural", "share": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "natural": {},
    "sampled": SMALL,
    "other_domain": {
        "kind": "other_domain",
        "columns": ["page__category", "ad__category"],
        "values": ["toys"],
    },
    "shuffled": {},
    "generated": {},
    "permuted_columns": {"of": SMALL},
    "permuted_groups": {"kind": "permuted_columns", "by": "group"},
    "generated_rows": {},
    "re_paired": {"category": "category", "within_hours": 12},
    "bootstrap": {"of": SMALL, "times": 4},
    "augmented": {"steps": [{"kind": "short_disorder"}, {"kind": "delete", "chance": 0.3}]},
    "augmented_too": {"kind": "augmented", "steps": ["mask"], "keep_original": True},
    "hybrid": {
        "parts": [
            {"share": 0.5, "of": "natural"},
            {"share": 0.3, "of": "shuffled"},
            {"share": 0.2, "of": "generated_rows"},
        ]
    },
}
NATURAL_KINDS = ("natural", "sampled", "other_domain", "bootstrap")
SIZE_MATCHED = ("shuffled", "permuted_columns", "re_paired")
"""Of the same rows and tokens as the set they are made of, exactly."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer) -> TransferSource:
    return make_source(tokenizer)


def transfer_set(name: str, **changes: Any) -> TransferSet:
    return TransferSet.parse({"kind": name} | KINDS.get(name, {}) | changes)


def build(name: str, source: TransferSource, *, seed: int = 0, **changes: Any) -> TransferRows:
    return transfer_set(name, **changes).build(source, seed=seed)


def multiset(column: pa.ChunkedArray) -> Counter[Any]:
    return Counter(column.to_pylist())


def fields(rows: TransferRows | TransferSource) -> dict[int, dict[str, str | None]]:
    return {row.pop("text_id"): row for row in rows.texts.to_pylist()}


def requests(frame: pa.Table) -> set[str]:
    return set(frame["request_id"].to_pylist())


# --- what all kinds have in common --------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_rows_in_the_form_of_the_source(name: str, source: TransferSource) -> None:
    before = source.frame.to_pylist(), source.texts.to_pylist()
    rows = build(name, source)
    assert (source.frame.to_pylist(), source.texts.to_pylist()) == before
    rows.frame.validate(full=True)
    assert rows.frame.schema.equals(source.frame.schema)
    times = rows.frame["event_time"].cast(pa.int64()).to_numpy()
    assert (np.diff(times) >= 0).all()
    assert pc.count_distinct(rows.frame["impression_id"]).as_py() == rows.frame.num_rows
    ids = rows.texts["text_id"].to_numpy()
    assert (ids > 0).all()
    assert (np.diff(ids) > 0).all()
    assert rows.texts.schema.equals(source.texts.schema)
    for role in ("page", "ad"):
        assert set(rows.frame[f"{role}__text_id"].drop_null().to_pylist()) <= set(ids.tolist())
    assert len(rows.made_up) == rows.frame.num_rows
    assert rows.has_clicks == (not rows.made_up.any()) == (name in NATURAL_KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_decided_by_its_seed(name: str, source: TransferSource) -> None:
    first, again, other = (build(name, source, seed=seed) for seed in (1, 1, 2))
    assert first.frame.equals(again.frame)
    assert first.texts.equals(again.texts)
    assert first.provenance == again.provenance
    is_random = name not in ("natural", "other_domain")
    assert (first.provenance["content"] != other.provenance["content"]) == is_random


@pytest.mark.parametrize("name", KINDS)
def test_every_provenance_tells_its_story_in_plain_values(
    name: str, source: TransferSource, tokenizer: Tokenizer
) -> None:
    rows = build(name, source, seed=5)
    told = json.loads(json.dumps(rows.provenance))
    assert told == rows.provenance
    assert told["settings"] == json.loads(transfer_set(name).model_dump_json())
    assert TransferSet.parse(told["settings"]) == transfer_set(name)
    assert (told["kind"], told["seed"]) == (transfer_set(name).kind, 5)
    texts = fields(rows)
    ids = [
        text
        for role in ("page", "ad")
        for text in rows.frame[f"{role}__text_id"].to_pylist()
        if text is not None
    ]
    used = [texts[text] for text in ids]
    values = [value for text in used for value in text.values() if value is not None]
    num_tokens = sum(len(row) for row in tokenizer.encode(values, max_tokens=999))
    assert told["num_rows"] == rows.frame.num_rows
    assert told["num_texts"] == len(set(ids))
    assert told["num_tokens"] == num_tokens
    assert told["mean_tokens"] == pytest.approx(num_tokens / len(used))
    assert told["text_bytes"] == sum(len(value.encode()) for value in values)
    assert told["share_made_up"] == pytest.approx(rows.made_up.mean())
    words = [frame_words(side.frame, side.texts) for side in (rows, source)]
    assert told["similarity_to_source"] == pytest.approx(corpus_similarity(*words))
    assert told["source"]["num_rows"] == source.frame.num_rows
    assert told["source"]["span"][0] == source.frame["event_time"][0].as_py().isoformat()


@pytest.mark.parametrize("name", KINDS)
def test_a_log_that_names_no_requests_and_has_no_text_will_do_where_text_is_not_the_point(
    name: str, tokenizer: Tokenizer
) -> None:
    bare = make_source(tokenizer, num_requests=30, named_requests=False, with_text=False)
    if transfer_set(name).kind in ("shuffled", "generated", "augmented", "hybrid"):
        with pytest.raises(SettingsError, match="no row has a text to rewrite"):
            build(name, bare)
        return
    rows = build(name, bare)
    assert rows.provenance["num_tokens"] == 0
    assert rows.provenance["similarity_to_source"] is None
    known = set(bare.frame["impression_id"].to_pylist())
    assert {request or "" for request in requests(rows.frame)} <= known | {""}


def test_made_up_rows_stay_in_the_request_and_keep_the_click_they_come_from(
    source: TransferSource,
) -> None:
    clicks = dict(
        zip(source.frame["impression_id"].to_pylist(), source.frame.to_pylist(), strict=True)
    )
    for name in ("shuffled", "generated_rows", "re_paired", "permuted_columns"):
        for row in build(name, source).frame.to_pylist():
            origin = clicks[row["impression_id"].partition("~")[0]]
            same = ("request_id", "event_time", "clicked")
            assert [row[key] for key in same] == [origin[key] for key in same]


def test_an_unchanged_source_is_passed_on_without_a_copy(source: TransferSource) -> None:
    rows = build("natural", source)
    assert rows.frame is source.frame
    assert rows.texts is source.texts
    assert rows.provenance["similarity_to_source"] == 1


# --- sizes --------------------------------------------------------------------------------


@hypothesis_settings(max_examples=25)
@given(
    share=st.floats(0.001, 1),
    seed=st.integers(0, 99),
    mode=st.sampled_from(["nested", "independent"]),
)
def test_a_sample_is_made_of_whole_requests_and_has_the_size_asked_for(
    source: TransferSource, share: float, seed: int, mode: str
) -> None:
    rows = build("natural", source, seed=seed, share=share, sampling=mode)
    rest = pa.array(requests(source.frame) - requests(rows.frame), pa.string())
    left = source.frame.filter(pc.is_in(source.frame["request_id"], rest))
    assert rows.frame.num_rows + left.num_rows == source.frame.num_rows
    wanted = max(1, round(share * source.frame.num_rows))
    assert abs(rows.frame.num_rows - wanted) <= 5  # a request has at most six rows


@hypothesis_settings(max_examples=25)
@given(shares=st.lists(st.floats(0.001, 1), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_nested_samples_are_nested(source: TransferSource, shares: list[float], seed: int) -> None:
    small, large = (
        build("natural", source, seed=seed, share=share, sampling="nested").frame
        for share in sorted(shares)
    )
    assert requests(small) <= requests(large)


def test_independent_samples_are_drawn_anew_for_each_size(source: TransferSource) -> None:
    small, large = (
        requests(build("natural", source, seed=1, share=share).frame) for share in (0.3, 0.5)
    )
    assert not small <= large


def test_a_sample_does_not_depend_on_the_order_of_the_rows(source: TransferSource) -> None:
    moved = TransferSource(
        source.frame.take(pa.array(np.random.default_rng(0).permutation(source.frame.num_rows))),
        source.texts,
        source.tokenizer,
    )
    assert (
        build("sampled", moved)
        .frame.sort_by("impression_id")
        .equals(build("sampled", source).frame.sort_by("impression_id"))
    )


def test_every_request_is_as_likely_to_be_drawn(source: TransferSource) -> None:
    drawn = Counter[str]()
    for seed in range(200):
        drawn.update(requests(build("natural", source, seed=seed, share=0.5).frame))
    assert len(drawn) == len(requests(source.frame))
    assert min(drawn.values()) > 60  # of 100 expected, five deviations are 35
    assert max(drawn.values()) < 140


def test_a_number_of_rows_is_met_exactly_where_requests_are_single_rows(
    tokenizer: Tokenizer,
) -> None:
    single = make_source(tokenizer, num_requests=30, named_requests=False)
    assert build("natural", single, num_rows=17).frame.num_rows == 17


@pytest.mark.parametrize("name", SIZE_MATCHED)
def test_a_composition_has_the_rows_and_tokens_of_the_natural_sample(  # papers.md table 5.4
    name: str, source: TransferSource
) -> None:
    sample = {"kind": "natural", "share": 0.4}
    natural = build("natural", source, seed=3, share=0.4)
    other = build(name, source, seed=3, of=sample)
    assert requests(other.frame) == requests(natural.frame)
    for count in ("num_rows", "num_tokens", "text_bytes"):
        assert other.provenance[count] == natural.provenance[count]


# --- token level --------------------------------------------------------------------------


def test_a_shuffled_text_has_the_same_tokens_in_every_field(
    source: TransferSource, tokenizer: Tokenizer
) -> None:
    rows = build("shuffled", source)
    before, after = fields(source), fields(rows)
    moved = 0
    old_rows = source.frame.to_pylist()
    for old_row, new_row in zip(old_rows, rows.frame.to_pylist(), strict=True):
        for role in ("page__text_id", "ad__text_id"):
            if old_row[role] is None:
                assert new_row[role] is None
                continue
            old, new = before[old_row[role]], after[new_row[role]]
            for name in ("title", "about"):
                assert (old[name] is None) == (new[name] is None)
                pair = [[f"{name}: {text[name] or ''}"] for text in (old, new)]
                tokens = [tokenizer.encode(text, max_tokens=999)[0].tolist() for text in pair]
                assert sorted(tokens[0]) == sorted(tokens[1])
                moved += tokens[0] != tokens[1]
        unchanged = [key for key in old_row if not key.endswith(("text_id", "impression_id"))]
        assert [old_row[key] for key in unchanged] == [new_row[key] for key in unchanged]
    assert moved > len(old_rows)


WORD = st.text("abcdefgäßé0123456789.,-!&%€", min_size=1, max_size=8)


@given(words=st.lists(WORD, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_words_in_another_order_are_the_same_tokens_in_another_order(
    tokenizer: Tokenizer, words: list[str], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(words))
    texts = [" ".join(words), " ".join(words[place] for place in order)]
    first, second = tokenizer.encode(texts, max_tokens=999)
    assert sorted(first.tolist()) == sorted(second.tolist())


def test_a_text_without_spaces_is_shuffled_by_characters(
    source: TransferSource, tokenizer: Tokenizer
) -> None:
    titles = [f"柔らかい木製の電車{n}" for n in range(source.texts.num_rows)]
    texts = source.texts.set_column(1, "title", pa.array(titles))
    unspaced = TransferSource(source.frame, texts, tokenizer)
    by_word = fields(build("shuffled", unspaced))
    assert {text["title"] for text in by_word.values()} <= set(titles)
    by_character = [
        text["title"] for text in fields(build("shuffled", unspaced, unit="character")).values()
    ]
    assert not set(by_character) & set(titles)
    assert {"".join(sorted(t or "")) for t in by_character} <= {"".join(sorted(t)) for t in titles}


def test_generated_texts_keep_the_words_of_their_field_and_nothing_else(
    tokenizer: Tokenizer,
) -> None:
    large = make_source(tokenizer, num_products=1500, num_requests=1500)
    rows = build("generated", large)
    assert rows.provenance["num_texts"] == pytest.approx(1470, abs=60)  # some come twice
    lengths = [
        transfer_distributions(part, tokenizer).lengths for part in (build("natural", large), rows)
    ]
    at = np.arange(60)
    gap = np.abs(lengths[0].share_below(at) - lengths[1].share_below(at)).max()
    assert gap < 0.08
    natural_tokens = build("natural", large).provenance["num_tokens"]
    assert rows.provenance["num_tokens"] == pytest.approx(natural_tokens, rel=0.05)
    words = [frame_words(side.frame, side.texts) for side in (large, rows)]
    shares = [{word: count / w.total() for word, count in w.items()} for w in words]
    assert sum(abs(shares[0][word] - shares[1][word]) for word in words[0]) / 2 < 0.05
    mixed = 0
    for text in fields(rows).values():
        title = set((text["title"] or "").split())
        mixed += len(title & {"red", "soft"}) > 0 and len(title & {"boot", "novel"}) > 0
    assert mixed > 50  # natural titles never mix categories


# --- row level ----------------------------------------------------------------------------


@hypothesis_settings(max_examples=15)
@given(seed=st.integers(0, 999), by=st.sampled_from(["column", "group"]))
def test_permuting_keeps_every_column_as_it_is_by_itself(
    source: TransferSource, seed: int, by: str
) -> None:
    rows = build("permuted_columns", source, seed=seed, of="natural", by=by)
    for name in source.frame.column_names:
        if name != "impression_id":
            assert multiset(rows.frame[name]) == multiset(source.frame[name])


def test_permuting_by_column_parts_what_permuting_by_group_keeps_together(
    source: TransferSource,
) -> None:
    def together(rows: TransferRows, names: tuple[str, ...]) -> float:
        logged = set(zip(*(source.frame[name].to_pylist() for name in names), strict=True))
        pairs = list(zip(*(rows.frame[name].to_pylist() for name in names), strict=True))
        return sum(pair in logged for pair in pairs) / len(pairs)

    by_column = build("permuted_columns", source, of="natural")
    by_group = build("permuted_groups", source)
    for names in column_groups(source.frame).values():
        if len(names) > 1:
            assert together(by_group, names) == 1
            assert together(by_column, names) < 0.5
    assert together(by_group, ("page_product_id", "ad_product_id", "place")) < 0.5


def test_every_feature_belongs_to_one_group(source: TransferSource) -> None:
    assert column_groups(source.frame) == {
        "page": ("page_product_id", "page__text_id", "page__category", "page__sales"),
        "ad": (
            "ad_product_id",
            "ad__text_id",
            "ad__category",
            "ad__ctr_24h",
            "ad_category__ctr_24h",
        ),
        "pair": ("category_pair__ctr_24h",),
        "context": ("place",),
    }


def test_drawn_columns_approach_their_marginals_with_the_number_of_rows(
    tokenizer: Tokenizer,
) -> None:
    def distances(num_requests: int) -> list[float]:
        large = make_source(tokenizer, num_requests=num_requests)
        rows = build("generated_rows", large)
        found = []
        for name in ("ad__category", "place", "page__text_id"):
            counts = [multiset(t[name]) for t in (large.frame, rows.frame)]
            if name == "page__text_id":  # other texts, as often
                counts = [Counter(dict(enumerate(sorted(c.values())))) for c in counts]
            keys = {*counts[0], *counts[1]}
            found.append(
                sum(abs(counts[0][k] - counts[1][k]) for k in keys) / 2 / len(rows.made_up)
            )
        for name in ("ad__ctr_24h", "page__sales"):
            samples = [np.sort(t[name].drop_null().to_numpy()) for t in (large.frame, rows.frame)]
            at = np.union1d(*samples)
            shares = [np.searchsorted(s, at, side="right") / len(s) for s in samples]
            found.append(float(np.abs(shares[0] - shares[1]).max()))
            nulls = [t[name].null_count / t.num_rows for t in (large.frame, rows.frame)]
            found.append(abs(nulls[0] - nulls[1]))
        return found

    small, large = distances(60), distances(3000)
    assert max(large) < 0.04
    assert sum(large) < sum(small)


def test_drawn_columns_are_independent(tokenizer: Tokenizer) -> None:
    rows = build("generated_rows", make_source(tokenizer, num_requests=1500))
    joint = Counter(
        zip(
            rows.frame["page__category"].to_pylist(),
            rows.frame["ad__category"].to_pylist(),
            strict=True,
        )
    )
    for (page, ad), count in joint.items():
        expected = (
            multiset(rows.frame["page__category"])[page]
            * multiset(rows.frame["ad__category"])[ad]
            / rows.frame.num_rows
        )
        assert count == pytest.approx(expected, abs=6 * expected**0.5)
    products = zip(
        rows.frame["ad_product_id"].to_pylist(), rows.frame["ad__category"].to_pylist(), strict=True
    )
    logged = {f"p{n}": CATEGORIES[n % 3] for n in range(30)}
    assert sum(logged[product] == category for product, category in products) < 0.5 * len(
        rows.made_up
    )


@hypothesis_settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_an_ad_travels_with_all_that_is_its_own(source: TransferSource, seed: int) -> None:
    rows = build("re_paired", source, seed=seed, within_hours=None)
    groups = column_groups(source.frame)
    fixed = ["event_time", "request_id", *groups["page"], *groups["context"]]
    assert rows.frame.select(fixed).equals(source.frame.select(fixed))
    ads = [
        Counter(map(str, t.select(groups["ad"]).to_pylist())) for t in (source.frame, rows.frame)
    ]
    assert ads[0] == ads[1]
    moved = pc.not_equal(rows.frame["ad_product_id"], source.frame["ad_product_id"])
    assert pc.mean(moved).as_py() > 0.8
    for row in rows.frame.to_pylist():  # the rate tells the pair of categories
        page, ad = CATEGORIES.index(row["page__category"]), CATEGORIES.index(row["ad__category"])
        assert row["category_pair__ctr_24h"] == pytest.approx(page + ad / 10)


def test_pair_counters_come_from_the_last_row_of_the_pair_or_the_next(
    source: TransferSource,
) -> None:
    logged = source.frame.to_pylist()
    numbered = pa.array(np.arange(len(logged)), pa.float32())
    place = source.frame.schema.get_field_index("category_pair__ctr_24h")
    frame = source.frame.set_column(place, "category_pair__ctr_24h", numbered)
    rows = build("re_paired", TransferSource(frame, source.texts, source.tokenizer))
    for row in rows.frame.to_pylist():
        pair = [
            n
            for n, other in enumerate(logged)
            if all(other[f"{r}__category"] == row[f"{r}__category"] for r in ("page", "ad"))
        ]
        before = [n for n in pair if logged[n]["event_time"] <= row["event_time"]]
        lender = logged[int(row["category_pair__ctr_24h"])]
        expected = logged[max(before) if before else min(pair)]
        assert lender["event_time"] == expected["event_time"]
        assert [lender[f"{r}__category"] for r in ("page", "ad")] == [
            row[f"{r}__category"] for r in ("page", "ad")
        ]


def test_pair_counters_are_missing_where_the_pair_is_not_known(source: TransferSource) -> None:
    rows = build("re_paired", source, category=None)
    assert rows.frame["category_pair__ctr_24h"].null_count == rows.frame.num_rows
    toys = pc.equal(source.frame["page__category"], "toys")
    shoes = pc.equal(source.frame["ad__category"], "shoes")
    never = source.frame.filter(pc.invert(pc.and_(toys, shoes)))
    rows = build("re_paired", TransferSource(never, source.texts, source.tokenizer))
    for row in rows.frame.to_pylist():
        unseen = (row["page__category"], row["ad__category"]) == ("toys", "shoes")
        assert (row["category_pair__ctr_24h"] is None) == unseen


def test_ads_are_exchanged_within_their_hours_only(source: TransferSource) -> None:
    rows = build("re_paired", source, within_hours=3)
    old, new = (
        Counter(
            zip(
                (t["event_time"].cast(pa.int64()).to_numpy() // (3 * 3_600_000_000)).tolist(),
                t["ad_product_id"].to_pylist(),
                strict=True,
            )
        )
        for t in (source.frame, rows.frame)
    )
    assert old == new
    assert not rows.frame["ad_product_id"].equals(source.frame["ad_product_id"])


# --- mixtures -----------------------------------------------------------------------------


@hypothesis_settings(max_examples=20)
@given(parts=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_a_mixture_counts_right_and_uses_every_request_once(
    source: TransferSource, parts: list[int], seed: int
) -> None:
    kinds = ["natural", "shuffled", "permuted_columns", "generated"]
    shares = [part / sum(parts) for part in parts]
    raw = [{"share": s, "of": {"kind": k}} for s, k in zip(shares, kinds, strict=False)]
    rows = build("hybrid", source, seed=seed, parts=raw)
    assert rows.frame.num_rows == source.frame.num_rows
    origins = [name.partition("~")[0] for name in rows.frame["impression_id"].to_pylist()]
    assert sorted(origins) == sorted(source.frame["impression_id"].to_pylist())
    tags = Counter(name.partition("~")[2] for name in rows.frame["impression_id"].to_pylist())
    counted = [tags["" if kind == "natural" else kind] for kind in kinds[: len(parts)]]
    assert counted == rows.provenance["num_rows_of_parts"]
    for share, count in zip(shares, counted, strict=True):
        assert abs(count - share * source.frame.num_rows) <= 5 * len(parts)
    assert rows.made_up.sum() == rows.frame.num_rows - counted[0]
    by_request: dict[str, set[str]] = {}
    for row in rows.frame.to_pylist():
        tag = row["impression_id"].partition("~")[2]
        by_request.setdefault(row["request_id"], set()).add(tag)
    assert all(len(tags) == 1 for tags in by_request.values())


def test_a_mixture_with_another_domain_is_extra_data_for_the_teacher(  # papers.md S2.14
    source: TransferSource,
) -> None:
    domain = {"kind": "other_domain", "columns": ["ad__category"], "values": ["toys"]}
    own = domain | {"inside": True}
    parts = [{"share": 0.5, "of": own}, {"share": 0.5, "of": domain}]
    rows = build("hybrid", source, parts=parts, num_rows=100)
    toys = rows.frame["ad__category"].to_pylist().count("toys")
    assert rows.has_clicks
    assert toys == rows.provenance["num_rows_of_parts"][0]
    assert abs(toys - 50) <= 5
    assert abs(rows.frame.num_rows - 100) <= 5


def test_a_bootstrap_draws_whole_requests_again_and_again(source: TransferSource) -> None:
    small = build("sampled", source, seed=4)
    rows = build("bootstrap", source, seed=4)
    assert abs(rows.frame.num_rows - 4 * small.frame.num_rows) <= 5
    assert requests(rows.frame) <= requests(small.frame)
    sizes = multiset(source.frame["request_id"])
    for request, count in multiset(rows.frame["request_id"]).items():
        assert count % sizes[request] == 0
    logged = {row["impression_id"]: row for row in source.frame.to_pylist()}
    for row in rows.frame.to_pylist():
        assert row | {"impression_id": ""} == logged[row["impression_id"].partition("#")[0]] | {
            "impression_id": ""
        }


def test_every_request_is_as_likely_to_be_drawn_again(source: TransferSource) -> None:
    drawn = with_replacement(source.frame, 100_000, key=("test", 1))
    names = source.frame["request_id"].to_pylist()
    sizes = multiset(source.frame["request_id"])
    counts = Counter(names[row] for row in drawn)
    times = [counts[request] / size for request, size in sizes.items()]
    expected = 100_000 / source.frame.num_rows
    assert all(abs(time - expected) < 5 * expected**0.5 for time in times)


def test_augmented_rows_stand_beside_the_originals_or_in_their_place(
    source: TransferSource,
) -> None:
    rows = build("augmented_too", source)
    assert rows.frame.num_rows == 2 * source.frame.num_rows
    assert rows.made_up.mean() == 0.5
    kept = rows.frame.filter(pa.array(~rows.made_up))
    assert kept.equals(source.frame)
    assert set(fields(source)) >= {t for t in kept["ad__text_id"].to_pylist() if t is not None}
    changed = build("augmented", source, steps=[{"kind": "mask", "chance": 1, "word": "x"}])
    assert {w for t in fields(changed).values() for v in t.values() for w in (v or "").split()} == {
        "x"
    }


def test_sets_are_made_of_sets(source: TransferSource) -> None:
    domain = {"kind": "other_domain", "period": [0, 0.5], "num_rows": 40}
    rows = build("shuffled", source, of={"kind": "bootstrap", "of": domain, "times": 2})
    assert abs(rows.frame.num_rows - 80) <= 15
    assert rows.provenance["num_domain_rows"] == pytest.approx(source.frame.num_rows / 2, rel=0.2)
    assert rows.provenance["settings"]["of"]["of"]["num_rows"] == 40
    shares = [r.partition("~")[2] for r in rows.frame["impression_id"].to_pylist()]
    assert set(shares) == {"shuffled"}


# --- domains ------------------------------------------------------------------------------


def test_a_domain_is_chosen_by_categories_and_cut_to_size_afterwards(
    source: TransferSource,
) -> None:
    outside = build("other_domain", source).frame
    inside = build("other_domain", source, inside=True).frame
    for frame, is_toy in ((outside, False), (inside, True)):
        for role in ("page", "ad"):
            found = set(frame[f"{role}__category"].to_pylist())
            assert found == ({"toys"} if is_toy else {"books", "shoes"})
    small = build("other_domain", source, num_rows=20)
    assert abs(small.frame.num_rows - 20) <= 5
    assert small.provenance["num_domain_rows"] == outside.num_rows


def test_a_row_of_an_unknown_category_is_in_no_domain(source: TransferSource) -> None:
    for inside in (True, False):
        rows = build("other_domain", source, columns=["place"], values=["top"], inside=inside)
        assert set(rows.frame["place"].to_pylist()) == {"top" if inside else "side"}


def test_periods_part_the_rows_by_time(source: TransferSource) -> None:
    parts = [
        TransferSet.parse({"kind": "other_domain", "period": period}).build(source, seed=0).frame
        for period in ([0, 0.25], [0.25, 0.6], [0.6, 1])
    ]
    assert pa.concat_tables(parts).equals(source.frame)
    span = source.frame["event_time"][-1].as_py() - source.frame["event_time"][0].as_py()
    for frame, share in zip(parts, (0.25, 0.35, 0.4), strict=True):
        assert frame["event_time"][-1].as_py() - frame["event_time"][0].as_py() <= share * span


def test_another_category_lies_further_away_than_another_hour(source: TransferSource) -> None:
    category = build("other_domain", source).provenance["similarity_to_the_rest"]
    later = TransferSet.parse({"kind": "other_domain", "period": [0.5, 1]})
    hour = later.build(source, seed=0).provenance["similarity_to_the_rest"]
    assert category < hour


def test_words_of_a_frame_are_counted_as_often_as_rows_show_them(source: TransferSource) -> None:
    texts, slow = fields(source), Counter[str]()
    for row in source.frame.to_pylist():
        for role in ("page", "ad"):
            values = texts.get(row[f"{role}__text_id"], {}).values()
            slow.update(word for value in values for word in (value or "").split())
        slow.update([f"place={row['place']}"] if row["place"] else [])
    assert frame_words(source.frame, source.texts, columns=["place"]) == slow


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "natural", "share": 0}, "greater than 0"),
        ({"kind": "natural", "share": 1.5}, "less than or equal to 1"),
        ({"kind": "natural", "share": 0.5, "num_rows": 3}, "share or num_rows, not both"),
        ({"kind": "bootstrap"}, "give times or num_rows, got times None and num_rows None"),
        ({"kind": "bootstrap", "times": 2, "num_rows": 3}, "give times or num_rows"),
        (
            {"kind": "hybrid", "parts": [{"share": 0.5, "of": "natural"}] * 3},
            r"must add up to 1, got \[0.5, 0.5, 0.5\] = 1.5",
        ),
        ({"kind": "hybrid", "parts": [{"share": 1, "of": "natural"}]}, "at least 2 items"),
        ({"kind": "other_domain"}, "give columns with values, or a period"),
        ({"kind": "other_domain", "values": ["toys"]}, "columns and values go together"),
        ({"kind": "other_domain", "period": [0.5, 0.5]}, "start < end, got"),
        ({"kind": "shuffled", "share": 0.5}, "Extra inputs are not permitted"),
        ({"kind": "augmented", "steps": []}, "at least 1 item"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_read(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TransferSet.parse(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "natural", "num_rows": 9999}, r"at most the \d+ rows .*got 9999; kind bootstrap"),
        (
            {"kind": "other_domain", "columns": ["page__category"], "values": ["tooys"]},
            r"\['tooys'\] do not occur .* there are \['books', 'shoes', 'toys'\]",
        ),
        (
            {"kind": "other_domain", "columns": ["page__sales"], "values": ["1"]},
            r"\['page__sales'\] are no categorical columns .* \['page__category', 'ad__category'",
        ),
        ({"kind": "re_paired", "category": "brand"}, r"no column \['page__brand', 'ad__brand'\]"),
        (
            {
                "kind": "hybrid",
                "parts": [
                    {"share": 0.5, "of": {"kind": "natural", "share": 0.1}},
                    {"share": 0.5, "of": "natural"},
                ],
            },
            r"part 1 \(natural\) must give \d+ rows, but \d+ are left",
        ),
        (
            {
                "kind": "hybrid",
                "num_rows": 1,
                "parts": [{"share": 0.9, "of": "natural"}, {"share": 0.1, "of": "natural"}],
            },
            r"part 2 \(natural\) must give -?\d+ rows",
        ),
    ],
)
def test_what_the_source_cannot_give_is_refused_with_what_it_has(
    raw: dict[str, Any], message: str, source: TransferSource
) -> None:
    with pytest.raises(SettingsError, match=message):
        TransferSet.parse(raw).build(source, seed=0)


def test_an_empty_set_is_refused(source: TransferSource) -> None:
    with pytest.raises(EmptyWindowError, match="there are none; take a longer window"):
        Natural().build(
            TransferSource(source.frame.slice(0, 0), source.texts, source.tokenizer), seed=0
        )
    with pytest.raises(EmptyWindowError, match=r"none of \d+ rows lies outside"):
        build("other_domain", source, columns=["page__category"], values=list(CATEGORIES))


def test_a_row_whose_text_is_not_there_is_refused(source: TransferSource) -> None:
    halved = TransferSource(source.frame, source.texts.slice(0, 5), source.tokenizer)
    for name in ("natural", "shuffled"):
        with pytest.raises(ContractError, match=r"of \d+ texts .* not among the 5 texts given"):
            build(name, halved)


def test_texts_out_of_order_are_refused(source: TransferSource) -> None:
    turned = source.texts.take(pa.array(np.arange(source.texts.num_rows)[::-1].copy()))
    with pytest.raises(ValueError, match="must ascend by text_id"):
        Natural().build(TransferSource(source.frame, turned, source.tokenizer), seed=0)


def test_settings_load_neither_torch_nor_arrow(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; import driftline.platform.transfer; "
        "print([name for name in ('torch', 'pyarrow', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
