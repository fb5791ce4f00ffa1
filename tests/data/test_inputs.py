"""What a command line names to be predicted: which records and images that is, and in which order."""

import json
import os

import pytest

from jaxtl.data import inputs, records
from jaxtl.data.inputs import Origin
from jaxtl.errors import UserError

SETTING = "--text_column"


def outcomes(path):
    return [
        (number, f"error: {text}" if isinstance(text, UserError) else text)
        for number, text in records.answerable(path, "text", SETTING)
    ]


def touch(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- records ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"id,text\n1,a\n2\n3,c\n", [(1, "a"), (2, "1 fields, and the header has 2"), (3, "c")]),
        ("a.tsv", b"id\ttext\n1\ta\n2\tb\tc\n", [(1, "a"), (2, "double quotes around fields with a tab")]),
        ("a.csv", b'text,id\na,1\n"b,2\nc,3\n', [(1, "a"), (2, "the rest of the file was not read")]),
        ("a.csv", b"text,id\na,1\n\xff,2\nc,3\n", [(1, "a"), (2, "not UTF-8 text: see the byte at offset 12")]),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n[]\n{"texts": "b"}\n{"text"\n\xff\n{"text": {}}\n{"text": 1.0}',
            [
                (1, "a"),
                (3, "line 3: a list; each line is one object"),
                (4, "has no column 'text' (did you mean 'texts'?): set --text_column to one of texts"),
                (5, "line 5: not JSON"),
                (6, "not UTF-8 text: see the byte at offset"),
                (7, "record 7: 'text' holds a dict"),
                (8, "1"),
            ],
        ),
        ("a.txt", b"a\n\xff\n\nd\n", [(1, "a"), (2, "not UTF-8 text: see the byte at offset 2"), (4, "d")]),
    ],
)
def test_reading_goes_on_after_a_record_that_is_not_in_order(tmp_path, name, content, expected):
    path = touch(tmp_path / name, content)
    found = outcomes(path)
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, text), (_, message) in zip(found, expected, strict=True):
        assert message in text if text.startswith("error: ") else message == text
    with pytest.raises(UserError):  # as training reads it
        list(records.read(path, "text"))


def test_a_parquet_file_that_is_damaged_in_the_middle_is_read_up_to_there(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {i}" for i in range(3000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1500)
    with pyarrow.parquet.ParquetFile(path) as file:
        second = file.metadata.row_group(1).column(0).dictionary_page_offset
    whole = path.read_bytes()
    path.write_bytes(whole[:second] + bytes(200) + whole[second + 200 :])
    *good, (number, error) = outcomes(path)
    assert [text for _, text in good] == [f"text {i}" for i in range(len(good))]
    assert number == len(good) + 1 > 1000
    assert error.endswith("the rest of the file was not read")


def test_a_file_is_looked_at_as_far_as_its_first_readable_record(tmp_path):
    good = json.dumps({"text": "a"})
    records.probe(touch(tmp_path / "a.jsonl", f"no\n{good}\n".encode()), "text", SETTING)
    late = touch(tmp_path / "late.jsonl", ("no\n" * 20 + good).encode())
    with pytest.raises(UserError, match="line 1: not JSON"):
        records.probe(late, "text", SETTING)
    with pytest.raises(UserError, match=r"holds no texts"):
        records.probe(touch(tmp_path / "none.txt", b"\n \n"), "text", SETTING)
    with pytest.raises(UserError, match=r"read from \.csv, "):
        records.probe(touch(tmp_path / "a.xlsx"), "text", SETTING)


def test_texts_come_one_by_one_the_given_ones_first(tmp_path):
    path = touch(tmp_path / "a.txt", b"one\ntwo\n")
    lazily = inputs.texts(["now \udcff"], [path, tmp_path / "not there yet.txt"], "text")
    assert next(lazily) == (Origin("--text", 1, "now \ufffd"), "now \ufffd")
    assert next(lazily) == (Origin(str(path), 1, "one"), "one")
    assert next(lazily) == (Origin(str(path), 2, "two"), "two")
    origin, error = next(lazily)
    assert origin == Origin(str(tmp_path / "not there yet.txt"), 1, None)
    assert "cannot be read: No such file" in str(error)


# --- images ----------------------------------------------------------------------------------------------


def test_images_of_folders_come_sorted_and_those_named_whatever_their_suffix(tmp_path):
    names = ["b/2.png", "b/10.JPG", "b/a/1.webp", "c.bmp", ".hidden/x.png", "b/.x.png", "b/notes.txt", "b/x.heic"]
    for name in names:
        touch(tmp_path / "photos" / name)
    single = touch(tmp_path / "scan.heic")
    found = [path for _, path in inputs.images([single, tmp_path / "photos"])]
    assert found == [single, *(tmp_path / "photos" / name for name in ("b/10.JPG", "b/2.png", "b/a/1.webp", "c.bmp"))]
    assert [origin for origin, _ in inputs.images([single])] == [Origin(str(single))]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_is_closed_is_one_error(tmp_path):
    touch(tmp_path / "a" / "1.png")
    touch(tmp_path / "b" / "2.png")
    (tmp_path / "a").chmod(0)
    (_, error), (_, path) = inputs.images([tmp_path])
    assert "the folder cannot be read: Permission denied" in str(error)
    assert path == tmp_path / "b" / "2.png"


def test_a_link_to_a_folder_is_an_error_and_not_a_loop(tmp_path):
    touch(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (_, path), (origin, error) = inputs.images([tmp_path])
    assert path == tmp_path / "a" / "1.png"
    assert origin.file == str(tmp_path / "a" / "again")
    assert "a symbolic link to a folder is not followed" in str(error)
