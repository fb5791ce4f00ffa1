"""Text data sets published on the web: fetched once, checked, and kept in a cache."""

import csv
import dataclasses
import errno
import hashlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

from jaxtl import storage
from jaxtl.errors import UserError, suggest
from jaxtl.progress import say
from jaxtl.storage import cache_folder

_TIMEOUT = 30.0  # seconds without an answer


@dataclasses.dataclass(frozen=True)
class File:
    """One file.

    Attributes:
        name: in the folder, and at the end of the address.
        sha256: its digest. Empty where it is not known: then that of the first copy fetched is kept beside it.
        labels: (label, records with it), as published; a copy without a known digest is held to them.
    """

    name: str
    sha256: str = ""
    labels: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Published:
    """One data set: CSV files in one folder.

    Attributes:
        address: of that folder, ending in a slash.
        label_column: the column that `File.labels` counts.
    """

    address: str
    label_column: str
    train: File
    validation: File
    test: File


SETS = {
    # Patwa et al. 2020, "Fighting an Infodemic: COVID-19 Fake News Dataset" (arXiv:2011.03327), of the shared task
    # Constraint@AAAI-2021; table 2 has the counts. The organisers hand their files out on request; the address is that
    # of a competition entry's repository, which mirrors them, pinned to a commit.
    "covid_fake_news": Published(
        "https://raw.githubusercontent.com/diptamath/covid_fake_news/27ea596ae17f7f4b5733aeb69185227086f22fc9/data/",
        "label",
        File("Constraint_Train.csv", "441f3985bb76eb69d1e488cf292f80add96c4dddfa43ba7c060889607837ddce"),
        File("Constraint_Val.csv", "c610931d0641fe1d9b9495c453f99ae7aa45bf294c7db6333ec84ecebb0b6c3c"),
        File("english_test_with_labels.csv", labels=(("real", 1120), ("fake", 1020))),
    ),
}


def find(name: str) -> Published:
    """Returns the data set of this name; raises UserError where there is none."""
    if name not in SETS:
        raise UserError(
            f"data.name={name}: there is no such data set{suggest(name, SETS)}; there are {', '.join(SETS)}"
        )
    return SETS[name]


def fetch(name: str, download: bool) -> Path:
    """Returns the folder in the cache that holds all files of a data set; fetches what is missing or damaged.

    Raises:
        UserError: no such data set, no network, an answer that is not the file, no space or no right to write, or
            `download` is false and a file is missing; says how to get the files by hand.
    """
    entry = find(name)
    folder = cache_folder() / "data" / name
    files = (entry.train, entry.validation, entry.test)
    names = ", ".join(file.name for file in files)
    by_hand = f"put {names} from {entry.address} into a folder and --set data.dir=FOLDER"
    try:
        missing = [file for file in files if not _is_whole(folder, file, entry)]
        if missing and not download:
            lacking = ", ".join(file.name for file in missing)
            raise UserError(f"there is no {lacking} in {folder}, and data.download is false: {by_hand}")
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with storage.turn(folder / ".lock"):
                for file in missing:
                    if not _is_whole(folder, file, entry):  # fetched by another process meanwhile
                        say(f"fetching {entry.address}{file.name}")
                        _download(folder, file, entry, by_hand)
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or error
        raise UserError(f"{folder}: {reason}; set JAXTL_CACHE to a folder that can be written to") from None
    return folder


def _download(folder: Path, file: File, entry: Published, by_hand: str) -> None:
    """Fetches one file. Nothing that is cut short or not what it should be takes its place."""
    import pooch  # with its HTTP library half a second, and needed once
    import requests

    fetch_to = pooch.HTTPDownloader(timeout=_TIMEOUT)

    def fetch_and_check(url: str, path: str, caller: object) -> None:
        fetch_to(url, path, caller)
        if not file.sha256 and not _agrees(Path(path), file, entry):
            raise ValueError("its records are not those published")

    pooch.get_logger().disabled = True
    url, path, known = entry.address + file.name, folder / file.name, file.sha256 or _recorded(folder, file)
    if not known:
        path.unlink(missing_ok=True)  # pooch keeps whatever is there if it has no digest to compare
    try:
        pooch.retrieve(url, known or None, file.name, folder, downloader=fetch_and_check)
    except requests.HTTPError as error:
        raise UserError(f"{file.name} was answered with {error.response.status_code}: {by_hand}") from None
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__:  # of the HTTP library, its own library, the system
            cause = cause.__context__
        raise UserError(f"{file.name} cannot be fetched ({cause}): is there a network? If not, {by_hand}") from None
    except ValueError:
        raise UserError(
            f"what is fetched as {file.name} is another file, is a login page or proxy in the way? If so, {by_hand}"
        ) from None
    _record(folder, file)


def _is_whole(folder: Path, file: File, entry: Published) -> bool:
    """Whether the cache holds the file as it should be."""
    path = folder / file.name
    if not path.is_file():
        return False
    if known := file.sha256 or _recorded(folder, file):
        return _digest(path) == known
    if whole := _agrees(path, file, entry):
        _record(folder, file)
    return whole


def _agrees(path: Path, file: File, entry: Published) -> bool:
    """Whether the file has the records that were published, by their labels."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            found = Counter((row[entry.label_column] or "").strip() for row in csv.DictReader(lines))
    except (ValueError, KeyError, csv.Error):
        return False
    return found == dict(file.labels)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded(folder: Path, file: File) -> str:
    """Returns the digest kept beside the first copy, '' where there is none."""
    try:
        digest = (folder / f"{file.name}.sha256").read_text().split()[0]
    except (OSError, ValueError, IndexError):
        return ""
    return digest if len(digest) == 64 else ""


def _record(folder: Path, file: File) -> None:
    if not file.sha256:
        with suppress(OSError):  # a cache that cannot be written to is counted again the next time
            (folder / f"{file.name}.sha256").write_text(f"{_digest(folder / file.name)}  {file.name}\n")
