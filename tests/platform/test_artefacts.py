"""Artefacts appear whole or not at all, whatever happens on the way."""

import subprocess
import sys
from pathlib import Path

import pytest

from driftline.platform.artefacts import (
    hash_files,
    hash_value,
    link_or_copy,
    read_json,
    scratch_directory,
    whole_directory,
    whole_file,
    write_json,
)
from driftline.platform.errors import ArtefactError


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("old")
    with pytest.raises(FileNotFoundError), whole_directory(target) as scratch:
        (scratch / "missing" / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with whole_directory(tmp_path / "thing") as scratch:
            (scratch / name).touch()
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["b"]


def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from driftline.platform.artefacts import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'a').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "thing"
    ran = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert ran.returncode == -9
    assert not target.exists()
    with whole_directory(target) as scratch:
        (scratch / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_writer_killed_while_it_replaces_a_folder_loses_neither(tmp_path: Path) -> None:
    (tmp_path / ".thing.1234.retired").mkdir()
    (tmp_path / ".thing.1234.retired" / "a").write_text("old")
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "thing") as scratch:
        (scratch / "missing" / "a").write_text("new")
    assert (tmp_path / "thing" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    write_json(target, {"a": 1})
    with pytest.raises(FileNotFoundError), whole_file(target) as scratch:
        (scratch / "missing").write_text("{")
    assert read_json(target) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


def test_a_scratch_folder_is_gone_unless_renamed(tmp_path: Path) -> None:
    with scratch_directory(tmp_path) as scratch:
        (scratch / "a").touch()
    assert list(tmp_path.iterdir()) == []
    with scratch_directory(tmp_path) as scratch:
        scratch.rename(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_hashes_depend_on_content_alone(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "sub" / "x").write_text("same")
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    assert hash_value({"a": 1, "b": [2]}) == hash_value({"b": [2], "a": 1})
    assert hash_value({"a": 1}) != hash_value({"a": 2})


def test_a_linked_file_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    link_or_copy(tmp_path / "a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").read_bytes() == b"123"


@pytest.mark.parametrize("content", ["", "{", '{"a": 1', "[]", "null"])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"state\.json (is no|must hold a) JSON .*remove it"):
        read_json(tmp_path / "state.json")
