"""Tables for the terminal and for Markdown."""

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns for the terminal: the first to the left, the others to the right.

    Example:
      >>> print(aligned(["arm", "loss"], [["adamw", "3.7"]]))
      arm    loss
      adamw   3.7
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    Example:
      >>> print(markdown(["arm", "loss"], [["adamw", "3.7"]]))
      | arm | loss |
      |---|---|
      | adamw | 3.7 |
    """
    lines = [header, ["---"] * len(header), *rows]
    bars = ["|" + "|".join(line) + "|" for line in lines[1:2]]
    text = ["| " + " | ".join(line) + " |" for line in [header, *rows]]
    return "\n".join([text[0], *bars, *text[1:]])
