"""Tables of the docs."""

Row = dict[str, str]
"""Of a CSV file."""


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = "|".join(["---"] * len(head))
    return "\n".join(
        [f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]
    )
