"""Experiments by name: find, load and list the files of `experiments/`."""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxtl import config
from jaxtl.config import Experiment, Suite
from jaxtl.errors import UserError, suggest

_PACKAGE = Path(__file__).parent


def folders() -> tuple[Path, ...]:
    """Where experiments are looked for, in order: `./experiments`, then those that came with the package."""
    installed = _PACKAGE / "_experiments"
    # In a checkout installed in place, the folder still lies beside the package.
    return (Path("experiments"), installed if installed.is_dir() else _PACKAGE.parent / "experiments")


def load(name: str) -> Experiment | Suite:
    """Returns what the file of this name, at this path, or this `experiment.json` describes.

    Raises:
        UserError: there is no such experiment (the nearest name is suggested), or its file does not work.
    """
    if name.endswith(".json"):
        path = _existing(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        return config.from_json(text, str(path))
    if name.endswith(".py") or os.sep in name:
        path = _existing(name)
    else:
        available = {path.stem: path for path in available_files()}
        if name not in available:
            raise UserError(f"no experiment {name!r}{suggest(name, available)}; --list shows all")
        path = available[name]
    module = _run(path)
    function = getattr(module, "experiment", None)
    if not callable(function):
        raise UserError(f"{path}: an experiment file defines a function experiment() that returns an Experiment")
    try:
        found = function()
    except Exception as error:  # the user's own code, as in _run
        raise _own_error(error, path) from None
    if isinstance(found, Experiment):
        return config.checked(found, str(path))
    if not isinstance(found, Suite):
        raise UserError(f"{path}: experiment() returned {type(found).__name__}, not an Experiment or a Suite")
    names = [name for name, _ in found.members]
    if not names or len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise UserError(f"{path}: a suite's members have names of letters, digits, _ and -, each once: {names}")
    return Suite(tuple((name, config.checked(member, f"{path}, {name}")) for name, member in found.members))


def available_files() -> list[Path]:
    """Returns the files of all experiments by name; one in `./experiments` hides an installed one of its name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted(folder.glob("[!_]*.py")):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def describe_all() -> Iterator[tuple[str, str, str]]:
    """Yields (name, what it is, expected result) of every experiment, from its docstring, without running it."""
    for path in available_files():
        try:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except (OSError, SyntaxError, ValueError) as error:
            text = f"(cannot be read: {error})"
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        expected = next((p.removeprefix("Expected: ") for p in paragraphs if p.startswith("Expected: ")), "")
        yield path.stem, paragraphs[0], expected


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no file {name}")
    return path


def _run(path: Path):
    spec = importlib.util.spec_from_file_location(f"jaxtl_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        # Installed folders may not be writable, and need no byte code.
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: any exception, shown where it arose
        raise _own_error(error, path) from None
    finally:
        sys.dont_write_bytecode = writes
    return module


def _own_error(error: Exception, path: Path) -> UserError:
    line = getattr(error, "lineno", None) or _last_line(error, path)
    return UserError(f"{path}:{line}: {type(error).__name__}: {' '.join(str(error).split())}")


def _last_line(error: BaseException, path: Path) -> int:
    line, trace = 0, error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
