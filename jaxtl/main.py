"""Trains and evaluates an experiment.

    python -m jaxtl.main --list
    python -m jaxtl.main --experiment=quickstart
    python -m jaxtl.main --experiment=deit_cifar10_lastblock --explain
    python -m jaxtl.main --experiment=deit_cifar10 --set train.epochs=8 --set data.dir=DIR --workdir=runs/longer
    python -m jaxtl.main --experiment=text_csv --set data.train=tweets.csv
    python -m jaxtl.main --experiment=text_csv --mode=eval --set data.test=more_tweets.csv
    python -m jaxtl.main --suite=covid --seeds=3

An experiment is a small Python file that returns a dataclass; --set replaces single fields of it. The run folder
holds experiment.json (the resolved experiment), metrics.jsonl, checkpoints/ and result.json. The same command again
goes on with a run that was interrupted, and reports a finished one. --workdir=gs://BUCKET/RUN is a folder of object
storage, see docs/scaling.md.

A suite is an experiment file that names several experiments. They run one after the other, each in a folder of its own
below runs/SUITE, share what they keep of frozen stages, and end with the comparison of `python -m jaxtl.compare`: on
the terminal, and as compare.html in that folder. With --seeds=N each is run N times.
"""

import re
import sys
from pathlib import Path

from absl import app, flags

from jaxtl.cli import guarded, parser, quiet_libraries
from jaxtl.errors import UserError

_EXPERIMENT = flags.DEFINE_string(
    "experiment", None, "What to run: a name from --list, the path of a .py file, or of a run's experiment.json."
)
_SUITE = flags.DEFINE_string(
    "suite", None, "Like --experiment, for one that is a suite: covid, cifar10, all, quickstart, or a file of your own."
)
_SEEDS = flags.DEFINE_integer(
    "seeds",
    1,
    "Run each experiment so many times, with train.seed and the seeds that follow, and compare: means, and intervals "
    "over the seeds. More can be added later. A single experiment becomes a suite, in runs/NAME-seeds.",
    lower_bound=1,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder, which may be on gs://. Default: runs/NAME.")
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "path.to.field=value replaces one field of the experiment; repeat for more. In a suite, MEMBER.path.to.field=value "
    "is for one member.",
)
_SEED = flags.DEFINE_integer("seed", None, "Short for --set train.seed=N, which fixes all that is random.")
_LIST = flags.DEFINE_bool("list", False, "Show all experiments: name, what it is, expected result.")
_EXPLAIN = flags.DEFINE_flag(
    flags.Flag(
        flags.EnumParser(["false", "true", "json"]),
        None,
        "explain",
        "false",
        "Show what would be trained, on what, how, and what it costs; then exit. --explain=json: for programs.",
        boolean=True,  # may stand alone
    )
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "eval: evaluate a finished run on other examples, --set data.test=FILE."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "off", ["off", "auto"], "auto: train with the other processes of a TPU pod or a SLURM job."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes, where --distributed=auto cannot find it."
)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0, with --coordinator.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Move an existing run folder aside and start anew.",
    allow_override=True,  # see jaxtl.compare
)


def run(argv: list[str]) -> None:
    """Does what the flags say; raises UserError for what the user can mend."""
    if len(argv) > 1:
        raise UserError(f"what is {argv[1]!r}? All arguments are flags; --help shows them")
    # Slow imports come after the flags have been read: --help answers at once.
    from jaxtl import config, experiments, hosts, remote
    from jaxtl.evaluation import terminal
    from jaxtl.training import explain, revisit, suite

    quiet_libraries()
    hosts.start(
        auto=_DISTRIBUTED.value == "auto",
        coordinator=_COORDINATOR.value,
        count=_PROCESS_COUNT.value,
        number=_PROCESS_ID.value,
    )
    if _LIST.value:
        terminal.show(["experiment", "what it is", "expected"], list(experiments.describe_all()))
        return
    name = _EXPERIMENT.value or _SUITE.value
    if not name:
        raise UserError("--experiment=NAME is missing; --list shows the names, --experiment=quickstart is a first one")
    if _EXPERIMENT.value and _SUITE.value:
        raise UserError("--experiment and --suite say the same: give one of them")
    workdir = _WORKDIR.value or str(Path("runs") / _run_name(name))
    if remote.url(name):
        folder, _, file = name.rpartition("/")
        name = str(remote.local(folder, without=["checkpoints", "trained", "frozen"]) / file)
    assignments = [*_SET.value, *([] if _SEED.value is None else [f"train.seed={_SEED.value}"])]
    if _MODE.value == "eval":
        if _EXPLAIN.value != "false" or _OVERWRITE.value or _SUITE.value or _SEEDS.value > 1:
            raise UserError("--mode=eval is for one finished run: without --explain, --overwrite, --suite and --seeds")
        with remote.mirrored(workdir, check=None) as folder:
            found, split, path = revisit.evaluate(folder, assignments)
            terminal.show_metrics(found, split)
            print(remote.shown(path))
        return
    chosen = suite.override(experiments.load(name), assignments)
    single = isinstance(chosen, config.Experiment)
    if single and _SUITE.value:
        raise UserError(f"{name} is a single experiment, not a suite: --experiment={name}")
    repeated = chosen
    if _SEEDS.value > 1:
        repeated = suite.repeated(chosen, _SEEDS.value, re.sub(r"[^\w-]", "_", _run_name(name)))
        if single and not _WORKDIR.value:
            workdir += "-seeds"
    if _EXPLAIN.value != "false":
        explain.explain(chosen, remote.place(workdir), as_json=_EXPLAIN.value == "json")
        if _SEEDS.value > 1 and _EXPLAIN.value != "json":
            terminal.line(f"\nwith --seeds={_SEEDS.value}: {', '.join(name for name, _ in repeated.members)}")
        return
    with remote.mirrored(workdir, lambda copy: suite.check(repeated, copy, overwrite=_OVERWRITE.value)) as folder:
        suite.run(repeated, folder, overwrite=_OVERWRITE.value)


def _run_name(name: str) -> str:
    from jaxtl import remote

    if Path(name).suffix != ".json":
        return Path(name).stem
    # A run's experiment.json is named by its folder: what is evaluated there stays there, what runs anew does not.
    folder = (remote.url(name) or str(Path(name).resolve())).rpartition("/")[0]
    return folder if _MODE.value == "eval" else f"{folder.rpartition('/')[2]}-again"


def main(argv: list[str]) -> None:
    """Runs; see `jaxtl.cli`."""
    again = "the same command goes on from what was saved"
    if _LIST.value or _EXPLAIN.value != "false" or _MODE.value == "eval":
        again = "nothing was changed"
    elif _OVERWRITE.value:
        again = "the same command without --overwrite goes on from what was saved"
    guarded(run, argv, again)


if __name__ == "__main__":
    app.run(main, flags_parser=parser(sys.modules[__name__]))
