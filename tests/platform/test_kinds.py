"""Kinds: named in YAML, ours and those of installed packages, as the page in the README says."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from pydantic import ValidationError

from driftline.platform.checkpoints import save_weights
from driftline.platform.data_settings import Settings
from driftline.platform.distillation.matches import Match
from driftline.platform.distillation.schedules import LinearDecay, Schedule
from driftline.platform.distillation.soft_losses import KlLoss, SoftLoss
from driftline.platform.initialisers import Initialiser
from driftline.platform.kinds import foreign_code
from driftline.platform.objective import click_loss
from driftline.platform.settings import ArmsRefreshSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "platform" / "distillation" / "README.md").read_text().split("## Bring your own")[1]


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(found)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's package, installed: its module and what pip writes beside it."""
    project = tomllib.loads(block("toml"))["project"]
    (tmp_path / "my_kinds.py").write_text(block("python"))
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


STUDENT = torch.tensor([[0.2, -1.1], [1.5, 0.3]])
TEACHER = torch.tensor([[2.0, -0.5], [-0.7, 0.9]])
CLICKED = torch.tensor([0.0, 1.0])

ELSEWHERE = """
import json, sys
from driftline.platform.settings import ArmsRefreshSettings
settings = ArmsRefreshSettings.model_validate(json.load(sys.stdin))
assert "torch" not in sys.modules, "settings are read without torch"
import torch
from driftline.platform.objective import click_loss
rows = [torch.tensor(x) for x in ([[.2, -1.1], [1.5, .3]], [0., 1.], [[2., -.5], [-.7, .9]])]
losses = click_loss(*rows, settings.objective, progress=0.6)
json.dump([settings.model_dump(mode="json"), losses.tolist()], sys.stdout)
"""


def test_the_page_works_as_it_stands(installed: Path) -> None:
    assert len([line for line in block("python").splitlines() if line.strip()]) <= 30
    strategy = ArmsRefreshSettings.model_validate(yaml.safe_load(block("yaml")))
    objective = strategy.objective
    own = [objective.soft, objective.matches[0], strategy.init]
    assert {type(kind).__module__ for kind in own} == {"my_kinds"}

    # They compute what they say.
    p, q = TEACHER.div(2).softmax(-1), STUDENT.div(2).softmax(-1)
    distance = (0.5 * (p.sqrt() - q.sqrt()) ** 2).sum(-1)
    assert torch.allclose(objective.soft.rows(STUDENT, TEACHER, 2.0), distance, atol=1e-6)
    ones, mask = torch.ones(1, 2, 3), torch.tensor([[1, 0]])
    away = torch.tensor([[[1.5], [9.0]]]).expand(1, 2, 3)
    assert float(objective.matches[0].loss([away], [ones], mask)) == pytest.approx(0.5)
    assert objective.weights_at(0.4) == (0.5, 0.5)
    assert objective.weights_at(0.6) == (0.5, 0.25)
    hard = torch.nn.functional.cross_entropy(STUDENT, CLICKED.long(), reduction="none")
    losses = click_loss(STUDENT, CLICKED, TEACHER, objective, progress=0.6)
    assert torch.allclose(losses, 0.5 * hard + 0.25 * 4 * distance, atol=1e-6)

    # They survive files, here and in a process that has never seen them.
    dumped = strategy.model_dump(mode="json")
    assert ArmsRefreshSettings.model_validate(dumped) == strategy
    assert ArmsRefreshSettings.model_validate(yaml.safe_load(yaml.safe_dump(dumped))) == strategy
    elsewhere = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=json.dumps(dumped),
        env=os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT / '.src'}"},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert json.loads(elsewhere.stdout) == [dumped, pytest.approx(losses.tolist(), abs=1e-6)]


def test_an_objective_is_known_by_the_code_of_its_own_kinds_too(installed: Path) -> None:
    strategy = ArmsRefreshSettings.model_validate(yaml.safe_load(block("yaml")))
    before = foreign_code(strategy)
    assert {name.split(".")[0] for name in before} == {"my_kinds"}
    own = [strategy.objective.soft, strategy.objective.matches[0], strategy.init]
    assert {f"my_kinds.{type(kind).__name__}" for kind in own} <= before.keys()
    source = inspect.getsourcefile(type(strategy.init))  # read once for all tests
    assert source is not None
    with Path(source).open("a") as module:
        module.write("\n# another version\n")
    after = foreign_code(strategy)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())
    assert foreign_code(ArmsRefreshSettings()) == {}


class SmallNursery:
    """Trains nothing: writes the tensors a stage of each kind would give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pretrain(self, spec: Any = None) -> Path:
        return self._write("mlm", {"arms.weight": torch.full((2,), 1.0)})

    def supervise(self) -> Path:
        both = {"arms.weight": torch.full((2,), 2.0), "head.weight": torch.full((2,), 3.0)}
        return self._write("supervised", both)

    def _write(self, name: str, weights: dict[str, torch.Tensor]) -> Path:
        save_weights(self.folder / name, weights)
        return self.folder / name


@pytest.mark.usefixtures("installed")
def test_an_initialiser_of_ones_own_starts_a_student(tmp_path: Path) -> None:
    from driftline.platform.checkpoints import load_weights

    relay = Initialiser.parse("relay")
    student = torch.nn.ModuleDict(
        {"arms": torch.nn.LayerNorm(2, bias=False), "head": torch.nn.LayerNorm(2, bias=False)}
    )
    load_weights(student, *relay.weights(SmallNursery(tmp_path)))  # type: ignore[arg-type]
    arms, head = (parameter.detach() for parameter in student.parameters())
    assert arms.tolist() == [1, 1]  # the arms only read
    assert head.tolist() == [3, 3]  # the head saw clicks


# --- the root itself ----------------------------------------------------------------------------


class Holder(Settings):
    soft: SoftLoss = KlLoss()
    schedules: tuple[Schedule, ...] = ()


def test_a_field_takes_a_name_a_mapping_or_a_value() -> None:
    expected = Holder(soft=KlLoss(), schedules=(LinearDecay(end=0.5),))
    raw = {"soft": "kl", "schedules": [{"kind": "linear_decay", "end": 0.5}]}
    assert Holder.model_validate(raw) == expected
    assert Holder.model_validate_json(expected.model_dump_json()) == expected


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"soft": "linear_decay"}, "soft\n.*kind must be one of .*reverse_kl.* entry point in"),
        ({"soft": {"kind": 3}}, "soft\n.*needs kind: one of binary, ce, .*kl"),
        ({"soft": KlLoss}, "soft\n.*needs kind"),
        ({"soft": LinearDecay()}, "soft\n.*needs kind"),
        ({"schedules": ["constant", {"kind": "linear_decay", "end": 2}]}, r"schedules\.1\.end\n"),
    ],
)
def test_a_wrong_kind_is_named_with_its_path(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        Holder.model_validate(raw)


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match=r"kind 'kl' of SoftLoss is taken by .*KlLoss; give .*Two"):

        class Two(KlLoss):
            kind: Literal["kl"] = "kl"

    assert SoftLoss.known()["kl"] is KlLoss

    class Constant(Match):  # another base: another set of names
        kind: Literal["constant"] = "constant"

    assert Match.known()["constant"] is Constant


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[driftline.kinds]\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValidationError, match=r"entry point 'broken' = 'no_such_module' .* cannot"):
        Holder.model_validate({"soft": "of_the_broken_package"})
    assert Holder.model_validate({"soft": "ce"}).soft.kind == "ce"
