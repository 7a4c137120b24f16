"""``gradclip explain CODE``: what an error means, why it happens, and what to do.

It needs nothing but gradclip, since errors name this command where no extra is installed.
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from inspect import getdoc
from operator import eq
from textwrap import dedent, indent
from typing import NamedTuple

from gradclip import errors
from gradclip.errors import ArgumentValueError, GradClipError

__all__ = ["EXPLANATIONS", "Explanation", "explain", "listed_explain"]

_EXAMPLES = """\
Examples:
  gradclip explain
  gradclip explain GC201
  gradclip explain GC201 --json
"""


class Explanation(NamedTuple):
    """What the docstring of an error says.

    Attributes:
        code: Such as GC201.
        error: The name of its class.
        builtin: The name of the built-in that it is too.
        summary: What it means, in one sentence.
        why: How it comes to it.
        what_to_do: How to get rid of it.
        example: Code that raises it, or a command; empty where no few lines show it.
    """

    code: str
    error: str
    builtin: str
    summary: str
    why: str
    what_to_do: str
    example: str

    def __str__(self) -> str:
        parts = [
            f"{self.code}  {self.error}, a {self.builtin}",
            self.summary,
            f"Why: {self.why}",
            f"What to do: {self.what_to_do}",
        ]
        if self.example:
            parts.append(f"Example:\n{indent(self.example, '    ')}")
        return "\n\n".join(parts)


def _explanation(error: type[GradClipError]) -> Explanation:
    said, _, example = (getdoc(error) or "").replace("``", "`").partition("\n\nExample:\n")
    said, _, what_to_do = said.partition("\n\nWhat to do: ")
    summary, _, why = said.partition("\n\nWhy: ")
    builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
    return Explanation(
        error.code, error.__name__, builtin.__name__, summary, why, what_to_do, dedent(example)
    )


_CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
EXPLANATIONS = {
    error.code: _explanation(error)
    for error in sorted(_CLASSES, key=lambda error: str(error.code))
    if error is not GradClipError
}
"""Those of all errors, by code."""


def explain(arguments: Sequence[str]) -> None:
    """Write the explanation of a code, or the list of all codes.

    Args:
        arguments: Those of the command.

    Raises:
        ArgumentValueError: GC010, there is no such code.
    """
    wanted = _parser().parse_args(arguments)
    if wanted.code is None:
        all_codes = [*EXPLANATIONS.values()]
        listed = "\n".join(f"{each.code}  {each.summary}" for each in all_codes)
        _write([each._asdict() for each in all_codes] if wanted.json else listed)
        return
    found = EXPLANATIONS.get(wanted.code.upper())
    if found is None:
        raise ArgumentValueError(
            f"there is no error with the code {wanted.code!r}.{_near(wanted.code.upper())} "
            "gradclip explain lists all codes."
        )
    _write(found._asdict() if wanted.json else str(found))


def listed_explain() -> None:
    """Say what the code of an error means, why it happens, and what to do."""
    # It is here for the list of commands: ``main`` calls ``explain`` before that list is imported.


def _near(code: str) -> str:
    """Name the code that has most letters in common, if more than those that all have."""
    alike = {each: sum(map(eq, each, code)) for each in EXPLANATIONS}
    nearest = max(alike, key=alike.__getitem__)
    return f" Did you mean {nearest}?" if alike[nearest] > len("GC") else ""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gradclip explain",
        description="Say what the code of an error means, why it happens, and what to do.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="Such as GC201; all where left out."
    )
    parser.add_argument("--json", action="store_true", help="One JSON object; a list of all codes.")
    return parser


def _write(what: object) -> None:
    sys.stdout.write(f"{what if isinstance(what, str) else json.dumps(what, indent=2)}\n")
