import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from driftline.platform.errors import SettingsError
from driftline.platform.inputs import open_inputs
from driftline.platform.models.build import build_model, count_parameters
from driftline.platform.models.encoder import TextEncoder
from driftline.platform.models.spec import (
    EncoderSpec,
    HeadSpec,
    MlpSpec,
    SingleSpec,
    TeacherSpec,
    TwinSpec,
    encoder_spec,
    parse_spec,
)
from driftline.platform.models.student import LateFusion
from driftline.platform.settings import CheckpointEncoder, ConfigEncoder


def bert(num_layers: int, hidden_size: int, vocabulary_size: int) -> EncoderSpec:
    return encoder_spec(
        ConfigEncoder(num_layers=num_layers, hidden_size=hidden_size, max_tokens=512),
        vocabulary_size=vocabulary_size,
    )


def classifier_size(hidden: int) -> int:
    return 2 * hidden + hidden * hidden + hidden + 2 * hidden + 2


@pytest.mark.parametrize(
    ("num_layers", "hidden_size", "vocabulary_size", "published"),
    [
        (2, 128, 30522, 4_385_920),
        (12, 768, 30522, 109_482_240),
        (6, 768, 30522, 66_955_008),
        (6, 768, 32000, 68_090_112),  # "68.1M"
    ],
)
def test_encoders_have_the_published_sizes(
    num_layers: int, hidden_size: int, vocabulary_size: int, published: int
) -> None:
    # papers.md T.5 and S1.10 count a pooler, which we leave out
    pooler = hidden_size**2 + hidden_size
    tower = SingleSpec(encoder=bert(num_layers, hidden_size, vocabulary_size))
    assert count_parameters(tower) - classifier_size(hidden_size) == published - pooler


def test_paper_sizes_are_counted_at_once() -> None:
    head = HeadSpec(vector_size=768, cardinalities=(1000,) * 3, num_numbers=26)
    started = time.process_time()
    teacher = count_parameters(TeacherSpec(encoder=bert(24, 2240, 32_000)))
    student = count_parameters(TwinSpec(encoder=bert(6, 768, 32_000), head=head))
    assert time.process_time() - started < 10
    assert teacher == pytest.approx(1.5e9, rel=0.03)  # papers.md S0.8
    assert student == pytest.approx(70e6, rel=0.03)  # papers.md S0.13


def test_untied_arms_have_two_backbones(tiny_market: Any) -> None:
    tied = tiny_market.twin
    backbone = count_parameters(SingleSpec(encoder=tied.encoder)) - classifier_size(16)
    untied = tied.model_copy(update={"tie_arms": False})
    assert count_parameters(untied) - count_parameters(tied) == backbone


def test_specs_survive_json(tiny_market: Any) -> None:
    for spec in (tiny_market.twin, tiny_market.head, tiny_market.mlp, tiny_market.teacher):
        assert parse_spec(spec.model_dump(mode="json")) == spec


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_last_layer_for_cls_alone_equals_the_whole_layer(lengths: list[int]) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(bert(2, 64, 50)).eval()
    tokens = torch.randint(7, 50, (len(lengths), 9))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        whole, alone = encoder(tokens, mask)[:, 0], encoder.cls(tokens, mask)
    assert torch.allclose(whole, alone, atol=1e-5)  # float32 sums in another order


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_padding_does_not_change_a_vector(seed: int) -> None:
    torch.manual_seed(seed)
    encoder = TextEncoder(bert(2, 64, 50)).eval()
    tokens = torch.randint(7, 50, (3, 6))
    padded = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        short = encoder.cls(tokens, torch.ones(3, 6, dtype=torch.bool))
        long = encoder.cls(padded, padded != 0)
    assert torch.allclose(short, long, atol=1e-5)


@pytest.mark.parametrize("tie_arms", [True, False])
def test_a_batch_encodes_each_distinct_text_of_a_role_once(
    tiny_market: Any, tie_arms: bool
) -> None:
    spec = tiny_market.twin.model_copy(update={"tie_arms": tie_arms})
    inputs = open_inputs(
        spec, tiny_market.file("train.arrow"), texts=tiny_market.file("texts.arrow")
    )
    model = build_model(spec)
    encoded = count_rows(model)
    rows = np.arange(200)
    inputs.logits(model, rows, device=torch.device("cpu"))
    distinct = [
        len(set(texts[rows].tolist()) - {-1})
        for texts in (inputs.rows.page_text, inputs.rows.ad_text)  # type: ignore[attr-defined]
    ]
    assert sum(encoded) == sum(distinct)


def count_rows(model: nn.Module) -> list[int]:
    """Sequences of every call of an encoder's embedding layer, from now on."""
    counted: list[int] = []
    for module in model.modules():
        if isinstance(module, TextEncoder):
            module.backbone.embeddings.register_forward_hook(  # type: ignore[union-attr]
                lambda _module, _args, output: counted.append(len(output))
            )
    return counted


@settings(max_examples=8)
@given(order=st.permutations(range(12)))
def test_batch_order_and_company_do_not_change_a_score(
    tiny_market: Any, order: Sequence[int]
) -> None:
    cpu = torch.device("cpu")
    for spec, files in (
        (tiny_market.twin, {"texts": tiny_market.file("texts.arrow")}),
        (tiny_market.head, {"vectors": tiny_market.file("vectors.safetensors")}),
        (tiny_market.mlp, {"texts": tiny_market.file("texts.arrow")}),
    ):
        torch.manual_seed(1)
        model = build_model(spec).eval()
        inputs = open_inputs(spec, tiny_market.file("train.arrow"), **files)
        with torch.no_grad():
            alone = torch.cat([inputs.logits(model, np.array([row]), device=cpu) for row in order])
            together = inputs.logits(model, np.array(order), device=cpu)
        assert torch.allclose(alone, together, atol=1e-5), spec.kind


def test_the_role_marker_tells_tied_arms_apart(tiny_market: Any) -> None:
    inputs = open_inputs(
        tiny_market.twin, tiny_market.file("train.arrow"), texts=tiny_market.file("texts.arrow")
    )
    groups = inputs.collate(np.arange(50))[0]
    markers = [{int(tokens[0, 1]) for tokens, _ in role} for role in groups]  # type: ignore[attr-defined]
    assert markers == [{5}, {6}]


def test_a_product_without_text_has_the_neutral_vector(tiny_market: Any) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_market.twin).eval()
    nn.init.normal_(model.head.neutral_page)  # type: ignore[union-attr, arg-type]
    inputs = open_inputs(
        tiny_market.twin, tiny_market.file("train.arrow"), texts=tiny_market.file("texts.arrow")
    )
    rows = np.flatnonzero(
        (inputs.rows.page_text < 0) & (inputs.rows.ad_text < 0)  # type: ignore[attr-defined]
    )[:1]
    assert len(rows)
    head = model.head
    assert isinstance(head, LateFusion)
    with torch.no_grad():
        found = inputs.logits(model, rows, device=torch.device("cpu"))
        tabular = inputs.tabular(rows)  # type: ignore[attr-defined]
        expected = head(head.neutral_page[None], head.neutral_ad[None], *tabular)
    assert torch.allclose(found, expected)


def test_a_head_without_text_categories_or_numbers_still_answers() -> None:
    for vector_size, cardinalities, num_numbers in ((0, (), 0), (0, (3,), 0), (4, (), 2)):
        spec = HeadSpec(
            vector_size=vector_size, cardinalities=cardinalities, num_numbers=num_numbers
        )
        logits = LateFusion(spec)(
            torch.zeros(5, vector_size),
            torch.zeros(5, vector_size),
            torch.zeros(5, len(cardinalities), dtype=torch.int64),
            torch.zeros(5, num_numbers),
        )
        assert logits.shape == (5, 2)


def test_row_zero_and_neutral_vectors_are_learned_although_training_knows_all() -> None:
    torch.manual_seed(0)
    head = LateFusion(HeadSpec(vector_size=3, cardinalities=(5,), unknown_share=0.5))
    page, ad = torch.randn(64, 3), torch.randn(64, 3)
    categories = torch.randint(1, 5, (64, 1))
    head(page, ad, categories, torch.zeros(64, 0)).sum().backward()
    for parameter in (head.neutral_page, head.neutral_ad, head.embeddings.weight):
        assert parameter.grad is not None
        assert parameter.grad[0].abs().sum() > 0
    head.eval()
    assert torch.equal(head.fuse(page, ad, categories, torch.zeros(64, 0))[:, :3], page)


def test_a_bag_of_words_is_the_mean_of_its_tokens(tiny_market: Any) -> None:
    spec: MlpSpec = tiny_market.mlp.model_copy(update={"num_word_buckets": 50, "max_tokens": 4})
    model = build_model(spec).eval()
    inputs = open_inputs(
        spec, tiny_market.file("train.arrow"), texts=tiny_market.file("texts.arrow")
    )
    rows = np.arange(30)
    pieces, offsets, texts, *_ = inputs.collate(rows)
    found = model.words(pieces % 50, offsets)[texts[:, 1]]  # type: ignore[operator, index]
    table = model.words.weight  # type: ignore[union-attr]
    tokens = inputs.tokens  # type: ignore[attr-defined]
    for row, text in enumerate(inputs.rows.ad_text[rows]):  # type: ignore[attr-defined]
        start, end = tokens.offsets[text : text + 2] if text >= 0 else (0, 0)
        words = tokens.values[start:end][:4] % 50
        expected = table[words].mean(dim=0) if len(words) else torch.zeros(16)  # type: ignore[index]
        assert torch.allclose(found[row], expected, atol=1e-6)


def test_an_encoder_starts_from_a_local_checkpoint(bert_checkpoint: Path) -> None:
    from transformers import BertModel

    spec = encoder_spec(CheckpointEncoder(kind="checkpoint", path=bert_checkpoint, max_tokens=16))
    assert (spec.hidden_size, spec.num_layers, spec.vocabulary_size) == (8, 2, 14)
    encoder = TextEncoder(spec).eval()
    reference = BertModel.from_pretrained(bert_checkpoint, local_files_only=True).eval()
    tokens, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        expected = reference(tokens, attention_mask=mask).last_hidden_state[:, 0]
        assert torch.allclose(encoder.cls(tokens, mask), expected, atol=1e-6)
        with_role = torch.tensor([[2, spec.specials.page, 5, 3]])
        assert torch.isfinite(encoder.cls(with_role, mask)).all()
    rebuilt = TextEncoder(spec.model_copy(update={"checkpoint": None}), pretrained=False)
    rebuilt.load_state_dict(encoder.state_dict())


def test_an_encoder_is_made_of_picked_layers_of_a_checkpoint(bert_checkpoint: Path) -> None:
    settings = CheckpointEncoder(
        kind="checkpoint", path=bert_checkpoint, max_tokens=16, layers=(2,)
    )
    spec = encoder_spec(settings)
    assert spec.num_layers == 1
    whole = TextEncoder(encoder_spec(settings.model_copy(update={"layers": None}))).state_dict()
    picked = TextEncoder(spec)
    for name, value in picked.state_dict().items():
        if "word_embeddings" not in name:  # the role markers' rows are drawn
            assert torch.equal(value, whole[name.replace("layer.0.", "layer.1.")]), name
    rebuilt = TextEncoder(spec.model_copy(update={"checkpoint": None}), pretrained=False)
    rebuilt.load_state_dict(picked.state_dict())


def test_a_layer_that_a_checkpoint_lacks_is_refused(bert_checkpoint: Path) -> None:
    settings = CheckpointEncoder(
        kind="checkpoint", path=bert_checkpoint, max_tokens=16, layers=(1, 3)
    )
    with pytest.raises(SettingsError, match=r"layers must lie in 1\.\.2, the layers of .*, got 3"):
        encoder_spec(settings)


def test_a_checkpoint_that_is_no_folder_with_a_config_is_refused(tmp_path: Path) -> None:
    checkpoint = CheckpointEncoder(kind="checkpoint", path=tmp_path / "none")
    with pytest.raises(SettingsError, match=r"must be a local folder with config\.json"):
        encoder_spec(checkpoint)


def test_a_checkpoint_with_too_few_positions_is_refused(bert_checkpoint: Path) -> None:
    checkpoint = CheckpointEncoder(kind="checkpoint", path=bert_checkpoint, max_tokens=64)
    with pytest.raises(SettingsError, match=r"max_tokens must be at most 32 for .*, got 64"):
        encoder_spec(checkpoint)


def test_logits_keep_their_precision_under_autocast(tiny_market: Any) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_market.head).eval()
    inputs = open_inputs(
        tiny_market.head,
        tiny_market.file("train.arrow"),
        vectors=tiny_market.file("vectors.safetensors"),
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = inputs.logits(model, np.arange(500), device=torch.device("cpu"))
    assert logits.dtype == torch.float32
    assert len(set(logits[:, 1].tolist())) > 490  # bfloat16 would leave some dozens


def test_the_baseline_has_three_layers() -> None:
    layers = [m for m in build_model(MlpSpec()).layers if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    assert len(layers) == 3  # papers.md S0.34
    assert all(a.out_features == b.in_features for a, b in pairwise(layers))


def test_a_tower_decides_on_a_normalised_vector(tiny_market: Any) -> None:
    """The extra LayerNorm of papers.md S0.6: neither length nor offset of [CLS] counts."""
    spec = tiny_market.teacher
    tower = build_model(spec).eval()
    tokens_BT = torch.tensor([[2, 9, 11, 3], [2, 12, 3, 0]])
    cls_BH = tower.encoder.cls(tokens_BT, tokens_BT > 0)  # type: ignore[operator,union-attr]
    logits_B2 = tower(tokens_BT, tokens_BT > 0)
    assert logits_B2.shape == (2, 2)
    torch.testing.assert_close(tower.classifier(7 * cls_BH + 3), logits_B2, atol=1e-4, rtol=1e-3)  # type: ignore[operator]
