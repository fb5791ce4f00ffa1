"""Runs side by side: which are one row, which may be tested against each other, and what is said of the others."""

import base64
import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxtl import config
from jaxtl.data import sources
from jaxtl.errors import UserError
from jaxtl.evaluation import comparison, comparison_report, runs, statistics
from jaxtl.evaluation.statistics import Answers

BASE = config.Experiment(
    config.Model("vit_nano_patch2_8", image_size=8), config.Images(), reported=(("accuracy", 0.75), ("f1/b", 0.5))
)
CLASSES = ("a", "b")
LABELS = np.array([0, 1] * 10)
IDS = tuple(f"test:{number}" for number in range(20))


def change(*assignments, base=BASE):
    return config.override(base, assignments)


def logits(right, labels=LABELS, classes=2, by=2.0):
    """Answers that are right where `right` says so, elsewhere those of the class after the true one."""
    found = np.zeros((len(labels), classes))
    answered = np.where(right, labels, (labels + 1) % classes)
    found[np.arange(len(labels)), answered] = by
    return found


def right_but(*wrong, count=20):
    return ~np.isin(np.arange(count), wrong)


@pytest.fixture
def run(write_run, tmp_path):
    """Writes a run into a folder of this name: wrong on the examples of these numbers."""

    def write(name, *wrong, assignments=(), **more):
        given = {"classes": CLASSES, "ids": IDS, "labels": LABELS, "logits": logits(right_but(*wrong)), **more}
        return write_run(tmp_path / name, change(*assignments), **given)

    return write


def compared(*folders, rule=None):
    found, left_out = runs.read(folders)
    assert not left_out
    return comparison.compare(found, rule)


# --- rows --------------------------------------------------------------------------------------------------


def test_runs_that_differ_by_their_seed_alone_are_one_row_with_mean_interval_and_range(run):
    folders = [run(f"run-seed{seed}", *range(seed), assignments=[f"train.seed={seed}"]) for seed in (2, 1, 3)]
    (row,) = compared(*folders).rows
    assert [found.seed for found in row.runs] == [1, 2, 3]
    accuracy = row.figures["accuracy"]
    assert accuracy.value == pytest.approx(0.9)  # of 0.95, 0.90, 0.85
    assert accuracy.spread == (0.85, 0.95)
    # Deviation 0.05, of the mean 0.05 / sqrt(3); t of 2 degrees of freedom is 4.303 (any table); no share is above 1.
    assert accuracy.interval.low == pytest.approx(0.9 - 4.303 * 0.05 / 3**0.5, abs=1e-4)
    assert accuracy.interval.high == 1.0


def test_settings_that_decide_nothing_about_the_result_make_no_other_row(run):
    first = run("first", assignments=["train.seed=1"])
    second = run("second", assignments=["train.seed=2", "plan.cache_budget_gb=1", "checkpoint.keep=5"])
    assert len(compared(first, second).rows) == 1


@pytest.mark.parametrize("changed", ["optim.learning_rate=1", "train.epochs=7", "data.train_size=9"])
def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(run, changed):
    assert len(compared(run("first"), run("second", assignments=["train.seed=2", changed])).rows) == 2


def test_the_same_seed_again_is_no_repetition(run):
    """Else an interval would be made of one value, twice."""
    found = compared(run("run"), run("again"), run("other", assignments=["train.seed=1"]))
    assert [len(row.runs) for row in found.rows] == [2, 1]


def test_runs_from_the_weights_of_runs_that_differ_by_their_seed_alone_do_too(run):
    sources = [run(f"pretrain{seed}", assignments=[f"train.seed={seed}"]) for seed in (0, 1)]
    another = run("another", assignments=["train.epochs=9"])
    tuned = [
        run(f"tune{number}", assignments=[f"train.seed={number}", f"model.weights={source}"])
        for number, source in enumerate((*sources, another))
    ]
    assert [row.name for row in compared(*tuned).rows] == ["tune0", "tune2"]


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(run):
    assert [row.name for row in compared(run("x/run"), run("y/run"), run("y/other")).rows] == [
        "x/run", "y/run", "y/other",
    ]  # fmt: skip


# --- intervals and tests -----------------------------------------------------------------------------------


def test_intervals_of_a_run_are_those_of_the_bootstrap(run):
    (row,) = compared(run("run", 3, 4, 5)).rows
    answers = Answers(LABELS, np.where(right_but(3, 4, 5), LABELS, 1 - LABELS), CLASSES)
    draws = statistics.bootstrap({"run": answers})["run"]
    for figure in ("accuracy", "f1_macro", "f1/b"):
        assert row.figures[figure].interval == statistics.percentile(draws[figure])
        assert row.figures[figure].interval.low < row.figures[figure].value < row.figures[figure].interval.high
    assert row.figures["loss"].interval.low < row.figures["loss"].value < row.figures["loss"].interval.high


def test_pairs_are_tested_on_the_examples_that_only_one_gets_right(run):
    found = compared(
        run("worse", *range(9), 19), run("better", 19, 18), run("same", 19, 18, logits=logits(right_but(19, 17)))
    )
    (pool,) = found.pools
    by_names = {(pair.first, pair.second): pair for pair in pool.pairs}
    assert by_names.keys() == {("better", "worse"), ("same", "worse"), ("better", "same")}  # the more accurate first
    pair = by_names["better", "worse"]
    assert pair.test[:2] == (9, 1)
    assert pair.test.p == pytest.approx(22 / 1024)  # 2 (C(10, 0) + C(10, 1)) / 2^10
    assert pair.difference.value == pytest.approx(0.4)
    assert 0 < pair.difference.interval.low < 0.4 < pair.difference.interval.high
    assert pair.adjusted == pytest.approx(3 * 22 / 1024)  # the two smallest of three are equal
    assert by_names["better", "same"].test == (1, 1, 1.0)


def test_order_of_examples_and_classes_does_not_matter(run):
    turned = np.random.default_rng(0).permutation(20)
    wrong = right_but(0, 1, 2)
    second = run(
        "second", classes=("b", "a"), ids=[IDS[row] for row in turned], labels=1 - LABELS[turned],
        logits=logits(wrong)[turned][:, ::-1], assignments=["train.epochs=2"],
    )  # fmt: skip
    found = compared(run("first", 0, 1, 2), second)
    (pool,) = found.pools
    assert pool.pairs[0].test == (0, 0, 1.0)
    assert [hard.id for hard in pool.hard] == ["test:0", "test:1", "test:2"]
    first, other = (row.figures for row in found.rows)
    for figure in ("accuracy", "loss", "f1/a", "f1_macro"):
        assert first[figure].value == pytest.approx(other[figure].value)
        np.testing.assert_allclose(first[figure].interval, other[figure].interval)


def test_one_output_of_two_classes_is_compared_with_two(run):
    one = np.array([[2.0 if label else -2.0] for label in LABELS])
    found = compared(run("one", logits=one), run("two", assignments=["train.epochs=2"]))
    assert found.pools[0].pairs[0].test == (0, 0, 1.0)


def others(kind):
    """What makes a run one on other examples."""
    labels = LABELS.copy()
    labels[0] = 1
    return {
        "other examples": {"ids": [f"validation:{number}" for number in range(20)]},
        "fewer": {"ids": IDS[:10], "labels": LABELS[:10], "logits": logits(right_but(count=10), LABELS[:10])},
        "other labels": {"labels": labels},
        "other classes": {"classes": ("a", "c")},
        "more classes": {"classes": ("a", "b", "c"), "logits": logits(right_but(), classes=3)},
        "another split": {"split": "held out"},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["other examples", "fewer", "other labels", "other classes", "more classes", "another split"]
)
def test_runs_judged_on_other_examples_are_shown_and_not_tested_and_it_is_said_why(run, kind):
    found = compared(run("first"), run("second", 4, assignments=["train.seed=1"], **others(kind)), rule="mean")
    assert [row.name for row in found.rows] == ["first", "second"]  # neither one row, nor an ensemble
    assert [pool.rows for pool in found.pools] == [("first",), ("second",)]
    assert not any(pool.pairs for pool in found.pools)
    assert len({pool.heading for pool in found.pools}) == 2
    assert "judged on other examples" in found.notes[0]
    assert "No ensemble of first, second" in found.notes[-1]


def test_masked_language_modelling_has_a_row_without_intervals(run):
    folder = run("mlm", held_out={"accuracy": 0.25, "loss": 2.0, "perplexity": 7.4}, classes=CLASSES, test=None)
    (folder / "predictions.npz").unlink()
    found = compared(folder, run("classifier"))
    assert found.rows[0].figures["perplexity"] == comparison.Figure(7.4)
    assert "no tests of mlm" in found.notes[0]
    assert comparison_report.render(found, folder)


# --- ensembles ---------------------------------------------------------------------------------------------


def test_ensemble_is_one_more_row_that_is_tested_too(run):
    # Each is wrong alone on two examples, and all are on the last.
    folders = [
        run(f"run{number}", 2 * number, 2 * number + 1, 19, assignments=[f"train.epochs={number + 1}"])
        for number in range(3)
    ]
    for rule in ("mean", "vote"):
        found = compared(*folders, rule=rule)
        row = found.rows[-1]
        assert row.name == f"ensemble: {rule} of 3"
        assert row.figures["accuracy"].value == 0.95
        assert row.figures["accuracy"].interval.low < 0.95
        assert row.figures["confusion/b/a"].value == 1
        assert ("loss" in row.figures) == (rule == "mean")  # shares of votes are no probabilities
        assert found.pools[0].runs == 3
        assert len(found.pools[0].pairs) == 6
    # (2/3 - 1/3 of 2) on the mean of the probabilities p and 1 - p: -log((2 p + 1 - p) / 3), and so on.
    p = 1 / (1 + np.exp(-2.0))
    expected = -(13 * np.log(p) + 6 * np.log((1 + p) / 3) + np.log(1 - p)) / 20
    assert compared(*folders, rule="mean").rows[-1].figures["loss"].value == pytest.approx(expected)


def test_ensembles_of_other_examples_are_rows_of_their_own(run):
    there = {"ids": [f"validation:{number}" for number in range(20)]}
    folders = [
        run(f"run{number}", number, assignments=[f"train.epochs={number + 1}"], **(there if number > 1 else {}))
        for number in range(4)
    ]
    found = compared(*folders, rule="mean")
    assert len({row.name for row in found.rows}) == 6
    assert [len(group.rows) for group in comparison_report.groups(found)] == [3, 3]


# --- hardest examples --------------------------------------------------------------------------------------


def test_hardest_examples_are_those_that_most_runs_get_wrong_with_what_each_said(run):
    texts = [f"text {number}, <b>" for number in range(20)]
    folders = [
        run("first", 3, 7, texts=texts),
        run("first-seed1", 3, 7, 8, assignments=["train.seed=1"], texts=texts),
        run("second", 7, assignments=["train.epochs=2"], texts=texts),
    ]
    (pool,) = compared(*folders).pools
    assert [(hard.id, hard.wrong) for hard in pool.hard] == [("test:7", 3), ("test:3", 2), ("test:8", 1)]
    assert pool.hard[1].text == "text 3, <b>"
    assert pool.hard[1].label == "b"
    (said, probability), (other, _) = pool.hard[1].answers
    assert (said, other) == ("a", "b")
    assert probability == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert pool.wrong == {0: 17, 1: 1, 2: 1, 3: 1}
    page = comparison_report.render(compared(*folders), folders[0])
    assert "17 (85.0%) of 20 examples are right in all 3 runs, 2 (10.0%) in some, 1 (5.0%) in none." in page


def test_hardest_images_are_shown_where_the_data_are_at_hand(write_run, tmp_path):
    digits = dataclasses.replace(BASE, data=config.Images(source="digits", train_size=40, eval_size=20))
    listing = sources.listings(digits.data)[-1]
    written = {"classes": listing.class_names, "labels": listing.labels}
    answers = logits(right_but(3, 7), listing.labels, 10)
    folder = write_run(tmp_path / "run", digits, ids=listing.ids, logits=answers, **written)
    hard = comparison.illustrated(compared(folder)).pools[0].hard
    assert {example.id for example in hard} == {listing.ids[3], listing.ids[7]}
    for example in hard:
        with Image.open(io.BytesIO(base64.b64decode(example.image.partition(",")[2]))) as image:
            place = listing.ids.index(example.id)
            np.testing.assert_array_equal(np.array(image)[..., 0], listing.items[place])
    page = comparison_report.render(comparison.illustrated(compared(folder)), tmp_path)
    assert page.count('<img class="small pixels" src="data:image/png;base64,') == 2

    other = write_run(tmp_path / "other", digits, ids=[f"gone:{id}" for id in listing.ids], logits=answers, **written)
    found = comparison.illustrated(compared(other))
    assert "without their images: there is no gone:" in found.notes[-1]
    assert [example.image for example in found.pools[0].hard] == ["", ""]


# --- folders -----------------------------------------------------------------------------------------------


def test_suites_are_gone_into_and_what_is_no_finished_run_is_left_out_and_named(run, tmp_path):
    run("suite/one")
    run("suite/two", assignments=["train.epochs=2"])
    run("suite/two.20260102-030405-678901")
    run("alone", assignments=["train.epochs=3"])
    (run("unfinished") / "result.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "compare.html").write_text("")
    names = ["suite", "alone", "unfinished", "empty", "compare.html", "nowhere", "alone/../alone"]
    found, left_out = runs.read([tmp_path / name for name in names])
    assert [run.name for run in found] == ["one", "two", "alone"]
    assert [line.removeprefix(f"{tmp_path}/") for line in left_out] == [
        "suite/two.20260102-030405-678901: moved aside by --overwrite; rename it to have it compared",
        "unfinished: not finished",
        "empty: no run",
        "compare.html: no run",
        "nowhere: there is no such folder",
    ]


def test_no_run_left_is_an_error_that_says_what_was_left_out(run, tmp_path):
    (run("unfinished") / "result.json").unlink()
    with pytest.raises(UserError, match=r"no finished run to compare: .*unfinished: not finished"):
        runs.read([tmp_path / "unfinished"])


def test_long_text_does_not_hide_the_others(write_run, tmp_path):
    experiment = config.Experiment(config.Model("minilm_l6"), config.Text())
    texts = ["short", "long " * 30_000]
    folder = write_run(tmp_path / "a", experiment, ("no", "yes"), ("1", "2"), (0, 1), [[0.0], [1.0]], texts)
    limit = csv.field_size_limit(131_072)  # as in a process that has read no file of texts
    try:
        (found,), _ = runs.read([folder])
    finally:
        csv.field_size_limit(limit)
    assert found.texts == dict(zip("12", texts, strict=True))


DAMAGE = {
    "result.json": ["", "[]", "{}", '{"accuracy": 1}'],
    "experiment.json": ["{", "{}"],
    "metrics.jsonl": ["nothing\n", "[1]\n"],
    "predictions.npz": ["PK"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, found in DAMAGE.items() for content in found])
def test_damaged_run_is_left_out_and_named(run, name, content):
    damaged = run("damaged")
    (damaged / name).write_text(content)
    found, left_out = runs.read([damaged, run("sound")])
    assert [run.name for run in found] == ["sound"]
    (line,) = left_out
    assert str(damaged / name) in line
    assert "\n" not in line


@pytest.mark.parametrize("changed", [{"classes": "ab"}, {"classes": [1, 2]}, {"held_out": 3, "test": None}])
def test_result_of_another_kind_is_left_out(run, changed):
    odd = run("odd")
    (odd / "result.json").write_text(json.dumps({**json.loads((odd / "result.json").read_text()), **changed}))
    found, left_out = runs.read([odd, run("sound")])
    assert [run.name for run in found] == ["sound"]
    assert "result.json is damaged" in left_out[0]


def test_a_run_whose_weights_are_itself_can_be_compared(run, tmp_path):
    assert len(compared(run("run", assignments=[f"model.weights={tmp_path / 'run'}"])).rows) == 1


# --- what is shown -----------------------------------------------------------------------------------------


def test_figures_stand_beside_those_reported(run):
    found = compared(run("run", 3, 4, 5))  # 0.85
    rows = [[cell.text for cell in row] for row in comparison_report.beside_reported(found).rows]
    # Class b loses two of ten and gains one: 2 * 8 / (10 + 9).
    assert rows == [
        ["run", "accuracy", "0.8500", "0.7500", "+0.1000", "yes"],
        ["run", "f1 of b", "0.8421", "0.5000", "+0.3421", "no"],
    ]


def test_figure_that_is_reported_and_not_ours_is_shown(write_run, tmp_path):
    reported = dataclasses.replace(BASE, reported=(("f1/nobody", 0.5), ("confusion/a/b", 7)))
    folder = write_run(tmp_path / "run", reported, CLASSES, IDS, LABELS, logits(right_but()))
    rows = [[cell.text for cell in row] for row in comparison_report.beside_reported(compared(folder)).rows]
    assert rows == [["run", "f1 of nobody", "", "0.5000", "", ""]]  # matrices are drawn


def test_costs_of_several_seeds_have_a_range(run):
    folders = [
        run(f"run{seed}", assignments=[f"train.seed={seed}"], seconds_per_epoch=2.0 + seed, peak_memory_bytes=3e9)
        for seed in (0, 1)
    ]
    table = comparison_report.costs(compared(*folders))
    cells = dict(zip((heading for heading, _ in table.columns), table.rows[0], strict=True))
    assert (cells["seconds an epoch"].text, cells["seconds an epoch"].small) == ("2.50", ("2.00 to 3.00",))
    assert cells["examples a second"].small == ("33.3 to 50.0",)  # 100 in 2 or 3 seconds
    assert (cells["peak memory, GB"].text, cells["peak memory, GB"].small) == ("3.00", ())
    assert cells["trained parameters"].text == "1,000"
    assert cells["of"].text == "10,000"


HOSTILE = '<script>alert("x")</script>'


def test_names_classes_and_texts_are_shown_and_not_run(run):
    risky = {"classes": ("a", HOSTILE), "texts": [HOSTILE] * 20, "ids": [f"{HOSTILE}:{number}" for number in range(20)]}
    folder = run(HOSTILE.replace("/", ""), 1, **risky, device=HOSTILE, train_loss=HOSTILE)
    other = run("other", 2, assignments=["train.epochs=2"], **risky)
    page = comparison_report.render(compared(folder, other), folder.parent)
    assert page.count("<script>") == 1
    assert "<script>alert" not in page
    assert "alert(" in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)


def test_runs_lead_to_their_reports(run, tmp_path):
    folder = run("with space#")
    (folder / "report" / "index.html").write_text("")
    page = comparison_report.render(compared(folder, run("without")), tmp_path / "elsewhere")
    assert 'href="../with%20space%23/report/index.html"' in page
    assert "without/report" not in page


def test_many_classes_and_rows_are_no_trouble(run, tmp_path):
    count = 60
    names, labels = [f"class {number}" for number in range(count)], np.arange(2 * count) % count
    more = {"classes": names, "labels": labels, "ids": [f"test:{number}" for number in range(2 * count)]}
    answers = logits(right_but(1, 5, count=2 * count), labels, count)
    folders = [
        run(f"run{number}", assignments=[f"train.epochs={number + 1}"], logits=answers, **more) for number in range(9)
    ]
    page = comparison_report.render(compared(*folders), tmp_path)
    assert "F1 of each class" in page
    assert "Confusion matrix" not in page  # of so many classes, for so many runs


def test_a_single_run_can_be_looked_at(run, capsys):
    found = compared(run("run", 3))
    comparison_report.show(found)
    assert "0.9500" in capsys.readouterr().out
    assert "nothing to test" in comparison_report.render(found, run("x").parent)


def test_row_of_a_suite_member_keeps_its_name(run):
    folders = [run("member", assignments=["train.seed=7"]), run("member-seed8", assignments=["train.seed=8"])]
    assert compared(*folders[::-1]).rows[0].name == "member"


def test_experiments_of_another_kind_stand_beside_each_other(write_run, run, tmp_path):
    text = dataclasses.replace(BASE, data=config.Text())
    folder = write_run(
        tmp_path / "text", text, CLASSES, [f"t:{number}" for number in range(20)], LABELS, logits(right_but(0))
    )
    assert len(compared(run("images"), folder).rows) == 2


# --- in a real browser -------------------------------------------------------------------------------------


def cells(browser, section, number):
    found = browser.find_elements("css selector", f"#{section} tbody tr > :nth-child({number})")
    return [cell.text.splitlines()[0] for cell in found if cell.is_displayed()]


@pytest.mark.slow
def test_page_works_and_is_accessible_in_a_browser(run, browser, open_page, tmp_path):
    from axe_core_python.selenium import Axe

    texts = [f"{'penguin' if number == 3 else 'parrot'} {HOSTILE}" for number in range(20)]
    folders = [
        run("first", 3, 7, texts=texts),
        run("first-seed1", 3, 7, 8, assignments=["train.seed=1"], texts=texts),
        run("a_run_with_a_name_that_is_rather_long", 7, assignments=["train.epochs=2"], texts=texts),
    ]
    path = tmp_path / "compare.html"
    path.write_text(comparison_report.render(compared(*folders, rule="mean"), tmp_path), encoding="utf-8")
    for width, scheme in ((1200, "light"), (360, "dark")):
        open_page(path, width, scheme)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        found = Axe().run(browser)
        assert len(found["passes"]) > 20
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found["violations"]] == []
    open_page(path)
    heading = next(each for each in browser.find_elements("css selector", "#costs th") if "run" in each.text)
    heading.find_element("tag name", "button").click()
    assert cells(browser, "costs", 1) == ["a_run_with_a_name_that_is_rather_long", "first"]
    assert cells(browser, "hardest", 3) == ["3 of 3", "2 of 3", "1 of 3"]
    browser.find_element("css selector", "#hardest [data-search]").send_keys("Penguin")
    assert cells(browser, "hardest", 3) == ["2 of 3"]
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.get_log("browser") == []
