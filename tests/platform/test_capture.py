import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
)

from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.inputs import open_inputs
from driftline.platform.models.build import build_model

KINDS = ("hidden", "cls", "attention", "scores")


def key(text: str) -> FeatureKey:
    kind, place = text.split(".", 1)
    return FeatureKey(kind, int(place) if place.isdigit() else place)  # type: ignore[arg-type]


def keys(*texts: str) -> list[FeatureKey]:
    return [key(text) for text in texts]


def bert(attention: str = "sdpa", **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        **changes,
    )
    config._attn_implementation = attention
    return BertForSequenceClassification(config).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[7], [4], [6]])
    return {
        "input_ids": torch.randint(5, 40, (3, 7), generator=generator),
        "attention_mask": (torch.arange(7)[None] < lengths).long(),
    }


def hooks_of(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) for part in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hooks_give_exactly_the_hidden_states_of_transformers(attention: str) -> None:
    model = bert(attention)
    with Capture(model, [FeatureKey("hidden", layer) for layer in range(4)]) as seen:
        expected = model(**batch(), output_hidden_states=True).hidden_states
    assert [seen.features[FeatureKey("hidden", layer)].tolist() for layer in range(4)] == [
        states.tolist() for states in expected
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_that_of_an_eager_model_though_sdpa_gives_none(attention: str) -> None:
    model = bert(attention)
    with Capture(model, [FeatureKey("attention", layer) for layer in (1, 2, 3)]) as seen:
        model(**batch())
    expected = bert("eager")(**batch(), output_attentions=True).attentions
    real = batch()["attention_mask"].bool()[:, None, :, None].expand(-1, 2, -1, 7)
    for layer in (1, 2, 3):
        found = seen.features[FeatureKey("attention", layer)]
        assert torch.allclose(found[real], expected[layer - 1][real], atol=1e-6)


def test_scores_are_products_of_query_and_key_before_mask_and_softmax() -> None:
    model = bert()
    with Capture(model, keys("scores.2", "hidden.1")) as seen:
        model(**batch())
    own: Any = model.bert.encoder.layer[1].attention.self
    states = seen.features[key("hidden.1")]
    query, key_ = own.query(states), own.key(states)
    for row in range(3):
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            expected = query[row][:, part] @ key_[row][:, part].T / 8**0.5
            assert torch.allclose(seen.features[key("scores.2")][row, head], expected, atol=1e-6)


def test_distilbert_is_read_too() -> None:
    config = DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    model = DistilBertModel(config).eval()
    with Capture(model, keys("hidden.0", "hidden.2", "attention.2")) as seen:
        expected = model(**batch(), output_hidden_states=True).hidden_states
    assert torch.equal(seen.features[key("hidden.0")], expected[0])
    assert torch.equal(seen.features[key("hidden.2")], expected[2])
    assert seen.features[key("attention.2")].sum(dim=-1).allclose(torch.ones(3, 2, 7))


def test_any_module_of_any_model_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(5, 4)
    with Capture(model, keys("module.1")) as seen:
        model(inputs)
    assert torch.equal(seen.features[key("module.1")], model[1](model[0](inputs)))


def test_gradients_flow_through_what_was_captured() -> None:
    model = bert()
    with Capture(model, keys("hidden.0", "attention.3", "cls.3")) as seen:
        model(**batch())
    sum(tensor.square().sum() for tensor in seen.features.values()).backward()  # type: ignore[union-attr]
    query: Any = model.bert.encoder.layer[2].attention.self.query.weight
    assert query.grad.abs().sum() > 0


# --- our models ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{kind}.2" for kind in KINDS])
def test_a_towers_last_layer_is_computed_whole_where_it_is_looked_at(
    tiny_market: Any, name: str
) -> None:
    model = build_model(tiny_market.teacher).eval()
    inputs = open_inputs(tiny_market.teacher, tiny_market.file("rows.arrow"))
    tokens: Any
    tokens, mask = inputs.collate(torch.arange(5).numpy())
    alone = model(tokens, mask)
    with Capture(model, keys(name)) as seen:
        logits = model(tokens, mask)
    found = seen.features[key(name)]
    inner: Any = model.encoder
    states = inner(tokens, mask)
    match name.split(".")[0]:
        case "hidden":
            assert torch.equal(found, states)
        case "cls":
            assert torch.allclose(found, states[:, 0], atol=1e-6)
        case _:
            assert found.shape == (5, 1, tokens.shape[1], tokens.shape[1])
    assert torch.allclose(logits, alone, atol=1e-6)
    assert not inner.whole_last_layer


def test_the_last_cls_vector_of_a_tower_needs_no_whole_layer(tiny_market: Any) -> None:
    model: Any = build_model(tiny_market.teacher)
    assert Capture(model, keys("cls.2", "hidden.1"))._whole is False
    assert Capture(model, keys("module.encoder.backbone.encoder.layer.1.output"))._whole is True


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_vectors_of_distinct_texts_are_gathered_to_rows(
    tiny_market: Any, tied: bool, layer: int
) -> None:
    spec = tiny_market.twin.model_copy(update={"tie_arms": tied})
    model: Any = build_model(spec).eval()
    inputs: Any = open_inputs(
        spec, tiny_market.file("train.arrow"), texts=tiny_market.file("texts.arrow")
    )
    rows = torch.arange(100).numpy()
    wanted = (
        f"cls.{layer}",
        "module.arms.page",
        "module.arms.ad",
        "module.arms",
        "module.head.layers.0",
    )
    with Capture(model, keys(*wanted)) as seen:
        whole = model(*inputs.collate(rows))
    both = seen.features[key(f"cls.{layer}")]
    assert both.shape == (100, 32)
    assert len(whole) == len(seen.features[key("module.head.layers.0")])
    for row in range(0, 100, 9):  # one row at a time has each text once, so nothing to gather
        with Capture(model, keys(*wanted)) as alone:
            model(*inputs.collate(rows[row : row + 1]))
        for name in wanted:
            if min(inputs.rows.page_text[row], inputs.rows.ad_text[row]) >= 0:
                found = alone.features[key(name)][0]
                assert torch.allclose(found, seen.features[key(name)][row], atol=1e-5), name
    page_less = inputs.rows.page_text[:100] < 0
    assert torch.all(both[page_less, :16] == (0 if layer < 2 else model.head.neutral_page))
    if layer == 2:
        sides = (seen.features[key("module.arms.page")], seen.features[key("module.arms.ad")])
        assert torch.equal(both, torch.cat(sides, dim=1))
        assert torch.equal(both, seen.features[key("module.arms")])


# --- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hidden.4", r"has no hidden\.4; it has 3 layers: hidden\.0 to hidden\.3"),
        ("attention.0", r"has no attention\.0; it has 3 layers: attention\.1 to attention\.3"),
        ("module.bert.pooller", r"no module 'bert.pooller'; did you mean .*'bert.pooler'"),
        ("module.nothing.here", r"it has bert, classifier, dropout, bert\.embeddings"),
    ],
)
def test_unknown_places_are_refused_with_the_names_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capture(bert(), keys(name))


def test_layers_of_a_model_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no list of layers .* module\.PATH instead, one of 0, 1"):
        Capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), keys("hidden.0"))


@pytest.mark.parametrize("name", ["hidden.1", "attention.1", "module.arms.backbones.0"])
def test_tokens_of_a_twin_student_are_refused_and_the_alternatives_named(
    tiny_market: Any, name: str
) -> None:
    with pytest.raises(
        ValueError, match=r"match cls\.N .* arms\.page, arms\.ad, or a module below"
    ):
        Capture(build_model(tiny_market.twin), keys(name))


def test_a_module_that_ran_twice_is_refused() -> None:
    shared = nn.Linear(3, 3)
    with Capture(nn.Sequential(shared, shared), keys("module.0")) as seen:
        seen.model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"module\.0: .* ran 2 times in the forward pass"):
        _ = seen.features


def test_no_hook_and_no_flag_is_left_behind_an_exception(tiny_market: Any) -> None:
    model: Any = build_model(tiny_market.teacher)
    before = copy.deepcopy(hooks_of(model))
    with pytest.raises(TypeError), Capture(model, keys("hidden.2", "attention.1")):
        model("nonsense")
    assert hooks_of(model) == before == 0
    assert not model.encoder.whole_last_layer


def test_hooks_go_to_the_model_inside_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = bert()
        with Capture(DistributedDataParallel(model), keys("hidden.2", "module.classifier")) as seen:
            expected = DistributedDataParallel(model)(**batch(), output_hidden_states=True)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(seen.features[key("hidden.2")], expected.hidden_states[2])
    assert torch.equal(seen.features[key("module.classifier")], expected.logits)
