"""Several teachers of one market: the first, and the members of its ensemble (papers.md C14).

A member is the first teacher with some settings changed, so what trains, freezes, reads and asks
the one serves the others: ``as_member`` gives the settings under which it is *the* teacher.
"""

from collections.abc import Callable

from driftline.pipelines.frozen_teacher import Teacher, check_frozen
from driftline.pipelines.teacher import stale_part, teacher_key, train_teacher
from driftline.pipelines.teacher_input import teacher_columns
from driftline.pipelines.training_sets import known_frame, with_outcome
from driftline.platform.errors import EmptyWindowError, SettingsError
from driftline.platform.settings import DriftlineSettings, TeacherMember
from driftline.platform.workspace import Workspace


def as_member(settings: DriftlineSettings, member: TeacherMember) -> DriftlineSettings:
    """The settings of a market whose teacher is this member."""
    first = settings.teacher
    changes = {
        "encoder": member.encoder or first.encoder,
        "columns": first.columns if member.columns is None else member.columns,
        "negative_keep_rate": member.negative_keep_rate or first.negative_keep_rate,
        "mlm": first.mlm if member.mlm == "same" else member.mlm,
        "supervised": member.supervised or first.supervised,
        "ensemble": (),
    }
    seed = settings.seed if member.seed is None else member.seed
    return settings.model_copy(update={"seed": seed, "teacher": first.model_copy(update=changes)})


def find_member(settings: DriftlineSettings, name: str) -> TeacherMember:
    """The member of this name.

    Raises:
        SettingsError: there is none.
    """
    members = {member.name: member for member in settings.teacher.ensemble}
    if name not in members:
        known = sorted(members) or "the first teacher"
        raise SettingsError(f"teacher.ensemble has no member {name!r}, only {known}")
    return members[name]


def train_teachers(
    settings: DriftlineSettings, *, progress: Callable[[int, int], None] | None = None
) -> tuple[Teacher, ...]:
    """Train and freeze the first teacher and all members; those that are frozen stay.

    Raises:
        FrozenTeacherError: one of them is frozen and was trained with other settings.
        EmptyWindowError: the window of one holds no rows; nothing was trained then.
        SettingsError: the columns of one do not exist; nothing was trained then.
    """
    check_members(settings)
    teachers = [train_teacher(settings, progress=progress)]
    for member in settings.teacher.ensemble:
        teachers.append(
            train_teacher(
                as_member(settings, member),
                name=member.name,
                share=member.window,
                label=member.label,
                progress=progress,
            )
        )
    return tuple(teachers)


def check_members(settings: DriftlineSettings) -> None:
    """Find what is wrong with a member before any is trained; see ``train_teachers``."""
    workspace = Workspace.of(settings)
    for member in settings.teacher.ensemble:
        own = as_member(settings, member)
        if (workspace.teachers / member.name).exists():
            teacher = Teacher.open(workspace, member.name)
            check_frozen(teacher, teacher_key(own, share=member.window, label=member.label))
            continue
        teacher_columns(own)
        window, as_of = stale_part(own, member.window)
        labels = [label.name for label in settings.select(kind="label")]
        if member.label is not None and member.label not in labels:
            raise SettingsError(
                f"teacher {member.name!r}: {member.label!r} is no feature of kind label, got "
                f"{labels}; declare it in `features:`"
            )
        frame = known_frame(own, window, as_of=as_of, columns=["event_time", "clicked", *labels])
        frame = with_outcome(frame, member.label)
        clicked = frame["clicked"]
        if len(clicked.unique()) < 2:
            raise EmptyWindowError(
                f"teacher {member.name!r}: window {list(member.window)} of the stale rows is "
                f"{window} and holds {len(clicked)} rows, all or none clicked; "
                "training needs both outcomes, take a longer window"
            )
