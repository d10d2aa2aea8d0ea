"""Reading options with tyro, and telling what is wrong with them in one line."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from examples.flax_llama.errors import UserError

T = TypeVar("T")


def parse(f: type[T] | Any, args: Sequence[str], **tyro_options: Any) -> T:
    """``tyro.cli``, with errors raised instead of printed in a box.

    Args:
      f: what to build, as for ``tyro.cli``.
      args: the command line.
      **tyro_options: as for ``tyro.cli``.

    Returns:
      What ``f`` describes, filled in.

    Raises:
      UserError: if the command line does not fit.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(f, args=args, **tyro_options)
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise UserError(_unboxed(box.getvalue())) from None


def _unboxed(text: str) -> str:
    """What is wrong, from the box that tyro draws: its first section, and what it would suggest."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" ╭╮╰╯│") for line in text.splitlines()]
    _title, *lines = filter(None, lines)
    is_end = [bool(re.fullmatch("[─-]+|Got errors:", line)) for line in lines]
    start = is_end.index(False)
    first = lines[start : is_end.index(True, start)] if True in is_end[start:] else lines[start:]
    suggested = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(lines))
    return " ".join(first) + (f". Did you mean {suggested[1]}?" if suggested else "")
