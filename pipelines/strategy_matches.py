"""Which inner tensors of its teacher a strategy needs; what cannot be matched is refused here."""

from collections.abc import Iterable

from driftline.pipelines.laboratory import Laboratory
from driftline.pipelines.student_forms import FormName, StudentForm, student_form
from driftline.pipelines.teacher_input import TeacherInput
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.errors import SettingsError
from driftline.platform.models.spec import ModelSpec, TeacherSpec
from driftline.platform.settings import ArmsRefreshSettings
from driftline.platform.stage_teacher import teacher_keys, token_view


def match_keys(form: StudentForm, strategy: ArmsRefreshSettings) -> tuple[FeatureKey, ...]:
    """Tensors that the matches of a strategy compare a form of student with; none without matches.

    Needs the teacher's shape and its tokeniser, but runs nothing.

    Raises:
        SettingsError: a match is impossible between the two: no such layer or module, other
            widths without a projection, or token by token where they read other tokens.
        MissingArtefactError: there is no teacher yet.
    """
    if strategy.distil is None or not strategy.objective.matches:
        return ()
    store = form.laboratory.store
    teacher = TeacherSpec.model_validate(store.teacher.manifest["spec"])
    tokens = (_tokens(form.spec, form.reader), _tokens(teacher, store.reader))
    try:
        return teacher_keys(strategy.objective.matches, form.spec, teacher, tokens=tokens)
    except ValueError as error:
        raise SettingsError(f"objective.matches: {error}") from error


def _tokens(spec: ModelSpec, reader: TeacherInput | None) -> str:
    """How rows become tokens; equal names give equal ids."""
    view = token_view(spec)
    if reader is None:
        return view
    columns = ", ".join(reader.serialiser.columns) or "text alone"
    return f"{view}, tokeniser {reader.tokenizer.hash[:8]}, of {columns}"


def keep_features(
    laboratory: Laboratory, strategies: Iterable[ArmsRefreshSettings], *, form: FormName = "twin"
) -> None:
    """Let the one pass of the teacher keep what any of these strategies will need.

    Raises:
        SettingsError: see ``match_keys``; nothing was labelled or trained then.
    """
    student = student_form(form, laboratory)
    laboratory.keep(key for strategy in strategies for key in match_keys(student, strategy))
