"""The exceptions that are told in one line: what a user can mend, and what passes."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one message.

    `jaxtl.main` prints it as one line on standard error, without a traceback, and exits with status 2.
    """


class Outage(Exception):
    """Something that passes, as a network that fails: what, and how to go on, in one message.

    The commands print it like `UserError`, and exit with status 1, after which launchers try again.
    """


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the valid name nearest to `name`, or '' when none is near."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
