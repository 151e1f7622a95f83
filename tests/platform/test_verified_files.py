"""Hashes of large files are those of their bytes, whether read or remembered."""

import os
from pathlib import Path

import pytest

from driftline.platform.artefacts import hash_file
from driftline.platform.verified_files import SETTLED_SECONDS, VerifiedFiles


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("driftline.platform.verified_files.LARGE_BYTES", 1_000)
    return age(tmp_path / "bundle" / "vectors", b"a" * 2_000)


def age(path: Path, content: bytes) -> Path:
    """Write a file some time ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    written = path.stat().st_mtime - 10 * SETTLED_SECONDS
    os.utime(path, (written, written))
    return path


def test_a_large_file_is_read_once_by_all_who_ask(tmp_path: Path, large: Path) -> None:
    first, second = VerifiedFiles(tmp_path), VerifiedFiles(tmp_path)
    assert first.hash(large) == second.hash(large) == hash_file(large)
    assert (first.num_bytes_read, second.num_bytes_read) == (2_000, 0)
    os.link(large, tmp_path / "bundle" / "same")  # the next bundle shares it
    assert second.hash_all(tmp_path / "bundle") == dict.fromkeys(
        ("same", "vectors"), hash_file(large)
    )
    assert second.num_bytes_read == 0


def test_a_small_file_is_read_every_time(tmp_path: Path, large: Path) -> None:
    small = age(tmp_path / "bundle" / "head", b"b" * 10)
    files = VerifiedFiles(tmp_path)
    for times in (1, 2):
        files.hash(small)
        assert files.num_bytes_read == 10 * times


def test_a_changed_file_is_read_again(tmp_path: Path, large: Path) -> None:
    files = VerifiedFiles(tmp_path)
    before = files.hash(large)
    stat = large.stat()
    large.write_bytes(b"c" * 2_000)  # as long as before
    assert files.hash(large) == hash_file(large) != before
    large.unlink()
    large.write_bytes(b"d" * 2_000)
    os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns - 1))
    assert files.hash(large) == hash_file(large)


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, large: Path) -> None:
    large.write_bytes(b"e" * 2_000)
    files = VerifiedFiles(tmp_path)
    for times in (1, 2):
        files.hash(large)
        assert files.num_bytes_read == 2_000 * times


def test_damaged_notes_and_a_folder_that_cannot_be_written_cost_only_time(
    tmp_path: Path, large: Path
) -> None:
    files = VerifiedFiles(tmp_path)
    expected = files.hash(large)
    (notes,) = (tmp_path / ".verified").glob("*.json")
    notes.write_text("{")
    assert files.hash(large) == expected
    assert VerifiedFiles(tmp_path).hash(large) == expected
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / ".verified").write_text("a file where the folder should be")
    assert VerifiedFiles(blocked).hash(large) == expected
