"""``gradclip explain CODE``: what an error or a word of an advice means, and what to do.

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
from gradclip.diagnostics.advice_kinds import KINDS, Kind, to_do
from gradclip.errors import ArgumentValueError, GradClipError

__all__ = ["EXPLANATIONS", "Explanation", "explain", "listed_explain"]

_EXAMPLES = """\
Examples:
  gradclip explain
  gradclip explain GC201
  gradclip explain COLLAPSED
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


def _of_an_advice(kind: Kind) -> str:
    said = f"{kind.code}  a {kind.role} of gradclip suggest"
    return f"{said}\n\n{kind.summary}\n\nWhat to do: {to_do(kind.code)}"


_CLASSES = [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")]
EXPLANATIONS = {
    error.code: _explanation(error)
    for error in sorted(_CLASSES, key=lambda error: str(error.code))
    if error is not GradClipError
}
"""Those of all errors, by code."""


def explain(arguments: Sequence[str]) -> None:
    """Write the explanation of a code, of an error or of an advice, or the list of all codes.

    Args:
        arguments: Those of the command.

    Raises:
        ArgumentValueError: GC010, there is no such code.
    """
    wanted = _parser().parse_args(arguments)
    if wanted.code is None:
        everything: list[Explanation | Kind] = [*EXPLANATIONS.values(), *KINDS.values()]
        listed = "\n".join(f"{each.code}  {each.summary}" for each in everything)
        _write([_as_data(each) for each in everything] if wanted.json else listed)
        return
    code = wanted.code.upper()
    found = EXPLANATIONS.get(code) or KINDS.get(code)
    if found is None:
        raise ArgumentValueError(
            f"there is no error and no advice with the code {wanted.code!r}.{_near(code)} "
            "gradclip explain lists all codes."
        )
    text = _of_an_advice(found) if isinstance(found, Kind) else str(found)
    _write(_as_data(found) if wanted.json else text)


def _as_data(found: Explanation | Kind) -> dict[str, str]:
    if not isinstance(found, Kind):
        return found._asdict()
    return {
        "code": found.code,
        "of": found.role,
        "summary": found.summary,
        "what_to_do": to_do(found.code),
    }


def listed_explain() -> None:
    """Say what the code of an error, or a word of an advice, means, and what to do."""
    # It is here for the list of commands: ``main`` calls ``explain`` before that list is imported.


def _near(code: str) -> str:
    """Name the code that has most letters in common, if more than those that all have."""
    alike = {each: sum(map(eq, each, code)) for each in (*EXPLANATIONS, *KINDS)}
    nearest = max(alike, key=alike.__getitem__)
    return f" Did you mean {nearest}?" if alike[nearest] > len("GC") else ""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gradclip explain",
        description="Say what the code of an error, or a word of an advice, means, and what to do.",
        epilog=_EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="Such as GC201 or COLLAPSED; all where left out."
    )
    parser.add_argument("--json", action="store_true", help="One JSON object; a list of all codes.")
    return parser


def _write(what: object) -> None:
    sys.stdout.write(f"{what if isinstance(what, str) else json.dumps(what, indent=2)}\n")
