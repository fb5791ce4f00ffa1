"""Text files of every format, and the one message for whatever is wrong with them."""

import dataclasses
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxtl import config
from jaxtl.data import published, records, text
from jaxtl.errors import UserError

ROWS = [("wash your hands", "real"), ('garlic, they say, "cures"\nit all 🧄', "fake"), ("ünïcode", "real")]


def write_csv(path, rows=ROWS, header="text,label", end="\n"):
    quoted = ['"' + row.replace('"', '""') + f'",{label}' for row, label in rows]
    path.write_bytes((end.join([header, *quoted]) + end).encode())
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def read(path, label_column="label"):
    return list(records.read(path, "text", label_column))


def problem(call, *args, **fields):
    with pytest.raises(UserError) as caught:
        call(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def splits(folder, train="train.csv", **fields):
    return text.splits(config.Text(dir=str(folder), train=tuple(train.split(",")), **fields))


# --- the formats -----------------------------------------------------------------------------------------


def test_every_format_gives_the_same_records(tmp_path):
    texts, labels = zip(*ROWS, strict=True)
    write_csv(tmp_path / "a.csv")
    tabs = (tmp_path / "a.csv").read_text().replace('",', '"\t').replace("text,label", "text\tlabel")
    (tmp_path / "a.tsv").write_text(tabs)
    lines = [json.dumps({"id": i, "label": label, "text": text}) for i, (text, label) in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.JSON").write_text("\r\n".join(lines) + "\r\n")
    write_parquet(tmp_path / "a.parquet", text=texts, label=labels)
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == [(i, *row) for i, row in enumerate(ROWS, 1)], path
        assert read(path, "") == [(i, text, "") for i, text in enumerate(texts, 1)], path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_a_byte_order_mark_and_blank_lines_make_no_difference(tmp_path, end, mark):
    path = write_csv(
        tmp_path / "a.csv", header=f"label , text{end}", rows=[("real", "one"), ("fake", '"two"')], end=end
    )
    path.write_bytes(mark + path.read_bytes())
    assert list(records.read(path, "text", "label")) == [(1, "one", "real"), (2, "two", "fake")]


def test_a_field_may_be_longer_than_the_csv_modules_limit_of_128_kib(tmp_path):
    path = write_csv(tmp_path / "a.csv", rows=[("long " * 50_000, "real")])
    assert len(read(path)[0][1]) == 250_000


def test_a_txt_file_has_a_text_on_each_line_and_records_are_numbered_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes('one\n\n  \ntwo, and "three" \r\nfour 🧄\u2028four'.encode())
    assert read(path, "") == [(1, "one", ""), (4, 'two, and "three" ', ""), (5, "four 🧄\u2028four", "")]
    assert "holds texts without labels: --set data.label_column= (empty)" in problem(read, path)


def test_labels_that_are_numbers_or_booleans_become_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=["a"] * 4, label=[1.0, 0.5, None, float("nan")])
    assert [label for _, _, label in read(path)] == ["1", "0.5", "", ""]
    path = write_parquet(tmp_path / "b.parquet", text=pyarrow.array(["a", "b"]).dictionary_encode(), label=[0, 1])
    assert read(path) == [(1, "a", "0"), (2, "b", "1")]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 7, "label": true}\n{"text": null, "label": 3}\n{"text": "x", "label": " y "}')
    assert read(path) == [(1, "7", "True"), (2, "", "3"), (3, "x", "y")]


def test_half_an_emoji_in_json_is_replaced_and_a_whole_one_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83e"}\n{"text": "whole \\ud83e\\uddc4"}')
    assert [text for _, text, _ in read(path, "")] == ["cut \ufffd", "whole 🧄"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"text,label\nok,real\ncaf\xe9,fake\n", "not UTF-8 text: see the byte at offset 22"),
        ("a.csv", "text,label\nok,real\n".encode("utf-16-le"), "not UTF-8 text: see the byte at offset 1"),
        ("a.csv", "text,label\nok,real\n".encode("utf-16"), "not UTF-8 text: see the byte at offset 0"),
        ("a.csv", b"text,label\nok\0,real\n", "offset 13"),
        ("a.csv", b"text,label\nok,real\na, b,real\n", "record 2: 3 fields, and the header has 2; put double quotes"),
        ("a.csv", b"text,label\nok\n", "record 1: 1 fields"),
        ("a.csv", b'text,label\nok,real\n"never closed,real\nb,fake\n', "the record that ends in line 4 is damaged"),
        ("a.csv", b'text,label\n"one" two,real\n', "close every double quote"),
        ("a.csv", b"", "has no columns: it is empty"),
        ("a.csv", b"\n\n", "has no columns: it is empty"),
        ("a.csv", b"text;label\nok;real\n", "divided by semicolons: save it with commas, or with tabs as .tsv"),
        ("a.csv", b"text\tlabel\nok\treal\n", "divided by tabs: save it"),
        ("a.tsv", b"text,label\nok,real\n", "divided by commas: save it with commas"),
        ("a.tsv", b'text\tlabel\n"I never.\tneg\nIt was."\tpos\n', "record 1: a tab within double quotes, as where"),
        ("a.csv", b"Text,label\n", r"no column 'text' \(did you mean 'Text'\?\): .* one of Text, label"),
        ("a.csv", b"text,lable\n", "set data.label_column to one of text, lable, or to nothing for texts without"),
        ("a.csv", b"text,text,label\n", "has 2 columns 'text'; rename"),
        ("a.csv", b'"' + b"first\ntext " * 99 + b'",real\n', r"one of first text .{20,40}\.\., real"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b"{" * 100_000, "line 1: not JSON"),
        ("a.json", b'[\n{"text": "a", "label": "b"}\n]', "line 1: a list; each line is one object"),
        ("a.json", b'[{"text": "a", "label": "b"}]', "line 1: a list; each line is one object"),
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{"text": "a"}\n', "line 2, has no column 'label'"),
        ("a.jsonl", b'{"text": ["a"], "label": "b"}\n', "record 1: 'text' holds a list"),
        ("a.parquet", b"PAR1 and then nothing", "is damaged, or not Parquet"),
        ("a.xlsx", b"PK", r"read from \.csv, \.tsv, \.jsonl, \.json, \.parquet, \.txt"),
    ],
)
def test_a_damaged_file_is_one_line_that_says_where(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_damaged_anywhere_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=[f"text {i}" for i in range(2000)], label=["a"] * 2000)
    whole = path.read_bytes()
    assert "has no column 'tweet'" in problem(list, records.read(path, "tweet"))
    for cut in (len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:cut])
        assert "is damaged" in problem(read, path)
    path.write_bytes(whole[:100] + bytes(200) + whole[300:])
    assert "is damaged" in problem(read, path)


def test_records_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\nnot JSON')
    assert next(records.read(path, "text")) == (1, "a", "")


# --- the splits ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "y"), ("c", "z"), ("d", "x")])
    write_csv(tmp_path / "validation.csv", [("e", "y"), ("f", "x")])
    write_csv(tmp_path / "test.csv", [("g", "z"), ("h", "x"), ("i", "y")])
    return tmp_path


def test_splits_are_numbered_by_the_sorted_labels_of_training(folder):
    found = splits(folder, validation="validation.csv", test=str(folder / "test.csv"))
    assert list(found) == ["train", "validation", "test"]
    assert {split.class_names for split in found.values()} == {("x", "y", "z")}
    assert [split.labels.tolist() for split in found.values()] == [[0, 1, 2, 0], [1, 0], [2, 0, 1]]
    assert found["train"].labels.dtype == np.int32
    assert found["test"].texts == ("g", "h", "i")
    assert found["test"].ids == ("test.csv:1", "test.csv:2", "test.csv:3")


def test_several_training_files_are_one_and_ids_stay_apart(folder, monkeypatch):
    (folder / "more").mkdir()
    write_csv(folder / "more" / "train.csv", [("j", "w")])
    monkeypatch.chdir(folder)  # an empty data.dir
    found = splits("", "train.csv,more/train.csv,test.csv")["train"]
    assert found.texts == tuple("abcdjghi")
    assert found.class_names == ("w", "x", "y", "z")
    assert found.ids[0] == "train.csv:1"
    assert len(set(found.ids)) == 8


def test_paths_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert splits(f"~/{folder.name}", f"~/{folder.name}/train.csv")["train"].texts == tuple("abcd")


def test_classes_chooses_and_numbers_the_labels_of_every_split(folder, capsys):
    write_csv(folder / "validation.csv", [("e", "y"), ("f", "never seen"), ("", "x")])
    found = splits(folder, validation="validation.csv", test="test.csv", classes=("z", "y"))
    assert [split.texts for split in found.values()] == [("b", "c"), ("e",), ("g", "i")]
    assert [split.labels.tolist() for split in found.values()] == [[1, 0], [1], [0, 1]]
    assert found["test"].ids == ("test.csv:1", "test.csv:3")
    assert "all labels are 'y'; ROC-AUC is not defined there" in capsys.readouterr().err


def test_without_a_label_column_all_labels_are_zero(folder):
    (folder / "plain.txt").write_text("one\ntwo\n")
    found = splits(folder, "train.csv,plain.txt", label_column="")["train"]
    assert found.texts == (*"abcd", "one", "two")
    assert found.ids[-1] == "plain.txt:2"
    assert found.class_names == ()
    assert (found.labels.dtype, found.labels.tolist()) == (np.int32, [0] * 6)


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        ([("a", "x"), (" \t", "y"), ("", "x")], {}, "no text in train.csv:2, train.csv:3, 2 of 3 records: remove them"),
        ([("a", "x")] + [("", "y")] * 9, {}, r"train\.csv:5, train\.csv:6, \.\., 9 of 10 records"),
        ([("a", "x"), ("b", " ")], {}, "no 'label' in train.csv:2, 1 of 2 records"),
        ([("a", "x"), ("b", "x")], {}, "all training texts have the label 'x', .* data.label_column=label"),
        ([], {}, "train.csv: there are no records"),
        ([("a", "x"), ("b", "y")], {"classes": ("x", "yy")}, "no training text has the label 'yy'.*there are x, y"),
        ([("a", "x"), ("b", "y")], {"classes": ("x",)}, "data.classes=x: name at least two classes, each once"),
        ([("a", "x"), ("b", "y")], {"classes": ("x", "y"), "label_column": ""}, "data.label_column names no column"),
    ],
)
def test_what_is_wrong_with_the_training_texts_is_one_line(tmp_path, rows, fields, expected):
    write_csv(tmp_path / "train.csv", rows)
    with pytest.raises(UserError, match=expected) as caught:
        splits(tmp_path, **fields)
    assert "\n" not in str(caught.value)


def test_a_held_out_label_that_training_never_had_names_the_record(folder):
    (folder / "test.jsonl").write_text('{"text": "g", "label": "z"}\n{"text": "h", "label": "xx\\nx"}')
    message = problem(splits, folder, test="test.jsonl")
    assert message.startswith(r"test.jsonl:2 has the label 'xx\nx', which no training text has; there are x, y, z")
    write_csv(folder / "test.csv", [("g", "other")])
    assert "no record has a label of data.classes" in problem(splits, folder, test="test.csv", classes=("x", "y"))


def test_a_missing_file_is_told_with_those_that_are_there(folder):
    (folder / "notes.md").write_text("")
    message = problem(splits, folder, validation="valdation.csv")
    assert message.startswith(f"data.validation: there is no {folder}/valdation.csv (did you mean 'validation.csv'?)")
    assert message.endswith("the folder holds test.csv, train.csv, validation.csv")
    assert "nowhere is not a folder" in problem(splits, folder / "nowhere")
    assert "is a folder; name the file in it" in problem(splits, folder, ".")
    assert "there is no" in problem(splits, folder, "x" * 300 + ".csv")  # longer than a name may be


def test_a_file_named_twice_or_held_out_of_itself_is_refused(folder):
    assert "names a file twice" in problem(splits, folder, "train.csv,./train.csv")
    assert "data.test: " in problem(splits, folder, test="train.csv")


def test_without_any_file_the_message_says_how_to_name_them():
    message = problem(text.splits, config.Text())
    for part in ("--set data.train=", "--set data.text_column=", "--set data.label_column=", "covid_fake_news"):
        assert part in message


# --- published sets --------------------------------------------------------------------------------------


@pytest.fixture
def shapes(monkeypatch):
    files = [published.File(f"{split}.csv") for split in ("train", "validation", "test")]
    monkeypatch.setitem(published.SETS, "shapes", published.Published("http://example.invalid/", "label", *files))
    return config.Text(name="shapes")


def test_a_published_set_has_its_own_file_names_in_a_folder_given_or_fetched(folder, shapes, monkeypatch, capsys):
    assert list(text.splits(dataclasses.replace(shapes, dir=str(folder)))) == ["train", "validation", "test"]
    monkeypatch.setattr(published, "fetch", lambda name, download: {("shapes", False): folder}[name, download])
    fetched = dataclasses.replace(shapes, download=False)
    assert list(text.splits(fetched)) == ["train", "validation", "test"]
    assert list(text.splits(dataclasses.replace(fetched, train=("test.csv",)))) == ["train"]
    capsys.readouterr()
    own = text.splits(dataclasses.replace(fetched, test="validation.csv"))
    assert own["test"].texts == own["validation"].texts
    assert "the figures of the test are no test" in capsys.readouterr().err


def test_file_of_ones_own_is_not_looked_for_among_a_published_sets(shapes):
    for fields in ({"train": ("mine.csv",)}, {"test": "mine.csv"}):
        message = problem(text.splits, dataclasses.replace(shapes, dir="", **fields))
        assert "mine.csv is no file of shapes" in message
        assert "--set data.name= (empty)" in message


def test_only_a_missing_test_file_of_a_published_set_is_no_error_and_is_told_loudly(folder, shapes, capsys):
    data = dataclasses.replace(shapes, dir=str(folder))
    (folder / "test.csv").unlink()
    assert list(text.splits(data)) == ["train", "validation"]
    told = capsys.readouterr().err
    assert "NO TEST TEXTS" in told
    assert "http://example.invalid/" in told
    text.splits(data)
    assert capsys.readouterr().err == ""  # once is enough
    assert "data.test: there is no" in problem(text.splits, dataclasses.replace(data, test="test.csv"))
    named = dataclasses.replace(data, train=("train.csv",), test="test.csv")
    assert "data.test: there is no" in problem(text.splits, named)
    (folder / "validation.csv").unlink()
    assert "data.validation: there is no" in problem(text.splits, data)
    unknown = dataclasses.replace(data, name="shape")
    assert "did you mean 'shapes'?" in problem(text.splits, unknown)
