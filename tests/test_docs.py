"""The Python blocks of the README and of every page of the documentation run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A page may begin with a few lines of a program, before it shows a whole one.
PREAMBLE = {"README.md": "import optax\nimport optax_gale"}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if BLOCK.search(page.read_text())],
    ids=lambda page: str(page.relative_to(ROOT)),
)
@pytest.mark.quick("README.md", "docs/index.md", "docs/migrating.md")
def test_python_blocks_run(page):
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    exec(PREAMBLE.get(page.name, ""), namespace)
    for block in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback shows the page's own line numbers.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(page), "exec"), namespace)


def test_every_block_of_python_is_one_that_runs():
    for page in PAGES:
        fences = re.findall(r"^[ \t]*(?:```|~~~)[ \t]*\{?\.?py.*$", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"```python"}, page


def test_the_main_pages_are_there():
    names = {"index", "guide", "flax", "migrating", "how_it_works", "measurements", "example"}
    names |= {"devices", "plan"}
    assert names <= {page.stem for page in PAGES}
