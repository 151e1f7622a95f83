"""The whole objective for any pair of modules; needs neither Ray nor the rest of Driftline.

Shape suffixes: B rows, T tokens, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from driftline.platform.distillation.anatomy import (
    evaluating,
    first_tensor,
    inner_model,
    shape_of,
)
from driftline.platform.distillation.capture import Capture
from driftline.platform.distillation.keys import FeatureKey
from driftline.platform.distillation.matches import ModelShape
from driftline.platform.distillation.matching import Features, Matching
from driftline.platform.objective import class_loss, click_loss, soft_loss, wide
from driftline.platform.objective_settings import ObjectiveSettings


@dataclass(frozen=True)
class Outputs:
    """What a model made of a batch, in our words."""

    logits: Tensor
    """``[B, C]``, or of every token ``[B, T, C]``."""
    mask: Tensor | None = None
    """1 for tokens, 0 for padding. ``[B, T]``."""
    labels: Tensor | None = None
    """True classes, negative where not known (``[B]`` or ``[B, T]``, integers); or shares of yes
    between 0 and 1, NaN where not known (``[B]``, floating point)."""


Adapter = Callable[[nn.Module, Any], Outputs]
"""Runs a model on a batch of whatever kind."""


@dataclass(frozen=True)
class TeacherTensors:
    """What the teacher said about a batch, computed before; nothing of it needs a gradient."""

    logits: Tensor | None = None
    """At temperature 1; NaN in rows without."""
    features: Features = field(default_factory=dict)
    """A tensor for each of ``Distiller.teacher_keys``."""


Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """The loss of a batch and what it is made of."""

    total: Tensor
    """What to differentiate."""
    matches: Mapping[str, Tensor]
    """Each match before its weight; without gradient."""
    label_parts: Callable[[], Parts]
    """Measures the hard and the soft part; costs nothing unless asked."""

    @cached_property
    def parts(self) -> Parts:
        """``hard``, ``soft`` (with t^2) and each match, before their weights; without gradient."""
        with torch.no_grad():
            return {**self.label_parts(), **self.matches}

    def floats(self) -> dict[str, float]:
        """``total`` and the parts as numbers; waits for the device, so ask now and then only."""
        values = torch.stack([self.total.detach(), *self.parts.values()]).tolist()
        return dict(zip(("total", *self.parts), values, strict=True))


def hugging_face(model: nn.Module, batch: Any) -> Outputs:
    """How models of transformers are run, and many others: the default adapter.

    A mapping (also a ``BatchEncoding``) is spread over named arguments, a list or tuple over
    positional ones, anything else is the only argument. ``attention_mask`` is the mask and
    ``labels`` are the labels, which the model itself does not see: it would compute a loss of its
    own. The logits are the attribute or key of that name, else the first tensor.
    """
    if not isinstance(batch, Mapping):
        output = model(*batch) if isinstance(batch, list | tuple) else model(batch)
        return Outputs(_logits(output))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return Outputs(_logits(model(**inputs)), batch.get("attention_mask"), batch.get("labels"))


class Distiller:
    """Computes L = w_hard CE + w_soft t^2 D + sum of matches for a student and its teacher.

    The training loop, the optimiser and the devices stay yours::

        import torch
        from transformers import BertConfig, BertForSequenceClassification as Bert
        from driftline.platform.distillation.distiller import Distiller
        from driftline.platform.settings import ObjectiveSettings

        size = {"vocab_size": 99, "num_attention_heads": 2, "intermediate_size": 64}
        teacher = Bert(BertConfig(**size, num_hidden_layers=4, hidden_size=32))
        student = Bert(BertConfig(**size, num_hidden_layers=2, hidden_size=16))
        objective = ObjectiveSettings(alpha=0.9, temperature=8, matches=[
            {"kind": "hidden_mse", "projection": {"kind": "linear", "learning_rate": 1e-3}},
            {"kind": "attention_ce", "weight": {"base": 0.5, "schedule": "linear_decay"}},
        ])
        batch = {"input_ids": torch.randint(5, 99, (8, 12)), "labels": torch.ones(8).long()}
        batch["attention_mask"] = torch.ones(8, 12).long()

        distiller = Distiller(student, objective, teacher=teacher, example=batch)
        optimizer = torch.optim.AdamW(distiller.parameter_groups(), lr=1e-4)
        for step in range(10):
            losses = distiller(batch, progress=step / 10)
            losses.total.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(losses.floats())

    Rows without a label learn from the teacher alone, and the other way round (``class_loss``).
    Logits of tokens ``[B, T, C]`` are handled as masked-language distillation (papers.md S3.5,
    A3.3): the hard loss is the mean over labelled tokens, the soft one over all that are not
    padding, or over the labelled ones where the objective says ``tokens: masked``.

    Projections are made once, here, however often the distiller is used (papers.md B7). With
    ``DistributedDataParallel`` register them in the student before wrapping it
    (``student.projections = distiller.projections``), so that their gradients are averaged too;
    wrap the student, then pass it to ``use``.

    Differs from TextBrewer: t^2 and every other defect of papers.md 3.3; several teachers can be
    matched too (with the first one's tensors).

    Args:
        student: What learns. Its mode (dropout) is yours.
        objective: The loss.
        teacher: A frozen model, several whose logits are averaged, or none: then hand
            ``TeacherTensors`` in with each batch. It is put into evaluation mode and runs without
            gradient (not in inference mode, whose tensors cannot take part in a gradient).
        teacher_shape: For matches without a live teacher; see ``anatomy.shape_of``.
        adapter: How the student is run on a batch.
        teacher_adapter: How a teacher is; as the student when not given.
        same_tokens: Both cut a row into the same tokens. Say False where they do not: matches of
            single tokens are then refused, those of rows (``pkd``, ``module``) remain.
        example: A batch to try everything on at once, without gradient. Needed where a match names
            a module whose width its own sizes do not tell, and advisable: shapes and labels are
            then checked before the training.
        teacher_example: The teacher's view of it; the same batch when not given.

    Raises:
        ValueError: a match is impossible between the two, or the objective does not fit what the
            models give; the message says what to change.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: ObjectiveSettings,
        *,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        teacher_shape: ModelShape | None = None,
        adapter: Adapter = hugging_face,
        teacher_adapter: Adapter | None = None,
        same_tokens: bool = True,
        example: Any = None,
        teacher_example: Any = None,
    ) -> None:
        self.objective = objective
        self.teachers = _several(teacher)
        if any(inner_model(student) is inner_model(each) for each in self.teachers):
            raise ValueError(
                "student and teacher are one and the same module; give a copy of it "
                "(copy.deepcopy) as the teacher"
            )
        self.adapter = adapter
        self.teacher_adapter = teacher_adapter or adapter
        other = example if teacher_example is None else teacher_example
        self.matching = Matching(
            objective.matches,
            self._shape(student, adapter, example, None if same_tokens else "its own batch"),
            self._teacher_shape(teacher_shape, other, None if same_tokens else "another batch"),
        )
        self.matching.projections.to(_device_of(student))
        self.use(student)
        if self.teachers and objective.matches:
            self._teacher_seen = Capture(self.teachers[0], self.teacher_keys)
        _check_outputs(objective, [_declared_classes(m) for m in (student, *self.teachers)])
        if example is not None:
            with evaluating(student):
                self._try(example, teacher_example)

    def use(self, student: nn.Module) -> None:
        """Go on with the same student in another wrapping, ``DistributedDataParallel`` for one."""
        self.student = student
        self._student_seen = Capture(student, self.matching.student_keys)

    @property
    def projections(self) -> nn.ModuleDict:
        """Trained beside the student, thrown away afterwards."""
        return self.matching.projections

    @property
    def teacher_keys(self) -> tuple[FeatureKey, ...]:
        """The teacher's tensors that the matches need."""
        return self.matching.teacher_keys

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For an optimiser: the student, and the projections with their own learning rates.

        Clip the gradients of all groups together (papers.md B10).
        """
        own = {id(parameter) for parameter in self.projections.parameters()}
        student = [p for p in self.student.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": student}]
        for name, projection in self.projections.items():
            rate = self.matching.rates.get(name)
            group: dict[str, Any] = {"params": list(projection.parameters())}
            groups.append(group if rate is None else group | {"lr": rate})
        return groups

    def __call__(
        self,
        batch: Any,
        *,
        teacher_batch: Any = None,
        stored: TeacherTensors | None = None,
        progress: float = 0.0,
    ) -> Losses:
        """Run both models on a batch and compare them.

        Args:
            batch: What the student's adapter takes.
            teacher_batch: The teacher's view of the same rows; ``batch`` when not given.
            stored: The teacher's tensors, instead of running it.
            progress: Share of the updates that are done, for weights with a schedule.

        Raises:
            ValueError: labels or the teacher's tensors are missing, or a tensor that a match needs.
        """
        with self._student_seen as seen:
            outputs = self.adapter(self.student, batch)
            features = seen.features
        seen.clear()
        if stored is None:
            stored = self.ask_teacher(batch if teacher_batch is None else teacher_batch)
        return self.losses(outputs, features, stored, progress=progress)

    def ask_teacher(self, batch: Any) -> TeacherTensors:
        """Mean logits of the teachers, and the first one's tensors."""
        if not self.teachers:
            if self.objective.needs_teacher:
                raise ValueError(
                    "there is no teacher: give teacher= to the distiller, or stored= with the batch"
                )
            return TeacherTensors()
        first, *others = self.teachers
        for teacher in self.teachers:
            if teacher.training:
                teacher.eval()
        with torch.no_grad():
            if not self.objective.matches:
                logits, features = [self.teacher_adapter(first, batch).logits], {}
            else:
                with self._teacher_seen as seen:
                    logits = [self.teacher_adapter(first, batch).logits]
                    features = seen.features
                seen.clear()
            logits += [self.teacher_adapter(other, batch).logits for other in others]
            mean = logits[0] if not others else torch.stack(logits).mean(dim=0)
        return TeacherTensors(mean, features)

    def losses(
        self,
        outputs: Outputs,
        features: Features,
        teacher: TeacherTensors,
        *,
        progress: float = 0.0,
    ) -> Losses:
        """The objective from tensors alone; see ``__call__``."""
        total, parts = label_losses(outputs, teacher.logits, self.objective, progress=progress)
        matches = {}
        weights = self.matching.weights(progress)
        missing = [str(key) for key in self.teacher_keys if key not in teacher.features]
        if missing:
            raise ValueError(f"the teacher's tensors lack {', '.join(missing)}")
        found = self.matching.losses(features, teacher.features, outputs.mask)
        for name, loss in found.items():
            total = total + weights[name] * loss
            matches[name] = loss.detach()
        return Losses(total, matches, parts)

    def _shape(
        self, model: nn.Module, adapter: Adapter, example: Any, tokens: str | None
    ) -> ModelShape:
        if not self.objective.matches:
            return ModelShape(0, 0)
        run = None if example is None else lambda: adapter(model, example)
        return shape_of(model, tokens=tokens, run=run)

    def _teacher_shape(
        self, given: ModelShape | None, example: Any, tokens: str | None
    ) -> ModelShape:
        if self.teachers:
            return self._shape(self.teachers[0], self.teacher_adapter, example, tokens)
        if given is None and self.objective.matches:
            raise ValueError(
                "matches compare with a teacher: give teacher=, or teacher_shape= and hand its "
                "stored tensors in with each batch"
            )
        return given or ModelShape(0, 0)

    def _try(self, batch: Any, teacher_batch: Any) -> None:
        """One batch through both, so that what does not fit is found now."""
        outputs = self.adapter(self.student, batch)
        if self.objective.needs_labels and outputs.labels is None:
            raise ValueError(_NO_LABELS)
        _check_labels(outputs)
        if not self.teachers:
            _check_outputs(self.objective, [outputs.logits.shape[-1]])
            return
        other = batch if teacher_batch is None else teacher_batch
        classes = [self.teacher_adapter(teacher, other).logits for teacher in self.teachers]
        _check_outputs(self.objective, [x.shape[-1] for x in (outputs.logits, *classes)])
        self(batch, teacher_batch=teacher_batch)


_NO_LABELS: Final = (
    "the objective weighs labels, but the batch has none: put labels into the batch, or set alpha "
    "to 1 to learn from the teacher alone"
)


def label_losses(
    outputs: Outputs,
    teacher_logits: Tensor | None,
    objective: ObjectiveSettings,
    *,
    progress: float = 0.0,
) -> tuple[Tensor, Callable[[], Parts]]:
    """The weighted hard and soft part together, and what tells each by itself.

    Raises:
        ValueError: labels or soft labels are missing, or their shapes do not fit.
    """
    if objective.needs_labels and outputs.labels is None:
        raise ValueError(_NO_LABELS)
    if not objective.needs_soft_labels:
        teacher_logits = None
    elif teacher_logits is None:
        raise ValueError(
            "the objective weighs soft labels, but the teacher has no logits for this batch"
        )
    elif teacher_logits.shape != outputs.logits.shape:
        raise ValueError(
            f"student and teacher must give logits of one shape, got {list(outputs.logits.shape)} "
            f"and {list(teacher_logits.shape)}"
        )
    if outputs.logits.ndim == 3:
        return _token_losses(outputs, teacher_logits, objective, progress)
    return _row_losses(outputs, teacher_logits, objective, progress)


def _row_losses(
    outputs: Outputs, teacher_BC: Tensor | None, objective: ObjectiveSettings, progress: float
) -> tuple[Tensor, Callable[[], Parts]]:
    logits_BC, labels_B = outputs.logits, outputs.labels
    if labels_B is None:
        labels_B = logits_BC.new_full((len(logits_BC),), -1, dtype=torch.long)
    if logits_BC.shape[-1] == 1 and not labels_B.is_floating_point():
        labels_B = labels_B.float().masked_fill(labels_B < 0, torch.nan)
    loss = click_loss if labels_B.is_floating_point() else class_loss
    known_B = ~labels_B.isnan() if labels_B.is_floating_point() else labels_B >= 0
    total = loss(logits_BC, labels_B, teacher_BC, objective, progress=progress).mean()
    plain_BC, has_labels = logits_BC.detach(), outputs.labels is not None

    def parts() -> Parts:
        found = {}
        if has_labels:
            found["hard"] = _mean(loss(plain_BC, labels_B, None, None), known_B)
        if teacher_BC is not None:
            hard_B = torch.where(known_B, labels_B.nan_to_num(), -1).long()
            soft_B = soft_loss(wide(plain_BC), teacher_BC, objective, labels_B=hard_B)
            found["soft"] = _mean(soft_B, ~teacher_BC.isnan().any(dim=-1))
        return found

    return total, parts


def _token_losses(
    outputs: Outputs, teacher_BTC: Tensor | None, objective: ObjectiveSettings, progress: float
) -> tuple[Tensor, Callable[[], Parts]]:
    logits_BTC, labels_BT = outputs.logits, outputs.labels
    everywhere = torch.ones(logits_BTC.shape[:2], dtype=torch.bool, device=logits_BTC.device)
    real_BT = everywhere if outputs.mask is None else outputs.mask.bool()
    known_BT = torch.zeros_like(everywhere) if labels_BT is None else (labels_BT >= 0) & real_BT
    asked_BT = known_BT if objective.tokens == "masked" else real_BT
    hard_weight, soft_weight = objective.weights_at(progress)
    total, parts = logits_BTC.new_zeros((), dtype=torch.float32), {}
    if labels_BT is not None and objective.needs_labels:
        own, labels = wide(logits_BTC[known_BT]), labels_BT[known_BT]
        hard = class_loss(own, labels, None, None).sum() / known_BT.sum().clamp(min=1)
        total = total + hard_weight * hard
        parts["hard"] = hard.detach()
    if teacher_BTC is not None:
        own, other = wide(logits_BTC[asked_BT]), teacher_BTC[asked_BT]
        true = None if labels_BT is None else labels_BT[asked_BT]
        soft = soft_loss(own, other, objective, labels_B=true).sum()
        soft = soft / asked_BT.sum().clamp(min=1)
        total = total + soft_weight * soft
        parts["soft"] = soft.detach()
    return total, lambda: parts


def _mean(losses_B: Tensor, known_B: Tensor) -> Tensor:
    return (losses_B * known_B).sum() / known_B.sum().clamp(min=1)


def _check_outputs(objective: ObjectiveSettings, classes: Sequence[int | None]) -> None:
    """The soft loss means something for this number of classes, and both models have it."""
    if not objective.needs_soft_labels:
        return
    known = [number for number in classes if number is not None]
    if len(set(known)) > 1:
        raise ValueError(
            f"student and teachers must tell apart the same classes, got {known} outputs; match "
            "inner features only (soft_weight 0), or give them equal heads"
        )
    if known:
        nothing = torch.zeros(1, known[0])
        objective.example_temperature.rows(nothing, nothing, torch.ones(1), base=1.0)
        objective.soft.rows(nothing, nothing, objective.temperature)


def _check_labels(outputs: Outputs) -> None:
    """Labels of an example are one a row (or token), and classes that there are."""
    labels, logits = outputs.labels, outputs.logits
    if labels is None:
        return
    num_classes, shape = logits.shape[-1], list(logits.shape[:-1])
    if list(labels.shape) != shape:
        raise ValueError(
            f"labels must be one for each of the logits {list(logits.shape)}, so of shape {shape}, "
            f"got {list(labels.shape)}"
        )
    known = labels[~labels.isnan()] if labels.is_floating_point() else labels
    lowest, highest = (float(x) for x in (known.min(), known.max())) if known.numel() else (0, 0)
    if not labels.is_floating_point():
        if highest >= max(num_classes, 2):
            raise ValueError(
                f"labels must be classes below {max(num_classes, 2)}, or negative where not known, "
                f"got {highest:g}"
            )
    elif logits.ndim != 2 or num_classes > 2:
        raise ValueError(
            f"labels in floating point are shares of yes of one or two logits a row, got them for "
            f"logits {list(logits.shape)}; give classes as integers (labels.long())"
        )
    elif lowest < 0 or highest > 1:
        raise ValueError(
            f"labels in floating point are shares of yes between 0 and 1, NaN where not known, got "
            f"{lowest if lowest < 0 else highest:g}; give classes as integers (labels.long())"
        )


def _declared_classes(model: nn.Module) -> int | None:
    """Outputs of a classifier of transformers, as its config says."""
    model = inner_model(model)
    number = getattr(getattr(model, "config", None), "num_labels", None)
    is_classifier = "Classification" in type(model).__name__
    return number if is_classifier and isinstance(number, int) else None


def _several(teacher: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    if teacher is None:
        return []
    if isinstance(teacher, nn.Module) and not isinstance(teacher, nn.ModuleList):
        return [teacher]
    return list(teacher)


def _logits(output: Any) -> Tensor:
    found = output.get("logits") if isinstance(output, Mapping) else None
    logits = first_tensor(output) if found is None else found
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model gave {type(output).__name__}, which holds no logits")
    return logits


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
