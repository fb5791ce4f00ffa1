"""What finished runs say of new texts and images: through Python, and the command as people type it."""

import csv
import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import jaxtl
from jaxtl import config, predict, progress
from jaxtl.data import sources
from jaxtl.errors import UserError
from jaxtl.evaluation import ensemble, metrics, predictions
from jaxtl.evaluation import predict as prediction
from jaxtl.training import loop, revisit

TEXTS = [
    "garlic", "a mask is new", "two doctors said , the mask\nis out 😷", "hoax hoax", "🧄",
    "the vaccine of the city " * 8,
    "no", "bleach and a miracle in ten days", "ward", "it is the report",
]  # fmt: skip

# Other shapes of batches, and activations that the run had kept: float32 rounding, a few 1e-7 of a logit.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(bert_folder, text_folder, tmp_path_factory):
    """A run on texts that learned a little: probabilities apart from one half, in batches of 4."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    experiment = config.Experiment(
        model=config.Model(
            "from_weights",
            str(bert_folder),
            head=config.Head("bigru", "sequence", hidden=8, dropout=0.0, init="random"),
        ),
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
def photos(tmp_path_factory):
    """Handwritten digits 0, 1 and 2 as PNG files of many sizes, smaller and larger than the model's images."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    listing, _ = sources.listings(config.Images(source="digits", classes=("0", "1", "2"), train_size=24))
    for number, (pixels, label) in enumerate(zip(listing.items, listing.labels, strict=True)):
        path = root / ("val" if number % 3 == 0 else "train") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = (int(side) for side in random.integers(5, 20, 2))
        Image.fromarray(pixels).resize((width, height)).save(path)
    return root


@pytest.fixture(scope="module")
def image_folders(photos, tmp_path_factory):
    """Two runs on images of the same classes, in another order: `small` images enlarged on the device, and files."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    vit = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
    transformers.ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "weights")
    head = config.Head("fc", "cls", dropout=0.0, init="random")
    of_digits = config.Experiment(
        config.Model("from_weights", str(folder / "weights"), image_size=12, head=head),
        config.Images(source="digits", classes=("2", "0", "1"), train_size=16, eval_size=9),
        freeze=(("head..", "head"), (".*", None)),
        optim=config.Optim("adam", learning_rate=3e-2),
        train=config.Train(epochs=20, batch_size=8, eval_batch_size=8, eval_every=20),
    )
    of_files = dataclasses.replace(
        of_digits,
        model=dataclasses.replace(of_digits.model, image_size=8),
        data=config.Images(source="folder", dir=str(photos), resize="crop", scale="half"),
    )
    for name, experiment in (("small", of_digits), ("files", of_files)):
        loop.train(experiment, folder / name)
    return {name: folder / name for name in ("small", "files")}


@pytest.fixture(scope="module")
def model(folder):
    return jaxtl.load(folder)


@pytest.fixture(scope="module")
def of_images(image_folders):
    return {name: jaxtl.load(str(folder)) for name, folder in image_folders.items()}


@pytest.fixture
def loaded(folder, model, image_folders, of_images, monkeypatch):
    """The command finds single runs loaded already, which takes most of its time."""
    load, ready = jaxtl.load, {folder: model, **{image_folders[name]: one for name, one in of_images.items()}}

    def loaded(runs, **settings):
        known = ready.get(runs[0]) if isinstance(runs, list) and len(runs) == 1 else None
        return known or load(runs, **settings)

    monkeypatch.setattr(jaxtl, "load", loaded)


def table(shown):
    header, *rows = csv.reader(io.StringIO(shown, newline=""))
    return header, rows


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def own_answers(folder, classes):
    found = predictions.read(folder / predictions.ARRAYS, classes)
    return found.ids, metrics.probabilities(found.logits)


# --- in Python -------------------------------------------------------------------------------------------


def test_probabilities_are_one_row_a_text_in_its_order_and_sum_to_one(model):
    found = model.predict_proba(TEXTS)
    assert found.shape == (len(TEXTS), 2)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(model.predict_proba(TEXTS[::-1]), found[::-1], atol=1e-6)
    assert len(np.unique(found[:, 0].round(4))) > 7  # or the order would not show
    assert model.predict_proba([]).shape == (0, 2)
    assert model.predict([]) == []


def test_a_text_is_answered_alone_as_it_is_among_others(model):
    for string, expected in zip(TEXTS[:6], model.predict_proba(TEXTS), strict=False):
        np.testing.assert_allclose(model.predict_proba([string])[0], expected, atol=ROUNDING)


def test_a_prediction_names_the_likeliest_class_and_lists_all_of_them_likeliest_first(model, of_images):
    likely = model.predict_proba(TEXTS)
    for answer, expected in zip(model.predict(TEXTS), likely, strict=True):
        best = model.class_names[expected.argmax()]
        assert (answer.label, answer.error) == (best, "")
        assert answer.probabilities == {model.class_names[i]: expected[i] for i in np.argsort(-expected)}
        assert answer.probability == answer.probabilities[best] == max(expected)
    pixels = np.zeros((5, 6, 3), np.uint8)
    (whole,), (two,) = of_images["small"].predict([pixels]), of_images["small"].predict([pixels], top=2)
    assert list(two.probabilities.items()) == list(whole.probabilities.items())[:2]
    assert len(whole.probabilities) == 3


def test_answers_to_texts_are_those_of_the_runs_own_evaluation(folder, model, text_folder):
    """The held-out texts come from the file that the ids name, by the command's own reader."""
    from jaxtl.data import records

    ids, expected = own_answers(folder, 2)
    known = {f"val.csv:{number}": string for number, string, _ in records.read(text_folder / "val.csv", "text")}
    np.testing.assert_allclose(model.predict_proba([known[name] for name in ids]), expected, atol=ROUNDING)


def test_answers_to_images_are_those_of_the_runs_own_evaluation(image_folders, of_images, photos):
    """Images that are kept small and enlarged by the compiled step, and files that were resized when decoded."""
    ids, expected = own_answers(image_folders["small"], 3)
    splits = sources.listings(config.Images(source="digits"))
    known = {name: pixels for split in splits for name, pixels in zip(split.ids, split.items, strict=True)}
    images = [known[name] for name in ids]
    found = of_images["small"].predict_proba([Image.fromarray(image) for image in images])
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    as_arrays = [np.repeat(image[:, :, None], 3, axis=2) for image in images]
    np.testing.assert_array_equal(of_images["small"].predict_proba(as_arrays), found)
    assert len(np.unique(found[:, 0].round(4))) > 5  # or anything would be alike

    ids, expected = own_answers(image_folders["files"], 3)
    paths = [photos / name for name in ids]
    assert len({Image.open(path).size for path in paths}) > 3
    found = of_images["files"].predict_proba(paths)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    assert len(np.unique(found[:, 0].round(4))) > 5
    opened = [Image.open(path) for path in paths]
    np.testing.assert_array_equal(of_images["files"].predict_proba(opened), found)
    assert all(image.getpixel((0, 0)) is not None for image in opened)  # not closed


def test_an_image_of_another_size_than_those_of_training_is_made_one_of_theirs(of_images):
    random = np.random.default_rng(1).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(random).resize((8, 8), Image.Resampling.BILINEAR))
    found = of_images["small"].predict_proba([random, resized])
    np.testing.assert_allclose(found[0], found[1], atol=1e-7)


def test_evaluating_a_run_again_decodes_its_images_as_training_did_whatever_their_size(
    image_folders, of_images, photos, tmp_path
):
    """All of one size, smaller than the model's: by themselves they would be enlarged by the compiled step."""
    copied = shutil.copytree(photos, tmp_path / "photos")
    paths = sorted((copied / "val").glob("*/*.png"))
    for path in paths:
        Image.open(path).resize((5, 5)).save(path)
    folder = shutil.copytree(image_folders["files"], tmp_path / "run")
    found, _, _ = revisit.evaluate(folder, [f"data.dir={copied}"])
    likely = of_images["files"].predict_proba(paths)
    losses = [-np.log(row[int(path.parent.name)]) for row, path in zip(likely, paths, strict=True)]
    assert found["loss"] == pytest.approx(np.mean(losses), abs=ROUNDING)


def test_a_stream_reads_its_inputs_a_few_windows_in_advance_and_no_more(model, monkeypatch):
    monkeypatch.setitem(prediction.WINDOW, "texts", 1)  # a window is one batch of 4
    taken, held, found = 0, [], []

    def endless():
        nonlocal taken
        while True:
            yield TEXTS[taken % len(TEXTS)]
            taken += 1

    for answer in model.stream(endless()):
        held.append(taken - len(found))
        found.append(answer.probabilities["real"])
        if len(found) == 60:
            break
    assert max(held) <= 3 * 4
    expected = model.predict_proba(TEXTS)[:, 1]
    np.testing.assert_allclose(found, np.tile(expected, 6), atol=ROUNDING)


def test_long_documents_make_windows_of_fewer_texts(monkeypatch):
    monkeypatch.setattr(prediction, "_CHARACTERS", 10)
    pairs = iter([(0, "123456"), (1, "123456"), (2, "1"), (3, UserError("no")), (4, "1")])
    assert [key for key, _ in prediction._taken(pairs, 4)] == [0, 1]
    assert [key for key, _ in prediction._taken(pairs, 2)] == [2, 3]


def test_programs_are_compiled_for_a_few_shapes_whatever_the_number_of_inputs(folder):
    model = jaxtl.load(folder)
    model.predict(TEXTS)
    step = model._members[0]._step
    compiled = step._cache_size()
    for count in (5, 7, 23):
        model.predict((TEXTS * 3)[:count])
    assert step._cache_size() == compiled <= len(prediction.batch_lengths(40))
    model.predict(TEXTS[:1])
    assert step._cache_size() == compiled + 1  # one text alone is no batch of four


def test_lengths_of_batches_grow_by_a_half_at_most_and_end_at_the_limit():
    assert prediction.batch_lengths(128) == (16, 24, 32, 40, 48, 64, 80, 96, 128)
    assert prediction.batch_lengths(100) == (16, 24, 32, 40, 48, 64, 80, 96, 100)
    assert prediction.batch_lengths(12) == (12,)


def test_what_cannot_be_read_is_an_answer_with_an_error(model, of_images, tmp_path):
    good, empty, other = model.predict(["garlic", " \n", "a mask \ud83d is new"])
    assert empty == prediction.Prediction(None, None, {}, "no text")
    assert (good.error, other.error) == ("", "")
    with pytest.raises(UserError, match=r"^input 1: no text$"):
        model.predict_proba(["garlic", ""])
    (tmp_path / "broken.png").write_bytes(b"no image")
    found = of_images["small"].predict(
        [tmp_path / "broken.png", tmp_path, "nowhere.png", np.zeros((4, 4, 3), np.uint8)]
    )
    assert [answer.error for answer in found] == ["not an image", "Is a directory", "No such file or directory", ""]
    assert [answer.error for answer in of_images["small"].predict(["nowhere.png"])] == ["No such file or directory"]


def test_inputs_of_another_kind_are_refused(model, of_images, tmp_path):
    mistakes = [
        (model, "garlic", "a list of inputs is wanted"),
        (model, [tmp_path], "classifies texts, and an input is a PosixPath"),
        (model, ["a mask", 3], "classifies texts, and an input is a int"),
        (of_images["small"], [3], "classifies images, and an input is int"),
        (of_images["small"], [np.zeros((4, 4), np.uint8)], r"an array \[4, 4\] uint8"),
        (of_images["small"], [np.zeros((4, 4, 3))], r"an array \[4, 4, 3\] float64"),
        (of_images["small"], Image.new("RGB", (4, 4)), "a list of inputs is wanted"),
    ]
    for one, inputs, message in mistakes:
        with pytest.raises(UserError, match=message):
            one.predict(inputs)


# --- several runs ----------------------------------------------------------------------------------------


def test_an_ensemble_is_its_members_put_together_by_the_names_of_the_classes(image_folders, of_images, photos):
    paths = sorted((photos / "val").glob("*/*.png"))
    small, files = (of_images[name].predict_proba(paths) for name in ("small", "files"))
    assert of_images["small"].class_names == ("2", "0", "1")
    assert of_images["files"].class_names == ("0", "1", "2")
    in_order = [small, files[:, [2, 0, 1]]]
    for rule in ensemble.RULES:
        model = jaxtl.load([image_folders["small"], image_folders["files"]], ensemble=rule)
        expected = ensemble.combine(in_order, rule)
        np.testing.assert_allclose(model.predict_proba(paths), expected.probabilities, atol=ROUNDING)
        assert [answer.label for answer in model.predict(paths)] == [model.class_names[i] for i in expected.predicted]
    assert not np.array_equal(small.argmax(axis=1), in_order[1].argmax(axis=1))  # or a vote would not be needed


def test_runs_that_do_not_go_together_are_told_apart(folder, image_folders, tmp_path, read_json):
    with pytest.raises(UserError, match=r"classifies texts, .* images: an ensemble is of one kind"):
        jaxtl.load([folder, image_folders["small"]])
    changed = shutil.copytree(folder, tmp_path / "changed")
    result = read_json(changed / "result.json")
    (changed / "result.json").write_text(json.dumps({**result, "classes": ["real", "satire"]}))
    with pytest.raises(UserError, match=r"changed does not know fake; .*run does not know satire\)"):
        jaxtl.load([folder, changed])


@pytest.mark.parametrize("kind", ["unfinished", "masked language modelling", "a folder of runs", "an older version"])
def test_a_folder_without_a_classifier_is_told(folder, image_folders, kind, tmp_path, read_json):
    """By its experiment and result alone."""
    source = image_folders["small"] if kind == "an older version" else folder
    run = shutil.copytree(source, tmp_path / "run")
    if kind == "unfinished":
        (run / "result.json").unlink()
        message = "has not finished; run it first"
    elif kind == "an older version":
        result = read_json(run / "result.json")
        del result["image_shape"]
        (run / "result.json").write_text(json.dumps(result))
        message = "does not say which size its images had"
    elif kind == "a folder of runs":
        run, message = tmp_path, "it holds the runs .*/run: name one of them"
    else:  # on a file with labels, which serve to draw examples by class
        experiment = config.from_json((folder / "experiment.json").read_text(), "run")
        other = dataclasses.replace(
            experiment, model=config.Model("from_weights", experiment.model.weights, head=config.Head("mlm", "masked"))
        )
        (run / "experiment.json").write_text(config.to_json(other))
        message = "tells no classes apart: it was trained on masked language modelling"
    with pytest.raises(UserError, match=message):
        jaxtl.load(run)


# --- the command -----------------------------------------------------------------------------------------


def test_texts_on_the_command_line_are_answered_on_standard_output(folder, model, command):
    status, shown, told = command(predict, folder, "--text", "garlic", "--text", 'a "mask"\nis new')
    assert (status, told) == (0, "")
    header, rows = table(shown)
    assert header == ["file", "record", "text", "label", "probability", "p(fake)", "p(real)", "error"]
    assert [row[:3] for row in rows] == [["--text", "1", "garlic"], ["--text", "2", 'a "mask"\nis new']]
    for row, likely in zip(rows, model.predict_proba(["garlic", 'a "mask"\nis new']), strict=True):
        assert (row[3], row[-1]) == (model.class_names[likely.argmax()], "")
        np.testing.assert_allclose([float(cell) for cell in row[4:-1]], [likely.max(), *likely], atol=6e-7)


def test_answers_are_utf8_wherever_they_go_but_to_a_terminal(folder, model, monkeypatch):
    from absl import flags
    from absl.testing import flagsaver

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        predict.main(flags.FLAGS(["predict", str(folder), "--text", "garlic 🧄"]))
    sys.stdout.flush()
    assert "garlic 🧄" in written.getvalue().decode()


def test_files_that_are_no_images_are_said_to_be_left_out(image_folders, loaded, command, photos, tmp_path):
    for name in ("1.heic", "2.heic", ".hidden.txt"):
        (tmp_path / name).touch()
    shutil.copy(sorted((photos / "val" / "1").iterdir())[0], tmp_path)
    status, shown, told = command(predict, image_folders["small"], tmp_path)
    assert (status, len(table(shown)[1])) == (0, 1)
    assert "left out, not being images that are read: 2 .heic" in told


def test_files_are_answered_record_by_record_whatever_their_format(folder, loaded, model, command, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS), encoding="utf-8")
    with (tmp_path / "b.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((f"x{number}", text) for number, text in enumerate(TEXTS))])
    status, shown, told = command(
        predict, folder, tmp_path / "a.jsonl", tmp_path / "b.csv", "--text", "no", "--output", tmp_path / "out.jsonl"
    )
    assert (status, shown) == (0, "")
    assert f"21 texts: {tmp_path / 'out.jsonl'}" in told
    rows = lines(tmp_path / "out.jsonl")
    expected = [("--text", 1, "no")]
    expected += [(str(tmp_path / "a.jsonl"), 2 * number + 1, text) for number, text in enumerate(TEXTS)]
    expected += [(str(tmp_path / "b.csv"), number + 1, text) for number, text in enumerate(TEXTS)]
    assert [(row["file"], row["record"], row["text"]) for row in rows] == expected
    for row, answer in zip(rows, model.predict([text for _, _, text in expected]), strict=True):
        assert row["label"] == answer.label
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=2e-6)
        assert next(iter(row["probabilities"])) == answer.label
        assert row["probability"] == row["probabilities"][row["label"]]
        assert "error" not in row
    status, _, _ = command(predict, folder, tmp_path / "b.csv", "--output", tmp_path / "out.csv")
    assert status == 0
    header, cells = table((tmp_path / "out.csv").read_text(encoding="utf-8"))
    for row, cell in zip(rows[11:], cells, strict=True):
        named = dict(zip(header, cell, strict=True))
        assert (named["label"], named["text"]) == (row["label"], row["text"])
        assert float(named["p(fake)"]) == pytest.approx(row["probabilities"]["fake"], abs=2e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.csv", "out.jsonl", "out.csv"}


def test_records_that_cannot_be_read_are_rows_with_an_error_and_the_status_tells(folder, loaded, command, tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "garlic"}\n{"text": ""}\n{"tweet": "a mask"}\n{"text": null}\nnot JSON\n{"text": []}\n'
        '{"text": "no"}\n'
    )
    (tmp_path / "b.csv").write_text('id,text\n1,a mask\n2,a mask, or none\n3,garlic\n4,"never closed\n5,no\n')
    (tmp_path / "c.txt").write_bytes("garlic\nmásk\na mask\n".encode("latin-1"))
    out = tmp_path / "out.jsonl"
    status, _, told = command(predict, folder, *sorted(tmp_path.iterdir()), "--output", out)
    assert status == 1
    assert f"14 texts, 8 of them with an error: {out}" in told
    found = [(row["file"][-7:], row["record"], row["text"], row.get("error", "")) for row in lines(out)]
    expected = [
        ("a.jsonl", 1, "garlic", ""),
        ("a.jsonl", 2, "", "no text"),
        ("a.jsonl", 3, None, "a.jsonl, line 3, has no column 'text'"),
        ("a.jsonl", 4, "", "no text"),
        ("a.jsonl", 5, None, "a.jsonl, line 5: not JSON"),
        ("a.jsonl", 6, None, "record 6: 'text' holds a list"),
        ("a.jsonl", 7, "no", ""),
        ("/b.csv", 1, "a mask", ""),
        ("/b.csv", 2, None, "b.csv, record 2: 3 fields, and the header has 2"),
        ("/b.csv", 3, "garlic", ""),
        ("/b.csv", 4, None, "the rest of the file was not read"),
        ("/c.txt", 1, "garlic", ""),
        ("/c.txt", 2, None, "not UTF-8 text: see the byte at offset 8"),
        ("/c.txt", 3, "a mask", ""),
    ]
    for (file, *where, error), (name, *there, message) in zip(found, expected, strict=True):
        assert (file[-len(name) :], where) == (name, there)
        assert message in error
        assert bool(message) == bool(error)
    status, shown, told = command(predict, folder, "--text", " ", "--text", "garlic")
    assert status == 1
    assert "2 texts, 1 of them with an error" in told
    header, rows = table(shown)
    assert [len(row) for row in rows] == [len(header)] * 2
    assert rows[0][2:] == [" ", "", "", "", "", "no text"]


def test_images_and_folders_of_them_are_answered_one_a_row(image_folders, of_images, loaded, command, photos, tmp_path):
    nested = tmp_path / "new" / "inner"
    shutil.copytree(photos / "val" / "0", nested)
    (nested / "Thumbs.db").write_bytes(b"")
    (nested / ".hidden.png").write_bytes(b"")
    (nested / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "new" / "linked").symlink_to(photos)
    single = sorted((photos / "val" / "1").iterdir())[0]
    out = tmp_path / "out.jsonl"
    status, _, told = command(predict, image_folders["files"], single, tmp_path / "new", "--output", out, "--top=2")
    assert status == 1
    rows = lines(out)
    good = sorted(path for path in nested.iterdir() if path.stem.isdigit())
    assert f"{len(good) + 3} images, 2 of them with an error: {out}" in told
    assert [row["file"] for row in rows] == list(
        map(str, [single, *good, nested / "broken.png", tmp_path / "new/linked"])
    )
    assert set(rows[-2]) == set(rows[-1]) == {"file", "error"}
    assert rows[-1]["error"].startswith("a symbolic link to a folder is not followed")
    for row, answer in zip(rows, of_images["files"].predict([single, *good], top=2), strict=False):
        assert list(row["probabilities"]) == list(answer.probabilities)
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=2e-6)


def test_the_likeliest_classes_are_columns_of_their_own(image_folders, of_images, loaded, command, photos):
    path = sorted((photos / "val" / "2").iterdir())[0]
    (answer,) = of_images["files"].predict([path])
    ranked = [cell for name, value in answer.probabilities.items() for cell in (name, f"{value:.6f}")]
    for top, columns in ((1, 1), (2, 2), (9, 3)):
        status, shown, _ = command(predict, image_folders["files"], path, f"--top={top}")
        header, (row,) = table(shown)
        more = [f"{field}_{rank}" for rank in range(2, columns + 1) for field in ("label", "probability")]
        assert (status, header) == (0, ["file", "label", "probability", *more, "error"])
        assert row == [str(path), *ranked[: 2 * columns], ""]


def test_several_runs_answer_together(image_folders, command, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    status, _, _ = command(
        predict, *image_folders.values(), photos, "--ensemble=vote", "--output", out, "--batch_size=4"
    )
    assert status == 0
    model = jaxtl.load(list(image_folders.values()), ensemble="vote")
    rows = lines(out)
    assert [row["label"] for row in rows] == [answer.label for answer in model.predict(row["file"] for row in rows)]
    assert {row["probability"] for row in rows} == {0.5, 1.0}  # shares of two votes


def test_progress_is_counted_where_nobody_knows_how_much_there_is(folder, loaded, command, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    (tmp_path / "a.txt").write_text("\n".join(["garlic"] * 9))
    _, _, told = command(predict, folder, tmp_path / "a.txt")
    counts = [int(line.split()[1]) for line in told.splitlines()]
    assert counts == [4, 8, 9, 9]
    assert "texts/s" in told


def test_mistakes_are_one_line_and_leave_no_half_of_a_file(
    folder, image_folders, loaded, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "column.csv").write_text("tweet,label\na mask,real\n")
    (tmp_path / "column.jsonl").write_text('{"tweet": "a mask"}\n' * 30)
    (tmp_path / "none.csv").write_text("text,label\n")
    (tmp_path / "good.txt").write_text("garlic\n")
    (tmp_path / "cat.jpg").write_text("")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "experiment.json").write_text((folder / "experiment.json").read_text())
    (tmp_path / "nothing").mkdir()
    images, out = image_folders["small"], ("--output", "out.csv")
    mistakes = [
        ((), "give a run folder and inputs"),
        ((folder,), "there is nothing to predict: give files or folders, as in"),
        ((folder, "column.csv", *out), "(did you mean 'tweet'?): set --text_column to one of tweet, label"),
        ((folder, "good.txt", "column.jsonl", *out), "column.jsonl, line 1, has no column 'text'"),
        ((folder, "none.csv", *out), "none.csv holds no texts"),
        ((folder, "nowhere.csv", *out), "there is no file nowhere.csv"),
        ((folder, "nothing", *out), "nothing is a folder, and"),
        ((folder, "cat.jpg", *out), "cat.jpg is an image, and"),
        ((folder, "cat.jpeg2000", *out), "there is no file cat.jpeg2000"),
        ((folder, "a mask", *out), "there is no file a mask; a text itself is given with --text"),
        ((folder, "a long mask " * 30, *out), "File name too long; a text itself is given with --text"),
        ((images, "good.txt", *out), "good.txt is a file of texts, and"),
        ((images, "nothing", *out), "nothing holds no images; their names end in .jpg"),
        ((images, "--text", "a mask"), "classifies images: --text and --text_column are for runs on texts"),
        (("nowhere", "good.txt"), "nowhere: there is no such run folder"),
        (("nothing", "good.txt"), "nothing holds no run"),
        (("unfinished", "good.txt"), "has not finished; run it first"),
        ((folder, "good.txt", images), "is a run folder, and good.txt before it is none: give the runs first"),
        ((folder, images, "good.txt", *out), "an ensemble is of one kind"),
        ((folder, "good.txt", "--ensemble=mean"), "puts several runs together: give two or more"),
        ((folder, "good.txt", "--top=0"), "--top=0: at least one class is written"),
        ((folder, "good.txt", "--output", "nowhere/out.csv"), "there is no folder nowhere; make it first"),
        ((folder, "good.txt", "--output", "good.txt/out.csv"), "there is no folder good.txt; make it first"),
        ((folder, "good.txt", "--output", "nothing"), "its name ends in .csv, or in .jsonl"),
        ((folder, "column.csv", "--text_column=tweet", "--output", "column.csv"), "column.csv is one of the inputs"),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in mistakes:
        status, _, told = command(predict, *arguments)
        assert status == 2, arguments
        (line,) = told.splitlines()
        assert line.startswith("jaxtl: error: "), arguments
        assert message in line
        assert sorted(tmp_path.rglob("*")) == before, arguments


def test_a_file_written_before_stays_where_a_later_attempt_fails(folder, loaded, command, tmp_path, monkeypatch):
    (tmp_path / "out.csv").write_text("of yesterday")
    (tmp_path / "new.txt").write_text("garlic\n" * 9)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxtl.evaluation.answers.Table.write", full)
    status, _, told = command(predict, folder, tmp_path / "new.txt", "--output", tmp_path / "out.csv")
    assert status == 2
    assert "out.csv cannot be written: No space left on device" in told
    assert (tmp_path / "out.csv").read_text() == "of yesterday"
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "new.txt"}


def test_a_batch_that_is_too_large_for_the_device_is_told_with_the_flag_that_makes_it_smaller(
    folder, loaded, command, monkeypatch
):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(prediction._Member, "forward", full)
    assert command(predict, folder, "--text", "garlic")[::2] == (
        2,
        "jaxtl: error: out of memory on the device; lower --batch_size\n",
    )


def test_the_benchmark_measures_prediction_and_the_same_batches_alone(folder, text_folder):
    from benchmarks import predict as benchmark

    measured, bare = (measure(folder, text_folder / "test.csv") for measure in (benchmark.predict, benchmark.bare))
    assert measured["texts"] == bare["texts"] == 62
    assert min(measured["seconds"], bare["seconds"], measured["peak_bytes"]) > 0
    assert 0.3 < bare["filled"] < 1


def test_importing_the_package_imports_no_jax():
    import subprocess

    code = "import sys, jaxtl; assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
