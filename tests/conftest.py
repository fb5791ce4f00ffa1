"""Fixtures shared by all tests."""

import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType

# Read by JAX when it is imported, here and in the processes that tests start. With a size its cache of programs has a
# lock, as in jaxtl itself; test modules have it made when they are collected.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import hypothesis
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxtl.data.listing import Examples

# A machine that is busy is no failure, and the same examples are drawn each time.
hypothesis.settings.register_profile("jaxtl", deadline=None, derandomize=True)
hypothesis.settings.load_profile("jaxtl")

# For `benchmarks`, which is not installed. At the end: what is tested is the installed jaxtl, not the checkout's.
sys.path.append(str(Path(__file__).parent.parent))


# What takes longest is begun first, or at the end one worker has nothing to do while the other is busy with it.
LONGEST = ("test_survival.py", "test_sharding.py", "test_hosts.py", "test_remote.py", "test_resume.py")


def pytest_collection_modifyitems(items):
    """Puts the longest files first, in the order above, and leaves the others as they are."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real checkpoints: `dinov2-small` and `minilm-l6` in Hugging Face's layout."""
    folder = os.environ.get("JAXTL_TEST_WEIGHTS")
    if not folder:
        pytest.skip("JAXTL_TEST_WEIGHTS names no folder of real checkpoints")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10() -> Path:
    """A tensorflow-datasets folder with CIFAR-10 prepared in it."""
    folder = os.environ.get("JAXTL_TEST_TFDS")
    if not folder:
        pytest.skip("JAXTL_TEST_TFDS names no tfds data dir with cifar10")
    return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard():
    """What is started in the background, or by nohup, ignores them, and so would all that a test starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # programs inherit what is ignored, not what is handled


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Programs that several tests share are compiled once, for all workers: it is what takes the time."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)  # and of the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory):
    """What jaxtl keeps between runs is kept for the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def reports_left_out():
    """To draw a report takes longer than to train one of the tests' networks; `reports` has them written."""
    from jaxtl.training import account

    write = account.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "write", lambda *_: [])
        yield write


@pytest.fixture(scope="module")
def reports(reports_left_out):
    """The runs of this module end with a report, as all runs do outside the tests."""
    from jaxtl.training import account

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "write", reports_left_out)
        yield


@pytest.fixture(scope="session", autouse=True)
def comparisons_left_out():
    """To draw the page that a suite ends with takes longer than to train its runs; `comparisons` has it written."""
    from jaxtl.evaluation import comparison_report

    write = comparison_report.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_report, "write", lambda *_: None)
        yield write


@pytest.fixture
def comparisons(comparisons_left_out, monkeypatch):
    """Comparisons have their page, as outside the tests."""
    from jaxtl.evaluation import comparison_report

    monkeypatch.setattr(comparison_report, "write", comparisons_left_out)


# --- a checkpoint of BERT, and texts with a rule to learn ------------------------------------------------

# A text belongs to the class whose words are in it.
WORDS = {
    "fake": ("garlic", "bleach", "miracle", "hoax"),
    "joke": ("parrot", "banana", "penguin", "circus"),
    "real": ("mask", "vaccine", "ward", "report"),
}
_FILLERS = (  # noqa: SIM905
    "the a of in on and to is was are new old two ten day week city water people doctor news today virus said from "
    "with this that for it they we all more less than no yes out up"
).split()
_PUNCTUATION = (".", ",", "!", "?", "#", "😷")  # 🧄 is unknown to the tokenizer
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (
    *SPECIAL,
    *_PUNCTUATION,
    *_FILLERS,
    *(word for words in WORDS.values() for word in words if word != "penguin"),
    *("pen", "##g", "##u", "##in", "##s", "##ed"),
)
WIDTH, POSITIONS = 32, 48


def write_tokenizer(folder: Path, vocabulary: tuple[str, ...] = VOCABULARY, **special: str) -> Path:
    """Writes a WordPiece tokenizer as BERT has it."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary.index("[SEP]")), ("[CLS]", vocabulary.index("[CLS]"))
    )
    special = special or {
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"
    }  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_writer():
    """`write_tokenizer`, for tests that need a tokenizer that is wrong in some way."""
    return write_tokenizer


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """A folder as on the Hugging Face Hub: config, random weights of a tiny BERT, tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-bert"
    torch.manual_seed(0)
    # Without dropout, whose random numbers take longest to compile; the heads have theirs.
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.BertConfig(vocab_size=len(VOCABULARY), max_position_embeddings=POSITIONS, **sizes, **rates)
    transformers.BertModel(config).save_pretrained(folder)
    return write_tokenizer(folder)


def texts(count: int, seed: int, classes: tuple[str, ...] = ("fake", "real")) -> list[tuple[str, str]]:
    """Returns (text, label): as many of each class, 3 to 35 words, some over several lines, some with emoji."""
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        label = classes[index % len(classes)]
        words = [str(word) for word in random.choice(_FILLERS, random.integers(2, 30))]
        for _ in range(1 + len(words) // 6):
            words.insert(random.integers(len(words) + 1), str(random.choice(WORDS[label])))
        ends = ["😷", "🧄", "\n", ' "', ", ", "!"]
        text = " ".join(words)
        if index % 3 == 0:
            middle = len(words) // 2
            text = " ".join(words[:middle]) + str(random.choice(ends)) + "\n" + " ".join(words[middle:]) + " 😷"
        found.append((text, label))
    order = random.permutation(count)
    return [found[i] for i in order]


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Writes records as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Files of short texts: two classes in three splits, three classes in one file, and one without labels."""
    folder = tmp_path_factory.mktemp("texts")
    for name, count, seed in (("train", 240, 1), ("val", 60, 2), ("test", 62, 3)):
        write_csv(folder / f"{name}.csv", texts(count, seed))
    write_csv(folder / "three.csv", texts(180, 4, ("fake", "joke", "real")))
    lines = [text.replace("\n", " ") for text, _ in texts(240, 5)]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def command(capsys):
    """Returns what runs a command's `main` in this process: (exit status, standard output, standard error)."""

    def run(module: ModuleType, *arguments: object) -> tuple[int, str, str]:
        # Imported before the flags are saved: grain defines flags too, which must not be taken back.
        from jaxtl.training import suite

        assert suite
        status = 0
        capsys.readouterr()
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            try:
                module.main(flags.FLAGS(["jaxtl", *map(str, arguments)]))
            except SystemExit as ended:
                status = ended.code
        return (status, *capsys.readouterr())

    return run


# --- a real browser ------------------------------------------------------------------------------------------

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window, driven by chromedriver."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in QUIET:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def open_page(browser):
    """Returns what opens a page in a window of some width, on a screen of some colour scheme."""

    def open_page(path: Path, width: int = 1200, scheme: str = "light") -> None:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.get(path.as_uri())

    return open_page


# --- a finished run, without having run ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def write_run():
    """Returns what writes the folder of a finished run as far as it is compared.

    Of `texts`, `ids` and `labels` the run answers `logits`; every other figure is made up, or given in `more`.
    """
    from jaxtl import config
    from jaxtl.evaluation import metrics, predictions
    from jaxtl.training import run

    def write(
        folder: Path, experiment: config.Experiment, classes, ids, labels, logits, texts=(), split="test", **more
    ) -> Path:
        labels, logits = np.asarray(labels, np.int32), np.asarray(logits, np.float32)
        figures = metrics.classification(logits, labels, classes)
        (folder / "report").mkdir(parents=True)
        (folder / "experiment.json").write_text(config.to_json(experiment), encoding="utf-8")
        predictions.write(folder / predictions.ARRAYS, predictions.Predictions(tuple(ids), labels, logits))
        if texts:
            found = Examples(None, labels, tuple(classes), tuple(ids), tuple(texts))
            predictions.write_table(folder / run.REPORT / predictions.TABLE, found, logits)
        lines = [
            {"step": epoch, "epoch": float(epoch), "split": name, "loss": 1 / epoch, "accuracy": 1 - 0.5 / epoch}
            for epoch in (1, 2)
            for name in ("train", "train_epoch", "eval")
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {
            "accuracy": 0.9, "loss": 0.3, "held_out": figures, "test": figures if split == "test" else None,
            "before": None, "train_accuracy": 0.99, "train_loss": 0.05, "trainable_parameters": 1_000,
            "total_parameters": 10_000, "train_examples": 100, "classes": list(classes), "architecture": {},
            "frozen_sha256": "", "trained_sha256": "", "seconds_per_epoch": 2.0, "seconds_total": 9.0,
            "peak_memory_bytes": 2e9, "reported": dict(experiment.reported), "device": "1 x cpu", "versions": {},
            **more,
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


@pytest.fixture(scope="session")
def read_json():
    """Returns what reads a JSON file."""
    return lambda path: json.loads(Path(path).read_text(encoding="utf-8"))
