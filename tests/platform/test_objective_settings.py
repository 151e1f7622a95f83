"""Settings of the objective: short form, presets, round trips, contradictions."""

import json
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from driftline.platform.distillation.layer_maps import ExplicitMap
from driftline.platform.distillation.matches import (
    AttentionMse,
    Cos,
    HiddenMse,
    Match,
    ModelShape,
    Nst,
    Pkd,
)
from driftline.platform.distillation.presets import PRESETS
from driftline.platform.distillation.projections import LinearProjection
from driftline.platform.distillation.schedules import LinearDecay, Weight
from driftline.platform.distillation.soft_losses import BinaryLoss, CeLoss, KlLoss
from driftline.platform.distillation.temperatures import Flsw
from driftline.platform.distillation.textbrewer import read_distillation_config
from driftline.platform.settings import ObjectiveSettings

LAYERS = [[0, 0], [1, 3], [2, 6], [3, 9], [4, 12]]
FIGURE_3: dict[str, Any] = {
    "preset": "textbrewer",
    "example_temperature": "none",
    "hard_weight": {"base": 0, "schedule": "none"},
    "soft_weight": {"base": 1, "schedule": "none"},
    "probability_shift": False,
    "matches": [
        {
            "kind": "hidden_mse",
            "weight": 1,
            "layers": {"kind": "explicit", "pairs": LAYERS},
            "projection": {"kind": "linear", "always": True},
        },
        {"kind": "nst", "weight": 1, "layers": {"kind": "explicit", "pairs": LAYERS}},
    ],
}
"""The configuration of TextBrewer's figure 3 in valid JSON (papers.md S2.9, A2.2), in our words."""
FIGURE_3_THEIRS: dict[str, Any] = {
    "temperature": 8,
    "temperature_scheduler": "none",
    "hard_label_weight": 0,
    "hard_label_weight_scheduler": "none",
    "kd_loss_type": "ce",
    "kd_loss_weight": 1,
    "kd_loss_weight_scheduler": "none",
    "probability_shift": False,
    "intermediate_matches": [
        {
            "layer_T": t,
            "layer_S": s,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1,
            "proj": ["linear", 312, 768],
        }
        for s, t in LAYERS
    ]
    + [
        {"layer_T": [t, t], "layer_S": [s, s], "feature": "hidden", "loss": "nst", "weight": 1}
        for s, t in LAYERS
    ],
}
"""The same in TextBrewer's words."""

OBJECTIVES: dict[str, dict[str, Any]] = {
    "empty": {},
    "short": {"alpha": 0.1},
    **{name: {"preset": name} for name in PRESETS},
    "figure 3": FIGURE_3,
    "all parts": {
        "hard_weight": {"base": 0.3, "schedule": {"kind": "during", "start": 0.5}},
        "soft_weight": {"base": 1, "schedule": "cosine_decay"},
        "temperature": 6,
        "tau_squared": False,
        "soft": {"kind": "binary", "independent": True},
        "example_temperature": {"kind": "flsw", "beta": 2, "gamma": 3, "minimum": 1},
        "probability_shift": True,
        "tokens": "masked",
        "matches": [
            {"kind": "gram", "flow": "next", "layers": {"kind": "skip", "stride": 2}},
            {"kind": "mmd", "compat": True, "layers": "last"},
            {"kind": "attention_kl", "weight": {"base": 2, "schedule": "none"}},
            {"kind": "attention_mse_sum", "on": "probabilities"},
            {"kind": "pkd", "projection": {"kind": "tanh", "learning_rate": 0.01}},
            {"kind": "cos", "projection": "none"},
            {"kind": "embedding_mse", "projection": "relu"},
            {"kind": "module", "student": "head.0", "teacher": "pooler", "measure": "cos"},
        ],
    },
}


@pytest.mark.parametrize("raw", OBJECTIVES.values(), ids=OBJECTIVES)
def test_objectives_survive_json_and_yaml(raw: dict[str, Any]) -> None:
    settings = ObjectiveSettings.model_validate(raw)
    dumped = settings.model_dump(mode="json")
    assert ObjectiveSettings.model_validate(dumped) == settings
    assert ObjectiveSettings.model_validate_json(settings.model_dump_json()) == settings
    assert ObjectiveSettings.model_validate(yaml.safe_load(yaml.safe_dump(dumped))) == settings
    assert ObjectiveSettings.model_validate(settings.model_dump()) == settings
    assert ObjectiveSettings.model_validate(json.loads(json.dumps(raw))) == settings
    assert ObjectiveSettings.model_validate(dumped).model_dump(mode="json") == dumped


def test_the_short_form_is_equation_one() -> None:
    settings = ObjectiveSettings.model_validate({"alpha": 0.1})
    assert settings.weights_at(0.0) == settings.weights_at(1.0) == (0.9, 0.1)
    assert ObjectiveSettings().alpha == 0.5


def test_presets_are_the_papers_objectives() -> None:
    def preset(name: str, **changes: Any) -> ObjectiveSettings:
        return ObjectiveSettings.model_validate({"preset": name, **changes})

    assert preset("ctrbert") == ObjectiveSettings(alpha=0.5, temperature=2, soft=KlLoss())
    assert preset("turc").weights_at(0) == (0, 1)
    assert (preset("turc").temperature, preset("turc").soft) == (1, CeLoss())
    textbrewer = preset("textbrewer")
    assert (textbrewer.temperature, textbrewer.tau_squared) == (8, False)
    assert [match.kind for match in textbrewer.matches] == ["hidden_mse", "nst"]
    thesis = preset("thesis")
    assert thesis.weights_at(0) == pytest.approx((1 / 3, 1 / 3))
    assert thesis.matches == (Cos(weight=Weight(base=1 / 3), projection=LinearProjection()),)
    assert (preset("zhao").needs_labels, preset("zhao").needs_teacher) == (True, False)


def test_what_stands_beside_a_preset_wins() -> None:
    settings = ObjectiveSettings.model_validate(
        {"preset": "textbrewer", "temperature": 4, "matches": [], "soft_weight": 2}
    )
    assert (settings.temperature, settings.matches) == (4, ())
    assert settings.weights_at(0) == (0, 2)
    short = ObjectiveSettings.model_validate({"preset": "thesis", "alpha": 0.3})
    assert short.weights_at(0) == (0.7, 0.3)
    longer = ObjectiveSettings.model_validate({"preset": "ctrbert", "hard_weight": 2})
    assert longer.weights_at(0) == (2, 0.5)


def test_an_expanded_preset_is_the_same_objective() -> None:
    by_name = ObjectiveSettings.model_validate({"preset": "turc"})
    assert by_name == ObjectiveSettings.model_validate(dict(PRESETS["turc"]))
    assert "preset" not in by_name.model_dump()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"preset": "hinton"}, "preset must be one of ctrbert, turc, .*, zhao, got 'hinton'"),
        ({"preset": ["turc"]}, r"preset must be one of ctrbert, .*, got \['turc'\]"),
        ({"example_temperature": {"kind": "flsw", "beta": float("inf")}}, "beta\n.*finite"),
        ({"example_temperature": {"kind": "flsw", "gamma": float("inf")}}, "gamma\n.*finite"),
        ({"alpha": 0.5, "soft_weight": 1}, "either alpha or hard_weight .* got alpha and soft_w"),
        ({"hard_weight": 1}, "give hard_weight and soft_weight together .* got only hard_weight"),
        ({"hard_weight": 0, "soft_weight": 0}, "every weight is 0: nothing would be learned"),
        (
            {"hard_weight": 0, "soft_weight": 0, "matches": [{"kind": "cos", "weight": 0}]},
            "every weight is 0",
        ),
        ({"alpha": 0, "probability_shift": True}, "change soft labels, whose weight is 0"),
        ({"alpha": 0, "example_temperature": "cwsm"}, "change soft labels, whose weight is 0"),
        (
            {"temperature": 1, "example_temperature": {"kind": "flsw", "minimum": 2}},
            r"minimum must be at most temperature \(1.0\), got 2.0",
        ),
        ({"temperature": 0}, "temperature\n.*greater than 0"),
        ({"temperature": float("inf")}, "temperature\n.*finite"),
        ({"soft": "logit_mse"}, "soft\n.*kind must be one of binary, ce, .*kl, mse, reverse_kl"),
        ({"divergence": "kl"}, "divergence\n.*Extra inputs are not permitted"),
        ({"soft": {"kind": "kl", "tau": 2}}, r"soft\.tau\n.*Extra inputs are not permitted"),
        (
            {"matches": [{"kind": "cos"}, {"kind": "nst", "weight": {"base": -1}}]},
            r"matches\.1\.weight\.base\n.*greater than or equal to 0",
        ),
        (
            {"matches": [{"kind": "attention_ce", "compat": True, "on": "probabilities"}]},
            "attention_ce: compat needs on: scores, got probabilities",
        ),
        (
            {"matches": [{"kind": "attention_kl", "compat": True, "on": "scores"}]},
            "textbrewer has none, compat must be false",
        ),
        (
            {"matches": [{"kind": "attention_ce", "projection": "linear"}]},
            "attention has no projection, got linear",
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_mistakes_are_named_with_their_path(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        ObjectiveSettings.model_validate(raw)


@pytest.mark.parametrize(
    ("raw", "labels", "soft_labels", "features"),
    [
        ({}, True, True, False),
        ({"alpha": 0}, True, False, False),
        ({"alpha": 1}, False, True, False),
        ({"alpha": 0, "matches": ["cos"]}, True, False, True),
        ({"alpha": 0, "matches": [{"kind": "cos", "weight": 0}]}, True, False, False),
        ({"hard_weight": 0, "soft_weight": 0, "matches": ["cos"]}, False, False, True),
        (
            {"hard_weight": {"base": 1, "schedule": "linear_growth"}, "soft_weight": 1},
            True,
            True,
            False,
        ),
    ],
)
def test_an_objective_says_what_it_needs(
    raw: dict[str, Any], labels: bool, soft_labels: bool, features: bool
) -> None:
    settings = ObjectiveSettings.model_validate(raw)
    assert settings.needs_labels == labels
    assert settings.needs_soft_labels == soft_labels
    assert settings.needs_features == features
    assert settings.needs_teacher == (soft_labels or features)


def test_parts_that_a_task_would_ignore_are_refused() -> None:
    masked = ObjectiveSettings(tokens="masked")
    shifted = ObjectiveSettings(probability_shift=True)
    masked.check_task("tokens")
    shifted.check_task("clicks")
    with pytest.raises(ValueError, match=r"objective.tokens .* got 'masked' for a stage over cli"):
        masked.check_task("clicks")
    with pytest.raises(ValueError, match=r"probability_shift lets the clicked class win"):
        shifted.check_task("tokens")
    binary = ObjectiveSettings.model_validate({"soft": "binary"})
    binary.check_task("clicks")
    with pytest.raises(ValueError, match=r"objective.soft: binary is of a click"):
        binary.check_task("tokens")


# --- TextBrewer's own files -----------------------------------------------------------------


def test_figure_3_means_what_the_paper_says() -> None:
    settings = ObjectiveSettings.model_validate_json(json.dumps(FIGURE_3))
    assert (settings.temperature, settings.tau_squared, settings.soft) == (8, False, CeLoss())
    assert settings.weights_at(0) == settings.weights_at(1) == (0, 1)
    student, teacher = ModelShape(4, 312), ModelShape(12, 768)
    points = [match.points(student, teacher) for match in settings.matches]
    layers = [[(p.student[0].place, p.teacher[0].place) for p in group] for group in points]
    assert layers == [[tuple(pair) for pair in LAYERS]] * 2
    assert {p.projection for p in points[0]} == {(312, 768)}
    assert {p.projection for p in points[1]} == {None}


def test_textbrewers_own_file_gives_the_same_objective() -> None:
    theirs = read_distillation_config(json.loads(json.dumps(FIGURE_3_THEIRS)))
    ours = ObjectiveSettings.model_validate(FIGURE_3)
    student, teacher = ModelShape(4, 312), ModelShape(12, 768)

    def points(settings: ObjectiveSettings) -> list[Any]:
        found = [(m.kind, m.points(student, teacher), m.weight) for m in settings.matches]
        return [(kind, point, weight) for kind, group, weight in found for point in group]

    assert points(theirs) == points(ours)
    same = {"matches", "hard_weight", "soft_weight", "example_temperature"}
    assert theirs.model_dump(exclude=same) == ours.model_dump(exclude=same)
    assert theirs.weights_at(0.5) == ours.weights_at(0.5)


def test_textbrewers_other_settings_are_understood() -> None:
    settings = read_distillation_config(
        {
            "temperature_scheduler": ["flsw", 1, 2],
            "kd_loss_weight": 5,
            "kd_loss_weight_scheduler": "linear_decay",
            "intermediate_matches": [
                {"layer_T": 3, "layer_S": 0, "feature": "attention", "loss": "attention_mse"},
                {"layer_T": [0, 4], "layer_S": [0, 1], "feature": "hidden", "loss": "mmd"},
                {
                    "layer_T": 2,
                    "layer_S": 1,
                    "feature": "hidden",
                    "loss": "pkd",
                    "weight": 0.5,
                    "proj": ["tanh", 4, 8, {"lr": 0.01}],
                },
            ],
        },
        compat=True,
    )
    assert settings.example_temperature == Flsw(beta=1, gamma=2)
    assert settings.soft_weight == Weight(base=5, schedule=LinearDecay())
    attention, products, pkd = settings.matches
    # Their attention counts from the first layer, ours from 1.
    assert attention == AttentionMse(compat=True, layers=ExplicitMap(pairs=((1, 4),)))
    assert products.model_dump(exclude={"layers"}) == Nst(
        kind="mmd", compat=True, flow="next"
    ).model_dump(exclude={"layers"})
    (point,) = products.points(ModelShape(1, 4), ModelShape(4, 8))
    assert [str(key) for key in (*point.student, *point.teacher)] == [
        "hidden.0",
        "hidden.1",
        "hidden.0",
        "hidden.4",
    ]
    assert isinstance(pkd, Pkd)
    assert pkd.projection is not None
    assert (pkd.projection.kind, pkd.projection.learning_rate) == ("tanh", 0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temprature": 4}, "DistillationConfig has no temprature; it has temperature, "),
        ({"kd_loss_type": "kld"}, "kind must be one of binary, ce, "),
        ({"intermediate_matches": [{"loss": "cos"}]}, r"needs feature, .* got \{'loss': 'cos'\}"),
        (
            {
                "intermediate_matches": [
                    {
                        "layer_T": 1,
                        "layer_S": 1,
                        "feature": "hidden",
                        "loss": "cos",
                        "proj": ["linear", 4, 8, {"momentum": 0.9}],
                    }
                ]
            },
            r"its own learning rate only, got \['momentum'\] in proj of match cos",
        ),
    ],
)
def test_textbrewers_mistakes_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_distillation_config(config)


def test_objectives_compare_by_value() -> None:
    one, two = (ObjectiveSettings.model_validate(FIGURE_3) for _ in range(2))
    assert one == two
    assert len({one, two}) == 1
    assert one != ObjectiveSettings(soft=BinaryLoss())
    assert isinstance(one.matches[0], Match)
    assert isinstance(one.matches[0], HiddenMse)
    loss = one.matches[0].loss([torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)])
    assert float(loss) == 1
