"""The tutorial is true: the code of each page runs from top to bottom and prints what stands below it.

A ```text block directly under a ```python block is what the latter prints; a block without one prints nothing.
"""

import contextlib
import io
import itertools
import re
from pathlib import Path

import pytest

from grpo.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
SOLUTION = re.compile(r"^<details><summary>Solution</summary>\n\n(.*?)\n</details>$", re.DOTALL | re.MULTILINE)


def run(page: Path) -> None:
    """Run a page in the current folder. Errors name the page and its lines, as those of any source file."""
    content = page.read_text(encoding="utf-8")
    namespace = {"__name__": page.stem}
    for block in CODE.finditer(content):
        code, stated = block.groups(default="")
        above = content[: block.start(1)].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * above + code, page, "exec"), namespace)
        assert printed.getvalue() == stated, f"{page.name}, the code from line {above + 1} on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the pages run: whichever is first makes the clips of all."""
    return tmp_path_factory.mktemp("tutorial")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_and_prints_what_the_page_states(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_exercise_has_a_solution_that_is_checked(page):
    text, exercises = page.read_text(encoding="utf-8").split("\n## Exercises\n")
    solutions = SOLUTION.findall(exercises)
    assert re.findall(r"^(\d)\. ", exercises, re.MULTILINE) == [str(k + 1) for k in range(len(solutions))]
    assert len(solutions) in (2, 3) and exercises.count("<details>") == len(solutions)
    for solution in solutions:
        blocks = CODE.findall(solution + "\n")
        assert blocks and any("assert" in code or stated for code, stated in blocks), solution
    assert text.count("```python") == len(CODE.findall(text)) > 0


def test_the_pages_are_numbered_and_lead_to_each_other():
    assert [page.name[:2] for page in PAGES] == [f"{k:02}" for k in range(len(PAGES))]
    for page, after in itertools.pairwise(PAGES):
        assert re.search(rf"Next: \[.*\]\({after.name}\)", page.read_text(encoding="utf-8")), page.name


def test_the_whole_step_has_the_size_that_it_says_and_the_demo_its_own():
    page = PAGES[-1].read_text(encoding="utf-8")
    models_and_data, steps = (code for code, _ in CODE.findall(page)[1:3])
    lines = [line.strip() for line in (models_and_data + steps).splitlines()]
    lines = [line for line in lines if line and not line.startswith(("#", "import ", "from "))]
    assert "about 50 lines of code" in page and 45 < len(lines) < 55
    demo = Config()
    assert f"takes {demo.videos_per_step} videos, {demo.group_size} answers and {demo.steps}\nsteps" in page


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("```python\nprint(1)\n```\n", AssertionError),
        ("Words.\n\n```python\n1 / 0\n```\n", ZeroDivisionError),
    ],
)
def test_a_page_that_is_not_true_is_found(page, fault, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(page)
    with pytest.raises(fault) as found:
        run(file)
    line = page[: page.rindex("```python")].count("\n") + 2
    assert f"line {line}" in str(found.value) or found.traceback[-1].lineno + 1 == line


def test_the_notebooks_hold_the_code_of_the_pages():
    jupytext = pytest.importorskip("jupytext", reason="pip install 'vqathinker[notebooks]'")
    for page in PAGES:
        cells = [cell.source for cell in jupytext.read(page).cells if cell.cell_type == "code"]
        assert cells == [code.rstrip("\n") for code, _ in CODE.findall(page.read_text(encoding="utf-8"))], page.name
