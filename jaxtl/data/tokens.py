"""Word pieces: the tokenizer beside the weights, and texts cut up by it, once.

The ids of a list of texts are kept in one file, named after everything they depend on.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxtl.data.listing import Ragged, Track, no_progress
from jaxtl.errors import UserError
from jaxtl.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_RUN = 1000  # texts handed to the tokenizer at once; it divides them among the processors


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """What masked language modelling has to know of a tokenizer.

    Attributes:
        mask: the id that hides a piece; None where there is none.
        special: ids that are never hidden, ascending: class token, separator, padding, unknown, mask.
        vocabulary: number of ids, those added to the tokenizer's own included.
    """

    mask: int | None
    special: tuple[int, ...]
    vocabulary: int


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """Reads the tokenizer of a folder in Hugging Face's layout. Nothing is fetched, and no code of the folder is run.

    Raises:
        UserError: there is none in the folder, it is damaged, or of a kind that has no fast implementation.
    """
    instead = "--set data.tokenizer= a folder or repository that has them"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"there is no tokenizer in {folder}, neither tokenizer.json nor vocab.txt: {instead}")
    from transformers import AutoTokenizer, BertTokenizerFast  # takes a second or two

    try:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            # BERT as it was published at first; whether capitals count is for the vocabulary to say.
            pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split()
            cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
            kind = "a cased" if cased else "an uncased"
            say(f"{folder} has no tokenizer_config.json; by its words it is {kind} BERT's")
            return BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=not cased)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library, which is Rust, raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {folder} is damaged or not known: {reason}; {instead}") from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {folder}, {type(tokenizer).__name__}, has no fast implementation: {instead}")
    return tokenizer


def token_ids(tokenizer: "PreTrainedTokenizerFast") -> TokenIds:
    """Returns the ids that have a meaning."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return TokenIds(tokenizer.mask_token_id, tuple(sorted(special)), len(tokenizer))


def tokenise(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerFast",
    max_length: int,
    show_progress: Track = no_progress,
    cache: Path | None = None,
) -> Ragged:
    """Cuts texts into word pieces, special ones included, the first `max_length` of each text; without padding.

    Args:
        texts: `n` texts.
        tokenizer: a fast one.
        max_length: the most pieces of a text.
        show_progress: wraps the slow loop.
        cache: a folder to keep the result in, and to look for it. One that cannot be written to is told of, no error.

    Returns:
        Ids, int32, `[sum of lengths]`, and where each text starts.
    """
    path = cache / f"{_fingerprint(texts, tokenizer, max_length)}.npz" if cache else None
    if path and (found := _load(path, len(texts))):
        return found
    values, lengths = [np.empty(0, np.int32)], []
    starts = range(0, len(texts), _RUN)
    for start in show_progress(starts, len(starts), "thousands of texts, tokenised"):
        run = list(texts[start : start + _RUN])
        ids = tokenizer(
            run, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        lengths += map(len, ids)
        values.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
    ragged = Ragged(np.concatenate(values), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    if path:
        _save(path, ragged)
    return ragged


def _fingerprint(texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast", max_length: int) -> str:
    """Returns a digest of all that the ids depend on."""
    import tokenizers

    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    # What the last call set; `tokenise` sets them anew.
    pipeline.update(truncation=None, padding=None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    settings = [pipeline, special, tokenizer.truncation_side, max_length, tokenizers.__version__]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        data = text.encode()
        digest.update(b"%d:" % len(data) + data)  # with the length, or "ab", "c" would be "a", "bc"
    return digest.hexdigest()


def _digest(ragged: Ragged) -> np.ndarray:
    whole = hashlib.sha256(ragged.values.tobytes() + ragged.offsets.tobytes())
    return np.frombuffer(whole.digest(), np.uint8)


def _load(path: Path, count: int) -> Ragged | None:
    """Returns what `_save` wrote for `count` texts; None where there is nothing, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            ragged = Ragged(stored["values"], stored["offsets"])
            whole = (
                (ragged.values.dtype, ragged.offsets.dtype) == (np.int32, np.int64)
                and (ragged.values.ndim, ragged.offsets.shape) == (1, (count + 1,))
                and ragged.offsets[0] == 0
                and ragged.offsets[-1] == len(ragged.values)
                and (ragged.lengths >= 0).all()
                and np.array_equal(stored["digest"], _digest(ragged))
            )
    except FileNotFoundError:
        return None
    except Exception:  # of zipfile, zlib, struct and numpy, each its own
        whole = False
    if not whole:
        say(f"{path} is damaged, and made anew")
    return ragged if whole else None


def _save(path: Path, ragged: Ragged) -> None:
    """Writes the file under another name, then renames it: a file of this name is whole."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez(file, values=ragged.values, offsets=ragged.offsets, digest=_digest(ragged))
        os.chmod(temporary, path.parent.stat().st_mode & 0o666)  # tempfile lets nobody else read it
        os.replace(temporary, path)
    except OSError as error:
        say(f"{path.parent} cannot be written to ({error.strerror or error}): the texts are tokenised anew each time")
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
