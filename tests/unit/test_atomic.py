"""Files and folders that are written whole or not at all."""

import json

import pytest

from byom.errors import CheckpointError
from byom.storage.atomic import drafted, replacing, write_bytes, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("write", "content", "expected"),
    [
        (write_bytes, b"\r\n\x00", b"\r\n\x00"),
        (write_text, "ä\nb\n", "ä\nb\n".encode()),
        (write_json, {"b": 1, "a": [None]}, json.dumps({"a": [None], "b": 1}, indent=1).encode() + b"\n"),
    ],
)
def test_a_file_is_written_with_its_folders_and_the_mode_of_any_other(tmp_path, write, content, expected):
    other = tmp_path / "other"
    other.write_bytes(b"")
    for _ in range(2):
        assert write(tmp_path / "deep/er/file", content) == tmp_path / "deep/er/file"
    assert (tmp_path / "deep/er/file").read_bytes() == expected
    assert (tmp_path / "deep/er/file").stat().st_mode == other.stat().st_mode
    assert names(tmp_path / "deep/er") == ["file"]


@pytest.mark.parametrize("settled", [False, True])
def test_a_failed_writer_leaves_the_old_file_and_no_draft(tmp_path, settled):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), drafted(tmp_path / "file", settled=settled) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old" and names(tmp_path) == ["file"]


def test_a_settled_file_has_the_mode_of_any_other(tmp_path):
    other = write_text(tmp_path / "other", "")
    with drafted(tmp_path / "file", settled=True) as draft:
        draft.touch(0o600)
    assert (tmp_path / "file").stat().st_mode == other.stat().st_mode


def test_a_folder_is_replaced_only_if_the_caller_wrote_all_of_it(tmp_path):
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with replacing(folder, lambda file: file.name == "mine.json") as partial:
            (partial / "mine.json").write_text(text)
    assert (folder / "mine.json").read_text() == "second" and names(tmp_path) == ["folder"]
    with (
        pytest.raises(CheckpointError, match=r"did not write \(mine\.json\).*choose a new folder"),
        replacing(folder, lambda _: False),
    ):
        pass
    assert (folder / "mine.json").read_text() == "second"


def test_a_reader_sees_the_old_file_while_the_new_one_is_written(tmp_path, monkeypatch):
    file = write_text(tmp_path / "file", "old")
    write, seen = type(file).write_bytes, []

    def slow(path, content):
        write(path, content[:1])
        seen.append(file.read_text())
        return write(path, content)

    monkeypatch.setattr(type(file), "write_bytes", slow)
    write_text(file, "new")
    assert seen == ["old"] and file.read_text() == "new"
