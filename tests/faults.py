"""Runs jaxtl's command and has a signal come at a chosen moment: `python faults.py MOMENT [FLAG ..]`.

A moment is `SIGNAL@MODULE:NAME#COUNT`: the signal is sent when that function is called for the COUNT-th time;
`#COUNT+` when it returns. Or `SIGNAL@SECONDS`, after the start. Several signals at one moment: `SIGTERM,SIGTERM@..`.
"""

import functools
import importlib
import os
import signal
import sys
import threading
import time


def main(moment: str, arguments: list[str]) -> None:
    """Runs `jaxtl.main` with these arguments."""
    names, _, where = moment.partition("@")

    def send() -> None:
        for name in names.split(","):
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.3)  # until it has been heard, by another thread

    if ":" in where:
        module, _, rest = where.partition(":")
        path, _, count = rest.partition("#")
        arm(importlib.import_module(module), path, int(count.rstrip("+")), count.endswith("+"), send)
    elif where:
        threading.Timer(float(where), send).start()
    from absl import app

    from jaxtl import cli
    from jaxtl import main as command

    # Not where a signal comes while libraries are loaded.
    if os.environ.get("JAXTL_TEST_REPORT") == "False" and not where[:1].isdigit():
        from jaxtl.training import account

        account.write = lambda *_: []  # which takes longer than to train one of the tests' networks
    sys.argv = ["jaxtl", *arguments]
    app.run(command.main, flags_parser=cli.parser(command))


def warm(moment: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Runs it in a process that has the libraries loaded already, all that it writes going to a file."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    import jax  # which has read its environment before

    jax.config.update("jax_compilation_cache_dir", f"{environment['JAXTL_CACHE']}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    main(moment, arguments)


def arm(owner: object, path: str, count: int, after: bool, send) -> None:
    """Replaces the function by one that calls `send` at its `count`-th call."""
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def replaced(*args, **kwargs):
        nonlocal calls
        calls += 1
        this = calls == count
        if this and not after:
            send()
        result = function(*args, **kwargs)
        if this and after:
            send()
        return result

    setattr(owner, name, replaced)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
