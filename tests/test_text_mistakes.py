"""What people get wrong with texts, as the command tells it: one line, exit status 2, nothing written."""

import csv
import shutil

import pytest

from jaxtl import main

GOOD = [("a mask", "real"), ("garlic", "fake"), ("the vaccine", "real"), ("bleach", "fake")] * 5

# name: (files to write beside train.csv, settings, what the line says)
MISTAKES = {
    "missing text column": (
        {},
        ["data.text_column=tweet"],
        "train.csv has no column 'tweet' (did you mean 'text'?): set data.text_column to one of text, label",
    ),
    "missing label column": (
        {},
        ["data.label_column=labels"],
        "train.csv has no column 'labels' (did you mean 'label'?): set data.label_column to one of text, label, or to "
        "nothing for texts without labels",
    ),
    "empty text": ({"train.csv": [*GOOD, ("\n ", "real")]}, [], "no text in train.csv:21"),
    "label of validation alone": (
        {"val.csv": [*GOOD, ("a ward", "reel")]},
        ["data.validation=val.csv"],
        "val.csv:21 has the label 'reel', which no training text has (did you mean 'real'?); there are fake, real",
    ),
    "one class": ({"train.csv": [("a mask", "real")] * 9}, [], "all training texts have the label 'real'"),
    "too few of a class": (
        {"train.csv": [*GOOD, ("a parrot", "joke")]},
        [],
        "data.eval_fraction=0.2: a stratified draw needs two examples a class, and there is one of joke",
    ),
    "not UTF-8": (
        {"train.csv": b"text,label\nma\xdfk,real\n"},
        [],
        "train.csv is not UTF-8 text: see the byte at offset 13",
    ),
    "no training texts": ({}, ["data.train="], "there are no training texts: --set data.train=tweets.csv"),
    "no such file": ({}, ["data.train=tran.csv"], "tran.csv (did you mean 'train.csv'?)"),
    "labels in a .txt": (
        {"lines.txt": b"a mask\n"},
        ["data.train=lines.txt"],
        "lines.txt holds texts without labels: --set data.label_column= (empty)",
    ),
    "no labels": ({}, ["data.label_column="], "a head of kind fc learns labels, and data.label_column is empty"),
    "no tokenizer beside the weights": (
        {},
        ["model.weights=bare"],
        "bare, neither tokenizer.json nor vocab.txt: --set data.tokenizer=",
    ),
    "no such tokenizer": ({}, ["data.tokenizer=./nowhere"], "./nowhere is neither a folder nor a repository"),
    "tokenizer of another model": (
        {},
        ["data.tokenizer=large"],
        "large has {more} word pieces, the model {pieces}: it is not the tokenizer of these weights",
    ),
    "texts longer than the position table": (
        {},
        ["data.max_length=49"],
        "data.max_length=49, model.head.kind=fc, model.head.reads=cls: texts of 49 tokens are longer than this "
        "backbone's 48 positions",
    ),
    "head that reads another shape": (
        {},
        ["model.head.kind=bigru"],
        "a head of kind bigru on a bert backbone reads sequence, not cls",
    ),
    "masked language modelling that reads another": (
        {},
        ["model.head.kind=mlm", "data.label_column="],
        "a head of kind mlm on a bert backbone reads masked, not cls",
    ),
    "a preset that the weights are not": (
        {},
        ["model.preset=bert_nano"],
        "are not those of bert_nano: vocabulary {pieces} against 30522, width 32 against 64",
    ),
    "images' setting": ({}, ["data.resize=crop"], "--set data.resize: there is no such field"),
    "text backbone without weights": ({}, ["model.weights=random"], "random weights have no tokenizer beside them"),
}


@pytest.fixture(scope="module")
def pieces(bert_folder, read_json):
    return read_json(bert_folder / "config.json")["vocab_size"]


@pytest.fixture
def here(bert_folder, bert_writer, read_json, tmp_path, monkeypatch):
    """A folder with good texts, a checkpoint without a tokenizer, and a tokenizer with pieces that it does not know."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.csv", GOOD)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bert_folder / name, tmp_path / "bare")
    ids = read_json(bert_folder / "tokenizer.json")["model"]["vocab"]
    bert_writer(tmp_path / "large", (*sorted(ids, key=ids.get), "garlicky", "pieces"))
    return tmp_path


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *content])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_status_2_and_leaves_nothing_behind(here, bert_folder, pieces, command, mistake):
    files, settings, message = MISTAKES[mistake]
    for name, content in files.items():
        write(here / name, content)
    before = contents(here)
    defaults = [f"model.weights={bert_folder}", "data.train=train.csv", "data.max_length=40"]
    status, shown, told = command(
        main, "--experiment=text_csv", *(f"--set={setting}" for setting in (*defaults, *settings))
    )
    assert (status, shown) == (2, "")
    (line,) = told.splitlines()
    assert line.startswith("jaxtl: error: ")
    assert message.format(pieces=pieces, more=pieces + 2) in line
    assert contents(here) == before
    assert not (here / "runs").exists()
