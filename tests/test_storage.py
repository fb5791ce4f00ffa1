"""Files that are written whole or not at all, whoever else writes them."""

import os

from jaxtl import storage


def test_file_that_two_write_at_once_is_that_of_the_last_one_whole(tmp_path):
    path = tmp_path / "out[1].csv"
    with storage.written_whole(path) as one:
        one.write("one\n" * 1000)
        with storage.written_whole(path) as other:
            other.write("other\n")
        assert path.read_text() == "other\n"
    assert path.read_text() == "one\n" * 1000
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_two_fill_at_once_is_that_of_the_first_one_whole(tmp_path):
    path = tmp_path / "out"
    with storage.folder_written_whole(path) as one:
        (one / "a").write_text("one")
        with storage.folder_written_whole(path, overwrite=True) as other:
            (other / "b").write_text("other")
        assert [file.name for file in path.iterdir()] == ["b"]
        (one / "c").write_text("one")
        path.rename(tmp_path / "moved")
    assert sorted(file.name for file in path.iterdir()) == ["a", "c"]


def test_what_killed_processes_left_is_removed_a_day_later(tmp_path):
    path = tmp_path / "out[1].csv"
    old, new, others = (
        tmp_path / f".{name}.tmp" for name in ("out[1].csv.0a1b2c3d", "out[1].csv.4e5f6a7b", "out1.csv.0")
    )
    for left in (old, new, others):
        left.touch()
    for left in (old, others):
        os.utime(left, (0, 0))
    storage.write(path, "text")
    assert sorted(tmp_path.iterdir()) == sorted([path, new, others])
