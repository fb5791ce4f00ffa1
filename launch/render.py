"""Fills in a manifest: every `__FIELD__` of a template by its value, as JSON, which is YAML too.

    python3 launch/render.py TEMPLATE FIELD=VALUE .. [-- ARGUMENT ..]

ENVIRONMENT may be given several times, as ENVIRONMENT=NAME=VALUE. The arguments become `__ARGUMENTS__`, exactly:
Kubernetes replaces $(NAME) in them, and $$ by $, so that every $ of theirs is doubled. OWN=FLAG adds a flag before
them, in which $(NAME) is meant.
"""

import json
import re
import sys
from pathlib import Path

# Printed as they are by json.dumps, and refused by YAML.
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
# Words and numbers without quotes, checked by launch/gke.sh.
_PLAIN = ("NAME", "RESTARTS", "HOSTS", "DEVICES")


def literal(value: object) -> str:
    """Returns a value as JSON on one line that a YAML parser reads as the same."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def exact(text: str) -> str:
    """Returns what Kubernetes makes `text` of."""
    return text.replace("$", "$$")


def render(template: str, fields: list[tuple[str, str]], arguments: list[str]) -> str:
    """Returns the template filled in.

    Raises:
        ValueError: a field that the template lacks or nobody has given, or text that is not UTF-8.
    """
    own, environment, filled = [], [], {}
    for name, value in fields:
        if name == "ENVIRONMENT":
            variable, _, content = value.partition("=")
            environment.append({"name": variable, "value": exact(content)})
        elif name == "OWN":
            own.append(value)
        elif name in ("NODE_SELECTOR", "TOLERATIONS"):
            filled[name] = literal(json.loads(value))
        else:
            filled[name] = value if name in _PLAIN else literal(value)
    filled["ARGUMENTS"] = literal([*own, *map(exact, arguments)])
    filled["ENVIRONMENT"] = literal(environment)
    # In one pass: what is filled in is not looked at again.
    return re.sub("__([A-Z_]+?)__", lambda found: _known(filled, found[1]), template)


def _known(filled: dict[str, str], name: str) -> str:
    if name not in filled:
        raise ValueError(f"the template has a field __{name}__, which nothing fills in")
    return filled[name]


def main(argv: list[str]) -> int:
    """Prints the manifest; 2: one line says what is wrong."""
    split = argv.index("--") if "--" in argv else len(argv)
    path, *fields = argv[:split]
    try:
        text = Path(path).read_text(encoding="utf-8")
        rendered = render(text, [tuple(field.split("=", 1)) for field in fields], argv[split + 1 :])
        sys.stdout.buffer.write(rendered.encode("utf-8"))
    except UnicodeError:
        print("launch: error: an argument is not UTF-8 text, which Kubernetes cannot carry", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"launch: error: {path}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
