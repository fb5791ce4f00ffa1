"""One experiment, or several that belong together: run in order, each in its folder, compared at the end.

With several seeds, one experiment is several too: `NAME`, `NAME-seed1`, ..
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxtl import config, hosts, remote
from jaxtl.config import Experiment, Suite, Text
from jaxtl.errors import UserError, suggest
from jaxtl.evaluation import comparison_report, runs, terminal
from jaxtl.progress import say
from jaxtl.training import loop
from jaxtl.training import run as run_folder
from jaxtl.training.setup import preview
from jaxtl.weights import hub

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


def repeated(chosen: Experiment | Suite, seeds: int, name: str) -> Suite:
    """Returns every experiment so many times, with its seed and those that follow.

    The first keeps its name, so that seeds can be added to what has run; the others are called `NAME-seedN`. A member
    that starts from another's weights starts from that of the same repetition.

    Args:
        chosen: what is to be repeated.
        seeds: how often.
        name: of a single experiment.

    Raises:
        UserError: a seed too large, or a name that is there already.
    """
    suite = Suite(((name, chosen),)) if isinstance(chosen, Experiment) else chosen
    first = dict(suite.members)

    def renamed(name: str, repetition: int) -> str:
        return f"{name}-seed{first[name].train.seed + repetition}" if repetition and name in first else name

    members = []
    for repetition in range(seeds):
        for name, member in suite.members:
            model, source = member.model, member.model.weights.removeprefix(_MEMBER)
            if source != model.weights:
                model = dataclasses.replace(model, weights=_MEMBER + renamed(source, repetition))
            member = dataclasses.replace(_with_seed(member, member.train.seed + repetition), model=model)
            config.validate(member)
            members.append((renamed(name, repetition), member))
    names = [name for name, _ in members]
    if twice := [name for name in first if names.count(name) > 1]:
        raise UserError(f"--seeds={seeds}: two members would be called {twice[0]}: rename one of them")
    return Suite(tuple(members))


def run(chosen: Experiment | Suite, workdir: Path, *, overwrite: bool = False) -> None:
    """Runs what is not finished, and shows the results: of a suite as a comparison, whose page it writes there.

    Raises:
        UserError: something the user can mend.
    """
    if isinstance(chosen, Experiment):
        chosen = anchored(chosen)
        done = run_folder.finished(workdir, chosen, overwrite)
        if done is None and not Path(chosen.model.weights).exists() and hub.is_repo_id(chosen.model.weights):
            preview(chosen, download=True)  # mistakes show before large files are fetched
        terminal.show_result(done or loop.train(chosen, workdir, overwrite=overwrite), workdir, new=done is None)
        return
    members, done = _standing(chosen, workdir, overwrite)
    described, looked_at = as_describable(members), set()
    anew = {name: overwrite for name, _, _ in members}
    for name, _, source in members:
        # A run made from what is about to change is no longer what its settings say.
        if source is not None and done[source] is None:
            done[name], anew[name] = None, True
        like = config.to_json(_with_seed(described[name], 0))
        if done[name] is None and like not in looked_at:
            # Mistakes in the last member must not show after the first has been trained.
            preview(described[name], download=True)
            looked_at.add(like)
    for name, _, source in members:
        # At once: were the command interrupted after the source is trained, nothing would tell that this is of the old.
        if source is not None and anew[name]:
            with run_folder.Claim(workdir / name) as claim:
                claim.take(anew=True)
            anew[name] = False
    for name, member, _ in members:
        say(f"--- {name}")
        done[name] = done[name] or loop.train(member, workdir / name, overwrite=anew[name])
    if hosts.first():
        finished, left_out = runs.read([workdir / name for name, _, _ in members])
        for line in left_out:
            say(f"left out: {line}")
        comparison_report.present(finished, workdir / comparison_report.PAGE)
    hosts.together("compared")


def check(chosen: Experiment | Suite, workdir: Path, *, overwrite: bool) -> None:
    """Raises UserError where a folder holds something else than what would run there."""
    if isinstance(chosen, Experiment):
        run_folder.finished(workdir, anchored(chosen), overwrite)
    else:
        _standing(chosen, workdir, overwrite)


def _standing(
    chosen: Suite, workdir: Path, overwrite: bool
) -> tuple[list[tuple[str, Experiment, str | None]], dict[str, dict | None]]:
    """Returns the members as `resolve` does, and the results of those that have finished."""
    if (workdir / run_folder.EXPERIMENT).exists():
        raise UserError(f"--workdir={remote.shown(workdir)} holds a single run; a suite needs a folder of its own")
    members = resolve(Suite(tuple((name, anchored(member)) for name, member in chosen.members)), workdir)
    return members, {name: run_folder.finished(workdir / name, member, overwrite) for name, member, _ in members}


def _with_seed(experiment: Experiment, seed: int) -> Experiment:
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=seed))


def anchored(experiment: Experiment) -> Experiment:
    """Returns the experiment with its local paths absolute, so that the run can be used from another folder too."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path and Path(path).expanduser().exists() else path

    model, data = experiment.model, experiment.data
    if model.weights != config.RANDOM:  # whatever a folder here is called
        model = dataclasses.replace(model, weights=absolute(model.weights))
    data = dataclasses.replace(data, dir=absolute(data.dir))
    if isinstance(data, Text):
        # Without a folder, the files are in the current one.
        folder = data.dir if data.dir or data.name else str(Path.cwd())
        data = dataclasses.replace(data, dir=folder, tokenizer=absolute(data.tokenizer))
    plan = experiment.plan
    if plan.cache_dir:  # which the run makes, where it is not there yet
        plan = dataclasses.replace(plan, cache_dir=str(Path(plan.cache_dir).expanduser().absolute()))
    return dataclasses.replace(experiment, model=model, data=data, plan=plan)


def as_describable(members: Sequence[tuple[str, Experiment, str | None]]) -> dict[str, Experiment]:
    """Returns each member by name as it can be described before any has run.

    One that starts from another's trained weights has architecture and tokenizer of what that one starts from.
    """
    described: dict[str, Experiment] = {}
    for name, member, source in members:
        if source is not None:
            theirs = described[source].model
            preset = theirs.preset if member.model.preset == "from_weights" else member.model.preset
            member = dataclasses.replace(
                member, model=dataclasses.replace(member.model, preset=preset, weights=theirs.weights)
            )
            if isinstance(member.data, Text) and isinstance(described[source].data, Text):
                tokenizer = member.data.tokenizer or described[source].data.tokenizer
                member = dataclasses.replace(member, data=dataclasses.replace(member.data, tokenizer=tokenizer))
        described[name] = member
    return described


def resolve(suite: Suite, workdir: Path) -> list[tuple[str, Experiment, str | None]]:
    """Returns (name, experiment, name of the member whose weights it starts from or None) of each member.

    In the experiments, `suite:NAME` weights are replaced by the folders of those runs.

    Raises:
        UserError: a member starts from one that does not come before it.
    """
    members: list[tuple[str, Experiment, str | None]] = []
    for name, member in suite.members:
        source = None
        if member.model.weights.startswith(_MEMBER):
            source = member.model.weights.removeprefix(_MEMBER)
            if source not in (before for before, _, _ in members):
                raise UserError(f"{name}: model.weights={member.model.weights}: no member {source!r} comes before it")
            # Absolute, so that the run can be used as weights from another folder too.
            model = dataclasses.replace(member.model, weights=remote.shown((workdir / source).absolute()))
            member = dataclasses.replace(member, model=model)
        members.append((name, member, source))
    return members
