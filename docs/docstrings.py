"""Lets mkdocstrings read the library's docstrings, whose inline markup is reStructuredText."""

import re
import textwrap
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Turns links, formulas, literal blocks and the heading of examples into Markdown's."""
    text = re.sub(r"`([^`<]+?)\s*<(https?://[^>]+)>`_", r"[\1](\2)", text)
    text = re.sub(r":math:`([^`]+)`", r"\\(\1\\)", text)
    text = re.sub(r"^\.\. math::\n((?:\n| +.*\n)+)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r"::\n", ":\n", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _formula(block: re.Match[str]) -> str:
    return f"$$\n{textwrap.dedent(block[1]).strip()}\n$$\n\n"


class Docstrings(griffe.Extension):
    """Converts every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Converts the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
