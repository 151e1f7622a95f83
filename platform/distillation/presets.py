"""Objectives of the five papers by name (papers.md section 6), as the YAML they stand for.

What a settings file says beside ``preset`` wins over what is written here.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Final

RIVALS: Final[Mapping[str, tuple[str, ...]]] = {
    "alpha": ("hard_weight", "soft_weight"),
    "hard_weight": ("alpha",),
    "soft_weight": ("alpha",),
}
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    # CTR-BERT, equation (1), with the Hinton direction and factor (S0.16, A0.10, A0.11)
    "ctrbert": {"alpha": 0.5, "soft": "kl", "temperature": 2.0, "tau_squared": True},
    # Well-read students: soft labels alone at temperature 1, clicks in a stage of their own
    "turc": {
        "hard_weight": 0.0,
        "soft_weight": 1.0,
        "soft": "ce",
        "temperature": 1.0,
        "tau_squared": False,
    },
    # TextBrewer's experiments (S2.8); for students that read the teacher's own tokens
    "textbrewer": {
        "hard_weight": 0.0,
        "soft_weight": 1.0,
        "soft": "ce",
        "temperature": 8.0,
        "tau_squared": False,
        "matches": [
            {"kind": "hidden_mse", "layers": "uniform", "projection": "linear"},
            {"kind": "nst", "layers": "uniform"},
        ],
    },
    # The thesis on transfer sets: masked-language distillation with the cosine of the last layer
    # (S3.5, A3.1-A3.3). Over clicks, the click takes the place of the masked token.
    "thesis": {
        "hard_weight": 1 / 3,
        "soft_weight": 1 / 3,
        "soft": "kl",
        "temperature": 2.0,
        "tau_squared": True,
        "matches": [{"kind": "cos", "weight": 1 / 3, "projection": "linear"}],
    },
    # Optimal subwords (S4.8): no soft labels, cross-entropy alone. The shared projections of
    # L_p + eps CE are of weights, not of rows: they come from ``init: dual_vocabulary``, whose
    # defaults are the paper's.
    "zhao": {"hard_weight": 1.0, "soft_weight": 0.0},
}


def forget_rivals(raw: MutableMapping[str, Any], name: str) -> None:
    """Make room in an objective's settings for ``name``, which is said after them: it wins.

    A preset takes out all that was said before, and ``alpha`` and the two weights take out each
    other. For overrides; what stands beside each other in one file is not ordered.
    """
    if name == "preset":
        raw.clear()
    for rival in RIVALS.get(name, ()):
        raw.pop(rival, None)


def expand_preset(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an objective without ``preset``: its keys, and what is given beside it.

    Of the two ways to weigh clicks against soft labels (``alpha``, or ``hard_weight`` and
    ``soft_weight``) the given one replaces the preset's.

    Raises:
        ValueError: no such preset.
    """
    given = {key: value for key, value in raw.items() if key != "preset"}
    name = raw.get("preset")
    if name is None:
        return given
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = dict(PRESETS[name])
    weights = {"hard_weight", "soft_weight"}
    if given.get("alpha") is not None:
        preset = {key: value for key, value in preset.items() if key not in weights}
    elif weights & given.keys() and "alpha" in preset:
        alpha = preset.pop("alpha")
        preset |= {"hard_weight": 1 - alpha, "soft_weight": alpha}
    return preset | given
