"""Where measurements go: each is written as soon as it is made."""

import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

Row = dict[str, Any]


class Store:
    """Measurements in a JSON file: what each was made on, and one row a measurement.

    A measurement replaces the one of the same key. Rows say by number in which run they were made.
    """

    def __init__(self, path: Path, key: tuple[str, ...]):
        """Opens the file, if it is there.

        Args:
          path: the file.
          key: the fields that tell measurements apart.
        """
        self.path, self.key = path, key
        stored = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        self.runs: list[Row] = stored["runs"]
        self.rows: list[Row] = stored["rows"]
        self._run = -1

    def start(self, **facts: Any) -> None:
        """Begins a run with what it is made on, and the given facts."""
        self.runs.append({**describe(), "torch": _version("torch"), **facts})
        self._run = len(self.runs) - 1

    def has(self, **key: Any) -> bool:
        """Whether this was measured, without an error, on this commit and device."""
        row = self.get(**key)
        if row is None or "error" in row or self._run < 0:
            return False
        made, now = self.runs[row["run"]], self.runs[self._run]
        return all(made.get(field) == now[field] for field in ("commit", "device"))

    def get(self, **key: Any) -> Row | None:
        """The measurement of a key; fields that are not given are None."""
        wanted = [key.get(field) for field in self.key]
        return next((r for r in self.rows if [r.get(f) for f in self.key] == wanted), None)

    def add(self, row: Row) -> None:
        """Stores a measurement."""
        old = self.get(**{field: row.get(field) for field in self.key})
        self.rows = [r for r in self.rows if r is not old]
        self.rows.append({**row, "run": self._run})
        self._write()

    def _write(self) -> None:
        used = sorted({row["run"] for row in self.rows} | {self._run})
        runs = [self.runs[i] for i in used]
        rows = [{**row, "run": used.index(row["run"])} for row in self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".tmp")
        partial.write_text(f'{{"runs": {_lines(runs)}, "rows": {_lines(rows)}}}\n')
        os.replace(partial, self.path)


def slug(text: str) -> str:
    """A name fit for a file."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _lines(rows: list[Row]) -> str:
    """A JSON list with one row a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance(runs: list[Row]) -> str:
    """One line a run: device, versions, commit."""
    lines = []
    for run in runs:
        parts = [run["device"], f"JAX {run['jax']}", f"Optax {run['optax']}"]
        parts += [f"torch {run['torch']}"] if run.get("torch") else []
        parts += [f"commit {run['commit'] or 'unknown'}"]
        parts += [f"XLA_FLAGS {run['flags']}"] if run.get("flags") else []
        if "bandwidth" in run:
            parts.append(f"copies {run['bandwidth'] / 1e12:.2f} TB/s")
            parts.append(f"bfloat16 products {run['matrix_rate'] / 1e12:.0f} TFLOP/s")
        lines.append(", ".join(parts) + ".")
    return "\n".join(dict.fromkeys(lines))
