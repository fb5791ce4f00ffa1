"""The report: what it says, of any content, safely; of real runs; and in a real browser."""

import dataclasses
import html.parser
import json
import math
import re
import resource
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from jaxtl import config, interrupt
from jaxtl.evaluation import figures, metrics, report, terminal
from jaxtl.evaluation.report import Answer, Content, Example
from jaxtl.training import account, freeze, loop
from jaxtl.training.events import Events
from jaxtl.training.network import locate
from jaxtl.training.setup import look

HOSTILE = "<script>alert(1)</script>"
QUOTES = "\"><img src=x onerror=alert(2)> '&amp; ${1} {{ 7*7 }} $x^2$ #1b1f24 font: 9px x; 😷\n<!-- --></style>"

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # a PNG
PICTURE = f"data:image/png;base64,{DOT}"
EXAMPLES = {
    "images": Example("file:0", "cat", before=PICTURE, after=PICTURE),
    "texts": Example("file:0", "cat", text="a cat", pieces=(("[CLS]", "special"), ("cat", ""))),
}


# --- content made by hand ----------------------------------------------------------------------------------


def made(names=("cat", "dog", "frog"), count=60, *, kind="texts", seed=0, **more):
    """A content of so many examples of these classes, of which most are told right."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % len(names)
    logits = random.normal(size=(count, len(names))) + 2.5 * np.eye(len(names))[labels]
    likely = metrics.probabilities(logits)
    judged = metrics.classification(logits, labels, names)
    settings = dataclasses.asdict(
        config.Experiment(
            config.Model("vit_nano_patch2_8"),
            config.Text(name="made") if kind == "texts" else config.Images(name="made"),
            train=config.Train(epochs=3, batch_size=20, select="best"),
        )
    )
    history = []
    for epoch in range(1, 4):
        for step in range(3):
            done = (epoch - 1) * 3 + step + 1
            history.append(
                {"step": done, "epoch": done / 3, "split": "train", "loss": 3 / done, "accuracy": 0.2 * epoch}
            )
        for split in ("train_epoch", "eval"):
            history.append(
                {"step": 3 * epoch, "epoch": epoch, "split": split, "loss": 2 / epoch**2, "accuracy": 0.3 * epoch}
            )
    result = {
        "accuracy": judged["accuracy"], "loss": judged["loss"], "held_out": judged, "test": None, "before": None,
        "selected_step": 6, "selected_epoch": 2.0, "steps": 9, "skipped_steps": 0, "trainable_parameters": 1300,
        "total_parameters": 5678, "train_examples": 60, "eval_examples": count, "test_examples": 0,
        "classes": list(names), "seconds_train": 1.0, "seconds_per_epoch": 0.5, "seconds_compile": 2.0,
        "seconds_evaluate": 0.1, "seconds_total": 61.0, "peak_memory_bytes": 2**30, "reported": {}, "device": "1 x cpu",
        "platform": "cpu", "host_cores": 2, "python": "3.11.7", "versions": {"jaxtl": "0.1.0", "jax": "0.10.2"},
    }  # fmt: skip
    rows = report.shown_rows(likely, labels, 40)
    answers = [
        Answer(
            f"file:{row}",
            names[labels[row]],
            names[likely[row].argmax()],
            float(likely[row].max()),
            "" if kind == "images" else f"text {row} of {names[labels[row]]}",
            PICTURE if kind == "images" else "",
        )
        for row in rows
    ]
    content = Content(
        name="made", command="python -m jaxtl.main --experiment=runs/made/experiment.json", finished="today",
        settings=settings, result=result, history=history,
        stages={"embeddings": {"trained": 0, "frozen": 4378}, "head": {"trained": 1300, "frozen": 0}},
        counts={"training": [20] * len(names), "held-out": np.bincount(labels, minlength=len(names)).tolist()},
        kind=kind, labels=labels, likely=likely, answers=answers,
        examples=[EXAMPLES[kind]],
        preparation="Below each text, its word pieces.",
    )  # fmt: skip
    return dataclasses.replace(content, **more)


class Page(html.parser.HTMLParser):
    """A page's elements, (tag, attributes), and its text without that of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self._tag = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self._tag = tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag not in ("script", "style"):
            self.text += data

    def of(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture(scope="module")
def content():
    found = made()
    reported = {"accuracy": 0.9, "f1/cat": 0.8, "trainable_parameters": 1300.0}
    return dataclasses.replace(found, result={**found.result, "reported": reported})


@pytest.fixture(scope="module")
def drawn(content):
    return report.draw(content)


@pytest.fixture(scope="module")
def page(content, drawn):
    return Page(report.render(content, drawn))


def test_page_says_what_ran_how_well_and_where_it_errs(page, content):
    judged = content.result["held_out"]
    assert f"{judged['accuracy']:.4f}" in page.text
    for said in (
        "python -m jaxtl.main --experiment=runs/made/experiment.json", "1 x cpu", "jax 0.10.2", "1 min 1 s",
        "1,300 of 5,678 parameters", "Ours against reported", f"{judged['f1']['cat'] - 0.8:+.4f}",
        "Expected calibration error", "The most frequent confusions", "9 steps of 20 examples (3 epochs)",
    ):  # fmt: skip
        assert said in page.text, said
    assert [attributes["lang"] for attributes in page.of("html")] == ["en"]
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.of("th"))


def test_page_needs_no_network_and_may_run_its_own_script_only(page):
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-inline" not in policy.partition("script-src")[2]
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) or address == "predictions.csv" for address in addresses)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def hostile(kind):
    """A content of which everything that comes from data, or from people, could be taken for markup."""
    found = made((HOSTILE, QUOTES, "frog"), kind=kind)
    return dataclasses.replace(
        found,
        name=HOSTILE,
        command=QUOTES,
        settings={**found.settings, HOSTILE: QUOTES},
        preparation=HOSTILE,
        stages={HOSTILE: {"trained": 1, "frozen": 1}, QUOTES: {"trained": 0, "frozen": 1}},
        answers=[dataclasses.replace(answer, id=QUOTES, text=answer.text and HOSTILE) for answer in found.answers],
        examples=[
            dataclasses.replace(
                EXAMPLES[kind], id=HOSTILE, label=QUOTES, text=QUOTES, pieces=((HOSTILE, ""), (QUOTES, "hidden-piece"))
            )
        ],
    )


def test_nothing_from_the_data_becomes_markup(drawn):
    """Class names, texts, file names, settings, word pieces: as they stand, everywhere, the figures included."""
    risky = report.draw(hostile("texts"))
    for figure in risky.values():
        ElementTree.fromstring(figure.svg.replace("xlink:", ""))  # well-formed, whatever is in it
    for kind in ("texts", "images"):
        found = Page(report.render(hostile(kind), risky))
        calm = made(kind=kind)
        calm = dataclasses.replace(calm, settings={**calm.settings, "another": "setting"})
        expected = Page(report.render(calm, drawn))
        for tag in ("script", "img", "style", "meta", "iframe", "link", "svg", "li", "td"):
            assert len(found.of(tag)) == len(expected.of(tag)), tag
        assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
        assert HOSTILE in found.text
        assert "{{ 7*7 }}" in found.text


def test_figures_take_the_colour_of_the_page(drawn):
    for name, figure in drawn.items():
        assert figure.name == name
        assert "currentColor" in figure.svg
        assert "#1b1f24" not in figure.svg
        assert ' id="figure' not in figure.svg  # the same in every figure of a page
        assert figure.png.startswith(b"\x89PNG")
        assert figure.alt.endswith(".")


def test_loss_is_drawn_on_a_log_scale_where_it_spans_more_than_a_factor_of_ten():
    def axis(values):
        curve = figures.Curve("loss", [1, 2, 3], values)
        return figures.lines("loss", "Loss", [curve], x_label="epochs", y_label="nats", caption="").svg

    assert "(log scale)" in axis([2.0, 0.5, 0.1])
    assert "(log scale)" not in axis([2.0, 0.5, 0.3])
    assert "(log scale)" not in axis([1.0, 0.5, 0.0])


def test_many_classes_stay_readable_and_small():
    names = [f"class {number}" for number in range(120)]
    content = made(names, 600, kind="images")
    drawn = report.draw(content)
    shown = re.findall(r">(class \d+|\d+ others)<", drawn["confusion"].svg)
    assert len(shown) == 2 * 20  # on both axes
    assert "101 others" in shown
    predicted = content.likely.argmax(axis=-1)
    wrong = predicted != content.labels
    errors = np.bincount(predicted[wrong], minlength=120) + np.bincount(content.labels[wrong], minlength=120)
    assert f"class {errors.argmax()}" in shown
    assert len(drawn["classes"].svg) < 50_000
    assert len(report.render(content, drawn)) < 600_000


def test_folded_confusion_matrix_loses_no_example():
    random = np.random.default_rng(0)
    matrix = random.integers(0, 9, (30, 30))
    folded, names = figures._worst_classes(matrix, [str(number) for number in range(30)], 4)
    assert folded.sum() == matrix.sum()
    assert names[-1] == "26 others"
    kept = [int(name) for name in names[:-1]]
    np.testing.assert_array_equal(folded[:4, :4], matrix[np.ix_(kept, kept)])
    np.testing.assert_array_equal(folded[:4, 4], matrix[kept].sum(axis=1) - folded[:4, :4].sum(axis=1))


def test_calibration_error_is_the_weighted_gap_between_confidence_and_accuracy():
    """Bin (0.6, 0.7]: two answers of 0.7, one right. Bin (0.9, 1]: two of 1.0 and 0.95, both right."""
    likely = np.array([[0.7, 0.3], [0.3, 0.7], [1.0, 0.0], [0.05, 0.95]])
    found = metrics.calibration(likely, np.array([0, 0, 0, 1]))
    assert found.counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert found.accuracy[6] == pytest.approx(0.5)
    assert found.confidence[9] == pytest.approx(0.975)
    assert found.error == pytest.approx((2 * abs(0.5 - 0.7) + 2 * abs(1 - 0.975)) / 4)
    assert np.isnan(found.accuracy[0])


@pytest.mark.parametrize(
    ("wrong", "right", "expected"), [(3, 97, (3, 17)), (90, 10, (15, 5)), (99, 1, (19, 1)), (0, 5, (0, 5))]
)
def test_errors_are_shown_first_and_never_alone(wrong, right, expected):
    confident = np.linspace(0.55, 0.99, wrong + right)
    likely = np.stack([confident, 1 - confident], axis=1)
    labels = np.array([1] * wrong + [0] * right)
    rows = report.shown_rows(likely, labels, 20)
    assert len(set(rows.tolist())) == len(rows) == sum(expected)
    assert (labels[rows] == 1).sum() == expected[0]
    assert (labels[rows[: expected[0]]] == 1).all()
    if wrong:
        assert rows[0] == wrong - 1  # the most confident of them
    if right > 1:
        assert {wrong, wrong + right - 1} <= set(rows.tolist())  # the surest right one and the least sure


def test_masked_language_modelling_has_a_report_without_classes():
    found = {"accuracy": 0.3, "loss": 2.0, "perplexity": 7.389}
    before = {"accuracy": 0.01, "loss": 5.0, "perplexity": 148.4}
    history = [
        {"step": step, "epoch": step, "split": "eval", "loss": math.log(148 / 4**step), "accuracy": 0.1}
        for step in range(3)
    ]
    content = made(labels=None, likely=None, answers=[], history=history, counts={"training": [60], "held-out": [20]})
    content = dataclasses.replace(
        content, result={**content.result, "held_out": found, "before": before, "classes": []}
    )
    drawn = report.draw(content)
    assert set(drawn) == {"loss", "accuracy", "perplexity", "parameters"}
    curves = {curve.label: list(curve.y) for curve in report._curves_of(content, "perplexity")}
    assert curves == {"held out": pytest.approx([148.0, 37.0, 9.25])}
    text = Page(report.render(content, drawn)).text
    assert "7.39" in text
    assert "148.40 before training" in text
    assert "Calibration" not in text


# --- real runs ---------------------------------------------------------------------------------------------


IMAGES = config.Experiment(
    model=config.Model("vit_nano_patch2_8", image_size=8, head=config.Head("fc", "cls", dropout=0.0, init="random")),
    data=config.Images(source="digits", train_size=100, eval_size=60, augment="flip", scale="half"),
    freeze=freeze.train_head_only(),
    optim=config.Optim("adamw", learning_rate=2e-2),
    train=config.Train(epochs=3, batch_size=32, eval_batch_size=32, log_every=2, select="best"),
    reported=(("accuracy", 0.9),),
)


@pytest.fixture(scope="module")
def image_run(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "digits"
    loop.train(IMAGES, folder)
    return folder


@pytest.fixture(scope="module")
def text_run(reports, bert_folder, tmp_path_factory):
    """Of texts with everything in them that could be taken for markup."""
    folder = tmp_path_factory.mktemp("report") / "texts"
    folder.mkdir()
    source = folder.with_name("texts.jsonl")
    rows = [
        {"text": f"{QUOTES} {number} {HOSTILE * (number % 3)}", "label": ("=1+1", HOSTILE)[number % 2]}
        for number in range(90)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    experiment = config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("fc", "cls", dropout=0.0)),
        data=config.Text(train=(str(source),), max_length=40, buckets=1),
        freeze=freeze.train_head_only(),
        train=config.Train(epochs=2, batch_size=32, eval_batch_size=32),
    )
    loop.train(experiment, folder)
    return folder


def test_an_image_run_ends_with_its_report(image_run, read_json):
    page, result = (
        Page((image_run / "report/index.html").read_text(encoding="utf-8")),
        read_json(image_run / "result.json"),
    )
    assert f"{result['accuracy']:.4f}" in page.text
    pictures = [image for image in page.of("img") if image["src"].startswith("data:image/png;base64,")]
    assert len(pictures) == 2 * 8 + 60  # before and after; all of the held-out images
    assert {path.stem for path in (image_run / "report").glob("*.png")} == {
        "loss", "accuracy", "parameters", "classes", "confusion", "calibration",
    }  # fmt: skip
    for path in (image_run / "report").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 150
    assert f"{result['trainable_parameters']:,} of {result['total_parameters']:,} parameters" in page.text
    assert "flipped at random" in page.text


def test_a_text_run_ends_with_its_report(text_run):
    page = Page((text_run / "report/index.html").read_text(encoding="utf-8"))
    assert len(page.of("script")) == 1
    assert not page.of("img")
    assert HOSTILE in page.text
    assert "[CLS]" in page.text


def test_the_page_is_what_the_command_prints_last(image_run, read_json, capsys):
    terminal.show_result(read_json(image_run / "result.json"), image_run, new=True)
    assert capsys.readouterr().out.splitlines()[-1] == str(image_run / "report/index.html")


def without_times(folder):
    page = (folder / "report/index.html").read_text(encoding="utf-8").replace(str(folder.parent), "")
    return re.sub(r"<dt>(Time|Memory)</dt><dd>.*?</dd>", "", page)


def test_a_run_that_went_on_has_the_report_of_one_that_was_left_alone(image_run, tmp_path, monkeypatch):
    report_step = loop._Loop._report

    def interrupted(self, done, *rest):
        report_step(self, done, *rest)
        if done == 5:
            monkeypatch.setattr(interrupt, "_asked", 15)

    folder = tmp_path / image_run.name
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_report", interrupted)
        with pytest.raises(interrupt.Interrupted):
            loop.train(IMAGES, folder)
    monkeypatch.setattr(interrupt, "_asked", None)
    loop.train(IMAGES, folder)
    assert without_times(folder) == without_times(image_run)
    scalars, _ = events(folder)
    assert [scalar[:2] for scalar in scalars] == [scalar[:2] for scalar in of_metrics(folder)]


def test_what_masked_language_modelling_hides_is_shown(bert_folder, text_folder):
    experiment = config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("mlm", "masked")),
        data=config.Text(dir=str(text_folder), train=("lines.txt",), label_column="", max_length=40, buckets=1),
    )
    this, drawn = look(experiment, locate)
    shown = account._texts_prepared(this, drawn[0])
    assert len(shown) == 4
    assert len({example.id for example in shown}) == 4
    pieces = [piece for example in shown for piece in example.pieces]
    hidden = [name for name, kind in pieces if kind == "hidden-piece"]
    assert "[MASK]" in hidden
    assert 0.05 < len(hidden) / len(pieces) < 0.25  # 15 % of those that are not special
    special = [name for name, kind in pieces if kind == "special" and name != "[UNK]"]
    assert special == ["[CLS]", "[SEP]"] * 4


def test_a_report_that_cannot_be_written_costs_the_run_nothing_and_can_be_had_later(
    tmp_path, reports, monkeypatch, capsys, read_json
):
    def full(*_):
        raise OSError(28, "No space left on device")

    experiment, folder = config.override(IMAGES, ["train.max_steps=1"]), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", full)
        result = loop.train(experiment, folder)
    assert read_json(folder / "result.json") == result
    said = capsys.readouterr().err
    assert said.count("NO REPORT") == 1
    assert "No space left on device" in said
    assert f"remove {folder / 'result.json'} and give the same command again" in said
    (folder / "result.json").unlink()
    assert loop.train(experiment, folder)["trained_sha256"] == result["trained_sha256"]
    assert (folder / "report/index.html").is_file()


# --- TensorBoard -------------------------------------------------------------------------------------------


def events(folder):
    """(tag, step, value) of every scalar, and the tags of images, in the folder's only file."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (folder / "tensorboard").iterdir()
    data, scalars, images = path.read_bytes(), [], []
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            if value.HasField("image"):
                images.append((value.tag, value.image.width, value.image.encoded_image_string))
            else:
                scalars.append((value.tag, event.step, value.simple_value))
    return scalars, images


def of_metrics(folder):
    found = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        numbers = {name: value for name, value in line.items() if name not in ("step", "epoch", "split")}
        found += [
            (f"{line['split']}/{name}", line["step"], value) for name, value in numbers.items() if value is not None
        ]
    return found


def test_events_are_those_of_the_metrics_and_the_figures(image_run):
    scalars, images = events(image_run)
    expected = of_metrics(image_run)
    assert ("eval/loss", 12) in [scalar[:2] for scalar in scalars]
    assert [scalar[:2] for scalar in scalars] == [scalar[:2] for scalar in expected]
    np.testing.assert_allclose([scalar[2] for scalar in scalars], [scalar[2] for scalar in expected], rtol=1e-6)
    for tag, width, png in images:
        path = image_run / f"{tag}.png"
        assert path.read_bytes() == png
        with Image.open(path) as image:
            assert image.width == width
    assert len(images) == 6


def line(step, **numbers):
    return json.dumps({"step": step, "epoch": step / 4, "split": "train", **numbers}) + "\n"


def test_a_run_that_goes_on_has_no_event_twice_and_none_of_steps_taken_again(tmp_path):
    before = Events(tmp_path / "tensorboard", [])
    for step in (1, 2, 3):
        before.add(line(step, loss=1.0))
    before.close()
    after = Events(tmp_path / "tensorboard", [line(1, loss=1.0), line(2, loss=1.0)])  # the checkpoint is of step 2
    after.add(line(3, loss=0.5, note="nan"), flush=True)
    found, _ = events(tmp_path)
    after.close()
    assert found == [("train/loss", 1, 1.0), ("train/loss", 2, 1.0), ("train/loss", 3, 0.5)]


@pytest.mark.parametrize("reason", ["full", "no folder"])
def test_events_that_cannot_be_written_are_said_once_and_nothing_else_happens(tmp_path, capsys, reason):
    folder = tmp_path / "tensorboard"
    if reason == "no folder":
        folder.write_text("a file")
        Events(folder, []).close()
    else:
        found, limits = Events(folder, []), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # the system refuses to write more
        try:
            for step in range(200):
                found.add(line(step, loss=1.0), flush=step % 50 == 0)
            found.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1
    assert "metrics.jsonl" in said


# --- in a real browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory, drawn):
    """The pages of contents made by hand: texts and images, with names that could be taken for markup."""
    folder = tmp_path_factory.mktemp("pages")
    for kind in ("texts", "images"):
        (folder / f"{kind}.html").write_text(report.render(hostile(kind), drawn), encoding="utf-8")
    return folder


def visible(browser, selector):
    return [element for element in browser.find_elements("css selector", selector) if element.is_displayed()]


def column(browser, number):
    return [row.text for row in visible(browser, f"#predictions tbody tr > :nth-child({number})")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_page_is_accessible_and_fits_a_telephone_in_both_colour_schemes(browser, open_page, written, kind):
    from axe_core_python.selenium import Axe

    path = written / f"{kind}.html"
    for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")):
        open_page(path, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.fonts.status") == "loaded"
        for details in browser.find_elements("css selector", "summary"):
            details.click()
        found = Axe().run(browser)
        assert len(found["passes"]) > 20
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_nothing_in_a_page_is_run_or_fetched_but_its_own_script(browser, open_page, written):
    for kind in ("texts", "images"):
        open_page(written / f"{kind}.html")
        assert browser.execute_script("return document.documentElement.className") == "scripted"
        assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
        assert browser.get_log("browser") == []


@pytest.mark.slow
def test_table_is_sorted_by_mouse_and_keyboard(browser, open_page, written):
    from selenium.webdriver.common.keys import Keys

    open_page(written / "texts.html")
    heading = next(
        each for each in browser.find_elements("css selector", "#predictions th") if "probability" in each.text
    )
    button = heading.find_element("tag name", "button")
    before = column(browser, 4)
    assert before != sorted(before, reverse=True)  # errors first
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(browser, 4) == sorted(before, reverse=True)
    button.send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(browser, 4) == sorted(before)


@pytest.mark.slow
def test_predictions_are_searched_filtered_and_ordered(browser, open_page, written):
    open_page(written / "images.html")
    shown = hostile("images").answers
    count = browser.find_element("css selector", "#predictions output")
    assert count.text == f"{len(shown)} predictions"

    def choose(label, value):
        select = browser.find_element(
            "xpath", f"//section[@id='predictions']//label[starts-with(normalize-space(), '{label}')]/select"
        )
        option = next(
            each for each in select.find_elements("tag name", "option") if each.get_attribute("value") == value
        )
        option.click()

    choose("Answers", "wrong")
    wrong = sum(answer.verdict == "wrong" for answer in shown)
    assert 0 < wrong < len(shown)
    assert len(visible(browser, "#predictions .cards li")) == wrong
    assert count.text == f"{wrong} predictions that match, of {len(shown)}"
    choose("Answers", "")
    choose("True class", HOSTILE)
    assert len(visible(browser, "#predictions .cards li")) == sum(answer.label == HOSTILE for answer in shown)
    choose("True class", "")
    choose("Order", "probability ascending")
    found = [float(each.text) for each in visible(browser, "#predictions .probability")]
    assert found == sorted(found)
    browser.find_element("css selector", "#predictions [data-search]").send_keys("no such thing")
    assert visible(browser, "#predictions .cards li") == []


@pytest.mark.slow
def test_long_lists_are_shown_by_parts(browser, open_page, written, drawn):
    content = made()
    content = dataclasses.replace(content, answers=[content.answers[0]] * 130)
    path = written / "long.html"
    path.write_text(report.render(content, drawn), encoding="utf-8")
    open_page(path)
    assert len(visible(browser, "#predictions tbody tr")) == 50
    browser.find_element("css selector", "#predictions .more").click()
    assert len(visible(browser, "#predictions tbody tr")) == 100
    browser.find_element("css selector", "#predictions .more").click()
    assert len(visible(browser, "#predictions tbody tr")) == 130
    assert not visible(browser, "#predictions .more")
