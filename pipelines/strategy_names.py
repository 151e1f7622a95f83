"""Strategies by their published names (papers.md S0.31, S1.3).

Each is a function from the strategy of the settings, which lends its recipes, to a strategy. Only
the structure is the paper's: epochs, rates, objective and head stage stay those of the base.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal

from driftline.platform.initialisers import Initialiser, MlmStart, RandomStart, SupervisedStart
from driftline.platform.settings import ArmsRefreshSettings, StageSettings

Start = Literal["random", "mlm", "supervised"]
Distillation = Literal["none", "ood", "id"]
FineTuning = Literal["none", "vanilla", "self_training"]
Triple = tuple[Start, Distillation, FineTuning]

APPROACHES: Final[Mapping[int, Triple]] = {
    1: ("random", "none", "vanilla"),
    2: ("mlm", "none", "vanilla"),
    3: ("supervised", "none", "vanilla"),
    4: ("random", "ood", "vanilla"),
    5: ("mlm", "ood", "vanilla"),
    6: ("supervised", "ood", "vanilla"),
    7: ("random", "id", "vanilla"),
    8: ("mlm", "id", "vanilla"),
    9: ("supervised", "id", "vanilla"),
    10: ("mlm", "ood", "self_training"),
}
"""Table 3 of CTR-BERT."""

_STARTS: Final[Mapping[str, Initialiser]] = {
    "random": RandomStart(),
    "mlm": MlmStart(),
    "supervised": SupervisedStart(),
}


def strategy_of(triple: Triple, base: ArmsRefreshSettings) -> ArmsRefreshSettings:
    """Initialisation, distillation, fine-tuning (papers.md S0.17-S0.19)."""
    start, distillation, finetuning = triple
    distil = None
    if distillation != "none":
        recipe = base.distil or ArmsRefreshSettings.model_fields["distil"].default
        distil = recipe.model_copy(update={"on": distillation})
    finetune = None if finetuning == "none" else base.finetune or StageSettings()
    is_self_training = finetuning == "self_training"
    rounds = base.self_training.model_copy(update={"enabled": is_self_training})
    changes = {"distil": distil, "finetune": finetune, "self_training": rounds}
    return ArmsRefreshSettings(**{**dict(base), "init": _STARTS[start], **changes})


def approach(number: int, base: ArmsRefreshSettings) -> ArmsRefreshSettings:
    """One of the ten approaches of Table 3.

    Raises:
        ValueError: there is no such number.
    """
    if number not in APPROACHES:
        raise ValueError(f"approach must be one of {list(APPROACHES)}, got {number}")
    return strategy_of(APPROACHES[number], base)


def triple_of(strategy: ArmsRefreshSettings) -> Triple:
    """The triple of a strategy.

    Raises:
        ValueError: it starts in a way that CTR-BERT does not know.
    """
    starts: dict[str, Start] = {"random": "random", "mlm": "mlm", "supervised": "supervised"}
    if strategy.init.kind not in starts:
        raise ValueError(f"init must be one of {list(starts)}, got {strategy.init.kind!r}")
    distillation: Distillation = "none" if strategy.distil is None else strategy.distil.on
    finetuning: FineTuning = "none" if strategy.finetune is None else "vanilla"
    if strategy.self_training.enabled:
        finetuning = "self_training"
    return starts[strategy.init.kind], distillation, finetuning


NAMED_STRATEGIES: Final[Mapping[str, Callable[[ArmsRefreshSettings], ArmsRefreshSettings]]] = {
    "basic": lambda base: strategy_of(("random", "none", "vanilla"), base),
    "KD": lambda base: strategy_of(("random", "ood", "none"), base),
    "PF": lambda base: strategy_of(("mlm", "none", "vanilla"), base),
    "PD": lambda base: strategy_of(("mlm", "ood", "none"), base),
    "PD-F": lambda base: strategy_of(("mlm", "ood", "vanilla"), base),
}
"""Pre-training, distillation, fine-tuning: which of them (papers.md S1.3)."""
