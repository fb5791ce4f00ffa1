"""Whole runs on texts, with a tiny BERT: what they learn, write, keep and hand on."""

import csv
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from jaxtl import config, main
from jaxtl.data import records, sources, tokens
from jaxtl.errors import UserError
from jaxtl.training import freeze, loop, revisit, suite
from jaxtl.training.network import TOKENIZER, initial_params, load_run, run_params
from jaxtl.training.setup import look, preview

BIGRU = ("model.head.kind=bigru", "model.head.reads=sequence", "model.head.hidden=16", "optim.learning_rate=1e-2")
FROZEN = "freeze=train_head_only()"
MLM = ("model.head.kind=mlm", "model.head.reads=masked", "data.label_column=")
SHORT = "train.max_steps=2"


@pytest.fixture(scope="module")
def base(bert_folder, text_folder):
    return config.Experiment(
        model=config.Model("from_weights", str(bert_folder), head=config.Head("fc", "cls", dropout=0.1)),
        data=config.Text(
            dir=str(text_folder), train=("train.csv",), validation="val.csv", test="test.csv", max_length=40, buckets=1
        ),
        optim=config.Optim("adamw", learning_rate=3e-3),
        train=config.Train(epochs=4, batch_size=16, eval_batch_size=32),
    )


def change(experiment, *assignments):
    return config.override(experiment, assignments)


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "eval"]


@pytest.fixture(scope="module")
def bigru(base, tmp_path_factory):
    """A GRU on a frozen backbone, whose activations are cached; its best evaluation is not its last."""
    folder = tmp_path_factory.mktemp("bigru") / "run"
    experiment = change(base, *BIGRU, FROZEN, "train.epochs=10", "train.select=best")
    calls, caches = [], []
    with pytest.MonkeyPatch.context() as patch:
        make, run_prefix = loop.evaluator, loop.cache.run_prefix

        def counted(*arguments):
            evaluate = make(*arguments)

            def call(params, examples):
                calls.append((len(examples.labels), {path: np.array(value) for path, value in params.items()}))
                return evaluate(params, examples)

            return call

        def kept(*arguments):
            found = run_prefix(*arguments)
            caches.extend(found.splits)
            return found

        patch.setattr(loop, "evaluator", counted)
        patch.setattr(loop.cache, "run_prefix", kept)
        result = loop.train(experiment, folder)
    return {"folder": folder, "experiment": experiment, "result": result, "calls": calls, "caches": caches}


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """Everything learns, through a dense layer on [CLS]."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return folder, loop.train(base, folder)


@pytest.fixture(scope="module")
def pretrained(base, text_folder, tmp_path_factory):
    """Masked language modelling, goes on from the same backbone, on lines of text."""
    folder = tmp_path_factory.mktemp("mlm") / "run"
    own = ("data.train=lines.txt", "data.validation=", "data.test=", "train.epochs=3", "data.eval_fraction=0.25")
    experiment = change(base, *MLM, *own)
    return folder, experiment, loop.train(experiment, folder)


# --- learning --------------------------------------------------------------------------------------------


def test_a_dense_layer_and_a_gru_learn_a_rule_that_only_the_words_tell(tuned, bigru):
    """62 test texts, half of each class: 0.85 is 5.5 standard errors above chance; both reach 0.95 or more."""
    assert (tuned[1]["cache"], tuned[1]["cache_bytes"]) == (None, 0)
    for result in (tuned[1], bigru["result"]):
        assert result["test_examples"] == 62
        assert result["test"]["accuracy"] > 0.85
        assert result["test"]["roc_auc"] > 0.9


def test_result_has_class_names_figures_by_class_and_sizes(tuned, read_json):
    folder, result = tuned
    assert read_json(folder / "result.json") == result
    assert result["classes"] == ["fake", "real"]
    assert (result["train_examples"], result["eval_examples"], result["test_examples"]) == (240, 60, 62)
    assert result["steps"] == 4 * 15  # 240 texts in batches of 16
    for split in ("held_out", "test"):
        assert result[split]["f1"].keys() == {"fake", "real"}
        assert sum(sum(row.values()) for row in result[split]["confusion"].values()) in (60, 62)
    assert result["accuracy"] == result["held_out"]["accuracy"]
    width, depth, mlp, vocabulary, positions = 32, 2, 64, result_vocabulary(folder), 48
    layer = 4 * (width**2 + width) + 2 * width * mlp + width + mlp + 4 * width
    backbone = (vocabulary + positions + 2 + 2) * width + depth * layer
    assert result["trainable_parameters"] == result["total_parameters"] == backbone + width + 1  # one node


def result_vocabulary(folder):
    return len(tokens.load_tokenizer(folder / TOKENIZER))


def test_same_seed_repeats_bit_for_bit_and_another_seed_does_not(base, tmp_path):
    own = ("plan.cache=on", "data.test=", "data.train_size=64", "train.epochs=1", "train.log_every=1")
    short = change(base, *BIGRU, FROZEN, *own)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        loop.train(change(short, f"train.seed={seed}"), tmp_path / name)
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "abc"
    }
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]
    first, second, other = (load_run(tmp_path / name).trained for name in "abc")
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], path)
    assert any(not np.array_equal(value, other[path]) for path, value in first.items())


def test_three_classes_have_a_node_each_and_labels_may_be_any_strings(base, text_folder, tmp_path, capsys):
    rows = list(csv.reader((text_folder / "three.csv").open(newline="")))[1:]
    names = {"fake": "[/b]", "joke": "2", "real": "ünïcode label"}
    with (tmp_path / "three.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((string, names[label]) for string, label in rows)])
    experiment = change(
        base, f"data.dir={tmp_path}", "data.train=three.csv", "data.validation=", "data.test=", FROZEN, SHORT
    )
    result = loop.train(experiment, tmp_path / "run")
    assert result["classes"] == ["2", "[/b]", "ünïcode label"]  # in alphabetical order
    assert result["trainable_parameters"] == 3 * (32 + 1)
    assert result["test"] is None
    # 180 texts: a fifth, 12 of each class, is held out.
    assert (result["train_examples"], result["eval_examples"]) == (144, 36)
    assert [sum(row.values()) for row in result["held_out"]["confusion"].values()] == [12, 12, 12]
    from jaxtl.training import explain

    explain.explain(experiment, tmp_path / "run")
    assert "3 classes: 2 48, [/b] 48, ünïcode label 48" in capsys.readouterr().out


def test_validation_texts_are_split_off_by_a_seed_of_their_own_and_subsets_are_drawn_by_class(base, text_folder):
    alone = change(base, "data.validation=", "data.test=", "data.eval_fraction=0.25", "data.train_size=50")
    train, held_out = sources.listings(alone.data)
    assert (len(train.ids), len(held_out.ids)) == (50, 60)
    assert np.bincount(train.labels).tolist() == [25, 25]
    assert np.bincount(held_out.labels).tolist() == [30, 30]
    assert not set(train.ids) & set(held_out.ids)
    again = sources.listings(change(alone, "train.seed=7").data)
    assert [split.ids for split in again] == [train.ids, held_out.ids]
    other = sources.listings(change(alone, "data.subset_seed=7").data)
    assert other[1].ids != held_out.ids
    # Drawn or not, an id names the record it came from.
    known = {f"train.csv:{number}": string for number, string, _ in records.read(text_folder / "train.csv", "text")}
    assert [known[name] for name in held_out.ids] == list(held_out.texts)


# --- what is computed once -------------------------------------------------------------------------------


def test_of_a_text_the_cache_keeps_one_vector_for_cls_and_its_own_tokens_for_a_gru(base, bigru, monkeypatch, tmp_path):
    assert bigru["result"]["seconds_cache"] > 0
    train, held_out, test = bigru["caches"]
    this, splits = look(bigru["experiment"], lambda _: this_weights(base))
    for split, cached in zip(splits, (train, held_out, test), strict=True):
        assert cached.inputs.values.shape == (split.inputs.lengths.sum(), 32)  # no padding
        np.testing.assert_array_equal(cached.inputs.offsets, split.inputs.offsets)
        assert cached.texts == split.texts
    assert this.plan.cache_bytes == sum(cached.inputs.values.nbytes for cached in (train, held_out, test))


def this_weights(experiment):
    from pathlib import Path

    return Path(experiment.model.weights)


@pytest.mark.parametrize(("head", "buckets"), [((), "data.buckets=2"), (BIGRU, "data.buckets=1")], ids=["cls", "bigru"])
def test_cache_changes_nothing_but_rounding(base, tmp_path, monkeypatch, head, buckets):
    """Nor the order: vectors are put into batches as the texts were.

    Float32 either way: the two programs fuse differently, so activations may differ in their last bits.

    Eight steps of Adam, each normalising its gradient, carry that on: 1e-4 is a hundredth of one step's length
    (1e-2; a thirtieth of 3e-3).
    """
    caches = []
    run_prefix = loop.cache.run_prefix

    def kept(*arguments):
        found = run_prefix(*arguments)
        caches.extend(found.splits)
        return found

    monkeypatch.setattr(loop.cache, "run_prefix", kept)
    experiment = change(base, *head, FROZEN, "data.test=", "data.train_size=64", "train.epochs=2", buckets)
    results = {
        cache: loop.train(change(experiment, f"plan.cache={cache}"), tmp_path / cache) for cache in ("on", "off")
    }
    assert [len(cached.labels) for cached in caches] == [64, 60]  # the run without fills none
    if not head:
        assert caches[0].inputs.shape == (64, 32)
    assert results["on"]["loss"] == pytest.approx(results["off"]["loss"], rel=1e-4)
    trained = {cache: load_run(tmp_path / cache).trained for cache in results}
    for path, value in trained["on"].items():
        np.testing.assert_allclose(value, trained["off"][path], atol=1e-4, err_msg=path)


def test_nothing_is_compiled_once_the_first_step_has_been_sent(base, tmp_path, monkeypatch):
    """Texts come in two lengths and a third for longer test texts; the test is evaluated with what held-out was."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    counts = []

    def counted(function):
        def call(*arguments):
            before = len(compiled)
            result = function(*arguments)
            counts.append(len(compiled) - before)
            return result

        return call

    make = loop.evaluator
    monkeypatch.setattr(loop._Loop, "_run_steps", counted(loop._Loop._run_steps))
    monkeypatch.setattr(loop, "evaluator", lambda *arguments: counted(make(*arguments)))
    experiment = change(base, FROZEN, "plan.cache=off", "data.buckets=2", "train.epochs=2")
    loop.train(experiment, tmp_path / "run")
    assert compiled  # the listener hears
    assert counts == [0, 0, 0, 0, 0]  # steps and evaluation, twice; test


# --- which parameters are kept ---------------------------------------------------------------------------


def test_best_keeps_the_parameters_of_the_best_evaluation_and_looks_at_the_test_once(bigru, monkeypatch):
    lines, result = evaluations(bigru["folder"]), bigru["result"]
    best = max(lines, key=lambda line: (line["accuracy"], -line["loss"]))
    assert best["step"] != lines[-1]["step"], "the fixture is to overfit"
    assert (result["selected_step"], result["selected_epoch"]) == (best["step"], best["epoch"])
    assert (result["accuracy"], result["loss"]) == (best["accuracy"], best["loss"])
    # Ten evaluations of the 60 held-out texts, then one of the 62 test texts, with the parameters of the best.
    assert [count for count, _ in bigru["calls"]] == [60] * 10 + [62]
    saved, tested, chosen = (
        load_run(bigru["folder"]).trained,
        bigru["calls"][-1][1],
        bigru["calls"][lines.index(best)],
    )
    for path, value in saved.items():
        np.testing.assert_array_equal(value, tested[path], path)
        np.testing.assert_array_equal(value, chosen[1][path], path)


def test_last_keeps_the_last_parameters_though_others_were_better(bigru, tmp_path):
    result = loop.train(change(bigru["experiment"], "train.select=last"), tmp_path / "run")
    lines = evaluations(tmp_path / "run")
    # The same training, but for what is kept of it.
    assert [line["loss"] for line in lines] == [line["loss"] for line in evaluations(bigru["folder"])]
    assert (result["selected_step"], result["loss"]) == (150, lines[-1]["loss"])
    saved, last = load_run(tmp_path / "run").trained, bigru["calls"][9][1]
    for path, value in saved.items():
        np.testing.assert_array_equal(value, last[path], path)


def test_answers_are_listed_whole_the_most_confident_errors_first(base, text_folder, tmp_path):
    """After four steps from a random layer about half is wrong; the judged split is the test."""
    own = ("model.head.init=random", "plan.cache=on", "data.train_size=64", "train.epochs=1")
    result = loop.train(change(base, *BIGRU, FROZEN, *own), tmp_path / "run")
    with (tmp_path / "run" / "report" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        header, *answers = csv.reader(file)
    assert header == ["id", "text", "label", "prediction", "probability"]
    confusion = result["test"]["confusion"]
    wrong = confusion["fake"]["real"] + confusion["real"]["fake"]
    assert len(answers) == result["test_examples"] > wrong > 10
    rows, right = answers[:wrong], answers[wrong:]
    assert all(label == prediction for *_, label, prediction, _ in right)
    known = {
        f"test.csv:{number}": (string, label)
        for number, string, label in records.read(text_folder / "test.csv", "text", "label")
    }
    for name, string, label, prediction, _ in rows:
        assert known[name] == (string, label)
        assert {label, prediction} == {"fake", "real"}
    assert any("\n" in row[1] for row in rows)
    assert any("😷" in row[1] for row in rows)
    for part in (rows, right):
        confidence = [float(row[-1]) for row in part]
        assert confidence == sorted(confidence, reverse=True)
    assert confidence[0] > confidence[-1]
    assert min(confidence) >= 0.5


# --- a run as weights ------------------------------------------------------------------------------------


def test_a_runs_backbone_and_tokenizer_serve_another_run(base, tuned, tmp_path, capsys):
    """The tokenizer is the run's own copy: the first one's folder need not have it any more."""
    folder, _ = tuned
    experiment = change(base, f"model.weights={folder}", "model.head.reads=pooled", FROZEN, SHORT)
    loop.train(experiment, tmp_path / "second")
    assert f"{folder} holds no pooler: it starts from random values" in capsys.readouterr().err
    run, trained = load_run(tmp_path / "second"), load_run(folder).trained
    _, params = run_params(run)
    backbone = [path for path in trained if not path.startswith("head/")]
    assert len(backbone) > 30
    for path in backbone:
        np.testing.assert_array_equal(params[path], trained[path], path)
    for saved in (folder, tmp_path / "second"):
        assert result_vocabulary(saved) == result_vocabulary(folder)
        ours, theirs = (
            tokens.tokenise(["garlic penguins 🧄\n😷!"], tokens.load_tokenizer(path), 40).values.tolist()
            for path in (saved / TOKENIZER, this_weights(base))
        )
        assert ours == theirs


def test_a_run_can_be_named_as_the_tokenizer(base, tuned):
    experiment = change(base, "model.preset=bert_nano", "model.weights=random", f"data.tokenizer={tuned[0]}")
    this, _ = preview(experiment, download=False)
    assert len(this.tokenizer) == result_vocabulary(tuned[0])


def test_random_weights_are_not_looked_for_on_the_hub(base, monkeypatch):
    from jaxtl.weights import hub

    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match="random weights have no tokenizer beside them"):
        preview(change(base, "model.weights=random"), download=False)


# --- masked language modelling ---------------------------------------------------------------------------


def test_masked_language_modelling_learns_and_says_what_was_before(pretrained):
    folder, _, result = pretrained
    assert result["loss"] < result["before"]["loss"] - 0.2
    for found in (result["held_out"], result["before"]):
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    # Before training, the random head knows nothing: about as likely each piece, of the vocabulary.
    assert result["before"]["loss"] == pytest.approx(math.log(result_vocabulary(folder)), rel=0.1)
    assert result["classes"] == []
    assert (result["train_examples"], result["eval_examples"]) == (180, 60)
    first = evaluations(folder)[0]
    assert (first["step"], first["perplexity"]) == (0, result["before"]["perplexity"])
    assert not (folder / "predictions.npz").exists()
    assert not (folder / "report" / "predictions.csv").exists()


def test_a_checkpoint_without_the_head_of_masked_language_modelling_says_so(base, pretrained, capsys):
    _, experiment, _ = pretrained
    this, _ = look(experiment, lambda _: this_weights(base))
    initial_params(this.net, experiment.model, this.weights, 0)
    assert f"{experiment.model.weights} holds no mlm: it starts from random values" in capsys.readouterr().err


@pytest.mark.parametrize("head", [(), BIGRU], ids=["cls", "bigru"])
def test_what_masked_language_modelling_trained_is_where_a_classifier_starts(base, pretrained, head):
    folder, _, _ = pretrained
    experiment = change(base, *head, f"model.weights={folder}")
    this, _ = look(experiment, lambda _: folder)
    start, trained = initial_params(this.net, experiment.model, folder, 0), load_run(folder).trained
    backbone = [path for path in start if not path.startswith("head/")]
    assert {path for path in trained if not path.startswith("mlm/")} == set(backbone)
    for path in backbone:
        np.testing.assert_array_equal(start[path], trained[path], path)


def test_masked_language_modelling_reads_a_labelled_file_without_its_labels(base, tmp_path):
    result = loop.train(change(base, *MLM, SHORT), tmp_path / "run")
    assert result["classes"] == []
    assert result["test"].keys() == {"accuracy", "loss", "perplexity"}
    assert result["test_examples"] == 62


def test_evaluation_hides_the_same_pieces_every_time_and_training_others(base, pretrained):
    """So that two runs, or epochs, can be compared."""
    folder, _, result = pretrained
    figures = [revisit.evaluate(folder, ())[0] for _ in range(2)]
    assert figures[0] == figures[1]
    assert figures[0]["loss"] == pytest.approx(result["loss"], rel=1e-5)
    this, splits = look(change(base, *MLM), lambda _: this_weights(base))
    batch = next(iter(loop.loader.batches(splits[0], 8, seed=0, lengths=this.lengths)))
    prepare = jax.jit(loop.preparation(this))
    first, second = (np.asarray(prepare(batch, key)["input"].values) for key in jax.random.split(jax.random.key(0)))
    assert not np.array_equal(first, second)


def test_a_tokenizer_without_a_mask_cannot_hide(base, bert_writer, tmp_path):
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    bert_writer(tmp_path / "maskless", **special)
    with pytest.raises(UserError, match="maskless has no mask token"):
        loop.train(change(base, *MLM, f"data.tokenizer={tmp_path / 'maskless'}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_without_labels_train_no_classifier(base, tmp_path):
    with pytest.raises(UserError, match=r"a head of kind fc learns labels, and data\.label_column is empty"):
        loop.train(change(base, "data.label_column="), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- a finished run on other examples --------------------------------------------------------------------


def test_evaluation_of_the_same_file_gives_the_figures_of_the_result(
    tuned, base, text_folder, command, tmp_path, monkeypatch, read_json
):
    """One length for all texts: the program is the same, and so is every bit."""
    folder, result = tuned
    monkeypatch.chdir(text_folder)  # a file is looked for where one is
    for name, split in (("test", "test"), ("val", "held_out")):
        status, shown, told = command(
            main, f"--experiment={folder / 'experiment.json'}", "--mode=eval", f"--set=data.test={name}.csv"
        )
        assert (status, shown.splitlines()[-1]) == (0, str(folder / "evaluations" / f"{name}.json")), told
        found = read_json(folder / "evaluations" / f"{name}.json")
        assert {figure: found[figure] for figure in result[split]} == result[split]
        assert f"{result[split]['accuracy']:.4f}" in shown
        with (folder / "evaluations" / f"{name}.predictions.csv").open(encoding="utf-8", newline="") as file:
            _, *answers = csv.reader(file)
        wrong = sum(label != prediction for *_, label, prediction, _ in answers)
        assert wrong == found["confusion"]["fake"]["real"] + found["confusion"]["real"]["fake"]
    assert read_json(folder / "result.json") == result


def test_selected_parameters_of_a_cached_run_give_its_held_out_figures_again(bigru, text_folder):
    """The batches have other lengths, and the backbone is not run apart: the last bits may differ."""
    found, name, _ = revisit.evaluate(bigru["folder"], [f"data.test={text_folder / 'val.csv'}"])
    assert name == "val"
    assert found["confusion"] == bigru["result"]["held_out"]["confusion"]
    assert found["loss"] == pytest.approx(bigru["result"]["loss"], rel=1e-4)


def test_evaluation_refuses_another_model_a_label_never_seen_and_a_run_that_is_none(
    tuned, bigru, text_folder, command, tmp_path, monkeypatch
):
    folder, _ = tuned
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "experiment.json").write_text((folder / "experiment.json").read_text())
    (tmp_path / "labels.csv").write_text("text,label\na mask,real\ngarlic,faek\n")
    three = text_folder / "three.csv"
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in (folder / "evaluations").glob("*")} if (folder / "evaluations").exists() else set()
    mistakes = {
        ("--set=model.head.hidden=7",): "takes the model as it is: model.head.hidden cannot be set",
        ("--set=train.seed=3", "--set=optim.learning_rate=1"): "optim.learning_rate, train.seed cannot be set",
        ("--set=data.tokenizer=elsewhere",): "data.tokenizer cannot be set",
        ("--set=data.test=labels.csv",): "labels.csv:2 has the label 'faek', which no training text has (did you mean",
        (f"--set=data.test={three}",): "has the label 'joke', which no training text has",
        ("--set=data.test=nowhere.csv",): "data.test: there is no file nowhere.csv",
        ("--set=data.test=",): "data.test: there is no file",
        ("--set=data.max_length=49",): "longer than this backbone's 48 positions",
        ("--set=data.classes=real,fake",): "data.classes cannot be set",
        ("--workdir=unfinished",): "has not finished; run it first",
        ("--workdir=nowhere",): "nowhere holds no run",
        (f"--workdir={text_folder}",): "holds no run",
    }
    for arguments, message in mistakes.items():
        where = () if "--workdir" in arguments[0] else (f"--workdir={folder}",)
        status, shown, told = command(main, "--experiment=text_csv", "--mode=eval", *where, *arguments)
        (line,) = [line for line in told.splitlines() if not line.startswith("NOTE")]
        assert (status, shown) == (2, ""), arguments
        assert line.startswith("jaxtl: error: ")
        assert message in line
    after = {path.name for path in (folder / "evaluations").glob("*")} if (folder / "evaluations").exists() else set()
    assert after == before


def test_evaluations_of_files_of_one_name_lie_beside_each_other(tuned, text_folder, tmp_path, read_json):
    folder, _ = tuned
    written = []
    for name in ("a", "b", "a"):
        path = tmp_path / name / "same.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_text((text_folder / ("val.csv" if name == "a" else "test.csv")).read_text())
        written.append(revisit.evaluate(folder, [f"data.test={path}"])[2])
    assert [path.name for path in written] == ["same.json", "same-2.json", "same.json"]
    assert [read_json(path)["examples"] for path in written] == [60, 62, 60]
    assert written[1].with_name("same-2.predictions.csv").is_file()


def test_evaluation_needs_no_room_for_a_cache(base, tmp_path, text_folder):
    """A run whose cache just fitted is evaluated on any number of texts."""
    budget = (64 + 60) * 32 * 4 / 1e9
    experiment = change(
        base, FROZEN, SHORT, "plan.cache=on", f"plan.cache_budget_gb={budget}", "data.train_size=64", "data.test="
    )
    loop.train(experiment, tmp_path / "run")
    found, _, _ = revisit.evaluate(tmp_path / "run", [f"data.test={text_folder / 'train.csv'}"])
    assert sum(sum(row.values()) for row in found["confusion"].values()) == 240


def test_evaluation_without_a_file_stays_in_the_runs_folder_whatever_the_files_are_called(base, text_folder, tmp_path):
    """Two files of one name: their ids are whole paths."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.v1.csv").write_bytes((text_folder / ("train.csv", "val.csv")[name == "b"]).read_bytes())
    paths = ",".join(str(tmp_path / name / "t.v1.csv") for name in "ab")
    experiment = change(base, FROZEN, SHORT, f"data.train={paths}", "data.validation=", "data.test=")
    loop.train(experiment, tmp_path / "run")
    _, name, path = revisit.evaluate(tmp_path / "run", ())
    assert (name, path) == ("held_out", tmp_path / "run" / "evaluations" / "held_out.json")


# --- a suite ---------------------------------------------------------------------------------------------


def test_a_classifier_in_a_suite_starts_from_masked_language_modelling_before_it(base, text_folder, tmp_path, capsys):
    """And is described before anything has run, though it says `from_weights`."""
    from jaxtl.training import explain

    first = change(base, *MLM, SHORT, "data.test=")
    second = change(base, SHORT, FROZEN, "model.weights=suite:mlm", "data.test=")
    chosen = config.Suite((("mlm", first), ("tune", second)))
    explain.explain(chosen, tmp_path / "suite")
    shown = capsys.readouterr().out
    assert f"weights {tmp_path / 'suite' / 'mlm'}" in shown
    assert "40 word pieces long, 15% hidden" in shown
    assert "stages up to features" in shown
    assert not (tmp_path / "suite").exists()
    suite.run(chosen, tmp_path / "suite")
    assert "perplexity" in capsys.readouterr().out
    _, params = run_params(load_run(tmp_path / "suite" / "tune"))
    for path, value in load_run(tmp_path / "suite" / "mlm").trained.items():
        if not path.startswith("mlm/"):
            np.testing.assert_array_equal(params[path], value, path)


def test_mistake_in_the_last_member_is_found_before_the_first_is_trained(base, tmp_path):
    first = change(
        base, *MLM, SHORT, "model.preset=bert_nano", "model.weights=random", f"data.tokenizer={base.model.weights}"
    )
    second = change(base, "model.weights=suite:mlm")
    wrong = dataclasses.replace(second, freeze=freeze.train_from("layer_3"))  # the nano has two
    described = suite.as_describable(suite.resolve(config.Suite((("mlm", first), ("tune", second))), tmp_path))
    this, _ = preview(described["tune"], download=False)
    # The nano's, though it says from_weights; and the tokenizer that the first member alone names.
    assert this.net.config.width == 64
    assert len(this.tokenizer) < 100
    with pytest.raises(UserError, match="no stage 'layer_3'"):
        suite.run(config.Suite((("mlm", first), ("tune", wrong))), tmp_path)
    assert not list(tmp_path.iterdir())
