"""Several models asked the same: their probabilities put together. Values in, values out."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxtl.errors import UserError

Rule = Literal["mean", "vote"]
RULES: tuple[Rule, ...] = ("mean", "vote")

_NAMED = 10  # classes named in an error


@dataclasses.dataclass(frozen=True)
class Combined:
    """What an ensemble answers.

    Attributes:
        probabilities: `[examples, classes]` float64, rows sum to 1: the mean of the members' probabilities, or of a
            vote the share of the members that choose each class.
        ranking: `[examples, classes]` int, classes by number, the answer first.
    """

    probabilities: np.ndarray
    ranking: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The answers, `[examples]` int: numbers of classes."""
        return self.ranking[:, 0]


def combine(members: Sequence[np.ndarray], rule: Rule = "mean") -> Combined:
    """Returns the answer of an ensemble; one member alone is answered by its own probabilities under `mean`.

    Args:
        members: of each the probabilities, `[examples, classes]`, columns in the same order; see `columns`.
        rule: `mean` of the probabilities; or `vote`: every member chooses its likeliest class, and the class chosen
            most often is taken. Classes chosen equally often are ranked by the mean of the probabilities; what is equal
            in that as well, as the classes are numbered.
    """
    mean = np.mean(np.asarray(members, np.float64), axis=0)
    if rule == "mean":
        return Combined(mean, np.argsort(-mean, axis=1, kind="stable"))
    if rule != "vote":
        raise ValueError(f"rule={rule!r} is none of {', '.join(RULES)}")
    votes = np.zeros(mean.shape, np.int64)
    for likely in members:
        votes[np.arange(len(mean)), np.argmax(likely, axis=1)] += 1
    return Combined(votes / len(members), np.lexsort((-mean, -votes), axis=1))


def columns(members: Sequence[tuple[str, Sequence[str]]]) -> list[np.ndarray]:
    """Returns for each member where the classes of the first one are: `likely[:, columns]` is in the first's order.

    Args:
        members: name of the run, and the names of its classes in their order.

    Raises:
        UserError: they do not tell apart the same classes; says which of them differ.
    """
    first, wanted = members[0]
    found = []
    for name, classes in members:
        missing = [label for label in wanted if label not in classes]
        added = [label for label in classes if label not in wanted]
        if missing or added:
            parts = [f"{name} does not know {_shown(missing)}"] * bool(missing)
            parts += [f"{first} does not know {_shown(added)}"] * bool(added)
            raise UserError(
                f"{first} and {name} do not tell apart the same classes ({'; '.join(parts)}): put runs together that do"
            )
        found.append(np.array([list(classes).index(label) for label in wanted]))
    return found


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
