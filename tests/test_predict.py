"""What a finished run says of new texts: through the class, and the command as people type it."""

import csv
import io
import json

import numpy as np
import pytest

from jaxtl import config, predict
from jaxtl.data import text
from jaxtl.errors import UserError
from jaxtl.evaluation import predict as prediction
from jaxtl.training import loop

TEXTS = [
    "garlic", "a mask is new", "two doctors said , the mask\nis out 😷", "hoax hoax", "🧄",
    "the vaccine of the city " * 8,
    "no", "bleach and a miracle in ten days", "ward", "it is the report",
]  # fmt: skip

HEAD = config.Head("bigru", "sequence", hidden=8, dropout=0.0, init="random")


@pytest.fixture(scope="module")
def folder(bert_folder, text_folder, tmp_path_factory):
    """A run that learned a little: probabilities apart from one half, in batches of 4."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    experiment = config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=HEAD),
        data=config.Text(
            dir=str(text_folder), train=("train.csv",), validation="val.csv", max_length=40, buckets=1, train_size=48
        ),
        freeze=(("head..", "head"), (".*", None)),
        optim=config.Optim("adam", learning_rate=1e-2),
        train=config.Train(epochs=3, batch_size=16, eval_batch_size=4),
    )
    loop.train(experiment, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return prediction.TextClassifier(folder)


@pytest.fixture
def loaded(folder, model, monkeypatch):
    """The command finds this run loaded already, which takes most of its time."""
    load = prediction.TextClassifier
    monkeypatch.setattr(prediction, "TextClassifier", lambda path: model if path == folder else load(path))


def table(shown):
    header, *rows = csv.reader(io.StringIO(shown, newline=""))
    return header, rows


def test_probabilities_are_one_row_a_text_in_its_order_and_sum_to_one(model):
    found = model(TEXTS)
    assert found.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(model(TEXTS[::-1]), found[::-1], atol=1e-6)
    assert len(np.unique(found[:, 0].round(4))) > 7  # or the order would not show
    assert model([]).shape == (0, 2)


def test_a_text_is_answered_alone_as_it_is_among_others(model):
    """Other lengths to fill up to, and other shapes of batches: float32 rounding, a few 1e-7 of a logit."""
    together = model(TEXTS)
    for string, expected in zip(TEXTS[:6], together, strict=False):
        np.testing.assert_allclose(model([string])[0], expected, atol=1e-5)


def test_the_answers_are_those_of_the_runs_own_evaluation(folder, model, text_folder, read_json):
    records = list(records.read(text_folder / "val.csv", "text", "label"))
    answers = [model.class_names[best] for best in model([string for _, string, _ in records]).argmax(axis=1)]
    right = np.mean([answer == label for answer, (_, _, label) in zip(answers, records, strict=True)])
    assert right == pytest.approx(read_json(folder / "result.json")["accuracy"])


def test_a_stream_holds_no_more_than_its_window(model, monkeypatch):
    monkeypatch.setattr(prediction, "_AT_ONCE", 4)
    taken, held = 0, []

    def records():
        nonlocal taken
        for number in range(1, 11):
            taken += 1
            yield number, TEXTS[number - 1]

    found = []
    for number, string, likely in model.stream(records()):
        held.append(taken - len(found))
        found.append((number, string, likely))
    assert max(held) == 4
    assert [(number, string) for number, string, _ in found] == list(enumerate(TEXTS, 1))
    np.testing.assert_allclose([likely for _, _, likely in found], model(TEXTS), atol=1e-5)


def test_texts_on_the_command_line_are_answered_on_standard_output(folder, model, command):
    status, shown, _ = command(predict, folder, "--text", "garlic", "--text", 'a "mask"\nis new')
    assert status == 0
    header, rows = table(shown)
    assert header == ["record", "text", "label", "probability", "p(fake)", "p(real)"]
    assert [row[:2] for row in rows] == [["1", "garlic"], ["2", 'a "mask"\nis new']]
    for row, likely in zip(rows, model(["garlic", 'a "mask"\nis new']), strict=True):
        assert row[2] == model.class_names[likely.argmax()]
        np.testing.assert_allclose([float(cell) for cell in row[3:]], [likely.max(), *likely], atol=6e-5)


def test_a_file_is_answered_record_by_record_whatever_its_format(folder, loaded, command, text_folder, tmp_path):
    records = list(records.read(text_folder / "test.csv", "text"))[:9]
    with (tmp_path / "new.jsonl").open("w", encoding="utf-8") as file:
        for _, string, _ in records:
            file.write(json.dumps({"tweet": string}) + "\n\n")  # numbered by line
    with (tmp_path / "new.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((f"x{number}", string) for number, string, _ in records)])
    status, shown, told = command(predict, folder, tmp_path / "new.csv", "--output", tmp_path / "answers.csv")
    assert (status, shown) == (0, "")
    assert f"9 texts: {tmp_path / 'answers.csv'}" in told
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        header, rows = table(file.read())
    assert [(int(row[0]), row[1]) for row in rows] == [(number, string) for number, string, _ in records]
    status, shown, _ = command(predict, folder, tmp_path / "new.jsonl", "--text_column", "tweet")
    assert table(shown)[0] == header
    assert [row[0] for row in table(shown)[1]] == [str(2 * number - 1) for number in range(1, 10)]
    assert [row[1:] for row in table(shown)[1]] == [row[1:] for row in rows]
    assert {path.name for path in tmp_path.iterdir()} == {"new.csv", "new.jsonl", "answers.csv"}


def test_mistakes_are_one_line_and_leave_no_half_of_a_file(folder, loaded, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prediction, "_AT_ONCE", 2)  # the empty text comes when others have been answered
    (tmp_path / "empty.csv").write_text('text\na mask\ngarlic\nno\n" "\n')
    (tmp_path / "column.csv").write_text("tweet,label\na mask,real\n")
    (tmp_path / "latin.txt").write_bytes("garlic\nmásk\n".encode("latin-1"))
    (tmp_path / "good.txt").write_text("garlic\n")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "experiment.json").write_text((folder / "experiment.json").read_text())
    (tmp_path / "nothing").mkdir()
    mistakes = [
        ((folder,), "give a run folder and a file"),
        ((folder, "good.txt", "--text", "x"), "give a run folder and a file"),
        ((folder, "--text", " "), "record 1 has no text"),
        ((folder, "empty.csv", "--output", "out.csv"), "record 4 has no text"),
        (
            (folder, "column.csv", "--output", "out.csv"),
            "column.csv has no column 'text' (did you mean 'tweet'?): set data.text_column to one of tweet, label",
        ),
        ((folder, "latin.txt", "--output", "out.csv"), "latin.txt is not UTF-8 text: see the byte at offset 8"),
        ((folder, "nowhere.csv", "--output", "out.csv"), "there is no file nowhere.csv"),
        ((folder, tmp_path, "--output", "out.csv"), f"there is no file {tmp_path}"),
        (("nowhere", "good.txt"), "nowhere: there is no such run folder"),
        (("nothing", "good.txt"), "nothing holds no run"),
        (("unfinished", "good.txt"), "has not finished; run it first"),
        ((folder, "good.txt", "--output", "nowhere/out.csv"), "nowhere/out.csv cannot be written"),
        ((folder, "good.txt", "--output", "good.txt/out.csv"), "good.txt/out.csv cannot be written"),
        ((folder, "good.txt", "--output", "nothing"), "nothing cannot be written"),
        ((folder, "good.txt", "--output", "."), ". cannot be written"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in mistakes:
        status, _, told = command(predict, *arguments)
        assert status == 2, arguments
        (line,) = told.splitlines()
        assert line.startswith("jaxtl: error: "), arguments
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_a_file_written_before_stays_where_a_later_attempt_fails(folder, loaded, command, tmp_path):
    (tmp_path / "out.csv").write_text("of yesterday")
    (tmp_path / "new.csv").write_text('text\na mask\n""\n')
    status, _, _ = command(predict, folder, tmp_path / "new.csv", "--output", tmp_path / "out.csv")
    assert status == 2
    assert (tmp_path / "out.csv").read_text() == "of yesterday"


@pytest.mark.parametrize("kind", ["images", "masked language modelling"])
def test_a_run_that_classifies_no_texts_is_told(folder, kind, tmp_path):
    """By its experiment and result alone; what it trained is not looked at."""
    import shutil

    shutil.copytree(folder, tmp_path / "run")
    experiment = config.from_json((folder / "experiment.json").read_text(), "run")
    if kind == "images":
        model, data = config.Model("vit_nano_patch2_8", image_size=8), config.Images(source="digits")
    else:  # on a file with labels, which serve to draw examples by class
        model, data = config.Model("from_weights", experiment.model.weights, head=config.Head("mlm", "masked")), None
    other = config.Experiment(model, data or experiment.data)
    (tmp_path / "run" / "experiment.json").write_text(config.to_json(other))
    with pytest.raises(UserError, match="does not hold a run that classifies texts"):
        prediction.TextClassifier(tmp_path / "run")
