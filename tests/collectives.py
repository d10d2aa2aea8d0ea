"""What a compiled program sends between devices."""

import math
import re

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """Kind and elements, of the largest array, of every collective in a program's text."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found.append((match[2], sizes))
    return found
