"""Fetches pretrained weights from the Hugging Face Hub, through its own client and into its own cache.

The client reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_HOME itself. The exceptions handled are those of
huggingface_hub 2.4: `snapshot_download` falls back to the cache when it cannot connect, or is offline, and raises
LocalEntryNotFoundError, caused by what went wrong, where the cache lacks a file.
"""

import errno
import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library the client is built on, so that jaxtl need not name it
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from jaxtl.errors import UserError

_SIDE_FILES = (
    "config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
# In order of preference: whole file, index of shards, shards. The first set found in the repo is fetched, no other.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a repo id, `org/name` or `name`. Says nothing about whether it exists."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch(repo_id: str) -> Path:
    """Downloads the config, tokenizer and weights of a repo, unless they are in the cache already.

    Weights are safetensors where the repo has them, else torch files, never both. Without a network the cache is
    used.

    Returns:
        The folder of the snapshot, for `jaxtl.weights.files.Checkpoint`.

    Raises:
        UserError: not a repo id, no network and not in the cache, no such repo or no access to it, no weights in it,
            or no space left.
    """
    for names in _WEIGHTS:
        folder = _fetch(repo_id, [*_SIDE_FILES, *names])
        if any((folder / name).is_file() for name in names):
            return folder
    wanted = " or ".join(names[0] for names in _WEIGHTS)
    raise UserError(f"{repo_id} has no {wanted}: its weights are in a format that jaxtl does not read")


def fetch_description(repo_id: str) -> Path:
    """Downloads config and tokenizer alone: enough to say what a run would be. Returns and raises as `fetch`."""
    return _fetch(repo_id, list(_SIDE_FILES))


def _fetch(repo_id: str, patterns: list[str]) -> Path:
    if not is_repo_id(repo_id):
        raise UserError(f"{repo_id!r} is neither a file or folder nor a Hugging Face repo id (org/name)")
    # Beyond what the client documents: hf_xet, which moves large files, raises RuntimeError, and an answer that is
    # not JSON, such as a login page in the way, ValueError.
    try:
        return _snapshot(repo_id, patterns)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_explain(repo_id, error)) from error


def _snapshot(repo_id: str, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        # A dead proxy, a connection cut: the client looks into the cache only where it could not connect at all.
        try:
            return Path(snapshot_download(repo_id, allow_patterns=patterns, local_files_only=True))
        except LocalEntryNotFoundError as missing:
            raise missing from error


def _explain(repo_id: str, error: Exception) -> str:
    """Returns one line for the user: what went wrong, and what to do."""
    # What the cache lacks is told by why it had to serve.
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    files = ", ".join((*_SIDE_FILES[:2], "tokenizer files", _WEIGHTS[0][0], f"or {_WEIGHTS[1][0]}"))
    by_hand = (
        f"on a machine with a network run `hf download {repo_id} --local-dir DIR` (files: {files}), "
        "copy DIR here, then --set model.weights=DIR"
    )
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if os.strerror(errno.ENOSPC) in str(error):
        return f"no space left in {constants.HF_HUB_CACHE} for {repo_id}: free some, or set HF_HOME to another disk"
    if isinstance(cause, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, then set HF_TOKEN or run `hf auth login`"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"there is no repo {repo_id} at {constants.ENDPOINT}, or it is private: check the name; for a private "
            "one set HF_TOKEN or run `hf auth login`"
        )
    if status in (401, 403):
        return f"{constants.ENDPOINT} refused access to {repo_id}: check HF_TOKEN, or run `hf auth login` ({reason})"
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and {repo_id} is not whole in the cache: unset it, or {by_hand}"
    if status is not None:
        return f"{constants.ENDPOINT} answered {status} for {repo_id}: try again later, or {by_hand}"
    if isinstance(cause, HTTPError):
        return f"cannot reach {constants.ENDPOINT} for {repo_id}: {by_hand} ({reason})"
    if isinstance(cause, ValueError):
        return f"{constants.ENDPOINT} does not answer like a Hub; is a login page or proxy in the way? Or {by_hand}"
    if isinstance(cause, RuntimeError):
        return f"the Xet transfer of {repo_id} failed: try HF_HUB_DISABLE_XET=1, or {by_hand} ({reason})"
    return f"fetching {repo_id} from {constants.ENDPOINT} failed: {reason}"
