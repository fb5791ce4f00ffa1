"""One experiment, or several that belong together: run in order, each in its folder, compared at the end."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxtl import config
from jaxtl.config import Experiment, Suite
from jaxtl.errors import UserError, suggest
from jaxtl.evaluation import compare
from jaxtl.progress import say
from jaxtl.training import loop
from jaxtl.training import run as run_folder

_MEMBER = "suite:"  # model.weights of a member that starts from an earlier one


def override(chosen: Experiment | Suite, assignments: Sequence[str]) -> Experiment | Suite:
    """Returns it with `path=value` applied, in a suite to every member, or to the one named as `MEMBER.path=value`.

    Raises:
        UserError: see `jaxtl.config.override`; and values out of range.
    """
    if isinstance(chosen, Suite):
        return Suite(tuple((name, _member(name, member, chosen, assignments)) for name, member in chosen.members))
    changed = config.override(chosen, assignments)
    config.validate(changed)
    return changed


def _member(name: str, member: Experiment, of: Suite, assignments: Sequence[str]) -> Experiment:
    names = [other for other, _ in of.members]
    own = []
    for assignment in assignments:
        first, dot, rest = assignment.partition(".")
        if dot and first in names:
            if first == name:
                own.append(rest)
        elif first.partition("=")[0] in (field.name for field in dataclasses.fields(Experiment)):
            own.append(assignment)
        else:
            valid = [field.name for field in dataclasses.fields(Experiment)] + names
            raise UserError(f"--set {assignment}: there is no {first!r}{suggest(first, valid)}: {', '.join(valid)}")
    return override(member, own)


def run(chosen: Experiment | Suite, workdir: Path, *, overwrite: bool = False) -> None:
    """Runs what is not finished, and shows the results.

    Raises:
        UserError: something the user can mend.
    """
    if isinstance(chosen, Experiment):
        done = run_folder.finished(workdir, chosen, overwrite)
        compare.show_result(done or loop.train(chosen, workdir), workdir, new=done is None)
        return
    results = {}
    for name, member in resolve(chosen, workdir):
        say(f"--- {name}")
        folder = workdir / name
        results[name] = run_folder.finished(folder, member, overwrite) or loop.train(member, folder)
    compare.show_results(results)


def resolve(suite: Suite, workdir: Path) -> list[tuple[str, Experiment]]:
    """Returns the members with `suite:NAME` weights replaced by the folders of those runs.

    Raises:
        UserError: a member starts from one that does not come before it.
    """
    before: list[str] = []
    members = []
    for name, member in suite.members:
        weights = member.model.weights
        if weights.startswith(_MEMBER):
            source = weights.removeprefix(_MEMBER)
            if source not in before:
                raise UserError(f"{name}: model.weights={weights}: no member {source!r} comes before it")
            member = dataclasses.replace(member, model=dataclasses.replace(member.model, weights=str(workdir / source)))
        before.append(name)
        members.append((name, member))
    return members
