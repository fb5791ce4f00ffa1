"""Word pieces as the tokenizers library makes them, and a cache that never gives others."""

import contextlib
import json
import os

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from jaxtl.data import tokens
from jaxtl.errors import UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "##b", "##c", "🧄"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
TEXTS = ["a b", "abc 🧄 d", "z", "a b c d e f g h"]
IDS = [[2, 5, 6, 3], [2, 5, 14, 15, 16, 8, 3], [2, 1, 3], [2, 5, 6, 7, 8, 9, 10, 3]]  # by hand; the last cut at 8


def write_tokenizer(folder, vocabulary=VOCABULARY, **fields):
    """Writes a WordPiece tokenizer of the smallest kind, with a fixed padding and truncation as some ship."""
    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(vocabulary[:5])
    made.enable_padding(length=5)
    made.enable_truncation(4)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, "mask_token": "[MASK]", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return tokens.load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "deep" / "cache"


def as_lists(ragged):
    return [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


def problem(folder):
    with pytest.raises(UserError) as caught:
        tokens.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the tokenizer ---------------------------------------------------------------------------------------


def test_a_tokenizer_is_read_from_its_json_or_its_vocabulary(tmp_path, tokenizer):
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    cased = tokens.load_tokenizer(folder)
    assert as_lists(tokens.tokenise(TEXTS, cased, 8)) == as_lists(tokens.tokenise(TEXTS, tokenizer, 8)) == IDS
    assert as_lists(tokens.tokenise(["A"], cased, 8)) == [[2, 1, 3]]


@pytest.mark.parametrize("cased", [False, True])
def test_an_old_vocabulary_without_a_config_says_itself_whether_capitals_count(tmp_path, capsys, cased):
    words = ["hello", "Hello"] if cased else ["hello"]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    old = tokens.load_tokenizer(tmp_path)
    # Read as cased, a capital is another word; read as uncased, the same.
    assert as_lists(tokens.tokenise(["Hello", "hello"], old, 8)) == [[2, 6 if cased else 5, 3], [2, 5, 3]]
    assert tokens.token_ids(old).mask == 4
    assert f"{'a cased' if cased else 'an uncased'} BERT's" in capsys.readouterr().err


def test_ids_with_a_meaning_are_found_even_where_only_the_json_tells(tmp_path, tokenizer):
    assert tokens.token_ids(tokenizer) == tokens.TokenIds(4, (0, 1, 2, 3, 4), 17)
    folder = write_tokenizer(tmp_path / "bare")
    (folder / "tokenizer_config.json").unlink()
    found = tokens.token_ids(tokens.load_tokenizer(folder))
    assert found == tokens.TokenIds(None, (0, 1, 2, 3, 4), 17)


def test_a_folder_without_or_with_a_damaged_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert problem(tmp_path) == (
        f"there is no tokenizer in {tmp_path}, neither tokenizer.json nor vocab.txt: --set data.tokenizer= a folder or "
        "repository that has them"
    )
    assert "there is no tokenizer" in problem(tmp_path / "nowhere")
    whole = (write_tokenizer(tmp_path) / "tokenizer.json").read_bytes()
    for damaged in (whole[:300], b"{}", b"\xff\xfe", b"", b'{"added_tokens": [], "model": {"type": "?"}}'):
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        assert f"the tokenizer in {tmp_path} is damaged or not known: " in problem(tmp_path), damaged
    (tmp_path / "tokenizer.json").write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "is damaged" in problem(tmp_path)


def test_code_beside_a_tokenizer_is_not_run(tmp_path):
    folder = write_tokenizer(tmp_path, auto_map={"AutoTokenizer": ["tok.Tok", "tok.Tok"]}, tokenizer_class="Tok")
    (folder / "tok.py").write_text("raise SystemExit('it was run')")
    with contextlib.suppress(UserError):  # or it is taken for what tokenizer.json says
        tokens.load_tokenizer(folder)


@pytest.mark.weights
def test_a_published_tokenizer_gives_berts_ids(real_weights):
    bert = tokens.load_tokenizer(real_weights / "minilm-l6")
    assert tokens.token_ids(bert) == tokens.TokenIds(103, (0, 100, 101, 102, 103), 30522)
    assert as_lists(tokens.tokenise(["Hello world"], bert, 128)) == [[101, 7592, 2088, 102]]


# --- texts -----------------------------------------------------------------------------------------------


def test_texts_are_cut_up_without_padding_whatever_the_tokenizers_own_settings(tokenizer):
    found = tokens.tokenise(TEXTS, tokenizer, 8)
    assert (found.values.dtype, found.offsets.dtype) == (np.int32, np.int64)
    assert as_lists(found) == IDS
    assert found.lengths.tolist() == [4, 7, 3, 8]
    assert as_lists(tokens.tokenise(TEXTS, tokenizer, 3)) == [[2, 5, 3], [2, 5, 3], [2, 1, 3], [2, 5, 3]]
    nothing = tokens.tokenise([], tokenizer, 8)
    assert (nothing.values.shape, nothing.offsets.tolist()) == ((0,), [0])


def test_many_texts_are_taken_in_runs_of_a_thousand_and_shown(tokenizer):
    seen = []

    def show(runs, total, description):
        seen.append(total)
        yield from runs

    texts = [" ".join("abcdefgh"[: i % 7]) for i in range(2500)]
    found = tokens.tokenise(texts, tokenizer, 8, show)
    assert seen == [3]
    assert found.lengths.tolist() == [i % 7 + 2 for i in range(2500)]


# --- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def calls(tokenizer, monkeypatch):
    """Counts the calls of the tokenizer."""
    counted = []
    original = type(tokenizer).__call__

    def count(self, *args, **fields):
        counted.append(1)
        return original(self, *args, **fields)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    return counted


def test_the_same_texts_are_tokenised_once(tokenizer, cache, calls, tmp_path):
    first = tokens.tokenise(TEXTS, tokenizer, 8, cache=cache)
    again = tokens.tokenise(tuple(TEXTS), tokenizer, 8, cache=cache)  # its truncation set by the first call
    other = tokens.tokenise(TEXTS, tokens.load_tokenizer(tmp_path / "tokenizer"), 8, cache=cache)
    assert len(calls) == 1
    assert len(list(cache.iterdir())) == 1
    assert as_lists(first) == as_lists(again) == as_lists(other) == IDS
    assert (again.values.dtype, again.offsets.dtype) == (np.int32, np.int64)


def test_whatever_the_ids_depend_on_is_in_the_name(tokenizer, cache, calls, tmp_path):
    reordered = tokens.load_tokenizer(write_tokenizer(tmp_path / "b", [*VOCABULARY[:5], *reversed(VOCABULARY[5:])]))
    wanted = [(TEXTS, tokenizer, 8), (TEXTS, tokenizer, 7), (TEXTS, reordered, 8), (TEXTS[:3], tokenizer, 8)]
    wanted += [(["ab", "c"], tokenizer, 8), (["a", "bc"], tokenizer, 8), (["abc"], tokenizer, 8)]
    made = [as_lists(tokens.tokenise(*arguments, cache=cache)) for arguments in wanted]
    assert len(calls) == len(list(cache.iterdir())) == len(wanted)
    assert [as_lists(tokens.tokenise(*arguments, cache=cache)) for arguments in wanted] == made


def damaged(path):
    """Yields versions of a cache file that must not be used, by what is wrong."""
    whole = path.read_bytes()
    with np.load(path) as stored:
        good = dict(stored)
    yield "empty", b""
    yield "cut", whole[: len(whole) // 2]
    yield "not a zip file", b"x" * len(whole)
    yield "a byte of the values", whole.replace(good["values"].tobytes(), (good["values"] + 1).tobytes())
    offsets = good["offsets"].copy()
    offsets[1] += 1
    changed = {
        "values": {"values": good["values"] + 1},
        "their type": {"values": good["values"].astype(np.int64)},
        "offsets": {"offsets": offsets},
        "too few texts": {"offsets": good["offsets"][[0, 2, 3, 4]]},
        "pickles": {"values": np.array([{}], object)},
        "no digest": {"digest": np.zeros(0, np.uint8)},
    }
    for what, arrays in changed.items():
        np.savez(path, **{**good, **arrays})
        yield what, path.read_bytes()


def test_a_damaged_cache_file_is_noticed_and_made_anew(tokenizer, cache, calls, capsys):
    tokens.tokenise(TEXTS, tokenizer, 8, cache=cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for number, (what, content) in enumerate(list(damaged(path)), 2):
        path.write_bytes(content)
        assert as_lists(tokens.tokenise(TEXTS, tokenizer, 8, cache=cache)) == IDS, what
        assert len(calls) == number, what
        assert "is damaged, and made anew" in capsys.readouterr().err
        assert as_lists(tokens.tokenise(TEXTS, tokenizer, 8, cache=cache)) == IDS
        assert len(calls) == number, what
    assert len(path.read_bytes()) == len(whole)
    assert list(cache.iterdir()) == [path]


def test_a_cache_that_cannot_be_written_to_costs_a_line_and_not_the_run(tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert as_lists(tokens.tokenise(TEXTS, tokenizer, 8, cache=tmp_path / "file" / "cache")) == IDS
    assert "cannot be written to (Not a directory): the texts are tokenised anew" in capsys.readouterr().err

    def full(file, **_):
        file.write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(np, "savez", full)
    assert as_lists(tokens.tokenise(TEXTS, tokenizer, 8, cache=tmp_path / "full")) == IDS
    assert "(No space left on device)" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == []
