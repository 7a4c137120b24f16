"""Write docs/reference/errors.md from the docstrings of the errors; words above the mark stay."""

from pathlib import Path

from gradclip.cli.explain import EXPLANATIONS

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "errors.md"
MARK = "<!-- written by tests/unit/cli/error_page.py -->"


def filled(page: str) -> str:
    """Return a page with what is below the mark made anew."""
    lines = ["| code | class | built-in | meaning |", "|---|---|---|---|"]
    for each in EXPLANATIONS.values():
        link = f"[{each.code}](#{each.code.lower()})"
        lines.append(f"| {link} | `{each.error}` | `{each.builtin}` | {each.summary} |")
    for each in EXPLANATIONS.values():
        lines += ["", f"## {each.code}", "", f"`{each.error}`. {each.summary}"]
        lines += ["", f"**Why.** {each.why}", "", f"**What to do.** {each.what_to_do}"]
        if each.example:
            lines += ["", "```pycon" if ">>>" in each.example else "```", each.example, "```"]
    return "\n".join([page.partition(MARK)[0] + MARK, "", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
