"""The policies that ``docs/how-to/own-policy.md`` shows, made from outside the package."""

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "own-policy.md"
_BLOCK = re.compile(r"<!-- policy: (\w+) -->\n```python\n(.*?)```", re.DOTALL)


@cache
def documented():
    """Return the classes by name."""
    classes = {}
    for name, source in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        names = {"__name__": "documented_policies"}
        exec(compile(source, f"{PAGE.name}: {name}", "exec"), names)
        classes[name] = names[name]
    return classes


def __getattr__(name):
    try:
        return documented()[name]
    except KeyError:
        raise AttributeError(name) from None
