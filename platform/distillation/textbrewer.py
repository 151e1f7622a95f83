"""Reads the objective out of a configuration written for TextBrewer.

Its parts mean what they say, not what the defects of 0.2.1.post1 make of them (papers.md 3.3):
weights are multiplied by their schedule, "none" is none, masked products are divided by the width.
"""

from collections.abc import Mapping
from typing import Any, Final

from driftline.platform.objective_settings import ObjectiveSettings

KNOWN: Final[Mapping[str, Any]] = {
    "temperature": 4,
    "temperature_scheduler": "none",
    "hard_label_weight": 0,
    "hard_label_weight_scheduler": "none",
    "kd_loss_type": "ce",
    "kd_loss_weight": 1,
    "kd_loss_weight_scheduler": "none",
    "probability_shift": False,
    "intermediate_matches": None,
    "is_caching_logits": False,  # we compute a teacher's output once, whatever the match
}
"""Keys of ``DistillationConfig`` and their defaults (papers.md 3.2)."""
TEMPERATURES: Final = {"flsw": ("beta", "gamma"), "cwsm": ("beta",)}
MATCH_KEYS: Final = {"layer_T", "layer_S", "feature", "loss", "weight", "proj"}


def read_distillation_config(
    config: Mapping[str, Any], *, compat: bool = False
) -> ObjectiveSettings:
    """The objective of a ``DistillationConfig`` in its JSON form.

    Layers count as in TextBrewer's lists: hidden state 0 is the embedding output, attention 0 the
    first layer's. Attention is taken to be raw scores.

    Args:
        config: The file's content.
        compat: Keep what 0.2.1.post1 computes in ``nst`` and attention matches.

    Raises:
        ValueError: a key or value that TextBrewer does not know, or that we do not have.
    """
    unknown = sorted(config.keys() - KNOWN.keys())
    if unknown:
        raise ValueError(
            f"DistillationConfig has no {', '.join(unknown)}; it has {', '.join(KNOWN)}"
        )
    values = {**KNOWN, **config}
    return ObjectiveSettings.model_validate(
        {
            "temperature": values["temperature"],
            "example_temperature": _temperature(values["temperature_scheduler"]),
            "tau_squared": False,
            "hard_weight": _weight(values, "hard_label_weight"),
            "soft_weight": _weight(values, "kd_loss_weight"),
            "soft": values["kd_loss_type"],
            "probability_shift": values["probability_shift"],
            "matches": [_match(raw, compat) for raw in values["intermediate_matches"] or ()],
        }
    )


def _weight(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {"base": values[key], "schedule": _constant(values[f"{key}_scheduler"])}


def _constant(name: Any) -> Any:
    return "constant" if name in ("none", None) else name


def _temperature(raw: Any) -> Any:
    """``"none"``, ``"constant"``, ``["flsw", beta, gamma]`` or ``["cwsm", beta]``."""
    name, *numbers = raw if isinstance(raw, list | tuple) else (raw,)
    return {"kind": _constant(name), **dict(zip(TEMPERATURES.get(name, ()), numbers, strict=True))}


def _match(raw: Mapping[str, Any], compat: bool) -> dict[str, Any]:
    unknown, missing = raw.keys() - MATCH_KEYS, MATCH_KEYS - {"weight", "proj"} - raw.keys()
    if unknown or missing:
        raise ValueError(
            f"an intermediate match needs {', '.join(sorted(MATCH_KEYS))} (weight and proj may be "
            f"left out), got {dict(raw)}"
        )
    kind = raw["loss"]
    is_attention = raw["feature"] == "attention"
    student, teacher = (_layers(raw[key], is_attention) for key in ("layer_S", "layer_T"))
    values = {"kind": kind, "weight": raw.get("weight", 1), "projection": _projection(raw)}
    pairs = list(zip(student, teacher, strict=True))
    if len(pairs) > 1:
        values["flow"] = "same" if pairs[0] == pairs[1] else "next"
        pairs = list(dict.fromkeys(pairs))
    if compat and (is_attention or kind in ("nst", "mmd")):
        values["compat"] = True
    return values | {"layers": {"kind": "explicit", "pairs": pairs}}


def _layers(raw: Any, is_attention: bool) -> list[int]:
    return [layer + is_attention for layer in (raw if isinstance(raw, list | tuple) else [raw])]


def _projection(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """``[kind, student's width, teacher's width, {"lr": 1e-3}]``; the widths are the models'."""
    if raw.get("proj") is None:
        return None
    kind, _, _, *group = raw["proj"]
    options = dict(group[0]) if group else {}
    rate = options.pop("lr", None)
    if options:
        raise ValueError(
            f"a projection can have its own learning rate only, got {sorted(options)} in proj of "
            f"match {raw['loss']}"
        )
    return {"kind": kind, "always": True, "learning_rate": rate}
