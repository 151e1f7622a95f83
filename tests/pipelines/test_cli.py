"""The command: results on stdout, one clear line for every mistake, nothing half done."""

import json
import re
from pathlib import Path

import pytest
import yaml

from driftline.pipelines.cli import main
from driftline.pipelines.replay import log_split
from driftline.platform.settings import DriftlineSettings
from driftline.platform.windows import HOUR, format_time

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a successful command prints on stdout."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def write_settings(settings: DriftlineSettings) -> str:
    path = Path(settings.workspace) / "settings.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return str(path)


def test_the_plan_runs_nothing_and_counts_everything(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    workspace = tmp_path / "nothing"
    plan = json.loads(run(capsys, "plan", DEMO, "--json", "--set", f"workspace={workspace}"))
    assert not workspace.exists()
    assert plan["arms"] == ["title", "description"]
    assert plan["schedule"]["refresh_head_every_hours"] == 1
    assert plan["parameters"]["student"] == plan["parameters"]["arms"] + plan["parameters"]["head"]


def test_the_published_sizes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    paper = Path(DEMO).parent / "paper" / "ctrbert.yaml"
    sizes = json.loads(run(capsys, "plan", str(paper), "--json"))["parameters"]
    assert sizes["teacher"] == pytest.approx(1.5e9, rel=0.03)  # "1.5B"
    assert sizes["student"] == pytest.approx(70e6, rel=0.03)  # "70M"


def test_refresh_gate_and_score_speak_json(
    capsys: pytest.CaptureFixture[str], market: DriftlineSettings
) -> None:
    config = write_settings(market)
    moment = format_time(log_split(market).id.start + HOUR)
    record = json.loads(run(capsys, "refresh", "head", config, "--as-of", moment, "--json"))
    assert record["as_of"] == moment
    verdict = json.loads(run(capsys, "gate", config, "--as-of", moment, "--json"))
    assert verdict["promote"] == (record["decision"] == "promoted")
    run(capsys, "features", "materialize", config, "--as-of", moment)
    answer = json.loads(
        run(
            capsys, "score", config, "--page", "1", "--ad", "2", "--ad", "2", "--as-of", moment,
            "--json",
        )
    )  # fmt: skip
    assert answer["bundle"] == record["champion"]
    assert answer["probabilities"][0] == answer["probabilities"][1]


MISTAKES = [
    (["plan", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    (["study", "nowhere"], "no such file.*driftline study --list"),
    (["plan", DEMO, "--set", "nope=1"], "nope: Extra inputs are not permitted"),
    (["plan", DEMO, "--set", "teacher.columns=[ad__nothing]"], "ad__nothing.*no columns"),
    (["check", DEMO], "driftline (ingest|simulate)"),
    (["scales", DEMO], "driftline check"),
    (["features", "prepare", DEMO], "driftline check"),
    (["teacher", DEMO], "driftline check"),
    (["labels", DEMO], "driftline check"),
    (["refresh", "arms", DEMO], "driftline check"),
    (["refresh", "head", DEMO, "--as-of", "2026-01-07T00:00:00Z"], "driftline"),
    (["refresh", "head", DEMO, "--as-of", "soon"], "ISO 8601.*'soon'"),
    (["refresh", "head", DEMO, "--as-of", "2026-01-07T00:00:00"], "needs a zone"),
    (["gate", DEMO, "--as-of", "2026-01-07T00:00:00Z"], "refresh arms"),
    (["rollback", DEMO, "--to", "3"], "no version 3"),
    (["rollback", DEMO], "no champion before this one"),
    (["deploy", DEMO, "--bundle", "3"], "one of --champion"),
    (["deploy", DEMO, "--bundle", "3", "--canary", "1.5"], "between 0 and 1, got 1.5"),
    (["traffic", DEMO, "--canary", "0.1"], "there is no canary"),
    (["traffic", DEMO, "--read-out"], "no canary to read out"),
    (["traffic", DEMO, "--stop", "--decide"], "one of --canary SHARE"),
    (["replay", DEMO], "driftline check"),
    (["score", DEMO, "--page", "1", "--ad", "2"], "champion"),
    (["ingest", "mind", DEMO], "source.kind must be 'mind'"),
    (["ingest", "parquet", DEMO], "source.kind must be 'parquet'"),
    (["simulate", DEMO, "--set", "source={kind: mind}"], "source.kind must be 'simulate'"),
    (
        ["plan", DEMO, "--set", "features.2.tier=auto"],
        "driftline scales",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=[" ".join(m[0][:2]) for m in MISTAKES]
)
def test_a_mistake_is_one_clear_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert printed.out == ""
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    whole = printed.err[printed.err.index("error: ") :]
    assert re.search(message, whole), whole
    artefacts = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert artefacts == []
