"""The command that compares runs: what it prints and writes, and one line for each mistake."""

import numpy as np
import pytest

from jaxtl import compare, config

BASE = config.Experiment(config.Model("vit_nano_patch2_8"), config.Images(), reported=(("accuracy", 0.75),))
LABELS = np.arange(40) % 2


@pytest.fixture
def folders(write_run, tmp_path, monkeypatch):
    """A suite of two runs and a run of its own, all on the same examples, and an unfinished one."""
    monkeypatch.chdir(tmp_path)
    ids = [f"test:{number}" for number in range(40)]
    for number, name in enumerate(("suite/first", "suite/second", "third", "unfinished")):
        right = np.arange(40) % 5 != number
        logits = np.where(right == LABELS, 1.0, -1.0)[:, None]
        experiment = config.override(BASE, [f"train.epochs={number + 1}"])
        write_run(tmp_path / "runs" / name, experiment, ("a", "b"), ids, LABELS, logits)
    (tmp_path / "runs" / "unfinished" / "result.json").unlink()
    return sorted((tmp_path / "runs").iterdir())


def test_runs_are_compared_on_the_terminal_and_in_a_page(command, folders, comparisons, tmp_path):
    status, out, err = command(compare, *folders, "--ensemble=vote")
    assert status == 0
    assert err.splitlines() == [f"left out: {tmp_path / 'runs' / 'unfinished'}: not finished"]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines()]
    assert [row[0] for row in rows if row[1:2] == ["0.8000"]] == ["first", "second", "third"]
    assert ["ensemble: vote of 3", "1.0000"] in [row[:2] for row in rows]  # each is wrong alone
    assert ["first", "accuracy", "0.8000", "0.7500", "+0.0500", "yes"] in rows
    assert ["first", "second", "0.0000", "8", "8", "1.0000", "1.0000"] in rows
    assert ["first", "1,000", "10,000"] in [row[:3] for row in rows]
    assert out.splitlines()[-1] == "compare.html"
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "ensemble: vote of 3" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the folders of finished runs"),
        (["nowhere"], "no finished run to compare: nowhere: there is no such folder"),
        (["runs/unfinished"], "runs/unfinished: not finished"),
        (["runs/third", "--output=nowhere/x.html"], "--output=nowhere/x.html: there is no folder nowhere"),
    ],
)
def test_mistake_is_one_line_and_status_2(command, folders, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = command(compare, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
