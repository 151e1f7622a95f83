"""The fusion of one page and 100 ads in this process: our folded head, what folding buys, peers.

Shape suffixes: B ads, C categorical columns, D category embedding, F numeric inputs, H vector
width, N cached texts, V width of the head's first layer.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tests.benchmarks.rig.market import BenchMarket

from driftline.features.online import OnlineFeatures
from driftline.features.online_read import OnlineRead
from driftline.platform.bundle import VectorCache
from driftline.platform.columns import head_columns
from driftline.platform.fused_head import FusedHead, Projected
from driftline.platform.models.build import build_model
from driftline.platform.models.spec import HeadOnlySpec
from driftline.platform.models.student import HeadOnly
from driftline.platform.scorer import Scorer
from driftline.serving.prepared import PreparedBundle
from driftline.serving.request_scorer import RequestScorer

Array = NDArray[Any]
TOLERANCE = 1e-4
OURS = "NumPy, products folded"


@dataclass(frozen=True)
class Inputs:
    """One request, looked up and normalised."""

    rows: Array
    """Of the page's and the ads' vectors, -1 for none. ``[B, 2]``."""
    categories: Array
    """``[B, C]``"""
    numbers: Array
    """``[B, F]``"""
    page: "Side"
    """The same for what all ads of a request share: the page and the impression. One row."""
    ads: "Side"
    """The same for the rest."""
    read: OnlineRead
    """The request as the server sees it."""


@dataclass(frozen=True)
class Side:
    """Part of the columns."""

    categories: Array
    numbers: Array


@dataclass(frozen=True)
class Split:
    """Which columns are alike for all ads of a request."""

    page_categories: Array
    ad_categories: Array
    page_numbers: Array
    ad_numbers: Array

    @classmethod
    def of(cls, scorer: Scorer, market: BenchMarket) -> "Split":
        alias = {column.name: column.alias for column in head_columns(market.settings)}
        shared = {name for name, which in alias.items() if which in (None, "page")}
        categories = [c.column in shared for c in scorer.tabular.categories]
        numbers = [n.column for n in scorer.tabular.numbers]
        sides = [
            scorer.tabular.selected([name for name in numbers if (name in shared) == wanted])[1]
            for wanted in (True, False)
        ]
        return cls(np.flatnonzero(categories), np.flatnonzero(np.logical_not(categories)), *sides)


@dataclass(frozen=True)
class Candidate:
    """One way to get from inputs to logits ``[B, 2]``."""

    name: str
    run: Callable[[Inputs], Array]
    note: str = ""


def requests_of(
    market: BenchMarket, features: OnlineFeatures, scorer: Scorer, *, num_ads: int, number: int
) -> list[Inputs]:
    """Inputs of requests of the market."""
    now = features.as_of
    assert now is not None
    found, split = [], Split.of(scorer, market)
    for one in market.asked(num_ads, number):
        read = features.read(one.page, one.ads, context=one.context, now=now)
        columns = read.columns
        categories, numbers = scorer.tabular.encode(columns)
        page = Side(
            categories[:1, split.page_categories],
            np.ascontiguousarray(numbers[:1, split.page_numbers]),
        )
        ads = Side(
            categories[:, split.ad_categories],
            np.ascontiguousarray(numbers[:, split.ad_numbers]),
        )
        found.append(Inputs(scorer.text_rows(columns), categories, numbers, page, ads, read))
    return found


def head_of(scorer: Scorer, hidden_sizes: Sequence[int]) -> HeadOnly:
    """The bundle's head, or one of other widths and random weights."""
    spec = scorer.head.head.spec
    if tuple(hidden_sizes) == tuple(spec.hidden_sizes):
        return scorer.head
    torch.manual_seed(0)
    wider = spec.model_copy(update={"hidden_sizes": tuple(hidden_sizes)})
    head = build_model(HeadOnlySpec(head=wider))
    assert isinstance(head, HeadOnly)
    return head.eval()


def candidates(
    scorer: Scorer, features: OnlineFeatures, *, split: Split, published: Projected | None
) -> list[Candidate]:
    """Ours first, then ours with one thing left out, then peers."""
    head, cache = scorer.head, scorer.vectors
    requests = RequestScorer(scorer, max_folded_bytes=10**9)
    requests.prepare(features.version)
    fused = FusedHead.of(head)
    mapped = published or Projected.of(head, cache.page, cache.ad)
    parts = Unfolded.of(head, cache)

    page_weight = np.ascontiguousarray(fused.numbers[split.page_numbers])
    ad_weight = np.ascontiguousarray(fused.numbers[split.ad_numbers])
    page_starts = fused.first_rows[split.page_categories]
    ad_starts = fused.first_rows[split.ad_categories]

    def fuse(inputs: Inputs, page: Array, states: Array, *, folded: bool = True) -> Array:
        """Add numbers and categories of both sides, then the further layers."""
        page += inputs.page.numbers @ page_weight
        page += fused.bias
        states += inputs.ads.numbers @ ad_weight
        page_places = inputs.page.categories + page_starts
        ad_places = inputs.ads.categories + ad_starts
        if folded:
            page += fused.categories[page_places[0]].sum(axis=0)
            for column in range(ad_places.shape[1]):
                states += fused.categories[ad_places[:, column]]
        else:
            page += parts.embedded(page_places) @ page_category_weight
            states += parts.embedded(ad_places) @ ad_category_weight
        states += page
        return fused.finish(states)

    def ours(inputs: Inputs) -> Array:
        return requests.logits(inputs.read)[0]

    def per_request(inputs: Inputs) -> Array:
        return fuse(inputs, mapped.page[inputs.rows[:1, 0]], mapped.ad[inputs.rows[:, 1]])

    def unfolded_categories(inputs: Inputs) -> Array:
        page, ads = mapped.page[inputs.rows[:1, 0]], mapped.ad[inputs.rows[:, 1]]
        return fuse(inputs, page, ads, folded=False)

    def unprojected(inputs: Inputs) -> Array:
        page = parts.pages[inputs.rows[:1, 0]] @ parts.page_weight
        return fuse(inputs, page, parts.ads[inputs.rows[:, 1]] @ parts.ad_weight)

    def page_per_ad(inputs: Inputs) -> Array:
        page = mapped.page[inputs.rows[:, 0]]
        states = inputs.numbers @ fused.numbers
        states += mapped.ad[inputs.rows[:, 1]]
        states += page
        places = inputs.categories + fused.first_rows
        for column in range(places.shape[1]):
            states += fused.categories[places[:, column]]
        states += fused.bias
        return fused.finish(states)

    page_category_weight = parts.category_weight[split.page_categories].reshape(-1, len(fused.bias))
    ad_category_weight = parts.category_weight[split.ad_categories].reshape(-1, len(fused.bias))
    return [
        Candidate(OURS, ours, "ours"),
        Candidate("NumPy, products not folded", per_request, "ablation"),
        Candidate("NumPy, page side per ad", page_per_ad, "ablation"),
        Candidate("NumPy, vectors not projected", unprojected, "ablation"),
        Candidate("NumPy, categories not folded", unfolded_categories, "ablation"),
        Candidate("torch, as trained", parts.torch_logits, "peer"),
        *onnx_candidates(requests, features, fused, mapped, parts, split),
    ]


@dataclass(frozen=True)
class Unfolded:
    """The head's first layer in its parts."""

    head: HeadOnly
    pages: Array
    """With the neutral vector at the end, which -1 finds. ``[N + 1, H]``."""
    ads: Array
    page_weight: Array
    """``[H, V]``"""
    ad_weight: Array
    embeddings: Array
    category_weight: Array
    """``[C, D, V]``"""

    @classmethod
    def of(cls, head: HeadOnly, cache: VectorCache) -> "Unfolded":
        spec = head.head.spec
        first = next(one for one in head.head.layers if isinstance(one, torch.nn.Linear))
        weight_IV = first.weight.detach().numpy().T
        width = spec.vector_size
        end = 2 * width + len(spec.cardinalities) * spec.category_embedding_size
        own = (head.head.neutral_page, head.head.neutral_ad)
        neutral = [vector.detach().numpy()[None] for vector in own]
        return cls(
            head=head,
            pages=np.concatenate([cache.page, neutral[0]]),
            ads=np.concatenate([cache.ad, neutral[1]]),
            page_weight=np.ascontiguousarray(weight_IV[:width]),
            ad_weight=np.ascontiguousarray(weight_IV[width : 2 * width]),
            embeddings=head.head.embeddings.weight.detach().numpy(),
            category_weight=np.ascontiguousarray(weight_IV[2 * width : end]).reshape(
                len(spec.cardinalities), spec.category_embedding_size, -1
            ),
        )

    def embedded(self, places: Array) -> Array:
        """Embeddings side by side. ``[B, C]`` to ``[B, C * D]``."""
        found: Array = self.embeddings[places].reshape(len(places), -1)
        return found

    def torch_logits(self, inputs: Inputs) -> Array:
        rows_B2 = torch.from_numpy(inputs.rows.astype(np.int64))
        page_NH, ad_NH = torch.from_numpy(self.pages), torch.from_numpy(self.ads)
        with torch.inference_mode():
            logits: Array = self.head.head(
                page_NH[rows_B2[:, 0]],
                ad_NH[rows_B2[:, 1]],
                torch.from_numpy(inputs.categories).long(),
                torch.from_numpy(inputs.numbers),
            ).numpy()
        return logits


def onnx_candidates(
    requests: RequestScorer,
    features: OnlineFeatures,
    fused: FusedHead,
    mapped: Projected,
    parts: Unfolded,
    split: Split,
) -> list[Candidate]:
    """The folded head and the head as trained in ONNX Runtime; none where that is not installed."""
    try:
        from tests.benchmarks.rig.onnx_heads import (
            apart_session,
            folded_session,
            gathered_session,
            trained_session,
        )
    except ModuleNotFoundError:
        return []

    folded, trained = folded_session(fused, mapped), trained_session(parts)
    apart = apart_session(fused, mapped, split)
    catalogue = features.version.catalogue
    assert catalogue is not None
    products = requests.folded(catalogue)
    assert products is not None
    gathered = gathered_session(fused, products)
    last_product = len(catalogue)
    page_starts = fused.first_rows[split.page_categories]
    ad_starts = fused.first_rows[split.ad_categories]
    last_page, last = len(mapped.page) - 1, len(mapped.ad) - 1

    def rows(inputs: Inputs) -> tuple[Array, Array]:
        """ONNX knows no -1 for the last row on all of its versions."""
        rows_B2 = inputs.rows.astype(np.int64)
        return np.where(rows_B2[:, 0] < 0, last_page, rows_B2[:, 0]), np.where(
            rows_B2[:, 1] < 0, last, rows_B2[:, 1]
        )

    def by_gathered(inputs: Inputs) -> Array:
        places = inputs.read.places
        assert places is not None
        found = np.where(places.rows < 0, last_product, places.rows)
        feeds = {"page": found[:1], "ad": found[1:], "impression": requests.impression(inputs.read)}
        if places.pair_slots is not None and products.pair is not None:
            slots = places.pair_slots.astype(np.int64)
            feeds["pair"] = np.where(slots < 0, len(products.pair) - 1, slots)
        logits: Array = gathered.run(None, feeds)[0]
        return logits

    def by_folded(inputs: Inputs) -> Array:
        page_B, ad_B = rows(inputs)
        places = inputs.categories + fused.first_rows
        feeds = {"page": page_B[:1], "ad": ad_B, "places": places, "numbers": inputs.numbers}
        found: Array = folded.run(None, feeds)[0]
        return found

    def by_apart(inputs: Inputs) -> Array:
        page_B, ad_B = rows(inputs)
        feeds = {
            "page": page_B[:1],
            "ad": ad_B,
            "page_places": inputs.page.categories + page_starts,
            "ad_places": inputs.ads.categories + ad_starts,
            "page_numbers": inputs.page.numbers,
            "ad_numbers": inputs.ads.numbers,
        }
        found: Array = apart.run(None, feeds)[0]
        return found

    def by_trained(inputs: Inputs) -> Array:
        page_B, ad_B = rows(inputs)
        places = inputs.categories + fused.first_rows
        feeds = {"page": page_B, "ad": ad_B, "places": places, "numbers": inputs.numbers}
        found: Array = trained.run(None, feeds)[0]
        return found

    return [
        Candidate("ONNX Runtime, products folded", by_gathered, "peer"),
        Candidate("ONNX Runtime, folded, page side once", by_apart, "peer"),
        Candidate("ONNX Runtime, folded", by_folded, "peer"),
        Candidate("ONNX Runtime, as trained", by_trained, "peer"),
    ]


def compare(
    several: Sequence[Candidate], inputs: Sequence[Inputs], *, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of a call by candidate: a median for each round, candidates in turn.

    Raises:
        SystemExit: two candidates disagree.
    """
    expected = [several[0].run(one) for one in inputs]
    for candidate in several:
        for one, logits in zip(inputs, expected, strict=True):
            gap = float(np.abs(candidate.run(one) - logits).max())
            if gap > TOLERANCE:
                raise SystemExit(f"{candidate.name} differs from {several[0].name} by {gap:.1e}")
    found: dict[str, list[float]] = {candidate.name: [] for candidate in several}
    for number in range(rounds):
        for candidate in several if number % 2 == 0 else several[::-1]:
            times = []
            for repeat in range(repeats):
                one = inputs[repeat % len(inputs)]
                started = time.perf_counter()
                candidate.run(one)
                times.append(time.perf_counter() - started)
            found[candidate.name].append(1e3 * statistics.median(times))
    return found


def request_milliseconds(
    market: BenchMarket, *, num_ads: int, rounds: int, repeats: int
) -> list[float]:
    """From looked-up features to probabilities as the server does it, normalisation included."""
    features = OnlineFeatures.open(market.settings)
    prepared = PreparedBundle.of(market.bundles[0], market.settings, version=features.version)
    now = features.as_of
    assert now is not None
    reads = [
        features.read(one.page, one.ads, context=one.context, now=now)
        for one in market.asked(num_ads, 20)
    ]
    medians = []
    for _ in range(rounds):
        times = []
        for repeat in range(repeats):
            started = time.perf_counter()
            prepared.score(reads[repeat % len(reads)])
            times.append(time.perf_counter() - started)
        medians.append(1e3 * statistics.median(times))
    return medians
