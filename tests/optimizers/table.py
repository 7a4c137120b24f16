"""Write the tables of docs/reference/optimizers.md: what the tests here show; they must pass."""

from importlib.metadata import version
from pathlib import Path

import set_ups
from refused import REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "optimizers.md"
PACKAGES = {"muon": "muon-optimizer", "optimi": "torch-optimi"}
MARK = "<!-- written by tests/optimizers/table.py -->"


def tables() -> str:
    """Return a table for each library."""
    libraries = {"torch": [*set_ups.torchs_own()]}
    libraries |= {name: [*set_ups.all_of(name)] for name in set_ups.LIBRARIES}
    lines = list[str]()
    for name, found in libraries.items():
        package = PACKAGES.get(name, name)
        lines += [
            f"## {package} {version(package).partition('+')[0]}",
            "",
            "| optimizer | clips | skips | refused |",
            "|---|---|---|---|",
        ]
        for each in found:
            why = REFUSED.get((name, each.name))
            lines.append(
                f"| {each.name} | yes | yes | |"
                if why is None
                else f"| {each.name} | | | {why.said} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    words, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{words}{MARK}\n\n{tables()}")
