"""Freezing: ordered rules say which parameters learn, and in which group.

A rule is a pair `(pattern, group)`. The pattern is a regular expression over the whole parameter path
(`block_12/attention/query/kernel`), or a range of stages, first and last included: `block_1..block_11`,
`block_12..` (to the end), `..norm` (from the start). The first rule that matches a parameter decides; group None
is frozen, any other name is an optimiser group. In the manner of big_vision's ordered rules, every parameter must
be covered, and a rule that decides nothing is an error, so that a misspelt pattern cannot pass silently.

Labels are ordinary optax labels: a tree shaped like the parameters with a string at each leaf, `FROZEN` for what
does not learn. Note that `optax.masked` alone passes the raw gradient of what it masks through as an update; use
`optax.multi_transform` with `optax.set_to_zero()` under `FROZEN`, or, as the trainer does, leave frozen parameters
out of the optimiser's tree.
"""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxtl.errors import UserError, suggest

Rules = tuple[tuple[str, str | None], ...]

FROZEN = "frozen"
TRAIN = "train"

_RANGE = re.compile(r"(\w*)\.\.(\w*)")


def train_all() -> Rules:
    """Everything learns."""
    return ((".*", TRAIN),)


def train_head_only() -> Rules:
    """Only the head learns, as a group of its own, `head`: feature extraction."""
    return (("head..", "head"), (".*", None))


def train_from(stage: str) -> Rules:
    """The named stage and everything after it learn."""
    return ((f"{stage}..", TRAIN), (".*", None))


def freeze(first: str, last: str) -> Rules:
    """The stages from `first` to `last`, both included, are frozen; everything else learns."""
    return ((f"{first}..{last}", None), (".*", TRAIN))


_SHORTHANDS = {f.__name__: f for f in (train_all, train_head_only, train_from, freeze)}


def parse(text: str) -> Rules:
    """Reads rules from a command line: `train_from("block_12")`, or a list of pairs.

    Raises:
        ValueError: neither of the two.
    """
    expected = f'expected one of {", ".join(_SHORTHANDS)}, as in train_from("block_12"), or a list of pairs'
    try:
        node = ast.parse(text, mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            rules = _SHORTHANDS[node.func.id](*map(ast.literal_eval, node.args))
        else:
            rules = tuple((pattern, group) for pattern, group in ast.literal_eval(node))
    except (SyntaxError, ValueError, TypeError, KeyError):
        raise ValueError(expected) from None
    for pattern, group in rules:
        if not isinstance(pattern, str) or not (group is None or isinstance(group, str)):
            raise ValueError(expected)
    return rules


def label_params(params: Mapping[str, Any], rules: Rules, stages: Sequence[str]) -> dict[str, str]:
    """Returns the group of every parameter: a tree shaped like `params`, `FROZEN` where a rule says None.

    Pure: looks at the paths only, so abstract parameters (`jax.ShapeDtypeStruct`) do.

    Args:
        params: parameters by path; a path begins with the name of its stage.
        rules: ordered rules, first full match wins.
        stages: names of the model's stages in order, the head's last.

    Raises:
        UserError: a pattern that is no regular expression or names an unknown stage, a rule that decides no
            parameter, a parameter that no rule covers, or nothing left to train.
    """
    if any(group == FROZEN for _, group in rules):
        raise UserError(f"freeze rules: the group name {FROZEN!r} is taken; write None for what does not learn")
    matchers = [_matcher(pattern, stages) for pattern, _ in rules]
    labels, deciding, uncovered = {}, set(), []
    for path in params:
        for index, matches in enumerate(matchers):
            if matches(path):
                labels[path] = rules[index][1] or FROZEN
                deciding.add(index)
                break
        else:
            uncovered.append(path)
    if uncovered:
        raise UserError(f"freeze rules: no rule covers {_some(uncovered)}; end with a rule for '.*'")
    for index, (pattern, group) in enumerate(rules):
        # A closing '.*' may find everything decided: it states the default.
        if index in deciding or (pattern == ".*" and index == len(rules) - 1):
            continue
        if any(map(matchers[index], params)):
            raise UserError(f"freeze rules: ({pattern!r}, {group!r}) decides nothing: earlier rules match all of it")
        raise UserError(f"freeze rules: {pattern!r} matches no parameter; paths look like {_some(list(params))}")
    if all(label == FROZEN for label in labels.values()):
        raise UserError("freeze rules: nothing is left to train")
    return labels


def trainable_mask(labels: Mapping[str, str]) -> dict[str, bool]:
    """Returns the labels as a boolean mask, True where the parameter learns; for `optax.masked`."""
    return {path: label != FROZEN for path, label in labels.items()}


def trained(labels: Mapping[str, str]) -> dict[str, str]:
    """Returns the labels of the trainable parameters alone."""
    return {path: label for path, label in labels.items() if label != FROZEN}


def partition(params: Mapping[str, Any], labels: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (trainable, frozen)."""
    trainable = {path: value for path, value in params.items() if labels[path] != FROZEN}
    frozen = {path: value for path, value in params.items() if labels[path] == FROZEN}
    return trainable, frozen


def frozen_stages(labels: Mapping[str, str], stages: Iterable[str]) -> tuple[str, ...]:
    """Returns the stages in which nothing learns, those without parameters included."""
    learning = {path.partition("/")[0] for path, label in labels.items() if label != FROZEN}
    return tuple(stage for stage in stages if stage not in learning)


def _matcher(pattern: str, stages: Sequence[str]):
    if found := _RANGE.fullmatch(pattern):
        first, last = found.groups()
        for name in filter(None, (first, last)):
            if name not in stages:
                raise UserError(
                    f"freeze rules: {pattern!r}: no stage {name!r}{suggest(name, stages)}; stages: {', '.join(stages)}"
                )
        start = stages.index(first) if first else 0
        stop = stages.index(last) + 1 if last else len(stages)
        if start >= stop:
            raise UserError(f"freeze rules: {pattern!r} is empty: {first} comes after {last}")
        chosen = frozenset(stages[start:stop])
        return lambda path: path.partition("/")[0] in chosen
    try:
        return re.compile(pattern).fullmatch
    except re.error as error:
        raise UserError(f"freeze rules: {pattern!r} is not a regular expression: {error}") from None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
