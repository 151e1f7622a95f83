"""What will happen, before anything runs: tiers, clocks, schedule, sizes, paths."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from driftline.pipelines.teacher_input import teacher_columns
from driftline.platform.columns import group_counter_names, head_columns, product_counter_names
from driftline.platform.models.build import count_parameters
from driftline.platform.models.spec import (
    HeadOnlySpec,
    TeacherSpec,
    TwinSpec,
    encoder_spec,
    head_spec,
)
from driftline.platform.settings import CheckpointEncoder, DriftlineSettings, Encoder, TierName
from driftline.platform.text import Tokenizer
from driftline.platform.windows import HOUR
from driftline.platform.workspace import Workspace

CATEGORIES_ASSUMED = 1_000
"""Size of a category table while no log has been seen."""


@dataclass(frozen=True)
class Schedule:
    """How often each part is refreshed."""

    arms: timedelta
    head: timedelta
    materialize: dict[TierName, timedelta]
    """Half the tier's value freshness, so that a value is replaced before it is too old."""


def schedule(settings: DriftlineSettings) -> Schedule:
    """Cadences that follow from the tiers' two clocks (papers.md S0.4)."""
    tiers = settings.tiers
    head_hours = min(tiers.medium.parameter_freshness_hours, tiers.short.parameter_freshness_hours)
    names: tuple[TierName, ...] = ("long", "medium", "short")
    return Schedule(
        arms=tiers.long.parameter_freshness_hours * HOUR,
        head=head_hours * HOUR,
        materialize={name: tiers[name].value_freshness_hours * HOUR / 2 for name in names},
    )


def make_plan(settings: DriftlineSettings) -> dict[str, Any]:
    """Everything ``driftline plan`` prints, as JSON-able values; nothing is run or created."""
    columns = head_columns(settings)
    due = schedule(settings)
    teacher_reads = teacher_columns(settings)
    return {
        "name": settings.name,
        "workspace": str(Workspace.of(settings).root),
        "tiers": {
            name: {
                "value_freshness_hours": settings.tiers[name].value_freshness_hours,
                "parameter_freshness_hours": settings.tiers[name].parameter_freshness_hours,
                "on_stale": settings.tiers[name].on_stale,
                "materialize_every_hours": due.materialize[name] / HOUR,
                "features": [f.name for f in settings.select() if f.tier == name],
            }
            for name in due.materialize
        },
        "teacher": [*(f.name for f in settings.select(kind="text")), *teacher_reads],
        "arms": [feature.name for feature in settings.select(kind="text")],
        "head": {
            "declared": [f.name for f in settings.select() if f.kind != "text"],
            "counters_per_product": len(product_counter_names(settings.counters)),
            "counters_per_category": (
                len(group_counter_names(settings.counters)) if settings.counters.category else 0
            ),
            "num_categorical": sum(column.kind == "categorical" for column in columns),
            "num_numeric": sum(column.kind == "numeric" for column in columns),
        },
        "schedule": {
            "refresh_arms_every_hours": due.arms / HOUR,
            "refresh_head_every_hours": due.head / HOUR,
            "label_maturity_minutes": settings.labels.maturity_minutes,
        },
        "parameters": count_sizes(settings),
        "warnings": warnings(settings),
    }


def count_sizes(settings: DriftlineSettings) -> dict[str, int]:
    """Parameters of teacher, arms and head, counted on the ``meta`` device."""
    columns = head_columns(settings)
    num_categorical = sum(column.kind == "categorical" for column in columns)
    student = settings.student
    encoder = encoder_spec(student.encoder, vocabulary_size=_vocabulary(settings, student.encoder))
    has_text = bool(settings.select(kind="text"))
    head = head_spec(
        student.head,
        vector_size=encoder.hidden_size if has_text else 0,
        cardinalities=(CATEGORIES_ASSUMED,) * num_categorical,
        num_numbers=2 * (len(columns) - num_categorical),
    )
    teacher = encoder_spec(
        settings.teacher.encoder, vocabulary_size=_vocabulary(settings, settings.teacher.encoder)
    )
    sizes = {
        "teacher": count_parameters(TeacherSpec(encoder=teacher)),
        "head": count_parameters(HeadOnlySpec(head=head)),
    }
    whole = sizes["head"]
    if has_text:
        twin = TwinSpec(encoder=encoder, tie_arms=student.tie_arms, head=head)
        whole = count_parameters(twin)
    return sizes | {"arms": whole - sizes["head"], "student": whole}


def warnings(settings: DriftlineSettings) -> list[str]:
    """What is allowed but probably not meant."""
    found = [
        f"feature {f.name}: text of tier {f.tier} still goes to the arms, which are refreshed "
        f"every {settings.tiers.long.parameter_freshness_hours:g} h"
        for f in settings.select(kind="text")
        if f.tier != "long"
    ]
    if not settings.select(kind="text"):
        found.append("no text features: the student has no arms, only a head")
    return found


def plan_text(plan: dict[str, Any]) -> str:
    """The plan for a person."""
    lines = [f"{plan['name']}   workspace {plan['workspace']}", "", "tiers"]
    for name, tier in plan["tiers"].items():
        lines.append(
            f"  {name:<7} values fresh {tier['value_freshness_hours']:g} h ({tier['on_stale']} "
            f"when older), weights fresh {tier['parameter_freshness_hours']:g} h, "
            f"materialise every {tier['materialize_every_hours']:g} h"
        )
        lines.append(f"          {', '.join(tier['features']) or '(derived counters only)'}")
    head = plan["head"]
    every = plan["schedule"]
    sizes = plan["parameters"]
    lines += [
        "",
        f"teacher     reads {len(plan['teacher'])} features as text",
        f"arms read   {', '.join(plan['arms']) or '(nothing)'}",
        f"head reads  two vectors, {head['num_categorical']} categories, "
        f"{head['num_numeric']} numbers ({head['counters_per_product']} counters a product, "
        f"{head['counters_per_category']} a category or pair)",
        f"            {', '.join(head['declared'])}",
        "",
        f"schedule    arms every {every['refresh_arms_every_hours']:g} h, "
        f"head every {every['refresh_head_every_hours']:g} h; "
        f"labels known after {every['label_maturity_minutes']:g} min",
        "",
        "parameters  " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()),
    ]
    return "\n".join([*lines, *(f"warning     {warning}" for warning in plan["warnings"])])


def _vocabulary(settings: DriftlineSettings, encoder: Encoder) -> int | None:
    """Tokens: of the trained tokeniser if there is one, else as many as it may get."""
    if isinstance(encoder, CheckpointEncoder):
        return None
    trained = Workspace.of(settings).tokenizer
    if trained.exists():
        return Tokenizer(trained).vocabulary_size
    return settings.tokenizer.vocabulary_size
