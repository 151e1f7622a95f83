"""Matches of inner features: against slow versions, and the values of papers.md T.6."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from driftline.platform.distillation.matches import (
    AttentionCe,
    AttentionCeMean,
    AttentionKl,
    AttentionMatch,
    AttentionMse,
    AttentionMseSum,
    Cos,
    EmbeddingMse,
    Fsp,
    HiddenMse,
    Match,
    ModuleMatch,
    Nst,
    Pkd,
)

# papers.md T.6: inputs and values of textbrewer 0.2.1.post1's own functions, float64
STATES_S = (0.7 * torch.arange(24, dtype=torch.float64)).sin().view(2, 3, 4)
STATES_T = (0.3 * torch.arange(24, dtype=torch.float64)).cos().view(2, 3, 4)
SCORES_S = (0.5 * torch.arange(36, dtype=torch.float64)).sin().view(2, 2, 3, 3)
SCORES_T = (0.4 * torch.arange(36, dtype=torch.float64)).cos().view(2, 2, 3, 3)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def is_attention(match: Match) -> bool:
    return isinstance(match, AttentionMatch)


def loss(match: Match, mask: Tensor | None) -> float:
    if is_attention(match):
        return float(match.loss([SCORES_S], [SCORES_T], mask))
    tensors = 2 if isinstance(match, Fsp | Nst) else 1
    return float(match.loss([STATES_S] * tensors, [STATES_T] * tensors, mask))


@pytest.mark.parametrize(
    ("match", "unmasked", "masked"),
    [
        (HiddenMse(), 0.770684, 0.830913),
        (EmbeddingMse(), 0.770684, 0.830913),
        (Cos(), 0.728755, 0.810991),
        (Pkd(), 1.597584, 1.597584),
        (Fsp(), 0.250732, 0.206050),
        (Nst(), 0.404495, 0.550074 * (3 / 4) ** 2),  # by width and not length: papers.md B2
        (Nst(compat=True), 0.404495, 0.550074),
        (AttentionMse(), None, 0.298418),
        (AttentionMse(compat=True), 0.197682, 0.298418),
        (AttentionMseSum(), None, 0.487917),
        (AttentionMseSum(compat=True), 0.197982, 0.487917),
        (AttentionCe(compat=True), 0.633122, 0.935103),
        (AttentionCeMean(compat=True), 0.784888, 0.937808),
    ],
    ids=lambda value: (
        f"{value.kind}{'-compat' * getattr(value, 'compat', False)}"
        if isinstance(value, Match)
        else ""
    ),
)
def test_matches_have_the_published_values(
    match: Match, unmasked: float | None, masked: float
) -> None:
    if unmasked is not None:
        assert loss(match, None) == pytest.approx(unmasked, abs=1e-6)
    assert loss(match, MASK) == pytest.approx(masked, abs=1e-6)


# --- slow versions ------------------------------------------------------------------------------
# Nested lists and loops; ``n`` is the number of real tokens of each row, T where nothing is padded.

Rows = list[Any]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def states(student: Rows, teacher: Rows, n: list[int]) -> list[tuple[list[float], list[float]]]:
    """Vectors of the real tokens, student's beside teacher's."""
    return [(student[b][i], teacher[b][i]) for b in range(len(n)) for i in range(n[b])]


def slow_hidden_mse(student: Rows, teacher: Rows, n: list[int]) -> float:
    pairs = states(student, teacher, n)
    return mean([(x - y) ** 2 for s, t in pairs for x, y in zip(s, t, strict=True)])


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def slow_cos(student: Rows, teacher: Rows, n: list[int]) -> float:
    return mean([1 - cosine(s, t) for s, t in states(student, teacher, n)])


def slow_pkd(student: Rows, teacher: Rows, n: list[int]) -> float:
    return mean([2 - 2 * cosine(s[0], t[0]) for s, t in zip(student, teacher, strict=True)])


def slow_fsp(student: Rows, teacher: Rows, n: list[int]) -> float:
    squares = []
    for s, t, length in zip(student, teacher, n, strict=True):
        for i in range(len(s[0])):
            for j in range(len(s[0])):
                g_S = sum(s[k][i] * s[k][j] for k in range(length)) / length
                g_T = sum(t[k][i] * t[k][j] for k in range(length)) / length
                squares.append((g_S - g_T) ** 2)
    return mean(squares)


def slow_nst(student: Rows, teacher: Rows, n: list[int]) -> float:
    squares = []
    for s, t, length in zip(student, teacher, n, strict=True):
        for i in range(length):
            for j in range(length):
                g_S, g_T = dot(s[i], s[j]) / len(s[i]), dot(t[i], t[j]) / len(t[i])
                squares.append((g_S - g_T) ** 2)
    return mean(squares)


def real(x: Rows, length: int) -> Rows:
    """Scores of one head without padding."""
    return [row[:length] for row in x[:length]]


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def slow_attention_mse(student: Rows, teacher: Rows, n: list[int]) -> float:
    squares = []
    for s, t, length in zip(student, teacher, n, strict=True):
        for head_S, head_T in zip(s, t, strict=True):
            for row_S, row_T in zip(real(head_S, length), real(head_T, length), strict=True):
                squares += [(x - y) ** 2 for x, y in zip(row_S, row_T, strict=True)]
    return mean(squares)


def joined(x: Rows, join: Callable[[list[float]], float]) -> Rows:
    """One head in the place of several."""
    size = range(len(x[0][0]))
    return [[[[join([head[i][j] for head in row]) for j in size] for i in size]] for row in x]


def slow_attention_mse_sum(student: Rows, teacher: Rows, n: list[int]) -> float:
    return slow_attention_mse(joined(student, sum), joined(teacher, sum), n)


def over_rows(
    student: Rows, teacher: Rows, n: list[int], measure: Callable[[float, float], float]
) -> float:
    """Mean over heads and queries of a sum over keys of p_T measure(p_S, p_T)."""
    totals = []
    for s, t, length in zip(student, teacher, n, strict=True):
        for head_S, head_T in zip(s, t, strict=True):
            for row_S, row_T in zip(real(head_S, length), real(head_T, length), strict=True):
                p_S, p_T = softmax(row_S), softmax(row_T)
                totals.append(sum(p * measure(q, p) for p, q in zip(p_T, p_S, strict=True)))
    # Rows of different lengths hold different numbers of queries: each query counts alike.
    return mean(totals)


def slow_attention_ce(student: Rows, teacher: Rows, n: list[int]) -> float:
    return over_rows(student, teacher, n, lambda q, p: -math.log(q))


def slow_attention_ce_mean(student: Rows, teacher: Rows, n: list[int]) -> float:
    return slow_attention_ce(joined(student, mean), joined(teacher, mean), n)


def slow_attention_kl(student: Rows, teacher: Rows, n: list[int]) -> float:
    return over_rows(student, teacher, n, lambda q, p: math.log(p / q))


SLOW: list[tuple[Match, Callable[[Rows, Rows, list[int]], float]]] = [
    (HiddenMse(), slow_hidden_mse),
    (EmbeddingMse(), slow_hidden_mse),
    (Cos(), slow_cos),
    (Pkd(), slow_pkd),
    (Fsp(), slow_fsp),
    (Nst(), slow_nst),
    (ModuleMatch(student="a", teacher="b", tokens=True), slow_hidden_mse),
    (ModuleMatch(student="a", teacher="b", measure="cos", tokens=True), slow_cos),
    (AttentionMse(), slow_attention_mse),
    (AttentionMseSum(), slow_attention_mse_sum),
    (AttentionCe(), slow_attention_ce),
    (AttentionCeMean(), slow_attention_ce_mean),
    (AttentionKl(on="scores"), slow_attention_kl),
]


def draw(match: Match, seed: int, lengths: list[int]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = max(lengths)
    shape = (2, size, size) if is_attention(match) else (size, 3)
    student, teacher = (
        torch.randn((len(lengths), *shape), generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    tensors = 2 if isinstance(match, Fsp | Nst) else 1
    mask = torch.arange(size)[None] < torch.tensor(lengths)[:, None]
    return [student] * tensors, [teacher] * tensors, mask


def name(value: object) -> str:
    return value.kind if isinstance(value, Match) else ""


@pytest.mark.parametrize(("match", "slow"), SLOW, ids=name)
@settings(max_examples=20)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_a_match_is_its_slow_version(
    match: Match, slow: Callable[[Rows, Rows, list[int]], float], seed: int, lengths: list[int]
) -> None:
    student, teacher, mask = draw(match, seed, lengths)
    rows = student[0].tolist(), teacher[0].tolist()
    assert float(match.loss(student, teacher, mask)) == pytest.approx(slow(*rows, lengths))
    whole = [max(lengths)] * len(lengths)
    expected = pytest.approx(slow(*rows, whole))
    assert float(match.loss(student, teacher, None)) == expected
    assert float(match.loss(student, teacher, torch.ones_like(mask))) == expected


@pytest.mark.parametrize("match", [match for match, _ in SLOW], ids=name)
@settings(max_examples=20)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_padding_changes_no_match_and_gets_no_gradient(
    match: Match, seed: int, lengths: list[int]
) -> None:
    student, teacher, mask = draw(match, seed, lengths)
    padded = torch.nn.functional.pad(mask, (0, 2))
    at = student[0].clone().requires_grad_()

    def grown(x: Tensor, fill: float) -> Tensor:
        amounts = (0, 2, 0, 2) if is_attention(match) else (0, 0, 0, 2)
        return torch.nn.functional.pad(x, amounts, value=fill)

    # What stands in the padding must not matter: here infinite scores, and large states.
    fill = -math.inf if is_attention(match) else 50.0
    found = match.loss(
        [grown(at, fill)] * len(student), [grown(teacher[0], fill)] * len(teacher), padded
    )
    assert float(found.detach()) == pytest.approx(float(match.loss(student, teacher, mask)))
    (gradient,) = torch.autograd.grad(found, at)
    assert torch.isfinite(gradient).all()
    if is_attention(match):
        of_pairs = gradient.abs().sum(dim=1)
        assert of_pairs[~(mask[:, None, :] & mask[:, :, None])].sum() == 0
    else:
        assert gradient[~mask].abs().sum() == 0


@pytest.mark.parametrize("match", [AttentionMse(), AttentionMseSum(), AttentionCe(), AttentionKl()])
def test_scores_that_the_model_has_masked_by_infinity_have_a_gradient(match: Match) -> None:
    raw = SCORES_S.clone().requires_grad_()
    bias = torch.where(MASK[:, None, None, :].bool(), 0.0, -math.inf)
    scores = AttentionKl(on="scores") if isinstance(match, AttentionKl) else match
    found = scores.loss([raw + bias], [SCORES_T + bias], MASK)
    assert found.item() == pytest.approx(scores.loss([SCORES_S], [SCORES_T], MASK).item())
    (gradient,) = torch.autograd.grad(found, raw)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("match", [match for match, _ in SLOW], ids=name)
def test_agreement_costs_the_least(match: Match) -> None:
    student, teacher, mask = draw(match, 1, [4, 2])
    point = teacher[0].clone().requires_grad_()
    loss_there = match.loss([point] * len(teacher), teacher, mask)
    agreed = float(loss_there.detach())
    assert agreed <= float(match.loss(student, teacher, mask))
    (gradient,) = torch.autograd.grad(loss_there, point)
    assert gradient.abs().max() < 1e-9
    if match.kind not in ("attention_ce", "attention_ce_mean"):
        assert agreed == pytest.approx(0, abs=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_attention_is_the_same_from_scores_and_from_probabilities(
    seed: int, lengths: list[int]
) -> None:
    student, teacher, mask = draw(AttentionCe(), seed, lengths)

    def after_softmax(x: Tensor) -> Tensor:
        return x.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)

    probabilities = [after_softmax(student[0])], [after_softmax(teacher[0])]
    pairs = [
        (AttentionCe(on="scores"), AttentionCe(on="probabilities")),
        (AttentionKl(on="scores"), AttentionKl(on="probabilities")),
    ]
    for by_scores, by_probabilities in pairs:
        expected = float(by_scores.loss(student, teacher, mask))
        found = float(by_probabilities.loss(*probabilities, mask))
        assert found == pytest.approx(expected, abs=1e-9)


def test_scores_below_zero_count_without_a_mask() -> None:
    """textbrewer sets them to 0, so that a mask of ones gives another loss (papers.md B15)."""
    ones = torch.ones_like(MASK)
    for kind in (AttentionMse, AttentionCe):
        assert loss(kind(), None) == pytest.approx(loss(kind(), ones))
        assert loss(kind(compat=True), None) != pytest.approx(loss(kind(compat=True), ones))


def test_sums_and_means_over_heads_allow_other_numbers_of_heads() -> None:
    wide, narrow = torch.randn(2, 4, 3, 3), torch.randn(2, 1, 3, 3)
    for match in (AttentionMseSum(), AttentionCeMean()):
        several = match.loss([narrow], [wide], MASK)
        joined = wide.sum(1) if isinstance(match, AttentionMseSum) else wide.mean(1)
        assert torch.allclose(several, match.loss([narrow[:, 0]], [joined], MASK))


def test_token_products_allow_other_widths() -> None:
    narrow = torch.randn(2, 3, 4)
    twice = torch.cat([narrow, narrow], dim=2)  # every mean over the width stays as it is
    for mask in (None, MASK):
        assert float(Nst().loss([narrow, narrow], [twice, twice], mask)) == pytest.approx(
            0, abs=1e-9
        )
    assert float(Nst(compat=True).loss([narrow, narrow], [twice, twice], MASK)) > 0.01


def test_two_layers_are_multiplied_with_each_other() -> None:
    a, b, c, d = (torch.randn(1, 3, 2, dtype=torch.float64) for _ in range(4))
    by_width = ((a[0].T @ b[0] - c[0].T @ d[0]) / 3) ** 2
    by_token = ((a[0] @ b[0].T - c[0] @ d[0].T) / 2) ** 2
    assert float(Fsp().loss([a, b], [c, d])) == pytest.approx(float(by_width.mean()))
    assert float(Nst().loss([a, b], [c, d])) == pytest.approx(float(by_token.mean()))


def test_pkd_takes_vectors_of_rows() -> None:
    assert float(Pkd().loss([STATES_S[:, 0]], [STATES_T[:, 0]])) == pytest.approx(1.597584)


def test_modules_of_other_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"a gives \[2, 3\] .* and b \[2, 4\]; they must be equal"):
        ModuleMatch(student="a", teacher="b").loss([torch.zeros(2, 3)], [torch.zeros(2, 4)])


def test_half_precision_is_summed_in_full() -> None:
    half = torch.full((1, 300, 300), 20.0, dtype=torch.float16)
    for match in (HiddenMse(), Fsp(), Nst()):
        found = match.loss([half, half], [half * 0, half * 0])
        assert found.dtype == torch.float32
        assert torch.isfinite(found)
